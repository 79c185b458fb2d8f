"""One look for all figures: quiet axes on white, few colours, which stay apart in grey and for the colour-blind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK = "#1f2328"
GRID = "#e4e1da"
COLOURS = {
    "ours": "#b3261e",
    "baseline": "#2f5d8a",
    "paper": "#8a8578",
    "neutral": "#6b6f76",
    "accent": "#d9962b",
    "good": "#3a7d44",
    "light": "#d8d4ca",
}
CYCLE = ["#b3261e", "#2f5d8a", "#d9962b", "#3a7d44", "#7b4b94", "#5b8e9b", "#8a8578"]
SEQUENTIAL = "magma_r"
DIVERGING = "RdBu_r"


def settings() -> dict[str, Any]:
    """The matplotlib settings of the style."""
    from cycler import cycler

    return {
        "axes.axisbelow": True,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=CYCLE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "figure.facecolor": "white",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "image.cmap": SEQUENTIAL,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "savefig.bbox": "tight",
        "savefig.dpi": 160,
        "svg.hashsalt": "broadsheet",  # the same figure gives the same file
        "text.color": INK,
        "xtick.color": INK,
        "xtick.labelsize": 9,
        "ytick.color": INK,
        "ytick.labelsize": 9,
    }


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house style inside the block; the caller's settings return afterwards."""
    import matplotlib as mpl

    with mpl.rc_context(settings()):  # type: ignore[arg-type]  # the stubs list known keys
        yield


def new_axes(ax: Any = None, **subplots: Any) -> Any:
    """The axes handed in, or new ones on a figure of their own.

    Args:
        ax: matplotlib ``Axes`` or None.
        **subplots: keyword arguments of ``matplotlib.pyplot.subplots`` for new axes.
    """
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    with style():
        # A plain Figure, not pyplot's: nothing is kept open behind the user's back.
        size = subplots.pop("figsize", (6.0, 3.8))
        return Figure(figsize=size).subplots(**subplots)


def new_figure(
    width: float | int, height: float | int, columns: int = 1, rows: int = 1, **more: Any
) -> tuple[Any, Any]:
    """A figure of its own, outside pyplot's list of open ones, and its axes.

    Args:
        width, height: inches.
        columns, rows: of axes.
        **more: of ``matplotlib.figure.Figure.subplots``, such as ``sharey``, ``squeeze`` or ``width_ratios``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


def band(
    ax: Any, x: Any, rows: Any, colour: str, label: str | None = None, logarithmic: bool = False, **line: Any
) -> None:
    """One line over seeds: their mean, and their range behind it.

    Args:
        ax: matplotlib axes.
        x: ``[points]``.
        rows: ``[seeds, points]``.
        colour: of both.
        label: of the line.
        logarithmic: the mean is geometric; values below 1e-16 count as that.
        **line: of ``plot``, such as ``marker``.
    """
    import numpy as np

    values = np.array([np.asarray(row, dtype=float) for row in rows])
    if logarithmic:
        values = np.maximum(values, 1e-16)
    mean = np.exp(np.log(values).mean(0)) if logarithmic else values.mean(0)
    ax.plot(x, mean, color=colour, label=label, **line)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.14, linewidth=0)
