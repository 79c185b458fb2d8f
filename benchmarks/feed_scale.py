"""The feed at a million papers: import rate, size and memory of the index, time of a search at 1, 8 and 32 clients.

    python benchmarks/feed_scale.py FOLDER [--papers 1000000] [--seconds 20] [--processes 2] [--write]

The folder keeps database and index: started again, it goes on where it stopped. Each step's figures are kept in
``FOLDER/figures.json``; ``--write`` puts them into ``results/benchmarks.json`` under "feed", and into the docs. Papers,
queries and vectors are made (``made_papers.py``); each query is really embedded, and that is in its time. Queries never
repeat, so no cache of queries helps.
"""

import argparse
import json
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from collect import PAGE, RESULTS, write_between
from made_papers import MadeVectors, queries, records

from broadsheet.feed.database import Database
from broadsheet.feed.importing import import_records
from broadsheet.feed.search import SearchIndex
from broadsheet.lab import machine
from broadsheet.nn.progress import live

MIB = 2**20
START, END = "<!-- feed: written by benchmarks/feed_scale.py -->", "<!-- /feed -->"


def opened(folder: Path) -> tuple[Database, SearchIndex]:
    """Database and index of the folder, with the real encoder."""
    database = Database(f"sqlite:///{folder / 'feed.sqlite'}")
    return database, SearchIndex(folder / "index", database)


def fill(folder: Path, n: int) -> dict[str, Any]:
    """Import the papers."""
    database = Database(f"sqlite:///{folder / 'feed.sqlite'}")
    database.migrate()
    started = time.perf_counter()
    with live() as progress:
        report = import_records(database, records(n), progress)
    seconds = time.perf_counter() - started
    database.close()
    size = (folder / "feed.sqlite").stat().st_size / MIB
    return {"papers": n, "report": str(report), "papers_per_s": n / seconds, "database_mib": size}


def index(folder: Path) -> dict[str, Any]:
    """Index words and vectors."""
    database = Database(f"sqlite:///{folder / 'feed.sqlite'}")
    held = SearchIndex(folder / "index", database, MadeVectors())
    started = time.perf_counter()
    with held._writing() as generation, live() as progress:
        report, fresh = held._take_in(generation, progress)
    words = time.perf_counter()
    with live() as progress:
        report = held._make_vectors(report, fresh, progress)
    ended = time.perf_counter()
    started_again = time.perf_counter()
    held.update()
    sizes = {
        name: sum(file.stat().st_size for file in (folder / "index").rglob(f"{name}/*")) / MIB
        for name in ("words", "vectors")
    }
    return {
        "report": str(report),
        "words_papers_per_s": report.papers / (words - started),
        "vectors_papers_per_s": report.vectors / (ended - words),
        "update_without_changes_s": time.perf_counter() - started_again,
        **{f"{name}_mib": size for name, size in sizes.items()},
        "peak_rss_mib": psutil.Process().memory_info().rss / MIB,
    }


