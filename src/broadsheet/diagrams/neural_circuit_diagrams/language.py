"""The language: diagrams written as expressions, ``einsum("y k, x k -> y x") >> scale(0.5) >> softmax("x")``.
``f >> g`` is f then g; ``f & g`` puts them side by side. Axes that a step does not name are broadcast, as their wires
run past it. Names in patterns stand for the axis of that name; axes made by ``axes`` give them sizes.

Patterns are written as in einops: letters of each array, arrays apart by commas, ``->`` between what goes in and what
comes out. Source of the grammar: Abbott, arXiv:2402.05424, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.axes import NAME, Array, Axis, describe
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, identity, lifted_to, single
from broadsheet.diagrams.neural_circuit_diagrams.generators import Add, Concat, Copy, Index, Pattern, View
from broadsheet.diagrams.neural_circuit_diagrams.generators import Discard as _Discard
from broadsheet.diagrams.neural_circuit_diagrams.linear import Conv, Einsum, Embedding, Linear
from broadsheet.diagrams.neural_circuit_diagrams.opaque import Opaque
from broadsheet.diagrams.neural_circuit_diagrams.pointwise import Elementwise, Mask, Norm, Reduce, Softmax, function
from broadsheet.errors import InvalidInput

Sizes = Mapping[str, int | Axis] | None


def _arrays(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.split()) for part in text.split(",")) if text.strip() else ((),)


def _pattern(text: str) -> Pattern:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise InvalidInput(f"pattern {text!r}: expected arrays with commas between on both sides of '->'")
    return Pattern(_arrays(left), _arrays(right))


def _named(at: Pattern, sizes: Sizes) -> dict[str, Axis]:
    made = {}
    for letter in at.letters:
        if not NAME.match(letter):
            raise InvalidInput(f"axis name {letter!r}: expected a letter, then letters, digits or primes")
        given = (sizes or {}).get(letter)
        made[letter] = given if isinstance(given, Axis) else Axis(letter, letter, given)
    return made


def op(
    name: str,
    pattern: str,
    fn: Callable,
    linear: bool = False,
    learned: bool = False,
    sizes: Sizes = None,
) -> Diagram:
    """Any function on the axes that it names: ``op("f", "a b, c -> d", fn)``.

    Args:
        name: what is written in its box.
        pattern: its arrays.
        fn: torch function of those arrays alone; other axes are mapped over (it must work under ``torch.vmap``).
        linear: a promise, checked on random numbers (to 1e-6) where all sizes are known.
        learned: drawn bold.
        sizes: sizes or axes by name.

    Raises:
        InvalidInput: a promise of linearity that does not hold.
    """
    at = _pattern(pattern)
    axes = _named(at, sizes)
    made = single(Opaque(name, at.ins, at.outs, fn, learned=learned, flat=linear), at, axes)
    if linear and all(a.size is not None for a in axes.values()):
        random = torch.Generator().manual_seed(0)
        x, y = ([torch.randn([axes[c].size or 1 for c in a], generator=random).double() for a in at.ins] for _ in "xy")
        both = made.run(*(2 * a + 3 * b for a, b in zip(x, y, strict=True)))
        one, other = made.run(*x), made.run(*y)
        triples = zip(*(t if isinstance(t, tuple) else (t,) for t in (both, one, other)), strict=True)
        for got, a, b in triples:
            error = float((got - 2 * a - 3 * b).abs().max() / got.abs().max().clamp_min(1e-30))
            if error > 1e-6:
                raise InvalidInput(
                    f"op {name!r} is declared linear, but f(2x + 3y) misses 2f(x) + 3f(y) by {error:.1e}"
                )
    return made


def einsum(pattern: str, sizes: Sizes = None) -> Diagram:
    """A contraction: ``einsum("y k h, x k h -> y x h")``; also permutes, sums, diagonals, outer products and copies of
    an axis.

    Args:
        pattern: any number of arrays in, one out. A name that stands twice in one array is a dot (its diagonal); a name
            that only the array behind the arrow has is repeated along it; one that stands twice there is put on a
            diagonal.
        sizes: sizes or axes by name; needed for names that no input has.

    Raises:
        InvalidInput: no arrow, several arrays behind it, or a name that is none.
    """
    at = _pattern(pattern)
    if len(at.outs) != 1:
        raise InvalidInput(f"einsum {pattern!r}: expected one array behind the arrow")
    return single(Einsum(), at, _named(at, sizes))


def cap(axis: str, sizes: Sizes = None) -> Diagram:
    """The identity matrix, from nothing: a wire that begins at both of its ends. A cup, which joins two wires, is an
    einsum that sums over the axis they share.

    Args:
        axis: of both ends.
        sizes: its size, or an axis, by name.
    """
    at = Pattern((), ((axis, axis),))
    return single(Einsum(), at, _named(at, sizes))


def permute(pattern: str, sizes: Sizes = None) -> Diagram:
    """Axes in another order: ``permute("x h -> h x")``.

    Args:
        pattern: one array with the same axes on both sides.
        sizes: sizes or axes by name.

    Raises:
        InvalidInput: other axes on the two sides.
    """
    at = _pattern(pattern)
    if len(at.ins) != 1 or len(at.outs) != 1 or sorted(at.ins[0]) != sorted(at.outs[0]):
        raise InvalidInput(f"permute {pattern!r}: expected one array with the same axes on both sides")
    return einsum(pattern, sizes)


def linear(
    pattern: str, name: str = "", bias: bool = True, sizes: Sizes = None, weights: Mapping[str, Tensor] | None = None
) -> Diagram:
    """A learned affine map: ``linear("m -> k h", name="Q", bias=False)``.

    Args:
        pattern: the axes that it consumes and emits.
        name: of its weights.
        bias: whether it adds one.
        sizes: sizes or axes by name.
        weights: ``weight`` with the axes ``[*out, *in]`` and ``bias``; random ones where all sizes are known and none
            are given (seeded by the name).
    """
    at = _pattern(pattern)
    axes = _named(at, sizes)
    known = all(axes[c].size is not None for c in at.letters)
    if weights is None and known:
        random = torch.Generator().manual_seed(sum(map(ord, name)))
        shape = [[axes[c].size or 1 for c in side] for side in (at.outs[0], at.ins[0])]
        fan = float(torch.tensor(shape[1]).prod())
        weights = {"weight": torch.randn(*shape[0], *shape[1], generator=random) / fan**0.5}
        weights |= {"bias": torch.randn(shape[0], generator=random) * 0.1} if bias else {}
    held = {f"{name}.{key}": value for key, value in (weights or {}).items()}
    return single(Linear(at.ins[0], at.outs[0], name, bias), at, axes, held)


def embedding(axis: str, name: str, weight: Tensor) -> Diagram:
    """A look-up in a learned table: integers in, one new axis out.

    Args:
        axis: the new axis, which comes last.
        name: of the table among the weights.
        weight: ``[entries, axis]``, floating.
    """
    made = {axis: Axis(axis, axis, weight.shape[1])}
    return single(Embedding(axis, name), Pattern(((),), ((axis,),)), made, {f"{name}.weight": weight})


def softmax(axis: str) -> Diagram:
    """Softmax over an axis.

    Args:
        axis: its name.
    """
    return single(Softmax(axis), Pattern(((axis,),), ((axis,),)), {axis: Axis(axis, axis)})


def causal(rows: str, columns: str) -> Diagram:
    """Minus infinity where the place along ``columns`` lies behind that along ``rows``: the mask of a decoder.

    Args:
        rows, columns: names of the axes of queries and keys.
    """
    at = Pattern(((rows, columns),), ((rows, columns),))
    return single(Mask(rows, columns), at, _named(at, None))


def elementwise(name: str, fn: Callable | None = None) -> Diagram:
    """A function on every entry.

    Args:
        name: what is written on its arrow; without ``fn`` one that ``pointwise.FUNCTIONS`` knows.
        fn: a torch function of one tensor, shape and type unchanged.

    Raises:
        InvalidInput: an unknown name without a function.
    """
    function(name, fn)
    return single(Elementwise(name, fn), Pattern(((),), ((),)), {})


def scale(factor: float | int) -> Diagram:
    """Multiplication by a number.

    Args:
        factor: the number.
    """
    return elementwise(f"× {float(factor)!r}")


def norm(axis: str, kind: str = "layer", name: str = "", weights: Mapping[str, Tensor] | None = None, **options: Any):
    """Normalisation over an axis.

    Args:
        axis: its name; for ``"batch"`` that of the channels.
        kind: ``"layer"``, ``"rms"`` or ``"batch"``.
        name: of its weights.
        weights: ``weight`` and ``bias`` ``[axis]``, those that there are.
        **options: of :class:`~broadsheet.diagrams.neural_circuit_diagrams.pointwise.Norm`, such as ``eps``.
    """
    affine = "".join(key[0] for key in ("weight", "bias") if key in (weights or {}))
    held = {f"{name}.{key}": value for key, value in (weights or {}).items()}
    at = Pattern(((axis,),), ((axis,),))
    return single(Norm(kind, (axis,), name, affine, **options), at, {axis: Axis(axis, axis)}, held)


def conv(
    pattern: str,
    name: str = "",
    k: int = 3,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    sizes: Sizes = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Diagram:
    """A convolution: ``conv("c x -> d y", k=3)`` with channels first, ``weights`` as of torch's ``Conv``.

    Args:
        pattern: channels and positions, in and out.
        name: of its weights.
        k, stride, padding, dilation: the same for all positions.
        sizes: sizes or axes by name.
        weights: ``weight`` and, where there is one, ``bias``.
    """
    at = _pattern(pattern)
    n = len(at.ins[0]) - 1
    held = {f"{name}.{key}": value for key, value in (weights or {}).items()}
    options: list[Any] = [(value,) * n for value in (k, stride, padding, dilation)]
    step = Conv(
        at.ins[0][1:], at.outs[0][1:], (at.ins[0][0], at.outs[0][0]), name, *options, bias="bias" in (weights or {})
    )
    return single(step, at, _named(at, sizes), held)


def view(pattern: str, sizes: Sizes = None) -> Diagram:
    """Merge or split axes that stand together: ``view("h k -> m")``, ``view("m -> h k", {"h": 8, "k": 64})``.

    Args:
        pattern: one array in and out.
        sizes: sizes or axes by name; a split needs all but one of its parts.
    """
    at = _pattern(pattern)
    return single(View(at.ins[0], at.outs[0]), at, _named(at, sizes))


def index(axis: str, place: int) -> Diagram:
    """One entry along an axis, which is gone behind it.

    Args:
        axis: its name.
        place: from 0.
    """
    return single(Index(axis, place), Pattern(((axis,),), ((),)), {axis: Axis(axis, axis)})


def copy(n: int = 2) -> Diagram:
    """Copies of an array.

    Args:
        n: how many come out.
    """
    return single(Copy(n), Pattern(((),), ((),) * n), {})


def discard() -> Diagram:
    """Delete an array."""
    return single(_Discard(), Pattern(((),), ()), {})


def add(n: int = 2) -> Diagram:
    """The sum of arrays of one type.

    Args:
        n: how many go in.
    """
    return single(Add(n), Pattern(((),) * n, ((),)), {})


def concat(pattern: str, sizes: Sizes = None) -> Diagram:
    """Arrays one after the other: ``concat("c, d -> e")``.

    Args:
        pattern: one axis for each array in, one out; other axes are broadcast.
        sizes: sizes or axes by name.

    Raises:
        InvalidInput: more than one axis in an array of the pattern.
    """
    at = _pattern(pattern)
    if any(len(a) != 1 for a in (*at.ins, *at.outs)) or len(at.outs) != 1:
        raise InvalidInput(f"concat {pattern!r}: expected one axis for each array, as in 'c, d -> e'")
    return single(Concat(tuple(a[0] for a in at.ins), at.outs[0][0]), at, _named(at, sizes))


def reduce(axis: str, kind: str = "mean") -> Diagram:
    """One number over axes, which are gone behind it.

    Args:
        axis: one name or several.
        kind: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``.

    Raises:
        InvalidInput: another kind.
    """
    letters = tuple(axis.split())
    if kind not in Reduce.NAMES:
        raise InvalidInput(f"kind={kind!r}: expected one of {', '.join(Reduce.NAMES)}")
    at = Pattern((letters,), ((),))
    return single(Reduce(kind, letters), at, _named(at, None))


def wires(text: str, sizes: Sizes = None) -> Diagram:
    """The identity on arrays: ``wires("b x, m")``, the start of an expression.

    Args:
        text: names of the axes of every array.
        sizes: sizes or axes by name.
    """
    arrays = _arrays(text)
    axes = _named(Pattern(arrays, ()), sizes)
    return identity(*(tuple(axes[c] for c in array) for array in arrays))


def lift(f: Diagram, axis: str | Axis, on: set[int] | None = None) -> Diagram:
    """Broadcast over an axis, which comes last in every array.

    Args:
        f: a diagram.
        axis: the new axis.
        on: the inputs that have it (others are shared); None for all.

    Returns:
        The broadcast diagram; every output has the axis.

    Raises:
        InvalidInput: an axis that ``f`` already has at an end.
    """
    new = Axis(axis, axis) if isinstance(axis, str) else axis
    if any(a.id == new.id for array in (*f.domain, *f.codomain) for a in array):
        raise InvalidInput(f"axis {new.name!r} is there already in {describe((*f.domain, *f.codomain))}: rename it")
    chosen = set(range(len(f.inputs))) if on is None else on
    types: tuple[Array, ...] = tuple((*a, new) if i in chosen else a for i, a in enumerate(f.domain))
    made = lifted_to(f, types)
    parts = []
    for array, plain in zip(made.codomain, f.codomain, strict=True):
        letters = tuple(f"l{i}" for i in range(len(array)))
        names = dict(zip(letters, array, strict=True)) | {"new": new}
        place = {a.id: c for a, c in zip(array, letters, strict=True)}
        out = (*(place[a.id] for a in plain), place.get(new.id, "new"))
        parts.append(identity(array) if letters == out else single(Einsum(), Pattern((letters,), (out,)), names))
    for part in parts[1:]:
        parts[0] = parts[0] & part
    return made >> parts[0]


def show_index(diagram: Diagram, **places: int) -> Diagram:
    """One entry of the outputs: a pentagon on each named axis.

    Args:
        diagram: any.
        **places: from 0, by the name of an axis of the outputs.

    Raises:
        InvalidInput: no output has that axis.
    """
    known = {a.name: a for array in diagram.codomain for a in array}
    for name, place in places.items():
        if name not in known:
            raise InvalidInput(f"no axis {name!r} at the outputs {describe(diagram.codomain)}")
        later = None
        for array in diagram.codomain:
            axis = next((a for a in array if a.name == name), None)
            part = identity(array) if axis is None else _at(axis, place, array)
            later = part if later is None else later & part
        assert later is not None
        diagram = diagram >> later
    return diagram


def _at(axis: Axis, place: int, array: Array) -> Diagram:
    letters = {a.id: f"l{i}" for i, a in enumerate(array)}
    at = Pattern((tuple(letters.values()),), (tuple(c for i, c in letters.items() if i != axis.id),))
    return single(Index(letters[axis.id], place), at, {letters[a.id]: a for a in array})
