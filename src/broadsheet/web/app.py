"""The application: routes, middleware, what an error looks like, and what happens at the start."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter, Histogram
from sqlalchemy import select
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from broadsheet import __version__
from broadsheet.errors import (
    BroadsheetError,
    InvalidInput,
    NotAllowed,
    NotBuilt,
    NotFound,
    SourceError,
    StoreError,
    TooMany,
    UnknownPaper,
)
from broadsheet.feed.database import Database
from broadsheet.feed.importing import import_catalogue
from broadsheet.feed.models import Paper
from broadsheet.feed.search import SearchIndex
from broadsheet.feed.settings import Settings
from broadsheet.web import accounts, api, hf_api, operations, pages, runpages, security, syndication
from broadsheet.web.housekeeping import Housekeeper
from broadsheet.web.rendering import STATIC, path_with
from broadsheet.web.runs import Supervisor
from broadsheet.web.site import Site, page

log = logging.getLogger("broadsheet.web")
access = logging.getLogger("broadsheet.access")

STATUS: list[tuple[type[BroadsheetError], int]] = [
    (NotFound, 404),
    (UnknownPaper, 404),
    (NotAllowed, 403),
    (TooMany, 429),
    (InvalidInput, 422),
    (NotBuilt, 409),
    (SourceError, 502),
    (StoreError, 503),
]
TITLES = {404: "Not in this paper", 403: "Not allowed", 429: "A little slower", 422: "That cannot be read"}

REQUESTS = Counter("broadsheet_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram("broadsheet_request_seconds", "Time to the first byte.", ["route"])


def create_app(settings: Settings | None = None) -> FastAPI:
    """The pages and the API over one store.

    The tables are brought to their newest form; when serving begins, an empty store takes in the catalogue's papers.
    """
    settings = settings or Settings.load()
    db = Database(settings.database)
    db.migrate()
    https = settings.base_url.startswith("https://")
    index = SearchIndex(settings.index_folder, db)
    site = Site(
        settings=settings,
        db=db,
        index=index,
        secret=settings.signing_key(),
        supervisor=Supervisor(db, settings),
        housekeeper=Housekeeper(db, settings, index),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        fill(site)
        site.supervisor.start()
        site.housekeeper.start()
        log.info("open at %s", site.base_url)
        yield
        site.supervisor.stop()
        site.housekeeper.stop()
        db.close()

    app = FastAPI(
        title="Broadsheet",
        version=__version__,
        summary="Daily papers, each with its claims measured.",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere: ours is /api/docs
        redoc_url=None,
        dependencies=[Depends(counted)],
    )
    app.state.site = site
    for router in (
        operations.router,
        api.docs,
        api.router,
        hf_api.router,
        hf_api.reading,
        syndication.router,
        accounts.mailed,
        accounts.router,
        runpages.router,
        pages.router,
    ):
        app.include_router(router)
    app.mount("/static", Shipped(directory=STATIC), name="static")
    # The last added is the first to see a request.
    app.add_middleware(security.Sessions, secret=site.secret, https=https)
    app.add_middleware(security.BodyLimit)
    app.add_middleware(GZipMiddleware, minimum_size=700)
    app.add_middleware(HeadToo)
    app.add_middleware(security.SecurityHeaders, https=https)
    app.add_middleware(Watched)
    app.add_exception_handler(BroadsheetError, said_so)
    app.add_exception_handler(RequestValidationError, not_readable)
    app.add_exception_handler(HTTPException, not_served)
    app.add_exception_handler(Exception, broken)
    return app


def fill(site: Site) -> None:
    """Take the catalogue's papers into an empty store and index them. A larger index is the housekeeper's work."""
    with site.db.read() as session:
        empty = session.scalar(select(Paper.id).limit(1)) is None
    if empty:
        log.info("the store is empty: %s; index: %s", import_catalogue(site.db), site.index.update())


def counted(request: Request) -> None:
    """Count a request towards its address's limit."""
    request.app.state.site.limits.check("read", request)


# --- errors -----------------------------------------------------------------------------------------------------------


def _answer(request: Request, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    if request.url.path.startswith("/api/") or "application/json" in request.headers.get("accept", ""):
        # x-error-message is what clients of the Hugging Face API show
        plain = text.encode("ascii", "replace").decode().replace("\n", " ")[:500]
        return JSONResponse({"error": text}, status, headers=(headers or {}) | {"x-error-message": plain})
    response = page(
        request, "message.html", status, title=TITLES.get(status, "Something is wrong"), text=text, link=None
    )
    response.headers.update(headers or {})
    return response


async def said_so(request: Request, error: Exception) -> Response:
    """An error that we raised on purpose: its sentence is for the reader."""
    status = next((code for kind, code in STATUS if isinstance(error, kind)), 500)
    if isinstance(error, TooMany):
        return _answer(request, status, str(error), {"retry-after": str(error.retry_after)})
    signed_in = request.state.session.account_id is not None
    if status == 403 and request.method == "GET" and not signed_in and not request.url.path.startswith("/api/"):
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(path_with("/sign-in", next=security.safe_next(target)), 303)
    text = str(error)
    if status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, text)
        text = "The feed's store cannot be reached just now." if isinstance(error, StoreError) else text
    return _answer(request, status, text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."))


async def not_readable(request: Request, error: Exception) -> Response:
    """A parameter of the wrong form."""
    assert isinstance(error, RequestValidationError)
    wrong = [f"{'.'.join(str(part) for part in each['loc'][1:])}: {each['msg']}" for each in error.errors()]
    return _answer(request, 422, "; ".join(wrong)[:1000])


async def not_served(request: Request, error: Exception) -> Response:
    """No such route, a wrong method, a body too large."""
    assert isinstance(error, HTTPException)
    text = "There is nothing at this address." if error.status_code == 404 else f"{error.detail}."
    return _answer(request, error.status_code, text, dict(error.headers or {}))


async def broken(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has it, the reader gets a plain word."""
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return _answer(request, 500, "This page is broken; the error is in the feed's log.")


# --- middleware -------------------------------------------------------------------------------------------------------


class Shipped(StaticFiles):
    """Files of ours; one that is asked for by its digest may be kept for ever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        if b"v=" in scope["query_string"] or path.startswith("fonts/"):
            response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


class HeadToo:
    """Every page that can be read can be asked about: HEAD is GET without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        scope["method"] = "GET"
        await self.app(scope, receive, sender)


class Watched:
    """Counts and times requests by route, and writes one line for each into the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, seen, method = time.perf_counter(), {"status": 500.0}, scope["method"]

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.update(status=message["status"], seconds=time.perf_counter() - began)
            await send(message)

        try:
            await self.app(scope, receive, sender)
        finally:
            # The route, not the path: a label for each address ever asked for would fill the memory.
            route = getattr(scope.get("route"), "path", "none")
            seconds = seen.get("seconds", time.perf_counter() - began)
            status = int(seen["status"])
            REQUESTS.labels(method, route, status).inc()
            SECONDS.labels(route).observe(seconds)
            if access.isEnabledFor(logging.INFO):
                parts = {"method": method, "path": scope["path"], "status": status, "ms": round(1000 * seconds, 1)}
                parts |= {"route": route, "address": scope["client"][0] if scope.get("client") else None}
                words = ascii("{method} {path} {status} {ms} ms".format(**parts))[1:-1]  # no line breaks of a stranger
                access.info("%s", words, extra={"parts": parts})