def measure(folder: Path, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Searches of this many clients in this process, each asking again as soon as it is answered."""
    _, held = opened(folder)
    for query in queries(20, seed=seed + 1_000):
        held.search(query)
    asked, times, lock = iter(queries(200_000, seed=seed)), [], threading.Lock()
    before, stop = time.process_time(), time.perf_counter() + seconds

    def client() -> None:
        while time.perf_counter() < stop:
            with lock:
                query = next(asked)
            started = time.perf_counter()
            held.search(query)
            times.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory = psutil.Process().memory_full_info()
    return {
        "times": times,
        "cpu_s": time.process_time() - before,
        "rss_mib": memory.rss / MIB,
        "own_mib": memory.uss / MIB,
    }


def clients(folder: Path, n: int, seconds: float, processes: int) -> dict[str, Any]:
    """Percentiles over all clients, divided among processes as the server's workers are."""
    shares = [n // processes + (number < n % processes) for number in range(min(processes, n))]
    load = os.getloadavg()[0]
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(measure, folder, share, seconds, 10 + number) for number, share in enumerate(shares)]
        parts = [job.result() for job in jobs]
    times = np.array([each for part in parts for each in part["times"]]) * 1e3
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {
        "clients": n,
        "processes": len(shares),
        "searches": len(times),
        "per_s": len(times) / seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "cpu_ms_a_search": 1e3 * sum(part["cpu_s"] for part in parts) / len(times),
        "own_mib_a_process": max(part["own_mib"] for part in parts),
        "rss_mib_a_process": max(part["rss_mib"] for part in parts),
        "load_before": load,
    }


def floor(folder: Path, n: int = 300) -> dict[str, Any]:
    """One client, and each part of a search by itself: what no arrangement of the parts can undercut."""
    from broadsheet.feed.search.index import shared_queries
    from broadsheet.feed.search.look import DEPTH, Look
    from broadsheet.feed.search.words import parse

    _, held = opened(folder)
    generation, encoder = held._current(), shared_queries()
    vectors = encoder.encoder.embed(queries(n, seed=5))
    parts: dict[str, Any] = {
        "embedding": lambda query, _: encoder.vector(query),
        "neighbours": lambda _, vector: Look(generation.words).near(vector, generation.vectors.view(), DEPTH),
        "words": lambda query, _: held.search(query, mode="words"),
        "whole": lambda query, _: held.search(query),
    }
    figures = {}
    for number, (name, work) in enumerate(parts.items()):
        asked = queries(n, seed=20 + number)
        times, before = [], time.process_time()
        for query, vector in zip(asked, vectors, strict=True):
            assert parse(query)
            started = time.perf_counter()
            work(query, vector)
            times.append(time.perf_counter() - started)
        cpu = (time.process_time() - before) / n
        figures[name] = {
            "p50_ms": np.median(times) * 1e3,
            "p95_ms": np.percentile(times, 95) * 1e3,
            "cpu_ms": cpu * 1e3,
        }
    return figures


def recall(folder: Path, n: int = 100) -> dict[str, Any]:
    """Share of the 10 and the 100 nearest papers that the graph finds, against comparing with all of them."""
    from broadsheet.feed.search.index import shared_queries

    _, held = opened(folder)
    view = held._current().vectors.view()
    every = view.rows.keys
    found = {10: [], 100: []}
    for vector in shared_queries().encoder.embed(queries(n, seed=6)):
        scores = np.concatenate(
            [np.asarray(view.matrix[rows], np.float32) @ vector for rows in np.array_split(view.rows.rows, 50)]
        )
        for k in found:
            nearest = set(every[np.argpartition(-scores, k)[:k]].tolist())
            found[k].append(len(nearest & set(view.nearest(vector, 100)[0][: max(k, 10)].tolist())) / k)
    return {f"recall_at_{k}": float(np.mean(values)) for k, values in found.items()}


def table(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    made, held, found = figures["import"], figures["index"], figures["recall"]
    lines = [
        "| what | figure |",
        "|---|---:|",
        f"| papers | {made['papers']:,} |",
        f"| import | {made['papers_per_s']:,.0f} papers a second |",
        f"| database | {made['database_mib'] / 1024:.1f} GiB |",
        f"| indexing, words | {held['words_papers_per_s']:,.0f} papers a second |",
        f"| indexing, vectors that are there already | {held['vectors_papers_per_s']:,.0f} papers a second |",
        f"| index of words | {held['words_mib'] / 1024:.2f} GiB |",
        f"| index of vectors | {held['vectors_mib'] / 1024:.2f} GiB |",
        f"| of the 10 (100) nearest papers, found | {found['recall_at_10']:.3f} ({found['recall_at_100']:.3f}) |",
        "",
        "| clients | processes | searches a second | p50 | p95 | p99 | processor time of one | memory of a process |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in figures.items():
        if name.startswith("clients"):
            times = " | ".join(f"{row[key]:.3g} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "cpu_ms_a_search"))
            memory = f"{row['own_mib_a_process']:,.0f} MiB"
            lines.append(f"| {row['clients']} | {row['processes']} | {row['per_s']:.0f} | {times} | {memory} |")
    lines += ["", "| one client, part by part | p50 | p95 | processor time |", "|---|---:|---:|---:|"]
    for name, row in figures["floor"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.3g} ms" for key in ("p50_ms", "p95_ms", "cpu_ms")) + " |")
    return "\n".join([*lines, f"\nMeasured on {figures['machine']}."])


def main() -> None:
    """Fill, index, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--papers", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the figures into results/benchmarks.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    steps = {
        "import": lambda: fill(given.folder, given.papers),
        "index": lambda: index(given.folder),
        "recall": lambda: recall(given.folder),
        "floor": lambda: floor(given.folder),
    }
    for processes in sorted({1, given.processes}):
        for n in (1, 8, 32):
            steps[f"clients {n}, processes {processes}"] = lambda n=n, processes=processes: clients(
                given.folder, n, given.seconds, processes
            )
    for name, work in steps.items():
        if name not in figures:
            figures[name] = work()
            figures["machine"] = machine.machine()
            file.write_text(json.dumps(figures, indent=1) + "\n")
        print(name, json.dumps(figures[name]), flush=True)
    if given.write:
        content = json.loads(RESULTS.read_text())
        content["feed"] = figures
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        write_between(PAGE, table(figures), START, END)


if __name__ == "__main__":
    main()
