"""Our own API under /api/v1: what the pages show, as JSON, and what a reader may do there."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from broadsheet.errors import NotAllowed
from broadsheet.feed import papers, people, social
from broadsheet.web import charts, lists, runs, views
from broadsheet.web.pages import OnePaper
from broadsheet.web.runpages import RunView, run_view
from broadsheet.web.security import Reader, reader
from broadsheet.web.site import MOST, Number, page, site
from broadsheet.web.views import ClaimsPage, Found, Front, Listing, PaperView, Said

router = APIRouter(prefix="/api/v1", tags=["Broadsheet"])
docs = APIRouter(include_in_schema=False)


# Only so that the OpenAPI document names it: security.reader reads the header.
Bearer = Annotated[Any, Depends(HTTPBearer(auto_error=False, description="A token of your account's page."))]


def by_token(scope: str) -> Callable[..., Reader]:
    """A dependency: a reader with an API token of this scope. The cookie of a browser does not count here."""

    def dependency(who: Annotated[Reader, Depends(reader)], _described: Bearer) -> Reader:
        if who.scopes is None:
            raise NotAllowed("this needs an API token: Authorization: Bearer bs_...")
        who.scope(scope)
        return who

    return dependency


Writing = Annotated[Reader, Depends(by_token("write"))]
Reading = Annotated[Reader, Depends(by_token("read"))]
Running = Annotated[Reader, Depends(by_token("run"))]
PaperId = Annotated[str, Path(max_length=100, description="arXiv id, or the id of a paper that is not there.")]


@router.get("/front", response_model=Front)
def front(request: Request) -> Front:
    """The front page."""
    with site(request).db.read() as session:
        return views.front(session)


def _listing(view: Callable[..., Listing]) -> Callable[..., Listing]:
    def endpoint(shown: Annotated[Listing, Depends(view)]) -> Listing:
        return shown

    endpoint.__doc__ = view.__doc__
    return endpoint


for _path, _view in {**lists.LISTS, "/for-you": lists.for_you, "/lists/{number}": lists.reading_list}.items():
    _name = _path.strip("/").replace("/", "-").replace("{", "").replace("}", "")
    router.get(_path, response_model=Listing, name=_name)(_listing(_view))


@router.get("/search", response_model=Found)
def search(shown: Annotated[Found, Depends(lists.found)]) -> Found:
    """Papers by words and by meaning."""
    return shown


@router.get("/suggest")
def suggest(request: Request, q: str = "") -> list[str]:
    """How words that begin so go on."""
    site(request).limits.check("search", request)
    return site(request).index.suggest(q[:80].replace("\x00", " "))


@router.get("/claims", response_model=ClaimsPage)
def claims() -> ClaimsPage:
    """Every claim of the catalogue with its verdict."""
    return views.claims_page()


@router.get("/activity", response_model=charts.ActivityView)
def activity(request: Request) -> charts.ActivityView:
    """Totals, and what came on each day."""
    with site(request).db.read() as session:
        return charts.activity(session)


@router.get("/map", response_model=charts.Map)
def paper_map(request: Request) -> charts.Map:
    """The papers on a plane: near ones are near in meaning."""
    return charts.map_of(site(request).db, site(request).index)


@router.get("/runs", response_model=list[RunView])
def all_runs(request: Request, who: Annotated[Reader, Depends(reader)]) -> list[RunView]:
    """Runs of experiments, newest first."""
    return [run_view(request, who, run, whole=False) for run in runs.latest(site(request).db)]


@router.get("/runs/{number}", response_model=RunView)
def one_run(request: Request, who: Annotated[Reader, Depends(reader)], number: Number) -> RunView:
    """A run with its claims and figures so far."""
    return run_view(request, who, runs.find(site(request).db, number))


class AskedRun(BaseModel):
    """What to run: the paper of the address, and these. There is no way to name a command."""

    preset: str = Field(default="small", max_length=10)
    seeds: int = Field(default=2, ge=1, le=runs.MOST_SEEDS)
    device: str = Field(default="auto", max_length=10)


class Words(BaseModel):
    """A comment in Markdown."""

    body: str = Field(max_length=social.LONGEST_COMMENT)
    parent: int | None = Field(default=None, ge=1, le=MOST)


class Votes(BaseModel):
    votes: int


@router.put("/papers/{paper_id:path}/vote", response_model=Votes)
def vote(request: Request, who: Writing, paper_id: PaperId) -> Votes:
    """Upvote a paper; once is enough."""
    site(request).limits.check("write", request, who.need().id)
    return Votes(votes=social.vote(site(request).db, who.need(), paper_id))


@router.delete("/papers/{paper_id:path}/vote", response_model=Votes)
def unvote(request: Request, who: Writing, paper_id: PaperId) -> Votes:
    """Take the vote back."""
    site(request).limits.check("write", request, who.need().id)
    return Votes(votes=social.vote(site(request).db, who.need(), paper_id, on=False))


@router.post("/papers/{paper_id:path}/comments", response_model=Said, status_code=201)
def comment(request: Request, who: Writing, paper_id: PaperId, words: Words) -> Said:
    """Say something about a paper, or answer a comment on it."""
    account = who.need()
    site(request).limits.check("comment", request, account.id)
    said = social.comment(site(request).db, account, paper_id, words.body, words.parent)
    values = {name: getattr(said, name) for name in ("id", "body", "created", "edited")}
    return Said(**values, depth=0, author=account.name, deleted=False)


@router.post("/papers/{paper_id:path}/runs", response_model=RunView, status_code=201)
def ask_run(request: Request, who: Running, paper_id: PaperId, asked: AskedRun) -> RunView:
    """Queue a run of the paper's experiment (operators)."""
    here = site(request)
    here.limits.check("run", request, who.need().id)
    with here.db.read() as session:
        slug = papers.find_paper(session, paper_id).slug or ""
    run = runs.ask(here.db, who.acting, slug, asked.preset, asked.seeds, asked.device)
    here.supervisor.wake.set()
    return run_view(request, who, run)


@router.get("/papers/{paper_id:path}", response_model=PaperView)
def paper(shown: OnePaper) -> PaperView:
    """A paper: facts, claims with verdicts, figures, code, similar papers, discussion."""
    return shown


@router.get("/account")
def account(request: Request, who: Reading) -> dict[str, Any]:
    """All that is kept about the token's owner."""
    return people.export_account(site(request).db, who.need())


@docs.get("/api/docs")
def api_docs(request: Request) -> HTMLResponse:
    """The API described, from its OpenAPI document."""
    schema = request.app.openapi()
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            row = {
                "method": method.upper(),
                "path": path,
                "what": operation.get("description", operation.get("summary", "")),
                "parameters": [p for p in operation.get("parameters", []) if p["in"] == "query"],
            }
            groups.setdefault((operation.get("tags") or ["Operations"])[0], []).append(row)
    return page(request, "api_docs.html", groups=groups)
