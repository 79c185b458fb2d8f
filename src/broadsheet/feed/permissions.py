"""Who may do what: the one place that decides. Pages, API and command line all ask here."""

from enum import StrEnum
from typing import Any

from broadsheet.errors import NotAllowed
from broadsheet.feed.models import Account, Comment, ReadingList, Token


class Action(StrEnum):
    """What a person can ask for."""

    vote = "vote"
    comment = "comment"
    edit_comment = "edit a comment"
    delete_comment = "delete a comment"
    report = "report a comment"
    settle_report = "settle a report"
    submit = "submit a paper"
    create_list = "make a list"
    read_list = "read a list"
    write_list = "change a list"
    follow = "follow"
    manage_token = "manage an API token"
    start_run = "start a run"
    set_role = "give a role"


RANK = {"reader": 0, "editor": 1, "operator": 2}

# The least role for actions that do not depend on whose thing it is.
LEAST = {
    Action.vote: "reader",
    Action.comment: "reader",
    Action.report: "reader",
    Action.submit: "reader",
    Action.create_list: "reader",
    Action.follow: "reader",
    Action.settle_report: "editor",
    Action.start_run: "operator",
    Action.set_role: "operator",
}


def has_role(account: Account | None, role: str) -> bool:
    """Whether the account holds that role or a higher one."""
    return account is not None and RANK[account.role] >= RANK[role]


def may(account: Account | None, action: Action, thing: Any = None) -> bool:
    """Whether ``account`` (None: not signed in) may do ``action`` to ``thing``.

    Args:
        thing: the comment, list or token in question, where the action is about one.
    """
    if action in LEAST:
        return has_role(account, LEAST[action])
    mine = account is not None and thing is not None and thing.account_id == account.id
    match action, thing:
        case Action.edit_comment, Comment():  # nobody puts words into another's mouth
            return mine and thing.deleted is None
        case Action.delete_comment, Comment():
            return (mine or has_role(account, "editor")) and thing.deleted is None
        case Action.read_list, ReadingList():
            return mine or thing.public
        case Action.write_list, ReadingList():
            return mine
        case Action.manage_token, Token():
            return mine
    raise TypeError(f"{action!r} asked about {type(thing).__name__}")  # a mistake of ours, never the reader's


def require(account: Account | None, action: Action, thing: Any = None) -> None:
    """Raise NotAllowed unless :func:`may`."""
    if may(account, action, thing):
        return
    if account is None:
        raise NotAllowed(f"you must be signed in to {action}")
    if (least := LEAST.get(action)) is not None:
        raise NotAllowed(f"only {'an' if least[0] in 'aeiou' else 'a'} {least} may {action}")
    raise NotAllowed(f"you may not {action} that is not yours")
