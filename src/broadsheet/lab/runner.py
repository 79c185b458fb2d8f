"""Run a paper's experiment over seeds: measure, enter into the ledger, draw, judge."""

import hashlib
import importlib
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import broadsheet
from broadsheet.catalog import paper
from broadsheet.catalog.schema import Paper
from broadsheet.errors import BroadsheetError, InvalidInput, NotBuilt
from broadsheet.lab import machine
from broadsheet.lab.context import PRESETS, Context, data_dir, home
from broadsheet.lab.ledger import Ledger, Measurement
from broadsheet.lab.memory import PeakMemory
from broadsheet.lab.parallel import automatic_jobs, run_seeds
from broadsheet.lab.results import save_plates
from broadsheet.lab.verdicts import Finding, finding
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.progress import SILENT, Progress


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        paper: its catalogue entry.
        preset: ``"small"`` or ``"full"``.
        seeds: the seeds, in order.
        findings: one per claim of the preset, with interval and verdict.
        measurements: what the ledger holds of the run.
        figures: (file, caption) of every figure.
        resumed: seeds taken over from an earlier run that was interrupted.
        run: the ledger's id of the run.
        device: the device in words.
    """

    paper: Paper
    preset: str
    seeds: tuple[int, ...]
    findings: tuple[Finding, ...]
    measurements: tuple[Measurement, ...]
    figures: tuple[tuple[Path, str], ...]
    resumed: tuple[int, ...]
    run: int
    device: str

    @property
    def wall_s(self) -> float:
        """Wall time of all seeds together, seconds."""
        return sum({m.seed: m.wall_s for m in self.measurements}.values())

    @property
    def peak_mib(self) -> float:
        return max((m.peak_mib for m in self.measurements), default=0.0)


def judge(entry: Paper, preset: str, measurements: list[Measurement]) -> tuple[Finding, ...]:
    """The findings of a paper's claims from the measurements of one run, in the catalogue's order."""
    found = []
    for claim in entry.claims:
        of_claim = sorted((m for m in measurements if m.claim == claim.id), key=lambda m: m.seed)
        if preset in claim.presets and of_claim:
            found.append(finding(claim, [m.ours for m in of_claim], [m.baseline for m in of_claim]))
    return tuple(found)


def _sources(entry: Paper) -> str:
    """Digest of all code that a result depends on: an interrupted run is only taken up by the same code."""
    digest = hashlib.sha256()
    files = {*Path(broadsheet.__file__).parent.rglob("*.py")}
    for name in (entry.experiment, entry.module):
        located = importlib.import_module(name).__file__
        if located is not None:
            files.add(Path(located))
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def run(slug: str, **how: Any) -> Outcome:
    """Measure a paper's claims.

    Args:
        slug: the paper.
        **how: ``preset``, ``seeds``, ``first_seed``, ``device``, ``ledger``, ``progress``, ``fresh`` and ``jobs`` of
            :func:`run_papers`, which also says what is raised.
    """
    (outcome,) = run_papers([slug], **how)
    return outcome


def run_papers(
    slugs: Sequence[str],
    *,
    preset: str = "small",
    seeds: int = 5,
    first_seed: int = 0,
    device: str = "auto",
    ledger: Ledger | None = None,
    progress: Progress = SILENT,
    fresh: bool = False,
    jobs: int | None = 1,
) -> Generator[Outcome, None, None]:
    """Measure the claims of papers, all their seeds in one queue.

    A run that was interrupted is taken up where it stopped when the same run is asked for again: finished seeds are not
    measured twice, and trainings go on from their checkpoints.

    Args:
        slugs: the papers.
        preset: ``"small"`` (no download) or ``"full"`` (the paper's data and sizes).
        seeds: how many for each paper; the interval needs at least two.
        first_seed: the first of them; seeds that settings were chosen on should not be those that are reported.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        ledger: None takes the user's own.
        progress: where the work shows itself.
        fresh: start anew even if an interrupted run could be taken up.
        jobs: seeds measured at a time, each in a process of its own with its share of the cores; None chooses by
            cores and memory. A script that asks for more than one needs ``if __name__ == "__main__":`` around it.

    Yields:
        each paper's outcome as soon as its last seed is measured.

    Raises:
        UnknownPaper: no such slug.
        NotBuilt: the catalogue knows the paper but its method is not built.
        InvalidInput: no such preset, fewer than one seed or job, or a negative seed.
        DeviceUnavailable: the device is not there.
        DataMissing: ``full`` needs files that are not on this machine.
    """
    entries = [paper(slug) for slug in dict.fromkeys(slugs)]
    if preset not in PRESETS:
        raise InvalidInput(f"preset {preset!r}: must be one of {', '.join(PRESETS)}")
    if seeds < 1:
        raise InvalidInput(f"seeds={seeds}: at least 1 is needed (2 or more for an interval)")
    if first_seed < 0:
        raise InvalidInput(f"first_seed={first_seed}: must be 0 or more")
    if jobs is not None and jobs < 1:
        raise InvalidInput(f"jobs={jobs}: at least 1 is needed")
    for entry in entries:
        if not entry.built:
            raise NotBuilt(f"{entry.slug}: this paper is in the catalogue, but its method is not built yet")
    dev, chosen = machine.device(device), range(first_seed, first_seed + seeds)
    ledger = ledger or Ledger()
    open_runs: dict[str, _Run] = {}
    blamed = False  # whether the run that broke has been told so: the others were only broken off
    try:
        for entry in entries:
            open_runs[entry.slug] = _Run(entry, preset, chosen, dev, ledger, fresh)
        left = [(r.context(seed, progress), done) for r in open_runs.values() for seed, done in r.left()]
        at_once = min(jobs or automatic_jobs(dev, len(left)), max(1, len(left)))
        measured = run_seeds(measure_seed, left, at_once, progress) if at_once > 1 else _in_turn(left)
        what = entries[0].slug if len(entries) == 1 else f"{len(entries)} papers"
        with progress.task(what, total=seeds * len(entries)) as task, closing(measured):  # no process is left behind
            for slug in list(open_runs):
                task.advance(open_runs[slug].take_resumed())
                if open_runs[slug].complete:
                    yield open_runs.pop(slug).finish()
            for context, error in measured:
                if error is not None:
                    blamed = True
                    open_runs.pop(context.slug).stop(error)
                    raise error
                open_runs[context.slug].record(context.seed)
                task.advance()
                if open_runs[context.slug].complete:
                    yield open_runs.pop(context.slug).finish()
    except BaseException as error:
        for unfinished in open_runs.values():
            unfinished.stop(KeyboardInterrupt("another paper's run failed") if blamed else error)
        raise


class _Run:
    """One paper's run, from its entry in the ledger to its figures."""

    def __init__(self, entry: Paper, preset: str, seeds: range, dev: Any, ledger: Ledger, fresh: bool) -> None:
        self.entry, self.preset, self.seeds, self.device, self.ledger = entry, preset, seeds, dev, ledger
        self.work = home() / "runs" / f"{entry.slug}-{preset}-{dev.type}-{_sources(entry)}"
        if fresh:
            shutil.rmtree(self.work, ignore_errors=True)
        self.places = {seed: self.work / f"seed-{seed}" / "record" for seed in seeds}
        self.resumed = [seed for seed, done in self.places.items() if done.exists()]
        self.records: dict[int, Any] = {}
        self.described = machine.describe(dev)
        self.id = ledger.open_run(
            entry.slug,
            preset,
            list(seeds),
            device=self.described,
            versions=machine.versions(),
            commit=machine.commit(),
            machine=machine.machine(),
        )

    def left(self) -> list[tuple[int, Path]]:
        """Seeds that no earlier run has measured, and where each is put down."""
        return [(seed, done) for seed, done in self.places.items() if seed not in self.resumed]

    def context(self, seed: int, progress: Progress) -> Context:
        return Context(self.entry, self.preset, seed, self.device, self.places[seed].parent, data_dir(), progress)

    def take_resumed(self) -> int:
        """Enter the seeds that an interrupted run had finished; how many."""
        for seed in self.resumed:
            self.record(seed)
        return len(self.resumed)

    def record(self, seed: int) -> None:
        saved, _ = load_tree(self.places[seed])
        self.ledger.record(self.id, [Measurement(**row) for row in saved["measurements"]])
        self.records[seed] = saved["record"]

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.seeds)

    def stop(self, error: BaseException) -> None:
        """Say in the ledger why the run did not finish."""
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            self.ledger.close_run(self.id, "interrupted", str(error) or "stopped by the user")
        else:
            self.ledger.close_run(self.id, "failed", f"{type(error).__name__}: {error}")

    def finish(self) -> Outcome:
        """Draw, close and judge."""
        try:
            measurements = self.ledger.measurements(self.id)
            plates = importlib.import_module(self.entry.experiment).draw([self.records[seed] for seed in self.seeds])
            figures = save_plates(home() / "figures" / f"{self.entry.slug}-{self.preset}", plates)
        except BaseException as error:
            self.stop(error)
            raise
        self.ledger.close_run(self.id, "finished")
        shutil.rmtree(self.work, ignore_errors=True)
        return Outcome(
            paper=self.entry,
            preset=self.preset,
            seeds=tuple(self.seeds),
            findings=judge(self.entry, self.preset, measurements),
            measurements=tuple(measurements),
            figures=tuple(figures),
            resumed=tuple(self.resumed),
            run=self.id,
            device=self.described,
        )


def _in_turn(contexts: list[tuple[Context, Path]]) -> Generator[tuple[Context, BaseException | None], None, None]:
    for context, done in contexts:
        try:
            measure_seed(context, done)
        except BaseException as error:
            yield context, error
        else:
            yield context, None


def measure_seed(context: Context, done: Path) -> None:
    """Measure one seed and write what it measured and its record to ``done``, whole or not at all."""
    module = importlib.import_module(context.paper.experiment)
    started = time.perf_counter()
    with PeakMemory(context.device) as memory:
        record = module.run(context)
    wall_s = time.perf_counter() - started
    if missing := context.missing():
        raise BroadsheetError(f"{context.slug}: the experiment did not measure {', '.join(missing)}")
    units = {claim.id: claim.unit for claim in context.paper.claims}
    rows = [
        {
            "claim": claim,
            "seed": context.seed,
            "ours": ours,
            "baseline": baseline,
            "unit": units[claim],
            "wall_s": wall_s,
            "peak_mib": memory.peak_mib,
            "details": details,
        }
        for claim, (ours, baseline, details) in context.measured.items()
    ]
    save_tree(done, {"record": record, "measurements": rows})
