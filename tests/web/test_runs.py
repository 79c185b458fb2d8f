"""Runs: only what the catalogue knows is started, by whom may; a worker's life and death is told as it is."""

import json
import os
import sys
import textwrap
import time

import pytest

from broadsheet import catalog
from broadsheet.errors import InvalidInput, NotAllowed, NotBuilt, UnknownPaper
from broadsheet.feed.database import Database
from broadsheet.feed.models import Account, Run, now
from broadsheet.feed.settings import Settings
from broadsheet.web import runs
from broadsheet.web.app import fill

OPERATOR = Account(id=None, name="local", role="operator")

EXPERIMENT = """
import os, time
from pathlib import Path
from matplotlib.figure import Figure
from broadsheet.lab import Plate

def run(ctx):
    with ctx.progress.task("counting", 3) as task:
        for step in range(3):
            task.advance(loss=1.0 / (step + 1))
    what = Path(os.environ["KITE_ORDERS"]).read_text()
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "fail":
        raise RuntimeError("the string broke")
    if what == "wait":
        time.sleep(120)
    ctx.measure("flies", ours=2.0 + 0.01 * ctx.seed, baseline=1.0)
    return {"seed": ctx.seed}

def draw(records):
    figure = Figure()
    figure.subplots().plot([r["seed"] for r in records])
    return [Plate("height", figure, "How high it flew.")]
"""
# A worker that needs no torch: it obeys its orders and tells the database what the real one would.
TINY = """
import os, signal, sys, time
from pathlib import Path
from broadsheet.feed.database import Database
from broadsheet.feed.settings import Settings
from broadsheet.web import runs

number, what = int(sys.argv[1]), Path(os.environ["KITE_ORDERS"]).read_text()
if what == "die":
    os.kill(os.getpid(), 9)
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
db = Database(Settings.load().database)
runs.say(db, number, "log", {"line": "begun"})
if what == "wait":
    time.sleep(120)
runs.settle(db, number, "done")
"""
ENTRY = """
slug = "kite"
title = "A Kite"
authors = ["A. Author"]
published = 2024-01-02
arxiv = "2401.09999"
field = "dynamics"
tagline = "It flies."
summary = "It flies when there is wind."
module = "kites.kite"
experiment = "kites.kite"
snippet = "from kites import kite"
[[claims]]
id = "flies"
sentence = "It flies higher than a stone."
metric = "height"
unit = "m"
better = "higher"
baseline = "a stone"
measured = "outside"
[[caveats]]
id = "wind"
text = "Only where there is wind."
"""


@pytest.fixture(scope="module")
def kite(tmp_path_factory):
    """A third-party package with a paper of its own, installed for this process and its children."""
    site = tmp_path_factory.mktemp("site")
    package = site / "kites"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "kite.py").write_text(textwrap.dedent(EXPERIMENT))
    (package / "tiny.py").write_text(TINY)
    (package / "paper.toml").write_text(ENTRY)
    info = site / "kites-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kites\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[broadsheet.papers]\nkite = kites.kite\n")
    orders = site / "orders"
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    patch.setenv("KITE_ORDERS", str(orders))
    patch.syspath_prepend(str(site))
    catalog.reload()
    yield orders
    patch.undo()
    sys.modules.pop("kites", None)
    catalog.reload()


@pytest.fixture
def tiny(kite, monkeypatch):
    """Orders for a worker that starts in a moment."""
    monkeypatch.setattr(runs, "WORKER", "kites.tiny")
    return kite


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path)


@pytest.fixture
def db(settings):
    made = Database(settings.database)
    made.migrate()
    yield made
    made.close()


def until(supervisor, run_id, *states, seconds=90):
    """Look after the runs until this one is in one of the states."""
    end = time.monotonic() + seconds
    while (run := runs.find(supervisor.db, run_id)).state not in states:
        assert time.monotonic() < end, f"still {run.state}: {runs.events(supervisor.db, run_id)}"
        supervisor.tick()
        time.sleep(0.1)
    return run


