"""Where everything stands: the order of arrays in every column, then the height of every wire.
Orders come from barycentre sweeps over the columns; what they leave crossed becomes a drawn swap in a column of its
own. Heights come from one linear programme: wires that go on should stay level, under fixed gaps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from broadsheet.diagrams.neural_circuit_diagrams.columns import columns
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.generators import Add, Copy
from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum

PITCH = 22.0  # between the wires of an array
GAP = 46.0  # between arrays: a dashed line in the middle, and room for a function that floats over the wires
SWEEPS = 4

Slot = tuple[int, int]  # a value and the number of an axis; a scalar has one wire, number 0


@dataclass(frozen=True)
class Item:
    """What stands in a column: a step, or an array that passes."""

    step: int | None
    ins: tuple[int, ...]
    outs: tuple[int, ...]


@dataclass
class Transition:
    """From one order of arrays to the next: a column of items, or a swap (no items)."""

    items: list[Item]
    swap: bool = False


@dataclass
class Plan:
    """The layout: arrays between transitions, and heights of their wires."""

    boundaries: list[list[int]]
    transitions: list[Transition]
    heights: list[dict[Slot, float]] = field(default_factory=list)

    @property
    def swaps(self) -> int:
        """Pairs of arrays that cross."""
        total = 0
        for before, change, after in zip(self.boundaries, self.transitions, self.boundaries[1:], strict=False):
            if change.swap:
                place = {v: i for i, v in enumerate(after)}
                total += _inversions([place[v] for v in before])
        return total


def _inversions(row: list[int]) -> int:
    return sum(a > b for i, a in enumerate(row) for b in row[i + 1 :])


def slots(diagram: Diagram, value: int) -> list[Slot]:
    """The wires of an array from top to bottom."""
    return [(value, i) for i in range(max(1, len(diagram.values[value])))]


def tidied(diagram: Diagram) -> tuple[Diagram, Plan]:
    """The diagram with inputs of sums and webs, and branches of copies, in the order that needs the fewest swaps.

    What comes back computes the same: sums and contractions do not care for the order of their inputs.
    """
    best = _ordered(diagram)
    for _ in range(4):
        if not best.swaps:
            break
        steps = list(diagram.steps)
        for t, change in enumerate(best.transitions):
            before = best.boundaries[t - 1] if t and best.transitions[t - 1].swap else best.boundaries[t]
            after = best.boundaries[t + 2] if t + 1 < len(best.transitions) and best.transitions[t + 1].swap else None
            for item in change.items:
                if item.step is None:
                    continue
                step = steps[item.step]
                if isinstance(step.op, Add | Einsum) and len(step.ins) > 1:
                    order = sorted(range(len(step.ins)), key=lambda i: before.index(step.ins[i]))
                    at = replace(step.at, ins=tuple(step.at.ins[i] for i in order))
                    steps[item.step] = replace(step, ins=tuple(step.ins[i] for i in order), at=at)
                elif isinstance(step.op, Copy) and after is not None:
                    steps[item.step] = replace(step, outs=tuple(sorted(step.outs, key=after.index)))
        changed = replace(diagram, steps=tuple(steps))
        found = _ordered(changed)
        if found.swaps >= best.swaps:
            break
        diagram, best = changed, found
    best.heights = _heights(diagram, best)
    return diagram, best


def plan(diagram: Diagram) -> Plan:
    """Order and heights of everything in a diagram."""
    found = _ordered(diagram)
    found.heights = _heights(diagram, found)
    return found


def _ordered(diagram: Diagram) -> Plan:
    rows: list[list[Item]] = []
    now = list(diagram.inputs)
    for column in columns(diagram):
        taken = {v for i in column for v in diagram.steps[i].ins}
        first = {v: i for i in column for v in diagram.steps[i].ins}
        row, done = [], set()
        for v in now:
            if v not in taken:
                row.append(Item(None, (v,), (v,)))
            elif first[v] not in done:
                done.add(first[v])
                row.append(Item(first[v], diagram.steps[first[v]].ins, diagram.steps[first[v]].outs))
        row += [Item(i, (), diagram.steps[i].outs) for i in column if not diagram.steps[i].ins]
        rows.append(row)
        now = [v for item in row for v in item.outs]

    def crossings() -> int:
        total, before = 0, list(diagram.inputs)
        for row in rows:
            place = {v: i for i, v in enumerate(before)}
            total += _inversions([place[v] for item in row for v in item.ins])
            before = [v for item in row for v in item.outs]
        place = {v: i for i, v in enumerate(before)}
        return total + _inversions([place[v] for v in diagram.outputs])

    def arrange(row: list[Item], place: dict[int, int], of: str, rest: dict[int, int], other: str) -> list[Item]:
        def key(item: Item) -> float:
            mine = [place[v] for v in getattr(item, of)] or [rest.get(v, len(rest)) for v in getattr(item, other)]
            return float(np.mean(mine)) if mine else float(len(place))

        return sorted(row, key=key)

    best, fewest = [list(row) for row in rows], crossings()
    for sweep in range(2 * SWEEPS):
        if fewest == 0:
            break
        if sweep % 2 == 0:
            before = {v: i for i, v in enumerate(diagram.inputs)}
            for j, row in enumerate(rows):
                following = rows[j + 1] if j + 1 < len(rows) else None
                after = [v for item in following for v in item.ins] if following else list(diagram.outputs)
                rows[j] = arrange(row, before, "ins", {v: i for i, v in enumerate(after)}, "outs")
                before = {v: i for i, v in enumerate(v for item in rows[j] for v in item.outs)}
        else:
            after = {v: i for i, v in enumerate(diagram.outputs)}
            for j in reversed(range(len(rows))):
                earlier = rows[j - 1] if j else None
                before = [v for item in earlier for v in item.outs] if earlier else list(diagram.inputs)
                rows[j] = arrange(rows[j], after, "outs", {v: i for i, v in enumerate(before)}, "ins")
                after = {v: i for i, v in enumerate(v for item in rows[j] for v in item.ins)}
        if crossings() < fewest:
            best, fewest = [list(row) for row in rows], crossings()
    boundaries, transitions = [list(diagram.inputs)], []
    for row in best:
        left, right = [v for item in row for v in item.ins], [v for item in row for v in item.outs]
        if left != boundaries[-1]:
            transitions.append(Transition([], True))
            boundaries.append(left)
        transitions.append(Transition(row))
        boundaries.append(right)
    if boundaries[-1] != list(diagram.outputs):
        transitions.append(Transition([], True))
        boundaries.append(list(diagram.outputs))
    return Plan(boundaries, transitions)


def continues(diagram: Diagram, step: Step) -> list[tuple[Slot, Slot, float]]:
    """Wires of a step that should stay level, with how much that matters: those that go on, then eaten and emitted."""
    pairs, ends = [], []
    for value, letters in zip(step.outs, step.at.outs, strict=True):
        for i, letter in enumerate(letters):
            source = next(
                ((v, row.index(letter)) for v, row in zip(step.ins, step.at.ins, strict=True) if letter in row), None
            )
            if source is None:
                ends.append((value, i))
            else:
                pairs.append((source, (value, i), 1.0))
    out = {c for row in step.at.outs for c in row}
    eaten = [(v, i) for v, row in zip(step.ins, step.at.ins, strict=True) for i, c in enumerate(row) if c not in out]
    pairs += [(a, b, 0.4) for a, b in zip(eaten, ends, strict=False)]
    scalars = [(v, 0) for v, row in zip(step.ins, step.at.ins, strict=True) if not row]
    pairs += [(a, (v, 0), 0.4) for a, v in zip(scalars, step.outs, strict=False)]
    return pairs


def _heights(diagram: Diagram, found: Plan) -> list[dict[Slot, float]]:
    number: dict[tuple[int, Slot], int] = {}
    for t, boundary in enumerate(found.boundaries):
        for value in boundary:
            for slot in slots(diagram, value):
                number[(t, slot)] = len(number)
    below: list[tuple[int, int, float]] = []  # (upper, lower, least distance)
    level: list[tuple[int, int, float]] = []

    def ends(t: int, values: tuple[int, ...]) -> tuple[int, int] | None:
        if not values:
            return None
        return number[(t, slots(diagram, values[0])[0])], number[(t, slots(diagram, values[-1])[-1])]

    for t, boundary in enumerate(found.boundaries):
        before = None
        for value in boundary:
            mine = [number[(t, slot)] for slot in slots(diagram, value)]
            below += [(a, b, PITCH) for a, b in itertools.pairwise(mine)]
            below += [(before, mine[0], GAP)] if before is not None else []
            before = mine[-1]
    for t, change in enumerate(found.transitions):
        if change.swap:
            level += [(number[(t, s)], number[(t + 1, s)], 0.5) for v in found.boundaries[t] for s in slots(diagram, v)]
            continue
        earlier: list[int] = []
        for item in change.items:
            sides = [ends(t, item.ins), ends(t + 1, item.outs)]
            mine = [side for side in sides if side is not None]
            below += [(last, first, GAP) for last in earlier for first, _ in mine]
            earlier = [last for _, last in mine]
            if item.step is None:
                level += [(number[(t, s)], number[(t + 1, s)], 1.0) for s in slots(diagram, item.ins[0])]
            else:
                step = diagram.steps[item.step]
                level += [(number[(t, a)], number[(t + 1, b)], w) for a, b, w in continues(diagram, step)]
    n, m = len(number), len(level)
    if not n:
        return [{} for _ in found.boundaries]
    # Variables: heights, then |difference| of each pair; a whisper of weight on the heights keeps drawings compact.
    costs = np.concatenate([np.full(n, 1e-3), [w for _, _, w in level]])
    rows, cols, entries, limit = [], [], [], []
    for upper, lower, gap in below:
        rows += [len(limit)] * 2
        cols += [upper, lower]
        entries += [1.0, -1.0]
        limit.append(-gap)
    for k, (a, b, _) in enumerate(level):
        for sign in (1.0, -1.0):
            rows += [len(limit)] * 3
            cols += [a, b, n + k]
            entries += [sign, -sign, -1.0]
            limit.append(0.0)
    table = coo_matrix((entries, (rows, cols)), shape=(len(limit), n + m)).tocsr()
    solved = linprog(costs, A_ub=table, b_ub=limit, bounds=(0, None), method="highs")
    heights = np.round(solved.x[:n], 2)
    found_heights: list[dict[Slot, float]] = [{} for _ in found.boundaries]
    for (t, slot), i in number.items():
        found_heights[t][slot] = float(heights[i])
    return found_heights
