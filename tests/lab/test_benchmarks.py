"""The benchmarks' collector: what is made of pytest-benchmark's runs, and what it leaves alone."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "collect.py")
assert spec is not None and spec.loader is not None
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)


def run(name, group, median=1.0, params=None, param=None, **extra):
    stats = {"median": median, "rounds": 3}
    return {"name": name, "group": group, "params": params, "param": param, "stats": stats, "extra_info": extra}


def content(groups):
    return {"machine": "a machine", "versions": {"torch": "2.0"}, "commit": "abc", "groups": groups}


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{collect.START}\nold table\n{collect.END}\nafter\n")
    return path


def test_runs_are_grouped_by_what_is_done():
    groups = collect.grouped(
        [
            run("test_ours[small]", "slug: work", 0.5, {"size": 2}, "2", peak_mib=3.0),
            run("test_path_patching[small]", "slug: work", 1.5, {"size": 2}, "2"),
            run("test_ours[large]", "slug: work", 4.0, {"size": 9}, "9"),
            run("test_ours[slq]", "slug: entropy", 2.0, {"name": "slq"}, "slq"),
            run("test_plain", "other: work"),
        ]
    )
    assert groups == {
        "slug: work, 2": [
            {"name": "ours", "median_s": 0.5, "rounds": 3, "peak_mib": 3.0},
            {"name": "path patching", "median_s": 1.5, "rounds": 3},
        ],
        "slug: work, 9": [{"name": "ours", "median_s": 4.0, "rounds": 3}],
        "slug: entropy": [{"name": "ours slq", "median_s": 2.0, "rounds": 3}],
        "other: work": [{"name": "plain", "median_s": 1.0, "rounds": 3}],
    }


def test_the_table_sets_ours_beside_each_other_contender():
    rows = [
        {"name": "quick one", "median_s": 0.0005, "peak_mib": 0.2},
        {"name": "ours slq", "median_s": 0.02, "peak_mib": 2048.0},
        {"name": "slow one", "median_s": 240.0},
    ]
    lines = collect.table(content({"slug: work, 2": rows, "slug: alone": [{"name": "plain", "median_s": 3.0}]}))
    lines = lines.splitlines()
    assert lines[2:5] == [
        "| `slug` | work, 2 (slq) | 20 ms | slow one | 4 min | 12000 × | 2.0 GiB | – |",
        "| `slug` | work, 2 (slq) | 20 ms | quick one | 500 µs | 0.03 × | 2.0 GiB | < 1 MiB |",
        "| `slug` | alone (plain) | 3 s | – | – | – | – | – |",
    ]
    assert lines[-1] == "Measured side by side in one process on a machine, torch 2.0."


def test_the_short_table_holds_the_largest_size_of_each_comparison():
    two = [{"name": "ours", "median_s": 1.0}, {"name": "other", "median_s": 2.0}]
    groups = {"a: work, (2, 4)": two, "a: work, (3, 4)": two, "a: work, (9, 9)": two[:1], "a: entropy, 5 × 5": two[:1]}
    assert list(collect.largest(groups)) == ["a: work, (3, 4)", "a: entropy, 5 × 5"]
    short, whole = (collect.table(content(groups), brief) for brief in (True, False))
    assert [line.count("work, (") for line in (short, whole)] == [1, 3]


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.9996, "1 s"), (0.9994, "999 ms"), (99.96, "100 s"), (240.0, "4 min"), (1.234e-4, "123 µs"), (5e-7, "500 ns")],
)
def test_durations_have_three_digits(value, words):
    assert collect.seconds(value) == words


def test_the_table_takes_the_old_ones_place(readme):
    one = content({"slug: work": [{"name": "ours", "median_s": 1.0}]})
    collect.write_between(readme, collect.table(one))
    assert readme.read_text() == f"before\n{collect.START}\n{collect.table(one)}\n{collect.END}\nafter\n"


@pytest.mark.parametrize("text", ["no marks", f"{collect.START}\nno end", f"no start\n{collect.END}"])
def test_a_readme_without_both_marks_is_left_as_it_is(readme, text):
    readme.write_text(text)
    with pytest.raises(SystemExit, match="one of them is missing"):
        collect.write_between(readme, "new table")
    assert readme.read_text() == text


def test_one_papers_benchmarks_leave_the_other_groups_alone(readme, tmp_path, monkeypatch, capsys):
    results, page = tmp_path / "benchmarks.json", tmp_path / "page.md"
    page.write_text(readme.read_text())
    old = {"a: work": [{"name": "ours", "median_s": 1.0}], "b: work": [{"name": "ours", "median_s": 2.0}]}
    results.write_text(json.dumps(content(old) | {"feed": {"papers": 3}}))
    measured = []

    def measure(only):
        measured.append(only)
        return content({"b: work": [{"name": "ours", "median_s": 5.0}]})

    monkeypatch.setattr(collect, "measure", measure)

    def collected(*options):
        argv = ["collect.py", *options, "--results", str(results), "--readme", str(readme), "--page", str(page)]
        monkeypatch.setattr("sys.argv", argv)
        collect.main()
        return {group: rows[0]["median_s"] for group, rows in json.loads(results.read_text())["groups"].items()}

    assert collected("--only", "b") == {"a: work": 1.0, "b: work": 5.0}
    assert page.read_text() == readme.read_text()
    assert "| `a` | work | 1 s |" in readme.read_text() and "| `b` | work | 5 s |" in capsys.readouterr().out
    assert collected("--table") == {"a: work": 1.0, "b: work": 5.0}
    assert measured == ["b"]  # --table measures nothing
    assert json.loads(results.read_text())["feed"] == {"papers": 3}
    assert collected() == {"b: work": 5.0}  # all anew: what is gone from the benchmarks goes from the results
    assert json.loads(results.read_text())["feed"] == {"papers": 3}  # not from these benchmarks
