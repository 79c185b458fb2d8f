"""Pages of runs: starting one, watching it live, cancelling it, what ran before."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from broadsheet import catalog
from broadsheet.errors import BroadsheetError, NotFound, UnknownPaper
from broadsheet.feed import papers
from broadsheet.feed.models import Run
from broadsheet.feed.permissions import Action, may
from broadsheet.lab.verdicts import finding
from broadsheet.web import runs
from broadsheet.web.rendering import paper_path
from broadsheet.web.security import Reader, guard, reader
from broadsheet.web.site import MOST, Number, page, site
from broadsheet.web.views import ClaimView, Figure, claim_view, png_size

router = APIRouter(include_in_schema=False, dependencies=[Depends(guard)], default_response_class=HTMLResponse)
Who = Annotated[Reader, Depends(reader)]

POLL_SECONDS = 0.4
PING_SECONDS = 15
LINES = 200
STATE_WORDS = {
    "queued": "waiting for its turn",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "lost": "lost: its process died",
}


class TaskView(BaseModel):
    """A stretch of work under way."""

    id: int
    description: str
    done: int
    total: int | None
    numbers: str


class RunView(BaseModel):
    """A run: what was asked for, what became of it, what it has measured."""

    id: int
    slug: str
    title: str
    path: str
    paper_path: str
    preset: str
    seeds: int
    device: str
    state: str
    state_words: str
    by: str | None = Field(default=None, exclude=True)
    error: str = ""
    created: datetime
    started: datetime | None
    ended: datetime | None
    took: str
    tasks: list[TaskView] = []
    claims: list[ClaimView] = []
    figures: list[Figure] = []
    log: list[str] = []
    last_event: int = 0


def run_view(request: Request, who: Reader, run: Run, whole: bool = True) -> RunView:
    """A run as data. Errors and the log are the operator's: they may name files of this machine."""
    here, trusted = site(request), may(who.acting, Action.start_run)
    try:
        entry = catalog.paper(run.slug)
        title, path = entry.title, paper_path(entry.arxiv)
    except UnknownPaper:
        entry, title, path = None, run.slug, "/"
    took = f"{(run.ended - run.started).total_seconds():.0f} s" if run.ended and run.started else ""
    view = RunView(
        **{name: getattr(run, name) for name in ("id", "slug", "preset", "seeds", "device", "state")},
        **{name: getattr(run, name) for name in ("created", "started", "ended")},
        title=title,
        path=f"/runs/{run.id}",
        paper_path=path,
        state_words=STATE_WORDS[run.state],
        error=run.error if trusted else "",
        took=took,
    )
    if not whole:
        return view
    claims: dict[str, ClaimView] = {}
    tasks: dict[int, TaskView] = {}
    for event in runs.events(here.db, run.id, limit=100_000):
        content, view.last_event = event.content, event.number
        if event.kind == "claim" and entry is not None:
            try:
                claim = entry.claim(content["id"])
                claims[claim.id] = claim_view(claim, finding(claim, content["ours"], content["baseline"]))
            except (KeyError, BroadsheetError):  # the catalogue has changed since
                continue
        elif event.kind == "figure":
            size = png_size(runs.folder(here.settings, run.id) / content["name"])
            if size is not None:
                path = f"/runs/{run.id}/figures/{content['name']}"
                view.figures.append(Figure(path=path, caption=content["caption"], width=size[0], height=size[1]))
        elif event.kind == "log" and trusted:
            view.log = [*view.log[1 - LINES :], content["line"]]
        elif event.kind == "progress":
            tasks.pop(content["task"], None)
            if not content["ended"] and run.state == "running":
                task = {key: content[key] for key in ("description", "done", "total", "numbers")}
                tasks[content["task"]] = TaskView(id=content["task"], **task)
    view.claims, view.tasks = list(claims.values()), list(tasks.values())
    return view


def live_view(request: Request, who: Reader, run: Run) -> RunView:
    """A run to show on its paper's page."""
    return run_view(request, who, run)


@router.get("/runs")
def history(request: Request, who: Who) -> HTMLResponse:
    shown = [run_view(request, who, run, whole=False) for run in runs.latest(site(request).db)]
    return page(request, "runs.html", runs=shown, unfinished=any(run.state in runs.UNFINISHED for run in shown))


@router.post("/papers/{paper_id:path}/run")
def start(
    request: Request,
    who: Who,
    paper_id: str,
    preset: Annotated[str, Form()] = "small",
    seeds: Annotated[int, Form()] = 2,
    device: Annotated[str, Form()] = "auto",
) -> Response:
    here = site(request)
    here.limits.check("run", request)
    with here.db.read() as session:
        stored = papers.find_paper(session, paper_id)
    runs.ask(here.db, who.acting, stored.slug or "", preset, seeds, device)
    here.supervisor.wake.set()
    return RedirectResponse(f"{paper_path(stored.id)}#run", 303)


@router.get("/runs/{number}")
def one(request: Request, who: Who, number: Number) -> HTMLResponse:
    view = run_view(request, who, runs.find(site(request).db, number))
    part = request.headers.get("hx-request") == "true"
    return page(request, "run_live.html" if part else "run.html", run=view)


@router.post("/runs/{number}/cancel")
def cancel(request: Request, who: Who, number: Number) -> Response:
    here = site(request)
    runs.cancel(here.db, who.acting, number)
    here.supervisor.wake.set()
    return RedirectResponse(f"/runs/{number}", 303)


@router.get("/runs/{number}/figures/{name}")
def figure(request: Request, number: Number, name: str) -> Response:
    # Only a name that the run itself has told is ever opened.
    told = {e.content["name"] for e in runs.events(site(request).db, number, limit=100_000) if e.kind == "figure"}
    file = runs.folder(site(request).settings, number) / name
    if name not in told or not file.is_file():
        raise NotFound(f"no figure {name[:80]!r} of run {number}")
    return FileResponse(file, media_type="image/png")


@router.get("/runs/{number}/events")
async def stream(
    request: Request, who: Who, number: Number, after: Annotated[int, Query(ge=0, le=MOST)] = 0
) -> StreamingResponse:
    """Server-sent events: what the run says, from ``after`` (or the browser's Last-Event-ID) on, until it ends."""
    here, trusted = site(request), may(who.acting, Action.start_run)
    await asyncio.to_thread(runs.find, here.db, number)
    last = request.headers.get("last-event-id", "")
    begin = int(last) if last.isdecimal() and len(last) < 10 else after
    return StreamingResponse(
        _told(here.db, number, begin, trusted),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _told(db: Any, number: int, seen: int, trusted: bool) -> AsyncIterator[str]:
    quiet = 0.0
    while True:
        # The state first: what is said before it is written is read after it, so that nothing is missed at the end.
        run = await asyncio.to_thread(runs.find, db, number)
        new = await asyncio.to_thread(runs.events, db, number, seen)
        for event in new:
            seen = event.number
            if event.kind != "log" or trusted:
                yield f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(event.content)}\n\n"
        if not new and run.state not in runs.UNFINISHED:
            yield f"event: end\ndata: {json.dumps({'state': run.state})}\n\n"
            return
        quiet = 0.0 if new else quiet + POLL_SECONDS
        if quiet >= PING_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        if not new:
            await asyncio.sleep(POLL_SECONDS)
