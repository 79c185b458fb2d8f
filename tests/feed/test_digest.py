"""The digest and its outbox, against a real SMTP server and a real webhook on loopback."""

import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime, timedelta
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from aiosmtpd.controller import Controller
from sqlalchemy import select

from broadsheet.errors import InvalidInput, NotAllowed
from broadsheet.feed import digest, outbox, people, social
from broadsheet.feed.mail import Letter, Mailer, Refused, TryLater, Unreachable
from broadsheet.feed.models import Author, Outgoing, Paper, Subscription, Vote
from broadsheet.feed.settings import Settings
from broadsheet.feed.webhooks import check_webhook, payload

DAY = date(2025, 12, 8)


class Mailbox:
    """What the SMTP server took; ``answers`` are given first to RCPT, then to DATA."""

    def __init__(self):
        self.letters, self.rcpt_answers, self.data_answers = [], [], []

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.rcpt_answers:
            return self.rcpt_answers.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        if self.data_answers:
            return self.data_answers.pop(0)
        message = message_from_bytes(envelope.content, policy=policy.default)
        self.letters.append((envelope.rcpt_tos[0], message))
        return "250 taken"


@pytest.fixture
def mailbox():
    box = Mailbox()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        box.port = probe.getsockname()[1]
    server = Controller(box, hostname="127.0.0.1", port=box.port)
    server.start()
    yield box
    server.stop()


@pytest.fixture
def settings(tmp_path, mailbox):
    return Settings.load(
        home=tmp_path,
        secret="key of the tests",
        base_url="https://papers.example.org",
        mail_url=f"smtp://127.0.0.1:{mailbox.port}?starttls=never",
        allow_private_addresses=True,
    )


@pytest.fixture
def stocked(database):
    """Three papers of the day, one of the day before."""
    with database.write() as session:
        for number, (title, votes, day, field) in enumerate(
            [
                ("Quiet <b>paper</b>", 0, DAY, "geometry"),
                ("Loud paper: Gödel & “friends”", 7, DAY, "geometry"),
                ("Followed paper", 1, DAY, "recordings"),
                ("Yesterday's paper", 99, DAY - timedelta(days=1), "geometry"),
            ]
        ):
            ident = f"2512.0000{number}"
            session.add(
                Paper(
                    id=ident,
                    title=title,
                    abstract="It does something. " * 30,
                    listed_on=DAY if day == DAY else day,
                    upvotes_elsewhere=votes,
                    field=field,
                    authors=[Author(position=0, name=f"Author {number}")],
                )
            )
    return database


def confirmed(database, settings, address, **more):
    subscription = digest.subscribe(database, settings, address, **more)
    return digest.confirm(
        database, settings, digest._confirming(settings).dumps([subscription.id, subscription.period])
    )


def token_in(text):
    link = next(word for word in text.split() if "token=" in word)
    return parse_qs(urlsplit(link).query)["token"][0]


def test_double_opt_in(stocked, settings, mailbox):
    digest.subscribe(stocked, settings, "Ann@Example.org")
    assert digest.queue(stocked, settings, "day", DAY) == 0  # nothing before she confirms
    assert outbox.deliver(stocked, settings).sent == 1
    [(to, letter)] = mailbox.letters
    assert to == "ann@example.org"
    token = token_in(letter.get_body(("plain",)).get_content())
    assert digest.confirm(stocked, settings, token).confirmed is not None
    assert digest.queue(stocked, settings, "day", DAY) == 1


def test_asking_again_and_again_sends_one_letter(stocked, settings, mailbox):
    for _ in range(5):
        digest.subscribe(stocked, settings, "ann@example.org")
    assert outbox.deliver(stocked, settings).sent == 1


def test_a_stranger_cannot_change_what_she_gets(stocked, settings):
    subscription = confirmed(stocked, settings, "ann@example.org", period="day")
    again = digest.subscribe(stocked, settings, "ann@example.org", period="week")
    assert (again.id, again.period) == (subscription.id, "day")


