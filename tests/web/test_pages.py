"""The pages: what stands on them, that they and their JSON agree, that they need nothing from elsewhere."""

import re
from datetime import date
from html import unescape
from html.parser import HTMLParser

import pytest
from defusedxml.ElementTree import fromstring
from hypothesis import given
from hypothesis import strategies as st

from broadsheet import catalog
from broadsheet.lab.report import number
from broadsheet.lab.results import published
from broadsheet.web import charts, views

CD_T = "/papers/2407.00886"
PAGES = ["/", "/new", "/trending", "/day/2025-12-08", "/week/2025-W50", "/month/2025-12", "/fields/geometry", CD_T]
PAGES += ["/papers/2106.12052", "/search", "/search?q=circuits", "/claims", "/map", "/activity", "/about", "/runs"]
PAGES += ["/author?name=Bin+Yu", "/sign-in", "/sign-up", "/digest", "/api/docs"]


class Parts(HTMLParser):
    """Tags with their attributes, and whatever the CSP would refuse."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inline = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.inline += [f"{tag} {name}" for name in attributes if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and not attributes.get("src")):
            self.inline.append(tag)


def test_the_front_page_shows_all_49_papers_of_the_first_edition(browser):
    entries = {entry.arxiv for entry in catalog.papers()}
    assert entries <= set(re.findall(r'href="/papers/(\d{4}\.\d{4,5})"', browser.get("/").text))
    assert len(entries) == 49


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_light_and_asks_nothing_of_others(browser, path):
    answer = browser.get(path)
    assert answer.status_code == 200
    assert len(answer.content) < 100_000
    parts = Parts(answer.text)
    assert not parts.inline
    loaded = [a.get("src") or a.get("href") for tag, a in parts.tags if tag in ("script", "img", "link")]
    assert not [url for url in loaded if url and not url.startswith(("/", str(browser.base_url)))]
    assert [tag for tag, _ in parts.tags].count("h1") == 1
    assert browser.head(path).status_code == 200


def test_a_first_visit_is_under_100_kb_with_its_styles_scripts_and_fonts(browser):
    """As transferred: the text compressed, the fonts as they are."""
    with browser.stream("GET", "/", headers={"accept-encoding": "gzip"}) as answer:
        sizes = {"page": sum(len(part) for part in answer.iter_raw())}
    text = browser.get("/").text
    files = re.findall(r'(?:src|href)="(/static/[^"]+\.(?:js|css)[^"]*)"', text)
    styles = browser.get(next(f for f in files if ".css" in f)).text
    files += [f"/static/{font}" for font in set(re.findall(r"fonts/[\w-]+\.woff2", styles))]
    for file in files:
        with browser.stream("GET", file, headers={"accept-encoding": "gzip"}) as answer:
            assert answer.status_code == 200
            sizes[file] = sum(len(part) for part in answer.iter_raw())
    sizes = {file: size for file, size in sizes.items() if "italic" not in file}  # loaded only where it is used
    assert sum(sizes.values()) < 100_000, sizes


def test_a_paper_page_and_its_json_say_the_same_about_every_claim(browser):
    data, text = browser.get(f"/api/v1{CD_T}").json(), browser.get(CD_T).text
    result = published("cd-t")
    assert {c["id"] for c in data["method"]["claims"] if c["verdict"]} == {f.claim.id for f in result.findings}
    for found in result.findings:
        row = re.search(rf'<tr id="claim-{found.claim.id}">(.*?)</tr>', text, re.DOTALL)[1]
        assert re.search(rf'class="verdict {str(found.verdict).replace(" ", "-")}"', row)
        assert number(found.ours_mean) in row
        assert number(found.low) in row
    assert f"{data['method']['figures'][0]['path']}" in text
    assert data["own_abstract"] is False


def test_figures_are_served_and_nothing_beside_them(browser):
    figure = browser.get(f"/api/v1{CD_T}").json()["method"]["figures"][0]["path"]
    assert browser.get(figure).content.startswith(b"\x89PNG")
    folder = figure.rpartition("/")[0]
    for name in (
        "..%2f..%2fcd-t.json",
        "%2e%2e%2fcd-t.json",
        "..%5ccd-t.json",
        "%2fetc%2fpasswd",
        "cd-t.json",
        "x.png",
    ):
        assert browser.get(f"{folder}/{name}").status_code == 404, name


def test_other_names_of_a_paper_lead_to_its_page(browser):
    for name in ("cd-t", "2407.00886v2", "arXiv:2407.00886"):
        answer = browser.get(f"/papers/{name}")
        assert (answer.status_code, answer.headers["location"]) == (308, CD_T)
    assert browser.get("/papers/no-such-paper").status_code == 404


def test_an_old_arxiv_id_with_a_slash_has_its_page_and_all_beside_it(browser, paper):
    paper("cs/0112017", title="An Old One", abstract="About $O(n^2)$ steps.")
    page = browser.get("/papers/cs/0112017")
    assert page.status_code == 200
    assert "<msup>" in page.text
    assert browser.get("/papers/cs/0112017.bib").text.startswith("@article{cs-0112017,")
    assert browser.get("/api/papers/cs/0112017").json()["id"] == "cs/0112017"
    assert browser.get("/papers/cs/0112017.md").text.startswith("# An Old One")


def test_a_paper_page_can_be_cited_by_machines(browser):
    tags = [a for tag, a in Parts(browser.get(CD_T).text).tags if tag == "meta"]
    named = [(a.get("name") or a.get("property"), a.get("content")) for a in tags]
    entry = catalog.paper("cd-t")
    assert [value for name, value in named if name == "citation_author"] == list(entry.authors)
    assert ("citation_title", entry.title) in named
    assert ("citation_publication_date", "2024/06/30") in named
    assert ("citation_arxiv_id", "2407.00886") in named
    assert ("og:title", entry.title) in named


def test_bibtex_of_a_page_and_of_a_list_is_read_by_a_bibtex_parser(browser):
    import bibtexparser

    one = bibtexparser.parse_string(browser.get(f"{CD_T}.bib").text)
    assert [entry["eprint"] for entry in one.entries] == ["2407.00886"]
    many = bibtexparser.parse_string(browser.get("/fields/geometry.bib").text)
    assert not many.failed_blocks
    assert {entry["eprint"] for entry in many.entries} == {entry.arxiv for entry in catalog.papers("geometry")}
    assert len({entry.key for entry in many.entries}) == len(many.entries)


LISTS = ["/new", "/trending?period=all", "/day/2025-12-08", "/week/2025-W50", "/month/2025-12", "/fields/geometry"]
LISTS += ["/author?name=Bin+Yu", "/search?q=circuits"]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_is_the_same_as_page_json_rss_and_atom(browser, path):
    at, _, query = path.partition("?")
    with_query = f"?{query}" if query else ""
    data = browser.get(f"/api/v1{path}").json()
    ids = [paper["path"] for paper in data["papers"]]
    assert ids
    page = browser.get(path).text
    assert re.findall(r'<h2><a href="(/papers/[^"]+)"', page) == ids
    offered = unescape(page[page.index('class="feeds"') :])
    for ending in (".rss", ".atom", ".bib"):
        assert f'"{at}{ending}{with_query}"' in offered
    assert f'"/api/v1{at}{with_query}"' in offered
    rss = fromstring(browser.get(f"{at}.rss{with_query}").content)
    assert [link.text.partition("/papers")[2] for link in rss.iterfind("channel/item/link")] == [
        i.removeprefix("/papers") for i in ids
    ]
    atom = fromstring(browser.get(f"{at}.atom{with_query}").content)
    space = {"a": "http://www.w3.org/2005/Atom"}
    assert [e.text.partition("/papers")[2] for e in atom.iterfind("a:entry/a:id", space)] == [
        i.removeprefix("/papers") for i in ids
    ]
    assert all(e.find("a:author/a:name", space) is not None for e in atom.iterfind("a:entry", space))


def test_pages_of_a_list_neither_repeat_nor_skip(browser):
    seen, at = [], "/api/v1/new?limit=20"
    while at:
        data = browser.get(at).json()
        seen += [paper["id"] for paper in data["papers"]]
        at = data["earlier"] and f"/api/v1{data['earlier']}"
    assert len(seen) == len(set(seen)) == data["total"]
    assert {entry.arxiv for entry in catalog.papers()} <= set(seen)


def test_a_day_leads_to_the_days_around_it(browser, paper):
    paper("2512.00002", title="Later", published=date(2025, 12, 15))
    data = browser.get("/api/v1/day/2025-12-08").json()
    assert data["later"] == "/day/2025-12-15"
    assert browser.get("/api/v1/day/2025-12-15").json()["earlier"].startswith("/day/2025-12-08")
    for wrong in ("/day/2025-13-01", "/week/2025-W77", "/month/december", "/day/2025-12-8"):
        assert browser.get(wrong).status_code == 422


def test_search_finds_by_meaning_and_filters(browser):
    found = browser.get("/api/v1/search", params={"q": "circuits inside language models"}).json()
    assert "2407.00886" in [paper["id"] for paper in found["papers"]]
    only = browser.get("/api/v1/search", params={"q": "circuits inside language models", "field": "diagrams"}).json()
    assert {paper["field"] for paper in only["papers"]} == {"diagrams"}
    nobody = browser.get("/search", params={"q": "circuits", "author": "Nobody At All"})
    assert "Nothing found" in nobody.text
    assert browser.get("/search", params={"q": "x", "since": "yesterday"}).status_code == 422


def test_as_you_type_the_results_come_alone_and_are_those_of_the_whole_page(browser):
    whole = browser.get("/search?q=entropy")
    part = browser.get("/search?q=entropy", headers={"hx-request": "true"})
    assert "<html" not in part.text
    assert part.text.lstrip().startswith('<div id="results"')
    assert re.findall(r"/papers/[\d.]+", part.text) == re.findall(
        r"/papers/[\d.]+", whole.text[whole.text.index('id="results"') :]
    )
    assert "HX-Request" in whole.headers["vary"]


def test_highlights_are_marked_in_the_page(browser):
    assert "<mark>" in browser.get("/search?q=entropy").text


def test_the_map_has_a_point_for_every_paper(browser):
    data = browser.get("/api/v1/map").json()
    assert {entry.arxiv for entry in catalog.papers()} <= {point["id"] for point in data["points"]}
    assert all(0 <= point["x"] <= 1000 and 0 <= point["y"] <= 580 for point in data["points"])
    assert browser.get("/map").text.count("<title>") == 1 + len(data["points"])


def test_claims_at_a_glance_count_what_is_published(browser):
    results = [result for entry in catalog.papers() if (result := published(entry.slug))]
    verdicts = [str(found.verdict) for result in results for found in result.findings]
    data = browser.get("/api/v1/claims").json()["verdicts"]
    assert data == {name.replace(" ", "_"): verdicts.count(name) for name in ("shown", "not shown", "inconclusive")}


def test_the_glance_at_claims_stays_light_when_every_paper_is_measured(browser, monkeypatch):
    """Thirty claims of each of the 49 papers, and one stop of the keyboard for each paper, not for each claim."""
    page = views.claims_page()
    measured = next(row for group in page.fields for row in group.papers if row.verdicts.total)
    verdicts = views.Verdicts(shown=20, not_shown=5, inconclusive=5)
    claims = [measured.claims[0].model_copy(update={"id": f"c{n}", "verdict": "shown"}) for n in range(30)]
    for group in page.fields:
        group.papers = [row.model_copy(update={"claims": claims, "verdicts": verdicts}) for row in group.papers]
    monkeypatch.setattr(views, "claims_page", lambda: page)
    text = browser.get("/claims").text
    assert text.count("<use ") == 49 * 30
    assert len(text.encode()) < 100_000
    assert text.count("<a ") < 49 + 40


def test_the_map_stays_light_however_many_papers_there_are(browser, monkeypatch):
    points = [
        charts.Point(
            id=f"2401.{n:05d}",
            title=f"A title of a common length that says what is new here {n}",
            path=f"/papers/2401.{n:05d}",
            field="geometry",
            x=(n * 37) % 1000,
            y=(n * 11) % 580,
            label=f"A title of a common length {n}",
        )
        for n in range(charts.MOST_ON_MAP)
    ]
    charts._name(points)
    drawn = charts.Map(explanation="", points=points, fields=[])
    monkeypatch.setattr(charts, "map_of", lambda *_: drawn)
    text = browser.get("/map").text
    assert text.count('<circle class="') == charts.MOST_ON_MAP
    assert len(text.encode()) < 100_000


@given(st.lists(st.integers(0, 12), max_size=12))
def test_the_front_page_s_sections_fill_their_rows(sizes):
    blank = dict.fromkeys(views.Card.model_fields, None)
    groups = [(f"field-{n}", [views.Card.model_construct(**blank)] * size) for n, size in enumerate(sizes)]
    sections = views.laid_out(groups)
    front = views.Front.model_construct(sections=sections)
    assert [sum(section.span for section in row) for row in front.rows if row] == [4] * len(
        [r for r in front.rows if r]
    )
    assert sorted(len(section.papers) for section in sections) == sorted(size for size in sizes if size)
    for section in sections:
        n = len(section.papers)
        assert section.columns <= min(n, 4)
        if n > 3:
            assert (section.span, -n % section.columns) == (4, min(-n % 3, -n % 4))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([f"{year} Q{quarter}" for year in (2023, 2024) for quarter in (1, 2, 3, 4)], {0: "2023", 4: "2024"}),
        (["2024 Q2", "2024 Q3", "2024 Q4"], {0: "2024 Q2", 2: "2024 Q4"}),
        ([f"2025-W{week}" for week in range(10, 22)], {place: f"2025-W{10 + place}" for place in range(0, 12, 2)}),
    ],
)
def test_a_chart_names_years_or_as_many_weeks_as_have_room(names, labels):
    chart = charts.bar_chart("Papers", dict.fromkeys(names, 3), "paper")
    assert [tick.label for tick in chart.ticks] == list(labels.values())
    middle = {tick.label: tick.x for tick in chart.ticks}
    for place, label in labels.items():
        bar = chart.bars[place]
        assert abs(middle[label] - (bar.x + bar.width / 2)) < 0.2


def test_the_sitemap_names_every_paper(browser, feed):
    space = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9"}
    places = [e.text for e in fromstring(browser.get("/sitemap.xml").content).iterfind("s:url/s:loc", space)]
    assert {f"{feed.base}/papers/{entry.arxiv}" for entry in catalog.papers()} <= set(places)
    assert f"{feed.base}/sitemap.xml" in browser.get("/robots.txt").text


def test_health_and_metrics(browser, away):
    assert browser.get("/healthz").json() == {"status": "ok"}
    browser.get("/papers/2407.00886")
    text = browser.get("/metrics").text
    assert 'route="/papers/{paper_id:path}"' in text
    assert re.search(r"^broadsheet_papers \d\d", text, re.MULTILINE)
    assert away.get("/metrics").status_code == 303  # to sign in


def test_shipped_files_may_be_kept_and_are_compressed(browser):
    path = re.search(r"/static/broadsheet\.css\?v=\w+", browser.get("/").text)[0]
    answer = browser.get(path)
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-encoding"] == "gzip"


def test_the_api_is_described(browser):
    schema = browser.get("/api/openapi.json").json()
    assert {"/api/daily_papers", "/api/papers/search", "/api/v1/search", "/api/v1/claims"} <= set(schema["paths"])
    assert [path for path in schema["paths"] if not path.startswith("/api/")] == ["/papers/{paper_id}.md"]
    for path in ("vote", "comments", "runs"):
        for operation in schema["paths"][f"/api/v1/papers/{{paper_id}}/{path}"].values():
            assert operation["security"]
