"""One way into a transformer: its blocks, weights and places by the same names in every architecture.

:func:`block_map` reads a Hugging Face decoder or encoder, or the user's own module once a reader is registered for it
(:func:`register_block_map`), and gives a :class:`BlockMap`: for each block the attention (query, key, value and output
matrices, grouped heads, rotary positions, window), the MLP (plain or gated), the norms and how they are joined, then
the final norm and the head. The map computes the model's own output again (:meth:`BlockMap.forward`), so a method
that works on the map works on every architecture, and it gives the place of a component by name
(:meth:`BlockMap.resolve`):

======================== =====================================================================
``layers.3.resid_pre``   what block 3 reads, ``layers.3.resid_post`` what it hands on
``layers.3.attn.z``      the heads' outputs before the output matrix, ``layers.3.attn.head.5`` one head's share of it
``layers.3.attn.q``      queries before rotary positions (also ``.k``, ``.v``)
``layers.3.attn``        the attention's output, after the output matrix
``layers.3.mlp.act``     the MLP's hidden units, ``layers.3.mlp.neuron.117`` one of them
``layers.3.mlp``         the MLP's output
======================== =====================================================================

A map holds references to the model's weights: make a new one (it is cheap) after moving or changing the model.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.hooks import Site, evaluating

Edit = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """An affine map ``y = x W + b``.

    Args:
        weight: ``[in, out]`` (``torch.nn.Linear`` stores the transpose, GPT-2's ``Conv1D`` stores this).
        bias: ``[out]`` or None.
    """

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def columns(self, index: slice | list[int]) -> "Linear":
        """The map to some of the outputs only."""
        return Linear(self.weight[:, index], None if self.bias is None else self.bias[index])


@dataclass(frozen=True)
class Norm:
    """A normalization ``(x - centre) * gain / scale(x) + bias``.

    Args:
        kind: ``"layer"`` (LayerNorm), ``"rms"`` (RMSNorm) or ``"l2"`` (division by the Euclidean norm).
        gain: ``[d]`` or None for ones.
        bias: ``[d]`` or None.
        eps: added to the variance or mean square (``"l2"``: the least norm).
        module: the model's own module; used for totals where given, because several RMSNorms compute in float32 and a
            rerun in another precision would miss the model's output.
    """

    kind: str
    gain: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    eps: float = 1e-5
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("layer", "rms", "l2"):
            raise InvalidInput(f"kind={self.kind!r}: expected 'layer', 'rms' or 'l2'")

    def scale(self, x: Tensor) -> Tensor:
        """What the (centred) input is multiplied by, from the statistics of ``x [..., d]``; broadcasts to ``x``."""
        if self.kind == "l2":
            scale = 1 / x.norm(dim=-1, keepdim=True).clamp_min(self.eps)
        elif self.kind == "rms":
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        else:
            scale = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + self.eps)
        return scale if self.gain is None else scale * self.gain

    def centre(self, x: Tensor) -> Tensor:
        """``x`` without its mean over features where the norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def __call__(self, x: Tensor) -> Tensor:
        if self.module is not None:
            return self.module(x)
        y = self.centre(x) * self.scale(x)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Activation:
    """An elementwise function as a step of a head, such as the ``tanh`` of BERT's pooler."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Pool:
    """From ``[..., batch, time, d]`` to ``[..., batch, d]`` as a step of a head.

    Args:
        kind: ``"first"`` token, ``"last"`` token or ``"mean"`` over the tokens; padding does not count.
        pad_token_id: what Hugging Face's decoders with a classifier look for to find the last token; None: the mask.
    """

    kind: str
    pad_token_id: int | None = None

    def weights(self, input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight of every position, ``[batch, time]``: each row sums to 1."""
        length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        if self.kind == "mean":
            return mask.to(dtype) / mask.sum(1, keepdim=True).clamp_min(1)
        if self.kind == "first":
            place = torch.zeros_like(input_ids[:, 0])
        else:
            real = mask if self.pad_token_id is None else (input_ids != self.pad_token_id).to(mask.dtype)
            place = (torch.arange(length, device=real.device) * real).argmax(1)
        return F.one_hot(place, length).to(dtype)

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("bt,...btd->...bd", weights.to(x.dtype), x)


HeadStep = Linear | Norm | Activation | Pool


@dataclass(frozen=True)
class Attention:
    """Self-attention of one block.

    Args:
        n_heads: query heads.
        head_dim: features of a head.
        q, k, v: from the block's (normalized) input to all heads, head after head.
        o: from all heads' outputs to the residual stream.
        scale: of the scores; None for ``head_dim ** -0.5``.
        n_kv_heads: key and value heads where several query heads share one; None for ``n_heads``.
        causal: positions see only themselves and earlier ones.
        rotary: queries and keys are rotated by the map's ``rotary``.
        window: how many positions back, itself included, a position sees; None for all.
        softmax_dtype: the precision in which the model itself takes the softmax; None for that of the scores.
        score_dtype: the precision in which the model itself takes the scores; None for that of queries and keys.
        q_norm, k_norm: norms of each head's queries and keys before rotary positions (Qwen3, Gemma 3).
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` (Gemma 2); None for none.
        positions: this layer's own rotary positions where they differ from the map's (Gemma 3).
    """

    n_heads: int
    head_dim: int
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    scale: float | None = None
    n_kv_heads: int | None = None
    causal: bool = True
    rotary: bool = False
    window: int | None = None
    softmax_dtype: torch.dtype | None = None
    score_dtype: torch.dtype | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    softcap: float | None = None
    positions: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def groups(self) -> int:
        """Query heads for each key and value head."""
        return self.n_heads // (self.n_kv_heads or self.n_heads)

    def split(self, x: Tensor, repeat: bool = False) -> Tensor:
        """``[..., time, heads * d]`` to ``[..., time, n_heads, d]``; shared heads are repeated."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return self.repeated(x) if repeat else x

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values ``[..., n_kv_heads, d]``, each for all the query heads that share it."""
        return x.repeat_interleave(self.groups, dim=-2) if self.groups > 1 else x

    def norm_of(self, name: str) -> Norm | None:
        """The norm of queries (``"q"``) or keys (``"k"``); values (``"v"``) have none."""
        return {"q": self.q_norm, "k": self.k_norm, "v": None}[name]

    def project(self, name: str, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys or values of the block's (normalized) input, shared heads repeated.

        Args:
            name: ``"q"``, ``"k"`` or ``"v"``.
            h: ``[..., time, d_model]``.

        Returns:
            ``[..., time, n_heads, head_dim]``, and the same before its own norm (None where there is none).
        """
        x = self.split(getattr(self, name)(h))
        norm = self.norm_of(name)
        made, raw = (x, None) if norm is None else (norm(x), x)
        if name == "q":
            return made, raw
        return self.repeated(made), None if raw is None else self.repeated(raw)

    def allowed(self, length: int, attention_mask: Tensor | None, device: torch.device) -> Bool[Tensor, "b 1 t t"]:
        """Which key position (last axis) each query position may see."""
        i = torch.arange(length, device=device)
        seen = torch.ones(length, length, dtype=torch.bool, device=device)
        if self.causal:
            seen = seen & (i[None, :] <= i[:, None])
        if self.window is not None:
            seen = seen & (i[None, :] > i[:, None] - self.window)
        seen = seen[None, None]
        return seen if attention_mask is None else seen & attention_mask.bool()[:, None, None, :]

    def pattern(
        self,
        q: Float[Tensor, "*batch tq heads d"],
        k: Float[Tensor, "*batch tk heads d"],
        allowed: Bool[Tensor, "b 1 tq tk"],
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "*batch heads tq tk"]:
        """Softmax of the scaled scores; masked places get a large negative score, so no row becomes NaN."""
        q, k = q.transpose(-3, -2), k.transpose(-3, -2)
        if self.rotary and rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        dtype = q.dtype
        if self.score_dtype is not None:
            q, k = q.to(self.score_dtype), k.to(self.score_dtype)
        # The least of the narrower type: never minus infinity, and within what half-precision scores can hold.
        least = max(torch.finfo(d).min for d in (self.softmax_dtype or q.dtype, q.dtype))
        scores = q @ k.transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = softcap(scores, self.softcap)
        return scores.masked_fill(~allowed, least).softmax(-1, dtype=self.softmax_dtype).to(dtype)


@dataclass(frozen=True)
class MLP:
    """The MLP of one block: ``f(x W_in) W_out``, or ``(f(x W_gate) * x W_in) W_out`` where it is gated.

    Args:
        w_in: into the hidden units.
        w_out: back into the residual stream.
        activation: elementwise.
        w_gate: None for a plain MLP.
    """

    w_in: Linear
    w_out: Linear
    activation: Callable[[Tensor], Tensor]
    w_gate: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.w_in(x)
        hidden = self.activation(hidden) if self.w_gate is None else self.activation(self.w_gate(x)) * hidden
        return self.w_out(hidden)


@dataclass(frozen=True)
class Block:
    """One block and how its parts are joined.

    Args:
        attention, mlp: None where the block has none.
        norm1, norm2: the norms of attention and MLP; None where there is none.
        scheme: ``"sequential"`` (norm before each part, MLP after attention), ``"parallel"`` (both read the block's
            input) or ``"post"`` (norm after each sum, as in BERT).
        out_norm1, out_norm2: norms of what attention and MLP put out, before it is added (Gemma 2 and 3).
        sites: component (``"attn.z"``, ``"mlp"``, ...) -> where it is in the model; only needed for hooks.
    """

    attention: Attention | None = None
    mlp: MLP | None = None
    norm1: Norm | None = None
    norm2: Norm | None = None
    scheme: str = "sequential"
    sites: Mapping[str, Site] = field(default_factory=dict)
    out_norm1: Norm | None = None
    out_norm2: Norm | None = None

    def __post_init__(self) -> None:
        if self.scheme not in ("sequential", "parallel", "post"):
            raise InvalidInput(f"scheme={self.scheme!r}: expected 'sequential', 'parallel' or 'post'")


@dataclass
class LayerTotals:
    """Activations of one block; ``[batch, time, ...]`` unless said otherwise. Parts that a block lacks stay None."""

    resid_pre: Tensor
    attn_in: Tensor | None = None
    q: Tensor | None = None  # [batch, time, n_heads, head_dim], before rotary positions; shared heads repeated
    k: Tensor | None = None
    v: Tensor | None = None
    q_raw: Tensor | None = None  # before the norm of queries, where there is one
    k_raw: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None  # cosine and sine, where this layer turns queries and keys
    pattern: Tensor | None = None  # [batch, n_heads, time, time]
    z: Tensor | None = None  # [batch, time, n_heads, head_dim]
    attn_out: Tensor | None = None  # of the output matrix
    attn_add: Tensor | None = None  # what is added: the same, or normalized
    attn_sum: Tensor | None = None  # residual + attention, before a "post" norm
    resid_mid: Tensor | None = None
    mlp_in: Tensor | None = None
    pre: Tensor | None = None  # x W_in
    gate: Tensor | None = None  # x W_gate
    act: Tensor | None = None  # the hidden units, the input of W_out
    mlp_out: Tensor | None = None
    mlp_add: Tensor | None = None
    mlp_sum: Tensor | None = None  # before a "post" norm
    resid_post: Tensor | None = None


@dataclass
class Totals:
    """Activations of a whole forward pass."""

    layers: list[LayerTotals]
    rotary: tuple[Tensor, Tensor] | None
    final: Tensor  # the residual stream after the last block
    normed: Tensor  # after the final norm
    head: list[Tensor]  # after each step of the head
    pools: dict[int, Tensor]  # step -> weight of every position

    @property
    def output(self) -> Tensor:
        return self.head[-1] if self.head else self.normed


@dataclass(frozen=True)
class BlockMap:
    """What a transformer consists of, in the same terms for every architecture.

    Args:
        model: the module itself.
        blocks: in order.
        embed: ``(input_ids, attention_mask) -> [batch, time, d_model]``, what the first block reads; may take
            ``token_type_ids=`` too.
        final_norm: after the last block; None where there is none.
        head: steps from the final hidden states to the output; empty: the hidden states are the output.
        rotary: ``(x) -> (cos, sin)``, each ``[1, time, rotated]``; None where positions are not rotary.
        patches: of a model of images, ``pixel_values [batch, channels, height, width] -> positions``; its
            ``pixel_values`` then stand wherever a language model has ``input_ids``. None for token ids.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    embed: Callable[..., Tensor]
    final_norm: Norm | None = None
    head: tuple[HeadStep, ...] = ()
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    patches: Callable[[Tensor], int] | None = None

    def __post_init__(self) -> None:
        if not self.blocks:
            raise UnsupportedModel(f"{type(self.model).__name__}: the block map holds no block")

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def length(self, inputs: Tensor) -> int:
        """The number of positions of token ids ``[batch, time]`` or pixel values."""
        return inputs.shape[1] if self.patches is None else self.patches(inputs)

    @property
    def n_heads(self) -> int:
        """Heads of a block (the most, where blocks differ)."""
        return max((block.attention.n_heads for block in self.blocks if block.attention is not None), default=0)

    @property
    def head_dim(self) -> int:
        return max((block.attention.head_dim for block in self.blocks if block.attention is not None), default=0)

    @property
    def d_model(self) -> int:
        for block in self.blocks:
            if block.attention is not None:
                return block.attention.q.weight.shape[0]
            if block.mlp is not None:
                return block.mlp.w_in.weight.shape[0]
        raise UnsupportedModel(f"{type(self.model).__name__}: no block has an attention or an MLP")

    @property
    def causal(self) -> bool:
        """Whether nothing flows from a position to an earlier one."""
        pooled = any(isinstance(step, Pool) for step in self.head)
        return not pooled and all(block.attention is None or block.attention.causal for block in self.blocks)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        edit_z: Callable[[int, Tensor], Tensor] | None = None,
        edit_mlp: Callable[[int, Tensor], Tensor] | None = None,
        cache: bool = False,
        edit: Edit | None = None,
        **embeddings: Any,
    ) -> Any:
        """The model's output, computed from the map (dropout off); differentiable.

        Args:
            input_ids: ``[batch, time]`` integers, or pixel values ``[batch, channels, height, width]``.
            attention_mask: ``[batch, time]``, 1 for tokens and 0 for padding; None for no padding.
            edit_z: ``(layer, z [batch, time, n_heads, head_dim]) -> z``, called before the output matrix.
            edit_mlp: ``(layer, mlp_out [batch, time, d_model]) -> mlp_out``.
            cache: also give every activation.
            edit: ``(field, layer, tensor) -> tensor``, called for every field of :class:`LayerTotals`.
            **embeddings: handed to ``embed`` (BERT: ``token_type_ids``).

        Returns:
            logits ``[batch, time, vocab]``, ``[batch, classes]`` or hidden states; with ``cache`` a pair
            ``(output, Totals)``.
        """

        def changed(name: str, layer: int, x: Tensor) -> Tensor:
            if edit is not None:
                x = edit(name, layer, x)
            if name == "z" and edit_z is not None:
                x = edit_z(layer, x)
            if name == "mlp_out" and edit_mlp is not None:
                x = edit_mlp(layer, x)
            return x

        embeddings = {name: value for name, value in embeddings.items() if value is not None}
        x = self.embed(input_ids, attention_mask, **embeddings)
        rotary = None if self.rotary is None else self.rotary(x)
        layers = []
        for layer, block in enumerate(self.blocks):
            totals = run_block(block, layer, x, rotary, attention_mask, changed)
            assert totals.resid_post is not None
            x = totals.resid_post
            if cache:
                layers.append(totals)
        normed, steps, pools = self.read_out(x, input_ids, attention_mask)
        out = steps[-1] if steps else normed
        return (out, Totals(layers, rotary, x, normed, steps, pools)) if cache else out

    def read_out(
        self, x: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], dict[int, Tensor]]:
        """From the residual stream after the last block, ``[batch, time, d_model]``, to the output.

        Args:
            x: the stream; more axes may stand before the batch.
            input_ids, attention_mask: of :meth:`forward`; heads that pool need them.

        Returns:
            what the final norm gives, what each step of the head gives, and the weights of the steps that pool.
        """
        normed = x = x if self.final_norm is None else self.final_norm(x)
        tokens = input_ids if self.patches is None else torch.zeros(x.shape[-3:-1], dtype=torch.long, device=x.device)
        steps: list[Tensor] = []
        pools: dict[int, Tensor] = {}
        for i, step in enumerate(self.head):
            if isinstance(step, Pool):
                pools[i] = step.weights(tokens, attention_mask, x.dtype)
                x = step(x, pools[i])
            else:
                x = step(x)
            steps.append(x)
        return normed, steps, pools

    def resolve(self, name: str) -> Site:
        """Where a component is in the model, for ``broadsheet.nn.hooks``.

        Args:
            name: such as ``"layers.3.attn.head.5"``; all names stand in this module's docstring.

        Raises:
            InvalidInput: a name that is not understood, or an index out of range, with the limits.
        """
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None:
            raise InvalidInput(f"{name!r}: expected a name such as 'layers.0.attn.head.1' or 'layers.0.mlp'")
        layer, part = int(match[1]), match[2]
        if layer >= self.n_layers:
            raise InvalidInput(f"{name!r}: the model has {self.n_layers} layers (0 to {self.n_layers - 1})")
        block = self.blocks[layer]
        head = re.fullmatch(r"attn\.head\.(\d+)(?:\.z)?", part)
        neuron = re.fullmatch(r"mlp\.neuron\.(\d+)", part)
        if head is not None and block.attention is not None:
            n, size = block.attention.n_heads, block.attention.head_dim
            h = _within(int(head[1]), n, name, "heads")
            return self._site(layer, "attn.z", name, slice(h * size, (h + 1) * size))
        if neuron is not None and block.mlp is not None:
            n = _within(int(neuron[1]), block.mlp.w_out.weight.shape[0], name, "hidden units")
            return self._site(layer, "mlp.act", name, slice(n, n + 1))
        return self._site(layer, part, name, None)

    def _site(self, layer: int, part: str, name: str, index: slice | None) -> Site:
        sites = self.blocks[layer].sites
        if part not in sites:
            known = ", ".join(sites) or "none: the block map was registered without sites"
            raise InvalidInput(f"{name!r}: no such place in layer {layer}; places: {known}")
        site = sites[part]
        return Site(site.module, site.at, site.index if index is None else index, name, site.tokens_of)


