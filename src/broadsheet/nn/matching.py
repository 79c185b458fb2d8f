"""Which found direction is which planted one: cosines, and the best pairing."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class Matching:
    """Each wanted direction with a found one of its own.

    Attributes:
        index: ``[wanted]``, the found direction of each; -1 where there were too few.
        cosine: ``[wanted]``, of each pair; 0 where there was none.
    """

    index: Int[Tensor, " wanted"]
    cosine: Float[Tensor, " wanted"]

    @property
    def mean(self) -> float:
        """Mean cosine over what was wanted."""
        return float(self.cosine.mean())


def cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine of every pair of rows; 0 for a row without length."""
    return _unit(a) @ _unit(b).T


def match_directions(wanted: Tensor, found: Tensor, signed: bool = True) -> Matching:
    """Pair directions so that the sum of cosines is largest (Hungarian algorithm, scipy's).

    Args:
        wanted: the true directions, ``[wanted, d]``.
        found: what a method gave, ``[found, d]``, in any order and of any length.
        signed: False where a method cannot know the sign (PCA, ICA): cosines count by their size.

    Raises:
        InvalidInput: other widths, or NaN.
    """
    if wanted.shape[1] != found.shape[1]:
        raise InvalidInput(f"wanted directions have {wanted.shape[1]} features, found ones {found.shape[1]}")
    table = cosines(wanted.double(), found.double().to(wanted.device))
    if not table.isfinite().all():
        raise InvalidInput("directions hold NaN or infinite values: leave those rows out")
    table = table if signed else table.abs()
    rows, columns = linear_sum_assignment(-table.cpu().numpy())
    index = torch.full((len(wanted),), -1, dtype=torch.long, device=wanted.device)
    cosine = torch.zeros(len(wanted), dtype=torch.float64, device=wanted.device)
    at = torch.as_tensor(rows, device=wanted.device)
    to = torch.as_tensor(columns, device=wanted.device)
    index[at], cosine[at] = to, table[at, to]
    return Matching(index, cosine)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
