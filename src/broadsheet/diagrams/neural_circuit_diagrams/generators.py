"""What every step of a diagram is made of: the contract, and the steps that only move data.
A step has a pattern in the manner of einops: letters for the axes of every array that goes in and that comes out.
Letters that the step itself knows (its core) are touched; all others are broadcast, and their wires run past it. Each
class holds a step's meaning (``run``), drawing (``glyph``, ``label``, ``touches``), cost (``madds``) and backward
rule (``pullback``) in one place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sympy import Expr, Integer, prod
from torch import Tensor

from broadsheet.errors import InvalidInput

Letters = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """The letters of a step's arrays, in and out."""

    ins: tuple[Letters, ...]
    outs: tuple[Letters, ...]

    def __str__(self) -> str:
        return f"{', '.join(map(' '.join, self.ins))} -> {', '.join(map(' '.join, self.outs))}"

    @property
    def letters(self) -> Letters:
        """Every letter once, in order of appearance."""
        return tuple(dict.fromkeys(letter for array in (*self.ins, *self.outs) for letter in array))


def volume(letters: Sequence[str], size: Mapping[str, Any]) -> Any:
    """The number of elements of an array."""
    return Integer(1) * prod([size[letter] for letter in letters])


def aligned(x: Tensor, letters: Letters, target: Letters) -> Tensor:
    """``x`` with its axes in the order of ``target``, and axes of size 1 for what it lacks."""
    present = [letter for letter in target if letter in letters]
    x = x.permute([letters.index(letter) for letter in present])
    return x[tuple(slice(None) if letter in letters else None for letter in target)]


@dataclass(frozen=True)
class Generator(ABC):
    """A kind of step; subclasses say what varies."""

    glyph: ClassVar[str] = "box"
    linear: ClassVar[bool] = False
    saves: ClassVar[str] = "x"  # what backward needs: "x" inputs, "y" outputs, "" nothing

    @property
    def label(self) -> str:
        """What is written in or beside the glyph."""
        return ""

    @property
    def eats(self) -> tuple[Letters, ...] | None:
        """Letters of each input that the step touches; None where it touches all."""
        return None

    @property
    def emits(self) -> tuple[Letters, ...] | None:
        """Letters of each output that the step makes or touches; None where all."""
        return None

    @property
    def marked(self) -> tuple[str, ...]:
        """Letters whose wires end at the glyph in a small square, where its wires are not all alike."""
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that it reads."""
        return ()

    @abstractmethod
    def run(
        self, xs: list[Tensor], at: Pattern, size: Mapping[str, int], weights: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """The step's meaning: arrays in, arrays out."""

    def madds(self, at: Pattern, size: Mapping[str, Any]) -> Expr:
        """Multiply-adds, from the sizes of all letters."""
        return Integer(0)

    def pullback(
        self, build: Any, at: Pattern, gs: list[int], saved: list[int], axes: Mapping[str, Any]
    ) -> list[int | None]:
        """Build the backward step: cotangents of outputs in, of inputs out.

        Args:
            build: where the steps go.
            at: the forward pattern.
            gs: values of the builder, one cotangent for each output.
            saved: values of the builder with what ``saves`` names.
            axes: the axis of every letter.

        Returns:
            One value for each input, None for an input without a gradient.
        """
        from broadsheet.diagrams.neural_circuit_diagrams.opaque import differentiate

        return differentiate(self, build, at, gs, saved, axes)


@dataclass(frozen=True)
class Copy(Generator):
    """``n`` copies of an array; backward adds."""

    n: int = 2
    glyph: ClassVar[str] = "copy"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    def run(self, xs, at, size, weights):
        return [xs[0]] * self.n

    def pullback(self, build, at, gs, saved, axes):
        return build.step(Add(self.n), Pattern((at.ins[0],) * self.n, at.ins), gs, axes)


@dataclass(frozen=True)
class Discard(Generator):
    """Delete an array; backward is zeros."""

    glyph: ClassVar[str] = "discard"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    def run(self, xs, at, size, weights):
        return []

    def pullback(self, build, at, gs, saved, axes):
        return build.step(Fill(0.0), Pattern((), at.ins), [], axes)


@dataclass(frozen=True)
class Fill(Generator):
    """An array with one number everywhere, from nothing."""

    value: float = 0.0
    glyph: ClassVar[str] = "constant"
    linear: ClassVar[bool] = False
    saves: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return repr(float(self.value))

    @property
    def eats(self):
        return ()

    def run(self, xs, at, size, weights):
        like = next((w for w in weights.values() if w.is_floating_point()), torch.empty(()))
        return [torch.full([size[c] for c in at.outs[0]], self.value, dtype=like.dtype, device=like.device)]

    def pullback(self, build, at, gs, saved, axes):
        return []


@dataclass(frozen=True)
class Constant(Generator):
    """A learned or fixed array, from nothing: position embeddings, masks."""

    name: str = ""
    learned: bool = True
    glyph: ClassVar[str] = "constant"
    saves: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return self.name

    @property
    def eats(self):
        return ()

    @property
    def names(self):
        return (self.name,)

    def run(self, xs, at, size, weights):
        return [weights[self.name]]

    def pullback(self, build, at, gs, saved, axes):
        if self.learned:
            build.weight_gradient(self.name, gs[0])
        return []


