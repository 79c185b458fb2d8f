"""The digest: what stood in the papers of a day or a week, and what a reader follows, by mail or at a webhook.

Subscribing by mail takes two steps (the address confirms), leaving takes one (RFC 8058). An issue is put in the outbox
once for every subscription, by a key that names both: composing it twice, in two processes or after a crash, sends it
once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from typing import Any

from itsdangerous import BadData, URLSafeSerializer, URLSafeTimedSerializer
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from broadsheet import catalog
from broadsheet.errors import InvalidInput, NotAllowed, UnknownPaper
from broadsheet.feed import outbox, papers
from broadsheet.feed.database import Database
from broadsheet.feed.mail import Letter
from broadsheet.feed.models import Account, Follow, Outgoing, Subscription, Vote, now
from broadsheet.feed.papers import PaperCard
from broadsheet.feed.people import clean_email
from broadsheet.feed.settings import Settings
from broadsheet.feed.webhooks import check_webhook, payload

PERIODS = ("day", "week")
MOST_STORIES, MOST_FOLLOWED = 12, 12
CONFIRM_SECONDS = 3 * 86400
# A search takes the reader's saved words, the first and the last day that count, and gives ids of papers, best first.
Search = Callable[[str, date, date], Sequence[str]]


@dataclass(frozen=True)
class Story:
    """One paper in an issue, and why it stands there."""

    id: str
    title: str
    url: str
    summary: str
    authors: str
    why: str
    runs: bool  # its method is in the library


@dataclass(frozen=True)
class Issue:
    """What one subscription is sent."""

    period: str
    name: str  # "2025-12-08" or "2025-W50"
    heading: str
    url: str
    stories: tuple[Story, ...]


# --- subscribing --------------------------------------------------------------------------------------------------


def subscribe(
    db: Database,
    settings: Settings,
    address: str,
    *,
    kind: str = "mail",
    period: str = "day",
    account: Account | None = None,
) -> Subscription:
    """Ask for the digest. A mail address gets one letter asking it to confirm; nothing else is sent before it does.

    A webhook belongs to a reader who is signed in, and is called from the next issue on. Whether an address is known
    already is not to be seen from outside: what comes back looks the same.

    Args:
        address: mail address, or the webhook's URL.
        kind: ``"mail"``, ``"slack"``, ``"discord"`` or ``"json"``.
        period: ``"day"`` or ``"week"``.

    Raises:
        InvalidInput: an unknown kind or period, an address that cannot be, or a URL that must not be called.
        NotAllowed: a webhook, and nobody is signed in.
    """
    if period not in PERIODS:
        raise InvalidInput(f"period {period!r}: expected day or week")
    if kind == "mail":
        address = clean_email(address)
    elif account is None:
        raise NotAllowed("you must be signed in to have the digest sent to a webhook")
    else:
        payload(kind, "", "", ())  # refuses an unknown kind
        address = check_webhook(settings, address)
    with db.write() as session:
        found = session.scalar(select(Subscription).where(Subscription.kind == kind, Subscription.address == address))
        if kind != "mail" and found is not None and found.account_id not in (None, account.id if account else None):
            raise InvalidInput("this webhook gets the digest already, from another account")
        if found is None:
            found = Subscription(kind=kind, address=address)
            session.add(found)
        proven = account is not None and kind == "mail" and account.email == address and account.email_confirmed
        if account is not None and (kind != "mail" or account.email == address):
            found.account_id = account.id
        running = found.confirmed is not None and found.ended is None
        if not running:
            found.period, found.ended = period, None
            found.confirmed = now() if proven or kind != "mail" else None
        elif found.account_id is not None and account is not None and found.account_id == account.id:
            found.period = period  # whoever merely knows the address cannot change what its owner gets
        session.flush()
        if found.confirmed is None or kind == "mail":
            _ask(session, settings, found, really=found.confirmed is None)
    return found


def _ask(session: Session, settings: Settings, subscription: Subscription, really: bool) -> None:
    """Put the letter in the outbox that asks to confirm. Where there is nothing to ask it is taken out again: who gets
    the digest is not to be told from the time that an answer takes."""
    token = _confirming(settings).dumps([subscription.id, subscription.period])
    link = f"{settings.base_url.rstrip('/')}/digest/confirm?token={token}"
    values = {"link": link, "period": subscription.period, "base_url": settings.base_url}
    letter = Letter(
        subscription.address,
        "Please confirm: the Broadsheet digest",
        _render("confirm.txt", **values),
        _render("confirm.html", **values),
        headers={"Auto-Submitted": "auto-generated"},
    )
    # One such letter a day for each address: the form must not become a means of flooding somebody's mailbox.
    key = f"confirm:{subscription.id}:{now():%Y-%m-%d}"
    if really:
        outbox.put(session, key, letter)
    else:
        outbox.put(session, f"{key}:not", letter)
        outbox.take_back(session, f"{key}:not")


def confirm(db: Database, settings: Settings, token: str) -> Subscription:
    """Start a subscription by the link that was mailed; NotAllowed where it is forged or too old."""
    try:
        number, period = _confirming(settings).loads(token, max_age=CONFIRM_SECONDS)
    except BadData as error:
        raise NotAllowed("this link is wrong or too old: subscribe once more") from error
    with db.write() as session:
        found = session.get(Subscription, number)
        if found is None:
            raise NotAllowed("this subscription is gone: subscribe once more")
        if found.confirmed is None:
            found.confirmed, found.period, found.ended = now(), period, None
    return found


def unsubscribe(db: Database, settings: Settings, token: str) -> Subscription | None:
    """End a subscription by the link in its mails, which never grows old; doing so twice is fine."""
    try:
        number = _leaving(settings).loads(token)
    except BadData as error:
        raise NotAllowed("this link is wrong: take the one at the end of a digest") from error
    with db.write() as session:
        found = session.get(Subscription, number)
        if found is not None:
            _end(session, found)
    return found


def end(db: Database, account: Account, subscription_id: int) -> None:
    """End one of the reader's own subscriptions."""
    with db.write() as session:
        found = session.get(Subscription, subscription_id)
        if found is None or found.account_id != account.id:
            raise NotAllowed("you may not end a subscription that is not yours")
        _end(session, found)


