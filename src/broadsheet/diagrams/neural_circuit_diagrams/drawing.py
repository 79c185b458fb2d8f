"""From a plan to a scene: columns get widths, wires become curves, every step its glyph, rows wrap."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from broadsheet.diagrams.neural_circuit_diagrams.axes import Axis
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.glyphs import Pen, glyph_width, paint
from broadsheet.diagrams.neural_circuit_diagrams.layout import GAP, Plan, Slot, slots, tidied
from broadsheet.diagrams.neural_circuit_diagrams.scene import Path, Run, Scene, Text, curve, rectangle, runs_width

MARGIN = 16.0
HEAD = 26.0  # over the first wire of a row: room for a floating function and for labels
ROW_GAP = 18.0
SWAP_WIDTH = 46.0
LABEL_SIZE = 11.0
PAD = 12.0


def scene(
    diagram: Diagram,
    width: float | int = 1000.0,
    title: str = "",
    cost: bool = False,
    sizes: bool = True,
) -> Scene:
    """Draw a diagram.

    Args:
        diagram: what to draw.
        width: in pixels, at which rows wrap.
        title: of the document.
        cost: write multiply-adds under steps and elements held under data.
        sizes: write the size beside a name where it first appears.

    Returns:
        The drawing's parts; ``Scene.svg()`` is the document.
    """
    diagram, layout = tidied(diagram)
    names = axis_names(diagram)
    labels = _labels(diagram, layout, names, sizes)
    ends = _ends(diagram, layout)
    types = [max([runs_width(runs, LABEL_SIZE) for runs in row.values()], default=0.0) + PAD for row in labels]
    steps = [
        SWAP_WIDTH
        if change.swap
        else max([glyph_width(diagram.steps[item.step]) for item in change.items if item.step is not None], default=0)
        + 16
        for change in layout.transitions
    ]
    totals = _totals(diagram, layout) if cost else None
    if totals is not None:
        types = [max(w, runs_width(totals[0][t], 9) + 8) for t, w in enumerate(types)]
        steps = [max(w, runs_width(totals[1][t], 9) + 8) for t, w in enumerate(steps)]
    rows = _rows(types, steps, width - 2 * MARGIN - ends[0] - ends[1])
    made = Scene(title=title or f"Neural circuit diagram: {diagram.signature}", swaps=layout.swaps)
    top = MARGIN
    for r, (first, last) in enumerate(rows):
        top = _row(made, diagram, layout, labels, types, steps, first, last, top, r, len(rows), ends, totals, names)
        top += ROW_GAP
    made.height = top - ROW_GAP + MARGIN
    made.width += MARGIN
    return made


def draw(diagram: Diagram, **options) -> str:
    """The drawing of a diagram as an SVG document; options as of ``scene``."""
    return scene(diagram, **options).svg()


def axis_names(diagram: Diagram) -> dict[str, str]:
    """One name for every axis that no other has: primes, then numbers, are put behind names that are taken."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    order = [*diagram.inputs, *(v for step in diagram.steps for v in step.outs)]
    for value in order:
        for axis in diagram.values[value]:
            if axis.id in found:
                continue
            name, n = axis.name, 0
            while name in taken:
                n += 1
                name = axis.name + ("′" * n if n <= 2 else str(n))
            taken.add(name)
            found[axis.id] = name
    return found


def _axis_runs(axis: Axis, name: str, with_size: bool) -> tuple[Run, ...]:
    style = "b" if axis.kind == "multi" else "i"
    shown = name + "\u0305" if axis.kind == "position" else name
    return ((shown, style), *(((f" {axis.size}", "small"),) if with_size and axis.size is not None else ()))


