"""Read a diagram back from its drawing: from shapes, where wires end, and what is written, and from nothing else.
Wires are followed by the points where they meet; arrays are what dashed lines part; a column of steps is what stands
between two column marks. Attributes ``data-*`` are not looked at. Numbers of weights are not in a drawing: they are
handed over by name, as are functions of boxes.
"""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.axes import Array, Axis
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Pattern
from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum
from broadsheet.diagrams.neural_circuit_diagrams.reading import generator
from broadsheet.errors import InvalidInput

NEAR = 0.5  # pixels
SVG = "{http://www.w3.org/2000/svg}"
Point = tuple[float, float]


@dataclass
class Glyph:
    """A glyph as it stands in the drawing."""

    kind: list[str]
    boxes: list[tuple[str, tuple[float, float, float, float]]]
    texts: list[list[tuple[str, str]]]
    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    @property
    def shapes(self) -> list[tuple[float, float, float, float]]:
        """Boxes of what wires can end at."""
        return [box for kind, box in self.boxes if kind not in ("port", "plus", "plus-ring", "tail")]

    @property
    def middle(self) -> float:
        """Between left and right."""
        boxes = [box for _, box in self.boxes]
        return (min(b[0] for b in boxes) + max(b[2] for b in boxes)) / 2


@dataclass
class Line:
    """A piece of wire between two points."""

    start: Point
    end: Point
    scalar: bool = False


@dataclass
class Row:
    """What stands in one row of the drawing."""

    marks: list[float] = field(default_factory=list)
    wires: list[Line] = field(default_factory=list)
    dashes: list[Line] = field(default_factory=list)
    glyphs: list[Glyph] = field(default_factory=list)
    labels: list[tuple[Point, list[tuple[str, str]]]] = field(default_factory=list)


def read_svg(
    svg: str, weights: Mapping[str, Tensor] | None = None, functions: Mapping[str, Callable] | None = None
) -> Diagram:
    """Rebuild a diagram from its drawing.

    Args:
        svg: what ``Diagram.svg`` wrote.
        weights: tensors by the names in the drawing, such as ``Diagram.weights`` of the drawn one.
        functions: of boxes and of elementwise functions with names of the user's own.

    Returns:
        A diagram that runs to the same numbers.

    Raises:
        InvalidInput: a drawing that cannot be read; the message says where.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InvalidInput(f"not an SVG drawing: {error}") from error
    rows = _rows(root)
    reader = _Reader(dict(weights or {}), dict(functions or {}))
    for row in rows:
        reader.row(row)
    return reader.finish()


# ------------------------------------------------------------------------------------------------------ what is drawn


def _numbers(d: str) -> list[tuple[str, list[float]]]:
    return [(c, [float(n) for n in re.findall(r"-?[\d.]+", rest)]) for c, rest in re.findall(r"([MLCZ])([^MLCZ]*)", d)]


def _points(d: str) -> list[Point]:
    return [(n[-2], n[-1]) for c, n in _numbers(d) if n]


def _box(d: str) -> tuple[float, float, float, float]:
    points = _points(d)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return min(xs), min(ys), max(xs), max(ys)


def _runs(text: ElementTree.Element) -> list[tuple[str, str]]:
    return [(part.text or "", part.get("class", "")) for part in text.iter(f"{SVG}tspan")]


def _rows(root: ElementTree.Element) -> list[Row]:
    panels = sorted(
        (_box(e.get("d", "")) for e in root.iter(f"{SVG}path") if e.get("class") == "row"), key=lambda b: b[1]
    )
    if not panels:
        raise InvalidInput("no row in the drawing: expected one that Diagram.svg() wrote")
    rows = [Row() for _ in panels]

    def at(y: float) -> Row:
        for row, panel in zip(rows, panels, strict=True):
            if panel[1] - 1 <= y <= panel[3] + 1:
                return row
        return rows[-1]

    for element in root:
        kind = (element.get("class") or "").split()
        if element.tag == f"{SVG}g" and "glyph" in kind:
            boxes = [(e.get("class", ""), _box(e.get("d", ""))) for e in element.iter(f"{SVG}path")]
            texts = [_runs(e) for e in element.iter(f"{SVG}text")]
            at(boxes[0][1][1]).glyphs.append(Glyph(kind[1:], boxes, texts))
        elif element.tag == f"{SVG}text" and kind == ["label"]:
            place = (float(element.get("x", 0)), float(element.get("y", 0)))
            at(place[1]).labels.append((place, _runs(element)))
        elif element.tag == f"{SVG}path" and kind and kind[0] in ("wire", "dash", "column"):
            points = _points(element.get("d", ""))
            row = at(points[0][1])
            if kind[0] == "column":
                row.marks.append(points[0][0])
                continue
            pieces = [Line(a, b, "scalar" in kind) for a, b in itertools.pairwise(points)]
            (row.wires if kind[0] == "wire" else row.dashes).extend(pieces)
    for row in rows:
        row.marks.sort()
    return rows


# --------------------------------------------------------------------------------------------------------- reading it


@dataclass
class Web:
    """Wires that meet: their ends at the left and right marks, and loose ends between."""

    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    points: set[Point] = field(default_factory=set)
    scalar: bool = False


class _Sets:
    """Disjoint sets."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, x: Any) -> Any:
        self.parent.setdefault(x, x)
        while self.parent[x] != x:
            x = self.parent[x]
        return x

    def join(self, x: Any, y: Any) -> None:
        self.parent[self.find(y)] = self.find(x)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= NEAR


