"""Signing in with another service: against one on loopback that checks what a service checks (RFC 6749, RFC 7636)."""

import base64
import hashlib
import json
import secrets
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest

from broadsheet.feed import people
from broadsheet.web import oauth

PASSWORD = "correct horse battery"
CLIENT, SECRET = "the-feed", "hush"


class Service(ThreadingHTTPServer):
    """A service with one person, who allows whatever she is asked for unless ``refuses``."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server_port}"
        self.person = {"id": 77, "name": "Lin", "email": "lin@example.org", "verified": True}
        self.codes, self.tokens, self.refuses, self.broken = {}, set(), False, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def authorize(self, asked):
        assert asked["client_id"] == CLIENT
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        if self.refuses:
            return {"error": "access_denied", "state": asked["state"]}
        code = secrets.token_urlsafe(8)
        self.codes[code] = (asked["code_challenge"], asked["redirect_uri"])
        return {"code": code, "state": asked["state"]}

    def exchange(self, asked, authorization):
        """A code for a token: once, for the same address, by whoever holds the verifier and the client's secret."""
        challenge, address = self.codes.pop(asked.get("code"), (None, None))
        digest = hashlib.sha256(asked.get("code_verifier", "").encode()).digest()
        basic = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        rightful = authorization == basic and asked.get("redirect_uri") == address
        if not rightful or base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != challenge:
            return 400, {"error": "invalid_grant"}
        self.tokens.add(token := secrets.token_urlsafe(8))
        return 200, {"access_token": token, "token_type": "bearer"}

    def about(self, path):
        who = self.person
        verified = {"email": who["email"], "email_verified": who["verified"]}
        other = {"email": "old@example.org", "primary": False, "verified": True}
        return {
            "/userinfo": {"sub": str(who["id"]), "preferred_username": who["name"], **verified},
            "/user": {"id": who["id"], "login": who["name"]},
            "/user/emails": [other, {"email": who["email"], "primary": True, "verified": who["verified"]}],
        }[path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        at = urlsplit(self.path)
        if at.path == "/authorize":
            asked = {name: value[0] for name, value in parse_qs(at.query).items()}
            self.send_response(302)
            self.send_header("location", f"{asked['redirect_uri']}?{urlencode(self.server.authorize(asked))}")
            self.send_header("content-length", "0")
            self.end_headers()
        elif self.headers.get("authorization", "").removeprefix("Bearer ") in self.server.tokens:
            self.answer(200, self.server.about(at.path))
        else:
            self.answer(401, {"error": "invalid_token"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        asked = {name: value[0] for name, value in parse_qs(body).items()}
        self.answer(*self.server.exchange(asked, self.headers.get("authorization")))

    def answer(self, status, content):
        status, body = self.server.broken.get(urlsplit(self.path).path, (status, json.dumps(content)))
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    """The service, in the place of GitHub and of Hugging Face: only their addresses are exchanged."""
    server = Service()
    addresses = {"authorize": f"{server.base}/authorize", "token": f"{server.base}/token", "api": server.base}
    for name, provider in oauth.PROVIDERS.items():
        monkeypatch.setitem(oauth.PROVIDERS, name, replace(provider, **addresses))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offers(serve, tmp_path, service):
    """A feed that offers both, and its site."""
    keys = {f"{name}_client_id": CLIENT for name in oauth.PROVIDERS}
    keys |= {f"{name}_client_secret": SECRET for name in oauth.PROVIDERS}
    with serve(tmp_path / "home", **keys) as opened:
        yield opened


def answer_of(browser, name="github", next="/"):
    """What the service sends the browser back with."""
    asked = browser.get(f"/auth/{name}", params={"next": next})
    assert asked.status_code == 303
    return httpx.get(asked.headers["location"]).headers["location"]


@pytest.mark.parametrize("name", oauth.PROVIDERS)
def test_signing_in_elsewhere_makes_an_account_and_finds_it_again(offers, service, name):
    browser, site = offers
    assert f"Sign in with {oauth.PROVIDERS[name].title}" in browser.get("/sign-in").text
    answer = browser.get(answer_of(browser, name, next="/claims"))
    assert (answer.status_code, answer.headers["location"]) == (303, "/claims")
    made = people.account_named(site.db, "lin")
    assert made.email == "lin@example.org"
    assert made.email_confirmed is not None
    assert browser.get("/account").status_code == 200
    browser.cookies.clear()
    service.person |= {"name": "Renamed", "email": "new@example.org"}  # it is the number there that counts
    assert browser.get(answer_of(browser, name)).status_code == 303
    assert "lin@example.org" in browser.get("/account").text


def test_an_answer_to_another_question_signs_nobody_in(offers, service):
    browser, _ = offers
    stolen = answer_of(browser)  # of this browser, but a later question takes its place
    answer_of(browser)
    code = parse_qs(urlsplit(stolen).query)["code"][0]
    cookie = browser.cookies[oauth.COOKIE]
    for wrong in (stolen, f"/auth/github/callback?code={code}&state=", "/auth/github/callback"):
        refused = browser.get(wrong)
        assert refused.status_code == 403
        assert "belongs to another request" in refused.text
    other = answer_of(browser, "huggingface").replace("/auth/huggingface/", "/auth/github/")
    assert browser.get(other).status_code == 403
    browser.cookies.clear()
    for forged in (None, "x", cookie[:-4] + "AAAA"):  # somebody else's browser, led to the address of an answer
        headers = {"cookie": f"{oauth.COOKIE}={forged}"} if forged else {}
        assert "took too long" in browser.get(stolen, headers=headers).text
    assert service.tokens == set()
    assert browser.get("/account").status_code == 303


def test_an_answer_works_once(offers):
    browser, _ = offers
    answer = answer_of(browser)
    cookie = f"{oauth.COOKIE}={browser.cookies[oauth.COOKIE]}"
    assert browser.get(answer).status_code == 303
    browser.cookies.clear()
    assert browser.get(answer, headers={"cookie": cookie}).status_code == 502


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("confirmed", [True, False])
def test_an_account_is_joined_only_where_both_have_proven_the_address(offers, service, verified, confirmed):
    browser, site = offers
    own = people.sign_up(site.db, "lin-here", "lin@example.org", PASSWORD)
    if confirmed:
        people.confirm_email(site.db, "k", people.confirm_email_token(own, "k"))
    service.person["verified"] = verified
    answer = browser.get(answer_of(browser))
    if verified and confirmed:
        assert "lin-here" in browser.get("/account").text
    else:
        assert answer.status_code == 403
        assert "sign in to it with its password" in answer.text
        assert browser.get("/account").status_code == 303


def test_an_unverified_address_is_not_taken_for_confirmed(offers, service):
    browser, site = offers
    service.person["verified"] = False
    browser.get(answer_of(browser))
    assert people.account_named(site.db, "lin").email_confirmed is None


@pytest.mark.parametrize("email", ["", "no address"])
def test_without_a_mail_address_there_is_no_account(offers, service, email):
    browser, _ = offers
    service.person["email"] = email
    assert browser.get(answer_of(browser)).status_code == 403
    assert browser.get("/account").status_code == 303


def test_who_refuses_there_is_told_so_here(offers, service):
    browser, _ = offers
    service.refuses = True
    answer = browser.get(answer_of(browser))
    assert answer.status_code == 403
    assert "GitHub did not sign you in" in answer.text


@pytest.mark.parametrize("name", oauth.PROVIDERS)
@pytest.mark.parametrize("broken", [(500, "{}"), (200, "<html>"), (200, "{}"), (200, "[]"), (200, "null")])
@pytest.mark.parametrize("path", ["/token", "/user", "/userinfo"])
def test_a_service_that_answers_nonsense_is_one_sentence(offers, service, name, broken, path):
    browser, _ = offers
    service.broken[path] = broken
    answer = browser.get(answer_of(browser, name))
    asked = {"github": "/user", "huggingface": "/userinfo"}[name]
    assert answer.status_code == (502 if path in ("/token", asked) else 303)
    if answer.status_code == 502:
        assert "did not confirm who you are" in answer.text


def test_the_question_is_kept_where_scripts_and_other_sites_do_not_reach(offers):
    browser, _ = offers
    asked = browser.get("/auth/github?next=//evil.example")
    flags = asked.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=lax" in flags
    back = httpx.get(asked.headers["location"]).headers["location"]
    assert browser.get(back).headers["location"] == "/"


def test_what_is_not_set_up_is_not_offered(serve, tmp_path, service):
    with serve(tmp_path / "home", github_client_id=CLIENT, github_client_secret=SECRET) as (browser, _):
        assert "Hugging Face" not in browser.get("/sign-in").text
        assert browser.get("/auth/huggingface").status_code == 404
        assert browser.get("/auth/huggingface/callback?code=x&state=y").status_code in (403, 404)
