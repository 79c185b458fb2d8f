"""Pages of a person: signing up and in, passwords, the account, lists, follows, tokens, the digest, other services."""

import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from broadsheet.errors import InvalidInput, NotAllowed
from broadsheet.feed import digest, library, outbox, people, social
from broadsheet.feed.importing import import_source
from broadsheet.feed.mail import Letter
from broadsheet.feed.models import Account
from broadsheet.feed.permissions import Action, require
from broadsheet.feed.records import parse_arxiv_id
from broadsheet.web import lists, oauth
from broadsheet.web.pages import list_page
from broadsheet.web.rendering import paper_path, path_with, plural
from broadsheet.web.security import UPLOAD_BYTES, Reader, guard, reader, safe_next
from broadsheet.web.site import Number, Site, page, site
from broadsheet.web.views import Listing

router = APIRouter(include_in_schema=False, dependencies=[Depends(guard)], default_response_class=HTMLResponse)
mailed = APIRouter(include_in_schema=False)  # links out of mails: their signed token stands in for the form's
Who = Annotated[Reader, Depends(reader)]
Word = Annotated[str, Form(max_length=1000)]


@dataclass(frozen=True)
class Input:
    """A line of a form."""

    name: str
    label: str
    type: str = "text"
    autocomplete: str = "off"
    hint: str = ""
    value: str = ""


NAME = Input("name", "Name or mail address", autocomplete="username")
PASSWORD = Input("password", "Password", "password", "current-password")
NEW_PASSWORD = Input("password", "Password", "password", "new-password", "At least 10 characters.")
EMAIL = Input("email", "Mail address", "email", "email")


def _form(
    request: Request,
    title: str,
    action: str,
    button: str,
    *inputs: Input,
    status: int = 200,
    error: str = "",
    explanation: str = "",
    hidden: dict[str, str] | None = None,
    others: tuple[tuple[str, str], ...] = (),
) -> HTMLResponse:
    return page(
        request,
        "forms.html",
        status,
        title=title,
        action=action,
        button=button,
        inputs=inputs,
        error=error[:1].upper() + error[1:],
        explanation=explanation,
        hidden=hidden or {},
        others=others,
    )


# --- in and out -------------------------------------------------------------------------------------------------------


def _sign_in_form(request: Request, target: str, error: str = "", status: int = 200) -> HTMLResponse:
    here = site(request)
    others = [
        (f"Sign in with {p.title}", path_with(f"/auth/{p.name}", next=target)) for p in oauth.offered(here.settings)
    ]
    if here.settings.open_registration:
        others.append(("No account yet? Sign up", path_with("/sign-up", next=target)))
    if here.settings.mail_url:
        others.append(("Forgotten your password?", "/reset"))
    hidden = {"next": target}
    return _form(
        request,
        "Sign in",
        "/sign-in",
        "Sign in",
        NAME,
        PASSWORD,
        hidden=hidden,
        others=tuple(others),
        error=error,
        status=status,
    )


@router.get("/sign-in")
def sign_in_page(request: Request, who: Who, next: str = "/") -> Response:
    return RedirectResponse(safe_next(next), 303) if who.account else _sign_in_form(request, safe_next(next))


@router.post("/sign-in")
def sign_in(request: Request, name: Word, password: Word, next: Word = "/") -> Response:
    here = site(request)
    here.limits.check("sign-in", request, f"name:{name.strip().lower()[:254]}")
    try:
        account = people.sign_in(here.db, name, password)
        if here.settings.mail_url and account.email_confirmed is None:
            raise NotAllowed("name or password is wrong, or the mail address is not confirmed yet")
    except NotAllowed as error:
        text = (
            "name or password is wrong, or the mail address is not confirmed yet"
            if here.settings.mail_url
            else str(error)
        )
        return _sign_in_form(request, safe_next(next), text, 403)
    request.state.session.sign_in(account)
    return RedirectResponse(safe_next(next), 303)


@router.post("/sign-out")
def sign_out(request: Request, who: Who, everywhere: Annotated[bool, Form()] = False) -> Response:
    if everywhere and who.account:
        people.end_sessions(site(request).db, who.account.id)
    request.state.session.sign_out()
    return RedirectResponse("/", 303)


def _sign_up_form(request: Request, target: str, error: str = "", name: str = "", email: str = "") -> HTMLResponse:
    inputs = (
        Input(
            "name",
            "Name",
            autocomplete="username",
            hint="Shown beside what you say. Letters, digits, hyphens.",
            value=name,
        ),
        Input("email", "Mail address", "email", "email", "Shown to nobody.", email),
        NEW_PASSWORD,
    )
    others = (("You have an account? Sign in", path_with("/sign-in", next=target)),)
    status = 422 if error else 200
    return _form(
        request,
        "Sign up",
        "/sign-up",
        "Sign up",
        *inputs,
        hidden={"next": target},
        others=others,
        error=error,
        status=status,
    )


