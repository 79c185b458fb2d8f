"""What a drawing consists of before it is SVG: paths, shapes and lines of text, with the boxes that they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from broadsheet.diagrams.neural_circuit_diagrams.font_table import text_width

FONT = "DejaVu Sans, Verdana, sans-serif"
SIZES = {"sup": 0.72, "sub": 0.72, "small": 0.72}
SHIFT = {"sup": -0.38, "sub": 0.22, "small": 0.0}

Run = tuple[str, str]
Box = tuple[float | int, float | int, float | int, float | int]


def number(value: float | int) -> str:
    """A coordinate, rounded so that drawings are the same everywhere."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


@dataclass(frozen=True)
class Text:
    """Runs of text on one line; a run's style holds any of ``b i sup sub small``.

    Args:
        x, y: of the middle of the baseline.
        runs: strings with their styles.
        size: in pixels.
        kind: class of the element.
    """

    x: float | int
    y: float | int
    runs: tuple[Run, ...]
    size: float | int = 11
    kind: str = "label"

    @property
    def width(self) -> float | int:
        """Of all runs, from the font table."""
        return runs_width(self.runs, self.size)

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of the inked area."""
        return (self.x - self.width / 2, self.y - 0.8 * self.size, self.x + self.width / 2, self.y + 0.1 * self.size)

    def svg(self) -> str:
        """The element."""
        parts, shift = [], 0.0
        for text, style in self.runs:
            marks = style.split()
            size = self.size * min((SIZES[m] for m in marks if m in SIZES), default=1.0)
            want = self.size * next((SHIFT[m] for m in marks if m in SHIFT), 0.0)
            attributes = f' class="{escape(style)}"' if style else ""
            attributes += f' dy="{number(want - shift)}"' if number(want - shift) != "0" else ""
            attributes += f' font-size="{number(size)}"' if size != self.size else ""
            attributes += ' font-weight="bold"' if "b" in marks else ""
            attributes += ' font-style="italic"' if "i" in marks else ""
            parts.append(f"<tspan{attributes}>{escape(text)}</tspan>")
            shift = want
        place = f'x="{number(self.x)}" y="{number(self.y)}" font-size="{number(self.size)}"'
        return f'<text class="{self.kind}" {place} text-anchor="middle">{"".join(parts)}</text>'


def runs_width(runs: Sequence[Run], size: float | int) -> float | int:
    """The width of runs set side by side."""
    total = 0.0
    for text, style in runs:
        marks = style.split()
        total += text_width(text, size * min((SIZES[m] for m in marks if m in SIZES), default=1.0), "b" in marks)
    return total


@dataclass(frozen=True)
class Path:
    """Lines and cubic curves: ``("M", x, y)``, ``("L", x, y)``, ``("C", x1, y1, x2, y2, x, y)``, ``("Z",)``."""

    commands: tuple[tuple, ...]
    kind: str = "wire"
    fill: str = "none"
    data: str = ""
    dash: str = ""
    width: float | int = 1.4
    stroke: str = "black"

    def svg(self) -> str:
        """The element."""
        d = " ".join(" ".join([c[0], *map(number, c[1:])]) for c in self.commands)
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        stroke = f' stroke="{self.stroke}" stroke-width="{number(self.width)}"' if self.width else ""
        return f'<path class="{self.kind}"{self.data} d="{d}" fill="{self.fill}"{stroke}{dash}/>'

    @property
    def box(self) -> Box:
        """Of its points and control points."""
        xs = [v for c in self.commands for v in c[1::2]]
        ys = [v for c in self.commands for v in c[2::2]]
        return (min(xs), min(ys), max(xs), max(ys))


@dataclass
class Group:
    """A glyph: shapes and text that belong together."""

    kind: str
    parts: list[Text | Path]
    data: str = ""

    def svg(self) -> str:
        """The element."""
        return f'<g class="{self.kind}"{self.data}>{"".join(part.svg() for part in self.parts)}</g>'

    @property
    def box(self) -> Box:
        """Around its parts."""
        boxes = [part.box for part in self.parts]
        return (
            min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)
        )  # fmt: skip


@dataclass
class Scene:
    """A whole drawing."""

    width: float | int = 0.0
    height: float | int = 0.0
    title: str = ""
    back: list[Path] = field(default_factory=list)
    wires: list[Path] = field(default_factory=list)
    glyphs: list[Group] = field(default_factory=list)
    labels: list[Text] = field(default_factory=list)
    swaps: int = 0

    def svg(self) -> str:
        """The drawing as an SVG document."""
        elements = [*self.back, *self.wires, *self.glyphs, *self.labels]
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {number(self.width)} {number(self.height)}"'
        )
        body = "\n".join(element.svg() for element in elements)
        return (
            f'{head} font-family="{FONT}" role="img">\n<title>{escape(self.title)}</title>\n'
            f'<rect class="paper" width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
        )


def rectangle(
    box: Box, kind: str = "shape", fill: str = "white", width: float | int = 1.2, round: float | int = 0.0
) -> Path:
    """A box as a path, with rounded corners if wanted."""
    x0, y0, x1, y1 = box
    r = min(round, (x1 - x0) / 2, (y1 - y0) / 2)
    if not r:
        return Path((("M", x0, y0), ("L", x1, y0), ("L", x1, y1), ("L", x0, y1), ("Z",)), kind, fill, width=width)
    k = r * 0.45
    commands = (
        ("M", x0 + r, y0), ("L", x1 - r, y0), ("C", x1 - k, y0, x1, y0 + k, x1, y0 + r), ("L", x1, y1 - r),
        ("C", x1, y1 - k, x1 - k, y1, x1 - r, y1), ("L", x0 + r, y1), ("C", x0 + k, y1, x0, y1 - k, x0, y1 - r),
        ("L", x0, y0 + r), ("C", x0, y0 + k, x0 + k, y0, x0 + r, y0), ("Z",),
    )  # fmt: skip
    return Path(commands, kind, fill, width=width)


def polygon(
    *points: tuple[float | int, float | int], kind: str = "shape", fill: str = "white", width: float | int = 1.2
) -> Path:
    """Corners joined by lines."""
    lines = tuple(("M" if i == 0 else "L", *point) for i, point in enumerate(points))
    return Path((*lines, ("Z",)), kind, fill, width=width)


def dot(x: float | int, y: float | int, r: float | int = 3.2) -> Path:
    """A filled dot."""
    return Path(rectangle((x - r, y - r, x + r, y + r), round=r).commands, "dot", "black", width=0)


def curve(x0: float | int, y0: float | int, x1: float | int, y1: float | int) -> tuple:
    """From one point to another with horizontal tangents: a straight line where they are level."""
    if abs(y0 - y1) < 1e-6:
        return ("L", x1, y1)
    middle = (x0 + x1) / 2
    return ("C", middle, y0, middle, y1, x1, y1)
