"""Accounts: signing up and in, passwords, mail addresses, API tokens, and what the law lets a person ask for.

Passwords are kept as argon2id hashes, API tokens as SHA-256 of 32 random bytes (nothing to guess, so nothing to slow
down). Tokens sent by mail are signed, expire, and hold the account's generation: a password change voids earlier ones.
"""

import hashlib
import re
import secrets
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from email_validator import EmailNotValidError, validate_email
from itsdangerous import BadData, URLSafeTimedSerializer
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from broadsheet.errors import InvalidInput, NotAllowed, NotFound
from broadsheet.feed.database import Database
from broadsheet.feed.models import (
    Account,
    Comment,
    Follow,
    Identity,
    LibraryItem,
    ListItem,
    Outgoing,
    Paper,
    ReadingList,
    Report,
    Run,
    Subscription,
    Token,
    Vote,
    now,
)
from broadsheet.feed.permissions import RANK, Action, require

HASHER = PasswordHasher()
SCOPES = ("read", "write", "run")
SHORTEST, LONGEST = 10, 1000  # of a password; argon2 would hash a megabyte too, at our cost
RESET_SECONDS, CONFIRM_SECONDS = 3600, 7 * 86400
USED_EVERY_SECONDS = 60  # a token's last use is written at most so often: reading must not mean writing
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_RESERVED = {"admin", "operator", "editor", "broadsheet", "root", "system", "me", "new", "api", "local"}
_NOBODY = HASHER.hash(secrets.token_hex(16))  # what an unknown name is checked against, so that it takes as long


class AddressTaken(InvalidInput):
    """An account has this mail address. A page must not say so to whoever asks: it answers as if all went well, and
    mails the address's owner instead."""


def clean_name(name: str) -> str:
    """The name in the form that is kept.

    Raises:
        InvalidInput: it is not 1 to 40 letters, digits and inner hyphens, or is reserved.
    """
    name = name.strip().lower()
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"name {name[:60]!r}: 1 to 40 letters a-z, digits and hyphens inside, please")
    if name in _RESERVED:
        raise InvalidInput(f"name {name!r} is reserved: choose another")
    return name


def clean_email(email: str) -> str:
    """The address in the form that is kept: lower case, checked for its form only (no DNS is asked)."""
    try:
        return validate_email(email.strip(), check_deliverability=False, test_environment=True).normalized.lower()
    except EmailNotValidError as error:
        raise InvalidInput(f"mail address {email[:80]!r}: {error}") from error


def _hashed(password: str) -> str:
    if not SHORTEST <= len(password) <= LONGEST:
        raise InvalidInput(f"the password has {len(password)} characters: {SHORTEST} to {LONGEST}, please")
    return HASHER.hash(password)


def sign_up(db: Database, name: str, email: str, password: str, *, role: str = "reader") -> Account:
    """A new account.

    Raises:
        InvalidInput: name, address or password cannot be used, or the name is taken (names are public).
        AddressTaken: an account has this address.
    """
    name, email, hashed = clean_name(name), clean_email(email), _hashed(password)
    with db.write() as session:
        if session.scalar(select(Account.id).where(Account.name == name)) is not None:
            raise InvalidInput(f"the name {name!r} is taken: choose another")
        if session.scalar(select(Account.id).where(Account.email == email)) is not None:
            raise AddressTaken("an account has this mail address: sign in, or reset its password")
        account = Account(name=name, email=email, password=hashed, role=role)
        session.add(account)
    return account


def sign_in(db: Database, name_or_email: str, password: str) -> Account:
    """The account of that name or address and password.

    Raises:
        NotAllowed: no such pair. Whether the name exists is neither said nor to be told from the time it took.
    """
    key = name_or_email.strip().lower()
    with db.read() as session:
        account = session.scalar(select(Account).where(or_(Account.name == key, Account.email == key)))
    hashed = account.password if account is not None and account.password else _NOBODY
    try:
        right = HASHER.verify(hashed, password[: LONGEST + 1])
    except (VerificationError, InvalidHashError):
        right = False
    if account is None or not account.password or not right:
        raise NotAllowed("name or password is wrong")
    if HASHER.check_needs_rehash(account.password):
        with db.write() as session:
            session.execute(update(Account).where(Account.id == account.id).values(password=HASHER.hash(password)))
    return account


def account(db: Database, account_id: int) -> Account | None:
    """The account of that number."""
    with db.read() as session:
        return session.get(Account, account_id)


def account_named(db: Database, name: str) -> Account:
    """The account of that name; NotFound otherwise."""
    with db.read() as session:
        found = session.scalar(select(Account).where(Account.name == name.strip().lower()))
    if found is None:
        raise NotFound(f"no account {name!r}")
    return found