def test_a_run_is_asked_for_by_slug_and_typed_options_only(db):
    for wrong, error in (
        (("no-such-paper", "small", 1, "cpu"), UnknownPaper),
        (("cd-t; rm -rf /", "small", 1, "cpu"), UnknownPaper),
        (("cd-t", "small --fresh", 1, "cpu"), InvalidInput),
        (("cd-t", "small", 0, "cpu"), InvalidInput),
        (("cd-t", "small", 51, "cpu"), InvalidInput),
        (("cd-t", "small", 1, "$(reboot)"), InvalidInput),
    ):
        with pytest.raises(error):
            runs.ask(db, OPERATOR, *wrong)
    unbuilt = next((entry.slug for entry in catalog.papers() if not entry.built), None)
    if unbuilt:
        with pytest.raises(NotBuilt):
            runs.ask(db, OPERATOR, unbuilt, "small", 1, "cpu")
    for nobody in (None, Account(id=1, name="a", role="reader"), Account(id=2, name="b", role="editor")):
        with pytest.raises(NotAllowed):
            runs.ask(db, nobody, "cd-t", "small", 1, "cpu")
    assert runs.latest(db) == []


@pytest.mark.slow
def test_a_run_tells_its_progress_claims_and_figures_and_is_done(kite, db, settings):
    kite.write_text("fly")
    supervisor = runs.Supervisor(db, settings)
    first, second = (runs.ask(db, OPERATOR, "kite", "small", 2, "cpu").id for _ in range(2))
    supervisor.tick()
    assert [runs.find(db, each).state for each in (first, second)] == ["running", "queued"]
    assert until(supervisor, first, "done", "failed", "lost").state == "done"
    told = runs.events(db, first)
    assert [event.number for event in told] == sorted({event.number for event in told})
    kinds = [event.kind for event in told]
    assert {"log", "progress", "claim", "figure", "state"} <= set(kinds)
    last = [event.content for event in told if event.kind == "claim"][-1]
    assert (last["id"], last["ours"], last["baseline"]) == ("flies", [2.0, 2.01], [1.0, 1.0])
    assert kinds.index("claim") < kinds.index("figure")
    assert (runs.folder(settings, first) / "height.png").read_bytes().startswith(b"\x89PNG")
    until(supervisor, second, "done")


@pytest.mark.slow
def test_a_worker_killed_while_it_measures_is_lost_and_a_broken_one_failed(kite, db, settings):
    supervisor = runs.Supervisor(db, settings)
    kite.write_text("die")
    lost = runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id
    assert until(supervisor, lost, "done", "failed", "lost").state == "lost"
    kite.write_text("fail")
    failed = runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id
    run = until(supervisor, failed, "done", "failed", "lost")
    assert (run.state, run.error) == ("failed", "RuntimeError: the string broke")


@pytest.mark.slow
def test_a_cancelled_run_stops_its_worker_in_the_middle_of_its_work(kite, db, settings):
    kite.write_text("wait")
    supervisor = runs.Supervisor(db, settings)
    run_id = runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id
    supervisor.tick()
    wait_for(lambda: any(e.kind == "progress" and e.content["done"] == 3 for e in runs.events(db, run_id)))
    runs.cancel(db, OPERATOR, run_id)
    wait_for(lambda: supervisor.tick() or runs.find(db, run_id).pid is None)
    assert runs.find(db, run_id).state == "cancelled"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def test_one_run_at_a_time_in_the_order_they_were_asked_for(tiny, db, settings):
    tiny.write_text("fly")
    supervisor = runs.Supervisor(db, settings)
    first, second = (runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id for _ in range(2))
    supervisor.tick()
    assert [runs.find(db, each).state for each in (first, second)] == ["running", "queued"]
    until(supervisor, second, "done", "lost")
    assert [runs.find(db, each).state for each in (first, second)] == ["done", "done"]
    assert runs.find(db, first).ended <= runs.find(db, second).started


def test_a_worker_that_dies_is_lost(tiny, db, settings):
    tiny.write_text("die")
    supervisor = runs.Supervisor(db, settings)
    run = until(supervisor, runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id, "done", "failed", "lost")
    assert (run.state, run.pid) == ("lost", None)
    assert runs.events(db, run.id)[-1].content == {"state": "lost"}


