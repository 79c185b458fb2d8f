"""How far two predictions differ: Kullback-Leibler and Jensen-Shannon divergence from logits, in nats."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def kl_divergence(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) of two distributions given by logits (unnormalized is fine), taken in float32 at least.

    Args:
        p, q: logits; minus infinity stands for an outcome that cannot come.

    Returns:
        nats, never below 0; infinite where q rules out what p allows.
    """
    p, q = _log_softmax(p), _log_softmax(q)
    terms = p.exp() * (p - q)
    return torch.where(p == -math.inf, 0.0, terms).sum(-1).clamp_min(0)


def js_divergence(p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, symmetric and between 0 and ln 2.

    Args:
        p, q: logits, as in :func:`kl_divergence`.
    """
    p, q = _log_softmax(p), _log_softmax(q)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