class _Reader:
    def __init__(self, weights: dict[str, Tensor], functions: dict[str, Callable]) -> None:
        self.weights, self.functions = weights, functions
        self.values: dict[int, Array] = {}
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.now: list[int] = []
        self.axes: dict[str, Axis] = {}
        self.began = False

    def finish(self) -> Diagram:
        known = {name for step in self.steps for name in step.op.names}
        missing = sorted(known - set(self.weights))
        if missing:
            raise InvalidInput(f"weights {missing} are named in the drawing: hand them over as weights=")
        values = {v: tuple(self.axes[a.id] for a in array) for v, array in self.values.items()}
        return Diagram.of(values, self.steps, self.inputs, self.now, {n: self.weights[n] for n in known})

    def value(self, array: Array) -> int:
        self.values[len(self.values)] = array
        return len(self.values) - 1

    def row(self, row: Row) -> None:
        sections = [self.section(row, x) for x in row.marks]
        if not self.began:
            self.began = True
            for ys in sections[0]:
                array = tuple(self.labelled(row, row.marks[0], y) for y, scalar in ys if not scalar)
                self.inputs.append(self.value(tuple(a for a in array if a is not None)))
            self.now = list(self.inputs)
        if [max(1, len(self.values[v])) for v in self.now] != [len(ys) for ys in sections[0]]:
            raise InvalidInput("a row of the drawing does not go on where the one before it ended")
        for t in range(len(row.marks) - 1):
            self.column(row, row.marks[t], row.marks[t + 1], sections[t], sections[t + 1])

    def section(self, row: Row, x: float) -> list[list[tuple[float, bool]]]:
        """The arrays at a column mark: heights of their wires from the top."""
        ys = sorted({(round(w.start[1], 2), w.scalar) for w in row.wires if w.start[0] < x < w.end[0]})
        cuts = sorted(d.start[1] for d in row.dashes if d.start[0] < x < d.end[0])
        arrays: list[list[tuple[float, bool]]] = [[] for _ in range(len(cuts) + 1)]
        for y, scalar in ys:
            arrays[sum(c < y for c in cuts)].append((y, scalar))
        return [a for a in arrays if a]

    def labelled(self, row: Row, x: float, y: float) -> Axis | None:
        """The axis that is written over a wire at a column mark."""
        for (a, b), runs in row.labels:
            if abs(a - x) < 1 and abs(b + 4.5 - y) < 1:
                name = "".join(t for t, style in runs if "small" not in style)
                size = next((int(t) for t, style in runs if "small" in style), None)
                kind = "multi" if runs[0][1] == "b" else "position" if "\u0305" in name else "plain"
                name = name.replace("\u0305", "")
                if name:
                    known = self.axes.get(name)
                    if known is None or known.size is None:
                        self.axes[name] = Axis(name, name, size, kind)
                    return self.axes[name]
        return None

    def column(self, row: Row, a: float, b: float, before: list, after: list) -> None:
        webs = _webs(row, a, b)
        glyphs = [g for g in row.glyphs if a < g.middle < b]
        left = {y: (i, j) for i, ys in enumerate(before) for j, (y, _) in enumerate(ys)}
        right = {y: (i, j) for i, ys in enumerate(after) for j, (y, _) in enumerate(ys)}
        sets = _Sets()
        for i in range(len(before)):
            sets.find(("in", i))
        for i in range(len(after)):
            sets.find(("out", i))
        for k in range(len(glyphs)):
            sets.find(("glyph", k))
        ends: list[tuple[Web, list[tuple[str, int, int]]]] = []
        for web in webs:
            members = [("in", *_at(left, y)) for y in web.left] + [("out", *_at(right, y)) for y in web.right]
            ends.append((web, members))
            for member in members[1:]:
                sets.join(members[0][:2], member[:2])
        touches: dict[int, tuple[list[tuple[float, int]], list[tuple[float, int]]]] = {}
        for k, glyph in enumerate(glyphs):
            eaten, emitted = [], []
            for w, (web, members) in enumerate(ends):
                for x, y in web.points:
                    side = _touch(glyph, x, y)
                    if side and members:
                        sets.join(("glyph", k), members[0][:2])
                        if side == "left":
                            eaten.append((y, w))
                        elif side == "right":
                            emitted.append((y, w))
            if glyph.kind[0] == "elementwise":
                sets.join(("glyph", k), _beneath(glyph, before, after, sets))
            touches[k] = (sorted(eaten), sorted(emitted))
            glyph.left, glyph.right = ([y for y, _ in side] for side in touches[k])
        self.assemble(row, b, before, after, glyphs, ends, touches, sets)

    def assemble(self, row, x, before, after, glyphs, ends, touches, sets) -> None:
        groups: dict[Any, tuple[list[int], list[int], list[int]]] = {}
        for side, n, items in ((0, "in", before), (1, "out", after), (2, "glyph", glyphs)):
            for i in range(len(items)):
                groups.setdefault(sets.find((n, i)), ([], [], []))[side].append(i)
        results: dict[int, int] = {}
        for into, out, chosen in sorted(groups.values(), key=lambda g: (g[0] or [99], g[1] or [99])):
            kinds = [k for k in chosen if glyphs[k].kind[0] not in ("dots", "web")]
            if len(kinds) > 1:
                raise InvalidInput(f"two glyphs in one step: {[glyphs[k].kind for k in kinds]} near x={x:.0f}")
            if not into and not out:
                continue
            letter: dict[tuple[str, int, int], str] = {}
            for w, (_, members) in enumerate(ends):
                for member in members:
                    letter[member] = f"w{w}"
            ins = tuple(
                tuple(letter[("in", i, j)] for j, (_, scalar) in enumerate(before[i]) if not scalar) for i in into
            )
            outs = tuple(
                tuple(letter[("out", i, j)] for j, (_, scalar) in enumerate(after[i]) if not scalar) for i in out
            )
            values = [self.now[i] for i in into]
            if not kinds and len(into) == len(out) == 1 and ins == outs:
                results[out[0]] = values[0]
                continue
            op: Generator = Einsum()
            at = Pattern(ins, outs)
            if kinds:
                eaten, emitted = ([f"w{w}" for _, w in side] for side in touches[kinds[0]])
                op, at = generator(glyphs[kinds[0]], at, eaten, emitted, self.weights, self.functions)
            elif len(out) != 1:
                raise InvalidInput(f"{len(out)} arrays come out of a web near x={x:.0f}: expected one")
            known = {
                c: a for v, row_ in zip(values, at.ins, strict=True) for c, a in zip(row_, self.values[v], strict=True)
            }
            made = []
            for i, letters in zip(out, at.outs, strict=True):
                heights = [y for y, scalar in after[i] if not scalar]
                named = [self.labelled(row, x, y) for y in heights]
                like = next((self.values[v] for v in values if len(self.values[v]) == len(letters)), None)
                array = []
                for n, c in enumerate(letters):
                    axis = named[n] or known.get(c) or (like[n] if like is not None else None)
                    if axis is None:
                        raise InvalidInput(f"a wire near x={x:.0f} has no name")
                    array.append(axis)
                made.append(self.value(tuple(array)))
                results[i] = made[-1]
            self.steps.append(Step(op, at, tuple(values), tuple(made)))
        self.now = [results[i] for i in range(len(after))]