def _end(session: Session, subscription: Subscription) -> None:
    subscription.ended = subscription.ended or now()
    waiting = (Outgoing.subscription_id == subscription.id, Outgoing.sent.is_(None), Outgoing.claimed.is_(None))
    session.execute(delete(Outgoing).where(*waiting))


def subscriptions_of(db: Database, account: Account) -> list[Subscription]:
    """The reader's running subscriptions."""
    with db.read() as session:
        mine = select(Subscription).where(Subscription.account_id == account.id, Subscription.ended.is_(None))
        return list(session.scalars(mine.order_by(Subscription.id)))


def _confirming(settings: Settings) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(settings.signing_key(), salt="broadsheet.digest.confirm")


def _leaving(settings: Settings) -> URLSafeSerializer:
    return URLSafeSerializer(settings.signing_key(), salt="broadsheet.digest.leave")


def leave_link(settings: Settings, subscription: Subscription) -> str:
    """The address that ends this subscription."""
    return f"{settings.base_url.rstrip('/')}/digest/unsubscribe?token={_leaving(settings).dumps(subscription.id)}"


# --- composing ----------------------------------------------------------------------------------------------------


def compose(
    session: Session, settings: Settings, subscription: Subscription, day: date, search: Search | None = None
) -> Issue | None:
    """The issue for one subscription, or None where there is nothing to tell.

    Args:
        day: the day it is about, or any day of the week it is about.
        search: answers the reader's saved searches; without it they are left out.
    """
    name = papers.period_of(subscription.period, day)
    first, last = papers.period(subscription.period, name)
    window: dict[str, Any] = {subscription.period: name}
    stories: dict[str, Story] = {}

    def take(cards: Sequence[PaperCard], why: Callable[[PaperCard], str], most: int) -> None:
        for card in cards:
            if most and card.id not in stories:
                stories[card.id] = _story(settings, card, why(card))
                most -= 1

    if subscription.account_id is not None:
        mine = select(Follow).where(Follow.account_id == subscription.account_id).order_by(Follow.kind, Follow.value)
        for follow in session.scalars(mine):
            if follow.kind == "search":
                ids = search(follow.value, first, last) if search is not None else ()
                cards = [card for card in papers.cards(session, list(ids)) if _within(card, first, last)]
            else:
                cards = papers.list_papers(session, **{**window, follow.kind: follow.value}, limit=MOST_FOLLOWED)
            left = max(0, MOST_FOLLOWED - len(stories))
            take(cards, lambda _, f=follow: f"You follow the {f.kind} “{f.value}”", left)
    voted = _voted(session, first, last)
    take(papers.cards(session, list(voted)), lambda card: _votes(card, voted[card.id]), MOST_STORIES)
    top = papers.list_papers(session, **window, sort="votes", limit=MOST_STORIES)
    take(top, _votes, max(0, MOST_STORIES - len(voted)))
    if not stories:
        return None
    when = f"{day:%A}, {day.day} {day:%B %Y}" if subscription.period == "day" else f"week {name[-2:]} of {name[:4]}"
    url = f"{settings.base_url.rstrip('/')}/{subscription.period}/{name}"
    return Issue(subscription.period, name, f"Broadsheet, {when}", url, tuple(stories.values()))


