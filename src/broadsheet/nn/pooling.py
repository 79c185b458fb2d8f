"""One vector for each sample from what layers and encoders give: tensors, Hugging Face outputs, tokens, maps."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import main_tensor

POOLS = ("mean", "first", "last", "flatten")
Pool = str | Callable[..., Tensor] | None


def pooled(output: Any, pool: Pool, mask: Tensor | None = None) -> Float[Tensor, "n d"]:
    """One vector for each sample.

    Args:
        output: a tensor, a tuple that begins with one, or a Hugging Face output (its last hidden state): vectors
            ``[n, d]``, tokens ``[n, time, d]`` or maps ``[n, d, height, width]``.
        pool: None where there is one vector already; ``"mean"`` over tokens or places, ``"first"`` or ``"last"`` token,
            ``"flatten"``; or a function ``(hidden, mask) -> [n, d]``. Padding, on either side, counts for nothing.
        mask: ``[n, time]``, 1 for tokens and 0 for padding.

    Raises:
        InvalidInput: more than two dimensions and no pooling, or a mask of other tokens than there are.
    """
    x = hidden_of(output)
    if callable(pool):
        x = pool(x, mask)
    elif pool is not None:
        x = _pool(x, pool, mask)
    if x.ndim != 2:
        raise InvalidInput(
            f"an output of shape {tuple(x.shape)}: one vector for each sample, [n, d], is expected. Hand in pool= with "
            f"one of {', '.join(POOLS)} or a function of hidden states and mask"
        )
    return x


def hidden_of(output: Any) -> Tensor:
    """The main tensor of what a module gives; of a Hugging Face output its last hidden state."""
    named = getattr(output, "last_hidden_state", None)
    found = named if isinstance(named, Tensor) else main_tensor(output)
    if found is None:
        raise InvalidInput(f"an output of type {type(output).__name__} without a tensor in it")
    return found


def _pool(x: Tensor, pool: str, mask: Tensor | None) -> Tensor:
    if pool not in POOLS:
        raise InvalidInput(f"pool={pool!r}: expected one of {', '.join(POOLS)}, a function or None")
    if x.ndim == 2:
        return x
    if pool == "flatten":
        return x.flatten(1)
    if x.ndim == 4:  # feature maps [n, channels, height, width]
        x, mask = x.flatten(2).transpose(1, 2), None
    if x.ndim != 3:
        raise InvalidInput(f"pool={pool!r} needs tokens [n, time, d] or maps, the output is {tuple(x.shape)}")
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    elif mask.shape != x.shape[:2]:
        raise InvalidInput(
            f"the mask is {tuple(mask.shape)}, the hidden states {tuple(x.shape[:2])}: which of them are padding is "
            "not known. Hand in pool= as a function of hidden states and mask"
        )
    mask = mask.bool()
    if pool == "mean":
        weights = mask.to(x)[..., None]
        return (x * weights).sum(1) / weights.sum(1).clamp_min(1)
    rows = torch.arange(len(x), device=x.device)
    if pool == "first":
        return x[rows, mask.int().argmax(1)]
    return x[rows, x.shape[1] - 1 - mask.flip(1).int().argmax(1)]
