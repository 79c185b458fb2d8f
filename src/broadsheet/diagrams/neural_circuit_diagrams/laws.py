"""The algebra's laws as rewrites: each is applied only where it holds, and then checked on random numbers.
Disjoint steps slide past each other by construction (see ``diagram``). What is left are laws that depend on what a
step is: linear steps on different axes of one array commute, softmax does not; elementwise functions pass wiring, not
sums; an outer product slides past a linear step on one of its factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.axes import Array
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step, renamed
from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Index, Letters, Pattern, View
from broadsheet.diagrams.neural_circuit_diagrams.linear import Conv, Einsum, Linear
from broadsheet.diagrams.neural_circuit_diagrams.opaque import Opaque
from broadsheet.diagrams.neural_circuit_diagrams.pointwise import Elementwise, Reduce
from broadsheet.errors import InvalidInput

TOLERANCE = 1e-10


class IllegalRewrite(InvalidInput):
    """A law that does not hold for these steps, or a rewrite that changed the numbers."""


def is_linear(op: Generator) -> bool:
    """Whether a step is linear in each of its inputs (an affine one is not)."""
    if isinstance(op, Elementwise):
        return op.is_linear
    if isinstance(op, Linear | Conv):
        return not op.bias
    if isinstance(op, Reduce):
        return op.kind in ("mean", "sum")
    return op.flat if isinstance(op, Opaque) else op.linear


def _wiring(step: Step) -> bool:
    """Whether a step only moves entries: what an elementwise function may pass."""
    if isinstance(step.op, Einsum):
        return len(step.at.ins) == 1 and sorted(step.at.ins[0]) == sorted(step.at.outs[0])
    return isinstance(step.op, View | Index)


def why_not(first: Step, second: Step) -> str | None:
    """Why two steps on one array do not commute; None where they do.

    Args:
        first, second: one array in, one out, the second on what the first makes, its letters those of the first.
    """
    ops = (first.op, second.op)
    cores = [{c for side in (s.op.eats, s.op.emits) for array in side or () for c in array} for s in (first, second)]
    for one, other in ((first, second), (second, first)):
        if isinstance(one.op, Elementwise):
            if _wiring(other) or (one.op.is_linear and is_linear(other.op)):
                return None
            return f"{one.op.label!r} acts on every entry and does not pass {type(other.op).__name__.lower()}"
    if any(s.op.eats is None and not _wiring(s) for s in (first, second)):
        return "one of them touches every axis"
    if cores[0] & cores[1]:
        return f"both touch the axis {sorted(cores[0] & cores[1])}"
    if any(isinstance(op, Index) for op in ops) or all(is_linear(op) for op in ops):
        return None
    other = next(op for op in ops if not is_linear(op))
    return f"{type(other).__name__.lower()} is not linear"


def commute(diagram: Diagram, step: int) -> Diagram:
    """Exchange two steps in a row on one array.

    Args:
        diagram: what to rewrite.
        step: number of the first; the second is the one that uses its output.

    Raises:
        IllegalRewrite: they are not in a row, or do not commute.
    """
    first, second, later, axes = _in_a_row(diagram, step)
    if any(len(side) != 1 for s in (first, second) for side in (s.ins, s.outs)):
        raise IllegalRewrite(f"step {step}: expected two steps in a row with one array in and one out each")
    if reason := why_not(first, later):
        raise IllegalRewrite(f"{_title(first)} and {_title(second)} do not commute: {reason}")
    at = later.at
    if _wiring(later) and isinstance(later.op, Einsum):
        middle = tuple(c for c in at.outs[0] if c in first.at.ins[0])
        middle = (*middle, *(c for c in first.at.ins[0] if c not in middle))
    else:
        middle = _after(first.at.ins[0], at)
    value = 1 + max(diagram.values)
    new = [
        replace(later, at=Pattern(first.at.ins, (middle,)), ins=first.ins, outs=(value,)),
        replace(first, at=Pattern((middle,), at.outs), ins=(value,), outs=second.outs),
    ]
    return _with(diagram, first, second, new, value, middle, axes)


def slide(diagram: Diagram, step: int) -> Diagram:
    """Let a linear step that follows an outer product come first, on the one factor that it touches.

    Args:
        diagram: what to rewrite.
        step: number of the outer product.

    Raises:
        IllegalRewrite: no outer product, or a step behind it that is not linear or touches several factors.
    """
    first, second, later, axes = _in_a_row(diagram, step)
    rows = first.at.ins
    together = [c for row in rows for c in row]
    outer = isinstance(first.op, Einsum) and len(rows) > 1 and sorted(together) == sorted(set(first.at.outs[0]))
    if not outer or len(first.at.outs[0]) != len(together):
        raise IllegalRewrite(f"step {step}: expected an outer product, two or more arrays side by side as one")
    if len(later.ins) != 1 or len(later.outs) != 1:
        raise IllegalRewrite(f"{_title(second)} has several arrays: an outer product slides past a step on one")
    if not is_linear(later.op):
        raise IllegalRewrite(f"{_title(second)} is not linear: an outer product does not slide past it")
    everywhere = later.op.eats is None and not isinstance(later.op, Elementwise)
    core = set(together) if everywhere else {c for row in later.op.eats or () for c in row}
    factor = next((j for j, row in enumerate(rows) if core <= set(row)), None)
    if factor is None:
        raise IllegalRewrite(f"{_title(second)} touches axes of several factors: {' '.join(sorted(core))}")
    middle = _after(rows[factor], later.at)
    value = 1 + max(diagram.values)
    ins = (*rows[:factor], middle, *rows[factor + 1 :])
    taken = (*first.ins[:factor], value, *first.ins[factor + 1 :])
    new = [
        replace(later, at=Pattern((rows[factor],), (middle,)), ins=(first.ins[factor],), outs=(value,)),
        replace(first, at=Pattern(ins, later.at.outs), ins=taken, outs=second.outs),
    ]
    return _with(diagram, first, second, new, value, middle, axes)


def _in_a_row(diagram: Diagram, step: int) -> tuple[Step, Step, Step, dict[str, Any]]:
    """A step, the one that uses its output, that one in letters of the first, and the axes of all letters."""
    if not 0 <= step < len(diagram.steps):
        raise InvalidInput(f"step={step}: the diagram has steps 0 to {len(diagram.steps) - 1}")
    first = diagram.steps[step]
    second = next((s for s in diagram.steps if len(first.outs) == 1 and s.ins == first.outs), None)
    if second is None or len(second.outs) != 1:
        raise IllegalRewrite(f"step {step}: expected two steps in a row with one array in and one out each")
    name = dict(zip(second.at.ins[0], first.at.outs[0], strict=True))
    name |= {c: f"{c}~" for c in second.at.letters if c not in name}
    at = Pattern((first.at.outs[0],), (tuple(name[c] for c in second.at.outs[0]),))
    later = replace(second, op=renamed(second.op, name), at=at)
    axes = {**diagram.axes_of(second), **diagram.axes_of(first)}
    axes |= {name[c]: a for c, a in diagram.axes_of(second).items() if name[c] not in axes}
    return first, second, later, axes


def _after(row: Letters, at: Pattern) -> Letters:
    """What a step makes of an array of these letters: new ones in the place of those that it consumes."""
    eaten = [c for c in at.ins[0] if c not in at.outs[0]]
    made = [c for c in at.outs[0] if c not in at.ins[0]]
    found: list[str] = []
    for c in row:
        found += made if eaten and c == eaten[0] else []
        found += [] if c in eaten else [c]
    return tuple(found if eaten else [*found, *made])


def _with(
    diagram: Diagram, first: Step, second: Step, new: list[Step], value: int, letters: Letters, axes: dict[str, Any]
) -> Diagram:
    """A diagram with two steps in the place of two others, and the value between them."""
    steps = [s for s in diagram.steps if s is not first and s is not second]
    where = min(i for i, s in enumerate(diagram.steps) if s is second) - 1
    steps[where:where] = new
    values = {**diagram.values, value: tuple(axes[c] for c in letters)}
    return Diagram.of(values, steps, diagram.inputs, diagram.outputs, diagram.weights, diagram.notes)


def _title(step: Step) -> str:
    return " ".join(filter(None, (type(step.op).__name__.lower(), getattr(step.op, "name", "") or step.op.label)))


def fuse(diagram: Diagram) -> Diagram:
    """Join every connected web of dots, cups, caps and crossings into one einsum (the spider law)."""
    steps = list(diagram.steps)
    values = dict(diagram.values)
    while True:
        maker = {s.outs[0]: s for s in steps if isinstance(s.op, Einsum)}
        pair = next(((maker[v], s) for s in steps if isinstance(s.op, Einsum) for v in s.ins if v in maker), None)
        if pair is None:
            return Diagram.of(values, steps, diagram.inputs, diagram.outputs, diagram.weights, diagram.notes)
        first, second = pair
        place = second.ins.index(first.outs[0])
        joins = _joined(first.at.outs[0], second.at.ins[place])
        of_first = {c: joins.get(("first", c), f"{c}^") for c in first.at.letters}
        of_second = {c: joins.get(("second", c), c) for c in second.at.letters}
        ins = tuple(tuple(of_first[c] for c in array) for array in first.at.ins)
        rest = [tuple(of_second[c] for c in array) for array in second.at.ins]
        outs = tuple(tuple(of_second[c] for c in array) for array in second.at.outs)
        at = Pattern((*rest[:place], *ins, *rest[place + 1 :]), outs)
        joined = replace(second, at=at, ins=(*second.ins[:place], *first.ins, *second.ins[place + 1 :]))
        lone = set(of_first.values()) - set(at.letters)
        if lone:
            # An axis that nothing goes into and that is summed away is a factor, its size: left as it is.
            return Diagram.of(values, steps, diagram.inputs, diagram.outputs, diagram.weights, diagram.notes)
        steps = [joined if s is second else s for s in steps if s is not first]


def _joined(made: Letters, taken: Letters) -> dict[tuple[str, str], str]:
    """One name for all letters of two steps that stand for the same wire, where one makes what the other takes.

    Args:
        made: letters of the array as the first step makes it.
        taken: letters of the same array as the second one takes it.
    """
    groups: list[set[tuple[str, str]]] = []
    for a, b in zip(made, taken, strict=True):
        pair = {("first", a), ("second", b)}
        touched = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touched)]
    return {letter: min(c for side, c in group if side == "second") for group in groups for letter in group}


def cancel(diagram: Diagram) -> Diagram:
    """Take out a split that a merge undoes, a merge that a split undoes, and permutations that change nothing."""
    steps = list(diagram.steps)
    while True:
        user = {v: s for s in steps for v in s.ins}
        idle = next((s for s in steps if _changes_nothing(s)), None)
        if idle is not None:
            through = {idle.outs[0]: idle.ins[0]}
            steps = [replace(u, ins=tuple(through.get(v, v) for v in u.ins)) for u in steps if u is not idle]
            diagram = replace(diagram, outputs=tuple(through.get(v, v) for v in diagram.outputs))
            continue
        found = None
        for s in steps:
            t = user.get(s.outs[0]) if s.outs else None
            if isinstance(s.op, View) and t is not None and isinstance(t.op, View):
                same = [a.size for a in diagram.values[s.ins[0]]] == [a.size for a in diagram.values[t.outs[0]]]
                if same and len(diagram.values[s.ins[0]]) == len(diagram.values[t.outs[0]]):
                    found = (s, t)
                    break
        if found is None:
            return Diagram.of(diagram.values, steps, diagram.inputs, diagram.outputs, diagram.weights, diagram.notes)
        s, t = found
        through = {t.outs[0]: s.ins[0]}
        steps = [replace(u, ins=tuple(through.get(v, v) for v in u.ins)) for u in steps if u is not s and u is not t]
        diagram = replace(diagram, outputs=tuple(through.get(v, v) for v in diagram.outputs))


def _changes_nothing(step: Step) -> bool:
    """Whether a step is an einsum that hands its one array on as it is."""
    at = step.at
    return isinstance(step.op, Einsum) and at.ins == at.outs and len(set(at.outs[0])) == len(at.outs[0])


LAWS: dict[str, Callable[..., Diagram]] = {"commute": commute, "slide": slide, "fuse": fuse, "cancel": cancel}


def rewrite(diagram: Diagram, law: str, check: bool = True, seed: int = 0, **options: Any) -> Diagram:
    """Apply a law.

    Args:
        diagram: what to rewrite; it is not changed.
        law: ``"fuse"``, ``"cancel"``, or with ``step=`` ``"commute"`` or ``"slide"``.
        check: compare both sides on random numbers in float64.
        seed: of the random numbers.
        **options: of the law.

    Raises:
        InvalidInput: an unknown law.
        IllegalRewrite: the law does not hold here, or both sides compute different numbers.
    """
    if law not in LAWS:
        raise InvalidInput(f"law={law!r}: expected one of {', '.join(LAWS)}")
    made = LAWS[law](diagram, **options)
    if check and (error := difference(diagram, made, seed)) > TOLERANCE:
        raise IllegalRewrite(f"the law {law!r} changed the numbers by {error:.1e}: it does not hold here")
    return made


def difference(one: Diagram, other: Diagram, seed: int = 0) -> float:
    """The largest relative difference of two diagrams' outputs on the same random inputs and weights.

    Args:
        one, other: of the same inputs; float64 is used.
        seed: of the random numbers.
    """
    inputs, weights = random_inputs(one, seed)
    weights = {**random_weights(other, seed, weights), **weights}
    first, second = one.run(*inputs, weights=weights), other.run(*inputs, weights=weights)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (first, second)), strict=True)
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1.0)) for a, b in pairs if a.numel()), default=0.0)


def random_inputs(diagram: Diagram, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Random inputs in float64 for a diagram (symbolic sizes are drawn too, integers are small), and weights in it."""
    random = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    integers = {s.ins[0] for s in diagram.steps if type(s.op).__name__ == "Embedding"}

    def made(array: Array, value: int) -> Tensor:
        for a in array:
            sizes.setdefault(a.id, a.size or int(torch.randint(2, 5, (1,), generator=random)))
        shape = [sizes[a.id] for a in array]
        if value in integers:
            return torch.randint(0, 2, shape, generator=random)
        return torch.randn(shape, generator=random, dtype=torch.float64)

    inputs = [made(diagram.values[v], v) for v in diagram.inputs]
    held = {n: w.double() if w.is_floating_point() else w for n, w in diagram.weights.items()}
    return inputs, random_weights(diagram, seed, held, sizes)


def random_weights(diagram: Diagram, seed: int, held: dict[str, Tensor], sizes: dict[str, int] | None = None):
    """Weights of linear steps that a diagram has no numbers for."""
    random = torch.Generator().manual_seed(seed + 1)
    sizes, held = sizes or {}, dict(held)
    for step in diagram.steps:
        if not isinstance(step.op, Linear):
            continue
        axes = diagram.axes_of(step)
        sides = {}
        for side, letters in (("in", step.op.before), ("out", step.op.after)):
            sides[side] = [axes[c].size or sizes.get(axes[c].id, 3) for c in letters]
        sides["out"], sides["in"] = (sides["in"], sides["out"]) if step.op.transposed else (sides["out"], sides["in"])
        held.setdefault(
            f"{step.op.name}.weight", torch.randn(*sides["out"], *sides["in"], generator=random, dtype=torch.float64)
        )
        if step.op.bias:
            held.setdefault(f"{step.op.name}.bias", torch.randn(sides["out"], generator=random, dtype=torch.float64))
    return held