def rotate(x: Float[Tensor, "*batch heads t d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*batch heads t d"]:
    """Rotary positions on the first ``cos.shape[-1]`` features; linear in ``x``.

    Args:
        x: ``[..., heads, time, d]``.
        cos, sin: ``[1 or batch, time, rotated]``.
    """
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    turned, rest = x[..., :size], x[..., size:]
    half = size // 2
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + other * sin, rest], -1)


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``: nearly ``x`` where it is small, never beyond ``cap``."""
    return torch.tanh(x / cap) * cap


def run_block(
    block: Block,
    layer: int,
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    changed: Edit,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> LayerTotals:
    """One block; ``attend`` gives the heads' outputs of queries, keys and values that stand among others (a prefix)."""
    x = changed("resid_pre", layer, x)
    t = LayerTotals(resid_pre=x)
    post = block.scheme == "post"
    attention, mlp = block.attention, block.mlp
    mid = x
    if attention is not None:
        h = x if post or block.norm1 is None else block.norm1(x)
        t.attn_in = h = changed("attn_in", layer, h)
        q, t.q_raw = attention.project("q", h)
        k, t.k_raw = attention.project("k", h)
        t.q, t.k = changed("q", layer, q), changed("k", layer, k)
        t.v = changed("v", layer, attention.project("v", h)[0])
        if attention.rotary:
            t.rotary = rotary if attention.positions is None else attention.positions(x)
        if attend is None:
            allowed = attention.allowed(x.shape[1], attention_mask, x.device)
            t.pattern = changed("pattern", layer, attention.pattern(t.q, t.k, allowed, t.rotary))
            z = (t.pattern @ t.v.transpose(1, 2)).transpose(1, 2)
        else:
            z = attend(t.q, t.k, t.v)
        t.z = changed("z", layer, z)
        t.attn_out = changed("attn_out", layer, attention.o(t.z.flatten(-2)))
        t.attn_add = t.attn_out if block.out_norm1 is None else block.out_norm1(t.attn_out)
        t.attn_sum = mid = x + t.attn_add
        if post and block.norm1 is not None:
            mid = block.norm1(mid)
    t.resid_mid = mid = changed("resid_mid", layer, mid)
    out = mid
    if mlp is not None:
        source = x if block.scheme == "parallel" else mid
        h = source if post or block.norm2 is None else block.norm2(source)
        t.mlp_in = h = changed("mlp_in", layer, h)
        t.pre = mlp.w_in(h)
        if mlp.w_gate is None:
            act = mlp.activation(t.pre)
        else:
            t.gate = mlp.w_gate(h)
            act = mlp.activation(t.gate) * t.pre
        t.act = changed("act", layer, act)
        t.mlp_out = changed("mlp_out", layer, mlp.w_out(t.act))
        t.mlp_add = t.mlp_out if block.out_norm2 is None else block.out_norm2(t.mlp_out)
        t.mlp_sum = out = mid + t.mlp_add
        if post and block.norm2 is not None:
            out = block.norm2(out)
    t.resid_post = changed("resid_post", layer, out)
    return t


