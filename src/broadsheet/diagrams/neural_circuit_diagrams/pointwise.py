"""Steps on one array that change no wire, and reductions: elementwise functions, softmax, norms, means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from broadsheet.diagrams.neural_circuit_diagrams.generators import Add, Generator, Letters, Pattern, aligned, volume
from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum
from broadsheet.errors import InvalidInput

FUNCTIONS: dict[str, Callable] = {
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "GELU~": lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": F.silu,
    "ELU": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "σ": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "√": torch.sqrt,
    "1/√": torch.rsqrt,
    "1/·": torch.reciprocal,
    "|·|": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "not": torch.logical_not,
}
LINEAR_MARK = "×"


def function(name: str, given: Callable | None = None) -> Callable:
    """What a label means: ``ReLU``, ``× 0.5``, ``+ 1.0``, ``^ 2.0``, ``leaky 0.1``; a prime is the derivative.

    Raises:
        InvalidInput: an unknown label, without a function given.
    """
    if given is not None:
        return given
    if name.endswith("′"):
        inner = function(name[:-1])

        def slope(x):
            with torch.enable_grad():
                probe = x.detach().requires_grad_()
                return torch.autograd.grad(inner(probe).sum(), probe)[0]

        return slope
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    mark, _, number = name.partition(" ")
    kinds = {
        "×": lambda x, c: x * c,
        "+": lambda x, c: x + c,
        "^": lambda x, c: x**c,
        "leaky": F.leaky_relu,
        "≥": lambda x, c: x.clamp(min=c),
        "≤": lambda x, c: x.clamp(max=c),
    }
    try:
        value = float(number)
        return lambda x: kinds[mark](x, value)
    except (ValueError, KeyError):
        raise InvalidInput(
            f"elementwise function {name!r}: expected one of {', '.join(FUNCTIONS)}, or '× 0.5', '+ 1.0', '^ 2.0'; "
            "hand a function of your own as fn="
        ) from None


@dataclass(frozen=True)
class Elementwise(Generator):
    """One function on every entry; floats over the wires and touches none."""

    name: str = ""
    fn: Callable | None = field(default=None, compare=False)
    glyph: ClassVar[str] = "elementwise"

    @property
    def saves(self) -> str:
        """ReLU's slope is told by its output as well, which the next step has to save anyway."""
        return "y" if self.name == "ReLU" and self.fn is None else "x"

    @property
    def is_linear(self) -> bool:
        """Whether it is a multiplication by a number."""
        return self.fn is None and self.name.startswith(LINEAR_MARK)

    @property
    def label(self) -> str:
        return self.name

    @property
    def eats(self):
        return ((),)

    @property
    def emits(self):
        return ((),)

    def run(self, xs, at, size, weights):
        return [aligned(function(self.name, self.fn)(xs[0]), at.ins[0], at.outs[0])]

    def madds(self, at, size):
        return volume(at.outs[0], size)

    def pullback(self, build, at, gs, saved, axes):
        if self.is_linear:
            return build.step(self, Pattern(at.outs, at.ins), gs, axes)
        if self.fn is not None:
            return super().pullback(build, at, gs, saved, axes)
        slope = build.step(Elementwise(f"{self.name}′"), Pattern(at.ins, at.ins), saved, axes)
        return build.step(Einsum(), Pattern((*at.outs, *at.ins), at.ins), [*gs, *slope], axes)


@dataclass(frozen=True)
class Softmax(Generator):
    """Softmax over one axis: a hollow triangle on its wire."""

    axis: str = ""
    log: bool = False
    glyph: ClassVar[str] = "softmax"
    saves: ClassVar[str] = "y"

    @property
    def label(self) -> str:
        return "log" if self.log else ""

    @property
    def eats(self):
        return ((self.axis,),)

    @property
    def emits(self):
        return ((self.axis,),)

    def run(self, xs, at, size, weights):
        f = torch.log_softmax if self.log else torch.softmax
        return [aligned(f(xs[0], at.ins[0].index(self.axis)), at.ins[0], at.outs[0])]

    def madds(self, at, size):
        return 5 * volume(at.ins[0], size)  # maximum, subtract, exponentiate, sum, divide

    def pullback(self, build, at, gs, saved, axes):
        if self.log:
            return super().pullback(build, at, gs, saved, axes)
        letters, rest = at.outs[0], tuple(c for c in at.outs[0] if c != self.axis)
        both, two = Pattern((letters, letters), (letters,)), Pattern((letters, rest), (letters,))
        y, again = build.copies(saved[0], 2)
        yg = build.step(Einsum(), both, [y, gs[0]], axes)[0]
        first, second = build.copies(yg, 2)
        total = build.step(Einsum(), Pattern((letters,), (rest,)), [second], axes)[0]
        product = build.step(Einsum(), two, [again, total], axes)[0]
        minus = build.step(Elementwise("× -1.0"), Pattern((letters,), (letters,)), [product], axes)[0]
        return build.step(Add(2), Pattern((letters, letters), at.ins), [first, minus], axes)


