"""How every step is drawn: its glyph, where wires end at it, and which wires run past."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.layout import Slot, slots
from broadsheet.diagrams.neural_circuit_diagrams.scene import (
    Group,
    Path,
    Run,
    Scene,
    Text,
    curve,
    dot,
    polygon,
    rectangle,
    runs_width,
)

SIZE = 11.0
SMALL = 10.0
Point = tuple[float | int, float | int]


class Pen:
    """Collects wires: pieces that touch end to end become one path, which is double for a multi axis.

    Args:
        scene: where they go.
        multi: marks of the wires that stand for several axes.
    """

    def __init__(self, scene: Scene, multi: frozenset[str] = frozenset()) -> None:
        self.scene, self.multi = scene, multi
        self.chains: list[tuple[list[tuple], Point, str, str]] = []

    def piece(self, start: Point, commands: list[tuple], end: Point, data: str = "", kind: str = "wire") -> None:
        """A piece of wire; it goes on with the chain that ends where it starts."""
        self.chains.append(([("M", *start), *commands], end, data, kind))

    def line(self, slot: Slot, t: int, start: Point, end: Point, data: str = "", scalar: bool = False) -> None:
        """A piece from one point to another with level ends."""
        self.piece(start, [curve(*start, *end)], end, data, "wire scalar" if scalar else "wire")

    def dash(self, start: Point, end: Point) -> None:
        """A piece of the dashed line between two arrays."""
        self.piece(start, [curve(*start, *end)], end, "", "dash")

    def glyph(self, kind: str, parts: list[Text | Path], number: int) -> None:
        """A finished glyph."""
        self.scene.glyphs.append(Group(f"glyph {kind}", parts, f' data-node="{number}"'))

    def flush(self) -> None:
        """Join pieces end to end and hand them to the scene, from left to right."""

        def key(point: Point, kind: str) -> tuple:
            return (round(point[0], 2), round(point[1], 2), kind)

        waiting: dict[tuple, list[int]] = {}
        joined: list[list[Any]] = []
        order = sorted(self.chains, key=lambda c: (c[0][0][1], c[0][0][2], c[1]))
        for commands, end, data, kind in order:
            start = (commands[0][1], commands[0][2])
            found = waiting.get(key(start, kind))
            if found and "cup" not in kind:
                chain = joined[found.pop()]
                chain[0] += commands[1:]
                index = joined.index(chain)
            else:
                joined.append([list(commands), data, kind])
                index = len(joined) - 1
            waiting.setdefault(key(end, kind), []).append(index)
        for commands, data, kind in joined:
            if kind == "dash":
                self.scene.back.append(Path(tuple(commands), "dash", dash="4 3", width=0.8))
            elif "scalar" in kind:
                self.scene.wires.append(Path(tuple(commands), kind, data=data, dash="1 3", width=1.2))
            else:
                double = data in self.multi
                self.scene.wires.append(Path(tuple(commands), kind, data=data, width=4.4 if double else 1.4))
        for commands, data, kind in joined:
            if data in self.multi and kind != "dash":
                self.scene.wires.append(Path(tuple(commands), "between", width=1.8, stroke="white"))


# --------------------------------------------------------------------------------------------------------- what is said


def said(step: Step) -> list[tuple[Run, ...]]:
    """The lines of text in or beside a step's glyph."""
    op: Any = step.op
    kind = op.glyph
    if kind == "learned":
        letter = op.label + ("ᵀ" if getattr(op, "transposed", False) else "")
        return [((letter, "b"), *_affix(op.name, getattr(op, "bias", False)))]
    if kind == "conv":
        return [((op.label, ""),), (("L", "b"), *_affix(op.name, op.bias))]
    if kind == "norm":
        runs = _affix(op.name if op.affine or op.kind == "batch" else "", "b" in op.affine)
        bare = (("∘", "sub"),) if op.kind == "batch" and "w" not in op.affine else ()
        marks = ((f"{op.label} ", "small"),) if op.label else ()
        return [(*marks, *runs, *bare)] if (marks or runs or bare) else []
    if kind == "constant" and op.names:
        return [((op.name, "b" if op.learned else "i"),)]
    if kind == "elementwise":
        return [_marked(op.label)]
    return [((op.label, "b" if getattr(op, "learned", False) else ""),)] if op.label else []


