"""Inputs for a module whose author gave none: shapes that its first layer reads, the first with which it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from broadsheet.nn.batches import device_of
from broadsheet.nn.hooks import evaluating

BATCH, TOKENS = 2, 5
SIDES = (32, 8, 28, 64, 224)  # of pictures; the small ones first are the quicker ones
MOST = 3  # inputs that could all be alike, such as queries, keys and values


def guess_inputs(module: nn.Module) -> tuple[Tensor, ...] | None:
    """Example inputs, all alike, with which the module runs; None where no guess does.

    Args:
        module: its first layers with a known input (dense, embedding, convolution, norm, attention, recurrent) say
            which shapes are tried: a batch of two, five tokens, pictures of some usual sizes.
    """
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)
    if not 1 <= count <= MOST:
        return None
    device = device_of(module)
    with torch.no_grad(), evaluating(module):
        for example in _candidates(module):
            inputs = (example.to(device),) * count
            try:
                module(*inputs)
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, KeyError, AttributeError):
                continue
            return inputs
    return None


def _candidates(module: nn.Module) -> Iterator[Tensor]:
    for layer in module.modules():
        dtype = next((p.dtype for p in layer.parameters()), torch.get_default_dtype())
        for shape in _shapes(layer):
            yield torch.zeros(shape, dtype=torch.long if isinstance(layer, nn.Embedding) else dtype)


def _shapes(layer: nn.Module) -> list[tuple[int, ...]]:
    if isinstance(layer, nn.Embedding):
        return [(BATCH, TOKENS), (BATCH,)]
    if isinstance(layer, nn.Linear):
        return _features(layer.in_features)
    if isinstance(layer, nn.MultiheadAttention):
        return _features(layer.embed_dim)[::-1]
    if isinstance(layer, nn.RNNBase):
        return _features(layer.input_size)[::-1]
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        own = tuple(layer.normalized_shape)
        return [(BATCH, *own), (BATCH, TOKENS, *own)]
    if isinstance(layer, nn.BatchNorm1d):
        return [(BATCH, layer.num_features), (BATCH, layer.num_features, SIDES[0])]
    channels = layer.num_features if isinstance(layer, nn.BatchNorm2d) else getattr(layer, "in_channels", None)
    rank = next((n for kind, n in _RANKS.items() if isinstance(layer, kind)), 0)
    return [(BATCH, int(channels), *(side,) * rank) for side in SIDES] if rank and channels else []


def _features(width: int) -> list[tuple[int, ...]]:
    return [(BATCH, width), (BATCH, TOKENS, width)]


_RANKS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
    nn.BatchNorm2d: 2,
}  # fmt: skip
