"""What each page shows, as data: the page renders it, ``/api/v1`` answers with it, feeds are made from it."""

import math
import struct
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from broadsheet import catalog
from broadsheet.catalog.bibtex import bibtex
from broadsheet.errors import ResultsError, UnknownPaper
from broadsheet.feed import papers, social
from broadsheet.feed.models import Account, Paper
from broadsheet.feed.papers import PaperCard
from broadsheet.lab.report import bar
from broadsheet.lab.results import Published, published, results_dir
from broadsheet.lab.verdicts import Finding
from broadsheet.web.rendering import paper_path, shorten

VerdictName = Literal["shown", "not shown", "inconclusive"]


class Verdicts(BaseModel):
    """How many of a paper's claims the published measurements bear out."""

    shown: int = 0
    not_shown: int = 0
    inconclusive: int = 0

    @property
    def total(self) -> int:
        return self.shown + self.not_shown + self.inconclusive

    @classmethod
    def count(cls, findings: Iterable[Finding]) -> "Verdicts":
        counts = cls()
        for found in findings:
            name = str(found.verdict).replace(" ", "_")
            setattr(counts, name, getattr(counts, name) + 1)
        return counts


class Figure(BaseModel):
    """A published figure; width and height in pixels."""

    path: str
    caption: str
    width: int
    height: int


class Card(BaseModel):
    """A paper in a list."""

    id: str
    title: str
    path: str
    teaser: str = Field(description="One or two sentences: our own where the paper is of the catalogue.")
    abstract: str
    authors: list[str]
    n_authors: int
    published: date | None
    listed_on: date | None
    venue: str
    field: str
    slug: str | None
    upvotes: int = Field(description="Votes of this feed's readers and those its source showed.")
    comments: int
    verdicts: Verdicts | None = Field(default=None, description="Published verdicts, where the paper's method is here.")


class Tab(BaseModel):
    """A choice beside a list's title."""

    name: str
    path: str
    current: bool


class Target(BaseModel):
    """What a reader can follow from a list."""

    kind: Literal["author", "field", "search"]
    value: str


class Listing(BaseModel):
    """A list of papers: a day, a field, a search, a reader's list. What is only looks stays out of the JSON."""

    title: str
    explanation: str = Field(description="One line that says how the list came about.")
    path: str
    papers: list[Card]
    total: int | None = Field(default=None, description="How many papers the whole list has, where that is known.")
    offset: int = 0
    earlier: str | None = Field(
        default=None, description="Where the list goes on: its next page, or the period before."
    )
    later: str | None = None
    earlier_label: str = Field(default="More", exclude=True)
    later_label: str = Field(default="Back", exclude=True)
    feed: str = Field(default="", exclude=True)  # path of the list's RSS, Atom and BibTeX, without ending
    feed_query: str = Field(default="", exclude=True)
    tabs: list[Tab] = Field(default=[], exclude=True)
    follow: Target | None = Field(default=None, exclude=True)
    empty: str = Field(default="No papers here yet.", exclude=True)


class Found(Listing):
    """What a search found."""

    query: str
    field: str = ""
    author: str = ""
    venue: str = ""
    since: date | None = None
    until: date | None = None
    has_method: bool = False
    took_ms: float = 0
    mode: str = Field(default="", description="words, meaning, or hybrid: both, fused by reciprocal rank.")


class ClaimView(BaseModel):
    """A claim: the paper's figure, ours, the baseline's, the interval and the verdict."""

    id: str
    sentence: str
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    measured: str
    presets: list[str]
    paper: str
    paper_baseline: str
    rival: str
    ours: float | None = None
    baseline: float | None = None
    compared: Literal["difference", "ratio"]
    effect: float | None = None
    low: float | None = Field(default=None, description="Lower end of the 95% interval of the effect over seeds.")
    high: float | None = None
    needed: float = Field(description="What the effect must exceed (or stay below) for the claim to count as shown.")
    verdict: VerdictName | None = None
    seeds: int = 0
    per_seed: dict[str, list[float]] = {}
    scale: dict[str, float] | None = Field(default=None, exclude=True)


