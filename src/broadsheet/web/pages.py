"""Pages for reading: the front page, lists, papers, search, claims, map, activity; voting and talking on them."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from broadsheet import catalog
from broadsheet.errors import NotFound
from broadsheet.feed import papers, social
from broadsheet.feed.permissions import Action, may
from broadsheet.web import charts, lists, runs, views
from broadsheet.web.rendering import paper_path
from broadsheet.web.runpages import live_view
from broadsheet.web.security import Reader, guard, reader
from broadsheet.web.site import MOST, Number, page, site
from broadsheet.web.views import Listing, PaperView

router = APIRouter(include_in_schema=False, dependencies=[Depends(guard)], default_response_class=HTMLResponse)
Who = Annotated[Reader, Depends(reader)]


# --- reading ----------------------------------------------------------------------------------------------------------


@router.get("/")
def front(request: Request) -> HTMLResponse:
    with site(request).db.read() as session:
        view = views.front(session)
    return page(request, "front.html", front=view)


def list_page(view: Callable[..., Listing]) -> Callable[..., HTMLResponse]:
    """The page of a list."""

    def endpoint(request: Request, who: Who, shown: Annotated[Listing, Depends(view)]) -> HTMLResponse:
        followed = False
        if shown.follow and who.account:
            mine = {(each.kind, each.value) for each in social.follows_of(site(request).db, who.account)}
            followed = (shown.follow.kind, shown.follow.value) in mine
        return page(request, "list.html", list=shown, voted=_voted(request, who, shown), followed=followed)

    return endpoint


def _voted(request: Request, who: Reader, shown: Listing) -> set[str]:
    with site(request).db.read() as session:
        return social.voted(session, who.account, [each.id for each in shown.papers])


for path, view in lists.LISTS.items():
    router.get(path)(list_page(view))


@router.get("/search")
def search(request: Request, who: Who, found: Annotated[lists.Search, Depends(lists.search)]) -> HTMLResponse:
    # As the reader types, htmx asks for the results alone; the address is the same, so that a reload shows the same.
    part = request.headers.get("hx-request") == "true" and request.headers.get("hx-history-restore-request") != "true"
    response = page(
        request,
        "results.html" if part else "search.html",
        found=found.view,
        snippets=found.snippets,
        voted=_voted(request, who, found.view),
        fields=catalog.fields(),
        saved=not part and _saved(request, who, found.view.query),
    )
    response.headers["vary"] = "HX-Request"
    return response


def _saved(request: Request, who: Reader, query: str) -> bool:
    follows = social.follows_of(site(request).db, who.account) if who.account and query else []
    return any((each.kind, each.value) == ("search", query) for each in follows)


@router.get("/claims")
def claims(request: Request) -> HTMLResponse:
    return page(request, "claims.html", claims=views.claims_page())


@router.get("/map")
def map_page(request: Request) -> HTMLResponse:
    here = site(request)
    return page(request, "map.html", map=charts.map_of(here.db, here.index))


@router.get("/activity")
def activity(request: Request) -> HTMLResponse:
    with site(request).db.read() as session:
        shown = charts.activity(session)
    return page(request, "activity.html", activity=shown)


@router.get("/about")
def about(request: Request) -> HTMLResponse:
    entries = catalog.papers()
    with site(request).db.read() as session:
        total = papers.count_papers(session)
    return page(
        request,
        "about.html",
        total=total,
        built=sum(entry.built for entry in entries),
        verdicts=views.verdicts_of(entry.slug for entry in entries),
    )


# --- a paper ----------------------------------------------------------------------------------------------------------


def paper_of(request: Request, paper_id: str) -> PaperView:
    """A paper's page as data. A dependency of the page, its JSON, its Markdown."""
    here = site(request)
    with here.db.read() as session:
        stored = papers.find_paper(session, paper_id)
        (found,) = papers.cards(session, [stored.id])
        return views.paper_view(session, found, here.index.similar(stored.id, 6))


OnePaper = Annotated[PaperView, Depends(paper_of)]


@router.get("/papers/{paper_id:path}/figures/{name}")
def figure(request: Request, paper_id: str, name: str) -> Response:
    with site(request).db.read() as session:
        slug = papers.find_paper(session, paper_id).slug
    file = views.figure_file(slug, name)
    if file is None or not file.is_file():
        raise NotFound(f"no figure {name[:80]!r}")
    return FileResponse(file, media_type="image/png", headers={"cache-control": "public, max-age=3600"})


