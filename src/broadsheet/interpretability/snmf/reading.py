"""How a factor reads a model: its coefficient beside all other factors, with exact gradients."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.interpretability.snmf.updates import nonnegative_codes


@dataclass(frozen=True)
class FactorReading:
    """One factor's coefficient in the non-negative least squares over all of them.

    Args:
        features: all factors, ``[K, d]``.
        index: which one is read.
    """

    features: Float[Tensor, "K d"]
    index: int

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        features = self.features.to(x) if x.dtype in (torch.float32, torch.float64) else self.features.to(x.device)
        rows = x.to(features.dtype).flatten(0, -2) if x.ndim > 1 else x.to(features.dtype)[None]
        inner = features @ features.T
        with torch.no_grad():
            codes = nonnegative_codes((rows @ features.T).T.contiguous(), inner).T
        if torch.is_grad_enabled() and x.requires_grad:
            codes = _differentiable(rows, features, inner, codes > 0)
        return codes[:, self.index].reshape(x.shape[:-1]).to(x.dtype)


def _differentiable(rows: Tensor, features: Tensor, inner: Tensor, active: Tensor) -> Tensor:
    """The same coefficients as a function of the activations: linear in them while the same factors are active."""
    both = active[:, :, None] & active[:, None, :]
    system = torch.where(both, inner, 0.0)
    ridge = 1e-6 * inner.diagonal().mean().clamp_min(torch.finfo(inner.dtype).tiny)
    system = system + torch.diag_embed(torch.where(active, ridge, torch.ones_like(ridge)))
    right = torch.where(active, rows @ features.T, 0.0)
    return torch.linalg.solve(system, right)
