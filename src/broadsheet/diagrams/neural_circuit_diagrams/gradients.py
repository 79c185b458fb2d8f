"""Backward diagrams: the mirror image of a diagram, with what it saves handed over.
Every generator knows its own backward rule; here they are strung together in reverse order, and only what the rules
ask for is saved. A value and its copies are saved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sympy import Expr, Integer
from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.builder import Builder
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram
from broadsheet.diagrams.neural_circuit_diagrams.generators import Copy, volume
from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class BackwardPair:
    """A diagram that saves what its backward needs, and its backward.

    Args:
        forward: outputs as before, then the saved values.
        backward: from cotangents of the outputs and the saved values to cotangents of ``inputs`` and of ``weights``.
        n_outputs: how many outputs are not saved values.
        inputs: numbers of the inputs that have a cotangent (integers have none).
        weights: names of the weights whose gradients come last.
    """

    forward: Diagram
    backward: Diagram
    n_outputs: int
    inputs: tuple[int, ...]
    weights: tuple[str, ...]

    @property
    def saved(self) -> tuple[Any, ...]:
        """Types of the saved values."""
        return self.forward.codomain[self.n_outputs :]

    @property
    def saved_elements(self) -> Expr:
        """How many numbers are held from the forward to the backward pass."""
        return sum(
            (
                volume(tuple(map(str, range(len(array)))), {str(i): a.extent for i, a in enumerate(array)})
                for array in self.saved
            ),
            Integer(0),
        )

    def run(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Any, tuple, dict[str, Tensor]]:
        """Forward, then backward.

        Args:
            inputs: of the forward diagram.
            cotangents: gradients of a number by each output, in its shape.

        Returns:
            the outputs, cotangents of the inputs numbered ``self.inputs``, and gradients of the weights by name.
        """
        made = self.forward.run(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        found = self.backward.run(*cotangents, *made[self.n_outputs :])
        found = found if isinstance(found, tuple) else (found,)
        n = len(self.inputs)
        shapes = {name: self.backward.weights[name].shape for name in self.weights}
        weights = {name: g.reshape(shapes[name]) for name, g in zip(self.weights, found[n:], strict=True)}
        return made[: self.n_outputs], found[:n], weights


def backward(diagram: Diagram) -> BackwardPair:
    """Build the backward of a diagram.

    Raises:
        InvalidInput: nothing in it has a gradient.
    """
    build = Builder(diagram.weights)
    cotangent: dict[int, int | None] = {}
    outside = [build.input(diagram.values[v]) for v in diagram.outputs]
    cotangent.update(zip(diagram.outputs, outside, strict=True))
    root = {v: v for v in diagram.values}
    for step in diagram.steps:
        if isinstance(step.op, Copy):
            root.update(dict.fromkeys(step.outs, root[step.ins[0]]))
    kept: dict[int, int] = {}

    def saved(value: int) -> int:
        if root[value] not in kept:
            kept[root[value]] = build.input(diagram.values[root[value]])
        return kept[root[value]]

    for step in reversed(diagram.steps):
        gs = [cotangent.get(v) for v in step.outs]
        if any(g is None for g in gs):
            if isinstance(step.op, Copy):
                gs = [g for g in gs if g is not None]
            else:
                gs = []
            if not gs:
                cotangent.update(dict.fromkeys(step.ins))
                continue
        if isinstance(step.op, Copy) and len(gs) == 1:
            cotangent[step.ins[0]] = gs[0]
            continue
        op = replace(step.op, n=len(gs)) if isinstance(step.op, Copy) else step.op
        needed = {"x": step.ins, "y": step.outs, "": ()}[op.saves]
        found = op.pullback(
            build, step.at, [g for g in gs if g is not None], [saved(v) for v in needed], diagram.axes_of(step)
        )
        cotangent.update(zip(step.ins, found, strict=True))
    inputs = tuple(i for i, v in enumerate(diagram.inputs) if cotangent.get(v) is not None)
    names = tuple(sorted(build.gradients))
    results = [cotangent[diagram.inputs[i]] for i in inputs]
    results += [_total(build, build.gradients[name]) for name in names]
    if not results:
        raise InvalidInput("nothing in the diagram has a gradient: neither an input nor a weight")
    used = _needed(build, results)
    kept = {v: i for v, i in kept.items() if i in used}
    build.inputs = [*outside, *kept.values()]
    marks = {v: f"s{n}" for n, v in enumerate(kept, 1)}
    back = build.finish([value for value in results if value is not None])
    back = replace(back, notes={i: marks[v] for v, i in kept.items()})
    return BackwardPair(_saving(diagram, marks), back, len(diagram.outputs), inputs, names)


def _total(build: Builder, values: list[int]) -> int:
    from broadsheet.diagrams.neural_circuit_diagrams.generators import Add, Pattern

    if len(values) == 1:
        return values[0]
    array = build.values[values[0]]
    letters = tuple(f"l{i}" for i in range(len(array)))
    at = Pattern((letters,) * len(values), (letters,))
    return build.step(Add(len(values)), at, values, dict(zip(letters, array, strict=True)))[0]


def _needed(build: Builder, results: Sequence[Any]) -> set[int]:
    needed = set(results)
    for step in reversed(build.steps):
        if needed & set(step.outs):
            needed |= set(step.ins)
    return needed


def _saving(diagram: Diagram, marks: dict[int, str]) -> Diagram:
    """The diagram with the marked values as further outputs."""
    build = Builder(diagram.weights)
    new: dict[int, int] = {v: build.input(diagram.values[v]) for v in diagram.inputs}
    for step in diagram.steps:
        if isinstance(step.op, Copy):
            new.update(dict.fromkeys(step.outs, new[step.ins[0]]))
            continue
        outs = [build.value(diagram.values[v]) for v in step.outs]
        new.update(zip(step.outs, outs, strict=True))
        build.steps.append(replace(step, ins=tuple(new[v] for v in step.ins), outs=tuple(outs)))
    made = build.finish([*(new[v] for v in diagram.outputs), *(new[v] for v in marks)])
    return replace(made, notes=dict(zip(made.outputs[len(diagram.outputs) :], marks.values(), strict=True)))