def _at(places: dict[float, tuple[int, int]], y: float) -> tuple[int, int]:
    for height, place in places.items():
        if _near(height, y):
            return place
    raise InvalidInput(f"a wire at height {y:.1f} belongs to no array")


def _touch(glyph: Glyph, x: float, y: float) -> str:
    """Which side of a glyph a point of a wire touches, if any; the middle of a dot counts as ``inside``."""
    for left, top, right, bottom in glyph.shapes:
        if not top - NEAR <= y <= bottom + NEAR:
            continue
        if glyph.kind[0] in ("copy", "add", "dots", "web"):
            if _near(x, (left + right) / 2) and _near(y, (top + bottom) / 2):
                return "inside"
        elif _near(x, left):
            return "left"
        elif _near(x, right):
            return "right"
    return ""


def _beneath(glyph: Glyph, before: list, after: list, sets: _Sets) -> tuple[str, int]:
    """The array over which a function floats."""
    y = max(box[3] for kind, box in glyph.boxes if kind == "head") - 4
    found = []
    for i, ys in enumerate(before):
        for j, other in enumerate(after):
            if sets.find(("in", i)) == sets.find(("out", j)):
                found.append((abs(min(ys[0][0], other[0][0]) - 12.5 - y), i))
    distance, i = min(found)
    if distance > 1:
        raise InvalidInput(f"the function {glyph.texts} floats over no array")
    return ("in", i)


