"""In a real browser (Chromium, headless): accessibility, search as you type, both colour schemes, and a phone."""

import re
import shutil
import socket
import time
from email import message_from_bytes
from email.policy import default

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PAPER = "/papers/2407.00886"
PAGES = ["/", "/new", PAPER, "/papers/2106.12052", "/search?q=circuits", "/claims", "/map", "/activity", "/about"]
PAGES += ["/sign-in", "/sign-up", "/digest", "/runs", "/api/docs", "/nothing-here"]
SIGNED_IN = ["/account", PAPER, "/for-you"]


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium, feed):
    """Makes windows on the feed that note what the browser complains about."""
    opened = []

    def make(**options):
        context = chromium.new_context(base_url=feed.base, **options)
        page = context.new_page()
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: page.complaints.append(r.url) if not r.url.startswith(feed.base) else None)
        opened.append(context)
        return page

    yield make
    for context in opened:
        context.close()


def violations(page):
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = axe.Axe().run(page, options=rules).response["violations"]
    return [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found]


def sign_up(page, name):
    page.goto("/sign-up")
    page.fill("#name", name)
    page.fill("#email", f"{name}@example.org")
    page.fill("#password", "correct horse battery")
    page.click("main button")
    page.wait_for_url("**/")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(window, scheme):
    page, found = window(color_scheme=scheme), {}
    for path in PAGES:
        page.goto(path)
        found[path] = violations(page)
    sign_up(page, f"axe-{scheme}")
    page.goto(PAPER)
    page.fill("#comment", "*Well* said, with `code`.")
    page.click("text=Comment >> nth=-1")
    for path in SIGNED_IN:
        page.goto(path)
        found[f"{path}, signed in"] = violations(page)
    assert not {path: wrong for path, wrong in found.items() if wrong}
    assert not [text for text in page.complaints if "404" not in text]


@pytest.mark.parametrize("width", [320, 390, 650, 830, 1000])  # 320: WCAG 1.4.10
def test_no_page_is_wider_than_its_window(window, paper, width):
    long = "https://example.org/" + "a-very-long-address" * 20
    wide = paper("9901.00777", title=f"Nothing but {'m' * 200}", abstract=f"Code: {long}, ${' + '.join('x' * 90)}$.")
    page = window(viewport={"width": width, "height": 844})
    for path in [*PAGES, f"/papers/{wide}"]:
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_a_phone_shows_all_sections_and_letters_that_can_be_read(window):
    page = window(viewport={"width": 390, "height": 844})
    page.goto("/")
    for name in ("Activity", "Search", "Sign in"):
        box = page.locator(".sections a", has_text=name).bounding_box()
        assert box is not None, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
    for path in ("/map", "/activity"):
        page.goto(path)
        heights = page.evaluate(
            "[...document.querySelectorAll('.plot text')].map(t => t.getBoundingClientRect().height)"
        )
        assert heights, path
        assert min(heights) > 9, path


def test_results_come_as_you_type_and_the_address_follows(window):
    page = window()
    page.goto("/search")
    page.type("#q", "diffusion spectral entr", delay=15)
    page.wait_for_selector("#results h2:has-text('Diffusion Spectral Entropy')")
    page.wait_for_url(re.compile(r"q=diffusion"))
    page.select_option("#field", "geometry")
    page.wait_for_url(re.compile("field=geometry"))
    page.wait_for_function(
        "[...document.querySelectorAll('#results .kicker')].every(k => k.textContent === 'geometry')"
    )
    assert page.locator("#results").count() == 1
    assert not page.complaints


def test_it_works_without_javascript(window):
    page = window(java_script_enabled=False)
    page.goto("/")
    page.click(".lead h2 a")
    assert page.locator("#claims tbody tr").count() > 5
    page.goto("/search")
    page.fill("#q", "circuits")
    page.press("#q", "Enter")
    assert page.locator("#results h2").count() > 0
    sign_up(page, "no-script")
    page.goto(PAPER)
    page.click(".actions .vote button")
    assert page.locator(".actions .vote button").get_attribute("aria-pressed") == "true"
    page.goto("/map")
    page.click(".map a >> nth=0", force=True)
    assert "/papers/" in page.url


