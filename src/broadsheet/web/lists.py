"""Lists of papers as data. Each is a page, JSON, RSS, Atom and BibTeX: see ``LISTS`` for their addresses."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from markupsafe import Markup

from broadsheet import catalog
from broadsheet.errors import InvalidInput, NotFound
from broadsheet.feed import papers, ranking, social
from broadsheet.web import views
from broadsheet.web.rendering import field_name, long_date, path_with, plural
from broadsheet.web.security import Reader, reader
from broadsheet.web.site import Number, site
from broadsheet.web.views import Found, Listing, Tab, Target

PER_PAGE = 30
DEEPEST = 10_000

Who = Annotated[Reader, Depends(reader)]
Offset = Annotated[int, Query(ge=0, le=DEEPEST, description="How many papers of the list to pass over.")]
Limit = Annotated[int, Query(ge=1, le=100, description="How many papers to show.")]
Text = Annotated[str, Query(max_length=300)]


def _pages(shown: Listing, limit: int, **query: Any) -> Listing:
    """Addresses of the list's next and previous page."""
    query |= {"limit": limit if limit != PER_PAGE else ""}
    end = shown.offset + len(shown.papers)
    if shown.total is not None and end < min(shown.total, DEEPEST):
        shown.earlier = path_with(shown.path, **query, offset=shown.offset + limit)
    if shown.offset > 0:
        shown.later = path_with(shown.path, **query, offset=max(0, shown.offset - limit))
    return shown


def _stored(request: Request, offset: int, limit: int, sort: str = "new", **chosen: Any) -> dict[str, Any]:
    with site(request).db.read() as session:
        total = papers.count_papers(session, **chosen)
        found = papers.list_papers(session, **chosen, sort=sort, offset=offset, limit=limit)
    return {"papers": [views.card(each) for each in found], "total": total, "offset": offset}


def new(request: Request, offset: Offset = 0, limit: Limit = PER_PAGE) -> Listing:
    """The latest papers."""
    explanation = "Latest first, by the day they stood in a daily list, else by the day they were published."
    found = _stored(request, offset, limit)
    return _pages(Listing(title="New papers", explanation=explanation, path="/new", feed="/new", **found), limit)


def trending(
    request: Request,
    period: Literal["week", "month", "all"] = "week",
    offset: Offset = 0,
    limit: Limit = PER_PAGE,
) -> Listing:
    """Papers by votes, of which older ones weigh less."""
    ranked = ranking.trending(site(request).db, period=period, offset=offset, limit=limit)
    shown = _ranked(
        request,
        ranked,
        title="Trending",
        path="/trending",
        offset=offset,
        feed="/trending",
        feed_query=f"?period={period}",
    )
    shown.tabs = [
        Tab(name=name, path=f"/trending?period={key}", current=key == period)
        for key, name in (("week", "Week"), ("month", "Month"), ("all", "All time"))
    ]
    shown.empty = "Nobody has voted for a paper in this time."
    return _pages(shown, limit, period=period)


def for_you(request: Request, who: Who, offset: Offset = 0, limit: Limit = PER_PAGE) -> Listing:
    """Papers near what the reader has voted for and put on lists."""
    ranked = ranking.personal(site(request).db, site(request).index, who.need(), offset=offset, limit=limit)
    return _pages(_ranked(request, ranked, title="For you", path="/for-you", offset=offset), limit)


def _ranked(request: Request, ranked: Any, **values: Any) -> Listing:
    with site(request).db.read() as session:
        cards = [views.card(each) for each in papers.cards(session, ranked.ids)]
    return Listing(explanation=ranked.explanation, papers=cards, total=ranked.total, **values)


def _period(kind: str) -> Callable[..., Listing]:
    def view(request: Request, value: str, offset: Offset = 0, limit: Limit = PER_PAGE) -> Listing:
        first, last = papers.period(kind, value)
        with site(request).db.read() as session:
            near = papers.neighbours(session, kind, value)
        found = _stored(request, offset, limit, sort="votes", **{kind: value})
        names = {"day": long_date(first), "week": f"Week {value[-2:]} of {value[:4]}", "month": f"{first:%B %Y}"}
        span = "" if kind == "day" else f" from {long_date(first)} to {long_date(last)}"
        path = f"/{kind}/{value}"
        shown = Listing(
            title=names[kind],
            explanation=f"{plural(found['total'], 'paper')}{span}, by votes.",
            path=path,
            feed=path,
            empty="No papers were listed or published then.",
            tabs=[
                Tab(name=other.capitalize(), path=f"/{other}/{papers.period_of(other, last)}", current=other == kind)
                for other in papers.PERIODS
            ],
            **found,
        )
        shown = _pages(shown, limit)
        if shown.earlier is None and near.earlier:
            shown.earlier, shown.earlier_label = f"/{kind}/{near.earlier}", f"The {kind} before"
        if shown.later is None and near.later:
            shown.later, shown.later_label = f"/{kind}/{near.later}", f"The {kind} after"
        return shown

    view.__doc__ = f"The papers of a {kind}."
    return view