def _webs(row: Row, a: float, b: float) -> list[Web]:
    """Wires between two column marks, cut there and joined where they meet."""
    pieces = []
    for w in row.wires:
        (x0, y0), (x1, y1) = sorted((w.start, w.end))
        if x1 <= a or x0 >= b:
            continue
        start = (a, y0) if x0 < a else (x0, y0)
        end = (b, y1) if x1 > b else (x1, y1)
        pieces.append((start, end, w.scalar))
    sets = _Sets()
    spots: dict[tuple[int, int], list[Point]] = {}

    def spot(p: Point) -> Point:
        cell = (round(p[0]), round(p[1]))
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                for q in spots.get((cell[0] + dx, cell[1] + dy), []):
                    if _near(p[0], q[0]) and _near(p[1], q[1]):
                        return q
        spots.setdefault(cell, []).append(p)
        return p

    joined = [(spot(s), spot(e), scalar) for s, e, scalar in pieces]
    for s, e, _ in joined:
        sets.join(s, e)
    webs: dict[Point, Web] = {}
    for s, e, scalar in joined:
        web = webs.setdefault(sets.find(s), Web())
        web.scalar |= scalar
        for p in (s, e):
            if p in web.points:
                continue
            web.points.add(p)
            if p[0] == a:
                web.left.append(p[1])
            elif p[0] == b:
                web.right.append(p[1])
    for web in webs.values():
        web.left.sort()
        web.right.sort()
    return sorted(webs.values(), key=lambda w: (w.left or [9e9], w.right or [9e9]))
