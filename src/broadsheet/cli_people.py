"""The feed's commands about people: the digest, accounts and their roles; heavy imports wait until a command runs."""

from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer


class Period(StrEnum):
    """How often an issue of the digest comes out."""

    day = "day"
    week = "week"


class Role(StrEnum):
    """What an account may do."""

    reader = "reader"
    editor = "editor"
    operator = "operator"


def send_digest(
    period: Annotated[Period, typer.Option(help="Which issue.")] = Period.day,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The day, or a day of the week, it is about.")
    ] = None,
    every: Annotated[
        float,
        typer.Option(min=0, help="Go on: look every so many minutes for what is due, daily and weekly issues too."),
    ] = 0,
    again: Annotated[bool, typer.Option(help="Send once more what is in doubt since a sender died.")] = False,
) -> None:
    """Put an issue in the outbox and send what is due; sending twice changes nothing."""
    from broadsheet.cli_feed import _open, _stop_on_signals
    from broadsheet.errors import InvalidInput
    from broadsheet.feed import outbox

    database, settings = _open()
    if not settings.mail_url:
        typer.echo("BROADSHEET_MAIL_URL is not set: mail waits in the outbox, webhooks are called.", err=True)
    if again:
        typer.echo(f"{outbox.send_again(database)} messages in doubt are sent once more")
    if every and day is not None:
        raise InvalidInput("--day is for a single issue, --every goes on with the days as they come: give one of them")
    stop = _stop_on_signals() if every else None
    while True:
        today = datetime.now().astimezone().date()
        for kind, about in _due(period, day, today) if stop is None else _finished(today):
            _queue(database, settings, kind, about)
        done = outbox.deliver(database, settings)
        typer.echo(
            f"{done.sent} sent, {done.postponed} postponed, {done.failed} given up, {done.in_doubt} in doubt, "
            f"{outbox.waiting(database)} waiting"
        )
        if stop is None or stop.wait(every * 60):
            return


def _due(period: Period, day: datetime | None, today: date) -> list[tuple[Period, date]]:
    """The issue that was asked for: by default of the last whole day or week."""
    if day is not None:
        return [(period, day.date())]
    return [(period, today - timedelta(days=1 if period is Period.day else 7))]


def _finished(today: date) -> list[tuple[Period, date]]:
    """The issues whose day or week is over."""
    return [(Period.day, today - timedelta(days=1)), (Period.week, today - timedelta(days=7))]


def _queue(database: Any, settings: Any, period: Period, about: date) -> None:
    from broadsheet.feed import digest
    from broadsheet.feed.search import SearchIndex

    index = SearchIndex(settings.index_folder, database)

    def search(words: str, since: date, until: date) -> list[str]:
        return [hit.paper_id for hit in index.search(words, since=since, until=until, limit=digest.MOST_FOLLOWED).hits]

    added = digest.queue(database, settings, period.value, about, search)
    typer.echo(f"{period.value} of {about}: {added} new in the outbox")


def set_role(
    name: Annotated[str, typer.Argument(help="The account's name.")],
    role: Annotated[Role, typer.Argument(help="What it may do from now on.")],
) -> None:
    """Give an account a role: reader, editor or operator."""
    from broadsheet.cli_feed import _open
    from broadsheet.feed import people

    database, _ = _open()
    people.set_role(database, name, role.value)
    typer.echo(f"{name} is now {role.value}")
