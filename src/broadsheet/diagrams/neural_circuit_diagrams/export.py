"""Drawings as files and as matplotlib figures."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram
from broadsheet.diagrams.neural_circuit_diagrams.drawing import scene
from broadsheet.diagrams.neural_circuit_diagrams.font_table import text_width
from broadsheet.diagrams.neural_circuit_diagrams.scene import SHIFT, SIZES, Path, Scene, Text
from broadsheet.errors import InvalidInput

POINTS = 0.75  # of a pixel
CODES = {"M": [Curve.MOVETO], "L": [Curve.LINETO], "C": [Curve.CURVE4] * 3, "Z": [Curve.CLOSEPOLY]}


def save(diagram: Diagram, path: Any, **options: Any) -> File:
    """Write the drawing of a diagram.

    Args:
        diagram: what to draw.
        path: ends in ``.svg``, ``.pdf`` or ``.png``.
        **options: of ``drawing.scene``.

    Returns:
        The file.

    Raises:
        InvalidInput: another ending.
    """
    file = File(path)
    if file.suffix == ".svg":
        file.write_text(scene(diagram, **options).svg(), encoding="utf-8")
    elif file.suffix in (".pdf", ".png"):
        figure(scene(diagram, **options)).savefig(
            file, metadata={"CreationDate": None} if file.suffix == ".pdf" else None
        )
    else:
        raise InvalidInput(f"{file.name}: expected a name that ends in .svg, .pdf or .png")
    return file


def figure(drawn: Scene) -> Figure:
    """A drawing as a figure of its own size."""
    made = Figure((drawn.width / 96, drawn.height / 96), dpi=192)
    show(drawn, made.add_axes((0, 0, 1, 1)))
    return made


def show(drawn: Scene, ax: Axes, points: float | int = POINTS) -> Axes:
    """Put a drawing on axes; ``points`` is the size of a pixel in points."""
    ax.set(xlim=(0, drawn.width), ylim=(drawn.height, 0), aspect="equal")
    ax.axis("off")
    parts = [*drawn.back, *drawn.wires, *(part for glyph in drawn.glyphs for part in glyph.parts), *drawn.labels]
    for order, part in enumerate(parts, 1):
        if isinstance(part, Path):
            _path(ax, part, points, order)
        else:
            _text(ax, part, points, order)
    return ax


def _path(ax: Axes, part: Path, points: float | int, order: int) -> None:
    if not part.width and part.fill == "none":
        return
    vertices, codes = [], []
    for name, *numbers in part.commands:
        codes += CODES[name]
        vertices += list(zip(numbers[::2], numbers[1::2], strict=True)) or [(0.0, 0.0)]
    width = part.width * points
    style = (0, tuple(float(n) * points / max(width, 1e-6) for n in part.dash.split())) if part.dash else "-"
    patch = PathPatch(
        Curve(vertices, codes), facecolor=part.fill, edgecolor=part.stroke if part.width else "none",
        linewidth=width, linestyle=style, zorder=order, capstyle="butt", fill=part.fill != "none",
    )  # fmt: skip
    ax.add_patch(patch)


def _text(ax: Axes, part: Text, points: float | int, order: int) -> None:
    x = part.x - part.width / 2
    for text, style in part.runs:
        marks = style.split()
        size = part.size * min((SIZES[m] for m in marks if m in SIZES), default=1.0)
        shift = part.size * next((SHIFT[m] for m in marks if m in SHIFT), 0.0)
        ax.text(
            x, part.y + shift, text, fontsize=size * points, ha="left", va="baseline", zorder=order,
            fontweight="bold" if "b" in marks else "normal", fontstyle="italic" if "i" in marks else "normal",
            family="DejaVu Sans", parse_math=False,
        )  # fmt: skip
        x += text_width(text, size, "b" in marks)
