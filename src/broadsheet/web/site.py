"""What all routes share: settings, store, index, keys, limits, the templates; and how a page is made of them."""

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import Path, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from broadsheet import __version__
from broadsheet.errors import BroadsheetError
from broadsheet.feed.database import Database
from broadsheet.feed.permissions import Action, has_role, may
from broadsheet.feed.search import SearchIndex
from broadsheet.feed.settings import Settings
from broadsheet.web.housekeeping import Housekeeper
from broadsheet.web.rendering import environment
from broadsheet.web.runs import Supervisor
from broadsheet.web.security import Limits, Reader, reader

MOST = 2**31 - 1  # what a database's integer holds
Number = Annotated[int, Path(ge=1, le=MOST)]  # of a list, a comment, a run, a token


@dataclass
class Site:
    """One feed being served."""

    settings: Settings
    db: Database
    index: SearchIndex
    secret: str
    supervisor: Supervisor
    housekeeper: Housekeeper
    limits: Limits = field(default_factory=Limits)
    templates: Environment = field(default_factory=environment)

    @property
    def base_url(self) -> str:
        return self.settings.base_url.rstrip("/")


def site(request: Request) -> Site:
    """The site that a request is for."""
    return request.app.state.site


def today() -> date:
    """The day, UTC."""
    return datetime.now(UTC).date()


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A template with what every page needs."""
    here, session = site(request), request.state.session
    try:
        who = reader(request)
    except BroadsheetError:  # a wrong token on a page: the error page is for nobody
        who = Reader()
    html = here.templates.get_template(template).render(
        request=request,
        reader=who,
        csrf=lambda: session.csrf_token(here.secret),
        notice=session.heard() if status < 400 else "",
        today=today(),
        base_url=here.base_url,
        version=__version__,
        is_editor=has_role(who.acting, "editor"),
        may_run=may(who.acting, Action.start_run),
        **values,
    )
    private = who.account is not None or session.changed
    return HTMLResponse(html, status, headers={"cache-control": "no-store" if private else "no-cache"})