class CaveatView(BaseModel):
    text: str
    shown_by: str | None


class ReportedView(BaseModel):
    metric: str
    value: str
    dataset: str
    baseline: str
    baseline_value: str
    remark: str


class Method(BaseModel):
    """What the catalogue and the lab add to a paper that runs."""

    slug: str
    tagline: str
    summary: str
    topics: list[str]
    licence: str
    built: bool
    snippet: str
    reported: list[ReportedView]
    claims: list[ClaimView]
    caveats: list[CaveatView]
    figures: list[Figure]
    facts: dict[str, Any]
    bibtex: str


class Said(BaseModel):
    """A comment in its place."""

    id: int
    depth: int
    author: str | None
    body: str
    created: datetime
    edited: datetime | None
    deleted: bool
    account_id: int | None = Field(default=None, exclude=True)


class PaperView(Card):
    """A paper's page."""

    version: int
    doi: str
    categories: list[str]
    links: dict[str, str]
    arxiv: bool = Field(description="Whether the id is an arXiv id.")
    own_abstract: bool = Field(description="Whether the abstract is the paper's own, not our summary in its place.")
    method: Method | None
    similar: list[Card]
    discussion: list[Said]
    submitted_by: str | None
    votes: int = Field(description="Votes of this feed's readers alone.")


# --- from the store -------------------------------------------------------------------------------------------------


def card(paper: PaperCard) -> Card:
    """A stored paper as it stands in a list."""
    entry = _entry(paper.slug)
    result = published_result(paper.slug)
    return Card(
        id=paper.id,
        title=paper.title,
        path=paper_path(paper.id),
        teaser=entry.tagline if entry else shorten(paper.abstract, 260),
        abstract=paper.abstract,
        authors=list(paper.authors),
        n_authors=paper.n_authors,
        published=paper.published,
        listed_on=paper.listed_on,
        venue=paper.venue,
        field=paper.field,
        slug=paper.slug,
        upvotes=paper.upvotes,
        comments=paper.comments,
        verdicts=Verdicts.count(result.findings) if result else None,
    )


def _entry(slug: str | None) -> catalog.Paper | None:
    try:
        return catalog.paper(slug) if slug else None
    except UnknownPaper:  # it has left the catalogue since the store was written
        return None


# --- from the catalogue and the published results -------------------------------------------------------------------


def published_result(slug: str | None) -> Published | None:
    """A paper's published result, read again only when its file has changed; None where none is readable."""
    if not slug:
        return None
    file = results_dir() / f"{slug}.json"
    try:
        return _published(slug, file, file.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=512)
def _published(slug: str, file: Path, _changed: int) -> Published | None:
    try:
        return published(slug, file.parent)
    except (ResultsError, UnknownPaper):
        return None


def claims(paper: catalog.Paper, findings: Sequence[Finding]) -> list[ClaimView]:
    """All claims of an entry, measured or not, in its order."""
    by_id = {found.claim.id: found for found in findings}
    return [claim_view(claim, by_id.get(claim.id)) for claim in paper.claims]


