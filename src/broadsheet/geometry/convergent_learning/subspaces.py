"""Whether two networks' units span the same space, whatever the units themselves are."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.geometry.convergent_learning.statistics import Pair, pair_of
from broadsheet.nn.alignment import canonical_correlations, linear_cka
from broadsheet.nn.plotting import COLOURS, new_axes


@dataclass(frozen=True)
class SubspaceOverlap:
    """Two spaces of activations on the same samples.

    Attributes:
        canonical: ``[k]``, correlations of the best matching directions, largest first.
        explained_first, explained_second: share of each network's variance that the other one's units predict.
        rank_first, rank_second: directions in use, ``(sum of variances)^2 / sum of squares`` over principal ones.
        cka: linear centred kernel alignment.
    """

    canonical: Float[Tensor, " k"]
    explained_first: float
    explained_second: float
    rank_first: float
    rank_second: float
    cka: float

    @property
    def mean(self) -> float:
        """Mean canonical correlation: 1 for the same space."""
        return float(self.canonical.mean())

    def plot(self, ax: Any = None, colour: str | None = None, label: str | None = None) -> Any:
        """The canonical correlations; returns the axes."""
        ax = new_axes(ax)
        values = self.canonical.cpu().numpy()
        ax.plot(range(1, len(values) + 1), values, color=colour or COLOURS["ours"], label=label)
        ax.set(xlabel="direction", ylabel="canonical correlation", ylim=(0, 1.03))
        if label:
            ax.legend()
        return ax


def subspace_overlap(
    a: Pair, b: Tensor | None = None, ridge: float = 0.0, variance: float | int = 1.0
) -> SubspaceOverlap:
    """How far two networks' units span the same space.

    Units keep their own scale here: loud ones count more in everything but the canonical correlations.

    Args:
        a, b: activations or moments, as in :func:`sparse_map`.
        ridge: added to variances, as a share of their mean.
        variance: share of each network's variance whose principal directions are compared.
    """
    pair = pair_of(a, b)
    return SubspaceOverlap(
        canonical_correlations(pair, ridge, variance),
        _explained(pair.cov_y, pair.cov_xy.T, pair.cov_x),
        _explained(pair.cov_x, pair.cov_xy, pair.cov_y),
        _rank(pair.cov_x),
        _rank(pair.cov_y),
        linear_cka(pair),
    )


def _explained(cov: Tensor, cross: Tensor, of: Tensor) -> float:
    """Share of the variance ``of`` what is predicted that least squares explains."""
    return float(((torch.linalg.pinv(cov, hermitian=True) @ cross) * cross).sum() / of.trace())


def _rank(cov: Tensor) -> float:
    return float(cov.trace().square() / cov.square().sum())
