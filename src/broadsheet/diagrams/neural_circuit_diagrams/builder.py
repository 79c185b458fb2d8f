"""Write a diagram as a program: values may be used often or never, copies and deletions are put in at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.axes import Array, Axis
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.generators import Copy, Discard, Generator, Pattern


class Builder:
    """Collects steps; ``finish`` makes them a diagram in which every value is used exactly once."""

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        self.weights: dict[str, Tensor] = dict(weights or {})
        self.values: dict[int, Array] = {}
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.gradients: dict[str, list[int]] = {}
        self.paths: dict[int, str] = {}
        self._fresh = 0

    def value(self, array: Array) -> int:
        """A new value of a type."""
        number = len(self.values)
        self.values[number] = tuple(array)
        return number

    def input(self, array: Array) -> int:
        """A new value that comes in from outside."""
        self.inputs.append(self.value(array))
        return self.inputs[-1]

    def fresh(self, name: str, size: int | None) -> Axis:
        """An axis that no other is the same as."""
        self._fresh += 1
        return Axis(f"{name}:{self._fresh}:{id(self)}", name, size)

    def step(self, op: Generator, at: Pattern, ins: Sequence[int], axes: Mapping[str, Axis]) -> list[int]:
        """Put a step at the end; values out."""
        outs = [self.value(tuple(axes[c] for c in letters)) for letters in at.outs]
        self.steps.append(Step(op, at, tuple(ins), tuple(outs)))
        return outs

    def copies(self, value: int, n: int) -> list[int]:
        """A value to be used ``n`` times."""
        return [value] * n

    def weight_gradient(self, name: str, value: int) -> None:
        """Note a value as (part of) the gradient of a weight."""
        self.gradients.setdefault(name, []).append(value)

    def summed(self, value: int, have, want, axes) -> list[int]:
        """``value`` in the order of ``want``, summed over the letters that it lacks."""
        from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum

        return [value] if have == want else self.step(Einsum(), Pattern((have,), (want,)), [value], axes)

    def fresh_rows(self, at: Pattern, column: str, rows: int, axes, ins):
        """Arguments of the step that adds up cotangents in the rows of a table."""
        return Pattern((*at.ins, *at.outs), (("row", column),)), ins, {**axes, "row": self.fresh("v", rows)}

    def finish(self, outputs: Sequence[int], keep_inputs: bool = True) -> Diagram:
        """The diagram of what ``outputs`` need; inputs that nothing needs are discarded, or left out."""
        needed, kept = set(outputs), []
        for step in reversed(self.steps):
            if needed & set(step.outs):
                kept.append(step)
                needed |= set(step.ins)
        kept.reverse()
        if not keep_inputs:
            self.inputs = [value for value in self.inputs if value in needed]
        uses = Counter(outputs) + Counter(value for step in kept for value in step.ins)
        branches: dict[int, list[int]] = {}
        steps: list[Step] = []

        def split(value: int) -> None:
            array = self.values[value]
            letters = tuple(f"c{i}" for i in range(len(array)))
            if uses[value] == 0:
                steps.append(Step(Discard(), Pattern((letters,), ()), (value,), ()))
            elif uses[value] > 1:
                made = [self.value(array) for _ in range(uses[value])]
                branches[value] = list(reversed(made))
                for each in made:
                    self.paths[each] = self.paths.get(value, "")
                at = Pattern((letters,), (letters,) * len(made))
                steps.append(Step(Copy(len(made)), at, (value,), tuple(made)))

        def take(value: int) -> int:
            return branches[value].pop() if value in branches else value

        for value in self.inputs:
            split(value)
        for step in kept:
            steps.append(Step(step.op, step.at, tuple(map(take, step.ins)), step.outs, step.path))
            for value in step.outs:
                split(value)
        return Diagram.of(self.values, steps, self.inputs, [take(value) for value in outputs], self.weights)
