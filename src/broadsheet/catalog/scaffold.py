"""Lay out the files of a new paper in a checkout: entry, method, experiment and their tests.

What is laid out works as it stands: the entry validates (as a paper whose method is not built yet), and the method,
its experiment and the tests run. The method starts as the centring of points, and its experiment compares that with
leaving them where they are; the paper's own equations and claims take their place.
"""

import difflib
import json
import keyword
import os
import re
import shutil
import string
import tempfile
import tomllib
from datetime import date
from pathlib import Path

from pydantic import ValidationError

from broadsheet.catalog.schema import FIELDS, Paper
from broadsheet.errors import InvalidInput

_ENTRY = '''\
slug = $slug_string
title = $title_string
authors = ["Unknown"]
published = $published
arxiv = $arxiv_string
venue = ""
code = ""
licence = ""
field = "$field"
tagline = $tagline_string
summary = $summary_string
topics = []

# What the paper itself reports, one block per figure:
# [[reported]]
# metric = "accuracy"
# value = "93.1 %"
# dataset = "..."
# baseline = "..."
# baseline_value = "..."

experiment = "broadsheet.experiments.$name"
# A paper counts as built once it names its module, a snippet and at least one caveat:
# module = "broadsheet.$field.$name"
# snippet = """
# from broadsheet.$field.$name import centre
# result = centre(points)
# """
# [[caveats]]
# id = "..."
# text = "..."
# shown_by = "nearer-to-origin"

[[claims]]
id = "nearer-to-origin"
sentence = "The mean of the points comes to lie nearer to the origin than it was."
metric = "distance of the mean from the origin"
unit = ""
better = "lower"
baseline = "the points as they are"
measured = "256 points in 8 dimensions around a random place."
presets = ["small"]
'''

_METHOD = '''\
"""$title_text (arXiv:$arxiv).

The points are centred, which is where the method starts.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.validation import require_finite


@dataclass(frozen=True)
class Centred:
    """Points around the origin, and where they were.

    Attributes:
        points: the points less their mean.
        mean: the mean that was taken off.
    """

    points: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]


def centre(points: Tensor) -> Centred:
    """Move points so that their mean is the origin.

    Args:
        points: floating point, of shape (n, d) with n at least 1.

    Raises:
        InvalidInput: points of another shape, or not finite.
    """
    if points.ndim != 2 or not len(points):
        raise InvalidInput(f"points has shape {tuple(points.shape)}: expected (n, d) with n at least 1")
    require_finite("points", points)
    mean = points.mean(dim=0)
    return Centred(points=points - mean, mean=mean)
'''

_EXPERIMENT = '''\
"""The claims of $title_text (arXiv:$arxiv), measured."""

import torch

from broadsheet.$field.$name import centre
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS, new_figure, style
from broadsheet.nn.seeding import generator

N_POINTS = 256
N_DIMENSIONS = 8


def run(ctx: Context) -> dict:
    """One seed: points around a random place, centred and as they are."""
    random = generator(ctx.seed, device=ctx.device)
    place = torch.randn(N_DIMENSIONS, generator=random, device=ctx.device)
    noise = torch.randn(N_POINTS, N_DIMENSIONS, generator=random, device=ctx.device)
    points = place + noise

    ours = centre(points).points.mean(dim=0).norm().item()
    baseline = points.mean(dim=0).norm().item()
    ctx.measure("nearer-to-origin", ours=ours, baseline=baseline)
    return {"ours": ours, "baseline": baseline}


def draw(records: list[dict]) -> list[Plate]:
    """The distance of the mean from the origin, seed by seed."""
    with style():
        figure, axes = new_figure(6.0, 3.8)
        for kind, label in (("baseline", "as they are"), ("ours", "centred")):
            axes.plot([record[kind] for record in records], "o", color=COLOURS[kind], label=label)
        axes.set(xlabel="seed", ylabel="distance of the mean from the origin")
        axes.legend()
    return [Plate("distance-of-the-mean", figure, "Distance of the points' mean from the origin, for each seed.")]
'''

_METHOD_TEST = """\
import pytest
import torch
from torch.testing import assert_close

from broadsheet.errors import InvalidInput
from broadsheet.$field.$name import centre


def test_the_mean_becomes_the_origin():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    result = centre(points)
    assert_close(result.points.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    assert_close(result.points + result.mean, points)


@pytest.mark.parametrize("points", [torch.zeros(3), torch.zeros(0, 3), torch.full((2, 2), torch.nan)])
def test_bad_points_are_refused(points):
    with pytest.raises(InvalidInput, match="points"):
        centre(points)
"""

_EXPERIMENT_TEST = """\
from broadsheet.experiments import $name
from broadsheet.lab.testing import trial


def test_every_claim_is_measured_and_drawn(monkeypatch):
    monkeypatch.setattr($name, "N_POINTS", 32)
    result = trial($slug_string, seed=0)
    assert result is not None
"""