def field(request: Request, name: str, offset: Offset = 0, limit: Limit = PER_PAGE) -> Listing:
    """The papers of a field of the catalogue."""
    if name not in catalog.fields():
        raise NotFound(f"no field {name[:40]!r}: the fields are {', '.join(catalog.fields())}")
    found = _stored(request, offset, limit, field=name)
    title = field_name(name)
    return _pages(
        Listing(
            title=title[:1].upper() + title[1:],
            explanation=f"{plural(found['total'], 'paper')} of this field, latest first.",
            path=f"/fields/{name}",
            feed=f"/fields/{name}",
            follow=Target(kind="field", value=name),
            **found,
        ),
        limit,
    )


def author(request: Request, name: Text, offset: Offset = 0, limit: Limit = PER_PAGE) -> Listing:
    """The papers on which this name stands, written so."""
    found = _stored(request, offset, limit, author=name)
    if not found["total"]:
        raise NotFound(f"no paper of {name[:80]!r}")
    return _pages(
        Listing(
            title=name,
            explanation=f"{plural(found['total'], 'paper')} with this name, latest first. Two people may share it.",
            path="/author",
            feed="/author",
            feed_query=path_with("", name=name),
            follow=Target(kind="author", value=name),
            **found,
        ),
        limit,
        name=name,
    )


def reading_list(request: Request, who: Who, number: Number) -> Listing:
    """A reader's list, where she shares it or asks herself."""
    here = site(request)
    found, ids = social.list_items(here.db, who.account, number)
    with here.db.read() as session:
        cards = [views.card(each) for each in papers.cards(session, ids)]
    whose = "Shared with everybody" if found.public else "Only you see this list"
    return Listing(
        title=found.name,
        explanation=f"{plural(len(cards), 'paper')}, last added first. {whose}.",
        path=f"/lists/{found.id}",
        feed=f"/lists/{found.id}" if found.public else "",
        papers=cards,
        total=len(cards),
        empty="Nothing on it yet: a paper's page has a button for that.",
    )


@dataclass(frozen=True)
class Search:
    """A search's view, and its highlighted titles and passages for the page (already escaped by the index)."""

    view: Found
    snippets: dict[str, dict[str, Markup]]


def search(
    request: Request,
    q: Annotated[str, Query(max_length=300, description='Words, "a phrase", prefix*, or a question.')] = "",
    field: Annotated[str, Query(max_length=40)] = "",
    author: Text = "",
    venue: Annotated[str, Query(max_length=100)] = "",
    since: Annotated[str, Query(max_length=10, description="First day of publication.")] = "",
    until: Annotated[str, Query(max_length=10)] = "",
    has_method: bool = False,
    offset: Annotated[int, Query(ge=0, le=1000)] = 0,
    limit: Limit = 20,
) -> Search:
    """Papers by words and by meaning."""
    here = site(request)
    here.limits.check("search", request)
    query = " ".join(q.replace("\x00", " ").split())
    chosen = {
        "field": field or None,
        "author": author.strip() or None,
        "venue": venue.strip() or None,
        "since": _day("since", since),
        "until": _day("until", until),
        "has_method": True if has_method else None,
    }
    given = {key: value for key, value in chosen.items() if value}
    view = Found(
        title=f"Search: {query}" if query else "Search",
        explanation="Type what you look for: the order is by words and by meaning together.",
        path=path_with("/search", q=query, **{k: 1 if v is True else v for k, v in given.items()}),
        papers=[],
        query=query,
        offset=offset,
        **given,
    )
    if not query:
        return Search(view, {})
    typing = request.headers.get("hx-request") == "true"  # as the reader types, the last word may be unfinished
    hits = here.index.search(query, **chosen, offset=offset, limit=limit, typing=typing)
    ids = [hit.paper_id for hit in hits.hits]
    with here.db.read() as session:
        view.papers = [views.card(each) for each in papers.cards(session, ids)]
    by = {"words": "by words alone", "meaning": "by meaning alone"}.get(hits.mode, "by words and by meaning")
    view.total, view.took_ms, view.mode = hits.total, round(hits.took_ms, 1), hits.mode
    view.explanation = f"{plural(hits.total, 'paper')}, best first {by}, in {hits.took_ms:.0f} ms."
    if hits.note:
        view.explanation += f" {hits.note}"
    more = {"q": query, **{k: 1 if v is True else v for k, v in given.items()}, "limit": limit if limit != 20 else ""}
    if offset + len(ids) < hits.total and ids:
        view.earlier = path_with("/search", **more, offset=offset + limit)
    if offset:
        view.later = path_with("/search", **more, offset=max(0, offset - limit))
    marked = {h.paper_id: {"title": Markup(h.title_html), "text": Markup(h.snippet_html)} for h in hits.hits}
    return Search(view, marked)


def found(shown: Annotated[Search, Depends(search)]) -> Found:
    """Papers by words and by meaning."""
    return shown.view


def _day(name: str, text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError as error:
        raise InvalidInput(f"{name}={text!r}: expected a day such as 2025-12-08") from error


# Pages, JSON, RSS, Atom and BibTeX are all made from these.
LISTS: dict[str, Callable[..., Listing]] = {
    "/new": new,
    "/trending": trending,
    "/day/{value}": _period("day"),
    "/week/{value}": _period("week"),
    "/month/{value}": _period("month"),
    "/fields/{name}": field,
    "/author": author,
}