@router.get("/sign-up")
def sign_up_page(request: Request, next: str = "/") -> HTMLResponse:
    _registration(site(request))
    return _sign_up_form(request, safe_next(next))


def _registration(here: Site) -> None:
    if not here.settings.open_registration:
        raise NotAllowed("this feed's operator makes its accounts")


@router.post("/sign-up")
def sign_up(request: Request, name: Word, email: Word, password: Word, next: Word = "/") -> Response:
    here = site(request)
    _registration(here)
    here.limits.check("sign-up", request)
    try:
        account = people.sign_up(here.db, name, email, password)
    except people.AddressTaken as error:
        if not here.settings.mail_url:
            return _sign_up_form(request, safe_next(next), str(error), name, email)
        account = None
    except InvalidInput as error:
        return _sign_up_form(request, safe_next(next), str(error), name, email)
    if not here.settings.mail_url:
        request.state.session.sign_in(account)
        request.state.session.say("Welcome to Broadsheet.")
        return RedirectResponse(safe_next(next), 303)
    # With mail, whoever asks sees the same for a new address and a known one, and waits as long; the address's owner is
    # told which it is.
    if account is not None:
        token = people.confirm_email_token(account, here.secret)
        _send(
            here,
            account.email,
            "Your account at Broadsheet",
            "Confirm your mail address with this link:",
            "/confirm",
            token,
        )
    else:
        _send(here, people.clean_email(email), "", "", "", really=False)  # in the place of writing an account
        _send(
            here,
            people.clean_email(email),
            "Your account at Broadsheet",
            "Somebody, perhaps you, wanted to sign up with this address. It has an account: sign in here.",
            "/sign-in",
        )
    text = "We have sent you a mail. The link in it finishes your sign-up."
    return page(request, "message.html", title="Look into your mail", text=text, link=None)


def _send(here: Site, to: str, subject: str, text: str, path: str, token: str = "", *, really: bool = True) -> None:
    """Put a letter in the outbox. ``really=False`` takes as long and leaves nothing: what cannot be seen on the page is
    not to be told from the time that it took either."""
    link = here.base_url + path_with(path, token=token)
    letter = Letter(to, subject, f"{text}\n\n{link}\n\nIf you did not ask for this, nothing happens without you.\n")
    key = f"account:{secrets.token_hex(16)}"
    with here.db.write() as session:
        outbox.put(session, key, letter)
        if not really:
            outbox.take_back(session, key)
    here.housekeeper.wake.set()


def _link_page(request: Request, title: str, action: str, token: str, button: str) -> HTMLResponse:
    # A button, since mail programs fetch the links in a mail before anybody reads it.
    return _form(request, title, action, button, hidden={"token": token})


@router.get("/confirm")
def confirm_page(request: Request, token: str = "") -> HTMLResponse:
    return _link_page(request, "Confirm your mail address", "/confirm", token, "Confirm")


@router.post("/confirm")
def confirm(request: Request, token: Word) -> Response:
    account = people.confirm_email(site(request).db, site(request).secret, token)
    request.state.session.sign_in(account)
    request.state.session.say("Thank you: your mail address is confirmed.")
    return RedirectResponse("/", 303)


@router.get("/reset")
def reset_page(request: Request, token: str = "") -> HTMLResponse:
    if token:
        return _form(request, "A new password", "/reset/set", "Set it", NEW_PASSWORD, hidden={"token": token})
    if not site(request).settings.mail_url:
        raise NotAllowed("this feed sends no mail: ask its operator for a new password")
    return _form(request, "Forgotten password", "/reset", "Send a link", EMAIL)


@router.post("/reset")
def reset(request: Request, email: Word) -> HTMLResponse:
    here = site(request)
    here.limits.check("mail", request, f"mail:{email.strip().lower()[:254]}")
    token = people.reset_token(here.db, here.secret, email)
    if here.settings.mail_url:
        _send(
            here,
            email.strip(),
            "A new password for Broadsheet",
            "Set it with this link:",
            "/reset",
            token or "",
            really=token is not None,
        )
    text = "If an account has this address, a link is on its way. It works once, for an hour."
    return page(request, "message.html", title="Look into your mail", text=text, link=None)


@router.post("/reset/set")
def reset_set(request: Request, token: Word, password: Word) -> Response:
    here = site(request)
    here.limits.check("sign-in", request)
    try:
        account = people.reset_password(here.db, here.secret, token, password)
    except InvalidInput as error:
        hidden = {"token": token}
        return _form(
            request, "A new password", "/reset/set", "Set it", NEW_PASSWORD, hidden=hidden, error=str(error), status=422
        )
    request.state.session.sign_in(account)
    return RedirectResponse("/", 303)


