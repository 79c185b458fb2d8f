"""Diagrams: steps between tuples of arrays, composed one after the other and side by side.
A diagram is held as an open graph in which every value is made once and used once, with copies and deletions as steps
of their own. Associativity, identities and the interchange of disjoint steps then hold by construction: expressions
that differ by them only are the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.diagrams.neural_circuit_diagrams.axes import Array, Axis, describe, first_difference
from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Letters, Pattern, View
from broadsheet.errors import InvalidInput

LETTERED = ("before", "after", "axis", "over", "parts", "whole", "rows", "columns", "channels")


@dataclass(frozen=True)
class Step:
    """A generator at work: its pattern, the values that it takes and makes, and the module that it came from."""

    op: Generator
    at: Pattern
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    path: str = ""


def renamed(op: Generator, name: Mapping[str, str]) -> Generator:
    """A generator with other letters."""

    def change(part: Any) -> Any:
        return tuple(map(change, part)) if isinstance(part, tuple) else name.get(part, part)

    changed = {f.name: change(getattr(op, f.name)) for f in fields(op) if f.name in LETTERED}
    return replace(op, **changed) if changed else op


@dataclass(frozen=True, eq=False)
class Diagram:
    """A function between tuples of arrays, drawn.

    Args:
        values: the type of every value.
        steps: in an order in which they can run.
        inputs, outputs: values from and to outside.
        weights: tensors by name.
        notes: what stands at values' ends in a drawing (saved values), by value.
    """

    values: dict[int, Array]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(
        values: Mapping[int, Array],
        steps: Sequence[Step],
        inputs: Sequence[int],
        outputs: Sequence[int],
        weights: Mapping[str, Tensor] | None = None,
        notes: Mapping[int, str] | None = None,
    ) -> Diagram:
        """A diagram with sizes and kinds of axes that are the same filled in, and checked.

        Raises:
            InvalidInput: a value made or used twice, or two sizes for one axis.
        """
        made = [*inputs, *(v for step in steps for v in step.outs)]
        used = [*outputs, *(v for step in steps for v in step.ins)]
        if sorted(made) != sorted(used) or len(set(made)) != len(made):
            raise InvalidInput("every value of a diagram must be made once and used once: copy or discard it")
        size: dict[str, int] = {}
        kind: dict[str, str] = {}
        for value in made:
            for axis in values[value]:
                if axis.kind != "plain":
                    kind.setdefault(axis.id, axis.kind)
                if axis.size is not None and size.setdefault(axis.id, axis.size) != axis.size:
                    raise InvalidInput(f"axis {axis.name!r} has the sizes {size[axis.id]} and {axis.size}: rename one")
        filled = {
            v: tuple(replace(a, size=size.get(a.id), kind=kind.get(a.id, "plain")) for a in values[v]) for v in made
        }
        return Diagram(filled, tuple(steps), tuple(inputs), tuple(outputs), dict(weights or {}), dict(notes or {}))

    # ------------------------------------------------------------------------------------------------------- types

    @property
    def domain(self) -> tuple[Array, ...]:
        """Types of the inputs."""
        return tuple(self.values[v] for v in self.inputs)

    @property
    def codomain(self) -> tuple[Array, ...]:
        """Types of the outputs."""
        return tuple(self.values[v] for v in self.outputs)

    @property
    def signature(self) -> str:
        """Domain and codomain as text."""
        return f"{describe(self.domain)} -> {describe(self.codomain)}"

    def __repr__(self) -> str:
        return f"Diagram({self.signature}; {len(self.steps)} steps)"

    def axes_of(self, step: Step) -> dict[str, Axis]:
        """The axis of every letter of a step (of its inputs, where both sides have it)."""
        found: dict[str, Axis] = {}
        for value, letters in (*zip(step.ins, step.at.ins, strict=True), *zip(step.outs, step.at.outs, strict=True)):
            for letter, axis in zip(letters, self.values[value], strict=True):
                if letter not in found or found[letter].size is None:
                    found[letter] = axis
        return found

    def bind(self, **sizes: int) -> Diagram:
        """The diagram with sizes for axes by name."""
        known = {a.name for array in self.values.values() for a in array}
        if missing := set(sizes) - known:
            raise InvalidInput(f"no axis {sorted(missing)}: the diagram has {sorted(known)}")
        values = {
            v: tuple(replace(a, size=sizes.get(a.name, a.size)) for a in array) for v, array in self.values.items()
        }
        return Diagram.of(values, self.steps, self.inputs, self.outputs, self.weights, self.notes)

    # ----------------------------------------------------------------------------------------------------- meaning

    def run(self, *tensors: Tensor, weights: Mapping[str, Tensor] | None = None) -> Any:
        """Compute.

        Args:
            *tensors: one for each input, axes in order.
            weights: in place of the diagram's own.

        Returns:
            A tensor, or a tuple of them where the diagram has not exactly one output.

        Raises:
            InvalidInput: a wrong number of tensors, of axes, or a wrong size.
        """
        if len(tensors) != len(self.inputs):
            raise InvalidInput(f"{len(tensors)} tensors for a diagram that takes {describe(self.domain)}")
        weights = self.weights if weights is None else weights
        held: dict[int, Tensor] = {}
        seen: dict[str, int] = {}

        def hold(value: int, x: Tensor) -> None:
            array = self.values[value]
            if x.ndim != len(array) or any(a.size not in (None, n) for a, n in zip(array, x.shape, strict=True)):
                raise InvalidInput(f"a tensor of shape {list(x.shape)} where {describe((array,))} was expected")
            for axis, n in zip(array, x.shape, strict=True):
                seen[axis.id] = n
            held[value] = x

        for value, x in zip(self.inputs, tensors, strict=True):
            hold(value, x)
        for step in self.steps:
            xs = [held.pop(value) for value in step.ins]
            size = {c: n for x, at in zip(xs, step.at.ins, strict=True) for c, n in zip(at, x.shape, strict=True)}
            for value, letters in zip(step.outs, step.at.outs, strict=True):
                for letter, axis in zip(letters, self.values[value], strict=True):
                    if letter not in size:
                        size[letter] = seen.get(axis.id, -1) if axis.size is None else axis.size
            if isinstance(step.op, View):
                _infer(step.op, size)
            made = step.op.run(xs, step.at, size, weights)
            for value, x in zip(step.outs, made, strict=True):
                hold(value, x)
        found = tuple(held[value] for value in self.outputs)
        return found[0] if len(found) == 1 else found

    __call__ = run

    def module(self) -> nn.Module:
        """The diagram as a module with its weights as parameters."""
        from broadsheet.diagrams.neural_circuit_diagrams.modules import DiagramModule

        return DiagramModule(self)

    # -------------------------------------------------------------------------------------------------- composition

    def __rshift__(self, other: Diagram) -> Diagram:
        """This, then ``other``, lifted over the axes that it does not name.

        Raises:
            InvalidInput: types that do not meet; both are shown with the first place where they differ.
        """
        later = other if first_difference(self.codomain, other.domain) is None else lifted_to(other, self.codomain)
        where = first_difference(self.codomain, later.domain)
        if where is not None:
            raise InvalidInput(
                f"types do not meet: {describe(self.codomain)} from the left, {describe(other.domain)} on the right;"
                f" first difference at {where}. Permute, rename or lift one of them"
            )
        shift = 1 + max(self.values, default=0)
        moved = later.shifted(shift)
        joined = dict(zip(moved.inputs, self.outputs, strict=True))
        steps = [replace(s, ins=tuple(joined.get(v, v) for v in s.ins)) for s in moved.steps]
        outputs = [joined.get(v, v) for v in moved.outputs]
        sized = {v: self.values[joined[v]] if v in joined else a for v, a in moved.values.items()}
        known = {a.id: a.size for array in later.values.values() for a in array if a.size is not None}
        values = {
            v: tuple(replace(a, size=known.get(a.id) if a.size is None else a.size) for a in array)
            for v, array in {**self.values, **sized}.items()
        }
        weights, notes = _merged(self.weights, later.weights), {**self.notes, **moved.notes}
        return Diagram.of(values, [*self.steps, *steps], self.inputs, outputs, weights, notes)

    def __and__(self, other: Diagram) -> Diagram:
        """This over ``other``, side by side."""
        moved = other.shifted(1 + max(self.values, default=0))
        return Diagram.of(
            {**self.values, **moved.values},
            [*self.steps, *moved.steps],
            [*self.inputs, *moved.inputs],
            [*self.outputs, *moved.outputs],
            _merged(self.weights, moved.weights),
            {**self.notes, **moved.notes},
        )

    def shifted(self, by: int) -> Diagram:
        """The same with other numbers for its values."""
        steps = [replace(s, ins=tuple(v + by for v in s.ins), outs=tuple(v + by for v in s.outs)) for s in self.steps]
        return Diagram(
            {v + by: array for v, array in self.values.items()},
            tuple(steps),
            tuple(v + by for v in self.inputs),
            tuple(v + by for v in self.outputs),
            self.weights,
            {v + by: note for v, note in self.notes.items()},
        )

    # ---------------------------------------------------------------------------------------------------- equality

    def fingerprint(self) -> tuple[Any, ...]:
        """The graph without numbers and names of letters: equal for diagrams that are the same up to interchange."""
        table: dict[Any, int] = {}
        sign = {v: table.setdefault(("in", i, len(self.values[v])), len(table)) for i, v in enumerate(self.inputs)}
        rest = []
        for step in self.steps:
            plain = {c: f"l{i}" for i, c in enumerate(step.at.letters)}
            at = tuple(tuple(tuple(plain[c] for c in a) for a in side) for side in (step.at.ins, step.at.outs))
            key = (renamed(step.op, plain), at, tuple(sign[v] for v in step.ins))
            number = table.setdefault(key, len(table))
            for i, v in enumerate(step.outs):
                sign[v] = table.setdefault((number, i), len(table))
            if not step.outs:
                rest.append(key)
        by_number = {n: key for key, n in table.items()}

        def spelled(number: int, memo: dict[int, Any]) -> Any:
            if number not in memo:
                key = by_number[number]
                if key[0] == "in":
                    memo[number] = hash(key)
                elif len(key) == 2:
                    memo[number] = hash((spelled(key[0], memo), key[1]))
                else:
                    memo[number] = hash((repr(key[0]), key[1], tuple(spelled(n, memo) for n in key[2])))
            return memo[number]

        memo: dict[int, Any] = {}
        ends = sorted(hash((repr(k[0]), k[1], tuple(spelled(n, memo) for n in k[2]))) for k in rest)
        sizes = tuple(tuple(a.size for a in array) for array in (*self.domain, *self.codomain))
        return (len(self.inputs), tuple(spelled(sign[v], memo) for v in self.outputs), tuple(ends), sizes)

    def equals(self, other: Diagram) -> bool:
        """Whether both are the same drawing up to sliding disjoint steps past each other and renaming axes."""
        return self.fingerprint() == other.fingerprint()

    # ------------------------------------------------------------------- what other modules know how to do with it

    def einsum_form(self) -> Diagram:
        """Every connected web of linear wiring as one einsum; see ``laws.fuse``."""
        return self.rewrite("fuse")

    def rewrite(self, law: str, **options: Any) -> Diagram:
        """Apply a law of the algebra by name, checked on random numbers; see ``laws.LAWS``."""
        from broadsheet.diagrams.neural_circuit_diagrams.laws import rewrite

        return rewrite(self, law, **options)

    def cost(self, bytes_per_element: int = 4) -> Any:
        """Multiply-adds and memory, column by column; see ``costs.Cost``."""
        from broadsheet.diagrams.neural_circuit_diagrams.costs import cost

        return cost(self, bytes_per_element)

    def backward(self) -> Any:
        """The forward diagram with what it saves and the backward diagram; see ``gradients.BackwardPair``."""
        from broadsheet.diagrams.neural_circuit_diagrams.gradients import backward

        return backward(self)

    def svg(self, **options: Any) -> str:
        """The drawing; options as of ``drawing.draw``."""
        from broadsheet.diagrams.neural_circuit_diagrams.drawing import draw

        return draw(self, **options)

    def save(self, path: Any, **options: Any) -> Any:
        """Write the drawing as ``.svg`` or ``.pdf``; the path comes back."""
        from broadsheet.diagrams.neural_circuit_diagrams.export import save

        return save(self, path, **options)

    def show_index(self, **places: int) -> Diagram:
        """The diagram with indices at its outputs: one entry along each named axis."""
        from broadsheet.diagrams.neural_circuit_diagrams.language import show_index

        return show_index(self, **places)


def _infer(op: View, size: dict[str, int]) -> None:
    """Fill in the one size that a merge or split leaves open."""
    for some, all_of in ((op.after, op.before), (op.before, op.after)):
        unknown = [c for c in some if size[c] < 0]
        if len(unknown) == 1 and all(size[c] >= 0 for c in all_of):
            total = 1
            for c in all_of:
                total *= size[c]
            for c in some:
                total = total // size[c] if c != unknown[0] else total
            size[unknown[0]] = total


def _merged(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in set(one) & set(other):
        if one[name] is not other[name] and not torch.equal(one[name], other[name]):
            raise InvalidInput(f"two different weights are called {name!r}: give one of them another name")
    return {**one, **other}


def lifted_to(diagram: Diagram, types: tuple[Array, ...]) -> Diagram:
    """The diagram broadcast so that its inputs have the given types: each must hold the input's own axes, in order."""
    if len(types) != len(diagram.inputs):
        return diagram
    extra: dict[int, list[Axis | None]] = {}
    values: dict[int, Array] = {}
    for value, array in zip(diagram.inputs, types, strict=True):
        own, places = list(diagram.values[value]), []
        for axis in array:
            mine = bool(own) and own[0].id == axis.id
            places.append(None if mine else axis)
            if mine:
                own.pop(0)
        if own:
            return diagram
        extra[value], values[value] = places, array
    steps = []
    for step in diagram.steps:
        taken, ins = set(step.at.letters), []
        lift: dict[str, str] = {}
        known = diagram.axes_of(step)
        for value, letters in zip(step.ins, step.at.ins, strict=True):
            rest, row = iter(letters), []
            for axis in extra[value]:
                if axis is None:
                    row.append(next(rest))
                    continue
                letter = lift.get(axis.id)
                if letter is None:
                    letter = axis.name
                    while letter in taken:
                        letter += "'"
                    taken.add(letter)
                    lift[axis.id], known[letter] = letter, axis
                row.append(letter)
            ins.append(tuple(row))
        outs = []
        for value, letters in zip(step.outs, step.at.outs, strict=True):
            row = _placed(tuple(ins), letters, set(lift.values()))
            new = set(lift.values())
            own = iter(diagram.values[value])
            array, marks = [], []
            for letter in row:
                axis = known[letter] if letter in new else next(own)
                array.append(axis)
                marks.append(axis if letter in new else None)
            values[value], extra[value] = tuple(array), marks
            outs.append(row)
        steps.append(replace(step, at=Pattern(tuple(ins), tuple(outs))))
    return Diagram.of(values, steps, diagram.inputs, diagram.outputs, diagram.weights, diagram.notes)


def _placed(ins: tuple[Letters, ...], out: Letters, lifted: set[str]) -> Letters:
    """Where lifted letters stand in an output: behind the letter before them, as in the first input that has them."""
    row = list(out)
    for letters in ins:
        for i, letter in enumerate(letters):
            if letter not in lifted or letter in row:
                continue
            before = [c for c in letters[:i] if c in row]
            if before:
                row.insert(row.index(before[-1]) + 1, letter)
            else:
                row.insert(0 if not letters[:i] else len(row), letter)
    return tuple(row)


def identity(*arrays: Array) -> Diagram:
    """Wires only."""
    numbers = tuple(range(len(arrays)))
    return Diagram.of(dict(enumerate(arrays)), [], numbers, numbers)


def single(
    op: Generator, at: Pattern, axes: Mapping[str, Axis], weights: Mapping[str, Tensor] | None = None
) -> Diagram:
    """A diagram of one step."""
    n = len(at.ins)
    values = {i: tuple(axes[c] for c in letters) for i, letters in enumerate((*at.ins, *at.outs))}
    ins, outs = tuple(range(n)), tuple(range(n, len(values)))
    return Diagram.of(values, [Step(op, at, ins, outs)], ins, outs, weights)


Function = Callable[..., Any]