def claim_view(claim: catalog.Claim, found: Finding | None) -> ClaimView:
    """A claim with what was measured of it."""
    view = ClaimView(
        id=claim.id,
        sentence=claim.sentence,
        metric=claim.metric,
        unit=claim.unit,
        better=claim.better,
        measured=claim.measured,
        presets=list(claim.presets),
        paper=claim.paper,
        paper_baseline=claim.paper_baseline,
        rival=claim.baseline or "threshold",
        compared=claim.effect,
        needed=claim.bar if claim.better == "higher" or claim.effect == "ratio" else -claim.bar,
    )
    if found is None:
        return view
    measured = {
        "ours": _finite(found.ours_mean),
        "baseline": _finite(found.baseline_mean),
        "effect": _finite(found.effect),
        "low": _finite(found.low),
        "high": _finite(found.high),
        "verdict": str(found.verdict),
        "seeds": found.seeds,
        "per_seed": {"ours": list(found.ours), "baseline": list(found.baseline)},
        "scale": bar(found),
    }
    return view.model_copy(update=measured)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def method(slug: str | None, paper_id: str) -> Method | None:
    """What the catalogue and the published results say of a paper."""
    entry, result = _entry(slug), published_result(slug)
    if entry is None:
        return None
    figures = [
        Figure(path=f"{paper_path(paper_id)}/figures/{file.name}", caption=caption, width=size[0], height=size[1])
        for file, caption in (result.figures if result else ())
        if (size := png_size(file)) is not None
    ]
    return Method(
        slug=entry.slug,
        tagline=entry.tagline,
        summary=entry.summary,
        topics=list(entry.topics),
        licence=entry.licence,
        built=entry.built,
        snippet=entry.snippet.strip("\n"),
        reported=[
            ReportedView(**{name: getattr(row, name) for name in ReportedView.model_fields}) for row in entry.reported
        ],
        claims=claims(entry, result.findings if result else ()),
        caveats=[CaveatView(text=caveat.text, shown_by=caveat.shown_by) for caveat in entry.caveats],
        figures=figures,
        facts=dict(result.facts) if result else {},
        bibtex=bibtex(entry),
    )


def figure_file(slug: str | None, name: str) -> Path | None:
    """A published figure by its name: only files that the result itself lists are ever opened."""
    result = published_result(slug)
    return next((file for file, _ in result.figures if file.name == name), None) if result else None


def png_size(file: Path) -> tuple[int, int] | None:
    """Width and height of a PNG, from its header; None where the file is gone or is none."""
    try:
        with file.open("rb") as opened:
            head = opened.read(24)
    except OSError:
        return None
    return struct.unpack(">II", head[16:24]) if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24 else None


def verdicts_of(slugs: Iterable[str | None]) -> Verdicts:
    """The published verdicts of several papers together."""
    return Verdicts.count(
        found for slug in slugs if (result := published_result(slug)) is not None for found in result.findings
    )


# --- whole pages ------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """Papers of one field on the front page: over how many of its four columns, and in how many of its own."""

    field: str
    papers: list[Card]
    span: int = Field(default=4, exclude=True)
    columns: int = Field(default=4, exclude=True)


class Front(BaseModel):
    """The front page: the latest papers, the measured ones first, the rest by field."""

    explanation: str
    day: date | None
    week: str | None
    month: str | None
    earlier: str | None
    total: int
    verdicts: Verdicts
    lead: Card | None
    lead_text: str
    figure: Figure | None
    beside: list[Card]
    below: list[Card]
    sections: list[Section]

    @property
    def rows(self) -> list[list[Section]]:
        """The sections in rows, each four columns wide."""
        rows: list[list[Section]] = [[]]
        for section in self.sections:
            if sum(each.span for each in rows[-1]) + section.span > WIDE:
                rows.append([])
            rows[-1].append(section)
        return rows


class ClaimsRow(BaseModel):
    """A paper on the page of claims."""

    title: str
    path: str
    slug: str
    reported: int
    verdicts: Verdicts
    claims: list[ClaimView]


class ClaimsField(BaseModel):
    field: str
    papers: list[ClaimsRow]


class ClaimsPage(BaseModel):
    """Every claim of the catalogue with its verdict."""

    verdicts: Verdicts
    fields: list[ClaimsField]


def claims_page() -> ClaimsPage:
    """Every claim of the catalogue, by field; papers whose claims are measured come first."""
    by_field: dict[str, list[ClaimsRow]] = {}
    for entry in catalog.papers():
        result = published_result(entry.slug)
        findings = result.findings if result else ()
        row = ClaimsRow(
            title=entry.title,
            path=paper_path(entry.arxiv),
            slug=entry.slug,
            reported=len(entry.reported),
            verdicts=Verdicts.count(findings),
            claims=claims(entry, findings),
        )
        by_field.setdefault(entry.field, []).append(row)
    rows = [row for rows in by_field.values() for row in rows]
    total = Verdicts(
        **{name: sum(getattr(row.verdicts, name) for row in rows) for name in ("shown", "not_shown", "inconclusive")}
    )
    groups = [
        ClaimsField(field=name, papers=sorted(rows, key=lambda row: -len(row.claims)))
        for name, rows in by_field.items()
    ]
    return ClaimsPage(verdicts=total, fields=groups)


