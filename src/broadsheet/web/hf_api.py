"""The Hugging Face papers API, so that its client and command line work on this feed.

``HF_ENDPOINT=http://127.0.0.1:8000 hf papers ls``, and ``HfApi(endpoint=...).list_daily_papers()``. Routes, parameters
and fields are those of that service; what a feed without organisations, models and spaces does not
have is left out, as that API does.
"""

from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from broadsheet.feed import papers, ranking
from broadsheet.feed.models import Account, Paper
from broadsheet.feed.papers import PaperCard
from broadsheet.web.pages import OnePaper
from broadsheet.web.rendering import asset
from broadsheet.web.site import Site, site

MOST_TRENDING = 1000
router = APIRouter(prefix="/api", tags=["Hugging Face papers API"])
reading = APIRouter(tags=["Hugging Face papers API"])  # that API's one route outside /api

Day = Annotated[str | None, Query(pattern=r"^\d{4}-\d\d-\d\d$", description="Such as 2025-12-08.")]
Week = Annotated[str | None, Query(pattern=r"^\d{4}-W\d\d$", description="Such as 2025-W50.")]
Month = Annotated[str | None, Query(pattern=r"^\d{4}-\d\d$", description="Such as 2025-12.")]


def _moment(day: date | None) -> str | None:
    return datetime.combine(day, time(), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z") if day else None


def _submitters(session: Session, ids: list[str]) -> dict[str, str]:
    rows = select(Paper.id, Account.name).join(Account, Account.id == Paper.submitted_by).where(Paper.id.in_(ids))
    return dict(session.execute(rows).all())


def _user(here: Site, name: str) -> dict[str, Any]:
    user = {"_id": name, "name": name, "user": name, "fullname": name, "type": "user", "isPro": False, "isHf": False}
    return user | {"avatarUrl": here.base_url + asset("icon.svg")}


def _paper(here: Site, card: PaperCard, submitter: str | None) -> dict[str, Any]:
    """The inner object: the paper itself."""
    names = [{"_id": f"{card.id}-{place}", "name": name, "hidden": False} for place, name in enumerate(card.authors)]
    links = {"githubRepo": card.links.get("code"), "projectPage": card.links.get("project")}
    known = {
        "submittedOnDailyAt": _moment(card.listed_on),
        "submittedOnDailyBy": _user(here, submitter) if submitter else None,
        **links,
    }
    return {
        "id": card.id,
        "authors": names,
        "publishedAt": _moment(card.published or card.listed_on),
        "title": card.title,
        "summary": card.abstract,
        "upvotes": card.upvotes,
        "discussionId": card.id,
    } | {key: value for key, value in known.items() if value}


def _entries(here: Site, session: Session, cards: list[PaperCard]) -> list[dict[str, Any]]:
    """The outer objects: papers as they stand in a daily list."""
    submitters = _submitters(session, [card.id for card in cards])
    entries = []
    for card in cards:
        submitter = submitters.get(card.id)
        inner = _paper(here, card, submitter)
        entry = {
            "paper": inner,
            "publishedAt": _moment(card.listed_on or card.published),
            "title": card.title,
            "summary": card.abstract,
            "numComments": card.comments,
            "isAuthorParticipating": False,
        }
        entries.append(entry | ({"submittedBy": _user(here, submitter)} if submitter else {}))
    return entries


@router.get("/daily_papers")
def daily_papers(
    request: Request,
    date: Day = None,
    week: Week = None,
    month: Month = None,
    submitter: Annotated[str | None, Query(max_length=80)] = None,
    sort: Literal["publishedAt", "trending"] = "publishedAt",
    p: Annotated[int, Query(ge=0, le=1000, description="Page, from 0.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> list[dict[str, Any]]:
    """Papers of a day, week or month; without one, the most recent."""
    here = site(request)
    chosen: dict[str, Any] = {"day": date, "week": week, "month": month, "submitter": submitter}
    with here.db.read() as session:
        if sort == "trending":
            cards = _trending(here, session, chosen)[p * limit : (p + 1) * limit]
        else:
            cards = papers.list_papers(session, **chosen, sort="new", offset=p * limit, limit=limit)
        return _entries(here, session, cards)


def _trending(here: Site, session: Session, chosen: dict[str, Any]) -> list[PaperCard]:
    """The best-liked of what was chosen, by votes of which older ones weigh less; papers without votes come last."""
    place = {trend.paper_id: place for place, trend in enumerate(ranking.trends(here.db, period="all"))}
    cards = papers.list_papers(session, **chosen, sort="votes", limit=MOST_TRENDING)
    return sorted(cards, key=lambda card: place.get(card.id, len(place)))  # stable: the rest stays as it was


@router.get("/papers/search")
def search_papers(
    request: Request,
    q: Annotated[str, Query(max_length=300)] = "",
    limit: Annotated[int, Query(ge=1, le=120)] = 20,
) -> list[dict[str, Any]]:
    """Papers by words and by meaning; without a query, the most recent."""
    here = site(request)
    here.limits.check("search", request)
    query = " ".join(q.replace("\x00", " ").split())
    with here.db.read() as session:
        if query:
            ids = [hit.paper_id for hit in here.index.search(query, limit=limit).hits]
            cards = papers.cards(session, ids)
        else:
            cards = papers.list_papers(session, limit=limit)
        return _entries(here, session, cards)


@router.get("/papers/{paper_id:path}")
def paper_info(request: Request, paper_id: str) -> dict[str, Any]:
    """One paper."""
    here = site(request)
    with here.db.read() as session:
        ident = papers.find_paper(session, paper_id).id
        (card,) = papers.cards(session, [ident])
        return _paper(here, card, _submitters(session, [ident]).get(ident)) | {"numComments": card.comments}


@reading.get("/papers/{paper_id:path}.md", response_class=PlainTextResponse)
def read_paper(request: Request, paper: OnePaper) -> PlainTextResponse:
    """One paper as Markdown: summary, claims with verdicts, abstract."""
    here = site(request)
    text = here.templates.get_template("paper.md").render(paper=paper, base_url=here.base_url)
    return PlainTextResponse(text, media_type="text/markdown; charset=utf-8")
