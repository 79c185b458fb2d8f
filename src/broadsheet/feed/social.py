"""What readers do with papers: vote, discuss, keep lists, follow, submit."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from sqlalchemy import delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from broadsheet.errors import InvalidInput, NotFound
from broadsheet.feed.database import Database
from broadsheet.feed.models import Account, Comment, Follow, ListItem, Paper, ReadingList, Report, Vote, now
from broadsheet.feed.permissions import Action, require

LONGEST_COMMENT = 20_000
MOST_LISTS, MOST_FOLLOWS = 200, 500
_TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a"),
    *("h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}


def _paper(session: Session, paper_id: str) -> Paper:
    paper = session.get(Paper, paper_id)
    if paper is None:
        raise NotFound(f"no paper {paper_id[:80]!r} in this feed")
    return paper


def _insert_once(db: Database, session: Session, model: Any, **values: Any) -> None:
    """Insert a row unless its key is there: two clicks at the same moment must not fail, nor count twice."""
    dialect = sqlite if db.sqlite else postgresql
    session.execute(dialect.insert(model).values(**values).on_conflict_do_nothing())


# --- votes --------------------------------------------------------------------------------------------------------


def vote(db: Database, account: Account, paper_id: str, on: bool = True) -> int:
    """Upvote a paper, or take the vote back; what comes back is the number of our readers' votes. Once is enough."""
    require(account, Action.vote)
    with db.write() as session:
        _paper(session, paper_id)
        if on:
            _insert_once(db, session, Vote, paper_id=paper_id, account_id=account.id, created=now())
        else:
            session.execute(delete(Vote).where(Vote.paper_id == paper_id, Vote.account_id == account.id))
        return session.scalar(select(func.count()).select_from(Vote).where(Vote.paper_id == paper_id)) or 0


def voted(session: Session, account: Account | None, paper_ids: Sequence[str]) -> set[str]:
    """Which of these papers the reader has voted for."""
    if account is None or not paper_ids:
        return set()
    return set(
        session.scalars(select(Vote.paper_id).where(Vote.account_id == account.id, Vote.paper_id.in_(paper_ids)))
    )


# --- discussion ---------------------------------------------------------------------------------------------------


@cache
def _markdown() -> MarkdownIt:
    # No raw HTML and no images (an image is a request to somebody else's server, with the reader's address).
    return (
        MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"]).disable("image")
    )


