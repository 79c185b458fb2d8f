"""A person's own pages: mail that confirms and resets, lists, follows, tokens, a library, the digest."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import event, select

from broadsheet.feed import people, social
from broadsheet.feed.models import Account, Outgoing, Subscription

PASSWORD = "correct horse battery"
PAPER = "/papers/2407.00886"
NOWHERE = "smtp://127.0.0.1:9?starttls=never"  # the discard port: mail waits in the outbox


def letters(site, to):
    with site.db.read() as session:
        rows = session.scalars(select(Outgoing).where(Outgoing.address == to).order_by(Outgoing.id))
        return [row.content["text"] for row in rows]


def link(text):
    found = urlsplit(re.search(r"http://\S+", text)[0])
    return f"{found.path}?{found.query}"


def token_in(path):
    return parse_qs(urlsplit(path).query)["token"][0]


def test_pages_of_a_signed_in_reader_open(another):
    reader = another("opens-all")
    for path in ("/", "/new", "/trending", "/for-you", "/fields/geometry", "/author?name=Bin+Yu", "/search?q=circuits"):
        assert reader.get(path).status_code == 200, path
    for path in (PAPER, "/account", "/digest", "/submit", "/runs", "/claims", "/map", "/activity"):
        answer = reader.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["cache-control"] == "no-store"


def test_what_a_reader_follows_is_kept_and_let_go(another, feed):
    reader = another("follows")
    page = "/fields/geometry"
    assert reader.form(page, "/follows", kind="field", value="geometry", next=page).headers["location"] == page
    assert ">Following<" in reader.get(page).text
    reader.form("/search?q=circuits", "/follows", kind="search", value="circuits", on="1")
    reader.form("/author?name=Bin+Yu", "/follows", kind="author", value="Bin Yu")
    account = people.account_named(feed.db, "follows")
    assert {(f.kind, f.value) for f in social.follows_of(feed.db, account)} == {
        ("field", "geometry"),
        ("search", "circuits"),
        ("author", "Bin Yu"),
    }
    shown = reader.get("/account").text
    assert 'href="/search?q=circuits"' in shown
    assert 'href="/author?name=Bin+Yu"' in shown
    reader.form(page, "/follows", kind="field", value="geometry", on="0")
    assert ">Follow<" in reader.get(page).text
    assert reader.form(page, "/follows", kind="planet", value="Mars").status_code == 422


def test_lists_are_filled_shared_renamed_and_deleted(another, away):
    reader = another("lists")
    assert reader.form(PAPER, f"{PAPER}/lists", list="new").status_code == 303
    number = re.search(r'href="/lists/(\d+)"', reader.get("/account").text)[1]
    path = f"/lists/{number}"
    assert PAPER in reader.get(path).text
    assert away.get(path).status_code == 404
    reader.form(path, f"{path}/share", public="1")
    assert away.get(path).status_code == 200
    assert PAPER in away.get(f"{path}.rss").text
    assert "Take papers off" not in away.get(path).text
    reader.form(path, f"{path}/rename", name="Circuits <to read>")
    assert "Circuits &lt;to read&gt;" in reader.get(path).text
    reader.form(path, f"{path}/remove", paper="2407.00886")
    assert PAPER not in away.get(path).text
    reader.form(path, f"{path}/delete")
    assert away.get(path).status_code == 404


def test_a_library_starts_the_list_for_you(another):
    reader = another("bookish")
    assert "Nothing yet" in reader.get("/for-you").text
    bib = "@article{a, title={Circuits inside language models, found head by head}, author={A. Author}, year={2024}}"
    token = re.search(r'name="csrf" value="([^"]+)"', reader.get("/account").text)[1]
    answer = reader.post("/account/library", data={"csrf": token}, files={"file": ("mine.bib", bib.encode())})
    assert answer.headers["location"] == "/for-you"
    shown = reader.get("/for-you").text
    assert len(re.findall(r'<h2><a href="/papers/', shown)) > 5
    nothing = reader.post("/account/library", data={"csrf": token}, files={"file": ("x.bib", b"\xff\x00 no library")})
    assert nothing.status_code == 422


@pytest.fixture
def zotero():
    """Zotero's API on loopback, with two papers for whoever brings the key: (its address, the requests it had)."""
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["authorization"]))
            items = [{"type": "article", "title": "Circuits inside language models"}]
            items += [
                {"type": "article", "title": "Mechanistic Interpretation", "URL": "https://arxiv.org/abs/2407.00886"}
            ]
            right = self.headers["authorization"] == "Bearer sesame"
            body = json.dumps({"items": items}).encode()
            self.send_response(200 if right else 403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_zotero_starts_the_list_for_you_and_its_key_is_not_kept(serve, tmp_path, zotero):
    address, asked = zotero
    with serve(tmp_path / "home", zotero_url=address, allow_private_addresses=True) as (browser, _):
        browser.sign_up("collects")
        taken = browser.form("/account", "/account/zotero", user="12345", key="sesame")
        assert (taken.status_code, taken.headers["location"]) == (303, "/for-you")
        shown = browser.get("/for-you").text
        assert "has 1 paper of it" in shown
        assert len(re.findall(r'<h2><a href="/papers/', shown)) > 5
        assert asked[0][0].startswith("/users/12345/items/top")
        assert "sesame" not in asked[0][0]
        kept = browser.get("/account/export.json").text
        assert "Circuits inside language models" in kept
        assert "sesame" not in kept
        wrong = browser.form("/account", "/account/zotero", user="12345", key="wrong")
        assert wrong.status_code == 502
        assert browser.form("/account", "/account/zotero", user="../x", key="").status_code == 422
        assert len(asked) == 2


def test_a_saved_search_says_so_and_can_be_forgotten(another):
    reader, path = another("saves"), "/search?q=neural+collapse"
    assert ">Save this search<" in reader.get(path).text
    for on, said in (("1", "forget this search"), ("0", ">Save this search<")):
        reader.form(path, "/follows", kind="search", value="neural collapse", on=on, next=path)
        assert said in reader.get(path).text


def test_a_token_is_shown_once_and_can_be_revoked(another, feed):
    reader = another("tokens")
    shown = reader.form("/account", "/tokens", name="laptop", scopes=["read", "write"]).text
    secret = re.search(r"bs_[\w-]{20,}", shown)[0]
    assert secret not in reader.get("/account").text
    assert people.account_of_token(feed.db, secret)[1] == ("read", "write")
    number = re.search(r"/tokens/(\d+)/revoke", reader.get("/account").text)[1]
    reader.form("/account", f"/tokens/{number}/revoke")
    assert people.account_of_token(feed.db, secret) is None
    assert reader.form("/account", "/tokens", name="x", scopes=["everything"]).status_code == 422


def test_with_mail_signing_up_tells_nobody_who_has_an_account(serve, tmp_path):
    with serve(tmp_path / "home", mail_url=NOWHERE) as (browser, site):
        site.limits.buckets["sign-up"].burst = 100
        new = browser.form("/sign-up", "/sign-up", name="ada", email="ada@example.org", password=PASSWORD)
        known = browser.form("/sign-up", "/sign-up", name="other", email="ada@example.org", password=PASSWORD)
        assert new.status_code == known.status_code == 200
        assert new.text == known.text
        first, second = letters(site, "ada@example.org")
        assert "has an account" in second
        refused = browser.form("/sign-in", "/sign-in", name="ada", password=PASSWORD)
        assert refused.status_code == 403
        confirm = link(first)
        assert browser.get(confirm).status_code == 200  # a mail program that looks behind the link confirms nothing
        with site.db.read() as session:
            assert session.scalar(select(Account.email_confirmed).where(Account.name == "ada")) is None
        assert browser.form(confirm, "/confirm", token=token_in(confirm)).status_code == 303
        assert "ada@example.org, confirmed" in browser.get("/account").text
        forged = browser.form(confirm, "/confirm", token=token_in(confirm)[:-3] + "abc")
        assert forged.status_code == 403


def test_a_password_is_reset_once_by_mail(serve, tmp_path):
    with serve(tmp_path / "home", mail_url=NOWHERE) as (browser, site):
        people.sign_up(site.db, "grace", "grace@example.org", PASSWORD)
        known = browser.form("/reset", "/reset", email="grace@example.org")
        unknown = browser.form("/reset", "/reset", email="nobody@example.org")
        assert known.text == unknown.text
        assert letters(site, "nobody@example.org") == []
        path = link(letters(site, "grace@example.org")[0])
        short = browser.form(path, "/reset/set", token=token_in(path), password="short")
        assert short.status_code == 422
        assert browser.form(path, "/reset/set", token=token_in(path), password="another battery").status_code == 303
        assert browser.get("/account").status_code == 200
        again = browser.form(path, "/reset/set", token=token_in(path), password="a third battery")
        assert again.status_code == 403


@pytest.fixture
def inserts():
    """Counts what a request writes into the store: a write waits for the disk, and can be told by its time."""

    def count(site, ask):
        seen = []

        def note(_connection, _cursor, statement, *_):
            if statement.startswith("INSERT"):
                seen.append(statement.split()[2])

        event.listen(site.db.engine, "before_cursor_execute", note)
        try:
            ask()
        finally:
            event.remove(site.db.engine, "before_cursor_execute", note)
        return len(seen)

    return count


def test_whether_an_address_is_known_is_not_to_be_told_from_what_is_written(serve, tmp_path, inserts):
    with serve(tmp_path / "home", mail_url=NOWHERE) as (browser, site):
        site.limits.buckets["sign-up"].burst = 100
        people.sign_up(site.db, "grace", "grace@example.org", PASSWORD)
        known = inserts(site, lambda: browser.form("/reset", "/reset", email="grace@example.org"))
        unknown = inserts(site, lambda: browser.form("/reset", "/reset", email="nobody@example.org"))
        assert known == unknown > 0
        assert letters(site, "nobody@example.org") == []
        taken, new = (
            inserts(site, lambda a=a: browser.form("/sign-up", "/sign-up", name=a[0], email=a[1], password=PASSWORD))
            for a in (("another", "grace@example.org"), ("joan", "joan@example.org"))
        )
        assert taken == new > 1
        assert len(letters(site, "grace@example.org")) == 2  # the reset, and the word that she has an account
        browser.form("/digest", "/digest", address="reads@example.org", period="day")
        confirm = link(letters(site, "reads@example.org")[0])
        browser.post("/digest/confirm", data={"token": token_in(confirm)})
        assert inserts(site, lambda: browser.form("/digest", "/digest", address="reads@example.org", period="day")) > 0
        assert len(letters(site, "reads@example.org")) == 1


def test_the_digest_starts_by_mail_and_ends_with_one_click(serve, tmp_path):
    from broadsheet.feed import digest

    with serve(tmp_path / "home", mail_url=NOWHERE) as (browser, site):
        answer = browser.form("/digest", "/digest", address="reads@example.org", period="week")
        assert "Look into your mail" in answer.text
        confirm = link(letters(site, "reads@example.org")[0])
        assert browser.get(confirm).status_code == 200
        with site.db.read() as session:
            waiting = session.scalar(select(Subscription))
        assert waiting.confirmed is None
        assert "each week" in browser.post("/digest/confirm", data={"token": token_in(confirm)}).text
        with site.db.read() as session:
            started = session.scalar(select(Subscription))
        assert started.confirmed is not None
        leave = urlsplit(digest.leave_link(site.settings, started))
        one_click = {"List-Unsubscribe": "One-Click"}
        assert browser.get(f"{leave.path}?{leave.query}").status_code == 200
        with site.db.read() as session:
            assert session.scalar(select(Subscription.ended)) is None
        assert browser.post(f"{leave.path}?{leave.query}", data=one_click).status_code == 200
        with site.db.read() as session:
            assert session.scalar(select(Subscription.ended)) is not None
        assert browser.post("/digest/unsubscribe?token=forged", data=one_click).status_code == 403
        hook = browser.form("/digest", "/digest", address="https://hooks.example.org/x", kind="slack")
        assert hook.status_code == 403


def test_registration_can_be_closed(serve, tmp_path):
    with serve(tmp_path / "home", open_registration=False) as (browser, _):
        assert browser.get("/sign-up").status_code == 303
        assert "Sign up" not in browser.get("/sign-in").text
        token = re.search(r'name="csrf" value="([^"]+)"', browser.get("/sign-in").text)[1]
        data = {"csrf": token, "name": "x", "email": "x@example.org", "password": PASSWORD}
        assert browser.post("/sign-up", data=data).status_code == 403


@pytest.mark.parametrize("value", ["cs.AI", "https://example.org/paper", "not an id", "file:///etc/passwd"])
def test_only_an_arxiv_id_is_submitted(another, value):
    reader = another(f"submits-{abs(hash(value)) % 10**8}")
    assert reader.form("/submit", "/submit", arxiv=value).status_code == 422
