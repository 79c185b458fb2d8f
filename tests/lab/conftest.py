"""A tiny paper of its own, outside the catalogue, and folders that keep the user's own untouched."""

import sys
import textwrap

import pytest

from broadsheet.catalog.schema import Paper

EXPERIMENT = '''
"""A paper whose truth is known: `true` is, `false` is not, `open` cannot be told."""
import os, signal
import numpy as np
from matplotlib.figure import Figure
from broadsheet.lab import Context, Plate

CALLS, STOP = [], None

def run(ctx):
    CALLS.append(ctx.seed)
    if STOP == ctx.seed:
        raise KeyboardInterrupt
    for what, act in (("STOP", signal.SIGINT), ("KILL", signal.SIGKILL)):  # for seeds in processes of their own
        if os.environ.get(f"TOY_{what}") == str(ctx.seed):
            os.kill(os.getpid(), act)
    if os.environ.get("TOY_FAIL") == str(ctx.seed):
        raise ValueError("a toy breaks")
    with ctx.progress.task("drawing", total=2) as task:
        task.advance(loss=0.5)
    rng = np.random.default_rng(ctx.seed)
    ctx.measure("true", ours=1 + 0.01 * rng.normal(), baseline=0.0, draws=3)
    ctx.measure("false", ours=-1 + 0.01 * rng.normal(), baseline=0.0)
    ctx.measure("open", ours=rng.normal())
    return {"seed": ctx.seed, "curve": rng.normal(size=4)}

def draw(records):
    figure = Figure()
    figure.subplots().plot(np.mean([r["curve"] for r in records], axis=0))
    return [Plate("curve", figure, "The mean curve.")]
'''


def toy(**changes):
    claim = {"sentence": "It is so.", "metric": "m", "better": "higher", "measured": "draws"}
    facts = {
        "slug": "toy-paper",
        "title": "A Toy",
        "authors": ["A. Author"],
        "published": "2024-01-01",
        "arxiv": "2401.00001",
        "field": "geometry",
        "tagline": "t",
        "summary": "s",
        "module": "toy_experiment",
        "experiment": "toy_experiment",
        "snippet": "import toy",
        "claims": [
            {**claim, "id": "true", "baseline": "none"},
            {**claim, "id": "false", "baseline": "none"},
            {**claim, "id": "open", "threshold": 0.0},
        ],
        "caveats": [{"id": "c", "text": "It is a toy.", "shown_by": "open"}],
    }
    return Paper.model_validate({**facts, **changes})


@pytest.fixture
def toy_paper(monkeypatch, tmp_path):
    """The toy paper, known to catalogue, runner and results; home and results folders in ``tmp_path``."""
    package = tmp_path / "site"
    package.mkdir()
    (package / "toy_experiment.py").write_text(textwrap.dedent(EXPERIMENT))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "toy_experiment", raising=False)
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BROADSHEET_RESULTS", str(tmp_path / "results"))
    entry = toy()
    from broadsheet.lab import results, runner

    for module in (runner, results):
        monkeypatch.setattr(module, "paper", lambda slug: entry)
    yield entry
    sys.modules.pop("toy_experiment", None)