def _marked(label: str) -> tuple[Run, ...]:
    mark, _, number = label.partition(" ")
    if number and mark in ("×", "+", "^", "≥", "≤", "leaky"):
        return ((f"{mark} ", ""), (short(number), ""))
    return ((label, ""),)


def short(number: str) -> str:
    """A number as short as it can be without becoming another; roots of small numbers as roots."""
    prime = "′" if number.endswith("′") else ""
    value = float(number.rstrip("′"))
    text = f"{value:g}"
    if float(text) == value:
        return text + prime
    if 0 < value < 1:
        n = round(1 / value**2)
        if n < 2**16 and 1 / math.sqrt(n) == value:
            return f"1/√{n}" + prime
    return repr(value) + prime


def _affix(name: str, bias: bool) -> tuple[Run, ...]:
    runs: tuple[Run, ...] = ((name, "sup"),) if name else ()
    return (*runs, ("+", "sub")) if bias else runs


def glyph_width(step: Step) -> float | int:
    """How wide a step's column must be for it."""
    op: Any = step.op
    text = max([runs_width(line, SIZE) for line in said(step)], default=0.0)
    kind = op.glyph
    if kind == "web":
        return _web_width(step)
    return {
        "learned": text + 26,
        "conv": text + 22,
        "pool": text + 16,
        "norm": 24 + 2 * text if len(_touched(step)[0]) < 2 else text + 18,
        "softmax": 20 + (2 * text + 4 if text else 0),
        "elementwise": text + 26,
        "constant": text + 12,
        "index": 26 + text,
        "scatter": 26 + text,
        "view": 14,
        "concat": 44,
        "copy": 34,
        "add": 40,
        "discard": 16,
        "reduce": 26 + text,
    }.get(kind, text + 26)


def _web_width(step: Step) -> float | int:
    inputs = [c for array in step.at.ins for c in array]
    cups = [c for c in dict.fromkeys(inputs) if inputs.count(c) == 2 and c not in step.at.outs[0]]
    n_swaps = [c for c in step.at.outs[0] if c in inputs]
    order = [inputs.index(c) for c in n_swaps]
    crossed = order != sorted(order)
    return 14 + 12 * len(cups) + (22 if crossed else 10) + (12 if len(step.at.ins) > 1 else 0)


# ------------------------------------------------------------------------------------------------------------- painting


class Place:
    """A step's wires in a column."""

    def __init__(self, diagram: Diagram, step: Step, a: float | int, b: float | int, left, right) -> None:
        self.step, self.a, self.b = step, a, b
        self.ins = [[left[s] for s in slots(diagram, v)] for v in step.ins]
        self.outs = [[right[s] for s in slots(diagram, v)] for v in step.outs]
        self.middle = (a + b) / 2
        self.names = {c: f' data-axis="{escape(axis.name)}"' for c, axis in diagram.axes_of(step).items()}

    def eaten(self) -> list[float | int]:
        return [y for y, _ in self._core(self.step.op.eats, self.step.at.ins, self.ins)]

    def emitted(self) -> list[float | int]:
        return [y for y, _ in self._core(self.step.op.emits, self.step.at.outs, self.outs)]

    def _core(self, core, rows, heights) -> list[tuple[float | int, str]]:
        found = []
        for i, (letters, ys) in enumerate(zip(rows, heights, strict=True)):
            mine = letters if core is None or i >= len(core) else core[i]
            found += [(ys[letters.index(c)], c) for c in mine]
        return found


def _touched(step: Step) -> tuple[list[str], list[str]]:
    eats, emits = step.op.eats, step.op.emits
    into = [c for i, row in enumerate(step.at.ins) for c in (row if eats is None or i >= len(eats) else eats[i])]
    out = [c for i, row in enumerate(step.at.outs) for c in (row if emits is None or i >= len(emits) else emits[i])]
    return into, out


def paint(
    pen: Pen, diagram: Diagram, step: Step, number: int, t: int, a: float | int, b: float | int, left, right
) -> None:
    """Draw one step between ``a`` and ``b``."""
    at = Place(diagram, step, a, b, left, right)
    PAINTERS.get(step.op.glyph, _box)(pen, at, number)


