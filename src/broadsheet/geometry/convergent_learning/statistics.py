"""How the units of two or more networks go together: moments of all of them on the same samples, streamed.

    stats = UnitStatistics(["seed 0", "seed 1", "seed 2"])
    for a, b, c in batches:                   # conv maps, tokens or features of each network
        stats.update(a, b, c)
    stats.correlation(0, 1).xy                # [p, q]
    stats.match(0, 1)

Each network's own covariance is kept once, that between two networks once for each pair; ``within=False`` keeps the
latter alone: 0.8 GB for ten thousand units a side.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.matching import UnitMatching, match_units
from broadsheet.nn.batches import unit_samples
from broadsheet.nn.moments import Correlation, PairMoments
from broadsheet.nn.plotting import CYCLE, new_axes

ENOUGH = 10  # samples for each unit, below which chance correlations matter


class ConvergentLearningWarning(UserWarning):
    """Few samples, a network compared with itself, or one that was in training mode."""


@dataclass(frozen=True)
class StackedUnits:
    """All units of all networks in one row.

    Attributes:
        correlation: ``[P, P]``; 0 in rows and columns of dead units, 1 on the diagonal of the others.
        network: ``[P]``, whose unit it is.
        unit: ``[P]``, its number there.
        dead: ``[P]``.
    """

    correlation: Float[Tensor, "P P"]
    network: Int[Tensor, " P"]
    unit: Int[Tensor, " P"]
    dead: Bool[Tensor, " P"]


class UnitStatistics:
    """Streaming means and second moments of the units of several networks, in float64.

    Args:
        names: of the networks, two or more.
        within: keep covariances inside each network too; clusters, sparse maps and subspaces need them, matching does
            not.

    Attributes:
        count: samples so far; every position of a map or a text is one.
    """

    def __init__(self, names: Sequence[str] = ("1", "2"), within: bool = True) -> None:
        if len(names) < 2 or len(set(names)) < len(names):
            raise InvalidInput(f"names={list(names)}: expected two or more networks with names of their own")
        self.names, self.within = tuple(names), within
        self._own = [PairMoments(True) for _ in names] if within else []
        self._across = {pair: PairMoments(False) for pair in combinations(range(len(names)), 2)}

    @classmethod
    def of(cls, *activations: Tensor, names: Sequence[str] | None = None, **how: Any) -> "UnitStatistics":
        """The statistics of activations that are in memory.

        Args:
            *activations: as in :meth:`update`.
            names: of the networks; None numbers them from 1.
            **how: ``within``, or anything that :meth:`update` takes.
        """
        stats = cls(names or [str(i + 1) for i in range(len(activations))], how.pop("within", True))
        return stats.update(*activations, **how)

    def update(
        self,
        *activations: Tensor,
        mask: Tensor | None = None,
        ids: Sequence[Any] | None = None,
        channels: str = "auto",
        places: Tensor | None = None,
    ) -> "UnitStatistics":
        """Add the same samples of every network; the same object comes back.

        Args:
            *activations: one for each network, floating: features ``[n, units]``, tokens ``[n, time, units]`` or maps
                ``[n, units, height, width]``, whose positions all count.
            mask: ``[n, time]``, tokens that count.
            ids: for each network the samples' names, to be sure that they are in the same order.
            channels, places: as in :func:`broadsheet.nn.batches.unit_samples`.

        Raises:
            InvalidInput: another number of networks, of samples or of units, another order, or NaN.
        """
        if len(activations) != len(self.names):
            raise InvalidInput(f"{len(activations)} activations: expected one for each of {', '.join(self.names)}")
        if ids is not None:
            listed = [torch.as_tensor(one).tolist() if isinstance(one, Tensor) else list(one) for one in ids]
            for name, other in zip(self.names, listed, strict=True):
                if other != listed[0]:
                    raise InvalidInput(f"samples of {name!r} stand in another order than those of {self.names[0]!r}")
        rows = []
        for name, activation in zip(self.names, activations, strict=True):
            values = unit_samples(activation, mask, channels, places).detach().double()
            bad = (~values.isfinite()).any(0).nonzero().flatten()
            if len(bad):
                raise InvalidInput(f"{name!r}: unit {int(bad[0])} holds NaN or infinite values ({len(bad)} units do)")
            if rows and len(values) != len(rows[0]):
                raise InvalidInput(
                    f"{name!r} gives {len(values)} samples (positions included), {self.names[0]!r} {len(rows[0])}: the "
                    "same inputs and maps of one size are expected"
                )
            rows.append(values)
        for own, values in zip(self._own, rows, strict=False):
            own.update(values)
        for (i, j), across in self._across.items():
            across.update(rows[i], rows[j])
        return self

    def merge(self, other: "UnitStatistics") -> "UnitStatistics":
        """Add what another stream of the same networks has seen; the same object comes back."""
        if other.names != self.names or other.within != self.within:
            raise InvalidInput(f"statistics of {other.names}, within={other.within}: other networks or another kind")
        for mine, theirs in zip(self._own, other._own, strict=True):
            mine.merge(theirs)
        for pair, theirs in other._across.items():
            self._across[pair].merge(theirs)
        return self

    def copy(self) -> "UnitStatistics":
        """The same sums in memory of their own."""
        return UnitStatistics(self.names, self.within).merge(self)

    def joined(self, across: "UnitStatistics") -> "UnitStatistics":
        """These networks' own covariances with what another stream has between them; it shares memory.

        Args:
            across: of the same networks, ``within=False``; its samples are the same ones in any order for each network,
                as in a null in which they are shuffled.
        """
        if not self.within or across.names != self.names or across.count != self.count:
            raise InvalidInput("expected statistics of the same networks and samples, these with within=True")
        both = UnitStatistics(self.names)
        both._own, both._across = self._own, across._across
        return both

    def only(self, *networks: int) -> "UnitStatistics":
        """Some of the networks, in this order; it shares memory.

        Args:
            *networks: their numbers, two or more.
        """
        numbers = [self._number(i) for i in networks]
        some = UnitStatistics([self.names[i] for i in numbers], self.within)
        some._own = [self._own[i] for i in numbers] if self.within else []
        some._across = {(a, b): self.between(numbers[a], numbers[b]) for a, b in some._across}
        return some

    @property
    def count(self) -> int:
        return self._across[0, 1].count

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each network."""
        self._any()
        return tuple(len(self.means(i)) for i in range(len(self.names)))

    @property
    def nbytes(self) -> int:
        """What is held in memory: it does not grow with samples."""
        tensors = [t for part in (*self._own, *self._across.values()) for t in vars(part).values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two networks, by number."""
        return list(self._across)

    def means(self, network: int = 0) -> Float[Tensor, " units"]:
        """Mean activation of each unit."""
        self._any()
        i = self._number(network)
        if i == 0:
            return self._across[0, 1].mean_x
        mean = self._across[0, i].mean_y
        assert mean is not None
        return mean

    def pair(
        self, first: int = 0, second: int = 1, units: Tensor | None = None, others: Tensor | None = None
    ) -> PairMoments:
        """The moments of two networks, which all functions of this package take: a copy.

        Args:
            first, second: numbers of the networks.
            units, others: numbers of the units of either one to keep; None keeps all.
        """
        view = self._view(first, second)
        if units is None and others is None:
            return view.copy()
        p, q = len(self.means(first)), len(self.means(second))
        chosen = [torch.arange(n) if some is None else some for n, some in ((p, units), (q, others))]
        return view.subset(*chosen)

    def correlation(self, first: int = 0, second: int = 1) -> Correlation:
        """Correlations inside and between two networks; dead units have zeros and are marked.

        Fewer than ten samples a unit give a warning: correlations of chance have a spread of ``1 / sqrt(count)``.
        """
        view = self._view(first, second)
        _enough(view.count, max(len(self.means(first)), len(self.means(second))))
        return view.correlation()

    def match(self, first: int = 0, second: int = 1, mode: str = "bipartite", **how: Any) -> UnitMatching:
        """Pair the units of two networks by their correlation: :func:`match_units`."""
        _enough(self.count, max(len(self.means(first)), len(self.means(second))))
        return match_units(self.between(first, second), mode=mode, **how)

    def stacked(self) -> StackedUnits:
        """Correlations of all units of all networks."""
        self._any()
        if not self.within:
            raise InvalidInput("within=False: covariances inside a network were not kept")
        ends = torch.tensor([0, *self.widths]).cumsum(0).tolist()
        place = [slice(a, b) for a, b in pairwise(ends)]
        whole = self.means().new_zeros(ends[-1], ends[-1])
        gone = torch.zeros(ends[-1], dtype=torch.bool, device=whole.device)
        _enough(self.count, max(self.widths))
        for i, own in enumerate(self._own):
            found = own.correlation()
            assert found.x is not None
            whole[place[i], place[i]], gone[place[i]] = found.x, found.dead_x
        for (i, j), across in self._across.items():
            between = across.correlation().xy
            assert between is not None
            whole[place[i], place[j]], whole[place[j], place[i]] = between, between.T
        whole.diagonal().copy_(torch.where(gone, 0.0, 1.0))
        owner = torch.cat([torch.full((width,), i) for i, width in enumerate(self.widths)])
        numbers = torch.cat([torch.arange(width) for width in self.widths])
        return StackedUnits(whole, owner.to(whole.device), numbers.to(whole.device), gone)

    def plot_spectra(self, ax: Any = None) -> Any:
        """Mean activations of each network's units, the largest first; returns the axes."""
        ax = new_axes(ax)
        for i, (name, colour) in enumerate(zip(self.names, CYCLE * len(self.names), strict=False)):
            ax.plot(self.means(i).sort(descending=True).values.cpu().numpy(), color=colour, label=name)
        ax.set(xlabel="unit, the most active first", ylabel="mean activation")
        ax.legend(title="network")
        return ax

    def _number(self, network: int) -> int:
        if not -len(self.names) <= network < len(self.names):
            raise InvalidInput(f"network {network}: there are {len(self.names)}, counted from 0")
        return network % len(self.names)

    def _any(self) -> None:
        if self.count == 0:
            raise InvalidInput("no samples yet: call update() first")

    def between(self, first: int = 0, second: int = 1) -> PairMoments:
        """Two networks' moments without the covariances inside them; it shares memory with the stream."""
        self._any()
        i, j = self._number(first), self._number(second)
        if i == j:
            raise InvalidInput(f"network {first} and {second} are the same: choose two")
        return self._across[i, j] if i < j else self._across[j, i].turned()

    def _view(self, first: int, second: int) -> PairMoments:
        across = self.between(first, second)
        if not self.within:
            return across
        return PairMoments.of_parts(self._own[self._number(first)], self._own[self._number(second)], across)


def _enough(count: int, units: int) -> None:
    if count < ENOUGH * units:
        warnings.warn(
            f"{count} samples for {units} units: chance alone gives correlations of about {1 / math.sqrt(count):.2f}, "
            f"and matching picks the largest; {ENOUGH * units} samples and more are advised",
            ConvergentLearningWarning,
            stacklevel=3,
        )


Pair = Tensor | PairMoments | UnitStatistics


def pair_of(a: Pair, b: Tensor | None = None, within: bool = True) -> PairMoments:
    """The moments of two networks, from whatever was handed in.

    Args:
        a: activations of the first network, or moments (then ``b`` is None); of statistics, the first two networks.
        b: activations of the second on the same samples.
        within: covariances inside each are needed.
    """
    if isinstance(a, Tensor):
        if b is None:
            raise InvalidInput("the second network's activations are missing: hand in both, or moments of both")
        stats = UnitStatistics.of(a, b, within=within)
        _enough(stats.count, max(stats.widths))
        return stats._view(0, 1)
    if b is not None:
        raise InvalidInput("moments hold both networks already: leave b out")
    pair = a._view(0, 1) if isinstance(a, UnitStatistics) else a
    if within and not pair.within:
        raise InvalidInput("covariances inside a network are needed: PairMoments(within=True)")
    if pair.mean_y is None:
        raise InvalidInput("these moments are of one network only: update(x, y) is expected")
    return pair


def unit_correlation(a: Tensor, b: Tensor) -> Float[Tensor, "p q"]:
    """Pearson correlation of every unit of one network with every unit of another.

    Args:
        a, b: activations on the same samples, as in :meth:`UnitStatistics.update`.

    Returns:
        float64; NaN in rows and columns of dead units, which :func:`match_units` leaves out.
    """
    pair = pair_of(a, b, within=False)
    found = pair.correlation()
    assert found.xy is not None
    assert found.dead_y is not None
    return found.xy.masked_fill(found.dead_x[:, None] | found.dead_y, torch.nan)
