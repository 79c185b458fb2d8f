"""Each unit of one network out of a few of another: sparse linear maps, fitted to covariances alone.

    path = sparse_path(stats)                 # from no unit at all to all of them
    path.to_frame()                           # penalty, error, units in use
    path.at_most(4).weight                    # [q, p], exact zeros

Units are standardised, so a map of nothing has error 1/2, one partner of correlation c at best (1 - c^2)/2
(arXiv:1511.07543, section 3.2). The paper trains a 1x1 convolution by subgradient steps on images, which leaves no
weight at exactly zero. The problem is convex and needs only covariances: here it is solved to its one optimum, at a
cost that does not depend on the number of images. The paper's way is kept as ``solver="sgd"``, to compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.mapping import MappingLayer
from broadsheet.geometry.convergent_learning.statistics import Pair, pair_of
from broadsheet.nn.batches import unit_samples
from broadsheet.nn.lasso import largest_eigenvalue, lasso, with_pattern
from broadsheet.nn.moments import PairMoments
from broadsheet.nn.plotting import COLOURS, DIVERGING, new_axes
from broadsheet.nn.seeding import generator

SOLVERS = ("fista", "sgd")


@dataclass(frozen=True)
class SparseMap:
    """A linear map from the units of one network to those of another.

    Attributes:
        weight: ``[q, p]``, between standardised units.
        l1: the penalty.
        error: ``[q]``, half the mean squared error of each standardised unit; NaN for dead ones.
        best_single: ``[q]``, the same of its one best partner.
        partner, slope: ``[q]``, that partner and its correlation.
        mean_x, std_x, mean_y, std_y: what units were standardised with.
        dead_first, dead_second: units that do not vary.
        refitted: weights that are not zero were fitted again without the penalty.
    """

    weight: Float[Tensor, "q p"]
    l1: float
    error: Float[Tensor, " q"]
    best_single: Float[Tensor, " q"]
    partner: Int[Tensor, " q"]
    slope: Float[Tensor, " q"]
    mean_x: Float[Tensor, " p"]
    std_x: Float[Tensor, " p"]
    mean_y: Float[Tensor, " q"]
    std_y: Float[Tensor, " q"]
    dead_first: tuple[int, ...]
    dead_second: tuple[int, ...]
    refitted: bool = False

    @property
    def active(self) -> Int[Tensor, " q"]:
        """Units of the first network that each one of the second is made of."""
        return (self.weight != 0).sum(1)

    @property
    def live(self) -> Bool[Tensor, " q"]:
        """Units of the second network that vary."""
        alive = torch.ones(len(self.weight), dtype=torch.bool, device=self.weight.device)
        alive[list(self.dead_second)] = False
        return alive

    @property
    def mean_error(self) -> float:
        """Over live units."""
        return float(self.error[self.live].mean())

    @property
    def mean_active(self) -> float:
        """Units in use, over live units."""
        return float(self.active[self.live].double().mean())

    def scored(self, a: Pair, b: Tensor | None = None) -> "SparseMap":
        """The same map with its errors on other samples.

        A unit that hardly varied where the map was fitted can be far off here: errors are counted in the larger of its
        spreads on both, so that no such unit outweighs all others.

        Args:
            a, b: as in :func:`sparse_map`.
        """
        pair = pair_of(a, b)
        error, single = _errors(self, pair, self.weight), _errors(self, pair, self._singles())
        return replace(self, error=error, best_single=single)

    def refit(self, a: Pair, b: Tensor | None = None) -> "SparseMap":
        """Least squares on the units in use: the choice without the shrinkage.

        Args:
            a, b: the samples, as in :func:`sparse_map`.
        """
        pair = pair_of(a, b)
        found = pair.correlation()
        assert found.x is not None
        assert found.xy is not None
        rows = [with_pattern(row, found.x, c) for row, c in zip(self.weight, found.xy.T, strict=True)]
        weight = torch.stack(rows) if rows else self.weight
        return replace(self, weight=weight, error=_errors(self, pair, weight), refitted=True)

    def __call__(self, x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch q"]:
        """Predicted activations of the second network from the first one's, units in the last dimension."""
        layer = self.layer().to(x)
        return x @ layer.weight.T + layer.bias

    def layer(self) -> MappingLayer:
        """The map as a module between activations as they are, to put one network's layer into the other."""
        weight = self.weight * self.std_y[:, None] / self.std_x
        return MappingLayer.of(weight, self.mean_y - weight @ self.mean_x)

    def to_frame(self) -> pd.DataFrame:
        """One row for each unit of the second network."""
        columns = {"error": self.error, "best_single": self.best_single, "active": self.active}
        return pd.DataFrame({name: value.tolist() for name, value in columns.items()}).rename_axis("unit")

    def plot(self, ax: Any = None) -> Any:
        """The weights, blue and red, the second network's units from the best predicted down; returns the axes."""
        ax = new_axes(ax)
        order = self.error.nan_to_num(1.0).argsort()
        shown = self.weight[order].cpu().numpy()
        limit = max(float(abs(shown).max()), 1e-12)
        ax.imshow(shown, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.set(xlabel="unit of the first network", ylabel="unit of the second, best predicted first")
        ax.grid(False)
        return ax

    def _singles(self) -> Tensor:
        """``[q, p]``: the map of nothing but best partners."""
        return torch.zeros_like(self.weight).scatter_(1, self.partner[:, None], self.slope[:, None])


@dataclass(frozen=True)
class SparsePath:
    """Maps from the strongest penalty to the weakest.

    Attributes:
        maps: each with its ``l1``.
    """

    maps: tuple[SparseMap, ...]

    def at_most(self, active: float | int) -> SparseMap:
        """The map with the weakest penalty that uses so many units on average, or fewer."""
        fitting = [one for one in self.maps if one.mean_active <= active]
        if not fitting:
            fewest = min(one.mean_active for one in self.maps)
            raise InvalidInput(f"active={active}: no map of this path uses fewer than {fewest:.2f} units")
        return fitting[-1]

    def scored(self, a: Pair, b: Tensor | None = None) -> "SparsePath":
        """The same maps with errors on other samples."""
        pair = pair_of(a, b)
        return SparsePath(tuple(one.scored(pair) for one in self.maps))

    def to_frame(self) -> pd.DataFrame:
        """One row for each penalty: ``l1``, mean ``error`` and ``active``, mean ``best_single``."""
        rows = [
            {"l1": one.l1, "error": one.mean_error, "active": one.mean_active,
             "best_single": float(one.best_single[one.live].mean())}
            for one in self.maps
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: Any = None, colour: str | None = None, label: str | None = None) -> Any:
        """Error against the number of units in use; returns the axes."""
        ax, table = new_axes(ax), self.to_frame()
        ax.plot(table["active"], table["error"], "o-", markersize=3, color=colour or COLOURS["ours"], label=label)
        ax.axhline(table["best_single"].iloc[-1], color=COLOURS["neutral"], linestyle="--", label="one best partner")
        ax.set(xlabel="units in use for each", ylabel="half the mean squared error", ylim=(0, None))
        ax.legend()
        return ax


def sparse_map(
    a: Pair, b: Tensor | None = None, l1: float | int = 0.01, solver: str = "fista", refit: bool = False, **how: Any
) -> SparseMap:
    """Predict each unit of the second network from few units of the first.

    Minimises, for each unit, half the mean squared error plus ``l1`` times the sum of sizes of its weights, all units
    standardised.

    Args:
        a: activations of the first network, as in :meth:`UnitStatistics.update`, or moments of both (of statistics, the
            first two networks; ``stats.pair(i, j)`` for others).
        b: activations of the second; None with moments.
        l1: the penalty; 0 for least squares. From the largest correlation on nothing is left.
        solver: ``"fista"`` (exact zeros, the optimum) or ``"sgd"`` (the paper's subgradient steps; needs activations).
        refit: fit the chosen units again without the penalty.
        **how: of :func:`broadsheet.nn.lasso.lasso`, or of the steps: ``steps``, ``lr``, ``halve_every``, ``momentum``,
            ``batch_size``, ``seed``.

    Raises:
        InvalidInput: a negative penalty, another solver, or covariances that were not kept.
    """
    if solver not in SOLVERS:
        raise InvalidInput(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}")
    if not float(l1) >= 0:
        raise InvalidInput(f"l1={l1}: a penalty is 0 or more")
    pair = pair_of(a, b)
    empty = _start(pair)
    if solver == "fista":
        gram, cross = _gram(pair)
        weight = _live(lasso(gram, cross, l1, **how).weight, empty)
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        weight = _subgradient(empty, unit_samples(a), unit_samples(b), float(l1), **how)
    else:
        raise InvalidInput("solver='sgd' needs the activations of both networks, moments are not enough")
    found = replace(empty, weight=weight, l1=float(l1), error=_errors(empty, pair, weight))
    return found.refit(pair) if refit else found


def sparse_path(
    a: Pair,
    b: Tensor | None = None,
    l1: Sequence[float] | None = None,
    points: int = 16,
    smallest: float | int = 1e-3,
    refit: bool = False,
    **how: Any,
) -> SparsePath:
    """Sparse maps over penalties, each begun at the one before.

    Args:
        a, b: as in :func:`sparse_map`.
        l1: penalties; None for evenly spaced ones on a logarithmic scale, from the largest correlation (where nothing
            is left) down to ``smallest`` of it, and 0.
        points: how many, 0 aside.
        smallest: as a share of the largest correlation.
        refit: fit the units in use again without the penalty.
        **how: of :func:`broadsheet.nn.lasso.lasso`.
    """
    pair = pair_of(a, b)
    gram, cross = _gram(pair)
    top = largest_eigenvalue(gram)
    if l1 is None:
        if points < 2 or not 0 < smallest < 1:
            raise InvalidInput(f"points={points}, smallest={smallest}: at least 2, and a share below 1, are expected")
        strongest = max(float(cross.abs().max()), 1e-12)
        l1 = [strongest * smallest ** (i / (points - 1)) for i in range(points)] + [0.0]
    if len(l1) == 0 or any(not value >= 0 for value in l1):
        raise InvalidInput(f"l1={list(l1)}: penalties of 0 or more are expected")
    empty, weight, maps = _start(pair), None, []
    for value in sorted((float(v) for v in l1), reverse=True):
        weight = _live(lasso(gram, cross, value, weight, largest=top, **how).weight, empty)
        found = replace(empty, weight=weight, l1=value, error=_errors(empty, pair, weight))
        maps.append(found.refit(pair) if refit and value > 0 else found)
    return SparsePath(tuple(maps))


def _gram(pair: PairMoments) -> tuple[Tensor, Tensor]:
    found = pair.correlation()
    assert found.x is not None
    assert found.xy is not None
    return found.x, found.xy


def _start(pair: PairMoments) -> SparseMap:
    """The map of nothing, with all that does not depend on the penalty."""
    found = pair.between().correlation()
    assert found.xy is not None
    assert found.dead_y is not None
    assert pair.mean_y is not None
    size, partner = found.xy.abs().max(0)
    std_x, std_y = (
        torch.where(dead, 1.0, var.sqrt())
        for dead, var in ((found.dead_x, pair.var_x), (found.dead_y, pair.var_y))
    )  # fmt: skip
    dead_x, dead_y = (tuple(dead.nonzero().flatten().tolist()) for dead in (found.dead_x, found.dead_y))
    nothing = torch.where(found.dead_y, torch.nan, torch.full_like(std_y, 0.5))
    return SparseMap(
        torch.zeros_like(found.xy.T), torch.inf, nothing, (1 - size.square()) / 2 + 0 * nothing, partner,
        found.xy.gather(0, partner[None])[0], pair.mean_x, std_x, pair.mean_y, std_y, dead_x, dead_y,
    )  # fmt: skip


def _live(weight: Tensor, start: SparseMap) -> Tensor:
    """Least squares leaves rounding errors where a unit does not vary."""
    weight[:, list(start.dead_first)] = 0.0
    return weight


def _errors(fitted: SparseMap, pair: PairMoments, weight: Tensor) -> Float[Tensor, " q"]:
    """Half the mean squared error of each standardised unit, on the samples that the moments are of."""
    assert pair.mean_y is not None
    sx, sy = fitted.std_x, fitted.std_y
    inside = pair.cov_x / (sx[:, None] * sx)
    across = pair.cov_xy / (sx[:, None] * sy)
    spread = pair.var_y / sy.square()
    offset = (pair.mean_y - fitted.mean_y) / sy - weight @ ((pair.mean_x - fitted.mean_x) / sx)
    squared = spread - 2 * (weight * across.T).sum(1) + ((weight @ inside) * weight).sum(1) + offset.square()
    error = squared.clamp_min(0) / (2 * spread.clamp_min(1))
    error[list(fitted.dead_second)] = torch.nan
    return error


def _subgradient(
    start: SparseMap,
    x: Tensor,
    y: Tensor,
    l1: float,
    steps: int = 4500,
    lr: float = 1e-3,
    halve_every: int = 1500,
    momentum: float = 0.98,
    batch_size: int = 2048,
    seed: int = 0,
) -> Tensor:
    """The settings of the published solver files: small random weights, momentum, a rate that is halved."""
    x = ((x - start.mean_x) / start.std_x).double()
    y = ((y - start.mean_y) / start.std_y).double()
    draw = generator(seed)
    weight = 0.01 * torch.randn(start.weight.shape, generator=draw, dtype=torch.float64).to(x.device)
    bias, velocity, drift = torch.zeros_like(start.mean_y), torch.zeros_like(weight), torch.zeros_like(start.mean_y)
    for step in range(steps):
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=draw).to(x.device)
        rest = x[rows] @ weight.T + bias - y[rows]
        rate = lr * 0.5 ** (step // halve_every)
        velocity = momentum * velocity - rate * (rest.T @ x[rows] / len(rows) + l1 * weight.sign())
        drift = momentum * drift - rate * rest.mean(0)
        weight, bias = weight + velocity, bias + drift
    return weight
