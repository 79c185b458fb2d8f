"""Run a paper's experiment over seeds: measure, enter into the ledger, draw, judge."""

import hashlib
import importlib
import shutil
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
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


def run(
    slug: str,
    *,
    preset: str = "small",
    seeds: int = 5,
    first_seed: int = 0,
    device: str = "auto",
    ledger: Ledger | None = None,
    progress: Progress = SILENT,
    fresh: bool = False,
    jobs: int | None = 1,
) -> Outcome:
    """Measure a paper's claims.

    A run that was interrupted is taken up where it stopped when the same run is asked for again: finished seeds are not
    measured twice, and trainings go on from their checkpoints.

    Args:
        slug: the paper.
        preset: ``"small"`` (no download) or ``"full"`` (the paper's data and sizes).
        seeds: how many; the interval needs at least two.
        first_seed: the first of them; seeds that settings were chosen on should not be those that are reported.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
        ledger: None takes the user's own.
        progress: where the work shows itself.
        fresh: start anew even if an interrupted run could be taken up.
        jobs: seeds measured at a time, each in a process of its own with its share of the cores; None chooses by
            cores and memory. A script that asks for more than one needs ``if __name__ == "__main__":`` around it.

    Raises:
        UnknownPaper: no such slug.
        NotBuilt: the catalogue knows the paper but its method is not built.
        InvalidInput: no such preset, fewer than one seed or job, or a negative seed.
        DeviceUnavailable: the device is not there.
        DataMissing: ``full`` needs files that are not on this machine.
    """
    entry = paper(slug)
    if preset not in PRESETS:
        raise InvalidInput(f"preset {preset!r}: must be one of {', '.join(PRESETS)}")
    if seeds < 1:
        raise InvalidInput(f"seeds={seeds}: at least 1 is needed (2 or more for an interval)")
    if first_seed < 0:
        raise InvalidInput(f"first_seed={first_seed}: must be 0 or more")
    if jobs is not None and jobs < 1:
        raise InvalidInput(f"jobs={jobs}: at least 1 is needed")
    chosen = range(first_seed, first_seed + seeds)
    if not entry.built:
        raise NotBuilt(f"{entry.slug}: this paper is in the catalogue, but its method is not built yet")
    dev = machine.device(device)
    module = importlib.import_module(entry.experiment)
    ledger = ledger or Ledger()
    work = home() / "runs" / f"{entry.slug}-{preset}-{dev.type}-{_sources(entry)}"
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    described = machine.describe(dev)
    run_id = ledger.open_run(
        entry.slug,
        preset,
        list(chosen),
        device=described,
        versions=machine.versions(),
        commit=machine.commit(),
        machine=machine.machine(),
    )
    try:
        places = {seed: work / f"seed-{seed}" / "record" for seed in chosen}
        resumed = [seed for seed, done in places.items() if done.exists()]
        left = [
            (Context(entry, preset, seed, dev, done.parent, data_dir(), progress), done)
            for seed, done in places.items()
            if seed not in resumed
        ]
        at_once = min(jobs or automatic_jobs(dev, len(left)), max(1, len(left)))
        records: dict[int, Any] = {}
        with progress.task(entry.slug, total=seeds) as task:
            measured = run_seeds(measure_seed, left, at_once, progress) if at_once > 1 else _in_turn(left)
            with closing(measured):  # whatever happens here, no process is left behind
                for seed in chain(resumed, measured):
                    saved, _ = load_tree(places[seed])
                    ledger.record(run_id, [Measurement(**row) for row in saved["measurements"]])
                    records[seed] = saved["record"]
                    task.advance()
        measurements = ledger.measurements(run_id)
        figures = save_plates(
            home() / "figures" / f"{entry.slug}-{preset}", module.draw([records[seed] for seed in chosen])
        )
        ledger.close_run(run_id, "finished")
    except KeyboardInterrupt:
        ledger.close_run(run_id, "interrupted", "stopped by the user")
        raise
    except Exception as error:
        ledger.close_run(run_id, "failed", f"{type(error).__name__}: {error}")
        raise
    shutil.rmtree(work, ignore_errors=True)
    return Outcome(
        paper=entry,
        preset=preset,
        seeds=tuple(chosen),
        findings=judge(entry, preset, measurements),
        measurements=tuple(measurements),
        figures=tuple(figures),
        resumed=tuple(resumed),
        run=run_id,
        device=described,
    )


def _in_turn(contexts: list[tuple[Context, Path]]) -> Generator[int, None, None]:
    for context, done in contexts:
        measure_seed(context, done)
        yield context.seed


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
