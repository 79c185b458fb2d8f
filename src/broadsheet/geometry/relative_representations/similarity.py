"""Samples described by their likeness to anchors: ``r_x = (sim(x, a_1), ..., sim(x, a_k))`` (section 3).

================ ============================================= ================================================
``similarity``   of a sample x and an anchor a                 what leaves it as it was
================ ============================================= ================================================
``cosine``       ``x.a / |x||a|``                              rotation, a positive factor for every single row
``angular``      ``1 - 2 angle / pi``                          the same
``inner``        ``x.a / sqrt(d)``                             rotation
``euclidean``    ``-|x - a|``                                  rotation, shift
``l1``           ``-|x - a|_1``                                shift, and swapped or mirrored axes
``basis_change`` least-squares coordinates of x in the anchors rotation; any invertible map once they span the space
================ ============================================= ================================================

A :class:`Frame` taken off first adds shifts to that list, a whitened one any invertible affine map.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.validation import require_finite

SIMILARITIES = ("cosine", "angular", "inner", "euclidean", "l1", "basis_change")
FRAMES = ("centred", "whitened")
COLLAPSED = 0.99


class AnchorWarning(UserWarning):
    """Anchors or latents that make relative representations say little: the message says why and what helps."""


@dataclass(frozen=True)
class Frame:
    """An origin, and directions brought to variance 1, taken off before similarities.

    Attributes:
        mean: ``[d]``.
        map: ``[d, rank]``; None leaves the axes alone.
    """

    mean: Float[Tensor, " d"]
    map: Float[Tensor, "d rank"] | None = None

    @classmethod
    def fit(cls, latents: Float[Tensor, "n d"], whiten: bool = False, ridge: float = 0.0) -> "Frame":
        """The frame of a cloud of latents, such as the anchors or the training set.

        Args:
            latents: ``[n, d]``.
            whiten: also bring every direction in which they vary to variance 1, so that the anisotropy typical of
                transformers no longer decides; with cosine this is the whitened inner product of the follow-ups.
            ridge: added to the variances, as a share of their mean: a small one keeps directions of noise small.

        Raises:
            InvalidInput: no latents, or (whitened) latents that are all the same.
        """
        if len(latents) == 0:
            raise InvalidInput("a frame needs latents to be fitted to, got none")
        mean = latents.mean(0)
        if not whiten:
            return cls(mean)
        rest = (latents - mean).double()
        values, vectors = torch.linalg.eigh(rest.T @ rest / len(rest))
        tolerance = len(values) * torch.finfo(latents.dtype).eps
        keep = values > values[-1] * tolerance
        if not bool(values[-1] > 0):
            raise InvalidInput("the latents are all the same: there is nothing to whiten")
        scale = (values[keep] + ridge * values.mean()).rsqrt()
        return cls(mean, (vectors[:, keep] * scale).to(latents.dtype))

    def __call__(self, latents: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        rest = latents - self.mean.to(latents)
        return rest if self.map is None else rest @ self.map.to(latents)


def relative_projection(
    latents: Float[Tensor, "n d"],
    anchor_latents: Float[Tensor, "k e"],
    similarity: str = "cosine",
    *,
    frame: str | Frame | None = None,
    check: bool = True,
) -> Float[Tensor, "n k"]:
    """Each sample as its similarities to the anchors (equation 1); differentiable in both.

    Args:
        latents: ``[n, d]`` floating, absolute.
        anchor_latents: ``[k, d]``, the anchors by the same encoder.
        similarity: one of :data:`SIMILARITIES`; distances come with a minus, so that larger is always nearer.
        frame: None as the paper; ``"centred"`` takes the anchors' mean off both, ``"whitened"`` also makes their
            covariance the identity; or a :class:`Frame` fitted to something else, such as the training set.
        check: look for NaN, latents of length zero and collapsed anchors; False spares an accelerator the wait.

    Returns:
        ``[n, k]`` of the latents' dtype.

    Raises:
        InvalidInput: other widths, no anchors, NaN, an unknown similarity or frame.

    Warns:
        AnchorWarning: a latent of length zero, whose cosine is taken as 0; anchors that nearly all point the same way.

    Example:
        >>> relative_projection(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.]])
    """
    x, a = latents, anchor_latents
    if similarity not in SIMILARITIES:
        raise InvalidInput(f"similarity={similarity!r}: expected one of {', '.join(SIMILARITIES)}")
    if len(a) == 0:
        raise InvalidInput("k=0 anchors: at least one is needed")
    if x.shape[1] != a.shape[1]:
        raise InvalidInput(
            f"latents have {x.shape[1]} features, anchors {a.shape[1]}: both must come from the same encoder"
        )
    if check:
        for name, rows in (("latents", x), ("anchor_latents", a)):
            if not _plain(rows):
                require_finite(name, rows)  # says where
    chosen = as_frame(frame, a)
    if chosen is not None:
        x, a = chosen(x), chosen(a)
    if similarity not in ("cosine", "angular"):
        return _SIMILARITY[similarity](x, a)
    plain = check and _plain(x)
    if check:
        _check_directions(a if plain else x, a)
    cosine = _cosine(x, a, plain)
    return cosine if similarity == "cosine" else _angle(cosine)


def as_frame(frame: str | Frame | None, anchor_latents: Float[Tensor, "k d"]) -> Frame | None:
    """The frame that a name stands for, fitted to the anchors; gradients flow through its mean."""
    if frame is None or isinstance(frame, Frame):
        return frame
    if frame not in FRAMES:
        raise InvalidInput(f"frame={frame!r}: expected {', '.join(FRAMES)}, a Frame or None")
    return Frame.fit(anchor_latents, whiten=frame == "whitened")


def mean_pairwise_cosine(latents: Float[Tensor, "k d"]) -> float:
    """Mean cosine of two different rows, from the length of their sum: k d operations instead of k^2 d."""
    if len(latents) < 2:
        return 0.0
    rows = unit(latents.detach()).double()
    lengths = rows.square().sum()  # rows without length count as none
    k = len(rows)
    return float((rows.sum(0).square().sum() - lengths) / (k * (k - 1)))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a row without length stays zero, and its gradient is zero too."""
    # Squares of very small or very large entries leave the range of floats, so the largest entry is divided out first.
    # The result does not depend on it, hence no gradient through it. What has length has at least length 1 then.
    peak = _peak(x)
    x = x / peak.masked_fill(peak == 0, math.inf)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(0.5)


