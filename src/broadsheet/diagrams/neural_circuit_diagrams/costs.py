"""Time and memory read off a diagram, as numbers where sizes are known and as polynomials in the sizes.
Source: section 3.6 of the paper: a step costs its own work times the sizes of all wires that pass over it; a column
of data holds the products of its arrays' sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from sympy import Expr, Integer, expand

from broadsheet.diagrams.neural_circuit_diagrams.columns import columns, live
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram
from broadsheet.diagrams.neural_circuit_diagrams.generators import volume


@dataclass(frozen=True)
class Column:
    """A column of steps, and the data behind it."""

    steps: tuple[str, ...]
    madds: Expr
    madds_polynomial: Expr
    held: Expr
    held_polynomial: Expr


@dataclass(frozen=True)
class Cost:
    """The cost of a diagram.

    Args:
        start: elements held at the inputs, and as a polynomial.
        columns: one for every column of steps.
        bytes_per_element: of the data.
        per_step: multiply-adds of every step.
    """

    start: tuple[Expr, Expr]
    columns: tuple[Column, ...]
    bytes_per_element: int
    per_step: tuple[Expr, ...]

    @property
    def madds(self) -> Expr:
        """All multiply-adds."""
        return sum((c.madds for c in self.columns), Integer(0))

    @property
    def polynomial(self) -> Expr:
        """All multiply-adds as a polynomial in the sizes of the axes."""
        return expand(sum((c.madds_polynomial for c in self.columns), Integer(0)))

    @property
    def peak_elements(self) -> Expr:
        """The largest number of elements held between columns."""
        held = [self.start[0], *(c.held for c in self.columns)]
        known = [each for each in held if each.is_number]
        from sympy import Max

        return max(known) if len(known) == len(held) else Max(*held)

    @property
    def peak_bytes(self) -> Expr:
        """The same in bytes."""
        return self.peak_elements * self.bytes_per_element

    def to_frame(self) -> pd.DataFrame:
        """One row for every column of the drawing."""
        rows = [
            {
                "steps": " | ".join(c.steps),
                "multiply_adds": _number(c.madds),
                "multiply_adds_polynomial": str(c.madds_polynomial),
                "elements_held": _number(c.held),
                "elements_held_polynomial": str(c.held_polynomial),
                "bytes_held": _number(c.held * self.bytes_per_element),
            }
            for c in self.columns
        ]
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Elements held after every column as bars, multiply-adds as a line (known sizes only)."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.bar(range(len(self.columns)), [float(c.held) for c in self.columns], color="0.8", label="elements held")
        ax.plot(range(len(self.columns)), [float(c.madds) for c in self.columns], "k.-", label="multiply-adds")
        ax.set(xlabel="column", yscale="symlog")
        ax.legend(frameon=False)
        return ax


def _number(value: Expr) -> Any:
    return int(value) if value.is_number else str(value)


def cost(diagram: Diagram, bytes_per_element: int = 4) -> Cost:
    """Read the cost off a diagram, column by column.

    Args:
        diagram: whatever its axes' sizes, numbers or symbols.
        bytes_per_element: of memory; 2 for half precision.
    """
    placed = columns(diagram)
    held = live(diagram, placed)
    per_step = tuple(_madds(diagram, i, False) for i in range(len(diagram.steps)))

    def elements(values: list[int]) -> tuple[Expr, Expr]:
        numbers = sum((volume(_ids(diagram, v), _sizes(diagram, v, False)) for v in values), Integer(0))
        return numbers, sum((volume(_ids(diagram, v), _sizes(diagram, v, True)) for v in values), Integer(0))

    found = []
    for column, after in zip(placed, held[1:], strict=True):
        titles = tuple(
            " ".join(filter(None, (type(diagram.steps[i].op).__name__.lower(), diagram.steps[i].op.label)))
            for i in column
        )
        numbers = sum((per_step[i] for i in column), Integer(0))
        symbols = sum((_madds(diagram, i, True) for i in column), Integer(0))
        found.append(Column(titles, numbers, symbols, *elements(after)))
    return Cost(elements(held[0]), tuple(found), bytes_per_element, per_step)


def _ids(diagram: Diagram, value: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(len(diagram.values[value])))


def _sizes(diagram: Diagram, value: int, symbolic: bool) -> Mapping[str, Expr]:
    return {str(i): a.symbol if symbolic else a.extent for i, a in enumerate(diagram.values[value])}


def _madds(diagram: Diagram, i: int, symbolic: bool) -> Expr:
    step = diagram.steps[i]
    axes = diagram.axes_of(step)
    return Integer(1) * step.op.madds(step.at, {c: a.symbol if symbolic else a.extent for c, a in axes.items()})
