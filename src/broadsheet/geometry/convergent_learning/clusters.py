"""Groups of units with groups of units: spectral clusters of several networks' units together.

All units stand in one graph, joined by the size of their correlation. A group that several networks share holds units
of all of them, in similar numbers, and these span the same space (arXiv:1511.07543, section 3.3 and appendix).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.statistics import StackedUnits, UnitStatistics
from broadsheet.nn.plotting import CYCLE, SEQUENTIAL, new_axes

DENSE = 1500  # units up to which all eigenvectors are computed


@dataclass(frozen=True)
class UnitClusters:
    """Units of several networks in groups.

    Attributes:
        units: what was clustered.
        labels: ``[P]``, the group of each unit; -1 for dead ones.
        names: of the networks.
        counts: ``[k, networks]``, units of each.
        across: ``[k]``, mean size of the correlation between units of different networks inside a group; NaN where
            there is one network only.
        overlap: ``[k]``, share of the variance of one network's part of a group (units standardised) that least squares
            explains from another's, mean over all directions: 1 where the parts span the same space; NaN likewise.
    """

    units: StackedUnits
    labels: Int[Tensor, " P"]
    names: tuple[str, ...]
    counts: Int[Tensor, "k networks"]
    across: Float[Tensor, " k"]
    overlap: Float[Tensor, " k"]

    @property
    def balance(self) -> Float[Tensor, " k"]:
        """1 where every network has equally many units in a group, 0 where one has none."""
        return self.counts.amin(1) * self.counts.shape[1] / self.counts.sum(1).clamp_min(1)

    @property
    def mixed(self) -> float:
        """Share of groups that hold units of every network."""
        return float((self.counts.amin(1) > 0).double().mean())

    def members(self, cluster: int) -> dict[str, list[int]]:
        """The units of one group, by network."""
        if not 0 <= cluster < len(self.counts):
            raise InvalidInput(f"cluster={cluster}: there are {len(self.counts)}")
        inside = self.labels == cluster
        return {name: self.units.unit[inside & (self.units.network == i)].tolist() for i, name in enumerate(self.names)}

    def to_frame(self) -> pd.DataFrame:
        """One row for each group."""
        columns = {name: self.counts[:, i].tolist() for i, name in enumerate(self.names)}
        more = {"balance": self.balance, "across": self.across, "overlap": self.overlap}
        return pd.DataFrame(columns | {name: value.tolist() for name, value in more.items()}).rename_axis("cluster")

    @property
    def order(self) -> Int[Tensor, " live"]:
        """Live units group by group, those with the strongest ties between networks first, and by network inside."""
        place = self._strongest.argsort().to(self.labels.device)
        live = (self.labels >= 0).nonzero().flatten()
        key = place[self.labels[live]] * len(self.names) + self.units.network[live]
        return live[key.argsort(stable=True)]

    @property
    def ends(self) -> list[int]:
        """Where each group ends in :attr:`order`."""
        return self.counts.sum(1)[self._strongest].cumsum(0).tolist()

    @property
    def _strongest(self) -> Tensor:
        return self.across.nan_to_num(-1.0).argsort(descending=True, stable=True)

    def plot(self, ax: Any = None) -> Any:
        """Sizes of correlations, units in order: a group that networks share is one dark block; returns the axes."""
        return _blocks(self.units, self.order, self.ends, ax)


@dataclass(frozen=True)
class UnitTree:
    """Units split in two again and again.

    Attributes:
        units: what was split.
        rows: numbers of the stacked units in this part.
        parts: the two halves; none where the part is small enough.
    """

    units: StackedUnits
    rows: Int[Tensor, " n"]
    parts: "tuple[UnitTree, ...]" = ()

    @property
    def leaves(self) -> "list[UnitTree]":
        """Parts that were not split, in order."""
        return [leaf for part in self.parts for leaf in part.leaves] if self.parts else [self]

    @property
    def order(self) -> Int[Tensor, " n"]:
        """Units by leaf, so that close ones stand together."""
        return torch.cat([leaf.rows for leaf in self.leaves])

    @property
    def depth(self) -> int:
        return 1 + max(part.depth for part in self.parts) if self.parts else 0

    def __iter__(self) -> "Iterator[UnitTree]":
        """This part and all inside it."""
        yield self
        for part in self.parts:
            yield from part

    def plot(self, ax: Any = None) -> Any:
        """Sizes of correlations in the order of the leaves; returns the axes."""
        ends = torch.tensor([len(leaf.rows) for leaf in self.leaves]).cumsum(0).tolist()
        return _blocks(self.units, self.order, ends, ax)


def spectral_unit_clusters(stats: UnitStatistics, k: int, seed: int = 0, n_init: int = 10) -> UnitClusters:
    """Put the units of all networks into k groups by their correlations.

    The leading eigenvectors of the graph scaled by its degrees, their rows brought to length 1, then k-means.

    Args:
        stats: of two or more networks, ``within=True``.
        k: groups.
        seed: of k-means (and of the starting vector, from 1500 units on).
        n_init: restarts of k-means.

    Raises:
        InvalidInput: fewer live units than groups, or fewer than 2 groups.
    """
    units = stats.stacked()
    live = (~units.dead).nonzero().flatten()
    if not 2 <= k <= len(live):
        raise InvalidInput(f"k={k}: expected 2 to {len(live)}, the number of units that vary")
    from sklearn.cluster import KMeans

    vectors = _eigenvectors(_graph(units, live), k, seed)
    rows = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    found = KMeans(k, n_init=n_init, random_state=seed).fit_predict(rows.cpu().numpy())  # type: ignore[arg-type]
    labels = torch.full((len(units.unit),), -1, dtype=torch.long, device=live.device)
    labels[live] = torch.as_tensor(found, dtype=torch.long, device=live.device)
    networks = len(stats.names)
    counts = torch.zeros(k, networks, dtype=torch.long, device=live.device)
    counts.index_put_((labels[live], units.network[live]), torch.ones_like(live), accumulate=True)
    across = torch.stack([_across(units, labels == cluster) for cluster in range(k)])
    overlap = torch.stack([_overlap(units, labels == cluster, networks) for cluster in range(k)])
    return UnitClusters(units, labels, stats.names, counts, across, overlap)


def hierarchical_unit_clusters(stats: UnitStatistics, max_size: int = 8, seed: int = 0) -> UnitTree:
    """Split the units of all networks in two, by the second eigenvector of their graph, until parts are small.

    Args:
        stats: as in :func:`spectral_unit_clusters`.
        max_size: units that a part may have without being split again.
        seed: of the starting vector, from 1500 units on.
    """
    if max_size < 1:
        raise InvalidInput(f"max_size={max_size}: at least 1 is expected")
    units = stats.stacked()

    def split(rows: Tensor) -> UnitTree:
        if len(rows) <= max_size:
            return UnitTree(units, rows)
        graph, degree = _graph(units, rows, with_degree=True)
        second = _eigenvectors(graph, 2, seed)[:, 0] / degree  # the largest comes last
        left = second > 0
        if bool(left.all()) or not bool(left.any()):  # no cut to be seen: halves
            left = second.argsort().argsort() < len(rows) // 2
        return UnitTree(units, rows, (split(rows[left]), split(rows[~left])))

    return split((~units.dead).nonzero().flatten())


def _graph(units: StackedUnits, rows: Tensor, with_degree: bool = False) -> Any:
    """Sizes of correlations without the diagonal, divided by the roots of both degrees."""
    graph = units.correlation[rows][:, rows].abs_()
    graph.diagonal().zero_()
    root = graph.sum(1).clamp_min(1e-12).sqrt()
    graph = graph.div_(root[:, None]).div_(root)
    return (graph, root) if with_degree else graph


def _eigenvectors(graph: Tensor, k: int, seed: int) -> Float[Tensor, "n k"]:
    """Those of the k largest eigenvalues, the largest last."""
    if len(graph) <= DENSE or k >= len(graph) - 1:
        return torch.linalg.eigh(graph)[1][:, -k:]
    from scipy.sparse.linalg import LinearOperator, eigsh

    def product(x: np.ndarray) -> np.ndarray:
        return (graph @ torch.as_tensor(x, dtype=graph.dtype).to(graph.device)).cpu().numpy()

    operator = LinearOperator(graph.shape, matvec=product, dtype=np.float64)  # type: ignore[reportCallIssue]
    start = np.random.default_rng(seed).standard_normal(len(graph))
    values, vectors = eigsh(operator, k, which="LA", v0=start)
    return torch.as_tensor(vectors[:, values.argsort()].copy(), dtype=graph.dtype, device=graph.device)


def _across(units: StackedUnits, inside: Tensor) -> Tensor:
    rows = inside.nonzero().flatten()
    table, owner = units.correlation[rows][:, rows].abs(), units.network[rows]
    return table[owner[:, None] != owner].mean()  # NaN of nothing where there is one network


def _overlap(units: StackedUnits, inside: Tensor, networks: int) -> Tensor:
    """Least squares from each network's part of a group to each other's: the mean share of variance explained."""
    parts = [(inside & (units.network == i)).nonzero().flatten() for i in range(networks)]
    table, shares = units.correlation, []
    for source, target in permutations([part for part in parts if len(part)], 2):
        cross = table[source][:, target]
        predicted = torch.linalg.pinv(table[source][:, source], hermitian=True) @ cross
        shares.append((predicted * cross).sum() / len(target))
    return torch.stack(shares).mean() if shares else table.new_full((), torch.nan)


def _blocks(units: StackedUnits, order: Tensor, ends: list[int], ax: Any) -> Any:
    return block_plot(units.correlation[order][:, order].abs(), units.network[order].tolist(), ends, ax)


def block_plot(table: Float[Tensor, "n n"], owner: Sequence[int], ends: Sequence[int], ax: Any = None) -> Any:
    """Sizes of correlations with groups framed along the diagonal, and a strip above that says whose unit it is.

    Args:
        table: units group by group.
        owner: the network of each.
        ends: where each group ends.
        ax: matplotlib axes, or None for new ones.
    """
    from matplotlib.patches import Rectangle

    ax, n = new_axes(ax, figsize=(5.0, 4.8)), len(table)
    ax.imshow(table.cpu().numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    strip = max(1.0, n / 25)
    for i, network in enumerate(owner):
        colour = CYCLE[network % len(CYCLE)]
        ax.add_patch(Rectangle((i - 0.5, -0.5 - 1.4 * strip), 1, strip, facecolor=colour, linewidth=0))
    for start, end in pairwise([0, *ends]):
        frame = {"edgecolor": CYCLE[5], "facecolor": "none", "linewidth": 1.3}
        ax.add_patch(Rectangle((start - 0.5, start - 0.5), end - start, end - start, **frame))
    ax.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5 - 1.4 * strip), xlabel="unit, by group", ylabel="unit, by group")
    ax.spines[:].set_visible(False)
    ax.grid(False)
    return ax
