"""Which units several networks share, layer by layer, beside what chance and shared inputs alone would give.

report = convergence_report({"seed 0": a, "seed 1": b}, ["conv1", "conv2"], loader)
report.plot()                             # matched correlations, the best first, and those of untrained networks
report.to_frame()
report["conv2"].most_alike(5)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.clusters import UnitClusters, spectral_unit_clusters
from broadsheet.geometry.convergent_learning.matching import UnitMatching
from broadsheet.geometry.convergent_learning.record import Layer, Models, Recorder, layer_names, named_models
from broadsheet.geometry.convergent_learning.sparse import SparseMap, SparsePath, sparse_map, sparse_path
from broadsheet.geometry.convergent_learning.statistics import UnitStatistics
from broadsheet.geometry.convergent_learning.subspaces import SubspaceOverlap, subspace_overlap
from broadsheet.nn.exemplars import RunningTopK
from broadsheet.nn.moments import Correlation
from broadsheet.nn.plotting import COLOURS, DIVERGING, new_figure, style
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.untrained import untrained_copy

NULLS = ("untrained", "shuffled")


@dataclass(frozen=True)
class LayerConvergence:
    """One layer of several networks.

    Attributes:
        layer: its name in the first network.
        chosen: statistics of the samples that pairs and maps are chosen on.
        scored: of the samples that they are scored on; the same object where there is one set of samples.
        nulls: by name, chosen and scored statistics of networks that share nothing but their inputs (``"untrained"``)
            or not even these (``"shuffled"``).
        top: for each network, samples with each unit's largest activation.
    """

    layer: str
    chosen: UnitStatistics
    scored: UnitStatistics
    nulls: Mapping[str, tuple[UnitStatistics, UnitStatistics]]
    top: tuple[RunningTopK, ...]

    def match(
        self, first: int = 0, second: int = 1, mode: str = "bipartite", null: str | None = None, **how: Any
    ) -> UnitMatching:
        """Pairs of two networks' units, chosen on some samples and scored on others.

        Args:
            first, second: numbers of the networks.
            mode: ``"bipartite"`` or ``"semi"``.
            null: ``"untrained"`` or ``"shuffled"`` in place of the networks themselves.
            **how: of :func:`match_units`.
        """
        chosen, scored = self._statistics(null)
        found = chosen.match(first, second, mode, **how)
        return found if scored is chosen else found.scored(scored.between(first, second))

    def sparse_map(self, first: int = 0, second: int = 1, **how: Any) -> SparseMap:
        """Units of ``second`` out of few of ``first``, scored likewise: :func:`sparse_map`."""
        found = sparse_map(self.chosen.pair(first, second), **how)
        return found if self.scored is self.chosen else found.scored(self.scored.pair(first, second))

    def sparse_path(self, first: int = 0, second: int = 1, **how: Any) -> SparsePath:
        """The same over penalties: :func:`sparse_path`."""
        found = sparse_path(self.chosen.pair(first, second), **how)
        return found if self.scored is self.chosen else found.scored(self.scored.pair(first, second))

    def subspaces(self, first: int = 0, second: int = 1, **how: Any) -> SubspaceOverlap:
        """Whether two networks' units span the same space, on the samples for choosing: :func:`subspace_overlap`."""
        return subspace_overlap(self.chosen.pair(first, second), **how)

    def clusters(self, k: int, null: str | None = None, **how: Any) -> UnitClusters:
        """Groups of units of all networks: :func:`spectral_unit_clusters`."""
        chosen, _ = self._statistics(null)
        if null == "untrained" and not chosen.within:
            raise InvalidInput("covariances inside untrained networks were not kept: null='shuffled' has them")
        return spectral_unit_clusters(chosen, k, **how)

    def most_alike(self, k: int = 5, first: int = 0, second: int = 1) -> pd.DataFrame:
        """The pairs with the largest correlation, and the samples on which either unit is most active."""
        return self._pairs(first, second).head(k)

    def least_alike(self, k: int = 5, first: int = 0, second: int = 1) -> pd.DataFrame:
        """The pairs with the smallest, the worst first."""
        return self._pairs(first, second).iloc[::-1].head(k)

    def plot(self, ax: Any = None, first: int = 0, second: int = 1) -> Any:
        """Sorted correlations of pairs, one to one and each with its best, and those of the nulls."""
        matching = self.match(first, second)
        ax = matching.plot(ax, COLOURS["ours"], "one to one")
        semi = self.match(first, second, "semi")
        semi.plot(ax, COLOURS["accent"], "each its best")
        for null, colour in zip(self.nulls, (COLOURS["baseline"], COLOURS["paper"]), strict=False):
            self.match(first, second, null=null).plot(ax, colour, null)
        ax.set_title(self.layer)
        return ax

    def plot_correlations(self, first: int = 0, second: int = 1, axes: Any = None) -> Any:
        """Four correlation matrices: inside each network, between them, and between them with pairs on the diagonal.

        Returns:
            the four axes.
        """
        tables = correlation_tables(self.scored.correlation(first, second), self.match(first, second))
        names = {"first": f"inside {self.chosen.names[first]}", "second": f"inside {self.chosen.names[second]}"}
        tables = {names.get(name, name): table for name, table in tables.items()}
        if axes is None:
            with style():
                _, axes = new_figure(3.0 * len(tables), 3.1, len(tables))
        for ax, (title, table) in zip(axes, tables.items(), strict=True):
            ax.imshow(table.cpu().numpy(), cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
            ax.set_box_aspect(1)  # unequal widths, equal frames
            ax.set(title=title, xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.grid(False)
        return axes

    def row(self, first: int = 0, second: int = 1) -> dict[str, Any]:
        """The figures of two networks that :meth:`ConvergenceReport.to_frame` holds."""
        names = self.chosen.names
        matching, semi = self.match(first, second), self.match(first, second, "semi")
        row: dict[str, Any] = {
            "layer": self.layer, "first": names[first], "second": names[second], "bipartite": matching.mean,
            "semi": semi.mean, "mean_rank": matching.mean_rank, "above_0.8": matching.share(above=0.8),
            "below_0.6": matching.share(below=0.6),
        }  # fmt: skip
        row |= {null: self.match(first, second, null=null).mean for null in self.nulls}
        if self.chosen.within:
            least_squares = self.sparse_map(first, second, l1=0.0)
            overlap = self.subspaces(first, second)
            row |= {
                "error_one_unit": float(least_squares.best_single[least_squares.live].mean()),
                "error_all_units": least_squares.mean_error, "canonical": overlap.mean, "cka": overlap.cka,
            }  # fmt: skip
        return row

    def _statistics(self, null: str | None) -> tuple[UnitStatistics, UnitStatistics]:
        if null is None:
            return self.chosen, self.scored
        if null not in self.nulls:
            there = ", ".join(self.nulls) or "none"
            raise InvalidInput(f"null={null!r}: this report holds {there}; hand in null=({null!r},) when making it")
        return self.nulls[null]

    def _pairs(self, first: int, second: int) -> pd.DataFrame:
        table = self.match(first, second).to_frame()
        if self.top:
            for column, unit, network in (("top_first", "unit", first), ("top_second", "partner", second)):
                ids = self.top[network].ids
                table[column] = [ids[i].tolist() for i in table[unit]]
        return table


def correlation_tables(found: Correlation, matching: UnitMatching) -> dict[str, Tensor]:
    """Correlations of the units that vary: inside the first and the second network (where they were kept), between
    them, and between them with pairs on the diagonal, the best first."""
    assert found.xy is not None
    assert found.dead_y is not None
    rows, columns = ~found.dead_x, ~found.dead_y
    tables = {} if found.x is None else {"first": found.x[rows][:, rows]}
    tables |= {} if found.y is None else {"second": found.y[columns][:, columns]}
    paired = matching.permuted(found.xy)[:, : len(matching.matched)]
    return tables | {"between": found.xy[rows][:, columns], "between, paired": paired}


@dataclass(frozen=True)
class ConvergenceReport:
    """Layers of several networks, one after the other.

    Attributes:
        names: of the networks.
        layers: what was found in each.
        samples: how many went through.
    """

    names: tuple[str, ...]
    layers: tuple[LayerConvergence, ...]
    samples: int

    def __getitem__(self, layer: str) -> LayerConvergence:
        for one in self.layers:
            if one.layer == layer:
                return one
        raise InvalidInput(f"no layer {layer!r}: this report holds {', '.join(one.layer for one in self.layers)}")

    def __iter__(self) -> Iterator[LayerConvergence]:
        return iter(self.layers)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame([one.row(i, j) for one in self.layers for i, j in one.chosen.pairs])

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer and pair of networks: mean correlations of pairs, one to one and semi, mean rank,
        shares above and below, nulls, errors of one unit and of all, mean canonical correlation and CKA."""
        return self._frame.copy()

    def plot(self, axes: Any = None, first: int = 0, second: int = 1) -> Any:
        """Sorted matched correlations of every layer with the nulls; returns the axes, one for each layer."""
        n = len(self.layers)
        if axes is None:
            with style():
                _, grid = new_figure(2.9 * n, 3.0, n, sharey=True, squeeze=False)
                axes = grid[0]
        for i, (ax, one) in enumerate(zip(axes, self.layers, strict=True)):
            one.plot(ax, first, second)
            if i:
                ax.get_legend().remove()
                ax.set_ylabel("")
        return axes


def convergence_report(
    models: Models,
    layers: Layer | Sequence[Layer],
    loader: Iterable[Any],
    null: Sequence[str] = NULLS,
    *,
    held_out: bool | Iterable[Any] = True,
    within: bool = True,
    exemplars: int = 9,
    channels: str = "auto",
    positions: int | None = None,
    untrained: Models | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> ConvergenceReport:
    """Compare the units of several networks, several layers at once, in one pass through a loader.

    Networks run in evaluation mode without gradients and are left as they were. Nothing is kept but one batch's
    activations and, for each layer, sums in float64. With n networks of p units each, ``8 p^2`` bytes a matrix: one for
    each network (``within``) and one for each pair of networks, twice where pairs are scored on samples held out, and
    once more for each null's pairs. Two networks of ten thousand units: 0.8 GB a matrix, 1.6 GB with
    ``within=False``, ``null=()``; 4.8 GB with ``within=True``.

    Args:
        models: two or more networks, by name or in order; any ``nn.Module``.
        layers: submodule names that all networks have, wildcards allowed; or for each layer a tuple of names, one for
            each network. Take outputs of nonlinearities to compare as the paper does.
        loader: batches as :func:`broadsheet.nn.batches.model_inputs` takes them; labels are not used.
        null: ``"untrained"`` (the same architectures with fresh weights, on the same samples), ``"shuffled"`` (each
            network's samples in an order of their own, within each batch), both or none.
        held_out: True chooses pairs on every other sample and scores them on the rest; a second loader scores them on
            its samples; False does both on all, which flatters where samples are few.
        within: covariances inside networks, for maps, subspaces and clusters; False for matching alone.
        exemplars: samples kept for each unit, counted in the loader's order, ``loader`` before a second one; 0 for
            none.
        channels: where the units are; ``"auto"`` takes dimension 1 of maps and the last one elsewhere.
        positions: of each map or text, drawn once; None takes all.
        untrained: networks for that null, where :func:`broadsheet.nn.untrained.untrained_copy` cannot make them.
        seed: of untrained weights and all draws.
        progress: shows the batches.

    Raises:
        InvalidInput: fewer than two networks, a layer that is not there, other numbers of positions, or activations
            that are not finite; the message names the layer.
    """
    unknown = [name for name in null if name not in NULLS]
    if unknown:
        raise InvalidInput(f"null={unknown[0]!r}: expected one of {', '.join(NULLS)}")
    if positions is not None and positions < 1:
        raise InvalidInput(f"positions={positions}: at least 1 is expected, or None for all")
    named = named_models(models)
    wanted = layer_names(named, layers)
    halves = 1 if held_out is False else 2
    fresh: dict[str, nn.Module] = {}
    if "untrained" in null:
        fresh = (
            {name: untrained_copy(model, seed + 1 + i) for i, (name, model) in enumerate(named.items())}
            if untrained is None
            else dict(zip(named, named_models(untrained).values(), strict=True))
        )
    recorder = Recorder(named, wanted, within, halves, "shuffled" in null, exemplars, channels, positions, seed)
    rival = Recorder(fresh, wanted, False, halves, False, 0, channels, positions, seed) if fresh else None

    def passes(batches: Iterable[Any], half: int | None) -> None:
        if rival is None:
            recorder.run(batches, half, progress)
            return
        with closing(recorder.through(batches, half, progress)) as taken:  # hooks go, whatever happens
            rival.run(taken, half)

    if isinstance(held_out, bool):
        passes(loader, None)
    else:
        passes(loader, 0)
        passes(held_out, 1)
    found = []
    for i, stream in enumerate(recorder.streams):
        nulls: dict[str, tuple[UnitStatistics, UnitStatistics]] = {}
        if rival is not None:
            nulls["untrained"] = _halves(rival.streams[i].halves)
        if stream.shuffled:
            shuffled = stream.shuffled
            if within:
                shuffled = [own.joined(across) for own, across in zip(stream.halves, shuffled, strict=True)]
            nulls["shuffled"] = _halves(shuffled)
        chosen, scored = _halves(stream.halves)
        found.append(LayerConvergence(stream.names[0], chosen, scored, nulls, tuple(stream.top)))
    return ConvergenceReport(tuple(named), tuple(found), recorder.samples)


def _halves(statistics: list[UnitStatistics]) -> tuple[UnitStatistics, UnitStatistics]:
    if any(half.count == 0 for half in statistics):
        raise InvalidInput("a single sample: pairs are chosen on some and scored on others; hand in held_out=False")
    return statistics[0], statistics[-1]
