"""Submodules as boxes: how deep a drawing goes, and repeated blocks drawn once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sympy import Expr, Integer

from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Pattern


@dataclass(frozen=True)
class Block(Generator):
    """A diagram inside a box with a title; ``times`` in a row, each with weights of its own.

    Args:
        name: the title.
        inner: one diagram for each repetition, all of the same shape.
    """

    name: str = ""
    inner: tuple[Diagram, ...] = field(default=(), compare=False)
    glyph: ClassVar[str] = "block"

    @property
    def label(self) -> str:
        return self.name if len(self.inner) == 1 else f"{self.name} ×{len(self.inner)}"

    @property
    def names(self):
        return tuple(name for d in self.inner for name in d.weights)

    def run(self, xs, at, size, weights):
        for d in self.inner:
            made = d.run(*xs, weights=weights)
            xs = list(made) if isinstance(made, tuple) else [made]
        return xs

    def madds(self, at: Pattern, size: Mapping[str, Any]) -> Expr:
        return sum((d.cost().madds for d in self.inner), Integer(0))


def grouped(diagram: Diagram, depth: int, collapse: bool = True) -> Diagram:
    """Steps of the same submodule at a depth as one box; boxes of equal content in a row as one with their number.

    Args:
        diagram: traced from a module, so that steps know where they come from.
        depth: levels of submodules that stay open; 0 for the module as one box.
        collapse: False leaves every repetition standing.
    """
    keys = [".".join(step.path.split(".")[:depth]) if depth else "" for step in diagram.steps]
    # Module lists are levels without a module of their own: a number belongs to the name before it.
    for i, step in enumerate(diagram.steps):
        parts = step.path.split(".")
        if depth and len(parts) > depth and parts[depth].isdigit():
            keys[i] = ".".join(parts[: depth + 1])
    made = diagram
    for key in dict.fromkeys(keys):
        if key == "" and depth:
            continue
        made = _boxed(
            made, key, [i for i, s in enumerate(diagram.steps) if keys[i] == key and diagram.steps[i] is s], diagram
        )
    return _collapsed(made) if collapse else made


def _boxed(made: Diagram, key: str, numbers: list[int], whole: Diagram) -> Diagram:
    chosen = [whole.steps[i] for i in numbers]
    inside = [s for s in made.steps if any(s is c for c in chosen)]
    outs = {v for s in inside for v in s.outs}
    ins = {v for s in inside for v in s.ins}
    # A box must not stand both before and after a step outside it.
    after: set[int] = set()
    for s in made.steps:
        if any(s is c for c in inside):
            if set(s.ins) & after:
                return made
        elif set(s.ins) & (outs | after):
            after |= set(s.outs)
    into = [v for s in inside for v in s.ins if v not in outs]
    out = [v for s in inside for v in s.outs if v not in ins]
    names = {n for s in inside for n in s.op.names}
    inner = Diagram.of(made.values, inside, into, out, {n: w for n, w in made.weights.items() if n in names})
    letters = {v: tuple(f"{v}:{i}" for i in range(len(made.values[v]))) for v in (*into, *out)}
    at = Pattern(tuple(letters[v] for v in into), tuple(letters[v] for v in out))
    box = Step(Block(key or "model", (inner,)), at, tuple(into), tuple(out), key)
    blocked, early, late = set(out), [], []
    for s in made.steps:
        if any(s is c for c in inside):
            continue
        if set(s.ins) & blocked:
            late.append(s)
            blocked |= set(s.outs)
        else:
            early.append(s)
    return replace(made, steps=(*early, box, *late))


def _shape(d: Diagram) -> Any:
    """What a diagram is without the names of its weights."""
    bare = [replace(s, op=replace(s.op, name="") if hasattr(s.op, "name") and s.op.names else s.op) for s in d.steps]
    return replace(d, steps=tuple(bare)).fingerprint()


def _collapsed(d: Diagram) -> Diagram:
    steps = list(d.steps)
    while True:
        user = {v: s for s in steps for v in s.ins}
        found = None
        for s in steps:
            if not isinstance(s.op, Block) or not s.outs:
                continue
            t = user.get(s.outs[0])
            if t is None or not isinstance(t.op, Block) or t is s or t.ins != s.outs:
                continue
            if _shape(s.op.inner[-1]) == _shape(t.op.inner[0]):
                found = (s, t)
                break
        if found is None:
            return replace(d, steps=tuple(steps))
        s, t = found
        name = s.op.name.rsplit(".", 1)[0] if s.op.name.rsplit(".", 1)[-1].isdigit() else s.op.name
        joined = replace(s, op=Block(name, (*s.op.inner, *t.op.inner)), outs=t.outs, at=Pattern(s.at.ins, t.at.outs))
        steps = [joined if x is t else x for x in steps if x is not s]
