"""Seeding, validation, progress and style: small, and held to what they promise."""

import io
import random

import matplotlib as mpl
import numpy as np
import pytest
import torch
from rich.console import Console

from broadsheet.errors import InvalidInput
from broadsheet.nn.plotting import new_axes, settings, style
from broadsheet.nn.progress import SILENT, live
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.validation import require_finite


def test_seeded_repeats_and_restores_every_global_state():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    with seeded(1):
        first = draw()
    with pytest.raises(RuntimeError), seeded(1):
        assert draw() == first
        raise RuntimeError
    assert draw() == expected


def test_generator_is_a_function_of_its_seed():
    assert torch.equal(torch.rand(3, generator=generator(4)), torch.rand(3, generator=generator(4)))
    assert not torch.equal(torch.rand(3, generator=generator(4)), torch.rand(3, generator=generator(5)))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_where_values_are_not_finite_is_said(make):
    values = make([[1.0, float("nan")], [float("inf"), 2.0]])
    with pytest.raises(InvalidInput, match=r"X holds 2 NaN or infinite values, first at index \(0, 1\), \(1, 0\)"):
        require_finite("X", values)
    require_finite("X", make([1.0, 2.0]))
    require_finite("X", make([1, 2]))


def test_progress_is_quiet_off_a_terminal():
    out = io.StringIO()
    with live(Console(file=out, force_terminal=False)) as progress:
        assert progress is SILENT
        with progress.task("work", total=2) as task:
            task.advance(loss=1.0)
    assert out.getvalue() == ""


def test_progress_shows_step_and_loss_on_a_terminal():
    out = io.StringIO()
    with live(Console(file=out, force_terminal=True, width=120)) as progress, progress.task("work", total=2) as task:
        task.advance(loss=0.25)
        progress._bars.refresh()
    shown = out.getvalue()
    assert "work" in shown
    assert "1/2" in shown
    assert "loss 0.25" in shown


def test_style_ends_with_its_block_and_takes_given_axes():
    before = mpl.rcParams["axes.edgecolor"]
    with style():
        assert mpl.rcParams["axes.edgecolor"] == settings()["axes.edgecolor"]
    assert mpl.rcParams["axes.edgecolor"] == before
    axes = new_axes()
    assert new_axes(axes) is axes


def test_a_band_is_the_mean_with_the_range_behind_it():
    import matplotlib.pyplot as plt

    from broadsheet.nn.plotting import band, new_figure

    figure, axes = new_figure(4, 3, 2)
    rows = [[1.0, 10.0], [4.0, 1000.0]]
    band(axes[0], [0, 1], rows, "red", "seeds", marker="o")
    assert axes[0].lines[0].get_ydata().tolist() == [2.5, 505.0]
    corners = axes[0].collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1, 1000)
    band(axes[1], [0, 1], rows, "red", logarithmic=True)
    assert axes[1].lines[0].get_ydata() == pytest.approx([2, 100])
    band(axes[1], [0, 1], rows[:1], "red")
    assert len(axes[1].collections) == 1  # one seed has no range
    assert plt.get_fignums() == []
    assert figure.get_size_inches().tolist() == [4, 3]