@dataclass(frozen=True)
class Norm(Generator):
    """Normalisation over axes: a circle, with a diameter (layer), a root tick (RMS) or bare (batch, by stored moments).

    Args:
        kind: ``"layer"``, ``"rms"``, ``"batch"`` or ``"group"``; for the last two ``over`` is the axis of channels.
        over: the normalised letters.
        name: of the weights, "" for none.
        affine: which of ``weight`` and ``bias`` there are, such as ``"wb"``.
        eps: added to the variance.
        groups: for ``"group"`` only, which normalises ``over[0]`` in groups and all of ``over[1:]``.
    """

    kind: str = "layer"
    over: Letters = ()
    name: str = ""
    affine: str = ""
    eps: float = 1e-5
    groups: int = 1
    glyph: ClassVar[str] = "norm"

    @property
    def label(self) -> str:
        marks = [] if self.eps == 1e-5 else [f"ε{self.eps:g}"]
        return " ".join([*marks, *([f"g{self.groups}"] if self.kind == "group" else [])])

    @property
    def eats(self):
        return (self.over,)

    @property
    def emits(self):
        return (self.over,)

    @property
    def names(self):
        parts = [p for letter, p in (("w", "weight"), ("b", "bias")) if letter in self.affine]
        parts += ["running_mean", "running_var"] if self.kind == "batch" else []
        return tuple(f"{self.name}.{part}" for part in parts)

    def run(self, xs, at, size, weights):
        lifted = tuple(c for c in at.ins[0] if c not in self.over)
        x = aligned(xs[0], at.ins[0], (*lifted, *self.over))
        shape = x.shape[len(lifted) :]
        w = weights[f"{self.name}.weight"] if "w" in self.affine else None
        b = weights[f"{self.name}.bias"] if "b" in self.affine else None
        if self.kind == "layer":
            y = F.layer_norm(x, shape, w, b, self.eps)
        elif self.kind == "rms":
            y = F.rms_norm(x, shape, w, self.eps)
        elif self.kind == "group":
            y = F.group_norm(x.reshape(-1, *shape), self.groups, w, b, self.eps).reshape(x.shape)
        else:
            moments = (weights[f"{self.name}.running_mean"], weights[f"{self.name}.running_var"])
            y = F.batch_norm(x.reshape(-1, shape[0]), *moments, w, b, False, 0.0, self.eps).reshape(x.shape)
        return [aligned(y, (*lifted, *self.over), at.outs[0])]

    def madds(self, at, size):
        return (2 if self.kind == "batch" else 5) * volume(at.ins[0], size)


@dataclass(frozen=True)
class Reduce(Generator):
    """Mean, sum or maximum over axes: their wires end in an arrow."""

    kind: str = "mean"
    over: Letters = ()
    glyph: ClassVar[str] = "reduce"
    NAMES: ClassVar[dict[str, str]] = {"mean": "E", "sum": "Σ", "max": "Max", "min": "Min"}

    @property
    def label(self) -> str:
        return self.NAMES[self.kind]

    @property
    def eats(self):
        return (self.over,)

    @property
    def emits(self):
        return ((),)

    def run(self, xs, at, size, weights):
        f = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}[self.kind]
        y = f(xs[0], [at.ins[0].index(c) for c in self.over])
        return [aligned(y, tuple(c for c in at.ins[0] if c not in self.over), at.outs[0])]

    def madds(self, at, size):
        return volume(at.ins[0], size)

    def pullback(self, build, at, gs, saved, axes):
        if self.kind not in ("mean", "sum"):
            return super().pullback(build, at, gs, saved, axes)
        back = build.step(Einsum(), Pattern(at.outs, at.ins), gs, axes)
        if self.kind == "sum":
            return back
        count = 1
        for c in self.over:
            if axes[c].size is None:
                raise InvalidInput(f"axis {c!r} has no size: the backward of a mean needs it; bind() it")
            count *= axes[c].size
        return build.step(Elementwise(f"× {1 / count!r}"), Pattern(at.ins, at.ins), back, axes)


@dataclass(frozen=True)
class Pool(Generator):
    """Maximum or mean over a sliding window: a trapezoid."""

    kind: str = "max"
    before: Letters = ()
    after: Letters = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    glyph: ClassVar[str] = "pool"

    @property
    def label(self) -> str:
        def short(values):
            return str(values[0]) if len(set(values)) == 1 else "×".join(map(str, values))

        padding = f" p{short(self.padding)}" if set(self.padding) != {0} else ""
        return f"{Reduce.NAMES[self.kind]}★{short(self.kernel)} /{short(self.stride)}{padding}"

    @property
    def eats(self):
        return (self.before,)

    @property
    def emits(self):
        return (self.after,)

    def run(self, xs, at, size, weights):
        n = len(self.before)
        lifted = tuple(c for c in at.ins[0] if c not in self.before)
        x = aligned(xs[0], at.ins[0], (*lifted, *self.before))
        flat = x.reshape(-1, 1, *x.shape[len(lifted) :])
        table = {"max": (F.max_pool1d, F.max_pool2d, F.max_pool3d), "mean": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)}
        y = table[self.kind][n - 1](flat, self.kernel, self.stride, self.padding)
        y = y.reshape(*x.shape[: len(lifted)], *y.shape[2:])
        return [aligned(y, (*lifted, *self.after), at.outs[0])]

    def madds(self, at, size):
        return volume(at.outs[0], size) * int(torch.tensor(self.kernel).prod())


@dataclass(frozen=True)
class Mask(Generator):
    """Add minus infinity above the diagonal of two axes: attention may not look ahead."""

    rows: str = ""
    columns: str = ""
    glyph: ClassVar[str] = "mask"

    @property
    def label(self) -> str:
        return "causal"

    @property
    def marked(self):
        return (self.rows,)

    @property
    def eats(self):
        return ((self.rows, self.columns),)

    @property
    def emits(self):
        return ((self.rows, self.columns),)

    def run(self, xs, at, size, weights):
        seen = torch.ones(size[self.rows], size[self.columns], dtype=torch.bool, device=xs[0].device).tril()
        return [xs[0].masked_fill(~aligned(seen, (self.rows, self.columns), at.ins[0]), float("-inf"))]