@pytest.mark.parametrize("token", ["", "x", "WzEsImRheSJd.x.y"])
def test_forged_links(stocked, settings, token):
    for act in (digest.confirm, digest.unsubscribe):
        with pytest.raises(NotAllowed):
            act(stocked, settings, token)


def test_an_old_link_confirms_nothing(stocked, settings, monkeypatch):
    subscription = digest.subscribe(stocked, settings, "ann@example.org")
    token = digest._confirming(settings).dumps([subscription.id, "day"])
    later = time.time() + digest.CONFIRM_SECONDS + 5
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    with pytest.raises(NotAllowed, match="too old"):
        digest.confirm(stocked, settings, token)


def test_the_mail_is_right(stocked, settings, mailbox):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    people.confirm_email(stocked, "k", people.confirm_email_token(ann, "k"))
    ann = people.account(stocked, ann.id)
    social.follow(stocked, ann, "field", "recordings")
    social.follow(stocked, ann, "search", "quiet things")
    subscription = digest.subscribe(stocked, settings, ann.email, account=ann)
    assert subscription.confirmed is not None  # her address is proven: no second letter
    asked = []

    def search(words, since, _until):
        asked.append((words, since))
        return ["2512.00000", "2512.00003"]

    assert digest.queue(stocked, settings, "day", DAY, search) == 1
    assert outbox.deliver(stocked, settings).sent == 1
    assert asked == [("quiet things", DAY)]
    [(_, mail)] = mailbox.letters
    plain, html = mail.get_body(("plain",)).get_content(), mail.get_body(("html",)).get_content()
    order = [plain.index(t) for t in ("Followed paper", "Quiet <b>paper</b>", "Loud paper: Gödel & “friends”")]
    assert order == sorted(order)
    assert "Yesterday" not in plain  # found by the search, but not of this day
    assert "Quiet &lt;b&gt;paper&lt;/b&gt;" in html
    assert "Gödel &amp; “friends”" in html
    assert mail["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    leave = mail["List-Unsubscribe"].strip("<>")
    assert leave.startswith("https://papers.example.org/digest/unsubscribe?token=")
    assert mail["Subject"].startswith("Broadsheet, Monday, 8 December 2025: ")
    assert mail["Message-ID"] == f"<digest.day.2025-12-08.{subscription.id}@papers.example.org>"
    for part in mail.walk():
        if not part.is_multipart():
            assert part["Content-Transfer-Encoding"] == "quoted-printable"
            assert part.get_content_charset() == "utf-8"
    assert all(len(line) <= 998 for line in mail.as_bytes().split(b"\n"))

    token = parse_qs(urlsplit(leave).query)["token"][0]
    digest.unsubscribe(stocked, settings, token)
    digest.unsubscribe(stocked, settings, token)
    assert digest.queue(stocked, settings, "day", DAY - timedelta(days=1), search) == 0  # an issue she was never sent


def test_leaving_stops_what_is_waiting(stocked, settings, mailbox):
    subscription = confirmed(stocked, settings, "ann@example.org")
    digest.queue(stocked, settings, "day", DAY)
    outbox.deliver(stocked, settings, limit=1)  # the letter asking to confirm
    digest.unsubscribe(stocked, settings, digest._leaving(settings).dumps(subscription.id))
    assert outbox.deliver(stocked, settings).sent == 0


def test_an_issue_is_queued_once_and_empty_days_are_silent(stocked, settings):
    for n in range(3):
        confirmed(stocked, settings, f"a{n}@example.org")
    assert [digest.queue(stocked, settings, "day", DAY) for _ in range(2)] == [3, 0]
    assert digest.queue(stocked, settings, "day", date(2024, 1, 1)) == 0
    assert digest.queue(stocked, settings, "week", DAY) == 0  # nobody asked for the week


def test_the_week_holds_both_days(stocked, settings):
    subscription = confirmed(stocked, settings, "ann@example.org", period="week")
    with stocked.read() as session:
        monday = digest.compose(session, settings, subscription, DAY)
        before = digest.compose(session, settings, subscription, DAY - timedelta(days=1))
    assert [s.title for s in before.stories] == ["Yesterday's paper"]  # 8 December 2025 is a Monday
    assert (monday.name, len(monday.stories)) == ("2025-W50", 3)


def test_what_was_voted_for_in_these_days_comes_first_whenever_it_was_listed(stocked, settings):
    subscription = confirmed(stocked, settings, "ann@example.org")
    bob, eve = (people.sign_up(stocked, name, f"{name}@example.org", "a long password") for name in ("bob", "eve"))
    for voter, paper, day in [(bob, "2512.00003", DAY), (bob, "2512.00000", DAY), (eve, "2512.00000", DAY)]:
        social.vote(stocked, voter, paper)
        with stocked.write() as session:
            session.get_one(Vote, (paper, voter.id)).created = datetime.combine(day, datetime.min.time(), UTC)
    social.vote(stocked, eve, "2512.00002")  # today, which is another day
    with stocked.read() as session:
        issue = digest.compose(session, settings, subscription, DAY)
    assert [(story.id[-1], story.why) for story in issue.stories] == [
        ("0", "2 upvotes"),
        ("3", "100 upvotes, 1 of them new"),  # listed the day before
        ("1", "7 upvotes"),
        ("2", "2 upvotes"),
    ]


def test_a_story_says_that_it_runs_only_where_the_method_is_built(stocked, settings):
    subscription = confirmed(stocked, settings, "ann@example.org")
    with stocked.write() as session:
        session.get_one(Paper, "2512.00000").slug = "cd-t"
        session.get_one(Paper, "2512.00001").slug = "left-the-catalogue"
    with stocked.read() as session:
        issue = digest.compose(session, settings, subscription, DAY)
    assert {story.id: story.runs for story in issue.stories} == {
        "2512.00000": True,
        "2512.00001": False,
        "2512.00002": False,
    }


def test_saved_searches_are_asked_for_the_days_of_the_issue(stocked, settings):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    social.follow(stocked, ann, "search", "quiet things")
    subscription = confirmed(stocked, settings, "ann@example.org", period="week", account=ann)
    asked = []

    def search(words, since, until):
        asked.append((words, since, until))
        return ["2512.00003", "2512.00000"]

    with stocked.read() as session:
        issue = digest.compose(session, settings, subscription, DAY + timedelta(days=3), search)
    assert asked == [("quiet things", DAY, DAY + timedelta(days=6))]  # 8 December 2025 is a Monday
    assert (issue.stories[0].id, issue.stories[0].why) == ("2512.00000", "You follow the search “quiet things”")
    assert "2512.00003" not in {story.id for story in issue.stories}  # found, but of the week before


def clock_after(**gone):
    return lambda: datetime.now(UTC) + timedelta(**gone)


def test_a_temporary_answer_is_tried_again_with_growing_patience(stocked, settings, mailbox):
    confirmed(stocked, settings, "ann@example.org")
    mailbox.rcpt_answers = ["451 later"]
    mailbox.data_answers = ["452 later still"]
    assert outbox.deliver(stocked, settings).postponed == 1
    assert outbox.deliver(stocked, settings) == outbox.Delivery(0, 0, 0, 0)  # not due yet
    assert outbox.deliver(stocked, settings, clock=clock_after(minutes=2)).postponed == 1
    assert outbox.deliver(stocked, settings, clock=clock_after(minutes=3)).sent == 0
    assert outbox.deliver(stocked, settings, clock=clock_after(minutes=10)).sent == 1
    assert len(mailbox.letters) == 1


def test_it_gives_up_in_the_end_and_at_once_when_refused(stocked, settings, mailbox):
    confirmed(stocked, settings, "ann@example.org")
    mailbox.rcpt_answers = ["550 no such user"]
    assert outbox.deliver(stocked, settings).failed == 1
    confirmed(stocked, settings, "ben@example.org")
    mailbox.rcpt_answers = ["450 later"] * 100
    outcomes = [outbox.deliver(stocked, settings, clock=clock_after(days=i)) for i in range(1, 12)]
    assert sum(o.failed for o in outcomes) == 1
    assert sum(o.postponed for o in outcomes) == outbox.MOST_ATTEMPTS - 1


def test_a_server_that_is_down_costs_no_try(stocked, settings):
    confirmed(stocked, settings, "ann@example.org")
    confirmed(stocked, settings, "ben@example.org")
    down = Settings.load(**{**settings.model_dump(), "mail_url": "smtp://127.0.0.1:9?starttls=never"})
    assert outbox.deliver(stocked, down).postponed == 1  # one look is enough
    with stocked.read() as session:
        assert {row.attempts for row in session.scalars(select(Outgoing))} == {0}
    assert outbox.deliver(stocked, settings, clock=clock_after(minutes=2)).sent == 2


def test_mail_is_not_sent_in_the_clear(monkeypatch, mailbox):
    monkeypatch.setattr("broadsheet.feed.mail._on_this_machine", lambda host: False)
    with (
        Mailer(f"smtp://127.0.0.1:{mailbox.port}", "a@example.org") as mailer,
        pytest.raises(Unreachable, match="STARTTLS"),
    ):
        mailer.send(Letter("b@example.org", "s", "t"))
    assert mailbox.letters == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A server's TLS context for "localhost", and a client's that trusts it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    moment = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(moment - timedelta(days=1))
        .not_valid_after(moment + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    file.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=str(file))


@pytest.fixture(params=["smtp", "smtps"])
def secure_server(request, certificate):
    box, (context, _) = Mailbox(), certificate
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        box.port = probe.getsockname()[1]
    if request.param == "smtp":
        server = Controller(box, hostname="localhost", port=box.port, tls_context=context, require_starttls=True)
    else:
        server = Controller(box, hostname="localhost", port=box.port, ssl_context=context)
    server.start()
    box.url = f"{request.param}://localhost:{box.port}"
    yield box
    server.stop()


def test_over_tls(secure_server, certificate):
    with Mailer(secure_server.url, "a@example.org", context=certificate[1]) as mailer:
        mailer.send(Letter("b@example.org", "s", "t"))
    assert len(secure_server.letters) == 1


def test_a_certificate_that_nobody_trusts_is_refused(secure_server):
    with Mailer(secure_server.url, "a@example.org") as mailer, pytest.raises(Unreachable, match=r"(?i)certificate"):
        mailer.send(Letter("b@example.org", "s", "t"))
    assert secure_server.letters == []


@pytest.mark.parametrize("url", ["", "http://x", "smtp://", "localhost:25"])
def test_mail_urls_that_cannot_be_read(url):
    with pytest.raises(InvalidInput):
        Mailer(url, "a@example.org")


@pytest.mark.parametrize(
    "letter",
    [
        Letter("b@example.org\nBcc: c@example.org", "s", "t"),
        Letter("b@example.org", "s\r\nBcc: c@example.org", "t"),
        Letter("b@example.org", "s", "t", headers={"X-A": "1\r\nBcc: c@example.org"}),
        Letter("not an address", "s", "t"),
    ],
)
def test_headers_cannot_be_injected(letter, mailbox):
    mailer = Mailer(f"smtp://127.0.0.1:{mailbox.port}?starttls=never", "a@example.org")
    with mailer, pytest.raises(InvalidInput):
        mailer.send(letter)
    assert mailbox.letters == []


def test_a_line_with_a_single_dot_survives(mailbox):
    with Mailer(f"smtp://127.0.0.1:{mailbox.port}?starttls=never", "Ä <a@example.org>") as mailer:
        mailer.send(Letter("b@example.org", "ü", "one\n.\n..two\n"))
        mailer.send(Letter("c@example.org", "again", "the same connection"))
    assert [m.get_content().replace("\r", "") for _, m in mailbox.letters] == [
        "one\n.\n..two\n",
        "the same connection\n",
    ]
    assert mailbox.letters[0][1]["From"].addresses[0].display_name == "Ä"


def test_a_rowless_claim_is_sent_by_one(stocked, settings, mailbox):
    """Two senders at once: every letter arrives once."""
    for n in range(12):
        confirmed(stocked, settings, f"a{n}@example.org")
    threads = [threading.Thread(target=outbox.deliver, args=(stocked, settings)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = sorted(to for to, _ in mailbox.letters)
    assert addresses == sorted({f"a{n}@example.org" for n in range(12)})


def test_a_letter_that_another_has_claimed_is_dropped_without_a_goodbye(stocked, settings, mailbox, monkeypatch):
    """The server is inside the letter by then: it would take QUIT for its text and leave us waiting for an answer."""
    confirmed(stocked, settings, "ann@example.org")
    said = []
    monkeypatch.setattr(smtplib.SMTP, "quit", lambda server: said.append("quit") or server.close())
    mailer = Mailer(settings.mail_url, "a@example.org")
    before, calls = mailer.send, []

    def overtaken(letter, before_data):
        calls.append(letter.to)
        if len(calls) == 1:  # another sender claims it at the last moment, and sends it
            before_data()
        before(letter, before_data)

    monkeypatch.setattr(mailer, "send", overtaken)
    outbox.deliver(stocked, settings, mailer=mailer)
    assert (calls, said, mailbox.letters) == (["ann@example.org"], [], [])
    assert mailer._connection is None


def test_a_connection_that_breaks_on_the_content_leaves_the_row_in_doubt(stocked, settings):
    confirmed(stocked, settings, "ann@example.org")

    class Breaking(Mailer):
        def send(self, letter, before_data=lambda: None):
            before_data()
            raise outbox.Uncertain("the line went dead")

    mailer = Breaking(settings.mail_url, "a@example.org")
    assert outbox.deliver(stocked, settings, mailer=mailer).sent == 0
    assert outbox.deliver(stocked, settings, clock=clock_after(hours=1)).in_doubt == 1
    assert outbox.send_again(stocked, clock_after(hours=1)()) == 1
    assert outbox.deliver(stocked, settings, clock=clock_after(hours=1)).sent == 1


WORKER = """
import sys
from broadsheet.feed import outbox
from broadsheet.feed.database import Database
from broadsheet.feed.settings import Settings
settings = Settings.load(home=sys.argv[3], secret="k", mail_url=sys.argv[2])
print("ready", flush=True)
outbox.deliver(Database(sys.argv[1]), settings)
"""


def test_killing_the_sender_at_any_moment_sends_nothing_twice(stocked, settings, mailbox, tmp_path):
    """SIGKILL in a loop; what is on the wire at that moment is in doubt, all else arrives exactly once."""
    readers = {f"a{n}@example.org" for n in range(40)}
    for address in readers:
        confirmed(stocked, settings, address)
    url = stocked.url.render_as_string(hide_password=False)
    moments = [0.01, 0.03, 0.0, 0.05, 0.02, 0.08, 0.04]
    for moment in moments:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, url, settings.mail_url, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        worker.stdout.readline()
        time.sleep(moment)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    outbox.deliver(stocked, settings, clock=clock_after(minutes=2))
    arrived = [to for to, _ in mailbox.letters]
    assert len(arrived) == len(set(arrived))
    doubtful = {row.address for row in outbox.in_doubt(stocked, clock_after(hours=1)())}
    assert len(doubtful) <= len(moments)
    assert readers - set(arrived) <= doubtful
    with stocked.read() as session:
        settled = {row.address for row in session.scalars(select(Outgoing).where(Outgoing.sent.is_not(None)))}
    assert settled == readers - doubtful
    assert settled <= set(arrived)


@pytest.fixture
def hook():
    class Hook(BaseHTTPRequestHandler):
        taken, answers = [], []

        def do_POST(self):
            Hook.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            code = Hook.answers.pop(0) if Hook.answers else 200
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hook.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield Hook
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["slack", "discord", "json"])
def test_webhooks_get_the_issue(stocked, settings, hook, kind):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    digest.subscribe(stocked, settings, hook.url, kind=kind, account=ann)
    digest.queue(stocked, settings, "day", DAY)
    hook.answers = [429]
    assert outbox.deliver(stocked, settings).postponed == 1
    assert outbox.deliver(stocked, settings, clock=clock_after(minutes=2)).sent == 1
    text = json.dumps(hook.taken[-1], ensure_ascii=False)
    assert "Loud paper: Gödel" in text
    assert "https://papers.example.org/papers/2512.00001" in text
    if kind == "slack":
        assert "&lt;b&gt;" in text
        assert len(hook.taken[-1]["blocks"]) == 4
    if kind == "discord":
        assert hook.taken[-1]["allowed_mentions"] == {"parse": []}


@pytest.mark.parametrize("code", [302, 400, 404, 410])
def test_a_webhook_that_refuses_is_not_called_again(stocked, settings, hook, code):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    digest.subscribe(stocked, settings, hook.url, kind="json", account=ann)
    digest.queue(stocked, settings, "day", DAY)
    hook.answers = [code]
    assert outbox.deliver(stocked, settings).failed == 1
    assert len(hook.taken) >= 1


def test_a_webhook_needs_a_reader_and_belongs_to_one(stocked, settings, hook):
    with pytest.raises(NotAllowed):
        digest.subscribe(stocked, settings, hook.url, kind="slack")
    ann, ben = (people.sign_up(stocked, n, f"{n}@example.org", "a long password") for n in ("ann", "ben"))
    mine = digest.subscribe(stocked, settings, hook.url, kind="slack", account=ann)
    with pytest.raises(InvalidInput, match="another account"):
        digest.subscribe(stocked, settings, hook.url, kind="slack", account=ben)
    with pytest.raises(NotAllowed):
        digest.end(stocked, ben, mine.id)
    digest.end(stocked, ann, mine.id)
    assert digest.subscriptions_of(stocked, ann) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/x",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://10.0.0.8/x",
        "https://169.254.169.254/latest/meta-data",
        "https://user:password@example.org/",
        "https://0x7f000001/",
        "file:///etc/passwd",
        "https://",
        "https://a\nb/",
        "https://[::ffff:127.0.0.1]/",
    ],
)
def test_webhooks_must_not_lead_indoors(tmp_path, url):
    with pytest.raises(InvalidInput):
        check_webhook(Settings.load(home=tmp_path), url)


