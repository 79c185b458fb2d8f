"""Which heads a feature belongs to: by its weights, and at one token."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE, as_tensor


def head_weights(sae: AttentionSAE) -> Float[Tensor, "features heads"]:
    """Each head's share of every feature: the length of its part of the decoder's row, divided by the sum of all.

    Args:
        sae: trained on head outputs side by side.

    Source: arXiv:2406.17759, section 3 (weight-based head attribution).
    """
    lengths = sae.writers.norm(dim=-1)
    return lengths / lengths.sum(-1, keepdim=True)


def top_features(sae: AttentionSAE, head: int, k: int = 10, alive: Tensor | None = None) -> pd.DataFrame:
    """The features that belong most to one head, which is where to look whether it has several jobs.

    Args:
        sae: as in :func:`head_weights`.
        head: counted from 0.
        k: features.
        alive: ``[features]``, True for those that count; None for all.

    Returns:
        columns ``feature`` and ``share``, the largest first.
    """
    if not 0 <= head < sae.n_heads:
        raise InvalidInput(f"head={head}: the layer has {sae.n_heads} heads (0 to {sae.n_heads - 1})")
    shares = head_weights(sae)[:, head]
    if alive is not None:
        shares = shares.masked_fill(~alive.to(shares.device), -1.0)
    best = shares.topk(min(k, sae.n_features if alive is None else int(alive.sum())))
    return pd.DataFrame({"feature": best.indices.tolist(), "share": best.values.tolist()})


def head_attribution(
    sae: AttentionSAE, z: Float[Tensor, "*batch heads d_head"], features: int | Sequence[int] | Tensor
) -> Float[Tensor, "*batch n heads"]:
    """What each head gave to features' pre-activations; with ``sae.constants`` they sum to them exactly.

    Args:
        sae: as in :func:`head_weights`.
        z: head outputs, such as :func:`~broadsheet.interpretability.attention_sae.capture_z` gives.
        features: one index or several.

    Returns:
        ``[..., n, heads]``, one row for each feature.
    """
    if z.shape[-2:] != (sae.n_heads, sae.d_head):
        raise InvalidInput(
            f"z has shape {tuple(z.shape)}: expected [..., {sae.n_heads}, {sae.d_head}], heads and their features"
        )
    readers = sae.readers[as_tensor(features, sae)]
    return torch.einsum("...hd,nhd->...nh", z.to(readers), readers)
