"""Which found direction is which planted one: cosines, and the best pairing of any table."""

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
    index = best_pairs(table)
    there = index >= 0
    cosine = torch.zeros(len(wanted), dtype=torch.float64, device=wanted.device)
    cosine[there] = table[there, index[there]]
    return Matching(index, cosine)


def best_pairs(table: Float[Tensor, "n m"], minimise: bool = False) -> Int[Tensor, " n"]:
    """Each row with a column of its own, so that the sum is largest: min(n, m) pairs (Hungarian algorithm, scipy's).

    Args:
        table: what each pair is worth, finite.
        minimise: the smallest sum, for distances.

    Returns:
        the column of each row; -1 where columns ran out.
    """
    if not bool(table.isfinite().all()):
        raise InvalidInput("the table of pairs holds NaN or infinite values: leave those rows and columns out")
    rows, columns = linear_sum_assignment(table.detach().cpu().numpy(), maximize=not minimise)
    index = torch.full((len(table),), -1, dtype=torch.long, device=table.device)
    index[torch.as_tensor(rows, device=table.device)] = torch.as_tensor(columns, device=table.device)
    return index


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
