"""One step of sparse semi-NMF, ``A ~ F G^T`` with ``G >= 0``: the four updates, each on statistics of the data only.

Features are ``F [d, K]`` here and coefficients ``[K, n]`` (the transpose of the paper's ``G``): a feature's
coefficients then lie side by side, and so do a neuron's activations, which a feature of few neurons is multiplied with.

Reference: Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations" (2010), equations 10 and 11; the
winner-take-all step is that of Shafran et al. (arXiv:2506.10920).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from broadsheet.errors import InvalidInput

SPARSE = 0.2  # below this share of nonzeros, gathered neurons are quicker than a dense product


def entries_kept(d: int, sparsity: float) -> int:
    """How many of ``d`` neurons a feature keeps, ``ceil(sparsity * d)``; at least 1.

    Args:
        d: neurons.
        sparsity: share of neurons, in (0, 1].
    """
    # A product such as 0.07 * 100 lies a rounding error above 7: that is not an eighth neuron.
    return min(d, max(1, math.ceil(sparsity * d - 1e-9 * d)))


def solve_features(cross: Float[Tensor, "d K"], gram: Float[Tensor, "K K"], reg: float = 1e-6) -> Float[Tensor, "d K"]:
    """``F = A G (G^T G + reg I)^-1``, least squares for fixed coefficients (step 1).

    Args:
        cross: ``A G``.
        gram: ``G^T G``.
        reg: added to the diagonal.

    Returns:
        in the type of ``cross``; solved in float64 (a Cholesky factor), for columns of ``G`` may be nearly parallel.
    """
    exact = torch.float32 if gram.device.type == "mps" else torch.float64
    gram, right = gram.to(exact), cross.to(exact)
    eye = torch.eye(len(gram), dtype=exact, device=gram.device)
    jitter = reg
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(gram + jitter * eye)
        if not bool(failed):
            return (right @ torch.cholesky_inverse(factor)).to(cross.dtype)  # K is small, d is not
        jitter = max(10 * jitter, 1e-10 * float(gram.diagonal().max()))
    return torch.linalg.lstsq(gram, right.T).solution.T.to(cross.dtype)  # not reached unless gram is broken


def keep_largest(features: Float[Tensor, "d K"], count: int) -> Float[Tensor, "d K"]:
    """Winner-take-all: each feature keeps its ``count`` largest entries by size, ties or not (step 2).

    Args:
        features: one in each column.
        count: entries to keep, at least 1.
    """
    if count >= len(features):
        return features
    index = features.abs().topk(count, dim=0).indices
    return torch.zeros_like(features).scatter_(0, index, features.gather(0, index))


def multiplicative_update(
    codes: Float[Tensor, "K n"], towards: Float[Tensor, "K n"], gram: Float[Tensor, "K K"]
) -> Float[Tensor, "K n"]:
    """Ding's update of the coefficients: factors that never change a sign (step 4).

    Args:
        codes: coefficients, at least 0; what is 0 stays 0.
        towards: ``F^T A`` (the paper's P, transposed).
        gram: ``F^T F`` (Q).
    """
    rise = towards.clamp_min(0) + (-gram).clamp_min(0) @ codes
    fall = (-towards).clamp_min(0) + gram.clamp_min(0) @ codes
    # The official code divides by a fall that may be 0. This bound does not depend on the data's scale.
    least = (rise * torch.finfo(rise.dtype).eps).clamp_min_(torch.finfo(rise.dtype).tiny)
    return codes * rise.div_(torch.maximum(fall, least)).sqrt_()


def projected_update(
    codes: Float[Tensor, "K n"], towards: Float[Tensor, "K n"], gram: Float[Tensor, "K K"]
) -> Float[Tensor, "K n"]:
    """Exact least squares for one feature's coefficients after the other, cut at 0 (HALS); zeros can come back.

    Args:
        codes, towards, gram: as in :func:`multiplicative_update`.
    """
    codes = codes.clone()
    tiny = torch.finfo(codes.dtype).tiny
    for k in range(len(codes)):
        step = (towards[k] - gram[k] @ codes) / gram[k, k].clamp_min(tiny)
        codes[k] = (codes[k] + step).clamp_min_(0)
    return codes


UPDATES = {"multiplicative": multiplicative_update, "projected": projected_update}


def nonnegative_codes(
    towards: Float[Tensor, "K n"],
    gram: Float[Tensor, "K K"],
    start: Float[Tensor, "K n"] | None = None,
    sweeps: int = 500,
    tol: float = 1e-7,
) -> Float[Tensor, "K n"]:
    """Coefficients of new data for fixed features: non-negative least squares by coordinate descent.

    Args:
        towards, gram: as in :func:`multiplicative_update`.
        start: coefficients to begin with; None for zeros.
        sweeps: at most.
        tol: stop when no coefficient moves by more than this share of the largest one.
    """
    codes = torch.zeros_like(towards) if start is None else start
    for _ in range(sweeps):
        new = projected_update(codes, towards, gram)
        moved, size = float((new - codes).abs().max()), float(new.max())
        codes = new
        if moved <= tol * size:
            break
    return codes


class FeatureProduct:
    """``F^T A`` for blocks of ``A``; only the neurons that a feature has are read where they are few.

    Args:
        features: ``[d, K]``.
        count: nonzeros of a column at most; ``d`` where columns are dense.
    """

    def __init__(self, features: Float[Tensor, "d K"], count: int) -> None:
        self.features = features
        self.index = self.weight = None
        if count <= SPARSE * len(features):
            index = features.abs().topk(count, dim=0).indices
            self.index, self.weight = index.T.contiguous(), features.gather(0, index).T.contiguous()

    def __call__(self, block: Float[Tensor, "d n"]) -> Float[Tensor, "K n"]:
        if self.index is None:
            return self.features.T @ block
        return F.embedding_bag(self.index, block, per_sample_weights=self.weight, mode="sum")


def check_settings(n: int, d: int, n_components: int, sparsity: float) -> None:
    """Refuse what no factorisation can be made of.

    Args:
        n, d: tokens and neurons.
        n_components: features wanted.
        sparsity: share of neurons of a feature.

    Raises:
        InvalidInput: more features than tokens, a sparsity outside (0, 1], or fewer than one feature.
    """
    if not (isinstance(n_components, int) and n_components >= 1):
        raise InvalidInput(f"n_components={n_components!r}: expected an integer, at least 1")
    if not 0 < sparsity <= 1:
        raise InvalidInput(f"sparsity={sparsity}: expected a share of the {d} neurons, in (0, 1]")
    if n_components > n:
        raise InvalidInput(
            f"n_components={n_components} features from n_samples={n} rows: at least as many rows as features are "
            "needed (one row for each token; is the matrix transposed?)"
        )