def test_a_cancelled_run_stops_and_one_that_waits_never_starts(tiny, db, settings):
    tiny.write_text("wait")
    supervisor = runs.Supervisor(db, settings)
    first, second = (runs.ask(db, OPERATOR, "kite", "small", 1, "cpu").id for _ in range(2))
    supervisor.tick()
    wait_for(lambda: any(event.kind == "log" for event in runs.events(db, first)))
    pid = runs.find(db, first).pid
    with pytest.raises(NotAllowed):
        runs.cancel(db, None, first)
    runs.cancel(db, OPERATOR, second)
    runs.cancel(db, OPERATOR, first)
    wait_for(lambda: supervisor.tick() or runs.find(db, first).pid is None)
    supervisor.tick()
    assert [runs.find(db, each).state for each in (first, second)] == ["cancelled", "cancelled"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert runs.find(db, second).started is None
    assert runs.cancel(db, OPERATOR, first).state == "cancelled"  # once more changes nothing


def test_a_run_whose_process_number_belongs_to_another_now_is_lost(db, settings):
    with db.write() as session:
        session.add(Run(slug="cd-t", state="running", pid=os.getpid(), started=now()))
    supervisor = runs.Supervisor(db, settings)
    supervisor.tick()
    assert runs.find(db, 1).state == "lost"
    os.kill(os.getpid(), 0)  # and this process was left alone


def test_two_supervisors_start_a_run_once(kite, db, settings, monkeypatch):
    started = []

    class Child:
        pid = 10**7

        def __init__(self, command, **_):
            started.append(command)

        def poll(self):
            return None

    monkeypatch.setattr(runs.subprocess, "Popen", Child)
    run = runs.ask(db, OPERATOR, "kite", "small", 1, "cpu")
    for supervisor in (runs.Supervisor(db, settings), runs.Supervisor(db, settings)):
        supervisor._start(run.id)
    assert started == [[sys.executable, "-m", runs.WORKER, str(run.id)]]


def events_of(stream):
    """Server-sent events as (id, event, data) until the end."""
    event = {}
    for line in stream.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif event:
            yield event.get("id"), event.get("event"), json.loads(event.get("data", "null"))
            event = {}


@pytest.mark.slow
def test_the_page_starts_a_run_and_streams_it(kite, serve, tmp_path):
    kite.write_text("fly")
    with serve(tmp_path / "home") as (browser, site):
        fill(site)  # the home is a copy of one that was stocked before there were kites
        page = browser.get("/papers/kite", follow_redirects=True)
        assert "A Kite" in page.text
        answer = browser.form("/papers/2401.09999", "/papers/2401.09999/run", preset="small", seeds="1", device="cpu")
        assert answer.headers["location"] == "/papers/2401.09999#run"
        assert browser.form("/papers/2401.09999", "/papers/2401.09999/run", seeds="1;ls").status_code == 422
        with browser.stream("GET", "/runs/1/events", timeout=90) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            told = list(events_of(stream))
        assert told[-1][1:] == ("end", {"state": "done"})
        kinds = [kind for _, kind, _ in told]
        assert {"progress", "claim", "figure", "log"} <= set(kinds)
        with browser.stream("GET", "/runs/1/events", headers={"last-event-id": told[-2][0]}) as stream:
            assert [kind for _, kind, _ in events_of(stream)] == ["end"]
        with browser.stream("GET", "/runs/1/events", headers={"x-forwarded-for": "203.0.113.9"}) as stream:
            assert "log" not in {kind for _, kind, _ in events_of(stream)}
        shown = browser.get("/runs/1").text
        assert "It flies higher than a stone." in shown
        assert browser.get("/runs/1/figures/height.png").content.startswith(b"\x89PNG")
        for name in ("output.txt", "..%2f..%2fsecret", "%2e%2e%2foutput.txt"):
            assert browser.get(f"/runs/1/figures/{name}").status_code == 404
        assert browser.get("/runs").text.count("<tr>") == 2
        assert browser.form("/papers/2401.09999", "/runs/1/cancel").status_code == 303
        assert browser.get("/api/v1/runs/1").json()["state"] == "done"