def render_markdown(text: str) -> str:
    """A comment's Markdown as HTML that is safe to show: few tags, links to http(s) and mail only, marked nofollow."""
    html = _markdown().render(text).replace("<h1>", "<h3>").replace("</h1>", "</h3>")
    html = html.replace("<h2>", "<h4>").replace("</h2>", "</h4>")
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes={"a": {"href", "title"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow noopener ugc",
    )


def _body(text: str) -> str:
    text = text.replace("\x00", "").strip()
    if not text:
        raise InvalidInput("the comment is empty")
    if len(text) > LONGEST_COMMENT:
        raise InvalidInput(f"the comment has {len(text)} characters: at most {LONGEST_COMMENT}")
    return text


def comment(db: Database, account: Account, paper_id: str, body: str, parent_id: int | None = None) -> Comment:
    """Say something about a paper, or answer a comment on it."""
    require(account, Action.comment)
    with db.write() as session:
        _paper(session, paper_id)
        if parent_id is not None and _comment(session, parent_id).paper_id != paper_id:
            raise NotFound(f"no comment {parent_id} on this paper")
        said = Comment(paper_id=paper_id, account_id=account.id, parent_id=parent_id, body=_body(body))
        session.add(said)
        session.flush()
        session.refresh(said)
    return said


def edit_comment(db: Database, account: Account, comment_id: int, body: str) -> Comment:
    """Say it otherwise; only its author may."""
    with db.write() as session:
        said = _comment(session, comment_id)
        require(account, Action.edit_comment, said)
        said.body, said.edited = _body(body), now()
    return said


def delete_comment(db: Database, account: Account, comment_id: int) -> Comment:
    """Take a comment away: its text goes, its place in the thread stays. Its author may, and the editors."""
    with db.write() as session:
        said = _comment(session, comment_id)
        require(account, Action.delete_comment, said)
        said.body, said.deleted = "", now()
    return said


def _comment(session: Session, comment_id: int) -> Comment:
    found = session.get(Comment, comment_id)
    if found is None:
        raise NotFound(f"no comment {comment_id}")
    return found


def comments(session: Session, paper_id: str) -> list[tuple[int, Comment]]:
    """The discussion of a paper, oldest thread first: (depth, comment), answers after what they answer."""
    below: dict[int | None, list[Comment]] = {}
    for said in session.scalars(select(Comment).where(Comment.paper_id == paper_id).order_by(Comment.id)):
        below.setdefault(said.parent_id, []).append(said)
    thread: list[tuple[int, Comment]] = []
    waiting = [(0, said) for said in reversed(below.get(None, []))]  # a stack: a thread may be deeper than recursion
    while waiting:
        depth, said = waiting.pop()
        thread.append((depth, said))
        waiting += [(depth + 1, answer) for answer in reversed(below.get(said.id, []))]
    return thread


def report_comment(db: Database, account: Account, comment_id: int, reason: str = "") -> Comment:
    """Tell the editors about a comment; a second report of the same reader changes nothing."""
    require(account, Action.report)
    with db.write() as session:
        said = _comment(session, comment_id)
        row = {"comment_id": comment_id, "account_id": account.id, "reason": reason.strip()[:1000], "created": now()}
        _insert_once(db, session, Report, **row)
    return said


def open_reports(db: Database, account: Account) -> list[tuple[Report, Comment]]:
    """Reports that wait for an editor, oldest first."""
    require(account, Action.settle_report)
    with db.read() as session:
        found = (
            select(Report, Comment)
            .join(Comment, Comment.id == Report.comment_id)
            .where(Report.settled.is_(None))
            .order_by(Report.created)
        )
        return [(report, said) for report, said in session.execute(found).unique()]


def settle_report(db: Database, account: Account, comment_id: int) -> None:
    """Close all open reports of a comment (delete the comment first where it should go)."""
    require(account, Action.settle_report)
    with db.write() as session:
        for report in session.scalars(select(Report).where(Report.comment_id == comment_id, Report.settled.is_(None))):
            report.settled = now()


# --- lists --------------------------------------------------------------------------------------------------------


def _name(name: str) -> str:
    name = " ".join(name.replace("\x00", "").split())
    if not 1 <= len(name) <= 120:
        raise InvalidInput(f"a list's name has 1 to 120 characters; this one has {len(name)}")
    return name


def _list(session: Session, account: Account | None, list_id: int, action: Action) -> ReadingList:
    found = session.get(ReadingList, list_id)
    # A private list of another's is answered as one that does not exist: that it exists is private too.
    if found is None or not (found.public or (account is not None and found.account_id == account.id)):
        raise NotFound(f"no list {list_id}")
    require(account, action, found)
    return found


def _refuse_same_name(session: Session, account_id: int, name: str) -> None:
    same = select(ReadingList.id).where(ReadingList.account_id == account_id, ReadingList.name == name)
    if session.scalar(same) is not None:
        raise InvalidInput(f"you have a list named {name!r}")


def create_list(db: Database, account: Account, name: str, public: bool = False) -> ReadingList:
    """A new list."""
    require(account, Action.create_list)
    name = _name(name)
    with db.write() as session:
        mine = select(func.count()).select_from(ReadingList).where(ReadingList.account_id == account.id)
        if (session.scalar(mine) or 0) >= MOST_LISTS:
            raise InvalidInput(f"{MOST_LISTS} lists are the most: delete one first")
        _refuse_same_name(session, account.id, name)
        made = ReadingList(account_id=account.id, name=name, public=public)
        session.add(made)
    return made


def rename_list(db: Database, account: Account, list_id: int, name: str) -> ReadingList:
    """Give a list another name."""
    name = _name(name)
    with db.write() as session:
        found = _list(session, account, list_id, Action.write_list)
        if found.name != name:
            _refuse_same_name(session, account.id, name)
            found.name = name
    return found


def share_list(db: Database, account: Account, list_id: int, public: bool) -> ReadingList:
    """Let everybody read a list, or nobody else."""
    with db.write() as session:
        found = _list(session, account, list_id, Action.write_list)
        found.public = public
    return found


def delete_list(db: Database, account: Account, list_id: int) -> None:
    """Delete a list; its papers stay in the feed."""
    with db.write() as session:
        session.delete(_list(session, account, list_id, Action.write_list))


def add_to_list(db: Database, account: Account, list_id: int, paper_id: str) -> None:
    """Put a paper on a list (once)."""
    with db.write() as session:
        _list(session, account, list_id, Action.write_list)
        _paper(session, paper_id)
        _insert_once(db, session, ListItem, list_id=list_id, paper_id=paper_id, added=now())


def remove_from_list(db: Database, account: Account, list_id: int, paper_id: str) -> None:
    """Take a paper off a list."""
    with db.write() as session:
        _list(session, account, list_id, Action.write_list)
        session.execute(delete(ListItem).where(ListItem.list_id == list_id, ListItem.paper_id == paper_id))


def lists_of(db: Database, account: Account) -> list[ReadingList]:
    """The reader's own lists by name."""
    with db.read() as session:
        found = select(ReadingList).where(ReadingList.account_id == account.id).order_by(ReadingList.name)
        return list(session.scalars(found))


def list_items(db: Database, account: Account | None, list_id: int) -> tuple[ReadingList, list[str]]:
    """A list that this reader may see, and its papers' ids, newest first."""
    with db.read() as session:
        found = _list(session, account, list_id, Action.read_list)
        items = select(ListItem.paper_id).where(ListItem.list_id == list_id)
        return found, list(session.scalars(items.order_by(ListItem.added.desc(), ListItem.paper_id)))


# --- following, submitting ----------------------------------------------------------------------------------------


def follow(db: Database, account: Account, kind: str, value: str) -> None:
    """Follow an author's name, a field or a search; twice is once."""
    require(account, Action.follow)
    if kind not in ("author", "field", "search"):
        raise InvalidInput(f"follow {kind!r}: expected author, field or search")
    value = " ".join(value.replace("\x00", "").split())
    if not 1 <= len(value) <= 300:
        raise InvalidInput(f"what to follow has 1 to 300 characters; this has {len(value)}")
    with db.write() as session:
        mine = select(func.count()).select_from(Follow).where(Follow.account_id == account.id)
        if (session.scalar(mine) or 0) >= MOST_FOLLOWS:
            raise InvalidInput(f"{MOST_FOLLOWS} follows are the most: end one first")
        _insert_once(db, session, Follow, account_id=account.id, kind=kind, value=value, created=now())


def unfollow(db: Database, account: Account, kind: str, value: str) -> None:
    """Follow no longer."""
    with db.write() as session:
        session.execute(
            delete(Follow).where(Follow.account_id == account.id, Follow.kind == kind, Follow.value == value)
        )


def follows_of(db: Database, account: Account) -> list[Follow]:
    """What the reader follows."""
    with db.read() as session:
        return list(
            session.scalars(select(Follow).where(Follow.account_id == account.id).order_by(Follow.kind, Follow.value))
        )


def note_submitter(db: Database, account: Account, paper_id: str) -> Paper:
    """Write down who brought a paper in; the first who did stays."""
    require(account, Action.submit)
    with db.write() as session:
        paper = _paper(session, paper_id)
        paper.submitted_by = paper.submitted_by or account.id
    return paper
