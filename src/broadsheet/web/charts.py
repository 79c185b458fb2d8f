"""Numbers as pictures: the map of the papers, activity over time. What is drawn is worked out here, in SVG's units."""

import hashlib
from collections import Counter
from datetime import date
from threading import Lock
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from threadpoolctl import threadpool_limits

from broadsheet import catalog
from broadsheet.feed import papers, ranking
from broadsheet.feed.database import Database
from broadsheet.feed.models import Paper
from broadsheet.web.rendering import paper_path, plural, shorten

WIDTH, HEIGHT, MARGIN = 1000, 580, 60
MOST_ON_MAP = 400  # the page stays below 100 kB
COLOURS = ("c0", "c1f", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9")
OTHER = "c10"
LABEL_PIXELS = 5.9  # width of a letter, to keep names from running into each other


class Point(BaseModel):
    """A paper on the map, in a plane of 1000 by 580."""

    id: str
    title: str
    path: str
    field: str
    x: float
    y: float
    label: str = Field(default="", exclude=True)
    label_x: float = Field(default=0, exclude=True)
    anchor: str = Field(default="start", exclude=True)
    colour: str = Field(default=OTHER, exclude=True)
    named: bool = Field(default=False, exclude=True)


class FieldCount(BaseModel):
    name: str
    count: int
    colour: str = Field(default=OTHER, exclude=True)


class Map(BaseModel):
    """The papers by meaning on a plane."""

    explanation: str
    points: list[Point]
    fields: list[FieldCount]
    empty: str = Field(default="", exclude=True)


def map_of(db: Database, index: Any) -> Map:
    """The latest papers, placed by the vectors of their text: near ones are near in meaning."""
    with db.read() as session:
        latest = (
            select(Paper.id, Paper.title, Paper.field, Paper.slug)
            .order_by(Paper.listed_on.desc().nulls_last(), Paper.id)
            .limit(MOST_ON_MAP)
        )
        rows = session.execute(latest).all()
    have, vectors = index.vectors([ident for ident, *_ in rows])
    there = set(have)
    known = [row for row in rows if row[0] in there]
    if len(known) < 3:
        return Map(
            explanation="Every point is a paper; near ones are near in meaning.",
            points=[],
            fields=[],
            empty="There is nothing to draw: the papers have no vectors yet.",
        )
    flat = _laid_out(vectors)
    low, span = flat.min(axis=0), np.ptp(flat, axis=0)
    placed = (flat - low) / np.where(span > 0, span, 1)
    order = {name: place for place, name in enumerate(catalog.fields())}
    colours = {name: COLOURS[place % len(COLOURS)] for name, place in order.items()}
    points = [
        Point(
            id=ident,
            title=title,
            path=paper_path(ident),
            field=field,
            x=round(MARGIN + float(x) * (WIDTH - 2 * MARGIN), 1),
            y=round(MARGIN / 2 + float(y) * (HEIGHT - MARGIN), 1),
            label=slug or shorten(title, 40),
            colour=colours.get(field, OTHER),
        )
        for (ident, title, field, slug), (x, y) in zip(known, placed, strict=True)
    ]
    _name(points)
    counts = Counter(point.field for point in points)
    fields = [
        FieldCount(name=name, count=count, colour=colours.get(name, OTHER))
        for name, count in sorted(counts.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    which = f"{'the latest ' if len(rows) == MOST_ON_MAP else ''}{plural(len(points), 'paper')}"
    explanation = (
        f"{which[:1].upper()}{which[1:]}; near ones are near in meaning: the vectors of their titles and texts, "
        "projected on a plane."
    )
    return Map(explanation=explanation, points=points, fields=fields)


_LAYING_OUT = Lock()
_LAST: dict[str, Any] = {}


def _laid_out(vectors: np.ndarray) -> np.ndarray:
    """Places of the papers on the plane. The last layout is kept: it takes seconds, and only papers change it."""
    key = hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()
    with _LAYING_OUT:
        if _LAST.get("key") != key:
            with threadpool_limits(1):  # one page must not take all cores of a machine that serves others
                _LAST.update(key=key, places=np.asarray(ranking.map_of_papers(vectors)))
        return _LAST["places"]


def _name(points: list[Point]) -> None:
    """Put names beside as many points as have room; the others show theirs when pointed at."""
    taken = [(point.x - 7, point.y - 7, point.x + 7, point.y + 7) for point in points]
    for point in points:
        width = LABEL_PIXELS * len(point.label)
        sides = [("start", point.x + 10, point.x + 10), ("end", point.x - 10, point.x - 10 - width)]
        point.anchor, point.label_x = ("end", point.x - 10) if point.x > WIDTH * 0.75 else ("start", point.x + 10)
        for anchor, x, left in sides:
            box = (left, point.y - 8, left + width, point.y + 8)
            free = all(box[2] < l or r < box[0] or box[3] < t or b < box[1] for l, t, r, b in taken)  # noqa: E741
            if free and left > 0 and box[2] < WIDTH:
                point.anchor, point.label_x, point.named = anchor, x, True
                taken.append(box)
                break


# --- activity ---------------------------------------------------------------------------------------------------------


class Bar(BaseModel):
    x: float
    y: float
    width: float
    height: float
    title: str


class Mark(BaseModel):
    x: float = 0
    y: float = 0
    label: str


class Chart(BaseModel):
    """Bars over time."""

    title: str
    words: str
    counts: dict[str, int]
    empty: str = Field(default="Nothing yet.", exclude=True)
    bars: list[Bar] = Field(default=[], exclude=True)
    lines: list[Mark] = Field(default=[], exclude=True)
    ticks: list[Mark] = Field(default=[], exclude=True)


class ActivityView(BaseModel):
    """How much there is, and what came when."""

    papers: int
    authors: int
    accounts: int
    votes: int
    comments: int
    charts: list[Chart]


def activity(session: Session) -> ActivityView:
    """Totals; papers by the quarter in which they were published; votes and comments by week."""
    told = papers.activity(session)
    quarters: Counter[str] = Counter()
    for (day,) in session.execute(select(Paper.published).where(Paper.published.is_not(None))):
        if day is not None:
            quarters[f"{day.year} Q{(day.month + 2) // 3}"] += 1
    votes: Counter[str] = Counter()
    comments: Counter[str] = Counter()
    for each in told.days:
        week = papers.period_of("week", each.day)
        votes[week] += each.votes
        comments[week] += each.comments
    charts = [
        bar_chart("Papers by quarter of publication", _gapless_quarters(quarters), "paper"),
        bar_chart("Upvotes by week", {week: n for week, n in votes.items() if n}, "upvote"),
        bar_chart("Comments by week", {week: n for week, n in comments.items() if n}, "comment"),
    ]
    totals = {name: getattr(told, name) for name in ("papers", "authors", "accounts", "votes", "comments")}
    return ActivityView(**totals, charts=charts)


def _gapless_quarters(counts: Counter[str]) -> dict[str, int]:
    if not counts:
        return {}
    ends = [date(int(name[:4]), 3 * int(name[-1]) - 2, 1) for name in (min(counts), max(counts))]
    names = [
        f"{year} Q{quarter}"
        for year in range(ends[0].year, ends[1].year + 1)
        for quarter in range(1, 5)
        if ends[0] <= date(year, 3 * quarter - 2, 1) <= ends[1]
    ]
    return {name: counts[name] for name in names[-80:]}


def bar_chart(title: str, counts: dict[str, int], unit: str) -> Chart:
    """Bars from the left to the right, a few round lines behind them, a few names below."""
    words = f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    chart = Chart(title=title, words=words[:1500], counts=counts)
    if not counts:
        return chart
    left, right, top, bottom = 40, 990, 12, 192
    most = max(counts.values())
    step = next(s for s in (k * 10**e for e in range(12) for k in (1, 2, 5)) if most / s <= 5)
    scale = (bottom - top) / (step * -(-most // step))
    chart.lines = [
        Mark(y=round(bottom - v * scale, 1), label=f"{v:,}")
        for v in range(0, most + step, step)
        if bottom - v * scale >= top - 1
    ]
    slot = (right - left) / max(len(counts), 8)
    ticks = _ticks(list(counts), slot)
    for place, (name, count) in enumerate(counts.items()):
        x, height = left + place * slot, count * scale
        chart.bars.append(
            Bar(
                x=round(x + 0.1 * slot, 1),
                y=round(bottom - height, 1),
                width=round(0.8 * slot, 1),
                height=round(height, 1),
                title=f"{name}: {plural(count, unit)}",
            )
        )
        if place in ticks:
            chart.ticks.append(Mark(x=round(x + slot / 2, 1), label=ticks[place]))
    return chart


def _ticks(names: list[str], slot: float) -> dict[int, str]:
    """What stands below which bar: of quarters the years, of weeks as many as have room on a phone's screen too."""
    years = {place: name[:4] for place, name in enumerate(names) if name.endswith(" Q1")}
    labels, free, ticks = years or dict(enumerate(names)), 0.0, {}
    for place, label in labels.items():
        if place * slot >= free:
            ticks[place], free = label, place * slot + 18 * len(label)
    return ticks
