"""Linear steps: contractions, learned matrices, look-ups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from sympy import Integer
from torch.nn import functional as F

from broadsheet.diagrams.neural_circuit_diagrams.generators import Generator, Letters, Pattern, aligned, volume


def contract(xs, ins: tuple[Letters, ...], out: Letters, size) -> torch.Tensor:
    """``einsum`` over letters of any length.

    A letter of ``out`` that no input has is repeated; one that stands there twice is a diagonal (from nothing: the
    identity matrix, a cap), which torch's own ``einsum`` does not make.
    """
    twice = [c for i, c in enumerate(out) if c in out[:i]]
    if twice:
        known = {c for array in ins for c in array}
        place = {i: f"{c}#{i}" for i, c in enumerate(out) if c in out[:i]}
        like = xs[0] if xs else torch.empty(())
        eyes = [torch.eye(size[out[i]], dtype=like.dtype, device=like.device) for i in place]
        pairs = tuple((out[i], new) for i, new in place.items())
        whole = {c: size[c] for c in {*known, *out} if c in size} | {new: size[out[i]] for i, new in place.items()}
        return contract([*xs, *eyes], (*ins, *pairs), tuple(place.get(i, c) for i, c in enumerate(out)), whole)
    common = reduce(torch.promote_types, (x.dtype for x in xs)) if xs else torch.get_default_dtype()
    xs = [x.to(common) for x in xs]
    letters = {c: i for i, c in enumerate(dict.fromkeys(c for array in (*ins, out) for c in array))}
    known = {c for array in ins for c in array}
    arguments = [part for x, array in zip(xs, ins, strict=True) for part in (x, [letters[c] for c in array])]
    found = torch.einsum(*arguments, [letters[c] for c in out if c in known])
    if len(known & set(out)) == len(out):
        return found
    made = tuple(c for c in out if c in known)
    return aligned(found, made, out).expand([size[c] for c in out])


@dataclass(frozen=True)
class Einsum(Generator):
    """Any web of dots, cups, caps and crossings: the whole step is its pattern (multilinear in its inputs)."""

    glyph: ClassVar[str] = "web"
    linear: ClassVar[bool] = True

    def run(self, xs, at, size, weights):
        return [contract(xs, at.ins, at.outs[0], size)]

    def madds(self, at, size):
        contracted = {c for array in at.ins for c in array} - set(at.outs[0])
        if len(at.ins) <= 1 and not contracted:
            return Integer(0)
        return volume(at.letters, size) * max(1, len(at.ins) - 1)

    def pullback(self, build, at, gs, saved, axes):
        if len(at.ins) == 1:
            return build.step(Einsum(), Pattern(at.outs, at.ins), gs, axes)
        n = len(at.ins)
        cotangents = build.copies(gs[0], n)
        kept = [build.copies(value, n - 1) for value in saved]
        found = []
        for j, letters in enumerate(at.ins):
            others = [kept[i].pop() for i in range(n) if i != j]
            ins = (at.outs[0], *(array for i, array in enumerate(at.ins) if i != j))
            found += build.step(Einsum(), Pattern(ins, (letters,)), [cotangents[j], *others], axes)
        return found


@dataclass(frozen=True)
class Linear(Generator):
    """A learned affine map from the letters ``before`` to the letters ``after``.

    The weight ``{name}.weight`` has the axes ``[*after, *before]``, as in ``torch.nn.Linear``; ``transposed``
    maps back.
    """

    before: Letters = ()
    after: Letters = ()
    name: str = ""
    bias: bool = True
    transposed: bool = False
    glyph: ClassVar[str] = "learned"
    linear: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return "L"

    @property
    def eats(self):
        return (self.before,)

    @property
    def emits(self):
        return (self.after,)

    @property
    def names(self):
        return (f"{self.name}.weight", *((f"{self.name}.bias",) if self.bias else ()))

    def run(self, xs, at, size, weights):
        weight = weights[f"{self.name}.weight"]
        mine = (*self.before, *self.after) if self.transposed else (*self.after, *self.before)
        weight = weight.reshape([size[c] for c in mine])
        lifted = [c for c in at.ins[0] if c not in self.before]
        y = contract([xs[0], weight], (at.ins[0], mine), at.outs[0], size)
        assert set(lifted) <= set(at.outs[0])
        if self.bias:
            y = y + aligned(weights[f"{self.name}.bias"].reshape([size[c] for c in self.after]), self.after, at.outs[0])
        return [y]

    def madds(self, at, size):
        return volume(tuple(dict.fromkeys((*at.ins[0], *at.outs[0]))), size)

    def pullback(self, build, at, gs, saved, axes):
        back = replace(self, before=self.after, after=self.before, bias=False, transposed=not self.transposed)
        g, again = build.copies(gs[0], 2)
        weight = (*self.before, *self.after) if self.transposed else (*self.after, *self.before)
        bias = None
        if self.bias:
            again, third = build.copies(again, 2)
            bias = build.step(Einsum(), Pattern(at.outs, (self.after,)), [third], axes)[0]
        grad = build.step(Einsum(), Pattern((*at.outs, *at.ins), (weight,)), [again, *saved], axes)[0]
        build.weight_gradient(f"{self.name}.weight", grad)
        if bias is not None:
            build.weight_gradient(f"{self.name}.bias", bias)
        return build.step(back, Pattern(at.outs, at.ins), [g], axes)


@dataclass(frozen=True)
class Embedding(Generator):
    """An index into a learned table: integers in, one new axis out."""

    after: str = ""
    name: str = ""
    glyph: ClassVar[str] = "learned"

    @property
    def label(self) -> str:
        return "E"

    @property
    def eats(self):
        return ((),)

    @property
    def emits(self):
        return ((self.after,),)

    @property
    def names(self):
        return (f"{self.name}.weight",)

    def run(self, xs, at, size, weights):
        made = F.embedding(xs[0], weights[f"{self.name}.weight"])
        return [aligned(made, (*at.ins[0], self.after), at.outs[0])]

    def pullback(self, build, at, gs, saved, axes):
        rows = build.weights[f"{self.name}.weight"].shape[0]
        grad = build.step(TableGradient(self.after), *build.fresh_rows(at, self.after, rows, axes, [saved[0], gs[0]]))[
            0
        ]
        build.weight_gradient(f"{self.name}.weight", grad)
        return [None]


@dataclass(frozen=True)
class TableGradient(Generator):
    """Cotangents added up in the rows of a table that were looked up: the backward of an embedding."""

    after: str = ""
    glyph: ClassVar[str] = "box"

    @property
    def label(self) -> str:
        return "E′"

    def run(self, xs, at, size, weights):
        ids, g = xs
        g = aligned(g, at.ins[1], (*at.ins[0], self.after))
        table = g.new_zeros([size[c] for c in at.outs[0]])
        return [table.index_add(0, ids.reshape(-1), g.reshape(-1, g.shape[-1]))]


@dataclass(frozen=True)
class Conv(Generator):
    """A learned convolution over the letters ``before`` (new extents: ``after``), from channels to channels.

    Args:
        before, after: positions in and out.
        channels: letters of the channels in and out.
        name: of the weights, laid out as ``torch.nn.Conv2d`` (transposed: ``ConvTranspose2d``).
        kernel, stride, padding, dilation: one number for each position axis.
        output_padding: for transposed ones only.
        groups: as in torch.
    """

    before: Letters = ()
    after: Letters = ()
    channels: Letters = ()
    name: str = ""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    glyph: ClassVar[str] = "conv"
    linear: ClassVar[bool] = True

    @property
    def label(self) -> str:
        def short(values):
            return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))

        marks = f"★{short(self.kernel)}"
        marks += f" /{short(self.stride)}" if set(self.stride) != {1} else ""
        marks += f" p{short(self.padding)}" if set(self.padding) != {0} else ""
        marks += f" d{short(self.dilation)}" if set(self.dilation) != {1} else ""
        marks += f" g{self.groups}" if self.groups != 1 else ""
        marks += f" o{short(self.output_padding)}" if set(self.output_padding) - {0} else ""
        return marks + (" T" if self.transposed else "")

    @property
    def marked(self):
        return self.channels

    @property
    def eats(self):
        return ((self.channels[0], *self.before),)

    @property
    def emits(self):
        return ((self.channels[1], *self.after),)

    @property
    def names(self):
        return (f"{self.name}.weight", *((f"{self.name}.bias",) if self.bias else ()))

    def run(self, xs, at, size, weights):
        n = len(self.before)
        lifted = tuple(c for c in at.ins[0] if c not in self.eats[0])
        x = aligned(xs[0], at.ins[0], (*lifted, *self.eats[0]))
        flat = x.reshape(-1, *x.shape[len(lifted) :])
        bias = weights[f"{self.name}.bias"] if self.bias else None
        weight = weights[f"{self.name}.weight"]
        if self.transposed:
            f = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
            y = f(flat, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        else:
            f = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
            y = f(flat, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        y = y.reshape(*x.shape[: len(lifted)], *y.shape[1:])
        return [aligned(y, (*lifted, *self.emits[0]), at.outs[0])]

    def madds(self, at, size):
        lifted = [c for c in at.ins[0] if c not in self.eats[0]]
        extent = self.before if self.transposed else self.after
        taps = volume(self.channels, size) * int(torch.tensor(self.kernel).prod()) / self.groups
        return taps * volume((*lifted, *extent), size)
