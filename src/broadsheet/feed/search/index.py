"""The index of the feed: words (BM25) and meaning (dense vectors), fused by reciprocal ranks.

On disk it is a folder with a file ``CURRENT`` that names the generation in use, and a folder for each generation with
an index of words and the vectors. Words are committed by tantivy as a whole or not at all, vectors are files that only
grow, and a new generation counts once ``CURRENT`` names it: a process that dies at any moment leaves an index that
answers, and the next ``update`` makes up for what is missing. One process writes at a time (a lock that falls with its
process); any number may read meanwhile.

The store says what has to be taken in: a paper's ``indexed`` is the ``changed`` of the state that the index holds.
Words come first, so that new papers are found at once; their vectors follow as fast as the encoder makes them.

Reciprocal rank fusion: Cormack, Clarke and Büttcher (2009), "Reciprocal rank fusion outperforms Condorcet and
individual rank learning methods".
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from filelock import FileLock
from jaxtyping import Float, Float32, UInt64
from sqlalchemy import ColumnElement, bindparam, func, or_, select, true, update
from tantivy import IndexWriter

from broadsheet.catalog.search import Mode
from broadsheet.errors import InvalidInput, MissingExtra, StoreError
from broadsheet.feed.database import Database
from broadsheet.feed.models import Author, Paper
from broadsheet.feed.search.encoder import Embeds, Encoder, Queries
from broadsheet.feed.search.highlight import Marker
from broadsheet.feed.search.look import DEPTH, Found, Look
from broadsheet.feed.search.vectors import VectorStore
from broadsheet.feed.search.words import LONGEST_QUERY, Entry, Only, WordIndex, paper_key, parse, sound
from broadsheet.nn.progress import SILENT, Progress

log = logging.getLogger(__name__)

CLOSE = (
    0.3  # least cosine at which a paper is found by meaning alone; among 49 papers, queries off the topic reach 0.27
)
LONGEST_PAGE = 1_000
_FORMAT = 1  # of the folder; another one is made anew
_AT_ONCE = 500  # papers read from the store, or marked in it, in one transaction
_A_COMMIT = 20_000  # papers from one commit of the words to the next
_EMBEDDED = 256  # texts from one lock of the index to the next
_PATIENCE = 300.0  # seconds until a missing encoder is looked for again


@dataclass(frozen=True)
class Hit:
    """One paper found.

    Attributes:
        score: of the mode: BM25 (``words``), cosine (``meaning``) or fused reciprocal ranks (``hybrid``).
        title_html, snippet_html: title and a stretch of the abstract, escaped, matching words in ``<mark>``.
        ranks: the paper's rank, from 1, by each engine (``words``, ``meaning``) that has it among its first ``DEPTH``.
    """

    paper_id: str
    score: float
    title_html: str
    snippet_html: str
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchPage:
    """A page of hits, best first.

    Attributes:
        total: papers found in all: those that match by words, and those close in meaning that do not.
        mode: what was really used; ``note`` says why where it is not what was asked for.
    """

    hits: tuple[Hit, ...]
    total: int
    took_ms: float
    mode: Mode
    note: str = ""


@dataclass(frozen=True)
class IndexReport:
    """How many papers were taken in, how many were removed, how many vectors were made."""

    papers: int = 0
    removed: int = 0
    vectors: int = 0
    note: str = ""

    def __str__(self) -> str:
        counts = f"{self.papers:,} papers taken in, {self.removed:,} removed, {self.vectors:,} vectors made"
        return f"{counts}. {self.note}" if self.note else counts


@dataclass(frozen=True)
class _Generation:
    name: str
    words: WordIndex
    vectors: VectorStore
    stamp: tuple[int, int] = (0, 0)  # of the file CURRENT that named it


class SearchIndex:
    """The index in a folder, derived from a store.

    Opening makes an empty index where there is none that can be read; :meth:`update` brings it up to date with the
    store. Thread-safe; other processes may read and write the same folder.

    Args:
        folder: belongs to the index alone and may be deleted at any time.
        db: where the papers are.
        encoder: gives the vectors; MiniLM, loaded once for the process when it is first needed, by default.
    """

    def __init__(self, folder: str | Path, db: Database, encoder: Embeds | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._db = db
        self._own_queries = Queries(encoder) if encoder is not None else None
        self._opening = threading.RLock()
        self._generation: _Generation | None = None
        self._current()

    # --- reading ------------------------------------------------------------------------------------------------------

    def search(
        self,
        query: str = "",
        *,
        field: str | None = None,
        author: str | None = None,
        since: date | None = None,
        until: date | None = None,
        has_method: bool | None = None,
        venue: str | None = None,
        offset: int = 0,
        limit: int = 20,
        mode: Mode = "hybrid",
        typing: bool = False,
    ) -> SearchPage:
        """Papers by words and by meaning; without a query, the latest ones.

        Args:
            query: words, ``"words in a row"``, ``begin*``, a question, an arXiv id or address; any text will do. What
                stands behind the first 1,000 characters is not read.
            field: exact.
            author: a whole name, whatever its case and accents.
            since, until: first and last day, of listing or else of publication.
            has_method: papers of the catalogue (True), or others (False).
            venue: words in a row of the venue's name.
            mode: ``"words"``, ``"meaning"`` or both fused, ``"hybrid"``, which goes by words alone where the encoder's
                weights are not to be had.
            typing: the query's last word may be unfinished.

        Raises:
            InvalidInput: a negative offset, a limit not from 1 to 1,000, an unknown mode.
            MissingExtra: ``mode="meaning"`` without the encoder's weights.
            StoreError: the database cannot be read.
        """
        started = time.perf_counter()
        if offset < 0 or not 1 <= limit <= LONGEST_PAGE:
            raise InvalidInput(f"offset={offset}, limit={limit}: expected 0 or more, and 1 to {LONGEST_PAGE:,}")
        if mode not in get_args(Mode):
            raise InvalidInput(f"mode={mode!r}: expected one of {', '.join(get_args(Mode))}")
        generation = self._current()
        field, author, venue = (None if value is None else sound(value) for value in (field, author, venue))
        look = Look(generation.words, Only(field, author, since, until, has_method, venue))
        query, note = sound(query[:LONGEST_QUERY]).strip(), ""
        terms = look.words.settle(look.searcher, parse(query), typing=typing)
        if not query:
            found = look.latest(offset, limit)
        elif (found := look.identified(query, offset)) is not None:
            mode = "words"
        else:
            near = Found()
            try:
                if mode != "words":
                    near = look.near(self._queries().vector(query), generation.vectors.view(), DEPTH, CLOSE)
            except MissingExtra as error:
                if mode == "meaning":
                    raise
                mode, note = "words", f"Searched by words only. {error}"
            found = near.page(offset, limit) if mode == "meaning" else look.fused(terms, near, mode, offset, limit)
        hits = self._hits(found, look, Marker(terms))
        return SearchPage(hits, found.total, (time.perf_counter() - started) * 1e3, mode, note)

    def suggest(self, prefix: str, limit: int = 8) -> list[str]:
        """What an unfinished query may become by finishing its last word, the most frequent first."""
        words = self._current().words
        return words.completions(words.searcher(), sound(prefix[:LONGEST_QUERY]), limit)

    def similar(self, paper_id: str, k: int = 6) -> tuple[str, ...]:
        """Ids of the papers nearest in meaning, nearest first; none where the paper has no vector yet."""
        found, vectors = self.vectors([paper_id])
        return tuple(ident for ident, _ in self.nearest(vectors[0], k, but=[paper_id])) if found else ()

    def vectors(self, ids: Sequence[str]) -> tuple[tuple[str, ...], Float32[np.ndarray, "found 384"]]:
        """Those of the ids that have a vector, and their vectors, in the same order."""
        has, vectors = self._current().vectors.view().get(_keys(ids))
        return tuple(ident for ident, there in zip(ids, has, strict=True) if there), vectors

    def sample(self, n: int, seed: int = 0) -> Float32[np.ndarray, "found 384"]:
        """Vectors of ``n`` papers drawn at random (of all, where there are no more)."""
        view = self._current().vectors.view()
        rows = view.rows.rows
        if len(rows) > n:
            rows = np.random.default_rng(seed).choice(rows, n, replace=False)
        return np.asarray(view.matrix[np.sort(rows)], dtype=np.float32)

    def nearest(
        self,
        vector: Float[np.ndarray, "384"],
        k: int,
        *,
        field: str | None = None,
        since: date | None = None,
        until: date | None = None,
        but: Collection[str] = (),
    ) -> list[tuple[str, float]]:
        """The papers whose unit vectors have the largest product with this one, and the product; largest first.

        Args:
            vector: need not be of length 1: the weights of a linear model will do.
            but: ids of papers to leave out.
        """
        generation = self._current()
        look = Look(generation.words, Only(field=field, since=since, until=until))
        length = float(np.linalg.norm(vector))
        if length == 0 or k < 1:
            return []
        found = look.near(np.asarray(vector) / length, generation.vectors.view(), k + len(but))
        names, left_out = look.ids(found.keys), set(but)
        scored = ((names.get(key), score * length) for key, score in zip(found.keys, found.scores, strict=True))
        return [(ident, score) for ident, score in scored if ident is not None and ident not in left_out][:k]

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n 384"]:
        """Vectors of any texts, by the index's encoder.

        Raises:
            MissingExtra: its weights are not to be had.
        """
        return self._queries().encoder.embed(texts)

    def warm(self) -> None:
        """Load the encoder now, if its weights are there, so that the first search need not wait for it."""
        with suppress(MissingExtra):
            self._queries().vector("a first search")

    def __len__(self) -> int:
        return self._current().words.searcher().num_docs

    def _hits(self, found: Found, look: Look, marker: Marker) -> tuple[Hit, ...]:
        names = look.ids(found.keys)
        with self._db.read() as session:
            wanted = select(Paper.id, Paper.title, Paper.abstract).where(Paper.id.in_(names.values()))
            texts = {ident: (title, abstract) for ident, title, abstract in session.execute(wanted)}
        return tuple(
            Hit(
                paper_id=names[key],
                score=score,
                title_html=marker.whole(texts[names[key]][0]),
                snippet_html=marker.snippet(texts[names[key]][1]),
                ranks=found.ranks.get(key, {}),
            )
            for key, score in zip(found.keys, found.scores, strict=True)
            if names.get(key) in texts  # it may have been deleted since the index was brought up to date
        )

    # --- writing ------------------------------------------------------------------------------------------------------

    def update(self, progress: Progress = SILENT) -> IndexReport:
        """Take in what has changed in the store since the last time, and forget what it no longer has.

        Waits while another process writes. Vectors come in small steps after the words; without the encoder's weights
        there are none, and the report says so.

        Raises:
            StoreError: the database cannot be read or written.
        """
        with self._writing() as generation:
            report, fresh = self._take_in(generation, progress)
        return self._make_vectors(report, fresh, progress)

    def rebuild(self, progress: Progress = SILENT) -> IndexReport:
        """Make the index anew from the store; searches go on in the old one until the new one is whole.

        Vectors whose checksum holds and whose text is still the paper's are kept.
        """
        with self._writing() as old:
            name = f"g-{int(old.name.partition('-')[2]) + 1}"
            folder = self.folder / name
            new = _Generation(name, WordIndex(folder / "words"), VectorStore(folder / "vectors"))
            new.vectors.take_over(old.vectors)
            report, fresh = self._take_in(new, progress, everything=True)
            self._point_to(name)
        return self._make_vectors(report, fresh, progress)

    def _take_in(
        self, generation: _Generation, progress: Progress, everything: bool = False
    ) -> tuple[IndexReport, list[str]]:
        """Bring the words up to date; the second value is the ids of the papers that were taken in."""
        which, fresh, last = true() if everything else _UNINDEXED, [], ""
        with self._db.read() as session:
            waiting = session.scalar(select(func.count()).select_from(Paper).where(which)) or 0
        with progress.task("papers indexed", waiting) as task, _Changes(generation, self._db) as changes:
            while papers := self._papers(Paper.id > last, which):
                changes.put(papers)
                last = papers[-1].entry.id
                fresh += [paper.entry.id for paper in papers]
                task.advance(len(papers))
            changes.commit()
            gone, missing = self._differences(generation)
            changes.remove(gone)
            for some in _in_parts(missing, _AT_ONCE):
                changes.put(self._papers(Paper.id.in_(some)))
            changes.commit()
        self._drop_strays(generation, everything)
        return IndexReport(papers=len(fresh) + len(missing), removed=len(gone)), [*fresh, *missing]

    def _drop_strays(self, generation: _Generation, everything: bool) -> None:
        """Forget vectors of papers that have no words: they were taken over, or a writer died between the two.

        Looked for in all that is made anew, else only where there are more vectors than papers: they would take the
        places of papers that are there.
        """
        searcher, rows = generation.words.searcher(), generation.vectors.view().rows
        if everything or len(rows.keys) > searcher.num_docs:
            held = np.array(generation.words.all_keys(searcher), dtype=np.uint64)
            generation.vectors.drop(np.setdiff1d(rows.keys, held))

    def _differences(self, generation: _Generation) -> tuple[list[int], list[str]]:
        """Keys that the store no longer has, and ids that the index should have and has not.

        Looked for only where the counts differ: after a deletion, or when a folder was lost or put back.
        """
        searcher = generation.words.searcher()
        with self._db.read() as session:
            n = session.scalar(select(func.count()).select_from(Paper)) or 0
            n -= session.scalar(select(func.count()).select_from(Paper).where(_UNINDEXED)) or 0
            if n == searcher.num_docs:
                return [], []
            ids = session.scalars(select(Paper.id)).all()
            waiting = set(session.scalars(select(Paper.id).where(_UNINDEXED)))
        stored = dict(zip(_keys(ids).tolist(), ids, strict=True))
        held = set(generation.words.all_keys(searcher))
        missing = [ident for key, ident in stored.items() if key not in held and ident not in waiting]
        return sorted(held - set(stored)), sorted(missing)

    def _make_vectors(self, report: IndexReport, fresh: Sequence[str], progress: Progress) -> IndexReport:
        made = 0
        try:
            encoder = self._queries().encoder
            if self._current().vectors.encoder not in (None, encoder.fingerprint):
                with self._writing() as generation:
                    generation.vectors.clear()
            for keys in (_keys(fresh), None):  # what else has no vector is looked for last, where the counts differ
                keys = self._keys_without_vector() if keys is None else keys
                with progress.task("vectors made", len(keys)) as task:
                    for some in _in_parts(keys, _EMBEDDED):
                        with self._writing() as generation:
                            made += self._embed(generation, encoder, some)
                        task.advance(len(some))
        except MissingExtra as error:
            return replace(report, vectors=made, note=f"No vectors were made. {error}")
        return replace(report, vectors=made)

    def _embed(self, generation: _Generation, encoder: Embeds, keys: UInt64[np.ndarray, " n"]) -> int:
        names = Look(generation.words).ids(keys.tolist())
        papers = self._papers(Paper.id.in_(names.values()))
        _, held = generation.vectors.view().rows.find(_keys([paper.entry.id for paper in papers]))
        stale = [paper for paper, text in zip(papers, held.tolist(), strict=True) if paper.digest != text]
        if stale:
            vectors = encoder.embed([paper.meaning for paper in stale])
            digests = np.array([paper.digest for paper in stale], dtype=np.uint64)
            generation.vectors.append(_keys([paper.entry.id for paper in stale]), digests, vectors, encoder.fingerprint)
            generation.vectors.grow()
        return len(stale)

    def _keys_without_vector(self) -> UInt64[np.ndarray, " n"]:
        generation = self._current()
        searcher, rows = generation.words.searcher(), generation.vectors.view().rows
        if len(rows.keys) == searcher.num_docs:
            return np.zeros(0, dtype=np.uint64)
        return np.setdiff1d(np.array(generation.words.all_keys(searcher), dtype=np.uint64), rows.keys)

    def _papers(self, *which: ColumnElement[bool]) -> list["_Read"]:
        """At most 500 of these papers, by id, as they stand in the store."""
        columns = (
            Paper.id,
            Paper.title,
            Paper.abstract,
            Paper.venue,
            Paper.field,
            Paper.slug,
            Paper.day,
            Paper.changed,
        )
        with self._db.read() as session:
            rows = session.execute(select(*columns).where(*which).order_by(Paper.id).limit(_AT_ONCE)).all()
            named = select(Author.paper_id, Author.name).where(Author.paper_id.in_([row.id for row in rows]))
            authors: dict[str, list[str]] = {}
            for ident, name in session.execute(named.order_by(Author.paper_id, Author.position)):
                authors.setdefault(ident, []).append(name)
        return [_read(row, authors.get(row.id, [])) for row in rows]

    # --- generations --------------------------------------------------------------------------------------------------

    def _current(self) -> _Generation:
        """The generation that CURRENT names; an empty one where there is none that can be read."""
        known = self._generation
        if known is not None and known.stamp == _stamp(self.folder / "CURRENT"):
            return known
        with self._opening:
            for _ in range(3):  # between the reading of the name and of the folder, a writer may replace both
                if (opened := self._open()) is not None:
                    break
            else:
                with self._lock():
                    opened = self._open(log.warning)
                    if opened is None:
                        self._point_to(f"g-{max(self._numbers(), default=0) + 1}")
                        opened = self._open()
            if opened is None:
                raise StoreError(f"{self.folder}: no search index can be made here; delete the folder and try again")
            self._generation = opened
            return opened

    def _open(self, tell: Callable[..., None] = log.debug) -> _Generation | None:
        current = self.folder / "CURRENT"
        try:
            stamp, said = _stamp(current), json.loads(current.read_text())
            name = str(said["generation"])
            if said["format"] != _FORMAT or not (self.folder / name / "words").is_dir():
                return None
            return _Generation(
                name, WordIndex(self.folder / name / "words"), VectorStore(self.folder / name / "vectors"), stamp
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            tell("the search index in %s cannot be read and is made anew: %s", self.folder, error)
            return None

    def _point_to(self, name: str) -> None:
        """Put a generation in use, in one step; an empty one is made if it is not there."""
        WordIndex(self.folder / name / "words")
        VectorStore(self.folder / name / "vectors")
        new = self.folder / "CURRENT.new"
        with open(new, "w") as stream:
            stream.write(json.dumps({"format": _FORMAT, "generation": name}))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, self.folder / "CURRENT")

    def _numbers(self) -> list[int]:
        return [int(entry.name[2:]) for entry in self.folder.glob("g-*") if entry.name[2:].isdecimal()]

    def _lock(self) -> FileLock:
        return FileLock(self.folder / "lock")

    @contextmanager
    def _writing(self) -> Iterator[_Generation]:
        """The generation in use, to write to; nobody else writes meanwhile. What dead writers left is cleared away."""
        self._current()
        with self._lock():
            generation = self._current()
            for number in self._numbers():
                if f"g-{number}" != generation.name:
                    shutil.rmtree(self.folder / f"g-{number}", ignore_errors=True)
            yield generation

    def _queries(self) -> Queries:
        return self._own_queries or shared_queries()


@dataclass(frozen=True)
class _Read:
    """A paper as it was read from the store; ``meaning`` is the text that its vector stands for."""

    entry: Entry
    changed: datetime
    meaning: str

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.blake2b(self.meaning.encode(), digest_size=8).digest(), "little") or 1


class _Changes:
    """Changes of the words, committed from time to time; only then are the papers marked as indexed."""

    def __init__(self, generation: _Generation, db: Database) -> None:
        self._words, self._vectors, self._db = generation.words, generation.vectors, db
        self._writer: IndexWriter | None = None
        self._uncommitted: list[tuple[str, datetime]] = []

    def __enter__(self) -> "_Changes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.rollback()  # whatever was not committed
            self._writer.wait_merging_threads()

    def put(self, papers: Sequence[_Read]) -> None:
        """Take papers in, in the place of what is held of them. Vectors of another text are dropped first."""
        keys = _keys([paper.entry.id for paper in papers])
        _, held = self._vectors.view().rows.find(keys)
        digests = np.array([paper.digest for paper in papers], dtype=np.uint64)
        self._vectors.drop(keys[(held != 0) & (held != digests)])
        for paper in papers:
            self.writer.delete_documents_by_term("id", paper.entry.id)
            self.writer.add_document(self._words.document(paper.entry))
        self._uncommitted += [(paper.entry.id, paper.changed) for paper in papers]
        if len(self._uncommitted) >= _A_COMMIT:
            self.commit()

    def remove(self, keys: Sequence[int]) -> None:
        """Forget papers."""
        for some in _in_parts(keys, _AT_ONCE):
            self.writer.delete_documents_by_query(self._words.keys(some))
        self._vectors.drop(np.array(keys, dtype=np.uint64))

    def commit(self) -> None:
        """Make the changes count, then mark the papers: should the process die in between, they are taken in twice."""
        if self._writer is None:
            return
        self._writer.commit()
        mark = (
            update(Paper)
            .where(Paper.id == bindparam("ident"), Paper.changed == bindparam("then"))
            .values(indexed=bindparam("then"))
        )
        for some in _in_parts(self._uncommitted, _AT_ONCE):
            with self._db.write() as session:
                # By the connection: the session's own way of updating many rows takes no condition.
                session.connection().execute(mark, [{"ident": ident, "then": changed} for ident, changed in some])
        self._uncommitted = []

    @property
    def writer(self) -> IndexWriter:
        if self._writer is None:
            self._writer = self._words.writer()
        return self._writer


# --- the store --------------------------------------------------------------------------------------------------------

# The table's index ix_papers_unindexed has the same condition: without it every update would read all papers.
_UNINDEXED = or_(Paper.indexed.is_(None), Paper.indexed != Paper.changed)


def _read(row: Any, authors: Sequence[str]) -> _Read:
    texts = [row.abstract]
    if (entry := _catalogue().get(row.slug)) is not None:
        # The catalogue's own words on the paper: short ones first, as the encoder cuts off what is too long.
        texts.insert(0, f"{entry.tagline} {', '.join(entry.topics)}.")
        if row.abstract != entry.summary:
            texts.append(entry.summary)
    known = Entry(row.id, row.title, tuple(texts), tuple(authors), row.venue, row.field, row.slug, row.day)
    return _Read(known, row.changed, " ".join([f"{row.title}.", *texts]).strip())


@cache
def _catalogue() -> dict[str | None, Any]:
    from broadsheet.catalog import papers

    return {entry.slug: entry for entry in papers()}


_shared: Queries | None = None
_missing: tuple[float, MissingExtra] | None = None
_loading = threading.Lock()


def shared_queries() -> Queries:
    """The process's one encoder, loaded at the first call.

    Raises:
        MissingExtra: its weights are not to be had; they are looked for again after five minutes.
        CheckpointError: the weights found are not the published ones.
    """
    global _shared, _missing
    with _loading:
        if _shared is None:
            if _missing is not None and time.monotonic() - _missing[0] < _PATIENCE:
                raise _missing[1]
            try:
                _shared = Queries(Encoder())
            except MissingExtra as error:
                _missing = time.monotonic(), error
                raise
        return _shared


def _keys(ids: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    return np.array([paper_key(ident) for ident in ids], dtype=np.uint64)


def _in_parts(things: Any, size: int) -> Iterator[Any]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_ino, state.st_mtime_ns
