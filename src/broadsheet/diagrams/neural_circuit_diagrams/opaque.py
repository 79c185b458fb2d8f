"""Steps that are functions and no more: the user's own, what the tracer does not know, and their backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from sympy import Integer

from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Letters, Pattern, aligned
from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class Opaque(Generator):
    """A function drawn as a box that touches what it consumes and emits; other letters are mapped over.

    Args:
        name: what is written in the box.
        fn: the function on the core axes alone (on whole arrays where ``whole``).
        before, after: its letters, for each input and output.
        whole: whether ``fn`` takes the arrays as they are.
        learned: whether it has weights (bold letter).
        flat: whether it is linear in its input.
    """

    name: str = ""
    before: tuple[Letters, ...] = ()
    after: tuple[Letters, ...] = ()
    fn: Callable | None = field(default=None, compare=False)
    whole: bool = False
    learned: bool = False
    flat: bool = False
    known: bool = False  # by its name alone, whatever the function
    glyph: ClassVar[str] = "box"

    @property
    def label(self) -> str:
        return self.name

    @property
    def eats(self):
        return self.before

    @property
    def emits(self):
        return self.after

    def run(self, xs, at, size, weights):
        if self.fn is None:
            raise InvalidInput(f"the box {self.name!r} has no function: give functions={{{self.name!r}: f}}")
        if self.whole:
            made = self.fn(*xs)
            return list(made) if isinstance(made, (tuple, list)) else [made]
        lifted = [c for c in dict.fromkeys(c for a in at.ins for c in a) if not any(c in core for core in self.before)]
        xs = [
            aligned(x, letters, (*(c for c in lifted if c in letters), *core))
            for x, letters, core in zip(xs, at.ins, self.before, strict=True)
        ]
        f = self.fn
        for c in reversed(lifted):
            f = torch.vmap(f, in_dims=tuple(0 if c in letters else None for letters in at.ins))
        made = f(*xs)
        made = list(made) if isinstance(made, (tuple, list)) else [made]
        return [aligned(y, (*lifted, *core), out) for y, core, out in zip(made, self.after, at.outs, strict=True)]

    def madds(self, at, size):
        return Integer(0)


@dataclass(frozen=True)
class Vjp(Generator):
    """The vector-Jacobian product of another step, from its inputs and the cotangents of its outputs.

    Args:
        of, at: the step and its pattern.
        wrt: weights whose gradients come out behind those of the inputs.
    """

    of: Generator = field(default_factory=Generator)
    at: Pattern = field(default_factory=lambda: Pattern((), ()))
    wrt: tuple[str, ...] = ()
    glyph: ClassVar[str] = "box"

    @property
    def label(self) -> str:
        name = getattr(self.of, "name", "") or self.of.label or type(self.of).__name__.lower()
        return f"{name}′"

    @property
    def names(self):
        return self.of.names

    def run(self, xs, at, size, weights):
        n = len(self.at.ins)

        def f(arrays, learned):
            return tuple(self.of.run(list(arrays), self.at, size, {**weights, **learned}))

        back: Any = torch.func.vjp(f, tuple(xs[:n]), {name: weights[name] for name in self.wrt})[1]
        inputs, learned = back(tuple(xs[n:]))
        return [*inputs, *(learned[name] for name in self.wrt)]


def differentiate(op: Generator, build: Any, at: Pattern, gs: list[int], saved: list[int], axes: Any) -> list:
    """The backward of a step that has no drawing of its own: one box, with the inputs saved."""
    if op.saves != "x":
        raise InvalidInput(f"{type(op).__name__} saves {op.saves!r}: it needs a backward rule of its own")
    wrt = tuple(n for n in op.names if n in build.weights and "running_" not in n)
    extra, known = [], dict(axes)
    for name in wrt:
        letters = tuple(f"{name}:{i}" for i in range(build.weights[name].ndim))
        for letter, size in zip(letters, build.weights[name].shape, strict=True):
            known[letter] = build.fresh("w", size)
        extra.append(letters)
    outs = build.step(Vjp(op, at, wrt), Pattern((*at.ins, *at.outs), (*at.ins, *extra)), [*saved, *gs], known)
    for name, value in zip(wrt, outs[len(at.ins) :], strict=True):
        build.weight_gradient(name, value)
    return outs[: len(at.ins)]