def _labels(diagram: Diagram, layout: Plan, names: dict[str, str], sizes: bool) -> list[dict[Slot, tuple[Run, ...]]]:
    """The label of every wire that gets one, by boundary: at both ends, and where an array is not what it was."""
    maker = {v: s for s in diagram.steps for v in s.outs}
    shown: set[str] = set()
    rows: list[dict[Slot, tuple[Run, ...]]] = []
    last = len(layout.boundaries) - 1
    for t, boundary in enumerate(layout.boundaries):
        row: dict[Slot, tuple[Run, ...]] = {}
        old = set(layout.boundaries[t - 1]) if t else set()
        for value in boundary:
            new = value not in old
            source = maker.get(value)
            kept = {diagram.values[v] for v in source.ins} if source is not None else set()
            changed = new and diagram.values[value] not in kept
            if not (changed or t == last):
                continue
            for i, axis in enumerate(diagram.values[value]):
                row[(value, i)] = _axis_runs(axis, names[axis.id], sizes and axis.id not in shown)
                shown.add(axis.id)
            if not diagram.values[value]:
                row[(value, 0)] = (("1", "small"),)
        rows.append(row)
    return rows


def _ends(diagram: Diagram, layout: Plan) -> tuple[float | int, float | int]:
    """Room for notes (saved values) at the left and right ends."""
    notes = [[diagram.notes[v] for v in side if v in diagram.notes] for side in (diagram.inputs, diagram.outputs)]
    left, right = (max([runs_width(_note(n, False), LABEL_SIZE) + 10 for n in side], default=0.0) for side in notes)
    return left, right


def _note(text: str, arrow: bool) -> tuple[Run, ...]:
    head, digits = text.rstrip("0123456789"), text[len(text.rstrip("0123456789")) :]
    return ((head, "i"), (digits, "sub"), (" →", ""))


def _totals(diagram: Diagram, layout: Plan) -> tuple[list[tuple[Run, ...]], list[tuple[Run, ...]]]:
    counted = diagram.cost()
    held = []
    for boundary in layout.boundaries:
        total = 0
        for v in boundary:
            size = 1
            for axis in diagram.values[v]:
                size = size * axis.extent
            total = total + size
        held.append(((f"{_short(total)}", "small"),))
    work = []
    for change in layout.transitions:
        total = sum((counted.per_step[item.step] for item in change.items if item.step is not None), 0)
        work.append(((f"{_short(total)} ×+" if total != 0 else "", "small b"),))
    return held, work


def _short(value) -> str:
    if not getattr(value, "is_number", True):
        return str(value).replace("*", "")
    value = float(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g} {name}"
    return f"{value:.0f}"


def _rows(types: list[float | int], steps: list[float | int], width: float | int) -> list[tuple[int, int]]:
    """First and last boundary of every row; a row ends and the next begins at the same boundary."""
    rows, first, used = [], 0, types[0]
    for t, step in enumerate(steps):
        if used + step + types[t + 1] > width and t > first:
            rows.append((first, t))
            first, used = t, types[t]
        used += step + types[t + 1]
    return [*rows, (first, len(steps))]


