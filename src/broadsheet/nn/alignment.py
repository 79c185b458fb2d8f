"""How two spaces with the same samples in them go together: CKA, Procrustes rotations, canonical correlations."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.moments import PairMoments


def linear_cka(moments: PairMoments) -> float:
    """Linear centred kernel alignment of two sets of units, between 0 and 1 (arXiv:1905.00414, equation 2).

    Args:
        moments: of both sets on the same samples, covariances inside each set included. Rotations of either set and a
            common scale change nothing.
    """
    across = moments.cov_xy.square().sum()
    inside = moments.cov_x.norm() * moments.cov_y.norm()
    if inside == 0:
        raise InvalidInput("one of the two sets of units does not vary at all")
    return float(across / inside)


def canonical_correlations(
    moments: PairMoments, ridge: float = 0.0, variance: float | int = 1.0
) -> Float[Tensor, " k"]:
    """Correlations of the best matching directions of two sets of units, largest first.

    Args:
        moments: as in :func:`linear_cka`.
        ridge: added to the variances, as a share of their mean.
        variance: share of each set's variance whose principal directions are kept, the largest first; below 1 the
            noise in directions that hardly vary is left out (SVCCA, arXiv:1706.05806).

    Returns:
        as many as the smaller of the two numbers of directions.
    """
    if not 0 < variance <= 1:
        raise InvalidInput(f"variance={variance}: a share above 0, at most 1, is expected")
    left, right = (_whitener(cov, ridge, variance) for cov in (moments.cov_x, moments.cov_y))
    return torch.linalg.svdvals(left.T @ moments.cov_xy @ right).clamp(0, 1)


def _whitener(cov: Tensor, ridge: float, variance: float | int) -> Tensor:
    """``[d, rank]`` that turns units into uncorrelated ones of variance 1."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > values[-1].clamp_min(0) * len(cov) * torch.finfo(cov.dtype).eps
    if variance < 1:
        larger = values.clamp_min(0).flip(0).cumsum(0).flip(0) - values.clamp_min(0)  # of directions that come first
        keep &= larger < variance * values.clamp_min(0).sum()
    if not bool(keep.any()):
        raise InvalidInput("a set of units does not vary at all")
    return vectors[:, keep] / (values[keep] + ridge * values.mean()).sqrt()


@dataclass(frozen=True)
class Similarity:
    """The map ``y ~ scale (x - centre_x) Q + centre_y`` with orthonormal ``Q``.

    Attributes:
        rotation: ``[p, q]``, orthonormal columns or rows.
        scale: positive.
        centre_x, centre_y: ``[p]``, ``[q]``.
        residual: what is left of ``y``'s variance, as a share.
    """

    rotation: Float[Tensor, "p q"]
    scale: float
    centre_x: Float[Tensor, " p"]
    centre_y: Float[Tensor, " q"]
    residual: float

    def __call__(self, x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch q"]:
        x = x - self.centre_x.to(x)
        return self.scale * (x @ self.rotation.to(x)) + self.centre_y.to(x)


def procrustes(x: Tensor, y: Tensor, scaled: bool = True) -> Similarity:
    """The rotation (and scale) that brings one set of points nearest to another: orthogonal Procrustes.

    Args:
        x, y: the same ``n`` samples in both spaces, ``[n, p]`` and ``[n, q]``.
        scaled: False keeps lengths as they are.

    Raises:
        InvalidInput: other numbers of samples, or points that are all the same.
    """
    if len(x) != len(y) or len(x) < 2:
        raise InvalidInput(f"{len(x)} and {len(y)} samples: the same ones are expected, at least two")
    moments = PairMoments(within=False).update(x, y)
    assert moments.mean_y is not None
    vx, vy = moments.var_x.sum(), moments.var_y.sum()
    if vx == 0 or vy == 0:
        raise InvalidInput("the points of one side are all the same: there is nothing to rotate")
    u, s, vt = torch.linalg.svd(moments.cov_xy, full_matrices=False)
    scale = float(s.sum() / vx) if scaled else 1.0
    residual = float((vy - 2 * scale * s.sum() + scale**2 * vx) / vy)
    return Similarity(u @ vt, scale, moments.mean_x, moments.mean_y, residual)