def _past(
    pen: Pen, at: Place, skip_in: set[str], skip_out: set[str], x: float | int | None = None, solid: Any = None
) -> None:
    """Wires that the step does not touch: one that several inputs have is joined at a dot, one that only outputs have
    begins at a dot."""
    step = at.step
    x = at.middle if x is None else x
    letters = dict.fromkeys(c for row in (*step.at.ins, *step.at.outs) for c in row)
    dots = []
    for c in letters:
        into = (
            [] if c in skip_in else [ys[row.index(c)] for row, ys in zip(step.at.ins, at.ins, strict=True) if c in row]
        )
        out = (
            []
            if c in skip_out
            else [ys[row.index(c)] for row, ys in zip(step.at.outs, at.outs, strict=True) if c in row]
        )
        dots += _spider(pen, at, c, into, out, x, solid)
    scalars = [ys[0] for row, ys in zip(step.at.ins, at.ins, strict=True) if not row]
    for row, ys in zip(step.at.outs, at.outs, strict=True):
        if not row and scalars and step.op.glyph != "box":
            pen.piece((at.a, scalars[0]), [curve(at.a, scalars[0], at.b, ys[0])], (at.b, ys[0]), "", "wire scalar")
    if dots:
        pen.scene.glyphs.append(Group("glyph dots", list(dots)))


def _spider(
    pen: Pen, at: Place, c: str, into: list[float | int], out: list[float | int], x: float | int, solid: Any = None
) -> list[Path]:
    data = at.names.get(c, "")
    if not into and not out:
        return []
    if len(into) == 1 and len(out) == 1:
        bends, end = [curve(at.a, into[0], at.b, out[0])], (at.b, out[0])
        if solid is not None and into[0] != out[0]:
            # A wire that would run behind a box bends before or behind it.
            x0, top, x1, bottom = solid
            if top - 6 < into[0] < bottom + 6:
                bends = [curve(at.a, into[0], x0, out[0]), ("L", *end)]
            elif top - 6 < out[0] < bottom + 6:
                bends = [("L", x1, into[0]), curve(x1, into[0], *end)]
        pen.piece((at.a, into[0]), bends, end, data)
        return []
    y = (out or into)[0] if len(into) != 1 else into[0]
    for each in into:
        pen.piece((at.a, each), [curve(at.a, each, x, y)], (x, y), data)
    for each in out:
        pen.piece((x, y), [curve(x, y, at.b, each)], (at.b, each), data)
    return [dot(x, y)]


def _web(pen: Pen, at: Place, number: int) -> None:
    step = at.step
    inputs = [(c, y) for row, ys in zip(step.at.ins, at.ins, strict=True) for c, y in zip(row, ys, strict=False)]
    outs = list(zip(step.at.outs[0], at.outs[0], strict=False))
    dots, n_cups = [], 0
    letters = list(dict.fromkeys([c for c, _ in inputs] + [c for c, _ in outs]))
    spans = {c: [y for d, y in inputs if d == c] for c in letters}
    for c in sorted(letters, key=lambda c: max(spans[c], default=0) - min(spans[c], default=0)):
        into, out = spans[c], [y for d, y in outs if d == c]
        if len(into) == 2 and not out:
            x, reach = at.a + 4 + 12 * n_cups, 12.0 + 5 * n_cups
            n_cups += 1
            top, low = into
            r = min(reach * 1.33, (at.b - x - 4) * 1.33)
            commands = [("L", x, top), ("C", x + r, top, x + r, low, x, low), ("L", at.a, low)]
            pen.piece((at.a, top), commands, (at.a, low), at.names.get(c, ""), "wire cup")
        elif len(out) == 2 and not into:
            low, top = out[1], out[0]
            commands = [("L", at.b - 4, top), ("C", at.b - 20, top, at.b - 20, low, at.b - 4, low), ("L", at.b, low)]
            pen.piece((at.b, top), commands, (at.b, low), at.names.get(c, ""), "wire cap")
        else:
            dots += _spider(pen, at, c, into, out, at.middle)
    scalars = [ys[0] for row, ys in zip(step.at.ins, at.ins, strict=True) if not row]
    for y in scalars:
        pen.piece((at.a, y), [("L", at.a + 8, y)], (at.a + 8, y), "", "wire scalar")
    if not step.at.outs[0]:
        pen.piece((at.b - 8, at.outs[0][0]), [("L", at.b, at.outs[0][0])], (at.b, at.outs[0][0]), "", "wire scalar")
    if dots:
        pen.glyph("web", list(dots), number)


