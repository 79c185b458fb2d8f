"""Importing costs nothing, layers are kept, and names resolve."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import broadsheet

SOURCE = Path(broadsheet.__file__).parent
HEAVY = {"torch", "transformers", "matplotlib", "pandas", "scipy", "sklearn", "pydantic", "mne"} | {
    *("fastapi", "starlette", "sqlalchemy", "alembic", "tantivy", "usearch", "httpx"),
}
FIELDS = ("interpretability", "evaluation", "geometry", "generative", "recordings", "diagrams")


def loaded_after(code):
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import broadsheet",
        "import broadsheet.catalog, broadsheet.lab",
        *(f"import broadsheet.{field}" for field in FIELDS),
        "import broadsheet.cli",
        "from broadsheet.cli import main\nsys.argv = ['broadsheet', '--help']\ntry:\n    main()\nexcept SystemExit: pass",
    ],
)
def test_importing_and_help_load_nothing_heavy(code):
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize(
    "package", ["broadsheet", "broadsheet.lab", "broadsheet.catalog", *(f"broadsheet.{f}" for f in FIELDS)]
)
def test_every_public_name_resolves(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer(name):
    return name.split(".")[1] if name.startswith("broadsheet.") else None


GROUND = {"nn", "data", "errors", "_lazy"}
ALLOWED = {
    "nn": GROUND,
    "data": GROUND,
    "catalog": {"catalog", *GROUND},
    "lab": {"lab", "catalog", *GROUND},
    "experiments": {"experiments", "lab", "catalog", *FIELDS, *GROUND},
    "feed": {"feed", "catalog", *GROUND},
    "web": {"web", "feed", "lab", "catalog", *GROUND},
    **{field: {field, *GROUND} for field in FIELDS},
}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_nobody_imports_from_above(package):
    for file in (SOURCE / package).rglob("*.py"):
        above = {name for name in imports(file) if layer(name) is not None} - {"broadsheet"}
        wrong = {name for name in above if layer(name) not in ALLOWED[package]}
        assert not wrong, f"{file.relative_to(SOURCE)} imports {wrong}"


def built():
    from broadsheet.catalog import papers

    return [entry for entry in papers() if entry.built]


@pytest.mark.parametrize("entry", built(), ids=lambda entry: entry.slug)
def test_what_a_built_paper_names_is_there(entry):
    """The modules exist, and every import line of the code to copy works."""
    experiment = importlib.import_module(entry.experiment)
    assert callable(experiment.run)
    assert callable(experiment.draw)
    importlib.import_module(entry.module)
    lines = [node for node in ast.parse(entry.snippet).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(ast.unparse(node).startswith("from broadsheet") for node in lines)
    exec("\n".join(ast.unparse(node) for node in lines), {})


@pytest.mark.parametrize("entry", built(), ids=lambda entry: entry.slug)
def test_a_built_paper_is_published_over_five_seeds_with_figures(entry):
    from broadsheet.lab.results import published

    result = published(entry.slug)
    assert result is not None
    assert {found.claim.id for found in result.findings} == {c.id for c in entry.claims if "small" in c.presets}
    assert all(found.seeds >= 5 for found in result.findings)
    assert result.figures
    assert all(file.is_file() and caption for file, caption in result.figures)
    files = {str(file.relative_to(file.parents[1]).with_suffix("")) for file, _ in result.figures}
    assert files >= set(entry.drawings)


def test_every_dependency_is_pinned():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = {plain(line.partition("==")[0]) for line in lines if "==" in line}
    assert {plain(each) for each in wanted} - pinned == {"broadsheet"}


def plain(requirement):
    """A requirement's name as indexes compare it."""
    return re.split(r"[\[<>=!; ]", requirement)[0].lower().replace("_", "-")