def test_a_webhook_that_moved_indoors_is_not_called(stocked, settings, hook, tmp_path):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    digest.subscribe(stocked, settings, hook.url, kind="json", account=ann)
    digest.queue(stocked, settings, "day", DAY)
    strict = Settings.load(**{**settings.model_dump(), "allow_private_addresses": False})
    assert outbox.deliver(stocked, strict).failed == 1
    assert hook.taken == [] or "Loud" not in str(hook.taken[-1:])


@pytest.mark.parametrize(("kind", "period"), [("fax", "day"), ("mail", "year")])
def test_unknown_kinds_and_periods(stocked, settings, kind, period):
    ann = people.sign_up(stocked, "ann", "ann@example.org", "a long password")
    with pytest.raises(InvalidInput):
        digest.subscribe(stocked, settings, "ann@example.org", kind=kind, period=period, account=ann)


def test_services_limits_are_kept():
    stories = [digest.Story(str(i), "t" * 999, "https://e.org", "s" * 999, "a", "w" * 999, False) for i in range(80)]
    slack, discord = payload("slack", "h" * 999, "u", stories), payload("discord", "h", "u", stories)
    assert len(slack["blocks"]) <= 50
    assert all(len(block["text"]["text"]) <= 3000 for block in slack["blocks"])
    assert len(slack["blocks"][0]["text"]["text"]) <= 150
    assert len(discord["embeds"]) <= 10
    assert sum(len(e["title"]) + len(e["description"]) + len(e["footer"]["text"]) for e in discord["embeds"]) <= 8000
    assert all(len(e["title"]) <= 256 for e in discord["embeds"])
    with pytest.raises((Refused, TryLater, InvalidInput)):
        payload("pigeon", "h", "u", stories)


def test_subscription_rows_are_one_for_each_address(stocked, settings):
    for address in ("ann@example.org", "ANN@example.org", " ann@Example.org "):
        digest.subscribe(stocked, settings, address)
    with stocked.read() as session:
        assert len(session.scalars(select(Subscription)).all()) == 1