def _peak(x: Tensor) -> Tensor:
    """The largest entry of every row; NaN and infinity stay."""
    return x.detach().abs().amax(-1, keepdim=True)


def _plain(x: Tensor) -> bool:
    """Whether all rows have lengths whose squares are floats: finite, not zero, and far from the ends of the range."""
    ends = torch.finfo(x.dtype)
    length = torch.linalg.vector_norm(x.detach(), dim=-1)
    return bool(((length > 1e3 * ends.tiny**0.5) & (length < 1e-3 * ends.max**0.5)).all())


def _check_directions(x: Tensor, a: Tensor) -> None:
    for name, rows in (("latents", x), ("anchors", a)):
        empty = (_peak(rows)[:, 0] == 0).nonzero()
        if len(empty):
            warnings.warn(
                f"{len(empty)} of the {name} have length zero, first in row {int(empty[0])}: their cosine is undefined "
                "and taken as 0",
                AnchorWarning,
                stacklevel=3,
            )
    alike = mean_pairwise_cosine(a)
    if alike > COLLAPSED:
        warnings.warn(
            f"the anchors' mean pairwise cosine is {alike:.4f}: all samples look alike to them. Centre first with "
            "frame='centred', or whiten with frame='whitened'",
            AnchorWarning,
            stacklevel=3,
        )


def _cosine(x: Tensor, a: Tensor, plain: bool = False) -> Tensor:
    # Rounding may leave an entry a few units in the last place beyond 1.
    if not plain:
        return _clamped(unit(x) @ unit(a).T)
    products, length = x @ unit(a).T, torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Dividing what comes out is cheaper than dividing what goes in, by one pass over the latents and one copy of them.
    return _clamped(products / length if products.requires_grad else products.div_(length))


def _clamped(cosine: Tensor) -> Tensor:
    # clamp() would stop the gradient of an entry that rounding put outside; the correction is a constant instead.
    if not cosine.requires_grad:
        return cosine.clamp_(-1, 1)
    plain = cosine.detach()
    return cosine + (plain.clamp(-1, 1) - plain)


def _angle(cosine: Tensor) -> Tensor:
    inside = cosine.abs() < 1  # the slope of arccos is infinite at the ends: no gradient there instead of NaN
    angle = torch.where(inside, torch.arccos(torch.where(inside, cosine, 0)), torch.arccos(cosine.detach()))
    return 1 - 2 / math.pi * angle


def _inner(x: Tensor, a: Tensor) -> Tensor:
    return x @ a.T / math.sqrt(x.shape[1])


def _euclidean(x: Tensor, a: Tensor) -> Tensor:
    # Not through products: they lose half the digits of a distance near zero, and anchors are samples too.
    return -torch.cdist(x, a, compute_mode="donot_use_mm_for_euclid_dist")


def _l1(x: Tensor, a: Tensor) -> Tensor:
    return -torch.cdist(x, a, p=1)


def _basis_change(x: Tensor, a: Tensor) -> Tensor:
    # a^T c = x: the shortest of the best solutions, also where anchors are dependent
    return x @ torch.linalg.pinv(a)


_SIMILARITY = {"inner": _inner, "euclidean": _euclidean, "l1": _l1, "basis_change": _basis_change}
