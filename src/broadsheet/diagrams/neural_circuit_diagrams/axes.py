"""Axes and data types: what a diagram's wires carry."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from broadsheet.errors import InvalidInput

KINDS = ("plain", "position", "multi")
NAME = re.compile(r"[^\W\d_][\w']*(\.\d+)?$|^\d+$")


@dataclass(frozen=True)
class Axis:
    """An axis of an array, drawn as a wire.

    Args:
        id: what makes two axes the same; equal names do not.
        name: what is written over the wire.
        size: number of entries, or None for a symbolic size.
        kind: ``"plain"``, ``"position"`` (drawn with an overbar) or ``"multi"`` (several axes at once, drawn double).

    Source: section 3.1 of the paper.
    """

    id: str
    name: str
    size: int | None = None
    kind: str = "plain"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"kind={self.kind!r}: expected one of {KINDS}")
        if self.size is not None and self.size < 0:
            raise InvalidInput(f"axis {self.name!r} has size {self.size}: expected a size of at least 0, or None")

    @property
    def extent(self) -> Expr:
        """The size as a number, or as a symbol of the axis's name."""
        return Integer(self.size) if self.size is not None else self.symbol

    @property
    def symbol(self) -> Symbol:
        """The size as a symbol, whatever it is."""
        return Symbol(self.name, integer=True, positive=True)

    def __str__(self) -> str:
        return self.name if self.size is None else f"{self.name}={self.size}"


Array = tuple[Axis, ...]
"""An array's axes in order; none for a scalar."""


def axes(names: str, **sizes: int) -> tuple[Axis, ...]:
    """Make axes: ``a, b = axes("a b", a=3)``.

    Args:
        names: names with spaces between; one that begins with ``_`` is a position axis, with ``*`` a multi axis.
        **sizes: sizes by name; an axis without one has a symbolic size.

    Returns:
        One axis for each name.

    Raises:
        InvalidInput: a name that is no identifier, or a size for a name that is not there.
    """
    found = []
    for word in names.split():
        kind = {"_": "position", "*": "multi"}.get(word[0], "plain")
        name = word.lstrip("_*")
        if not NAME.match(name):
            raise InvalidInput(f"axis name {word!r}: expected a letter, then letters, digits or primes")
        found.append(Axis(name, name, sizes.get(name), kind))
    if unknown := set(sizes) - {axis.name for axis in found}:
        raise InvalidInput(f"sizes for {sorted(unknown)}, but the axes are {[axis.name for axis in found]}")
    return tuple(found)


def describe(arrays: tuple[Array, ...]) -> str:
    """A data type as text: ``[b=2 x=5], [m]``."""
    return ", ".join(f"[{' '.join(map(str, array))}]" for array in arrays) or "(nothing)"


def same(one: Axis, other: Axis) -> bool:
    """Whether two axes can be one wire: the same id, and sizes that do not contradict each other."""
    return one.id == other.id and (one.size is None or other.size is None or one.size == other.size)


def first_difference(left: tuple[Array, ...], right: tuple[Array, ...]) -> str | None:
    """Where two data types part, in words; None where they are equal."""
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        for place, (a, b) in enumerate(zip(one, other, strict=False)):
            if not same(a, b):
                return f"array {number}, axis {place}: {a} against {b}"
        if len(one) != len(other):
            return f"array {number}: {len(one)} axes against {len(other)}"
    return f"{len(left)} arrays against {len(right)}" if len(left) != len(right) else None