def _within(index: int, n: int, name: str, what: str) -> int:
    if index >= n:
        raise InvalidInput(f"{name!r}: the layer has {n} {what} (0 to {n - 1})")
    return index


# ------------------------------------------------------------------------------------------------ finding the map

_READERS: dict[str | type, Callable[[Any], BlockMap]] = {}


def register_block_map(key: str | type, reader: Callable[[Any], BlockMap]) -> None:
    """Teach :func:`block_map` an architecture.

    Args:
        key: a module class (subclasses too) or a Hugging Face ``config.model_type``; a later registration wins.
        reader: ``(model) -> BlockMap``.

    Example:
        >>> import torch
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding(7, 4)
        ...         self.qkvo = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
        ...         self.unembed = torch.nn.Linear(4, 7)
        >>> def read(model):
        ...     q, k, v, o = (Linear(part.weight.T, part.bias) for part in model.qkvo)
        ...     block = Block(attention=Attention(n_heads=2, head_dim=2, q=q, k=k, v=v, o=o))
        ...     head = (Linear(model.unembed.weight.T, model.unembed.bias),)
        ...     return BlockMap(model, (block,), embed=lambda ids, mask: model.embed(ids), head=head)
        >>> register_block_map(Tiny, read)
        >>> block_map(Tiny()).forward(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 7])
    """
    _READERS[key] = reader