@dataclass(frozen=True)
class Add(Generator):
    """The sum of ``n`` arrays, each repeated over the axes that only others have; the mirror image of copy."""

    n: int = 2
    glyph: ClassVar[str] = "add"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    def run(self, xs, at, size, weights):
        total = aligned(xs[0], at.ins[0], at.outs[0])
        for x, letters in zip(xs[1:], at.ins[1:], strict=True):
            total = total + aligned(x, letters, at.outs[0])
        return [total]

    def madds(self, at, size):
        return (self.n - 1) * volume(at.outs[0], size)

    def pullback(self, build, at, gs, saved, axes):
        from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum

        parts = build.copies(gs[0], self.n)
        return [
            part if letters == at.outs[0] else build.step(Einsum(), Pattern(at.outs, (letters,)), [part], axes)[0]
            for part, letters in zip(parts, at.ins, strict=True)
        ]


@dataclass(frozen=True)
class View(Generator):
    """Merge neighbouring axes into one or split one into several: from the letters ``before`` to ``after``."""

    before: Letters = ()
    after: Letters = ()
    glyph: ClassVar[str] = "view"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    @property
    def eats(self):
        return (self.before,)

    @property
    def emits(self):
        return (self.after,)

    def run(self, xs, at, size, weights):
        return [xs[0].reshape([size[c] for c in at.outs[0]])]

    def pullback(self, build, at, gs, saved, axes):
        return build.step(View(self.after, self.before), Pattern(at.outs, at.ins), gs, axes)


@dataclass(frozen=True)
class Index(Generator):
    """One entry along an axis: the wire ends in a pentagon."""

    axis: str = ""
    place: int = 0
    glyph: ClassVar[str] = "index"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return str(self.place)

    @property
    def eats(self):
        return ((self.axis,),)

    @property
    def emits(self):
        return ((),)

    def run(self, xs, at, size, weights):
        return [xs[0].select(at.ins[0].index(self.axis), self.place)]

    def pullback(self, build, at, gs, saved, axes):
        return build.step(Scatter(self.axis, self.place), Pattern(at.outs, at.ins), gs, axes)


@dataclass(frozen=True)
class Scatter(Generator):
    """An array put at one place of an axis, zeros elsewhere: the backward of an index."""

    axis: str = ""
    place: int = 0
    glyph: ClassVar[str] = "scatter"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return str(self.place)

    @property
    def eats(self):
        return ((),)

    @property
    def emits(self):
        return ((self.axis,),)

    def run(self, xs, at, size, weights):
        out = xs[0].new_zeros([size[c] for c in at.outs[0]])
        out.select(at.outs[0].index(self.axis), self.place).copy_(xs[0])
        return [out]

    def pullback(self, build, at, gs, saved, axes):
        return build.step(Index(self.axis, self.place), Pattern(at.outs, at.ins), gs, axes)


@dataclass(frozen=True)
class Window(Generator):
    """The entries ``start, start + step, ...`` of an axis, as many as the new axis has."""

    before: str = ""
    after: str = ""
    start: int = 0
    step: int = 1
    glyph: ClassVar[str] = "window"
    linear: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.start}:" + (f":{self.step}" if self.step != 1 else "")

    @property
    def eats(self):
        return ((self.before,),)

    @property
    def emits(self):
        return ((self.after,),)

    def run(self, xs, at, size, weights):
        stop = self.start + self.step * (size[self.after] - 1) + 1
        places = torch.arange(self.start, stop, self.step, device=xs[0].device)
        return [xs[0].index_select(at.ins[0].index(self.before), places)]


@dataclass(frozen=True)
class Concat(Generator):
    """Arrays one after the other along an axis: a bar across the dashed lines."""

    parts: Letters = ()
    whole: str = ""
    glyph: ClassVar[str] = "concat"
    linear: ClassVar[bool] = True
    saves: ClassVar[str] = ""

    @property
    def eats(self):
        return tuple((part,) for part in self.parts)

    @property
    def emits(self):
        return ((self.whole,),)

    def run(self, xs, at, size, weights):
        out = at.outs[0]
        pieces = []
        for x, letters, part in zip(xs, at.ins, self.parts, strict=True):
            named = tuple(self.whole if c == part else c for c in letters)
            shape = [size[part] if c == self.whole else size[c] for c in out]
            pieces.append(aligned(x, named, out).expand(shape))
        return [torch.cat(pieces, out.index(self.whole))]

    def pullback(self, build, at, gs, saved, axes):
        starts, parts = [0], build.copies(gs[0], len(self.parts))
        for part in self.parts:
            if axes[part].size is None:
                raise InvalidInput(f"axis {part!r} has no size: the backward of a concatenation needs it; bind() it")
            starts.append(starts[-1] + axes[part].size)
        found = []
        for part, letter, letters, start in zip(parts, self.parts, at.ins, starts, strict=False):
            out = tuple(letter if c == self.whole else c for c in at.outs[0])
            piece = build.step(Window(self.whole, letter, start), Pattern(at.outs, (out,)), [part], axes)
            found += build.summed(piece[0], out, letters, axes)
        return found
