"""Direct feature attribution: which heads, reading which tokens, made a feature active. Exact, with the pattern held.

    pre-activation = sum over heads h and sources s of A_h[t, s] (v_h(s) . W_enc[block h])  +  constant

Values are projected on the feature before they are weighted by attention, so nothing of the size
``[batch, time, time, d]`` is ever there. Source: arXiv:2406.17759, section 2.2.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE, as_tensor
from broadsheet.nn.attribution import place_of, source_shares
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import RightPadded, right_padded


@dataclass(frozen=True)
class DirectFeatureAttribution:
    """What made a feature active at one token of each text.

    Attributes:
        pre_activation: ``[batch]``, of the feature, before it is cut at 0.
        constant: ``[batch]``, by the biases of the autoencoder.
        by_head_source: ``[batch, head, time]``, in the columns of the texts as they came; 0 at padding.
        feature, position: ``[batch]``, what was looked at.
    """

    pre_activation: Float[Tensor, " batch"]
    constant: Float[Tensor, " batch"]
    by_head_source: Float[Tensor, "batch heads time"]
    feature: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]

    @property
    def activation(self) -> Float[Tensor, " batch"]:
        return self.pre_activation.clamp_min(0)

    @property
    def by_head(self) -> Float[Tensor, "batch heads"]:
        return self.by_head_source.sum(-1)

    @property
    def by_source(self) -> Float[Tensor, "batch time"]:
        return self.by_head_source.sum(1)

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Sum of all shares and the constant: the pre-activation again."""
        return self.by_head_source.sum((1, 2)) + self.constant

    def to_frame(self, text: int = 0) -> pd.DataFrame:
        """Columns ``head``, ``source`` (column of the text) and ``share``, the largest by size first."""
        table = self.by_head_source[text].cpu()
        heads, time = table.shape
        frame = pd.DataFrame(
            {
                "head": [h for h in range(heads) for _ in range(time)],
                "source": list(range(time)) * heads,
                "share": table.flatten().tolist(),
            }
        )
        return frame.sort_values("share", key=lambda x: -x.abs(), ignore_index=True)

    def plot(self, tokens: list[str] | None = None, text: int = 0, ax: Any = None) -> Any:
        """Heads against source tokens as a heat-map.

        Args:
            tokens: of the text, to label the axis.
            text: which of the batch.
            ax: matplotlib axes.
        """
        from broadsheet.nn.plotting import DIVERGING, new_axes

        table = self.by_head_source[text].float().cpu().numpy()
        ax = new_axes(ax, figsize=(max(5.0, 0.32 * table.shape[1]), 1.4 + 0.24 * len(table)))
        most = abs(table).max() or 1.0
        image = ax.imshow(table, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        ax.grid(visible=False)
        ax.set_ylabel("head")
        ax.set_yticks(range(len(table)))
        if tokens is not None:
            ax.set_xticks(range(len(tokens)), [token.replace("$", r"\$") for token in tokens], rotation=60, ha="right")
        else:
            ax.set_xlabel("source position")
        ax.axvline(int(self.position[text]), color="#1f2328", lw=0.8, ls=":")
        ax.figure.colorbar(image, ax=ax, label="share of the pre-activation", fraction=0.03, pad=0.02)
        return ax


class _Reached(Exception):
    """The layer's heads are read."""


@torch.no_grad()
def head_inputs(
    the_map: BlockMap, padded: RightPadded, layer: int
) -> tuple[Float[Tensor, "batch heads time sources"], Float[Tensor, "batch time heads d"], Tensor]:
    """Attention pattern, values and outputs of a layer's heads, the forward pass stopped behind them."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, at: int, x: Tensor) -> Tensor:
        if at == layer and name in ("pattern", "v", "z"):
            seen[name] = x
            if name == "z":
                raise _Reached
        return x

    with evaluating(the_map.model), suppress(_Reached):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    return seen["pattern"], seen["v"], seen["z"]


@torch.no_grad()
def dfa(
    model: nn.Module | BlockMap,
    sae: AttentionSAE,
    input_ids: Int[Tensor, "batch time"],
    feature: int | Tensor,
    position: int | Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> DirectFeatureAttribution:
    """Attribute a feature's activation to heads and source tokens.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        sae: of the layer that is looked at.
        input_ids: ``[batch, time]``.
        feature: one for all texts, or ``[batch]``.
        position: column of ``input_ids``, one or ``[batch]``; None for where the feature's pre-activation is largest.
        attention_mask: ``[batch, time]``; padding on either side.

    Raises:
        InvalidInput: an autoencoder of another model, a feature or position that is not there.
    """
    the_map = sae.check_model(model)
    padded = right_padded(input_ids, attention_mask)
    n = len(input_ids)
    index = as_tensor(feature, sae)
    if len(index) not in (1, n):
        raise InvalidInput(f"feature holds {len(index)} indices: expected one, or {n}, one for each text")
    pattern, v, z = head_inputs(the_map, padded, sae.layer)
    wide = torch.promote_types(z.dtype, sae.W_enc.dtype)
    readers = sae.readers.to(wide)[index].expand(n, -1, -1)
    constant = sae.constants.to(wide)[index].expand(n)
    rows = torch.arange(n, device=z.device)
    if position is None:
        value = torch.einsum("bthd,bhd->bt", z.to(wide), readers)
        if padded.attention_mask is not None:
            value = value.masked_fill(padded.attention_mask == 0, -torch.inf)
        at = value.argmax(1)
    else:
        at = place_of(padded, position)
    pre = torch.einsum("bhd,bhd->b", z[rows, at].to(wide), readers) + constant
    shares = source_shares(pattern[rows, :, at].to(wide), v.to(wide), readers[:, None])[..., 0]
    shares = padded.restore(shares.transpose(1, 2)).transpose(1, 2)
    return DirectFeatureAttribution(pre, constant, shares, index.expand(n), at + padded.offset)
