"""Where the coefficients start: at random, from singular vectors, from clusters, or where the user says."""

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.snmf.source import Source

INITS = ("random", "svd", "kmeans")
FLOOR = 1e-6  # what is 0 stays 0 under the multiplicative update
SAMPLE = 4096  # tokens that first centres of clusters are drawn from
EXACT = 1024  # the smaller side of a matrix whose singular vectors are computed exactly


def initial_coefficients(
    source: Source, n_components: int, init: object, generator: torch.Generator
) -> Float[Tensor, "K n"]:
    """Coefficients to begin with, all above 0 and each feature's of length 1, or the user's own as they are.

    The length is free, for the features that go with them are solved for; only ``reg`` sees it.

    Args:
        source: the data.
        n_components: features.
        init: ``"random"`` (uniform), ``"svd"`` (the positive parts of the leading singular vectors), ``"kmeans"`` (1
            for the tokens of a cluster), or an array ``[n, K]``.
        generator: on the CPU, whatever the data's device: a seed means the same everywhere.

    Raises:
        InvalidInput: an unknown name, an array of another shape or with negative entries, or more features than
            singular vectors.
    """
    n, k = source.n, n_components
    if isinstance(init, str):
        if init not in INITS:
            raise InvalidInput(f"init={init!r}: expected one of {', '.join(INITS)}, or an array [{n}, {k}]")
        if init == "random":
            codes = torch.rand(n, k, generator=generator, dtype=torch.float64).T.to(source.device, source.dtype)
        elif init == "svd":
            values, vectors = leading_singular(source, k, generator)
            positive = vectors.clamp_min(0).square().sum(1) >= 0.5  # a singular vector's sign means nothing
            codes = values.sqrt()[:, None] * torch.where(positive[:, None], vectors, -vectors)
        else:
            labels = cluster(source, k, generator)
            codes = torch.zeros(k, n, device=source.device, dtype=source.dtype)
            codes[labels, torch.arange(n, device=labels.device)] = 1
    else:
        codes = torch.as_tensor(init).T.to(source.device, source.dtype)
        if codes.shape != (k, n):
            raise InvalidInput(f"init has shape {tuple(codes.T.shape)}: expected coefficients [{n}, {k}]")
        if not bool((codes >= 0).all()):
            raise InvalidInput("init holds negative or missing coefficients: all must be at least 0")
        return codes.contiguous()
    codes = codes.contiguous()
    floor = FLOOR * codes.amax(1, keepdim=True).clamp_min(torch.finfo(codes.dtype).tiny)
    codes = torch.maximum(codes, floor)
    return codes / codes.norm(dim=1, keepdim=True)


def leading_singular(source: Source, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The ``k`` largest singular values ``[k]`` of ``A [d, n]`` and their right vectors ``[k, n]``.

    Exact where one side is small, else by subspace iteration (Halko et al. 2011), which reads the data block by block.

    Args:
        source, generator: as in :func:`initial_coefficients`.
        k: how many.
    """
    n, d = source.n, source.d
    if k > min(n, d):
        raise InvalidInput(
            f"n_components={k} with init='svd': the matrix [{n}, {d}] has {min(n, d)} singular vectors; take fewer "
            "features or init='kmeans'"
        )
    blocks = list(source) if min(n, d) <= EXACT and source.batch >= n else []
    if len(blocks) == 1:
        _, values, vectors = torch.linalg.svd(blocks[0][1], full_matrices=False)
        return values[:k], vectors[:k]
    size = min(k + 10, n, d)
    right = torch.randn(n, size, generator=generator, dtype=torch.float64).to(source.device, source.dtype)
    left = right[:0]
    for _ in range(6):
        left = torch.zeros(d, size, device=source.device, dtype=source.dtype)
        for where, block in source:
            left += block @ right[where]
        left = torch.linalg.qr(left)[0]
        right = torch.cat([block.T @ left for _, block in source])
        right = torch.linalg.qr(right)[0]
    small = torch.zeros(d, size, device=source.device, dtype=source.dtype)
    for where, block in source:
        small += block @ right[where]
    _, values, turned = torch.linalg.svd(small, full_matrices=False)
    return values[:k], (right @ turned[:k].T).T


def cluster(source: Source, k: int, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """The cluster of every token, ``[n]``: Lloyd's rounds; a cluster that becomes empty starts anew at a random token.

    The official code starts from tokens drawn evenly, of which several may stand in one cluster and none in another:
    winner-take-all then never finds the missing one. Ours draws each next centre far from the others (k-means++).

    Args:
        source, generator: as in :func:`initial_coefficients`.
        k: clusters.
        rounds: of assignment and averaging.
    """
    centres = _spread(source, k, generator)
    labels = torch.zeros(source.n, dtype=torch.long, device=source.device)
    for _ in range(rounds):
        sums, counts = torch.zeros_like(centres), torch.zeros(k, device=source.device, dtype=source.dtype)
        size = centres.square().sum(1, keepdim=True)
        for where, block in source:
            labels[where] = (size - 2 * centres @ block).argmin(0)
            sums.index_add_(0, labels[where], block.T)
            counts += torch.bincount(labels[where], minlength=k)
        centres = sums / counts.clamp_min(1)[:, None]
        for empty in (counts == 0).nonzero().flatten().tolist():
            centres[empty] = source.row(int(torch.randint(source.n, (1,), generator=generator)))
    return labels


def _spread(source: Source, k: int, generator: torch.Generator) -> Tensor:
    """``k`` tokens ``[k, d]`` out of a sample, each drawn with the squared distance to the nearest one before it."""
    size = min(source.n, max(SAMPLE, 8 * k))
    chosen = torch.randperm(source.n, generator=generator)[:size].sort().values.to(source.device)
    rows = torch.cat([block[:, _within(chosen, where)].T for where, block in source])
    first = int(torch.randint(size, (1,), generator=generator))
    picked, nearest = [first], (rows - rows[first]).square().sum(1)
    while len(picked) < k:
        weights = nearest.double().cpu().clamp_min(0)
        left = float(weights.sum()) > 0  # fewer different tokens than clusters: any will do
        draw = int(torch.multinomial(weights if left else torch.ones_like(weights), 1, generator=generator))
        picked.append(draw)
        nearest = torch.minimum(nearest, (rows - rows[draw]).square().sum(1))
    return rows[picked]


def _within(chosen: Tensor, where: slice) -> Tensor:
    """Those of the tokens that stand in a block, counted from its beginning."""
    return chosen[(chosen >= where.start) & (chosen < where.stop)] - where.start