def _stub(pen: Pen, at: Place, x0: float | int, x1: float | int) -> None:
    """Level pieces from the column's edges to a glyph between ``x0`` and ``x1``."""
    step = at.step
    for side, rows, heights, core in (
        (0, step.at.ins, at.ins, step.op.eats),
        (1, step.at.outs, at.outs, step.op.emits),
    ):
        for y, c in at._core(core, rows, heights):
            start, end = ((at.a, y), (x0, y)) if side == 0 else ((x1, y), (at.b, y))
            pen.piece(start, [("L", *end)], end, at.names.get(c, ""))


def _bounds(at: Place) -> tuple[float | int, float | int]:
    ys = [*at.eaten(), *at.emitted()]
    if not ys:
        ys = [y for row in (*at.ins, *at.outs) for y in row]
    return min(ys), max(ys)


def _solid(pen: Pen, at: Place, number: int, kind: str, shape: Callable, pad: float | int = 9.0) -> None:
    """A glyph with text inside that wires end at."""
    lines = said(at.step)
    wide = max([runs_width(line, SIZE) for line in lines], default=0.0) + 10
    x0, x1 = at.middle - wide / 2, at.middle + wide / 2
    low, high = _bounds(at)
    if len(lines) > 1 and high - low < 10:
        pad += 4
    top, bottom = low - pad, high + pad
    _stub(pen, at, x0, x1)
    touched_in, touched_out = _touched(at.step)
    _past(pen, at, set(touched_in), set(touched_out), solid=(x0, top, x1, bottom))
    if at.step.op.glyph == "box" or at.step.op.glyph in ("window", "mask"):
        for row, ys, start, end in (
            *((r, y, at.a, x0) for r, y in zip(at.step.at.ins, at.ins, strict=True)),
            *((r, y, x1, at.b) for r, y in zip(at.step.at.outs, at.outs, strict=True)),
        ):
            if not row:
                pen.piece((start, ys[0]), [("L", end, ys[0])], (end, ys[0]), "", "wire scalar")
                top, bottom = min(top, ys[0] - pad), max(bottom, ys[0] + pad)
    middle = (top + bottom) / 2
    texts = [
        Text(at.middle, middle + 4 + 12 * (i - (len(lines) - 1) / 2), line, SIZE, "said")
        for i, line in enumerate(lines)
    ]
    ports = []
    for x, rows, heights, core in (
        (x0, at.step.at.ins, at.ins, at.step.op.eats),
        (x1, at.step.at.outs, at.outs, at.step.op.emits),
    ):
        for y, c in at._core(core, rows, heights):
            if c in at.step.op.marked:
                ports.append(rectangle((x - 2.4, y - 2.4, x + 2.4, y + 2.4), "port", "black", width=0))
    pen.glyph(kind, [shape(x0, top, x1, bottom), *ports, *texts], number)


def _box(pen: Pen, at: Place, number: int) -> None:
    kind = at.step.op.glyph
    _solid(pen, at, number, kind, lambda x0, y0, x1, y1: rectangle((x0, y0, x1, y1)))


def _learned(pen: Pen, at: Place, number: int) -> None:
    _solid(pen, at, number, "learned", lambda x0, y0, x1, y1: rectangle((x0, y0, x1, y1), width=1.6))


def _trapezoid(pen: Pen, at: Place, number: int) -> None:
    op: Any = at.step.op
    mirrored = getattr(op, "transposed", False)

    def shape(x0, y0, x1, y1):
        left, right = (4, 0) if mirrored else (0, 4)
        return polygon((x0, y0 + left), (x1, y0 + right), (x1, y1 - right), (x0, y1 - left))

    _solid(pen, at, number, op.glyph, shape, 10.0)


def _constant(pen: Pen, at: Place, number: int) -> None:
    _solid(pen, at, number, "constant", lambda x0, y0, x1, y1: rectangle((x0, y0, x1, y1), round=7))
    if not at.step.at.outs[0]:
        y = at.outs[0][0]
        pen.piece((at.b - 6, y), [("L", at.b, y)], (at.b, y), "", "wire scalar")


def _softmax(pen: Pen, at: Place, number: int) -> None:
    (y,) = at.eaten()
    out = at.emitted()[0]
    x0, x1 = at.middle - 8, at.middle + 8
    eats = at.step.op.eats
    assert eats is not None  # a softmax always reads an axis
    c = eats[0][0]
    pen.piece((at.a, y), [curve(at.a, y, x0, out)], (x0, out), at.names.get(c, ""))
    pen.piece((x1, out), [("L", at.b, out)], (at.b, out), at.names.get(c, ""))
    _past(pen, at, {c}, {c})
    parts: list[Text | Path] = [polygon((x0, out), (x1, out - 8), (x1, out + 8), width=1.4)]
    parts += [Text(x1 + 3 + runs_width(line, 9) / 2, out - 3, line, 9, "said") for line in said(at.step)]
    pen.glyph("softmax", parts, number)


