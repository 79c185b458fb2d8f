"""Vector quantisation: every vector is replaced by the best few rows of a learned codebook.

    x = LayerNorm(a),   S = the k codes most similar to x,   y = mean (or sum) of c_j over S

Gradients go straight through to the input; the codes get the true gradient of ``y`` and that of a reconstruction loss.
Several codebooks side by side (one for each attention head, one for each band) are searched in one batched product,
and similarities are taken block by block: a table of all tokens against all codes never exists.

    quantizer = Quantizer(dim=64, num_codes=1000, k=8)
    y = quantizer(a)                      # a [..., 64]; y.values [..., 64], y.codes [..., 8], y.loss
    heads = Quantizer(dim=16, num_codes=1000, groups=4)
    heads(z)                              # z [..., 4, 16]; codes [..., 4, 1]

References: van den Oord et al. (arXiv:1711.00937); Tamkin et al., codebook features (arXiv:2310.17230, section 2).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator as seeded_generator
from broadsheet.nn.validation import require_finite

SIMILARITIES = ("cosine", "euclidean")
REDUCTIONS = ("mean", "sum")
LOSSES = ("none", "reconstruction", "full", "vqvae")
BLOCK = 2**20  # similarities that exist at a time: 4 MiB in float32, which stays in a CPU's cache


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives.

    Attributes:
        values: like the input, made of codes.
        codes: ``[..., k]``, or ``[..., groups, k]``: ids, the most similar first.
        loss: to be added to the task's: mean over vectors, sum over codebooks.
    """

    values: Tensor
    codes: Tensor
    loss: Tensor


@dataclass(frozen=True)
class CodeUsage:
    """How evenly codes are used; one entry for each codebook.

    Attributes:
        counts: ``[groups, codes]``, how often each was chosen.
    """

    counts: Int[Tensor, "groups codes"]

    @property
    def active(self) -> Int[Tensor, " groups"]:
        """Codes that were chosen at least once."""
        return (self.counts > 0).sum(-1)

    @property
    def dead_fraction(self) -> Float[Tensor, " groups"]:
        """Share of codes that were never chosen."""
        return 1 - self.active / self.counts.shape[1]

    @property
    def entropy(self) -> Float[Tensor, " groups"]:
        """Of the choice of a code, nats; 0 when one code does everything."""
        p = self.counts.double() / self.counts.sum(-1, keepdim=True).clamp_min(1)
        return -torch.special.xlogy(p, p).sum(-1).float()

    @property
    def perplexity(self) -> Float[Tensor, " groups"]:
        """``exp(entropy)``: how many codes, used equally often, would be as even."""
        return self.entropy.exp()


class _StraightThrough(torch.autograd.Function):
    """The value of ``y``, the gradient to both ``y`` (true) and ``x`` (as if ``y`` were ``x``)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


def straight_through(y: Tensor, x: Tensor) -> Tensor:
    """``y`` going forward; going back, its gradient reaches ``y`` and, unchanged, ``x`` too.

    Args:
        y: what stands in for ``x``, of the same shape; detach it where only ``x`` should learn.
        x: the input.
    """
    return _StraightThrough.apply(y, x)  # type: ignore[return-value]


@torch.no_grad()
def nearest_codes(
    x: Float[Tensor, "groups tokens dim"],
    codebook: Float[Tensor, "groups codes dim"],
    k: int = 1,
    similarity: str = "cosine",
    blocked: Bool[Tensor, "groups codes"] | None = None,
    block: int = BLOCK,
) -> Int[Tensor, "groups tokens k"]:
    """The ids of the ``k`` most similar codes, the most similar first; of equal ones the lowest id first.

    Taken in float32 at least: in half precision near codes change places.

    Args:
        x: vectors of each codebook.
        codebook: rows.
        k: how many.
        similarity: ``"cosine"`` (``x . c / |c|``, in the order of cosines) or ``"euclidean"`` (minus the distance).
        blocked: codes that may not be chosen.
        block: similarities that may exist at a time.

    Raises:
        InvalidInput: an unknown similarity, or fewer codes than ``k``.
    """
    if similarity not in SIMILARITIES:
        raise InvalidInput(f"similarity={similarity!r}: expected one of {', '.join(SIMILARITIES)}")
    groups, tokens, _ = x.shape
    n = codebook.shape[1]
    live = n if blocked is None else int((~blocked).sum(1).min())
    if not 1 <= k <= live:
        left = "" if blocked is None else " that are not blocked"
        raise InvalidInput(f"k={k}: a codebook has {live} codes{left}; choose k from 1 to {live}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, codes = x.to(dtype), codebook.to(dtype)
        bias = None
        if similarity == "cosine":
            codes = codes / codes.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        else:  # |x|^2 is the same for all codes
            bias = -codes.square().sum(-1)[:, None] / 2
        out = torch.empty(groups, tokens, k, dtype=torch.long, device=x.device)
        width = min(n, max(k + 1, block // groups))
        rows = max(1, block // (groups * width))
        columns = codes.transpose(1, 2)
        for begin in range(0, tokens, rows):
            part = x[:, begin : begin + rows]
            best: tuple[Tensor, Tensor] | None = None
            for first in range(0, n, width):
                last = min(n, first + width)
                table = part @ columns[:, :, first:last]
                if bias is not None:
                    table += bias[:, :, first:last]
                if blocked is not None:
                    table.masked_fill_(blocked[:, None, first:last], -torch.inf)
                best = _merged(best, _top(table, min(k, last - first)), first, k)
            assert best is not None
            out[:, begin : begin + rows] = best[1]
    return out


def _top(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of the last axis, ties in the order of their places."""
    if k == 1:  # max gives the first of equals, topk any of them
        value, index = table.max(-1, keepdim=True)
        return value, index
    more = min(k + 1, table.shape[-1])
    value, index = table.topk(more)
    if more > k:
        tied = value[..., k - 1] == value[..., k]  # which of the equals came in is left to chance
        if bool(tied.any()):
            exact = table[tied].sort(dim=-1, descending=True, stable=True)
            value[tied], index[tied] = exact.values[..., :more], exact.indices[..., :more]
    value, index = value[..., :k], index[..., :k]
    order = index.argsort(-1)
    value, index = value.gather(-1, order), index.gather(-1, order)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    return value, index.gather(-1, order)