def block_map(model: nn.Module) -> BlockMap:
    """The block map of a model.

    Args:
        model: a Hugging Face decoder or encoder, or any module whose class is registered.

    Raises:
        UnsupportedModel: no reader for it; the message names the modules found and how to register one.
    """
    for cls in type(model).__mro__:
        if cls in _READERS:
            return _READERS[cls](model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _READERS:
        return _READERS[model_type](model)
    types = sorted({type(m).__name__ for m in model.modules() if m is not model})
    inner = [name for name in types if re.search("attention|block|layer|mlp|norm", name, re.IGNORECASE)] or types
    supported = ", ".join(sorted(key for key in _READERS if isinstance(key, str)))
    raise UnsupportedModel(
        f"{type(model).__name__}: its blocks are unknown (modules found: {', '.join(inner[:12]) or 'none'}). "
        f"Supported Hugging Face model types: {supported}. For another module write a function that gives a "
        f"broadsheet.nn.blocks.BlockMap and call register_block_map({type(model).__name__}, function)"
    )


# ------------------------------------------------------------------------------------------- Hugging Face families


class _Reader:
    """What the readers below share: names of submodules, matrices and heads of one Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.base: Any = getattr(model, "base_model", model)
        self.names = {id(module): name for name, module in model.named_modules()}

    def site(
        self, module: nn.Module, at: str = "output", index: slice | tuple[int, ...] | None = None, **more: Any
    ) -> Site:
        return Site(self.names[id(module)], at, index, **more)

    def linear(self, module: nn.Module) -> Linear:
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, Conv1D):
            return Linear(module.weight, module.bias)
        if isinstance(module, nn.Linear):
            return Linear(module.weight.T, module.bias)
        raise UnsupportedModel(
            f"{self.names.get(id(module), 'a layer')!r} is a {type(module).__name__}, not a plain linear layer: "
            "merge adapters (merge_and_unload) or load the model unquantized first"
        )

    def eager_softmax(self) -> torch.dtype | None:
        """Eager attention of most families takes the softmax in float32 whatever the model's precision."""
        return torch.float32 if getattr(self.config, "_attn_implementation", None) == "eager" else None

    def activation(self, function: Any) -> Callable[[Tensor], Tensor]:
        """The same function, where it is written out in eight steps as the one kernel that torch has for it."""
        return partial(F.gelu, approximate="tanh") if type(function).__name__ == "NewGELUActivation" else function

    def norm(self, module: nn.Module | None) -> Norm | None:
        if module is None:
            return None
        if isinstance(module, nn.LayerNorm):
            return Norm("layer", module.weight, module.bias, module.eps, module)
        name, weight = type(module).__name__, getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in name or weight is None or eps is None:
            raise UnsupportedModel(f"{self.names[id(module)]!r} is a {name}: neither a LayerNorm nor an RMSNorm")
        return Norm("rms", 1 + weight if name.startswith("Gemma") else weight, None, float(eps), module)

    def sites(
        self, layer: nn.Module, q: Any, k: Any, v: Any, o: nn.Module, w_out: nn.Module, **more: Any
    ) -> dict[str, Site]:
        fused = {
            name: part if isinstance(part, Site) else self.site(part)
            for name, part in zip("qkv", (q, k, v), strict=True)
        }
        return {
            "resid_pre": self.site(layer, "input"),
            **{f"attn.{name}": site for name, site in fused.items()},
            "attn.z": self.site(o, "input"),
            "attn": self.site(o),
            "mlp.act": self.site(w_out, "input", **more),
            "mlp": self.site(w_out, **more),
            "resid_post": self.site(layer),
        }

    def head(self) -> tuple[HeadStep, ...]:
        """What stands on the base model."""
        model, base = self.model, self.base
        if model is base:
            return ()
        if isinstance(getattr(model, "lm_head", None), nn.Linear):
            return (self.linear(model.lm_head),)
        if isinstance(getattr(model, "embed_out", None), nn.Linear):
            return (self.linear(model.embed_out),)
        if isinstance(getattr(model, "score", None), nn.Linear) and "SequenceClassification" in type(model).__name__:
            return self.linear(model.score), Pool("last", getattr(self.config, "pad_token_id", None))
        raise UnsupportedModel(
            f"{type(model).__name__}: the head on its {type(base).__name__} is unknown. Hand in the base model "
            f"(model.base_model), or register_block_map({type(model).__name__}, function)"
        )


def _gpt2(model: nn.Module) -> BlockMap:
    read = _Reader(model)
    base, config = read.base, read.config
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"{type(model).__name__} with cross-attention: only decoders and encoders of their own")
    width, heads = config.hidden_size, config.num_attention_heads
    upcast = read.eager_softmax() if config.reorder_and_upcast_attn else None

    def block(layer: Any) -> Block:
        fused = read.linear(layer.attn.c_attn)
        parts = [slice(i * width, (i + 1) * width) for i in range(3)]
        q, k, v = (fused.columns(part) for part in parts)
        attention = Attention(
            heads,
            width // heads,
            q,
            k,
            v,
            read.linear(layer.attn.c_proj),
            float(layer.attn.scaling),
            softmax_dtype=upcast,
        )
        mlp = MLP(read.linear(layer.mlp.c_fc), read.linear(layer.mlp.c_proj), read.activation(layer.mlp.act))
        where = [read.site(layer.attn.c_attn, index=part) for part in parts]
        sites = read.sites(layer, *where, o=layer.attn.c_proj, w_out=layer.mlp.c_proj)
        return Block(attention, mlp, read.norm(layer.ln_1), read.norm(layer.ln_2), "sequential", sites)

    def embed(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None = None) -> Tensor:
        x = base.wte(input_ids) + base.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))[None]
        return x if token_type_ids is None else x + base.wte(token_type_ids)

    return BlockMap(model, tuple(map(block, base.h)), embed, read.norm(base.ln_f), read.head())