def test_a_vote_is_cast_in_place_and_taken_back(window):
    page = window()
    sign_up(page, "in-place")
    page.goto("/new")
    first = page.locator(".listing .vote button").first
    before = int(first.inner_text())
    first.click()
    page.wait_for_selector(".listing .vote button[aria-pressed=true]")
    assert int(page.locator(".listing .vote button").first.inner_text()) == before + 1
    page.locator(".listing .vote button").first.click()
    page.wait_for_selector(".listing li:first-child .vote button[aria-pressed=false]")
    assert page.url.endswith("/new")
    assert not page.complaints


def test_the_keyboard_reaches_the_content_and_the_colours_can_be_switched(window):
    page = window(color_scheme="light")
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("[data-theme-switch]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    assert not page.complaints


def test_the_map_zooms(window):
    page = window()
    page.goto("/map")
    page.click("[data-zoom=in]")
    assert float(page.get_attribute(".map svg.plot", "viewBox").split()[2]) < 1000
    page.click("[data-zoom=all]")
    assert page.get_attribute(".map svg.plot", "viewBox") == "0 0 1000 580"


@pytest.fixture
def mailbox():
    """A real SMTP server on loopback: (its URL, the messages it took)."""
    controller = pytest.importorskip("aiosmtpd.controller", reason="aiosmtpd is not installed")
    taken = []

    class Keep:
        async def handle_DATA(self, _server, _session, envelope):
            taken.append(message_from_bytes(envelope.content, policy=default))
            return "250 OK"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = controller.Controller(Keep(), hostname="127.0.0.1", port=port)
    server.start()
    yield f"smtp://127.0.0.1:{port}?starttls=never", taken
    server.stop()


def link_in(mail, mailbox, subject):
    """The address in the mail of that subject, once it has come."""
    end = time.monotonic() + 60
    while not (found := [m for m in mailbox if subject in m["subject"]]):
        assert time.monotonic() < end, [m["subject"] for m in mailbox]
        time.sleep(0.2)
    text = found[-1].get_body(("plain",)).get_content()
    assert found[-1]["to"] == mail
    return re.search(r"http://\S+", text)[0]


@pytest.mark.slow
def test_from_signing_up_to_claims_that_arrive(chromium, serve, mailbox, tmp_path):
    url, taken = mailbox
    with serve(tmp_path / "home", mail_url=url) as (browser, _):
        page = chromium.new_context(base_url=str(browser.base_url)).new_page()
        page.goto("/sign-up")
        page.fill("#name", "mary")
        page.fill("#email", "mary@example.org")
        page.fill("#password", "correct horse battery")
        page.click("main button")
        page.goto(link_in("mary@example.org", taken, "Your account"))
        page.click("main button")
        assert page.inner_text(".sections a[href='/account']") == "mary"
        page.goto("/search")
        page.type("#q", "noise-resilient spectral entropy", delay=10)
        page.click("#results h2 a:has-text('Diffusion Spectral Entropy')")
        page.click(".actions .vote button")
        page.wait_for_selector(".actions .vote button[aria-pressed=true]")
        page.fill("#comment", "Does it hold for *transformers*?")
        page.click(".add-comment button")
        assert page.inner_html(".comment .prose").strip() == "<p>Does it hold for <em>transformers</em>?</p>"
        page.goto("/digest")
        page.fill("#address", "team@example.org")
        page.click("main form button >> nth=0")
        page.goto(link_in("team@example.org", taken, "confirm"))
        page.click("main button")
        assert "team@example.org" in page.inner_text("main")
        page.goto("/papers/diffusion-spectral-entropy")
        page.fill("#seeds", "1")
        page.click("#run form button:has-text('Run')")
        page.wait_for_selector("#live-run progress", timeout=120_000)
        page.wait_for_selector("#live-run .claims tbody tr", timeout=540_000)
        page.wait_for_selector("#live-run [data-run-state]:has-text('done')", timeout=60_000)
        page.wait_for_selector("#live-run figure img")
        assert page.locator("#live-run .claims tbody tr").count() >= 5