def _merged(
    best: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], first: int, k: int
) -> tuple[Tensor, Tensor]:
    """The best of earlier blocks and of a later one, whose ids are all higher."""
    value, index = new[0], new[1] + first
    if best is None:
        return value, index
    value, index = torch.cat([best[0], value], -1), torch.cat([best[1], index], -1)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    return value[..., :k], index.gather(-1, order)[..., :k]


class Quantizer(nn.Module, PyTorchModelHubMixin):
    """A codebook, or several side by side, with the normalisation before it.

    Args:
        dim: width of the vectors.
        num_codes: rows of each codebook.
        k: codes that stand in for a vector.
        groups: codebooks side by side, for inputs ``[..., groups, dim]``; None for one, for inputs ``[..., dim]``.
        similarity: ``"cosine"`` or ``"euclidean"``.
        reduce: ``"mean"`` of the codes (as published code does) or their ``"sum"`` (as the paper writes).
        normalise: a LayerNorm, trained with the rest, before the codebook.
        train_norm: False leaves it at its start.
        loss: ``"reconstruction"`` (codes go to their inputs, mean over vectors of the squared distance), ``"full"``
            (and inputs to their codes, times ``beta``), ``"vqvae"`` (the same, and no gradient of the task reaches the
            codes) or ``"none"``.
        beta: weight of the commitment, the part that moves the inputs.
        block: similarities that exist at a time.
        seed: of the codes, which are drawn from a standard normal distribution.

    Raises:
        InvalidInput: a number out of range, such as a ``k`` larger than the codebook.
    """

    def __init__(
        self,
        dim: int,
        num_codes: int,
        k: int = 1,
        *,
        groups: int | None = None,
        similarity: str = "cosine",
        reduce: str = "mean",
        normalise: bool = True,
        train_norm: bool = True,
        loss: str = "reconstruction",
        beta: float | int = 0.25,
        block: int = BLOCK,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "num_codes": num_codes, "groups": groups or 1, "block": block}.items():
            if value < 1:
                raise InvalidInput(f"{name}={value}: must be at least 1")
        if not 1 <= k <= num_codes:
            raise InvalidInput(f"k={k}: a codebook has {num_codes} codes; choose k from 1 to {num_codes}")
        for name, value, known in (
            ("similarity", similarity, SIMILARITIES), ("reduce", reduce, REDUCTIONS), ("loss", loss, LOSSES),
        ):  # fmt: skip
            if value not in known:
                raise InvalidInput(f"{name}={value!r}: expected one of {', '.join(known)}")
        if not (beta >= 0 and math.isfinite(beta)):
            raise InvalidInput(f"beta={beta}: expected a finite number, at least 0")
        self.config = {
            "dim": dim, "num_codes": num_codes, "k": k, "groups": groups, "similarity": similarity, "reduce": reduce,
            "normalise": normalise, "train_norm": train_norm, "loss": loss, "beta": float(beta), "block": block,
        }  # fmt: skip
        self.dim, self.num_codes, self.k, self.groups = dim, num_codes, k, groups
        self.similarity, self.reduce, self.loss, self.beta, self.block = similarity, reduce, loss, float(beta), block
        n = groups or 1
        self.codebook = nn.Parameter(torch.randn(n, num_codes, dim, generator=seeded_generator(seed)))
        self.gain = nn.Parameter(torch.ones(n, dim), requires_grad=train_norm) if normalise else None
        self.shift = nn.Parameter(torch.zeros(n, dim), requires_grad=train_norm) if normalise else None
        self.idle: Tensor  # steps since each code was last chosen; counted by `observe`
        self.register_buffer("idle", torch.zeros(n, num_codes, dtype=torch.int32))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items() if name != "block")

    def normalised(self, a: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """What is compared with the codes."""
        self._check(a)
        if self.gain is None or self.shift is None:
            return a
        gain, shift = (p if self.groups is not None else p[0] for p in (self.gain, self.shift))
        return F.layer_norm(a.to(gain.dtype), (self.dim,)) * gain + shift

    def assign(self, x: Float[Tensor, "*batch dim"], blocked: Tensor | None = None) -> Int[Tensor, "*batch k"]:
        """Codes of vectors that are normalised already.

        Args:
            x: of :meth:`normalised`.
            blocked: ``[groups, codes]`` or ``[codes]``: codes that may not be chosen.
        """
        self._check(x)
        mask = None if blocked is None else blocked.to(x.device).expand(len(self.codebook), -1)
        ids = nearest_codes(self._by_group(x.detach()), self.codebook, self.k, self.similarity, mask, self.block)
        return ids.transpose(0, 1).reshape(*x.shape[:-1], self.k)

    def decode(
        self, codes: Int[Tensor, "*batch slots"], weights: Float[Tensor, "*batch slots"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """The vectors that codes stand for; differentiable in the codebook.

        Args:
            codes: any number of ids for each vector, ``[..., slots]`` or ``[..., groups, slots]``.
            weights: of each in the sum; None for mean or sum, whichever the quantizer takes.
        """
        bad = (codes < 0) | (codes >= self.num_codes)
        if bool(bad.any()):
            raise InvalidInput(
                f"code {int(codes[bad][0])}: the codebook has {self.num_codes} (0 to {self.num_codes - 1})"
            )
        return self._decoded(codes, weights)

    def _decoded(self, codes: Tensor, weights: Tensor | None = None) -> Tensor:
        ids = codes.long()
        if self.groups is not None:
            ids = ids + self.num_codes * torch.arange(self.groups, device=ids.device)[:, None]
        rows, flat = self.codebook.flatten(0, 1), ids.reshape(-1, ids.shape[-1])
        if weights is None and flat.shape[1] == 1:
            y = F.embedding(flat[:, 0], rows)
        elif weights is None:
            y = F.embedding_bag(flat, rows, mode=self.reduce)
        else:
            y = F.embedding_bag(flat, rows, mode="sum", per_sample_weights=weights.to(rows).reshape(flat.shape))
        return y.view(*codes.shape[:-1], self.dim)

    def forward(
        self, a: Float[Tensor, "*batch dim"], blocked: Tensor | None = None, mask: Tensor | None = None
    ) -> Quantized:
        """Quantise vectors.

        Args:
            a: ``[..., dim]``, or ``[..., groups, dim]``.
            blocked: as in :meth:`assign`.
            mask: of the leading axes, 1 where a vector counts for the loss; None for all.
        """
        x = self.normalised(a)
        codes = self.assign(x, blocked)
        y = self._decoded(codes)
        values = straight_through(y.detach() if self.loss == "vqvae" else y, x)
        return Quantized(values.to(a.dtype), codes, self.loss_of(x, y, mask))

    def loss_of(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss that belongs to normalised vectors and what stands in for them; arguments as in :meth:`forward`."""
        if self.loss == "none":
            return y.new_zeros(())
        loss = self._mean((y - x.detach()).square(), mask)
        if self.loss == "reconstruction" or self.beta == 0:
            return loss
        return loss + self.beta * self._mean((y.detach() - x).square(), mask)

    def count(self, codes: Int[Tensor, "*batch k"], mask: Tensor | None = None) -> Int[Tensor, "groups codes"]:
        """How often each code stands among ``codes``; entries below 0 do not count.

        Args:
            codes: of :meth:`forward`.
            mask: of the leading axes, 1 where a vector counts.
        """
        n = len(self.codebook)
        codes = codes.reshape(-1, n, codes.shape[-1]).long()
        if mask is not None:
            codes = codes[mask.reshape(-1).bool()]
        flat = (codes + self.num_codes * torch.arange(n, device=codes.device)[:, None])[codes >= 0]
        return flat.bincount(minlength=n * self.num_codes).view(n, self.num_codes)

    @torch.no_grad()
    def observe(self, codes: Int[Tensor, "*batch k"]) -> None:
        """Note that a training step chose these codes: ``idle`` counts the steps since each was chosen."""
        used = self.count(codes) > 0
        self.idle.add_(1).masked_fill_(used, 0)

    @torch.no_grad()
    def replace(
        self,
        dead: Bool[Tensor, "groups codes"],
        a: Float[Tensor, "*batch dim"],
        noise: float = 0.01,
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> int:
        """Put inputs, drawn at random, in the place of codes.

        Args:
            dead: which, such as ``quantizer.idle > 1000``.
            a: inputs, as in :meth:`forward`.
            noise: added to each, normal, as a share of its length.
            generator: of the draw, on the CPU.
            optimizer: Adam, whose moments of these codes are set to zero.

        Returns:
            how many were replaced.
        """
        x = self._by_group(self.normalised(a)).to(self.codebook.dtype)
        for group in range(len(x)):
            n = int(dead[group].sum())
            if n == 0:
                continue
            chosen = torch.randint(x.shape[1], (n,), generator=generator).to(x.device)
            rows = x[group, chosen]
            extra = torch.randn(rows.shape, generator=generator).to(rows) * rows.norm(dim=1, keepdim=True)
            self.codebook[group, dead[group]] = rows + noise * extra / math.sqrt(self.dim)
        state = {} if optimizer is None else optimizer.state.get(self.codebook, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][dead] = 0
        self.idle[dead] = 0
        return int(dead.sum())

    @torch.no_grad()
    def init_kmeans(self, a: Float[Tensor, "*batch dim"], seed: int = 0) -> None:
        """Set the codes to the centres that k-means finds among inputs (mini-batches, scikit-learn's).

        Where there are fewer different inputs than codes, the rest become inputs too, moved a little.

        Args:
            a: inputs, as in :meth:`forward`.
            seed: of the start.
        """
        from sklearn.cluster import MiniBatchKMeans

        x = self._by_group(self.normalised(a)).float().cpu()
        require_finite("the inputs of k-means", x)
        random = seeded_generator(seed)
        for group, rows in enumerate(x):
            different = rows.unique(dim=0)
            n = min(self.num_codes, len(different))
            if n < self.num_codes:
                drawn = different[torch.randint(n, (self.num_codes - n,), generator=random)]
                centres = torch.cat([different, drawn + 0.01 * torch.randn(drawn.shape, generator=random)])
            else:
                found = MiniBatchKMeans(n, batch_size=1024, n_init="auto", random_state=seed).fit(rows.numpy())
                centres = torch.from_numpy(found.cluster_centers_)
            self.codebook[group] = centres.to(self.codebook)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Weights (safetensors) and what rebuilds the quantizer (config.json)."""
        return super().save_pretrained(save_directory, config=self.config, **kwargs)

    def _by_group(self, x: Tensor) -> Tensor:
        """``[..., dim]`` or ``[..., groups, dim]`` as ``[groups, tokens, dim]``."""
        return x.reshape(-1, len(self.codebook), self.dim).transpose(0, 1)

    def _mean(self, square: Tensor, mask: Tensor | None) -> Tensor:
        each = square.sum(-1) if self.groups is None else square.sum((-1, -2))
        if mask is None:
            return each.mean()
        mask = mask.to(each)
        return (each * mask).sum() / mask.sum().clamp_min(1)

    def _check(self, x: Tensor) -> None:
        wanted = (self.dim,) if self.groups is None else (self.groups, self.dim)
        if x.shape[-len(wanted) :] != wanted:
            shown = ", ".join(map(str, wanted))
            raise InvalidInput(f"the input has shape {tuple(x.shape)}, this quantizer takes [..., {shown}]")


def similar_rows(codebook: Float[Tensor, "codes dim"], code: int, n: int = 10) -> tuple[Tensor, Tensor]:
    """The codes nearest to one of them by cosine, itself left out.

    Args:
        codebook: rows.
        code: which.
        n: how many.

    Returns:
        ids and cosines, each ``[n]``.
    """
    if not 0 <= code < len(codebook):
        raise InvalidInput(f"code {code}: the codebook has {len(codebook)} (0 to {len(codebook) - 1})")
    if not 1 <= n < len(codebook):
        raise InvalidInput(f"n={n}: the codebook has {len(codebook) - 1} other codes")
    codebook = codebook.detach()
    unit = codebook / codebook.norm(dim=1, keepdim=True).clamp_min(torch.finfo(codebook.dtype).tiny)
    cosine = unit @ unit[code]
    cosine[code] = -torch.inf
    value, index = cosine.topk(n)
    return index, value
