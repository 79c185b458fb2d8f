"""Each threat is tried: forged forms, planted sessions, hostile text, other people's things, doors left open."""

import re
from html.parser import HTMLParser
from urllib.parse import quote

import httpx
import pytest

from broadsheet.feed import people, social
from broadsheet.web.rendering import math
from broadsheet.web.security import BODY_BYTES, LIMITS, UPLOAD_BYTES, safe_next

PAPER = "/papers/2407.00886"
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}",
    "$\\text{<script>alert(1)</script>}$",
    "$\\text{<img src=x onerror=alert(1)>}$ \\href{javascript:alert(1)}{x}",
    "'; DROP TABLE papers; --",
    "</title><svg/onload=alert(1)>",
    "]]><!--",
)


class Dangers(HTMLParser):
    """What could run, in a page as a browser reads it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            runs = name in ("href", "src", "action", "formaction") and not re.match(r"https?:|[/#?]", value or "#")
            if runs or name.startswith("on") or name in ("style", "srcdoc"):
                self.found.append((tag, name, value))
        if tag in ("iframe", "object", "embed", "base") or (tag == "script" and not dict(attrs).get("src")):
            self.found.append((tag, None, None))
        if tag == "img" and not dict(attrs)["src"].startswith("/"):
            self.found.append((tag, "src", dict(attrs)["src"]))


# --- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_titles_abstracts_and_names_are_text(browser, paper, number):
    text = HOSTILE[number]
    ident = paper(f"9902.0000{number}", title=f"A {text}", abstract=text, authors=(f"Ann {text}",), venue=text[:100])
    for path in (f"/papers/{ident}", "/new", f"/papers/{ident}.md", "/map", f"/search?q=9902.0000{number}"):
        answer = browser.get(path)
        assert answer.status_code == 200, path
        if "html" in answer.headers["content-type"]:
            assert not Dangers(answer.text).found, path
    for path in ("/new.rss", "/new.atom", "/new.bib", f"/papers/{ident}.bib"):
        answer = browser.get(path)
        assert answer.status_code == 200
        assert "html" not in answer.headers["content-type"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_asked_for_is_text(browser, text):
    for path in ("/search", "/author", "/sign-in", "/sign-up", "/reset", "/digest/confirm", "/confirm"):
        answer = browser.get(path, params={"q": text, "name": text, "next": text, "token": text, "field": text[:40]})
        assert answer.status_code < 500
        assert not Dangers(answer.text).found, path
    answer = browser.get(f"/nothing/{text}".replace("?", "%3F"))
    assert answer.status_code == 404
    assert not Dangers(answer.text).found


@pytest.mark.parametrize("text", [*HOSTILE, "[x](javascript:alert(1))", "![x](http://elsewhere.example/x.png)"])
def test_comments_are_markdown_without_teeth(another, feed, text):
    reader = another(f"talker-{abs(hash(text)) % 10**8}")
    assert reader.form(PAPER, f"{PAPER}/comments", body=text).status_code == 303
    page = reader.get(PAPER).text
    assert not Dangers(page).found
    with feed.db.read() as session:
        assert social.comments(session, "2407.00886")[-1][1].body == text.strip()


def test_math_is_shown_and_html_in_it_is_not():
    assert "<msup>" in math("$x^2$")
    assert math("from $5 to $10") == "from $5 to $10"
    for hostile in HOSTILE:
        assert not Dangers(str(math(hostile))).found
        assert not Dangers(str(math(f"$${hostile}$$"))).found
    assert "<script" not in math("$\\text{<script>alert(1)</script>}$")


def test_math_in_a_long_hostile_text_takes_no_time_to_speak_of():
    for text in ("$" * 20_000, "$a" * 10_000, "\\(" * 10_000, "$" + "a" * 19_000, "{" * 300 + "$" + "{" * 300 + "$"):
        math(text)  # a quadratic search would meet the suite's time-out


# --- forms and sessions -----------------------------------------------------------------------------------------------


def post_routes(feed):
    from starlette.routing import Route

    from broadsheet.web import accounts, pages, runpages

    for router in (pages.router, accounts.router, runpages.router):
        for route in router.routes:
            if isinstance(route, Route) and "POST" in (route.methods or ()):
                yield re.sub(r"\{paper_id:path\}", "2407.00886", re.sub(r"\{\w+\}", "1", route.path))


def test_no_form_is_taken_without_its_token(another, feed):
    reader = another("csrf-target")
    routes = list(post_routes(feed))
    assert len(routes) > 25
    for path in routes:
        for data in ({}, {"csrf": ""}, {"csrf": "0." + "0" * 64}, {"csrf": "é.ü"}):
            assert reader.post(path, data=data).status_code == 403, path


def test_a_token_of_another_session_is_refused(another):
    one, two = another("csrf-one"), another("csrf-two")
    token = re.search(r'name="csrf" value="([^"]+)"', one.get("/account").text)[1]
    assert two.post("/lists", data={"csrf": token, "name": "Theirs"}).status_code == 403
    assert one.post("/lists", data={"csrf": token, "name": "Mine"}).status_code == 303


def test_a_form_from_another_site_is_refused_even_with_its_token(another):
    reader = another("csrf-cross")
    token = re.search(r'name="csrf" value="([^"]+)"', reader.get("/account").text)[1]
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert reader.post("/lists", data={"csrf": token, "name": "X"}, headers=headers).status_code == 403


def test_the_session_is_new_after_signing_in(away, feed):
    people.sign_up(feed.db, "rotates", "rotates@example.org", "correct horse battery")
    before = away.get("/sign-in").cookies["session"]
    token = re.search(r'name="csrf" value="([^"]+)"', away.get("/sign-in").text)[1]
    signed = away.form("/sign-in", "/sign-in", name="rotates", password="correct horse battery")
    after = signed.cookies["session"]
    assert after != before
    # A session planted before signing in, and a token taken from it, open nothing afterwards.
    assert away.post("/lists", data={"csrf": token, "name": "X"}).status_code == 403
    planted = httpx.get(f"{feed.base}/account", cookies={"session": before}, headers={"x-forwarded-for": "203.0.113.9"})
    assert planted.status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_forgeries(another, feed):
    reader = another("cookie-owner")
    answer = reader.form("/account", "/account/password", old="correct horse battery", new="another horse battery")
    flags = answer.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=lax" in flags
    value = reader.cookies["session"]
    for forged in (value[:-1] + ("A" if value[-1] != "A" else "B"), "x" + value, value.split(".")[0], "", "a.b.c"):
        answer = httpx.get(
            f"{feed.base}/account", cookies={"session": forged}, headers={"x-forwarded-for": "203.0.113.9"}
        )
        assert answer.status_code == 303


def test_signing_out_everywhere_and_a_new_password_end_other_sessions(elsewhere):
    reader, other = elsewhere("two-places"), elsewhere()
    other.form("/sign-in", "/sign-in", name="two-places", password="correct horse battery")
    assert other.get("/account").status_code == 200
    reader.form("/account", "/account/password", old="correct horse battery", new="another horse battery")
    assert reader.get("/account").status_code == 200
    assert other.get("/account").status_code == 303
    other.form("/sign-in", "/sign-in", name="two-places", password="another horse battery")
    reader.form("/account", "/sign-out", everywhere="1")
    assert other.get("/account").status_code == 303


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/\t/evil.example",
    ]
    + ["/%0d%0aSet-Cookie:x=y\r\nX: y", "http:evil.example", "", "evil.example", "/a\nb", "///evil.example"],
)
def test_next_leads_nowhere_else(target, away, feed):
    assert safe_next(target) == "/"
    name = f"next-{abs(hash(target)) % 10**9}"
    people.sign_up(feed.db, name, f"{name}@example.org", "correct horse battery")
    answer = away.form("/sign-in", "/sign-in", name=name, password="correct horse battery", next=target)
    assert answer.headers["location"] == "/"


def test_next_leads_back(away, feed):
    people.sign_up(feed.db, "goes-back", "goes-back@example.org", "correct horse battery")
    asked = away.get("/account")
    assert asked.headers["location"] == "/sign-in?next=%2Faccount"
    answer = away.form(
        "/sign-in", "/sign-in", name="goes-back", password="correct horse battery", next="/papers/cd-t?x=1#run"
    )
    assert answer.headers["location"] == "/papers/cd-t?x=1#run"


def test_a_wrong_name_and_a_wrong_password_are_answered_alike(away, feed):
    people.sign_up(feed.db, "is-known", "is-known@example.org", "correct horse battery")
    known = away.form("/sign-in", "/sign-in", name="is-known", password="wrong horse battery")
    unknown = away.form("/sign-in", "/sign-in", name="un-known", password="wrong horse battery")
    plain = [re.sub(r'value="[^"]*"', "", answer.text) for answer in (known, unknown)]
    assert known.status_code == unknown.status_code == 403
    assert plain[0] == plain[1]


# --- other people's things --------------------------------------------------------------------------------------------


def test_lists_comments_and_tokens_of_others_are_out_of_reach(another, feed):
    owner, other = another("owner"), another("other")
    made = owner.form("/account", "/lists", name="Private")
    path = made.headers["location"]
    number = path.rpartition("/")[2]
    owner.form(PAPER, f"{PAPER}/lists", list=number)
    assert other.get(path).status_code == 404
    assert other.get(f"/api/v1{path}").status_code == 404
    assert other.get(f"{path}.rss").status_code == 404
    for action, values in (
        ("rename", {"name": "Y"}),
        ("share", {"public": "1"}),
        ("delete", {}),
        ("remove", {"paper": "2407.00886"}),
    ):
        assert other.form("/account", f"{path}/{action}", **values).status_code == 404
    assert other.form("/account", f"{PAPER}/lists", list=number).status_code == 404
    owner.form(PAPER, f"{PAPER}/comments", body="Mine.")
    with feed.db.read() as session:
        said = social.comments(session, "2407.00886")[-1][1]
    for action, values in (("edit", {"body": "Yours."}), ("delete", {}), ("settle", {"delete": "1"})):
        assert other.form("/account", f"/comments/{said.id}/{action}", **values).status_code == 403
    account = people.account_named(feed.db, "owner")
    token, secret = people.create_token(feed.db, account.id, "mine", ("read",))
    assert other.form("/account", f"/tokens/{token.id}/revoke").status_code == 404
    assert httpx.get(f"{feed.base}/api/v1/account", headers={"authorization": f"Bearer {secret}"}).status_code == 200
    owner.form("/account", f"{path}/share", public="1")
    assert other.get(path).status_code == 200
    assert other.get(f"{path}.atom").status_code == 200


def test_a_form_cannot_make_an_operator(away, feed):
    away.form(
        "/sign-up",
        "/sign-up",
        name="climber",
        email="climber@example.org",
        password="correct horse battery",
        role="operator",
        email_confirmed="2020-01-01",
        id="1",
    )
    account = people.account_named(feed.db, "climber")
    assert (account.role, account.email_confirmed) == ("reader", None)
    assert away.get("/reports").status_code == 403


def test_a_token_does_what_its_scopes_say_and_works_nowhere_else(feed, another):
    another("scoped")
    account = people.account_named(feed.db, "scoped")
    secrets = {
        scope: people.create_token(feed.db, account.id, scope, (scope,))[1] for scope in ("read", "write", "run")
    }
    vote = f"{feed.base}/api/v1{PAPER}/vote"

    def headers(scope):
        return {"authorization": f"Bearer {secrets[scope]}"}

    assert httpx.put(vote, headers=headers("read")).status_code == 403
    assert httpx.put(vote, headers=headers("write")).json()["votes"] >= 1
    assert httpx.put(vote).status_code == 403
    assert httpx.put(vote, headers={"authorization": "Bearer bs_wrong"}).status_code == 403
    assert httpx.get(f"{feed.base}/account", headers=headers("write")).status_code == 303  # to sign in
    assert httpx.post(f"{feed.base}/api/v1{PAPER}/runs", json={}, headers=headers("run")).status_code == 403
    assert httpx.delete(vote, headers=headers("write")).status_code == 200
    said = httpx.post(f"{feed.base}/api/v1{PAPER}/comments", json={"body": "By token."}, headers=headers("write"))
    assert (said.status_code, said.json()["author"]) == (201, "scoped")


def test_a_browser_s_cookie_writes_nothing_through_the_api(another):
    reader = another("cookie-api")
    assert reader.put(f"/api/v1{PAPER}/vote").status_code == 403
    assert reader.post(f"/api/v1{PAPER}/comments", json={"body": "x"}).status_code == 403


def test_a_vote_counts_once_and_can_be_taken_back(another, feed):
    reader = another("voter")
    for _ in range(2):
        assert reader.form("/papers/2106.12052", "/papers/2106.12052/vote", on="1").status_code == 303
    page = reader.get("/papers/2106.12052").text
    assert 'aria-pressed="true"' in page
    with feed.db.read() as session:
        before = len(social.voted(session, people.account_named(feed.db, "voter"), ["2106.12052"]))
    assert before == 1
    part = reader.post(
        "/papers/2106.12052/vote",
        data={"csrf": re.search(r'name="csrf" value="([^"]+)"', page)[1], "on": "0"},
        headers={"hx-request": "true"},
    )
    assert 'aria-pressed="false"' in part.text
    assert "<html" not in part.text


def test_an_account_can_be_exported_and_deleted(another, feed):
    reader = another("leaves")
    reader.form(PAPER, f"{PAPER}/comments", body="I was here.")
    content = reader.get("/account/export.json").json()
    assert (content["name"], content["comments"][0]["body"]) == ("leaves", "I was here.")
    assert reader.form("/account", "/account/delete", confirm="someone-else").status_code == 422
    assert reader.form("/account", "/account/delete", confirm="leaves").status_code == 303
    assert reader.get("/account").status_code == 303
    assert "I was here." not in reader.get(PAPER).text


def test_reports_reach_the_person_at_the_machine(another, browser, feed):
    bad, good = another("rude"), another("reports")
    bad.form(PAPER, f"{PAPER}/comments", body="Something rude.")
    with feed.db.read() as session:
        said = social.comments(session, "2407.00886")[-1][1]
    reported = good.form(PAPER, f"/comments/{said.id}/report", reason="Rude <b>indeed</b>")
    assert (reported.status_code, reported.headers["location"]) == (303, f"{PAPER}#comment-{said.id}")
    page = browser.get("/reports").text
    assert "Something rude." in page
    assert "<b>indeed" not in page
    assert browser.form("/reports", f"/comments/{said.id}/settle", delete="1").status_code == 303
    assert "Something rude." not in browser.get("/reports").text + browser.get(PAPER).text


@pytest.mark.parametrize("number", ["0", "-1", str(2**31), str(10**40), "1e3", "one"])
def test_a_number_that_no_row_has_is_refused(another, number):
    reader = another(f"counts-{abs(hash(number)) % 10**8}")
    for path in (f"/lists/{number}", f"/lists/{number}.rss", f"/api/v1/lists/{number}", f"/runs/{number}"):
        assert reader.get(path).status_code in (404, 422), path
    assert reader.get(f"/runs/{number}/events").status_code in (404, 422)
    for path in (f"/comments/{number}/delete", f"/lists/{number}/share", f"/tokens/{number}/revoke"):
        assert reader.form("/account", path, public="1").status_code in (404, 422), path
    for path, form in ((f"{PAPER}/comments", {"body": "x", "parent": number}), (f"{PAPER}/lists", {"list": number})):
        assert reader.form(PAPER, path, **form).status_code in (404, 422), path


# --- who is at this machine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "203.0.113.9"},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"x-real-ip": "127.0.0.1"},
        {"via": "1.1 proxy"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "localhost.evil.example:8000"},
    ],
)
def test_only_the_person_at_this_machine_is_operator_without_signing_in(browser, headers):
    assert "Run it" in browser.get(PAPER).text
    assert "Run it" not in browser.get(PAPER, headers=headers).text
    assert browser.get("/metrics", headers=headers).status_code == 303


def test_nobody_is_operator_at_a_public_address_or_where_it_is_switched_off(serve, tmp_path):
    for name, settings in (("public", {"base_url": "https://papers.example.org"}), ("off", {"local_operator": False})):
        with serve(tmp_path / name, **settings) as (browser, _):
            answer = browser.get(PAPER)
            assert answer.status_code == 200
            assert "Run it" not in answer.text
            assert browser.get("/metrics").status_code == 303
            if name == "public":
                assert "max-age" in answer.headers["strict-transport-security"]
                cookie = browser.get("/sign-in").headers["set-cookie"]
                assert cookie.startswith("__Host-session=")
                assert "Secure" in cookie


# --- the wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/static/broadsheet.js", "/nothing", "/api/v1/claims", "/new.rss", "/sign-in"])
def test_every_answer_carries_the_headers(browser, path):
    headers = browser.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


def test_bodies_have_a_limit_told_or_not(browser, feed):
    over = b"a" * (BODY_BYTES + 1)
    assert browser.post("/sign-in", content=over).status_code == 413

    def in_parts():
        for _ in range(3 + BODY_BYTES // 65536):
            yield b"a=" + b"b" * 65534

    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert browser.post("/sign-in", content=in_parts(), headers=kind).status_code == 413
    assert browser.post("/account/library", content=b"a" * (UPLOAD_BYTES + 1)).status_code == 413
    assert browser.get("/healthz").status_code == 200


def test_too_many_tries_are_answered_with_patience(serve, tmp_path):
    with serve(tmp_path / "strict") as (browser, _):
        burst = LIMITS["sign-in"][0]
        answers = [browser.form("/sign-in", "/sign-in", name="x", password="y") for _ in range(burst + 1)]
        assert [a.status_code for a in answers] == [403] * burst + [429]
        assert int(answers[-1].headers["retry-after"]) > 0
        names = [browser.form("/sign-up", "/sign-up", name="x", email="x", password="y").status_code for _ in range(6)]
        assert names == [422] * 5 + [429]


def test_an_error_of_ours_is_a_plain_word(feed, monkeypatch):
    from broadsheet.web import views

    def broken():
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(views, "claims_page", broken)
    for path in ("/claims", "/api/v1/claims"):
        answer = httpx.get(feed.base + path)  # uvicorn hangs up after an error: each over a connection of its own
        assert answer.status_code == 500
        assert "secret" not in answer.text


@pytest.mark.parametrize(
    "text", ["' OR 1=1 --", "1; DROP TABLE papers", "%' UNION SELECT password FROM accounts --", "\0"]
)
def test_sql_in_every_parameter_changes_nothing(browser, text):
    wrong = quote(text, safe="")
    places = ["/search?q=", "/search?author=", "/search?venue=", "/author?name=", "/new?offset=", "/day/", "/fields/"]
    places += ["/lists/", "/runs/", "/papers/", "/api/daily_papers?submitter=", "/api/papers/", "/api/papers/search?q="]
    for place in places:
        assert browser.get(place + wrong).status_code < 500, place
    assert len(set(re.findall(r"/papers/\d{4}\.\d{4,5}", browser.get("/").text))) >= 49
