"""The outbox: what is to be sent stands in the database first, each row is sent once, whatever dies meanwhile.

A row goes through *due* -> *claimed* -> *sent* (or *failed*). The claim is committed at the last moment at which the
message is certainly not delivered: when the mail server has accepted sender and recipient and waits for the content, or
just before a webhook is called. A process that dies before the claim has sent nothing, and the next one sends; one that
dies after its row is marked *sent* loses nothing. In between, while the content crosses the wire, nobody can know
(RFC 5321, 4.5.4.1 leaves the choice to the sender): such a row stays *in doubt*, is never repeated by itself, and
is shown to the operator, who may order it sent again. A mail's Message-ID is the same at every try.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from broadsheet.errors import InvalidInput
from broadsheet.feed.database import Database
from broadsheet.feed.mail import Letter, Mailer, Refused, TryLater, Uncertain, Unreachable
from broadsheet.feed.models import Outgoing, Subscription, now
from broadsheet.feed.settings import Settings
from broadsheet.feed.webhooks import post

MOST_ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = timedelta(minutes=1), timedelta(hours=6)
IN_DOUBT_AFTER = timedelta(minutes=10)  # well beyond the time-outs of a living sender


@dataclass(frozen=True)
class Delivery:
    """What one pass over the outbox did."""

    sent: int
    postponed: int
    failed: int
    in_doubt: int


def content(letter: Letter) -> dict[str, Any]:
    """What the outbox keeps of a letter, as JSON."""
    return {
        "subject": letter.subject,
        "text": letter.text,
        "html": letter.html,
        "message_id": letter.message_id,
        "headers": dict(letter.headers),
    }


def put(session: Session, key: str, letter: Letter) -> bool:
    """Put a mail in the outbox, in the caller's transaction; a key that is there already changes nothing."""
    return put_row(session, Outgoing(key=key, kind="mail", address=letter.to, content=content(letter)))


def put_row(session: Session, row: Outgoing) -> bool:
    """Add a row unless its key is there; whether it was added."""
    if session.scalar(select(Outgoing.id).where(Outgoing.key == row.key)) is not None:
        return False
    session.add(row)
    session.flush()
    return True


def take_back(session: Session, key: str) -> None:
    """Take a message out again, in the transaction that put it there."""
    session.execute(delete(Outgoing).where(Outgoing.key == key))


def deliver(
    db: Database,
    settings: Settings,
    *,
    mailer: Mailer | None = None,
    clock: Callable[[], datetime] = now,
    limit: int | None = None,
) -> Delivery:
    """Send what is due. Several processes may do so at the same time: a row is claimed by one.

    Args:
        mailer: the SMTP connection; made from ``settings.mail_url`` where it is not given.
        limit: at most so many rows.
    """
    counts = {"sent": 0, "postponed": 0, "failed": 0}
    own = mailer is None and bool(settings.mail_url)
    if own:
        mailer = Mailer(settings.mail_url, settings.mail_from)
    try:
        with_mail, done = mailer is not None, 0
        while limit is None or done < limit:
            row = _next(db, clock(), with_mail)
            if row is None:
                break
            done += 1
            try:
                outcome = _send(db, settings, row, mailer, clock)
            except Unreachable as error:  # the server is down, not this letter's fault: all mail waits, no try is lost
                _settle(db, row, due=clock() + FIRST_WAIT, error=str(error))
                outcome, with_mail = "postponed", False
            if outcome:
                counts[outcome] += 1
    finally:
        if own and mailer is not None:
            mailer.close()
    return Delivery(**counts, in_doubt=len(in_doubt(db, clock())))


def _next(db: Database, at: datetime, with_mail: bool) -> Outgoing | None:
    with db.read() as session:
        waiting = (
            select(Outgoing)
            .outerjoin(Subscription, Subscription.id == Outgoing.subscription_id)
            .where(Outgoing.sent.is_(None), Outgoing.failed.is_(None), Outgoing.claimed.is_(None), Outgoing.due <= at)
            .where(or_(Outgoing.subscription_id.is_(None), Subscription.ended.is_(None)))  # she left before it was sent
            .order_by(Outgoing.due, Outgoing.id)
        )
        if not with_mail:
            waiting = waiting.where(Outgoing.kind != "mail")
        return session.scalars(waiting.limit(1)).first()


class _Taken(Exception):
    """Another process has claimed the row."""


def _send(
    db: Database, settings: Settings, row: Outgoing, mailer: Mailer | None, clock: Callable[[], datetime]
) -> str | None:
    def claim() -> None:
        with db.write() as session:
            free = Outgoing.claimed.is_(None) & Outgoing.sent.is_(None) & Outgoing.failed.is_(None)
            mine = session.execute(
                update(Outgoing)
                .where(Outgoing.id == row.id, free)
                .values(claimed=clock(), attempts=Outgoing.attempts + 1)
                .returning(Outgoing.id)
            )
            if mine.scalar() is None:
                raise _Taken

    try:
        if row.kind == "mail":
            assert mailer is not None
            mailer.send(Letter(row.address, **row.content), before_data=claim)
        else:
            claim()
            post(settings, row.address, row.content)
    except _Taken:
        if mailer is not None:
            mailer.hang_up()  # the server still waits for the content
        return None
    except Unreachable:
        raise
    except Uncertain as error:
        _settle(db, row, error=str(error))
        return None
    except TryLater as error:
        return _settle_later(db, row, clock(), str(error))
    except (Refused, InvalidInput) as error:
        _settle(db, row, failed=clock(), error=str(error))
        return "failed"
    _settle(db, row, sent=clock(), error="")
    return "sent"


def _settle(db: Database, row: Outgoing, **values: Any) -> None:
    with db.write() as session:
        session.execute(update(Outgoing).where(Outgoing.id == row.id).values(**values))


def _settle_later(db: Database, row: Outgoing, at: datetime, error: str) -> str:
    attempts = row.attempts + 1
    if attempts >= MOST_ATTEMPTS:
        _settle(db, row, failed=at, attempts=attempts, error=error)
        return "failed"
    wait = min(FIRST_WAIT * 3 ** (attempts - 1), LONGEST_WAIT) * random.uniform(0.8, 1.2)  # not all at the same moment
    _settle(db, row, claimed=None, attempts=attempts, due=at + wait, error=error)
    return "postponed"


def in_doubt(db: Database, at: datetime | None = None) -> list[Outgoing]:
    """Rows whose sender died while the content was on the wire: delivered or not, nobody knows."""
    with db.read() as session:
        found = select(Outgoing).where(
            Outgoing.claimed < (at or now()) - IN_DOUBT_AFTER, Outgoing.sent.is_(None), Outgoing.failed.is_(None)
        )
        return list(session.scalars(found.order_by(Outgoing.id)))


def send_again(db: Database, at: datetime | None = None) -> int:
    """The operator's order to send what is in doubt once more; how many rows that are."""
    doubtful = [row.id for row in in_doubt(db, at)]
    with db.write() as session:
        session.execute(update(Outgoing).where(Outgoing.id.in_(doubtful)).values(claimed=None, due=at or now()))
    return len(doubtful)


def waiting(db: Database) -> int:
    """How many rows are neither sent nor given up."""
    with db.read() as session:
        found = select(func.count()).select_from(Outgoing).where(Outgoing.sent.is_(None), Outgoing.failed.is_(None))
        return session.scalar(found) or 0