def _gpt_neo(model: nn.Module) -> BlockMap:
    read = _Reader(model)
    base, config = read.base, read.config

    def block(layer: Any) -> Block:
        attn = layer.attn.attention
        attention = Attention(
            attn.num_heads, attn.head_dim,
            read.linear(attn.q_proj), read.linear(attn.k_proj), read.linear(attn.v_proj), read.linear(attn.out_proj),
            1.0, window=config.window_size if layer.attn.attention_type == "local" else None, score_dtype=torch.float32,
        )  # fmt: skip
        mlp = MLP(read.linear(layer.mlp.c_fc), read.linear(layer.mlp.c_proj), read.activation(layer.mlp.act))
        sites = read.sites(layer, attn.q_proj, attn.k_proj, attn.v_proj, o=attn.out_proj, w_out=layer.mlp.c_proj)
        return Block(attention, mlp, read.norm(layer.ln_1), read.norm(layer.ln_2), "sequential", sites)

    def embed(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return base.wte(input_ids) + base.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))[None]

    return BlockMap(model, tuple(map(block, base.h)), embed, read.norm(base.ln_f), read.head())


def _rotary(module: Any, x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine from the model's own module, for positions 0, 1, 2, ..."""
    return module(x, torch.arange(x.shape[1], device=x.device)[None], **more)


def _gpt_neox(model: nn.Module) -> BlockMap:
    read = _Reader(model)
    base, config = read.base, read.config
    heads = config.num_attention_heads
    size = config.hidden_size // heads

    def block(layer: Any) -> Block:
        attn = layer.attention
        fused = read.linear(attn.query_key_value)  # head after head, each with its own q, k, v
        parts = [[h * 3 * size + part * size + i for h in range(heads) for i in range(size)] for part in range(3)]
        q, k, v = (fused.columns(part) for part in parts)
        attention = Attention(
            heads, size, q, k, v, read.linear(attn.dense), float(attn.scaling),
            rotary=True, softmax_dtype=read.eager_softmax(),
        )  # fmt: skip
        mlp = MLP(
            read.linear(layer.mlp.dense_h_to_4h), read.linear(layer.mlp.dense_4h_to_h), read.activation(layer.mlp.act)
        )
        where = [read.site(attn.query_key_value, index=tuple(part)) for part in parts]
        sites = read.sites(layer, *where, o=attn.dense, w_out=layer.mlp.dense_4h_to_h)
        scheme = "parallel" if layer.use_parallel_residual else "sequential"
        return Block(
            attention, mlp, read.norm(layer.input_layernorm), read.norm(layer.post_attention_layernorm), scheme, sites
        )

    return BlockMap(
        model,
        tuple(map(block, base.layers)),
        lambda input_ids, attention_mask: base.embed_in(input_ids),
        read.norm(base.final_layer_norm),
        read.head(),
        partial(_rotary, base.rotary_emb),
    )


def _llama_like(model: nn.Module) -> BlockMap:
    """Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3: gated MLP, RMSNorm, rotary positions, shared key and value heads."""
    read = _Reader(model)
    base, config = read.base, read.config
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(f"{type(model).__name__} with bidirectional attention: only causal decoders")

    def block(layer: Any) -> Block:
        attn = layer.self_attn
        window = getattr(attn, "sliding_window", None)
        if config.model_type == "mistral":
            window = config.sliding_window
        attention = Attention(
            config.num_attention_heads, attn.head_dim,
            read.linear(attn.q_proj), read.linear(attn.k_proj), read.linear(attn.v_proj), read.linear(attn.o_proj),
            float(attn.scaling), config.num_key_value_heads,
            causal=bool(attn.is_causal), rotary=True, window=window, softmax_dtype=read.eager_softmax(),
            q_norm=read.norm(getattr(attn, "q_norm", None)), k_norm=read.norm(getattr(attn, "k_norm", None)),
            # Gemma 3 has the attribute but hands nothing on to its attention; its published configurations have None.
            softcap=getattr(attn, "attn_logit_softcapping", None) if config.model_type == "gemma2" else None,
            positions=partial(_rotary, base.rotary_emb, layer_type=attn.layer_type) if by_layer_type else None,
        )  # fmt: skip
        mlp = MLP(
            read.linear(layer.mlp.up_proj), read.linear(layer.mlp.down_proj), read.activation(layer.mlp.act_fn),
            w_gate=read.linear(layer.mlp.gate_proj),
        )  # fmt: skip
        sites = read.sites(layer, attn.q_proj, attn.k_proj, attn.v_proj, o=attn.o_proj, w_out=layer.mlp.down_proj)
        before = getattr(layer, "pre_feedforward_layernorm", None)
        if before is None:
            norms = read.norm(layer.input_layernorm), read.norm(layer.post_attention_layernorm)
            return Block(attention, mlp, *norms, "sequential", sites)
        norms = read.norm(layer.input_layernorm), read.norm(before)
        after = read.norm(layer.post_attention_layernorm), read.norm(layer.post_feedforward_layernorm)
        return Block(attention, mlp, *norms, "sequential", sites, *after)

    def embed(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = base.embed_tokens(input_ids)
        if config.model_type.startswith("gemma") and not hasattr(base.embed_tokens, "embed_scale"):
            x = x * torch.tensor(math.sqrt(config.hidden_size), dtype=x.dtype)  # releases that scale outside the module
        return x

    by_layer_type = config.model_type == "gemma3_text"
    head, cap = read.head(), getattr(config, "final_logit_softcapping", None)
    if cap is not None and hasattr(model, "lm_head"):  # classifiers on the same base are not capped
        head = (*head, Activation(partial(softcap, cap=float(cap))))
    return BlockMap(
        model,
        tuple(map(block, base.layers)),
        embed,
        read.norm(base.norm),
        head,
        None if by_layer_type else partial(_rotary, base.rotary_emb),
    )


def _opt(model: nn.Module) -> BlockMap:
    read = _Reader(model)
    config = read.config
    decoder = getattr(read.base, "decoder", read.base)

    def block(layer: Any) -> Block:
        attn = layer.self_attn
        attention = Attention(
            attn.num_heads, attn.head_dim,
            read.linear(attn.q_proj), read.linear(attn.k_proj), read.linear(attn.v_proj), read.linear(attn.out_proj),
            float(attn.scaling), softmax_dtype=read.eager_softmax(),
        )  # fmt: skip
        mlp = MLP(read.linear(layer.fc1), read.linear(layer.fc2), read.activation(layer.activation_fn))
        sites = read.sites(
            layer, attn.q_proj, attn.k_proj, attn.v_proj, o=attn.out_proj, w_out=layer.fc2,
            tokens_of=read.names[id(layer)],
        )  # fmt: skip
        norms = read.norm(layer.self_attn_layer_norm), read.norm(layer.final_layer_norm)
        return Block(attention, mlp, *norms, "sequential" if config.do_layer_norm_before else "post", sites)

    def embed(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        x = decoder.embed_tokens(input_ids)
        x = x if decoder.project_in is None else decoder.project_in(x)
        return x + decoder.embed_positions(mask)

    project: tuple[HeadStep, ...] = () if decoder.project_out is None else (read.linear(decoder.project_out),)
    final = read.norm(decoder.final_layer_norm)
    return BlockMap(model, tuple(map(block, decoder.layers)), embed, final, project + read.head())


def _bert(model: nn.Module) -> BlockMap:
    """BERT and RoBERTa: norms after each sum, all positions see each other."""
    read = _Reader(model)
    base, config = read.base, read.config
    heads = config.num_attention_heads
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"{type(model).__name__} with cross-attention: only decoders and encoders of their own")

    def block(layer: Any) -> Block:
        attn, out = layer.attention.self, layer.attention.output
        attention = Attention(
            heads, attn.attention_head_size,
            read.linear(attn.query), read.linear(attn.key), read.linear(attn.value), read.linear(out.dense),
            causal=bool(config.is_decoder),
        )  # fmt: skip
        mlp = MLP(
            read.linear(layer.intermediate.dense),
            read.linear(layer.output.dense),
            read.activation(layer.intermediate.intermediate_act_fn),
        )
        sites = read.sites(layer, attn.query, attn.key, attn.value, o=out.dense, w_out=layer.output.dense)
        return Block(attention, mlp, read.norm(out.LayerNorm), read.norm(layer.output.LayerNorm), "post", sites)

    def embed(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None = None) -> Tensor:
        with evaluating(base.embeddings):  # its dropout
            return base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)

    return BlockMap(model, tuple(map(block, base.encoder.layer)), embed, None, _bert_head(read))


def _vit(model: nn.Module) -> BlockMap:
    """Vision transformers: the class token is position 0, patches follow row by row."""
    read = _Reader(model)
    base, config = read.base, read.config

    def block(layer: Any) -> Block:
        attn = layer.attention
        attention = Attention(
            config.num_attention_heads, attn.head_dim,
            read.linear(attn.q_proj), read.linear(attn.k_proj), read.linear(attn.v_proj), read.linear(attn.o_proj),
            float(attn.scaling), causal=False, softmax_dtype=read.eager_softmax(),
        )  # fmt: skip
        mlp = MLP(read.linear(layer.mlp.fc1), read.linear(layer.mlp.fc2), read.activation(layer.mlp.activation_fn))
        sites = read.sites(layer, attn.q_proj, attn.k_proj, attn.v_proj, o=attn.o_proj, w_out=layer.mlp.fc2)
        norms = read.norm(layer.layernorm_before), read.norm(layer.layernorm_after)
        return Block(attention, mlp, *norms, "sequential", sites)

    def embed(pixel_values: Tensor, attention_mask: Tensor | None) -> Tensor:
        with evaluating(base.embeddings):  # its dropout
            return base.embeddings(pixel_values.to(base.embeddings.cls_token.dtype))

    size = config.patch_size
    head: tuple[HeadStep, ...] = ()
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        head = Pool("first"), read.linear(read.model.classifier)
    elif model is not base:
        raise UnsupportedModel(f"{type(model).__name__}: its head is unknown. Hand in model.vit instead")
    return BlockMap(
        model, tuple(map(block, base.layers)), embed, read.norm(base.layernorm), head,
        patches=lambda x: 1 + (x.shape[-2] // size) * (x.shape[-1] // size),
    )  # fmt: skip


def _bert_head(read: _Reader) -> tuple[HeadStep, ...]:
    model, base = read.model, read.base
    if model is base:
        return ()
    pooler = getattr(base, "pooler", None)
    pooled: tuple[HeadStep, ...] = ()
    if pooler is not None:
        pooled = (Pool("first"), read.linear(pooler.dense), Activation(pooler.activation))
    kind = type(model).__name__
    classifier: Any = getattr(model, "classifier", None)
    if hasattr(getattr(model, "cls", None), "predictions") and "PreTraining" not in kind:
        predictions = model.cls.predictions
        transform = predictions.transform
        norm = read.norm(transform.LayerNorm)
        assert norm is not None
        steps = read.linear(transform.dense), Activation(transform.transform_act_fn), norm
        return *steps, read.linear(predictions.decoder)
    if kind == "RobertaForMaskedLM":
        norm = read.norm(model.lm_head.layer_norm)
        assert norm is not None
        steps = read.linear(model.lm_head.dense), Activation(nn.functional.gelu), norm
        return *steps, read.linear(model.lm_head.decoder)
    if kind == "RobertaForSequenceClassification":
        return Pool("first"), read.linear(classifier.dense), Activation(torch.tanh), read.linear(classifier.out_proj)
    if kind.endswith("ForSequenceClassification") and isinstance(classifier, nn.Linear) and pooled:
        return *pooled, read.linear(classifier)
    if kind.endswith("ForTokenClassification") and isinstance(classifier, nn.Linear):
        return (read.linear(classifier),)
    return read.head()


for _type, _reader in {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma": _llama_like,
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "opt": _opt,
    "gpt_neo": _gpt_neo,
    "bert": _bert,
    "roberta": _bert,
    "vit": _vit,
}.items():
    register_block_map(_type, _reader)
