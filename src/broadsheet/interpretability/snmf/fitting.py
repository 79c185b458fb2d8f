"""The iteration of sparse semi-NMF: one pass over the data for each, in blocks; nothing of the data's size is formed.

An iteration needs of the data only ``A G`` and ``G^T G`` (for the features) and ``A^T F`` (for the coefficients). The
coefficients of a block of tokens depend on that block alone, so the pass that updates them also gathers the next
iteration's ``A G`` and ``G^T G``, and from these the loss: ``|A|^2 - 2 tr(F^T A G) + tr(F^T F G^T G)``.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.snmf.source import Source
from broadsheet.interpretability.snmf.updates import (
    UPDATES,
    FeatureProduct,
    entries_kept,
    keep_largest,
    solve_features,
)
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.progress import SILENT, Progress

RESEED_EVERY = 10  # iterations between looks for worst tokens, which cost a pass


@dataclass(frozen=True)
class Factorisation:
    """The best pair that the iteration saw.

    Attributes:
        features: ``[K, d]``, signed.
        coefficients: ``[n, K]``, at least 0.
        losses: ``|A - F G^T|^2`` after every iteration.
        best: which of them the pair belongs to.
        total: ``|A|^2``.
        reseeded: how often a feature that had become zero was begun anew.
    """

    features: Float[Tensor, "K d"]
    coefficients: Float[Tensor, "n K"]
    losses: tuple[float, ...]
    best: int
    total: float
    reseeded: int


@torch.no_grad()
def factorise(
    source: Source,
    codes: Float[Tensor, "K n"],
    *,
    sparsity: float = 0.01,
    solver: str = "multiplicative",
    max_iter: int = 2000,
    tol: float = 1e-4,
    patience: int = 500,
    reg: float = 1e-6,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: Progress = SILENT,
) -> Factorisation:
    """Iterate from given coefficients.

    Args:
        source: the data, scanned.
        codes: coefficients to begin with, at least 0.
        sparsity: share of neurons that a feature keeps.
        solver: ``"multiplicative"`` or ``"projected"``.
        max_iter: iterations at most.
        tol: an improvement by less than this share of ``|A|^2`` over the last one that counted does not count.
        patience: stop after this many iterations in a row that do not count.
        reg: of the least squares.
        checkpoint: folder; saved now and then and when interrupted, and taken up again if it is there.
        checkpoint_every: iterations.
        progress: where iterations are shown.

    Raises:
        InvalidInput: a number out of range.
        CheckpointError: the checkpoint belongs to other data or settings.
    """
    if solver not in UPDATES:
        raise InvalidInput(f"solver={solver!r}: expected one of {', '.join(UPDATES)}")
    for name, value in {"max_iter": max_iter, "patience": patience, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise InvalidInput(f"{name}={value}: must be at least 1")
    for name, value in {"tol": tol, "reg": reg}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise InvalidInput(f"{name}={value}: expected a finite number, at least 0")
    total, count = source.scan(), entries_kept(source.d, sparsity)
    update, k = UPDATES[solver], len(codes)
    about = {"n": source.n, "d": source.d, "k": k, "count": count, "solver": solver, "reg": reg, "total": total}
    losses: list[float] = []
    best, mark, waited, reseeded = (0, codes.new_zeros(source.d, k), codes), math.inf, 0, 0
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and folder.exists():
        saved, other = load_tree(folder)
        if other != about:
            raise CheckpointError(f"{folder}: the checkpoint belongs to other data or settings; delete it")
        codes = saved["codes"].to(codes)
        best = (saved["best"], saved["features"].to(codes), saved["best_codes"].to(codes))
        losses, mark, waited, reseeded = saved["losses"], saved["mark"], saved["waited"], saved["reseeded"]

    def save() -> None:
        if folder is not None:
            at, f, g = best
            state = {"codes": codes, "best": at, "features": f, "best_codes": g, "losses": losses, "mark": mark}
            save_tree(folder, state | {"waited": waited, "reseeded": reseeded}, **about)

    cross, gram = _statistics(source, codes)
    with progress.task("semi-NMF", total=max_iter) as task:
        task.advance(len(losses))
        try:
            while len(losses) < max_iter and waited < patience:
                features = keep_largest(solve_features(cross, gram, reg), count)  # steps 1 and 2
                size = gram.diagonal().sqrt().clamp_min(1e-8).to(codes)
                features = features * size  # step 3: coefficients of length 1, the product unchanged
                lost = features.norm(dim=0) == 0
                if bool(lost.any()) and len(losses) % RESEED_EVERY == 0:
                    codes, found = _reseed(source, features, codes, size, lost, count)
                    reseeded += found
                product, inner = FeatureProduct(features, count), features.T @ features
                fresh = torch.empty_like(codes)  # an interruption inside the pass leaves the last iteration whole
                cross, gram = torch.zeros_like(cross), torch.zeros_like(gram)
                for where, block in source:
                    part = update(codes[:, where] / size[:, None], product(block), inner)  # step 4
                    fresh[:, where] = part
                    cross += block @ part.T
                    gram += part @ part.T
                codes = fresh
                loss = total - 2 * _dot(features, cross) + _dot(inner, gram)
                if loss < 1e3 * torch.finfo(codes.dtype).eps * total:  # the difference of nearly equal numbers
                    loss = residual(source, features, codes)
                losses.append(loss)
                if loss < losses[best[0]] or len(losses) == 1:
                    best = (len(losses) - 1, features, codes)
                waited = 0 if loss < mark - tol * total else waited + 1
                mark = loss if waited == 0 else mark
                task.advance(1, loss=loss / total)
                if len(losses) % checkpoint_every == 0:
                    save()
        except KeyboardInterrupt:
            save()
            raise
    save()
    at, features, codes = best
    return Factorisation(features.T.contiguous(), codes.T.contiguous(), tuple(losses), at, total, reseeded)


def _statistics(source: Source, codes: Tensor) -> tuple[Tensor, Tensor]:
    """``A G`` ``[d, K]`` and ``G^T G`` ``[K, K]``."""
    cross = torch.zeros(source.d, len(codes), device=source.device, dtype=source.dtype)
    for where, block in source:
        cross += block @ codes[:, where].T
    return cross, codes @ codes.T


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum()) if a.device.type != "mps" else float((a * b).sum())


def residual(source: Source, features: Float[Tensor, "d K"], codes: Float[Tensor, "K n"]) -> float:
    """``|A - F G^T|^2``, summed block by block.

    Args:
        source: the data.
        features, codes: the factors.
    """
    return sum(float((block - features @ codes[:, where]).square().sum()) for where, block in source.pieces())


def _reseed(
    source: Source, features: Tensor, codes: Tensor, size: Tensor, lost: Tensor, count: int
) -> tuple[Tensor, int]:
    """Begin features that are zero anew at the tokens that are explained worst.

    Changes ``features``; gives new coefficients, for the old ones may be the best so far, and how many were begun.
    """
    off = [(block - features @ (codes[:, where] / size[:, None])).square().sum(0) for where, block in source.pieces()]
    places = lost.nonzero().flatten()
    worst = torch.cat(off).topk(min(len(places), source.n))
    fresh, done = codes.clone(), 0
    for k, token, value in zip(places.tolist(), worst.indices.tolist(), worst.values.tolist(), strict=False):
        if value > 0:
            rest = source.row(token) - features @ (codes[:, token] / size)
            features[:, k] = keep_largest(rest[:, None], count)[:, 0]
            fresh[k] = size[k] / math.sqrt(source.n)
            done += 1
    return fresh, done