def change_password(db: Database, account_id: int, old: str, new: str) -> Account:
    """Set a new password and end all sessions; the old one is asked for where there is one."""
    account = _get(db, account_id)
    if account.password:
        sign_in(db, account.name, old)
    return _set_password(db, account_id, new)


def _set_password(db: Database, account_id: int, new: str, generation: int | None = None) -> Account:
    hashed = _hashed(new)
    with db.write() as session:
        account = session.get(Account, account_id)
        if account is None or (generation is not None and account.generation != generation):
            raise NotAllowed("this link is used up: ask for a new one")
        account.password, account.generation = hashed, account.generation + 1
    return account


def end_sessions(db: Database, account_id: int) -> None:
    """Sign out everywhere."""
    with db.write() as session:
        session.execute(update(Account).where(Account.id == account_id).values(generation=Account.generation + 1))


# --- links sent by mail -------------------------------------------------------------------------------------------


def reset_token(db: Database, secret: str, email: str) -> str | None:
    """What a link to set a new password holds; None where no account has that address (which the page does not say)."""
    try:
        email = clean_email(email)
    except InvalidInput:
        return None
    with db.read() as session:
        account = session.scalar(select(Account).where(Account.email == email))
    return None if account is None else _signer(secret, "reset").dumps([account.id, account.generation])


def reset_password(db: Database, secret: str, token: str, new: str) -> Account:
    """Set the password by a link that was mailed: it works once, for an hour. It also confirms the address.

    Raises:
        NotAllowed: the link is forged, too old or used.
    """
    account_id, generation = _opened(secret, "reset", token, RESET_SECONDS)
    account = _set_password(db, account_id, new, generation)
    _confirm(db, account_id, account.email)
    return account


def confirm_email_token(account: Account, secret: str) -> str:
    """What a link to confirm a mail address holds."""
    return _signer(secret, "confirm").dumps([account.id, account.email])


def confirm_email(db: Database, secret: str, token: str) -> Account:
    """Note that the address is its owner's; NotAllowed where the link is forged, too old or of another address."""
    account_id, email = _opened(secret, "confirm", token, CONFIRM_SECONDS)
    return _confirm(db, account_id, email)


def _confirm(db: Database, account_id: int, email: str) -> Account:
    with db.write() as session:
        account = session.get(Account, account_id)
        if account is None or account.email != email:
            raise NotAllowed("this link is for another address: ask for a new one")
        account.email_confirmed = account.email_confirmed or now()
    return account


def _signer(secret: str, purpose: str) -> URLSafeTimedSerializer:
    if not secret:
        raise ValueError("an empty key signs nothing")
    return URLSafeTimedSerializer(secret, salt=f"broadsheet.{purpose}")


def _opened(secret: str, purpose: str, token: str, seconds: int) -> Any:
    try:
        return _signer(secret, purpose).loads(token, max_age=seconds)
    except BadData as error:
        raise NotAllowed("this link is wrong or too old: ask for a new one") from error


# --- API tokens ---------------------------------------------------------------------------------------------------


def create_token(db: Database, account_id: int, name: str, scopes: tuple[str, ...] = ("read",)) -> tuple[Token, str]:
    """A new API token and its secret, which is shown this once and kept nowhere.

    Args:
        scopes: of ``"read"``, ``"write"`` (vote, comment, lists) and ``"run"`` (start runs, if the account may).
    """
    if wrong := set(scopes) - set(SCOPES):
        raise InvalidInput(f"scope {sorted(wrong)[0]!r}: expected {', '.join(SCOPES)}")
    if not scopes:
        raise InvalidInput("a token without a scope can do nothing: give at least 'read'")
    name = " ".join(name.split())[:80] or "token"
    secret = "bs_" + secrets.token_urlsafe(32)
    with db.write() as session:
        token = Token(account_id=account_id, name=name, digest=_digest(secret), scopes=sorted(set(scopes)))
        session.add(token)
    return token, secret


def account_of_token(db: Database, secret: str) -> tuple[Account, tuple[str, ...]] | None:
    """Whose token this is, and what it may do; None where it is unknown or revoked."""
    with db.read() as session:
        token = session.scalar(select(Token).where(Token.digest == _digest(secret), Token.revoked.is_(None)))
        account = None if token is None else session.get(Account, token.account_id)
    if token is None or account is None:
        return None
    if token.used is None or (now() - token.used).total_seconds() > USED_EVERY_SECONDS:
        with db.write() as session:
            session.execute(update(Token).where(Token.id == token.id).values(used=now()))
    return account, tuple(token.scopes)


def tokens_of(db: Database, account_id: int) -> list[Token]:
    """The account's tokens that are not revoked, newest first."""
    with db.read() as session:
        found = select(Token).where(Token.account_id == account_id, Token.revoked.is_(None)).order_by(Token.id.desc())
        return list(session.scalars(found))


