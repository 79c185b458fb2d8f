"""Seeds in processes of their own: the same numbers, and the same honesty when something ends them."""

import importlib
import multiprocessing
from contextlib import contextmanager

import pytest

from broadsheet.errors import BroadsheetError, InvalidInput
from broadsheet.lab import parallel, run, run_papers, runner
from broadsheet.lab.ledger import Ledger
from broadsheet.nn.progress import Progress, Task


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.told, self.ended = {}, []

    @contextmanager
    def task(self, description, total=None):
        told = self.told.setdefault(description, [total, 0])

        class Counted(Task):
            def advance(self, n=1, **numbers):
                told[1] += n

        yield Counted()
        self.ended.append(description)


def test_several_at_a_time_measure_what_one_after_the_other_does(toy_paper):
    heard = Heard()
    alone, together = run("toy-paper", seeds=4), run("toy-paper", seeds=4, jobs=2, progress=heard)
    for first, second in zip(alone.findings, together.findings, strict=True):
        assert (first.ours, first.effect, first.verdict) == (second.ours, second.effect, second.verdict)
    assert heard.told == {"toy-paper": [4, 4], **{f"toy-paper, seed {seed}: drawing": [2, 1] for seed in range(4)}}
    assert sorted(heard.ended) == sorted(heard.told)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("what", "error", "words", "status"),
    [
        ("STOP", KeyboardInterrupt, None, "interrupted"),
        pytest.param("KILL", BroadsheetError, "was killed", "failed", marks=pytest.mark.slow),
        pytest.param("FAIL", ValueError, "a toy breaks", "failed", marks=pytest.mark.slow),
    ],
)
def test_what_ends_a_process_is_entered_and_the_rest_is_taken_up(toy_paper, monkeypatch, what, error, words, status):
    monkeypatch.setenv(f"TOY_{what}", "3")
    with pytest.raises(error, match=words):
        run("toy-paper", seeds=4, jobs=2)
    assert multiprocessing.active_children() == []
    (stopped,) = Ledger().runs()
    assert stopped.status == status
    assert 3 not in {m.seed for m in Ledger().measurements(stopped.id)}
    monkeypatch.delenv(f"TOY_{what}")
    outcome = run("toy-paper", seeds=4)
    assert 3 not in outcome.resumed
    assert all(found.seeds == 4 for found in outcome.findings)


@pytest.fixture
def two_papers(toy_paper, monkeypatch):
    """The toy paper and another one of the same experiment."""
    both = {"toy-paper": toy_paper, "toy-two": toy_paper.model_copy(update={"slug": "toy-two"})}
    monkeypatch.setattr(runner, "paper", lambda slug: both[slug])
    return list(both)


@pytest.mark.parametrize("jobs", [1, 2])
def test_papers_share_one_queue(two_papers, jobs):
    heard = Heard()
    outcomes = {o.paper.slug: o for o in run_papers(two_papers, seeds=3, jobs=jobs, progress=heard)}
    assert set(outcomes) == {"toy-paper", "toy-two"}
    assert heard.told["2 papers"] == [6, 6]
    first, second = outcomes.values()
    assert [f.ours for f in first.findings] == [f.ours for f in second.findings]
    assert first.figures[0][0] != second.figures[0][0]
    assert [r.status for r in Ledger().runs()] == ["finished", "finished"]


def test_a_paper_that_breaks_is_told_from_those_it_breaks_off(two_papers, monkeypatch):
    experiment = importlib.import_module("toy_experiment")
    whole = experiment.run
    monkeypatch.setattr(experiment, "run", lambda ctx: 1 / 0 if ctx.slug == "toy-two" else whole(ctx))
    with pytest.raises(ZeroDivisionError):
        list(run_papers(["toy-two", "toy-paper"], seeds=2))
    status = {r.slug: (r.status, r.message) for r in Ledger().runs()}
    assert status["toy-two"][0] == "failed"
    assert status["toy-paper"] == ("interrupted", "another paper's run failed")
    done = next(run_papers(["toy-paper", "toy-two"], seeds=2))  # the first is finished before the second breaks
    assert done.paper.slug == "toy-paper"


def test_how_many_by_itself(toy_paper, monkeypatch):
    monkeypatch.setattr(parallel, "_cores", lambda: 8)
    memory = type("Memory", (), {"available": 10 * 2**30})
    monkeypatch.setattr(parallel.psutil, "virtual_memory", lambda: memory)
    assert parallel.automatic_jobs("cpu", 5) == 3  # three times three GiB
    assert parallel.automatic_jobs("cpu", 2) == 2
    assert parallel.automatic_jobs("cuda", 5) == 1
    with pytest.raises(InvalidInput, match="jobs=0"):
        run("toy-paper", jobs=0)