def _row(made, diagram, layout, labels, types, steps, first, last, top, r, n_rows, ends, totals, names) -> float | int:
    heights = [layout.heights[t] for t in range(first, last + 1)]
    values = [y for row in heights for y in row.values()]
    lowest, highest = min(values, default=0.0), max(values, default=0.0)
    shift = top + HEAD - lowest
    bottom = highest + shift + 16 + (16 if totals is not None else 0)
    x = MARGIN + (ends[0] if r == 0 else 12.0)
    spans: list[tuple[float | int, float | int]] = []
    for t in range(first, last + 1):
        wide = types[t]
        if t == first and r > 0:
            wide = max(wide, _carry_width(diagram, layout, names, t))
        spans.append((x, x + wide))
        x += wide + (steps[t] if t < last else 0.0)
    several = [
        (value, i) for value, array in diagram.values.items() for i, axis in enumerate(array) if axis.kind == "multi"
    ]
    pen = Pen(made, frozenset(_data(diagram, slot) for slot in several))
    for t in range(first, last + 1):
        x0, x1 = spans[t - first]
        at = {slot: y + shift for slot, y in layout.heights[t].items()}
        shown = dict(labels[t])
        if t == first and r > 0:
            shown = {
                (v, i): _axis_runs(a, names[a.id], False)
                for v in layout.boundaries[t]
                for i, a in enumerate(diagram.values[v])
            }
        elif t == last and r + 1 < n_rows:
            pass
        for slot, runs in shown.items():
            made.labels.append(Text((x0 + x1) / 2, at[slot] - 4.5, runs, LABEL_SIZE))
        for slot, y in at.items():
            data = _data(diagram, slot)
            scalar = not diagram.values[slot[0]]
            pen.line(slot, t, (x0, y), (x1, y), data, scalar)
        boundary = layout.boundaries[t]
        for lower in boundary[1:]:  # over the lower array, so that the line bends only where that array does
            height = at[slots(diagram, lower)[0]] - GAP / 2
            pen.dash((x0, height), (x1, height))
        if totals is not None:
            made.labels.append(Text((x0 + x1) / 2, bottom - 4, totals[0][t], 11, "cost held"))
    for x0, x1 in spans:  # a mark under every column of data: what stands between two marks is one column of steps
        middle = (x0 + x1) / 2
        made.back.append(Path((("M", middle, bottom + 2), ("L", middle, bottom + 6)), "column", width=0.6))
    for t in range(first, last):
        a, b = spans[t - first][1], spans[t - first + 1][0]
        left = {slot: y + shift for slot, y in layout.heights[t].items()}
        right = {slot: y + shift for slot, y in layout.heights[t + 1].items()}
        change = layout.transitions[t]
        if change.swap:
            for value in layout.boundaries[t]:
                for slot in slots(diagram, value):
                    pen.line(
                        slot, t, (a, left[slot]), (b, right[slot]), _data(diagram, slot), not diagram.values[value]
                    )
            continue
        previous = None
        for item in change.items:
            if item.step is None:
                for slot in slots(diagram, item.ins[0]):
                    scalar = not diagram.values[slot[0]]
                    pen.line(slot, t, (a, left[slot]), (b, right[slot]), _data(diagram, slot), scalar)
            else:
                paint(pen, diagram, diagram.steps[item.step], item.step, t, a, b, left, right)
            if previous is not None and item.ins and item.outs:
                tops = left[slots(diagram, item.ins[0])[0]], right[slots(diagram, item.outs[0])[0]]
                if previous.ins and previous.outs:
                    pen.dash((a, tops[0] - GAP / 2), (b, tops[1] - GAP / 2))
            previous = item
        if totals is not None and totals[1][t][0][0]:
            made.labels.append(Text((a + b) / 2, bottom - 4, totals[1][t], 11, "cost work"))
    pen.flush()
    # Ends: arrow-heads where a row goes on, notes where values are saved or loaded.
    for t, side in ((first, 0), (last, 1)):
        x = spans[t - first][side]
        for slot, y in layout.heights[t].items():
            y += shift
            goes_on = r > 0 if side == 0 else r + 1 < n_rows
            if goes_on:
                start = x - 9 if side == 0 else x
                made.back.append(
                    Path(
                        (("M", start, y - 3.5), ("L", start + 6, y), ("L", start, y + 3.5), ("Z",)),
                        "row-end",
                        "black",
                        width=0,
                    )
                )
            elif slot[0] in diagram.notes and slot[1] == 0:
                runs = _note(diagram.notes[slot[0]], side == 1)
                runs = ((" → ", ""), *runs[:-1]) if side == 1 else runs
                wide = runs_width(runs, LABEL_SIZE)
                rows = slots(diagram, slot[0])
                middle = y + (layout.heights[t][rows[-1]] - layout.heights[t][slot]) / 2
                place = x - wide / 2 - 3 if side == 0 else x + wide / 2 + 3
                made.labels.append(Text(place, middle + 4, runs, LABEL_SIZE, "note"))
    right_end = spans[-1][1] + (ends[1] if r + 1 == n_rows else 10.0)
    made.width = max(made.width, right_end)
    panel = rectangle((MARGIN / 2, top, right_end + MARGIN / 2, bottom + 7), "row", "none", width=0)
    made.back.append(panel)
    return bottom + 7


def _carry_width(diagram, layout, names, t: int) -> float | int:
    texts = [_axis_runs(a, names[a.id], False) for v in layout.boundaries[t] for a in diagram.values[v]]
    return max([runs_width(runs, LABEL_SIZE) for runs in texts], default=0.0) + PAD


def _data(diagram: Diagram, slot: Slot) -> str:
    array = diagram.values[slot[0]]
    return f' data-axis="{escape(array[slot[1]].name)}"' if array else ""


__all__ = ["GAP", "Sequence", "Step", "axis_names", "curve", "draw", "scene"]