def revoke_token(db: Database, account: Account, token_id: int) -> None:
    """Make a token of the account's own void; another's is answered as if it did not exist."""
    with db.write() as session:
        token = session.get(Token, token_id)
        if token is None or token.account_id != account.id:
            raise NotFound(f"no token {token_id}")
        require(account, Action.manage_token, token)
        token.revoked = token.revoked or now()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --- other services -----------------------------------------------------------------------------------------------


def sign_in_with(db: Database, provider: str, subject: str, email: str, name: str, *, email_verified: bool) -> Account:
    """The account that belongs to an account elsewhere; made at the first sign-in.

    An existing account is joined by address only where the provider has verified the address and so have we: else
    whoever types somebody's address into another service would get her account.
    """
    with db.write() as session:
        known = session.scalar(select(Identity).where(Identity.provider == provider, Identity.subject == subject))
        if known is not None:
            return session.get_one(Account, known.account_id)
        email = clean_email(email)
        account = session.scalar(select(Account).where(Account.email == email))
        if account is not None and not (email_verified and account.email_confirmed):
            raise NotAllowed("an account with this mail address exists: sign in to it with its password")
        if account is None:
            account = Account(name=_free_name(session, name), email=email)
            account.email_confirmed = now() if email_verified else None
            session.add(account)
            session.flush()
        session.add(Identity(account_id=account.id, provider=provider, subject=subject))
        return account


def _free_name(session: Session, wanted: str) -> str:
    base = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:30].strip("-") or "reader"
    name, number = base, 1
    while name in _RESERVED or session.scalar(select(Account.id).where(Account.name == name)) is not None:
        number += 1
        name = f"{base}-{number}"
    return name


# --- roles, export, deletion --------------------------------------------------------------------------------------


def set_role(db: Database, name: str, role: str) -> Account:
    """Give an account a role (the command line's business, or an operator's)."""
    if role not in RANK:
        raise InvalidInput(f"role {role!r}: expected {', '.join(RANK)}")
    with db.write() as session:
        account = session.scalar(select(Account).where(Account.name == name.strip().lower()))
        if account is None:
            raise NotFound(f"no account {name!r}")
        account.role = role
    return account


def export_account(db: Database, account: Account) -> dict[str, Any]:
    """All that is kept about a person, as JSON. Password hash and token digests are not hers to carry away."""

    def rows(session: Session, model: Any, *columns: str, where: Any = None) -> list[dict[str, Any]]:
        condition = model.account_id == account.id if where is None else where
        return [
            {column: _plain(getattr(row, column)) for column in columns}
            for row in session.scalars(select(model).where(condition))
        ]

    with db.read() as session:
        fresh = session.get(Account, account.id)
        if fresh is None:
            raise NotFound("this account is gone")
        lists = [
            {
                "name": each.name,
                "public": each.public,
                "papers": list(session.scalars(select(ListItem.paper_id).where(ListItem.list_id == each.id))),
            }
            for each in session.scalars(select(ReadingList).where(ReadingList.account_id == account.id))
        ]
        return {
            "name": fresh.name,
            "email": fresh.email,
            "email_confirmed": _plain(fresh.email_confirmed),
            "role": fresh.role,
            "created": _plain(fresh.created),
            "votes": rows(session, Vote, "paper_id", "created"),
            "comments": rows(session, Comment, "paper_id", "body", "created", "edited"),
            "reports": rows(session, Report, "comment_id", "reason", "created"),
            "lists": lists,
            "library": rows(session, LibraryItem, "paper_id", "title", "added"),
            "follows": rows(session, Follow, "kind", "value", "created"),
            "tokens": rows(session, Token, "name", "scopes", "created", "used", "revoked"),
            "subscriptions": rows(session, Subscription, "kind", "address", "period", "confirmed", "ended"),
            "identities": rows(session, Identity, "provider", "subject"),
            "runs": rows(session, Run, "slug", "preset", "seeds", "device", "state", "created", "started", "ended"),
            "submitted": rows(session, Paper, "id", "title", where=Paper.submitted_by == account.id),
        }


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def delete_account(db: Database, account: Account) -> None:
    """Delete a person: all that is hers goes, mail not yet sent too; her comments keep their place, empty."""
    with db.write() as session:
        mine = select(Subscription.id).where(Subscription.account_id == account.id)
        session.execute(delete(Outgoing).where(Outgoing.subscription_id.in_(mine)))
        session.execute(delete(Outgoing).where(Outgoing.kind == "mail", Outgoing.address == account.email))
        session.execute(
            update(Comment)
            .where(Comment.account_id == account.id)
            .values(body="", deleted=func.coalesce(Comment.deleted, now()), account_id=None)
        )
        session.execute(delete(Account).where(Account.id == account.id))


def _get(db: Database, account_id: int) -> Account:
    found = account(db, account_id)
    if found is None:
        raise NotFound("this account is gone")
    return found
