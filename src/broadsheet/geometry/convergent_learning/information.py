"""Mutual information of units: a check on correlation that sees relations of any shape.

Each unit's values are put into bins with equally many of them; a unit that is often exactly zero, as behind a ReLU, has
a bin for zero. The plug-in estimate is too large by about ``(rows - 1)(columns - 1) / (2 N)`` nats where the units are
independent, with the numbers of bins that hold anything. The published helper takes ``rows columns / (2 N ln 2)`` away
from nats: a formula for bits, and too many cells.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.batches import unit_samples
from broadsheet.nn.moments import DEAD
from broadsheet.nn.validation import require_finite

BIASES = ("cells", "official", "none")
ENTRIES = 2**22  # of the largest table made at a time


def unit_mutual_information(
    a: Tensor, b: Tensor, bins: int = 10, bias: str = "cells", candidates: Int[Tensor, "p m"] | None = None
) -> Float[Tensor, "p q"]:
    """Mutual information of every unit of one network with every unit of another, in nats.

    Args:
        a, b: activations on the same samples, floating: ``[n, units]``, tokens or maps, whose positions all count.
        bins: of each unit, the one for zero included.
        bias: ``"cells"`` subtracts ``(rows - 1)(columns - 1) / (2 N)``, ``"official"`` what the published helper does,
            ``"none"`` nothing.
        candidates: for each unit of ``a``, the units of ``b`` that matter (such as the ten of largest correlation);
            all others get 0. None computes all.

    Returns:
        float64; corrected values of independent units scatter about 0 and may be negative. NaN in rows and columns of
        dead units. ``O(n p q bins^2)`` multiply-adds in float32 products, which count exactly.

    Raises:
        InvalidInput: other numbers of samples, fewer than two bins, another ``bias``, or NaN.
    """
    if bias not in BIASES:
        raise InvalidInput(f"bias={bias!r}: expected one of {', '.join(BIASES)}")
    if bins < 2:
        raise InvalidInput(f"bins={bins}: at least 2 are needed")
    x, y = (unit_samples(part).detach().double() for part in (a, b))
    require_finite("a", x)
    require_finite("b", y)
    if len(x) != len(y) or len(x) == 0:
        raise InvalidInput(f"{len(x)} and {len(y)} samples: the same ones are expected")
    p, q = x.shape[1], y.shape[1]
    one, two = bin_codes(x, bins), bin_codes(y, bins)
    found = torch.zeros(p, q, dtype=torch.float64, device=x.device)
    if candidates is None:
        step = max(1, ENTRIES // max(q * bins * bins, 1))
        for start in range(0, p, step):
            counts = _counts(one[:, start : start + step], two, bins)
            found[start : start + step] = _information(counts, len(x), bias)
    else:
        if candidates.ndim != 2 or len(candidates) != p or not 0 <= int(candidates.min()) <= int(candidates.max()) < q:
            raise InvalidInput(f"candidates of shape {tuple(candidates.shape)}: expected [{p}, m] units below {q}")
        for unit, chosen in enumerate(candidates.to(x.device)):
            counts = _counts(one[:, unit : unit + 1], two[:, chosen], bins)
            found[unit, chosen] = _information(counts, len(x), bias)[0]
    dead_x, dead_y = (part.std(0, correction=0) <= DEAD * part.mean(0).abs().clamp_min(1) for part in (x, y))
    return found.masked_fill(dead_x[:, None] | dead_y, torch.nan)


def bin_codes(x: Float[Tensor, "n units"], bins: int = 10) -> Int[Tensor, "n units"]:
    """The bin of every value, 0 to ``bins - 1``, each with about equally many values of its unit.

    A unit that is never negative and sometimes zero has its zeros in bin 0 and everything else in the other bins; equal
    values are never apart, so some bins may stay empty.
    """
    ordered = x.sort(0).values
    n = len(x)
    zeros = torch.where(ordered[0] >= 0, (ordered == 0).sum(0), 0)
    levels = torch.where(zeros > 0, bins - 1, bins)
    codes = torch.where((zeros > 0) & (x > 0), 1, 0)
    for level in range(1, bins):
        at = zeros + ((n - zeros) * level).div(levels, rounding_mode="floor")
        edge = ordered.gather(0, at.clamp_max(n - 1)[None])[0]
        codes += ((x >= edge) & (level < levels) & (x > torch.where(zeros > 0, 0.0, -math.inf))).long()
    return codes


def _counts(one: Tensor, two: Tensor, bins: int) -> Float[Tensor, "p q rows columns"]:
    """Joint histograms, by products of indicators."""
    p, q = one.shape[1], two.shape[1]
    total = torch.zeros(p * bins, q * bins, dtype=torch.float64, device=one.device)
    step = max(1, min(2**22, ENTRIES // max((p + q) * bins, 1)))  # below 2^24 float32 counts exactly
    level = torch.arange(bins, device=one.device)
    for x, y in zip(one.split(step), two.split(step), strict=True):
        left, right = ((part[..., None] == level).flatten(1).float() for part in (x, y))
        total += left.T @ right
    return total.reshape(p, bins, q, bins).permute(0, 2, 1, 3)


def _information(counts: Float[Tensor, "p q rows columns"], n: int, bias: str) -> Float[Tensor, "p q"]:
    joint = counts / n
    rows, columns = joint.sum(3), joint.sum(2)
    ratio = joint / (rows[..., None] * columns[:, :, None]).clamp_min(1e-300)
    value = (joint * ratio.clamp_min(1e-300).log()).sum((2, 3))
    r, c = (rows > 0).sum(2), (columns > 0).sum(2)
    if bias == "cells":
        value = value - (r - 1) * (c - 1) / (2 * n)
    elif bias == "official":
        value = value - counts.shape[2] * counts.shape[3] / (2 * n * math.log(2))
    return value
