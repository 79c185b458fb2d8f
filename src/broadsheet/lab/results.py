"""Published results: ``results/<slug>.json`` and ``results/<slug>/*.png``, written by runs, whole or not at all."""

import json
import os
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broadsheet.catalog import paper
from broadsheet.catalog.schema import Paper
from broadsheet.errors import ResultsError
from broadsheet.lab import machine
from broadsheet.lab.context import Plate
from broadsheet.lab.verdicts import Finding, finding
from broadsheet.nn.checkpoint import replace_folder

if TYPE_CHECKING:
    from broadsheet.lab.runner import Outcome


def results_dir() -> Path:
    """``BROADSHEET_RESULTS``, else the checkout's ``results``, else those that the package was installed with."""
    chosen = os.environ.get("BROADSHEET_RESULTS")
    if chosen:
        return Path(chosen).expanduser()
    checkout = Path(__file__).resolve().parents[3] / "results"
    return checkout if checkout.is_dir() else Path(str(files("broadsheet") / "_results"))


def require_writable(folder: Path) -> None:
    """Refuse a results folder that cannot be written to, before the work is done rather than after.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(
            f"{folder}: the results folder cannot be written to ({error.strerror or error}); set BROADSHEET_RESULTS"
        ) from error


def save_plates(folder: Path, plates: list[Plate]) -> list[tuple[Path, str]]:
    """Save figures as PNG files, replacing the folder as a whole.

    Raises:
        ResultsError: the disk is full or the folder cannot be written to; what stood there stays.
    """

    def write(fresh: Path) -> None:
        for plate in plates:
            plate.figure.savefig(fresh / f"{plate.name}.png", dpi=160, bbox_inches="tight", metadata={"Software": None})

    try:
        replace_folder(folder, write)
    except OSError as error:
        raise ResultsError(f"{folder}: the figures could not be written ({error.strerror or error})") from error
    return [(folder / f"{plate.name}.png", plate.caption) for plate in plates]


@dataclass(frozen=True)
class Published:
    """A paper's published result.

    Attributes:
        paper: its catalogue entry.
        findings: one per claim that was measured; intervals and verdicts are computed anew from the measurements.
        figures: (file, caption), at the end those of other papers' results that its entry names.
        facts: preset, seeds, date, device, machine, versions, commit, wall_s, peak_mib.
    """

    paper: Paper
    findings: tuple[Finding, ...]
    figures: tuple[tuple[Path, str], ...]
    facts: dict[str, Any]


def publish(outcome: "Outcome", folder: Path | None = None) -> Path:
    """Write a run's result into the results folder.

    Raises:
        ResultsError: the folder cannot be written to.
    """
    folder = folder or results_dir()
    require_writable(folder)
    slug = outcome.paper.slug
    content = {
        "slug": slug,
        "preset": outcome.preset,
        "seeds": list(outcome.seeds),
        "date": datetime.now(UTC).date().isoformat(),
        "device": outcome.device,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "wall_s": round(outcome.wall_s, 1),
        "peak_mib": round(outcome.peak_mib, 1),
        "claims": [
            {
                "id": found.claim.id,
                "verdict": str(found.verdict),
                "effect": found.effect,
                "low": found.low,
                "high": found.high,
                "ours": list(found.ours),
                "baseline": list(found.baseline),
                "unit": found.claim.unit,
            }
            for found in outcome.findings
        ],
        "figures": [{"file": f"{slug}/{file.name}", "caption": caption} for file, caption in outcome.figures],
    }

    def write(fresh: Path) -> None:
        for file, _ in outcome.figures:
            (fresh / file.name).write_bytes(file.read_bytes())

    target = folder / f"{slug}.json"
    part = target.with_suffix(".json.part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n")
        replace_folder(folder / slug, write)
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ResultsError(f"{target}: the result could not be written ({error.strerror or error})") from error
    return target


def published(slug: str, folder: Path | None = None) -> Published | None:
    """The published result of a paper, or None.

    Raises:
        ResultsError: the file is damaged.
    """
    folder = folder or results_dir()
    entry = paper(slug)
    file = folder / f"{entry.slug}.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        measured = {claim["id"]: claim for claim in content["claims"]}
        findings = tuple(
            finding(claim, measured[claim.id]["ours"], measured[claim.id]["baseline"])
            for claim in entry.claims
            if claim.id in measured
        )
        figures = _figures(folder, content)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{file}: the published result is damaged ({type(error).__name__}: {error}); publish it again with"
            f" `broadsheet run {entry.slug} --publish`"
        ) from error
    facts = {key: value for key, value in content.items() if key not in ("claims", "figures", "slug")}
    return Published(entry, findings, (*figures, *_drawings(entry, folder)), facts)


def _figures(folder: Path, content: dict[str, Any]) -> tuple[tuple[Path, str], ...]:
    return tuple((folder / figure["file"], figure["caption"]) for figure in content["figures"])


def _drawings(entry: Paper, folder: Path) -> list[tuple[Path, str]]:
    """Figures of other papers' results that this paper's entry names; those that are not published are left out."""
    found = []
    for name in entry.drawings:
        file = folder / f"{name.partition('/')[0]}.json"
        try:
            figures = _figures(folder, json.loads(file.read_text()))
        except (OSError, KeyError, TypeError, ValueError):
            continue
        found += [(path, caption) for path, caption in figures if path == folder / f"{name}.png"]
    return found