def _norm(pen: Pen, at: Place, number: int) -> None:
    op: Any = at.step.op
    if len(op.over) > 1:
        shape = lambda x0, y0, x1, y1: rectangle((x0, y0, x1, y1), width=1.4, round=8)  # noqa: E731
        _solid(pen, at, number, f"norm {op.kind}", shape)
        return
    (y,) = at.eaten()
    out = at.emitted()[0]
    c, r = op.over[0], 7.5
    x0, x1 = at.middle - r, at.middle + r
    pen.piece((at.a, y), [curve(at.a, y, x0, out)], (x0, out), at.names.get(c, ""))
    pen.piece((x1, out), [("L", at.b, out)], (at.b, out), at.names.get(c, ""))
    _past(pen, at, {c}, {c})
    parts: list[Text | Path] = [rectangle((x0, out - r, x1, out + r), round=r, width=1.4)]
    if op.kind == "layer":
        parts.append(Path((("M", at.middle, out - r), ("L", at.middle, out + r)), "tick", width=1.4))
    elif op.kind == "rms":
        m = at.middle
        parts.append(
            Path((("M", m - 4, out), ("L", m - 2, out + 4), ("L", m + 1, out - 4), ("L", m + 5, out - 4)), "tick")
        )
    parts += [Text(x1 + 2 + runs_width(line, SIZE) / 2, out - 4, line, SIZE, "said") for line in said(at.step)]
    pen.glyph(f"norm {op.kind}", parts, number)


def _elementwise(pen: Pen, at: Place, number: int) -> None:
    _past(pen, at, set(), set())
    line = said(at.step)[0]
    wide = runs_width(line, SMALL)
    y = max(min(at.ins[0]), min(at.outs[0])) - 12.5
    y = min(min(at.ins[0]), min(at.outs[0])) - 12.5
    x0, x1 = at.middle - wide / 2 - 5, at.middle + wide / 2 + 5
    pen.glyph(
        "elementwise",
        [
            Path((("M", x0 - 6, y - 4), ("L", x0 - 2, y), ("L", x0 - 6, y + 4)), "tail", width=1.1),
            Text(at.middle, y + 3.6, line, SMALL, "said"),
            polygon((x1, y - 4), (x1 + 7, y), (x1, y + 4), kind="head", fill="black", width=0),
        ],
        number,
    )


def _index(pen: Pen, at: Place, number: int) -> None:
    op: Any = at.step.op
    _past(pen, at, {op.axis}, {op.axis})
    y = (at.eaten() or at.emitted())[0]
    line = said(at.step)[0]
    wide = runs_width(line, 9)
    if op.glyph == "index":
        x = at.a + 6
        pen.piece((at.a, y), [("L", x, y)], (x, y), at.names.get(op.axis, ""))
        shape = polygon((x, y - 6), (x + 7, y - 6), (x + 13, y), (x + 7, y + 6), (x, y + 6), fill="black")
        text = Text(x + 16 + wide / 2, y + 3.3, line, 9, "said")
    else:
        x = at.b - 6
        pen.piece((x, y), [("L", at.b, y)], (at.b, y), at.names.get(op.axis, ""))
        shape = polygon((x, y - 6), (x - 7, y - 6), (x - 13, y), (x - 7, y + 6), (x, y + 6), fill="black")
        text = Text(x - 16 - wide / 2, y + 3.3, line, 9, "said")
    pen.glyph(op.glyph, [shape, text], number)


def _reduce(pen: Pen, at: Place, number: int) -> None:
    op: Any = at.step.op
    _past(pen, at, set(op.over), set())
    line = said(at.step)[0]
    parts: list[Text | Path] = []
    for y, c in at._core(op.eats, at.step.at.ins, at.ins):
        x = at.a + 8
        pen.piece((at.a, y), [("L", x, y)], (x, y), at.names.get(c, ""))
        parts.append(polygon((x, y - 4), (x + 7, y), (x, y + 4), kind="head", fill="black", width=0))
        parts.append(Text(x + 10 + runs_width(line, SIZE) / 2, y + 4, line, SIZE, "said"))
    if not at.step.at.outs[0]:
        y = at.outs[0][0]
        pen.piece((at.b - 8, y), [("L", at.b, y)], (at.b, y), "", "wire scalar")
    pen.glyph("reduce", parts, number)