def _within(card: PaperCard, first: date, last: date) -> bool:
    day = card.listed_on or card.published
    return day is not None and first <= day <= last


def _voted(session: Session, first: date, last: date) -> dict[str, int]:
    """What our readers voted for in those days, whenever it was listed: votes by paper, most first."""
    since, until = (datetime.combine(day, time(), UTC) for day in (first, last + timedelta(days=1)))
    n = func.count().label("n")
    chosen = select(Vote.paper_id, n).where(Vote.created >= since, Vote.created < until).group_by(Vote.paper_id)
    rows = session.execute(chosen.order_by(n.desc(), Vote.paper_id).limit(MOST_STORIES))
    return {ident: count for ident, count in rows}  # noqa: C416 (a row is no pair to the type checker)


def _votes(card: PaperCard, new: int = 0) -> str:
    if not card.upvotes:
        return "New"
    plural = f"{card.upvotes} upvote{'s' if card.upvotes > 1 else ''}"
    return f"{plural}, {new} of them new" if 0 < new < card.upvotes else plural


def _story(settings: Settings, card: PaperCard, why: str) -> Story:
    named = ", ".join(card.authors[:3]) + (f" and {card.n_authors - 3} more" if card.n_authors > 3 else "")
    return Story(
        id=card.id,
        title=card.title,
        url=f"{settings.base_url.rstrip('/')}/papers/{card.id}",
        summary=_first_sentences(card.abstract, 320),
        authors=named or (f"{card.n_authors} authors" if card.n_authors else ""),
        why=why,
        runs=_runs(card.slug),
    )


def _runs(slug: str | None) -> bool:
    """Whether the library has the method of the catalogue's paper of that slug."""
    try:
        return slug is not None and catalog.paper(slug).built
    except UnknownPaper:  # it has left the catalogue since
        return False


def _first_sentences(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    cut = text[:most]
    stop = max(cut.rfind(". "), cut.rfind("? "), cut.rfind("! "))
    return cut[: stop + 1] if stop > most // 3 else cut[: cut.rfind(" ")] + " …"


def letter(settings: Settings, subscription: Subscription, issue: Issue) -> Letter:
    """The issue as a mail, with what lets a mail program offer to unsubscribe."""
    leave = leave_link(settings, subscription)
    values = {"issue": issue, "leave": leave, "base_url": settings.base_url}
    host = settings.base_url.split("://")[-1].split("/")[0].split(":")[0] or "localhost"
    return Letter(
        subscription.address,
        f"{issue.heading}: {issue.stories[0].title}"[:200],
        _render("digest.txt", **values),
        _render("digest.html", **values),
        message_id=f"digest.{issue.period}.{issue.name}.{subscription.id}@{host}",
        headers={
            "List-Unsubscribe": f"<{leave}>",
            "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
            "List-Id": f"Broadsheet digest <digest.{host}>",
            "Precedence": "bulk",
        },
    )


def queue(db: Database, settings: Settings, period: str, day: date, search: Search | None = None) -> int:
    """Put an issue in the outbox for every running subscription of that period; how many rows were new."""
    if period not in PERIODS:
        raise InvalidInput(f"period {period!r}: expected day or week")
    name = papers.period_of(period, day)
    added, last = 0, 0
    while True:
        with db.read() as session:
            running = (
                select(Subscription)
                .where(Subscription.period == period, Subscription.confirmed.is_not(None), Subscription.ended.is_(None))
                .where(Subscription.id > last)
                .order_by(Subscription.id)
                .limit(200)
            )
            some = list(session.scalars(running))
            composed = [(each, compose(session, settings, each, day, search)) for each in some]
        if not some:
            return added
        last = some[-1].id
        with db.write() as session:
            for subscription, issue in composed:
                if issue is not None:
                    added += outbox.put_row(session, _row(settings, subscription, issue, name))


def _row(settings: Settings, subscription: Subscription, issue: Issue, name: str) -> Outgoing:
    key = f"digest:{subscription.period}:{name}:{subscription.id}"
    if subscription.kind == "mail":
        content: dict[str, Any] = outbox.content(letter(settings, subscription, issue))
    else:
        content = payload(subscription.kind, issue.heading, issue.url, issue.stories)
    return Outgoing(
        key=key, subscription_id=subscription.id, kind=subscription.kind, address=subscription.address, content=content
    )


@cache
def _templates() -> Environment:
    loader = PackageLoader("broadsheet.feed", "letters")
    return Environment(
        loader=loader,
        autoescape=lambda name: bool(name) and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(name: str, **values: Any) -> str:
    return _templates().get_template(name).render(**values).strip() + "\n"