MOST_ON_FRONT = 60
WIDE = 4  # columns of the front page


def laid_out(groups: Sequence[tuple[str, list[Card]]]) -> list[Section]:
    """Sections that fill rows of four columns and leave no hole beside them.

    A field of up to three papers takes a column for each, and smaller ones stand in the room beside it; what is still
    left of a row goes to its widest section. A larger field has a row to itself, in as many columns as come out even.
    """
    waiting = [
        Section(field=name, papers=cards, span=min(len(cards), WIDE), columns=_columns(len(cards)))
        for name, cards in groups
        if cards
    ]
    placed: list[Section] = []
    while waiting:
        widest = max(section.span for section in waiting)
        row, left = [], WIDE
        while fitting := [section for section in waiting if section.span <= (left if row else widest)]:
            best = max(fitting, key=lambda section: section.span)  # of equals the first: the order of the fields
            waiting.remove(best)
            row.append(best)
            left -= best.span
        row[0].span += left
        placed += row
    return placed


def _columns(n: int) -> int:
    """In how many columns so many papers leave the fewest gaps: four, or three."""
    return n if n < WIDE else min((WIDE, WIDE - 1), key=lambda columns: -n % columns)


def front(session: Session) -> Front:
    """The front page, from the latest papers: a day with few of them is filled up with the days before."""
    day = papers.latest_day(session)
    cards = [card(each) for each in papers.list_papers(session, sort="new", limit=MOST_ON_FRONT)]
    # What has been measured leads, the best-liked first; the order among equals stays the list's.
    cards.sort(key=lambda each: (each.verdicts is None, -each.upvotes))
    lead, beside, below, rest = cards[0] if cards else None, cards[1:4], cards[4:7], cards[7:]
    by_field: dict[str, list[Card]] = {}
    for each in rest:
        by_field.setdefault(each.field, []).append(each)
    order = {name: place for place, name in enumerate(catalog.fields())}
    sections = sorted(by_field.items(), key=lambda item: order.get(item[0], len(order)))
    told = method(lead.slug, lead.id) if lead else None
    text = told.summary if told else (lead.abstract if lead else "")
    return Front(
        explanation="Daily papers, each with the claims it makes and what happened when they were measured.",
        day=day,
        week=papers.period_of("week", day) if day else None,
        month=papers.period_of("month", day) if day else None,
        earlier=papers.neighbours(session, "day", day).earlier if day else None,
        total=papers.count_papers(session),
        verdicts=verdicts_of(entry.slug for entry in catalog.papers()),
        lead=lead,
        lead_text=shorten(text, 700),
        figure=told.figures[0] if told and told.figures else None,
        beside=beside,
        below=below,
        sections=laid_out(sections),
    )


def paper_view(session: Session, stored: papers.PaperCard, similar: Sequence[str]) -> PaperView:
    """A paper's page."""
    submitter = session.scalar(
        select(Account.name).join(Paper, Paper.submitted_by == Account.id).where(Paper.id == stored.id)
    )
    row = session.get(Paper, stored.id)
    said = [
        Said(
            id=each.id,
            depth=depth,
            author=each.account.name if each.account and not each.deleted else None,
            body="" if each.deleted else each.body,
            created=each.created,
            edited=each.edited,
            deleted=each.deleted is not None,
            account_id=each.account_id,
        )
        for depth, each in social.comments(session, stored.id)
    ]
    return PaperView(
        **card(stored).model_dump(),
        version=stored.version,
        doi=row.doi if row else "",
        categories=list(stored.categories),
        links=stored.links,
        arxiv=not stored.id.startswith("x-"),
        own_abstract=bool(stored.abstract) and not stored.summary_is_ours,
        method=method(stored.slug, stored.id),
        similar=[card(each) for each in papers.cards(session, similar)],
        discussion=said,
        submitted_by=submitter,
        votes=stored.votes,
    )