@router.get("/papers/{paper_id:path}")
def paper_page(request: Request, who: Who, paper_id: str, paper: OnePaper) -> Response:
    if paper_id != paper.id:
        return RedirectResponse(paper.path, 308)
    here = site(request)
    with here.db.read() as session:
        voted = paper.id in social.voted(session, who.account, [paper.id])
    latest = runs.latest(here.db, paper.slug, limit=1) if paper.slug else []
    return page(
        request,
        "paper.html",
        paper=paper,
        voted=voted,
        lists=social.lists_of(here.db, who.account) if who.account else [],
        live=live_view(request, who, latest[0]) if latest and latest[0].state in runs.UNFINISHED else None,
    )


@router.post("/papers/{paper_id:path}/vote")
def vote(request: Request, who: Who, paper_id: str, on: Annotated[bool, Form()] = True) -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    social.vote(here.db, account, paper_id, on)
    if request.headers.get("hx-request") == "true":
        with here.db.read() as session:
            (found,) = papers.cards(session, [paper_id])
        return page(request, "vote.html", card=views.card(found), voted=on)
    return RedirectResponse(paper_path(paper_id), 303)


@router.post("/papers/{paper_id:path}/lists")
def put_on_list(request: Request, who: Who, paper_id: str, list_id: Annotated[str, Form(alias="list")]) -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    if list_id == "new":
        taken = {each.name for each in social.lists_of(here.db, account)}
        name = next(name for n in range(1, 1000) if (name := "To read" if n == 1 else f"To read {n}") not in taken)
        number = social.create_list(here.db, account, name).id
    else:
        number = int(list_id) if list_id.isdecimal() and len(list_id) < 10 else 0
    social.add_to_list(here.db, account, number, paper_id)
    request.state.session.say("The paper is on your list.")
    return RedirectResponse(paper_path(paper_id), 303)


# --- discussion -------------------------------------------------------------------------------------------------------


@router.post("/papers/{paper_id:path}/comments")
def comment(
    request: Request,
    who: Who,
    paper_id: str,
    body: Annotated[str, Form()],
    parent: Annotated[int | None, Form(ge=1, le=MOST)] = None,
) -> Response:
    here, account = site(request), who.need()
    here.limits.check("comment", request, account.id)
    said = social.comment(here.db, account, paper_id, body, parent)
    return RedirectResponse(f"{paper_path(paper_id)}#comment-{said.id}", 303)


def _back_to(said: Any) -> Response:
    return RedirectResponse(f"{paper_path(said.paper_id)}#comment-{said.id}", 303)


@router.post("/comments/{comment_id}/edit")
def edit_comment(request: Request, who: Who, comment_id: Number, body: Annotated[str, Form()]) -> Response:
    here, account = site(request), who.need()
    here.limits.check("comment", request, account.id)
    return _back_to(social.edit_comment(here.db, account, comment_id, body))


@router.post("/comments/{comment_id}/delete")
def delete_comment(request: Request, who: Who, comment_id: Number) -> Response:
    return _back_to(social.delete_comment(site(request).db, who.need(), comment_id))


@router.post("/comments/{comment_id}/report")
def report_comment(request: Request, who: Who, comment_id: Number, reason: Annotated[str, Form()] = "") -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    said = social.report_comment(here.db, account, comment_id, reason)
    request.state.session.say("Thank you: the editors will look at it.")
    return _back_to(said)


@router.get("/reports")
def reports(request: Request, who: Who) -> HTMLResponse:
    return page(request, "reports.html", reports=social.open_reports(site(request).db, _editor(who)))


@router.post("/comments/{comment_id}/settle")
def settle(request: Request, who: Who, comment_id: Number, delete: Annotated[bool, Form()] = False) -> Response:
    here, editor = site(request), _editor(who)
    if delete:
        social.delete_comment(here.db, editor, comment_id)
    social.settle_report(here.db, editor, comment_id)
    return RedirectResponse("/reports", 303)


def _editor(who: Reader) -> Any:
    """Who settles reports: the editor signed in, or the person at this machine."""
    acting = who.acting
    return acting if acting is not None and may(acting, Action.settle_report) else who.need()