# --- other services ---------------------------------------------------------------------------------------------------


@router.get("/auth/{provider}")
def auth(request: Request, provider: str, next: str = "/") -> Response:
    return oauth.begin(site(request), provider, safe_next(next))


@router.get("/auth/{provider}/callback")
def auth_callback(request: Request, provider: str, code: str = "", state: str = "") -> Response:
    here = site(request)
    here.limits.check("sign-in", request)
    try:
        identity, target = oauth.finish(here, provider, code, state, request.cookies.get(oauth.COOKIE, ""))
        account = people.sign_in_with(here.db, **identity)
    except (NotAllowed, InvalidInput) as error:
        return _sign_in_form(request, "/", str(error), 403)
    request.state.session.sign_in(account)
    response = RedirectResponse(safe_next(target), 303)
    response.delete_cookie(oauth.COOKIE, path="/auth")
    return response


# --- the account ------------------------------------------------------------------------------------------------------


def _account_page(request: Request, account: Account, secret: str = "") -> HTMLResponse:
    db = site(request).db
    return page(
        request,
        "account.html",
        lists=social.lists_of(db, account),
        follows=social.follows_of(db, account),
        tokens=people.tokens_of(db, account.id),
        subscriptions=digest.subscriptions_of(db, account),
        secret=secret,
    )


@router.get("/account")
def account_page(request: Request, who: Who) -> HTMLResponse:
    return _account_page(request, who.need())


@router.post("/account/password")
def change_password(request: Request, who: Who, new: Word, old: Word = "") -> Response:
    here, account = site(request), who.need()
    here.limits.check("sign-in", request, f"name:{account.name}")
    request.state.session.sign_in(people.change_password(here.db, account.id, old, new))
    request.state.session.say("The password is changed; all other sessions have ended.")
    return RedirectResponse("/account", 303)


@router.get("/account/export.json")
def export(request: Request, who: Who) -> JSONResponse:
    content = people.export_account(site(request).db, who.need())
    return JSONResponse(
        content,
        headers={"content-disposition": 'attachment; filename="broadsheet-account.json"', "cache-control": "no-store"},
    )


@router.post("/account/delete")
def delete_account(request: Request, who: Who, confirm: Word) -> Response:
    account = who.need()
    if confirm.strip().lower() != account.name:
        raise InvalidInput(f"type {account.name} to delete the account")
    people.delete_account(site(request).db, account)
    request.state.session.sign_out()
    request.state.session.say("The account is deleted.")
    return RedirectResponse("/", 303)


@router.post("/account/library")
def bring_library(request: Request, who: Who, file: UploadFile) -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    text = file.file.read(UPLOAD_BYTES).decode("utf-8", "replace")
    return _library_taken(request, library.take_library(here.db, here.index, account, text))


@router.post("/account/zotero")
def bring_zotero(request: Request, who: Who, user: Word, key: Word = "") -> Response:
    here, account = site(request), who.need()
    here.limits.check("mail", request, f"zotero:{account.id}")  # each one is several requests to Zotero in our name
    records = library.read_zotero(here.settings, user, key.strip())
    if not records:
        raise InvalidInput("no paper was found in this Zotero library")
    return _library_taken(request, library.keep_library(here.db, here.index, account, records))


def _library_taken(request: Request, known: int) -> Response:
    request.state.session.say(
        f"Your library is read; this feed has {plural(known, 'paper')} of it. “For you” starts there."
    )
    return RedirectResponse("/for-you", 303)


@router.post("/tokens")
def make_token(request: Request, who: Who, name: Word, scopes: Annotated[list[str], Form()] = []) -> HTMLResponse:  # noqa: B006
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    _, secret = people.create_token(here.db, account.id, name, tuple(scopes))
    return _account_page(request, account, secret)


@router.post("/tokens/{number}/revoke")
def revoke_token(request: Request, who: Who, number: Number) -> Response:
    people.revoke_token(site(request).db, who.need(), number)
    return RedirectResponse("/account#tokens", 303)


# --- lists and follows ------------------------------------------------------------------------------------------------


@router.post("/lists")
def make_list(request: Request, who: Who, name: Word) -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    return RedirectResponse(f"/lists/{social.create_list(here.db, account, name).id}", 303)


@router.get("/lists/{number}")
def one_list(
    request: Request, who: Who, number: Number, shown: Annotated[Listing, Depends(lists.reading_list)]
) -> HTMLResponse:
    here = site(request)
    found, _ = social.list_items(here.db, who.account, number)
    mine = who.account is not None and found.account_id == who.account.id
    with here.db.read() as session:
        voted = social.voted(session, who.account, [each.id for each in shown.papers])
    return page(request, "reading_list.html", list=shown, voted=voted, followed=False, mine=mine, shared=found.public)


