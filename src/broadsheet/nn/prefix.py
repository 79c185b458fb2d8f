"""Run one position of each prompt again from any block on, everything before it as it was.

In a causal model a change at a prompt's last position moves nothing before it. Trying many such changes (patching every
head there, one by one) then needs neither the earlier tokens nor the earlier blocks again: keys and values of one run
are kept, and a rerun costs one token.

    prefix = cached_prefix(model, input_ids)
    final = prefix.run(3, edit=lambda name, layer, x: ...)      # [1, batch, d_model], the last residual stream
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from broadsheet.errors import UnsupportedModel
from broadsheet.nn.attribution import place_of
from broadsheet.nn.blocks import Attention, BlockMap, block_map, rotate, run_block, softcap
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded


@dataclass(frozen=True)
class _Seen:
    """What one layer's attention sees; keys are rotated where positions are rotary."""

    k: Float[Tensor, "batch time heads d"]
    v: Float[Tensor, "batch time heads d"]
    allowed: Bool[Tensor, "some time"]
    rotary: tuple[Tensor, Tensor] | None  # at the position, [1 or batch, rotated]


@dataclass(frozen=True)
class Prefix:
    """A run's keys and values, and its residual stream at one position of each prompt.

    Attributes:
        block_map: of the model.
        at: ``[batch]``, the positions, in columns of the prompts moved to the left.
        stream: ``[layer + 1, batch, d_model]``, what every block reads there, and what the last one gives.
        seen: by layer; None where there is no attention.
    """

    block_map: BlockMap
    at: Int[Tensor, " batch"]
    stream: Float[Tensor, "steps batch d_model"]
    seen: tuple[_Seen | None, ...]

    @torch.no_grad()
    def run(
        self,
        layer: int = 0,
        edit: Callable[[str, int, Tensor], Tensor] | None = None,
        n: int = 1,
    ) -> Float[Tensor, "n batch d_model"]:
        """The residual stream after the last block, run again from a block on.

        Args:
            layer: the first block to run.
            edit: ``(field, layer, x) -> x`` as in :meth:`BlockMap.forward`, with ``x [n * batch, 1, ...]``; it is not
                called for attention patterns.
            n: runs at once, which ``edit`` tells apart.
        """
        x = self.stream[layer].repeat(n, 1)[:, None]

        def changed(name: str, i: int, y: Tensor) -> Tensor:
            return y if edit is None else edit(name, i, y)

        with evaluating(self.block_map.model):
            for i in range(layer, self.block_map.n_layers):
                attend = None if self.seen[i] is None else partial(self._attend, i, n)
                done = run_block(self.block_map.blocks[i], i, x, None, None, changed, attend)
                assert done.resid_post is not None
                x = done.resid_post
        return x[:, 0].unflatten(0, (n, -1))

    def _attend(self, layer: int, n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention, seen = self.block_map.blocks[layer].attention, self.seen[layer]
        assert attention is not None
        assert seen is not None
        q, k, v = (x[:, 0].unflatten(0, (n, -1)) for x in (q, k, v))  # [n, batch, heads, d]
        q, k = (rotate_row(x, seen.rotary) for x in (q, k))
        column = self.at[None, :, None, None].expand(n, -1, q.shape[2], 1)
        pattern = row_pattern(attention, q, seen.k, seen.allowed, own=(k, column))
        own = pattern.gather(-1, column)
        z = torch.einsum("nbht,bthd->nbhd", pattern.scatter(-1, column, 0), seen.v) + own * v
        return z.flatten(0, 1)[:, None]


@torch.no_grad()
def cached_prefix(
    model: nn.Module | BlockMap,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Tensor | None = None,
    positions: int | Tensor | None = None,
) -> Prefix:
    """Run a causal model once and keep what a rerun at one position needs.

    Args:
        model: any mapped decoder.
        input_ids: ``[batch, time]``.
        attention_mask: ``[batch, time]``; padding on either side, or on none.
        positions: the column to run again: one, or ``[batch]``; None for each prompt's last token.

    Raises:
        UnsupportedModel: a model in which positions see later ones.
    """
    the_map = model if isinstance(model, BlockMap) else block_map(model)
    if not the_map.causal:
        raise UnsupportedModel(f"{type(the_map.model).__name__} is not causal: every position would have to run again")
    padded = right_padded(input_ids, attention_mask)
    at = place_of(padded, positions)
    rows = torch.arange(len(at), device=at.device)
    stream: list[Tensor] = []
    held: dict[tuple[str, int], Tensor] = {}
    rotaries: dict[int, tuple[Tensor, Tensor] | None] = {}

    def keep(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "resid_pre":
            stream.append(x[rows, at])
            rotaries[layer] = layer_rotary(the_map, layer, x)
        elif name == "resid_post" and layer == the_map.n_layers - 1:
            stream.append(x[rows, at])
        elif name == "k":
            held[name, layer] = rotate_all(x, rotaries[layer])
        elif name == "v":
            held[name, layer] = x
        return x

    with evaluating(the_map.model):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    seen: list[_Seen | None] = []
    for i, block in enumerate(the_map.blocks):
        if block.attention is None:
            seen.append(None)
            continue
        allowed = block.attention.allowed(padded.input_ids.shape[1], padded.attention_mask, at.device)[:, 0]
        seen.append(
            _Seen(held["k", i], held["v", i], allowed.expand(len(at), -1, -1)[rows, at], row_of(rotaries[i], at))
        )
    return Prefix(the_map, at, torch.stack(stream), tuple(seen))


def layer_rotary(the_map: BlockMap, layer: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine of a layer's rotary positions, for a stream ``x [batch, time, d_model]``; None: it has none."""
    attention = the_map.blocks[layer].attention
    if attention is None or not attention.rotary:
        return None
    if attention.positions is not None:
        return attention.positions(x)
    return None if the_map.rotary is None else the_map.rotary(x)


def row_of(rotary: tuple[Tensor, Tensor] | None, at: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine at one position of each prompt, ``[batch, rotated]``."""
    if rotary is None:
        return None
    cos, sin = (x.expand(len(at), -1, -1)[torch.arange(len(at), device=at.device), at] for x in rotary)
    return cos, sin


def rotate_row(x: Float[Tensor, "*n batch heads d"], rotary: Any) -> Float[Tensor, "*n batch heads d"]:
    """Rotary positions on one position of each prompt (see :func:`row_of`)."""
    if rotary is None:
        return x
    cos, sin = (part[:, None] for part in rotary)
    return rotate(x[..., None, :], cos, sin)[..., 0, :]


def rotate_all(x: Float[Tensor, "batch time heads d"], rotary: Any) -> Float[Tensor, "batch time heads d"]:
    """Rotary positions on every position."""
    return x if rotary is None else rotate(x.transpose(1, 2), *rotary).transpose(1, 2)


def row_pattern(
    attention: Attention,
    q: Float[Tensor, "*n batch heads d"],
    k: Float[Tensor, "batch time heads d"],
    allowed: Bool[Tensor, "batch time"],
    own: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "*n batch heads time"]:
    """Attention of one position of each prompt.

    Args:
        attention: of the block; heads may be some of its heads only.
        q, k: rotated where positions are rotary.
        allowed: what the position may see.
        own: another key ``[..., batch, heads, d]`` in the place of one of ``k``, and its column.
    """
    dtype = q.dtype
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    wide = attention.score_dtype or dtype
    least = max(torch.finfo(d).min for d in (attention.softmax_dtype or wide, wide))
    q = q.to(wide)
    scores = torch.einsum("...bhd,bthd->...bht", q, k.to(wide))
    if own is not None:
        key, column = own
        scores = scores.scatter(-1, column, (q * key.to(wide)).sum(-1, keepdim=True))
    scores = scores * scale
    if attention.softcap is not None:
        scores = softcap(scores, attention.softcap)
    return scores.masked_fill(~allowed[:, None], least).softmax(-1, dtype=attention.softmax_dtype).to(dtype)
