"""Run the benchmarks, write ``results/benchmarks.json`` and the tables in ``docs/benchmarks.md`` and the README.

    python benchmarks/collect.py                 run everything, then write
    python benchmarks/collect.py --only PAPER    run one paper's benchmarks and replace its groups
    python benchmarks/collect.py --table         only write the tables again

A group's name is ``slug: what is done``; its tests are the contenders, and the one called ``test_ours...`` is what the
others are set beside. The id of a parameter called ``name`` belongs to the contender's name, every other one to the
group's. Times are medians taken side by side in one process; memory is the rise of the resident size during one call.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from broadsheet.lab import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks.json"
README = ROOT / "README.md"  # the largest size of each comparison
PAGE = ROOT / "docs" / "benchmarks.md"  # all of them
START, END = "<!-- benchmarks: written by benchmarks/collect.py -->", "<!-- /benchmarks -->"


def measure(only: str = "") -> dict:
    """Run pytest-benchmark in one process and keep medians and peak memory."""
    chosen = ROOT / "benchmarks" / (f"test_{only.replace('-', '_')}.py" if only else "")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(chosen), "--benchmark-only", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--benchmark-json={raw}", "-o", "timeout=0"], check=True, cwd=ROOT)
        runs = json.loads(raw.read_text())["benchmarks"]
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "groups": grouped(runs),
    }


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """pytest-benchmark's runs as group -> contenders."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        name = run["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        group = run["group"]
        if run["params"] and "name" in run["params"]:
            name = f"{name} {run['params']['name']}"
        elif run["param"]:
            group = f"{group}, {run['param']}"
        row = {"name": name, "median_s": run["stats"]["median"], "rounds": run["stats"]["rounds"], **run["extra_info"]}
        groups.setdefault(group, []).append(row)
    return groups


def seconds(value: float) -> str:
    """A duration with its fitting unit."""
    if value >= 100:
        return f"{value / 60:.3g} min"
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if float(f"{value:.3g}") >= scale:
            return f"{float(f'{value / scale:.3g}'):g} {unit}"
    return f"{value * 1e9:.3g} ns"


def memory(row: dict) -> str:
    """A contender's memory with its fitting unit."""
    peak = row.get("peak_mib")
    if peak is None:
        return "–"
    return f"{peak / 1024:.1f} GiB" if peak >= 1024 else "< 1 MiB" if peak < 1 else f"{peak:.0f} MiB"


def times(ratio: float) -> str:
    """How many times as long."""
    return f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f} ×"


def largest(groups: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Of the groups that differ in size only, the last one that has all contenders."""
    chosen: dict[str, str] = {}
    for group, rows in groups.items():
        work = group.rpartition(", (")[0] or group
        if work not in chosen or len(rows) >= len(groups[chosen[work]]):
            chosen[work] = group
    return {group: groups[group] for group in chosen.values()}


def table(content: dict, brief: bool = False) -> str:
    """The table in Markdown: one line per contender beside ours, by paper and what is done.

    Args:
        content: of the results' file.
        brief: the largest size of each comparison only.
    """
    groups = largest(content["groups"]) if brief else content["groups"]
    lines = [
        "| paper | what | ours | beside it | time | of ours | memory, ours | memory |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for group, rows in sorted(groups.items(), key=lambda item: item[0].partition(":")[0]):
        slug, _, what = group.partition(": ")
        ours = next((row for row in rows if "ours" in row["name"].split()), rows[0])
        others = sorted((row for row in rows if row is not ours), key=lambda row: -row["median_s"])
        if label := _plain(ours["name"]):
            what = f"{what} ({label})"
        left = f"| `{slug}` | {what} | {seconds(ours['median_s'])}"
        for other in others:
            ratio = times(other["median_s"] / ours["median_s"])
            right = f"{seconds(other['median_s'])} | {ratio} | {memory(ours)} | {memory(other)} |"
            lines.append(f"{left} | {other['name']} | {right}")
        if not others:
            lines.append(f"{left} | – | – | – | {memory(ours)} | – |")
    lines.append(
        f"\nMeasured side by side in one process on {content['machine']}, torch {content['versions']['torch']}."
    )
    return "\n".join(lines)


def _plain(name: str) -> str:
    """Our contender's name without the word that marks it."""
    return " ".join(word for word in name.split() if word != "ours")


def write_between(page: Path, text: str, first: str = START, last: str = END) -> None:
    """Replace what stands between two marks in a file."""
    before, start, rest = page.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (start and end):
        raise SystemExit(f"{page}: the table stands between the lines {first!r} and {last!r}; one of them is missing")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}")


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the tables from the last results")
    parser.add_argument("--only", metavar="PAPER", default="", help="run one paper's benchmarks, keep the others")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the results file (default: the repository's)")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the short table")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the whole table")
    chosen = parser.parse_args()
    if not chosen.table:
        content = measure(chosen.only)
        if chosen.results.exists():  # the feed's figures stay: feed_scale.py writes them
            old = json.loads(chosen.results.read_text())
            content = old | content
            if chosen.only:
                content["groups"] = old["groups"] | content["groups"]
        chosen.results.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(chosen.results.read_text())
    write_between(chosen.readme, table(content, brief=True))
    write_between(chosen.page, table(content))
    print(table(content))


if __name__ == "__main__":
    main()