@router.post("/lists/{number}/rename")
def rename_list(request: Request, who: Who, number: Number, name: Word) -> Response:
    social.rename_list(site(request).db, who.need(), number, name)
    return RedirectResponse(f"/lists/{number}", 303)


@router.post("/lists/{number}/share")
def share_list(request: Request, who: Who, number: Number, public: Annotated[bool, Form()]) -> Response:
    social.share_list(site(request).db, who.need(), number, public)
    return RedirectResponse(f"/lists/{number}", 303)


@router.post("/lists/{number}/delete")
def delete_list(request: Request, who: Who, number: Number) -> Response:
    social.delete_list(site(request).db, who.need(), number)
    return RedirectResponse("/account", 303)


@router.post("/lists/{number}/remove")
def remove_from_list(request: Request, who: Who, number: Number, paper: Word) -> Response:
    social.remove_from_list(site(request).db, who.need(), number, paper)
    return RedirectResponse(f"/lists/{number}", 303)


@router.post("/follows")
def follow(
    request: Request, who: Who, kind: Word, value: Word, on: Annotated[bool, Form()] = True, next: Word = "/account"
) -> Response:
    here, account = site(request), who.need()
    here.limits.check("write", request, account.id)
    (social.follow if on else social.unfollow)(here.db, account, kind, value)
    return RedirectResponse(safe_next(next), 303)


router.get("/for-you")(list_page(lists.for_you))


# --- submitting -------------------------------------------------------------------------------------------------------


@router.get("/submit")
def submit_page(request: Request, who: Who) -> HTMLResponse:
    require(who.need(), Action.submit)
    hint = "Such as 2407.00886, or the address of its page."
    explanation = "The feed asks arXiv for its title, authors and abstract."
    field = Input("arxiv", "arXiv id", hint=hint)
    return _form(request, "Submit a paper", "/submit", "Submit", field, explanation=explanation)


@router.post("/submit")
def submit(request: Request, who: Who, arxiv: Word) -> Response:
    here, account = site(request), who.need()
    require(account, Action.submit)
    here.limits.check("sign-up", request, f"submit:{account.id}")  # each one is a request to arXiv in our name
    ident, _ = parse_arxiv_id(arxiv)
    import_source(here.db, here.settings, "arxiv", ids=[ident])
    social.note_submitter(here.db, account, ident)
    here.index.update()
    return RedirectResponse(paper_path(ident), 303)


# --- the digest -------------------------------------------------------------------------------------------------------


@router.get("/digest")
def digest_page(request: Request, who: Who) -> HTMLResponse:
    here = site(request)
    mine = digest.subscriptions_of(here.db, who.account) if who.account else []
    return page(request, "digest.html", subscriptions=mine, with_mail=bool(here.settings.mail_url), error="")


@router.post("/digest")
def subscribe(request: Request, who: Who, address: Word, period: Word = "day", kind: Word = "mail") -> HTMLResponse:
    here = site(request)
    here.limits.check("mail", request, f"mail:{address.strip().lower()[:254]}")
    made = digest.subscribe(here.db, here.settings, address, kind=kind, period=period, account=who.account)
    here.housekeeper.wake.set()
    if kind == "mail" and not (who.account and made.account_id == who.account.id and made.confirmed):
        text = "We have sent you a mail. The digest starts when you press the button behind the link in it."
        return page(request, "message.html", title="Look into your mail", text=text, link=None)
    text = f"The next issue of each {period} comes to {made.address}."
    return page(request, "message.html", title="Subscribed", text=text, link=("Your subscriptions", "/digest"))


@router.post("/digest/{number}/end")
def end_subscription(request: Request, who: Who, number: Number) -> Response:
    digest.end(site(request).db, who.need(), number)
    return RedirectResponse("/digest", 303)


@mailed.get("/digest/confirm")
def confirm_digest_page(request: Request, token: str = "") -> HTMLResponse:
    return _link_page(request, "Start the digest", "/digest/confirm", token, "Start it")


@mailed.post("/digest/confirm")
def confirm_digest(request: Request, token: Word) -> HTMLResponse:
    started = digest.confirm(site(request).db, site(request).settings, token)
    text = f"The digest of each {started.period} comes to {started.address} from now on."
    return page(request, "message.html", title="Thank you", text=text, link=("The front page", "/"))


@mailed.get("/digest/unsubscribe")
def unsubscribe_page(request: Request, token: str = "") -> HTMLResponse:
    return _link_page(request, "End the digest", path_with("/digest/unsubscribe", token=token), token, "Unsubscribe")


@mailed.post("/digest/unsubscribe")
def unsubscribe(request: Request, token: str) -> HTMLResponse:
    """One click (RFC 8058): the mail program posts here by itself, with the token in the address."""
    digest.unsubscribe(site(request).db, site(request).settings, token)
    return page(request, "message.html", title="Done", text="You get no more digests.", link=("The front page", "/"))