def _bar(low: float | int, high: float | int, x: float | int) -> Path:
    return rectangle((x - 2.2, low - 7, x + 2.2, high + 7), "bar", "black", width=0)


def _view(pen: Pen, at: Place, number: int) -> None:
    low, high = _bounds(at)
    into, out = (set(side) for side in _touched(at.step))
    _stub(pen, at, at.middle - 2.2, at.middle + 2.2)
    _past(pen, at, into, out)
    pen.glyph("view", [_bar(low, high, at.middle)], number)


def _concat(pen: Pen, at: Place, number: int) -> None:
    op: Any = at.step.op
    low, high = _bounds(at)
    x = at.a + 12
    _stub(pen, at, x - 2.2, x + 2.2)
    _past(pen, at, set(op.parts), {op.whole}, at.b - 12)
    pen.glyph("concat", [_bar(low, high, x)], number)


def _copy(pen: Pen, at: Place, number: int) -> None:
    dots: list[Text | Path] = []
    x = at.a + 10
    for i, y in enumerate(at.ins[0]):
        data = at.names.get(at.step.at.ins[0][i], "") if at.step.at.ins[0] else ""
        kind = "wire" if at.step.at.ins[0] else "wire scalar"
        pen.piece((at.a, y), [("L", x, y)], (x, y), data, kind)
        for row in at.outs:
            pen.piece((x, y), [curve(x, y, at.b, row[i])], (at.b, row[i]), data, kind)
        dots.append(dot(x, y))
    pen.glyph("copy", dots, number)


def _add(pen: Pen, at: Place, number: int) -> None:
    parts: list[Text | Path] = []
    x = at.b - 12
    out, ys = at.step.at.outs[0], at.outs[0]
    for i, y in enumerate(ys):
        sources = [
            row[letters.index(out[i])] if out else row[0]
            for letters, row in zip(at.step.at.ins, at.ins, strict=True)
            if not out or out[i] in letters
        ]
        data = at.names.get(out[i], "") if out else ""
        kind = "wire" if out else "wire scalar"
        for each in sources:
            pen.piece((at.a, each), [curve(at.a, each, x, y)], (x, y), data, kind)
        pen.piece((x, y), [("L", at.b, y)], (at.b, y), data, kind)
        if len(sources) > 1:
            parts.append(dot(x, y))
    for letters, row in zip(at.step.at.ins, at.ins, strict=True):
        if not letters and out:
            pen.piece((at.a, row[0]), [curve(at.a, row[0], x, ys[-1])], (x, ys[-1]), "", "wire scalar")
    top = ys[0] - 12
    parts.append(rectangle((x - 5.5, top - 5.5, x + 5.5, top + 5.5), "plus-ring", round=5.5, width=1.0))
    parts.append(Path((("M", x - 3.2, top), ("L", x + 3.2, top)), "plus", width=1.2))
    parts.append(Path((("M", x, top - 3.2), ("L", x, top + 3.2)), "plus", width=1.2))
    pen.glyph("add", parts, number)


def _discard(pen: Pen, at: Place, number: int) -> None:
    parts: list[Text | Path] = []
    for i, y in enumerate(at.ins[0]):
        x = at.a + 8
        row = at.step.at.ins[0]
        pen.piece(
            (at.a, y), [("L", x, y)], (x, y), at.names.get(row[i], "") if row else "", "wire" if row else "wire scalar"
        )
        parts.append(Path((("M", x, y - 6), ("L", x, y + 6)), "tick", width=2))
    pen.glyph("discard", parts, number)


PAINTERS: dict[str, Callable[[Pen, Place, int], None]] = {
    "web": _web,
    "learned": _learned,
    "conv": _trapezoid,
    "pool": _trapezoid,
    "norm": _norm,
    "softmax": _softmax,
    "elementwise": _elementwise,
    "constant": _constant,
    "index": _index,
    "scatter": _index,
    "view": _view,
    "concat": _concat,
    "copy": _copy,
    "add": _add,
    "discard": _discard,
    "reduce": _reduce,
}