_FIELD = '''\
"""$field_title: the methods of this field."""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {})
'''


def scaffold(
    slug: str, root: str | Path, *, field: str, title: str, arxiv: str, published: date | None = None
) -> list[Path]:
    """Lay out the files of a new paper; either all of them come to be, or none.

    Args:
        slug: lower-case words joined by hyphens, such as ``"sparse-probes"``.
        root: the checkout (the folder with ``src/broadsheet``).
        field: one of the fields, such as ``"geometry"``.
        title: the paper's title.
        arxiv: arXiv id without version.
        published: day of the first version; else the first day of the arXiv id's month.

    Returns:
        the files made.

    Raises:
        InvalidInput: a bad slug, field, title or arXiv id, no checkout at ``root``, or a file that exists already.
    """
    root = Path(root)
    name = slug.replace("-", "_") if isinstance(slug, str) else ""
    if not isinstance(slug, str) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug) or keyword.iskeyword(name):
        raise InvalidInput(
            f"slug={slug!r}: expected lower-case letters and digits joined by hyphens, such as 'sparse-probes', "
            "that begin with a letter and are no Python keyword"
        )
    if field not in FIELDS:
        near = difflib.get_close_matches(str(field), FIELDS, n=2) or FIELDS
        raise InvalidInput(f"field={field!r}: there is no such field. Expected one of {', '.join(near)}")
    if not isinstance(title, str) or not title.strip():
        raise InvalidInput(f"title={title!r}: expected the paper's title")
    package = root / "src" / "broadsheet"
    if not (package / "catalog").is_dir():
        raise InvalidInput(f"root={str(root)!r} is no checkout of broadsheet: there is no folder {package / 'catalog'}")

    title = " ".join(title.split())
    values = {
        "slug_string": _string(slug),
        "name": name,
        "title_string": _string(title),
        "title_text": title.replace("\\", "\\\\").replace('"""', "'''"),
        "arxiv_string": _string(arxiv),
        "arxiv": arxiv,
        "published": (published or _month(arxiv)).isoformat(),
        "field": field,
        "field_title": field.capitalize(),
        "tagline_string": _string(f"{title}, to be told in one sentence."),
        "summary_string": _string(f"{title} (arXiv {arxiv}), to be told in a paragraph."),
    }
    templates = {
        package / "catalog" / "papers" / f"{slug}.toml": _ENTRY,
        package / field / f"{name}.py": _METHOD,
        package / "experiments" / f"{name}.py": _EXPERIMENT,
        root / "tests" / field / f"test_{name}.py": _METHOD_TEST,
        root / "tests" / "experiments" / f"test_{name}.py": _EXPERIMENT_TEST,
    }
    if existing := [str(file) for file in templates if file.exists() or file.is_symlink()]:
        raise InvalidInput(f"slug={slug!r}: {', '.join(existing)} exists already and is not overwritten")
    for folder in (package / field, package / "experiments"):
        if not (folder / "__init__.py").exists():
            templates[folder / "__init__.py"] = _FIELD
    files = {file: string.Template(text).substitute(values) for file, text in templates.items()}
    _validate(files[package / "catalog" / "papers" / f"{slug}.toml"])
    _write_all(files, root)
    return list(files)


def _string(text: str) -> str:
    # JSON's strings are TOML's basic strings and Python's too, but for DEL, which TOML wants escaped.
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")


def _month(arxiv: str) -> date:
    found = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.\d{4,5}", arxiv) if isinstance(arxiv, str) else None
    if not found:
        raise InvalidInput(f"arxiv={arxiv!r}: expected an arXiv id without version, such as '2407.00886'")
    return date(2000 + int(found[1]), int(found[2]), 1)


def _validate(entry: str) -> None:
    try:
        Paper.model_validate(tomllib.loads(entry))
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidInput(reasons) from error


def _write_all(files: dict[Path, str], root: Path) -> None:
    """Write every file beside its place first; then link all into place, and take back what was linked if one fails."""
    made: list[Path] = []
    folders: list[Path] = []
    staging = Path(tempfile.mkdtemp(prefix=".scaffold-", dir=root))
    try:
        staged = {}
        for number, (file, text) in enumerate(files.items()):
            staged[file] = staging / str(number)
            staged[file].write_text(text, encoding="utf-8")
        for file, written in staged.items():
            missing = [folder for folder in file.parents if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                folders.append(folder)
            try:
                os.link(written, file)  # unlike a rename, a link never replaces a file that came to be meanwhile
            except FileExistsError as error:
                raise InvalidInput(f"{file} exists already and is not overwritten") from error
            made.append(file)
    except BaseException:
        for file in made:
            file.unlink(missing_ok=True)
        for folder in reversed(folders):
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
