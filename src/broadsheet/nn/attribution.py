"""Direct logit attribution: what every head, MLP and the embedding add to a logit by themselves, with norms frozen.

The last residual stream is a sum of what the parts of a model wrote. With the scale of the final norm held at its value
on the prompt, logits are linear in that stream, so each part has a share, and the shares sum to the logits exactly.
Norms of a branch's own output (Gemma 2 and 3) and norms after a sum (``"post"`` blocks) are held in the same way; a
soft cap at the end is left off: what is attributed is the logit before it. Source: arXiv:2307.09458.

    parts = direct_parts(model, input_ids)          # one forward pass, the last token of every prompt
    shares = parts.attribute(answers)               # [batch, layer, head, answer] and so on
    shares.total                                    # the logits of the answers
"""

import re
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.blocks import Activation, BlockMap, Linear, Norm, Pool, block_map
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import RightPadded, right_padded


@dataclass(frozen=True)
class Attribution:
    """Every part's share of the logits of some answers, in float32 at least.

    Attributes:
        heads: ``[batch, layer, head, answer]``, without the bias that the heads of a layer share.
        mlps: ``[batch, layer, answer]``, with the MLP's own bias.
        embed: ``[batch, answer]``, by tokens and learned positions.
        attn_bias: ``[batch, layer, answer]``, by the output matrices' biases.
        bias: ``[batch, answer]``, by the biases of norms and head.
        rounding: ``[batch, answer]``, what the model's own rounding took (a residual stream in half precision, norms
            that compute in single precision whatever the model's); else about 0.
        neurons: ``[batch, layer, unit, answer]``, shares of an MLP's hidden units, where asked for.
        sources: ``[batch, layer, head, time, answer]``, each head's share by the token it read, where asked for.
        answer: ``[batch]``, which of the answers is right, where known.
    """

    heads: Float[Tensor, "batch layers heads answers"]
    mlps: Float[Tensor, "batch layers answers"]
    embed: Float[Tensor, "batch answers"]
    attn_bias: Float[Tensor, "batch layers answers"]
    bias: Float[Tensor, "batch answers"]
    rounding: Float[Tensor, "batch answers"]
    neurons: Tensor | None = None
    sources: Tensor | None = None
    answer: Int[Tensor, " batch"] | None = None

    @property
    def total(self) -> Float[Tensor, "batch answers"]:
        """The sum of all parts: the logits, before a soft cap."""
        parts = self.heads.sum((1, 2)) + self.mlps.sum(1) + self.embed + self.attn_bias.sum(1)
        return parts + self.bias + self.rounding

    @property
    def names(self) -> list[str]:
        """The nodes in the order of :meth:`nodes`: heads and MLP of every layer."""
        _, layers, heads, _ = self.heads.shape
        return node_names(layers, heads)

    def nodes(self) -> Float[Tensor, "batch nodes answers"]:
        """Shares of heads and MLPs side by side."""
        return torch.cat([self.heads, self.mlps[:, :, None]], 2).flatten(1, 2)

    def centred(self) -> "Attribution":
        """The same less the mean over the answers: what tells one answer from another."""
        fields = {name: value for name, value in vars(self).items() if name != "answer" and value is not None}
        return replace(self, **{name: value - value.mean(-1, keepdim=True) for name, value in fields.items()})

    def effects(self) -> Float[Tensor, "batch nodes"]:
        """Each node's share of the right answer's logit, less its mean over the answers.

        Raises:
            InvalidInput: it is not known which answer is right.
        """
        if self.answer is None:
            raise InvalidInput("the right answers are not known: hand in answer=[batch], indices into the answers")
        nodes = self.centred().nodes()
        return nodes.gather(2, self.answer[:, None, None].expand(-1, nodes.shape[1], 1))[..., 0]

    @property
    def direct_effect(self) -> Float[Tensor, "layers heads"]:
        """Mean over prompts of each head's share of the right answer, centred over the answers."""
        _, layers, heads, _ = self.heads.shape
        return self.effects().mean(0).unflatten(0, (layers, heads + 1))[:, :-1]

    def to_frame(self) -> pd.DataFrame:
        """Columns ``node`` and ``direct_effect`` (mean over prompts), the largest by size first."""
        table = pd.DataFrame({"node": self.names, "direct_effect": self.effects().mean(0).cpu().tolist()})
        return table.sort_values("direct_effect", key=lambda x: -x.abs(), ignore_index=True)


@dataclass(frozen=True)
class _Layer:
    """What one block did at the chosen position of every prompt; None where the block lacks the part."""

    z: Tensor | None  # [batch, head, d]
    attn_out: Tensor | None
    act: Tensor | None
    mlp_out: Tensor | None
    pattern: Tensor | None  # [batch, head, time], where sources are wanted
    v: Tensor | None  # [batch, time, head, d]
    scales: dict[str, Tensor]  # norm -> [batch], what it multiplied by, gain aside


@dataclass(frozen=True)
class DirectParts:
    """One forward pass taken apart at one position of every prompt.

    Attributes:
        block_map: of the model.
        layers: activations of every block there.
        embed: ``[batch, d_model]``, what the first block read.
        final: ``[batch, d_model]``, the residual stream after the last block.
        normed: ``[batch, d_model]``, the same after the model's own final norm.
        scale: ``[batch]``, what the final norm multiplied by, gain aside.
        padded: the prompts as they were run.
    """

    block_map: BlockMap
    layers: tuple[_Layer, ...]
    embed: Float[Tensor, "batch d_model"]
    final: Float[Tensor, "batch d_model"]
    normed: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, " batch"]
    padded: RightPadded

    @property
    def names(self) -> list[str]:
        return node_names(self.block_map.n_layers, self.block_map.n_heads)

    @torch.no_grad()
    def attribute(
        self,
        answers: Tensor,
        *,
        answer: Int[Tensor, " batch"] | None = None,
        frozen: "DirectParts | None" = None,
        neurons: bool = False,
    ) -> Attribution:
        """Shares of the logits of some answers.

        Args:
            answers: token (or class) ids ``[answer]`` or ``[batch, answer]``; or directions in the normalized final
                stream, floating ``[answer, d_model]`` or ``[batch, answer, d_model]``.
            answer: ``[batch]``, which of the answers is right.
            frozen: another run whose norms' scales are taken (what is cut in rounding is then left out); None: this
                run's own.
            neurons: also the share of every hidden unit of the MLPs, ``[batch, layer, unit, answer]``.
        """
        n, held = len(self.embed), frozen or self
        direction, constant = self._directions(answers)
        bias = constant.expand(n, -1)
        size = torch.ones_like(self.scale)
        the_map, wide = self.block_map, self.embed.dtype
        exact = bias + _dot(self.normed, direction)
        direction, size, bias = back_through(the_map.final_norm, direction, size, bias, held.scale)
        n_answers, n_layers = direction.shape[1], the_map.n_layers
        heads = self.embed.new_zeros(n, n_layers, the_map.n_heads, n_answers)
        mlps, attn_bias = heads.new_zeros(n, n_layers, n_answers), heads.new_zeros(n, n_layers, n_answers)
        units = max((block.mlp.w_out.weight.shape[0] for block in the_map.blocks if block.mlp is not None), default=0)
        hidden = heads.new_zeros(n, n_layers, units, n_answers) if neurons else None
        sourced = any(layer.pattern is not None for layer in self.layers)
        time = self.padded.input_ids.shape[1]
        sources = heads.new_zeros(n, n_layers, the_map.n_heads, time, n_answers) if sourced else None
        for i in reversed(range(n_layers)):
            block, layer, scales = the_map.blocks[i], self.layers[i], held.layers[i].scales
            post = block.scheme == "post"
            if block.mlp is not None and layer.mlp_out is not None and layer.act is not None:
                if post:
                    direction, size, bias = back_through(block.norm2, direction, size, bias, scales.get("norm2"))
                inner, by, bias = back_through(block.out_norm2, direction, size, bias, scales.get("out_norm2"))
                mlps[:, i] = by[:, None] * _dot(layer.mlp_out, inner)
                if hidden is not None:
                    written = inner @ block.mlp.w_out.weight.to(wide).T  # [1 or batch, answer, unit]
                    share = layer.act[:, :, None] * written.transpose(1, 2) * by[:, None, None]
                    hidden[:, i, : share.shape[1]] = share
            if block.attention is not None and layer.attn_out is not None and layer.z is not None:
                if post:
                    direction, size, bias = back_through(block.norm1, direction, size, bias, scales.get("norm1"))
                inner, by, bias = back_through(block.out_norm1, direction, size, bias, scales.get("out_norm1"))
                o = block.attention.o
                # The answers through the output matrix first: nothing of the residual stream's size for each head.
                written = (inner @ o.weight.to(wide).T).unflatten(
                    -1, layer.z.shape[1:]
                )  # [1 or batch, answer, head, d]
                share = torch.einsum("bhd,bmhd->bhm", layer.z, written)
                heads[:, i, : share.shape[1]] = by[:, None, None] * share
                if o.bias is not None:
                    attn_bias[:, i] = by[:, None] * (inner @ o.bias.to(wide))
                if sources is not None and layer.pattern is not None and layer.v is not None:
                    share = source_shares(layer.pattern, layer.v, written) * by[:, None, None, None]
                    sources[:, i, : share.shape[1]] = share
        embed = size[:, None] * _dot(self.embed, direction)
        shares = Attribution(
            heads, mlps, embed, attn_bias, bias, torch.zeros_like(embed), hidden, sources,
            None if answer is None else answer.to(embed.device),
        )  # fmt: skip
        return shares if frozen is not None else replace(shares, rounding=exact - shares.total)

    @torch.no_grad()
    def vector(self, name: str) -> Float[Tensor, "batch d_model"]:
        """What one node wrote to the last residual stream, every later norm of a sum at its scale of this run.

        Args:
            name: a head such as ``"layers.3.attn.head.5"``, or an MLP such as ``"layers.3.mlp"``.
        """
        at, head = parse_node(name)
        if at >= self.block_map.n_layers or (head is not None and head >= self.block_map.n_heads):
            raise InvalidInput(f"{name!r}: the model has {self.block_map.n_layers} layers of {self.block_map.n_heads}")
        block, layer = self.block_map.blocks[at], self.layers[at]
        post = block.scheme == "post"
        if head is None:
            if layer.mlp_out is None:
                return torch.zeros_like(self.embed)
            x = _forth(block.out_norm2, layer.mlp_out, layer.scales.get("out_norm2"))
        else:
            if block.attention is None or layer.z is None or head >= layer.z.shape[1]:
                return torch.zeros_like(self.embed)
            matrix = block.attention.o.weight.to(self.embed.dtype).unflatten(0, layer.z.shape[1:])[head]
            x = _forth(block.out_norm1, layer.z[:, head] @ matrix, layer.scales.get("out_norm1"))
            if post:
                x = _forth(block.norm1, x, layer.scales.get("norm1"))
        if post:
            x = _forth(block.norm2, x, layer.scales.get("norm2"))
        for later, scales in zip(self.block_map.blocks[at + 1 :], self.layers[at + 1 :], strict=True):
            if later.scheme == "post":
                x = _forth(later.norm1, x, scales.scales.get("norm1"))
                x = _forth(later.norm2, x, scales.scales.get("norm2"))
        return x

    @torch.no_grad()
    def logits(self, final: Float[Tensor, "batch d_model"], answers: Tensor) -> Float[Tensor, "batch answers"]:
        """Logits of the answers (before a soft cap) of another last residual stream, its norm's scale taken anew."""
        direction, constant = self._directions(answers)
        norm = self.block_map.final_norm
        if norm is None:
            return constant + _dot(final, direction)
        scale = norm_scale(norm, final)
        direction, size, bias = back_through(
            norm, direction, torch.ones_like(scale), constant.expand(len(final), -1), scale
        )
        return bias + size[:, None] * _dot(final, direction)

    def _directions(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The answers as directions after the final norm, ``[1 or batch, answer, d_model]``, and their constants."""
        answers, n = answers.to(self.embed.device), len(self.embed)
        if answers.is_floating_point():
            direction = (answers if answers.ndim == 3 else answers[None]).to(self.embed.dtype)
            if direction.ndim != 3 or direction.shape[0] not in (1, n) or direction.shape[2] != self.embed.shape[1]:
                raise InvalidInput(
                    f"directions of shape {tuple(answers.shape)}: expected [answer, {self.embed.shape[1]}]"
                )
            return direction, direction.new_zeros(direction.shape[:2])
        steps = readable_head(self.block_map)
        vocabulary = steps[-1].weight.shape[1]
        if answers.ndim not in (1, 2) or (answers.ndim == 2 and len(answers) != n):
            raise InvalidInput(f"answers of shape {tuple(answers.shape)}: expected [answer] or [{n}, answer]")
        if answers.numel() == 0 or int(answers.min()) < 0 or int(answers.max()) >= vocabulary:
            raise InvalidInput(f"answers={answers.flatten().tolist()[:8]}: expected ids between 0 and {vocabulary - 1}")
        ids = answers if answers.ndim == 2 else answers[None]
        last = steps[-1]
        direction = last.weight.T[ids].to(self.embed.dtype)
        constant = direction.new_zeros(ids.shape) if last.bias is None else last.bias[ids].to(direction)
        for step in reversed(steps[:-1]):
            if step.bias is not None:
                constant = constant + direction @ step.bias.to(direction)
            direction = direction @ step.weight.to(direction).T
        return direction, constant


@torch.no_grad()
def direct_parts(
    model: nn.Module | BlockMap,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Tensor | None = None,
    positions: int | Tensor | None = None,
    sources: bool = False,
) -> DirectParts:
    """Run the model once and keep what every part wrote at one position of each prompt.

    Args:
        model: any mapped model, or its block map.
        input_ids: ``[batch, time]``.
        attention_mask: ``[batch, time]``; padding on either side, or on none.
        positions: the column of ``input_ids`` to take apart: one, or ``[batch]``; None for each prompt's last token.
        sources: also keep what heads read and from where, for shares by source token.

    Raises:
        InvalidInput: a position beyond the prompt.
    """
    the_map = model if isinstance(model, BlockMap) else block_map(model)
    padded = right_padded(input_ids, attention_mask)
    at = place_of(padded, positions)
    rows = torch.arange(len(at), device=at.device)
    seen: dict[tuple[str, int], Tensor] = {}
    last: list[Tensor] = []  # the final stream as the model holds it
    wanted = {"resid_pre", "z", "attn_out", "act", "mlp_out", "resid_mid", "resid_post"}

    def keep(name: str, layer: int, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if name == "resid_post" and layer == the_map.n_layers - 1:
            last.append(x[rows, at])
        if name in wanted:
            seen[name, layer] = x[rows, at].to(wide)
        elif sources and name == "pattern":
            seen[name, layer] = x[rows, :, at].to(wide)
        elif sources and name == "v":
            seen[name, layer] = x.to(wide)
        return x

    with evaluating(the_map.model):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    layers = []
    for i, block in enumerate(the_map.blocks):
        attn_out, mlp_out, scales = seen.get(("attn_out", i)), seen.get(("mlp_out", i)), {}
        sums = {"norm1": seen["resid_pre", i], "norm2": seen["resid_mid", i]}
        for name, out, norm, own in (
            ("norm1", attn_out, block.norm1, block.out_norm1),
            ("norm2", mlp_out, block.norm2, block.out_norm2),
        ):
            if out is None:
                continue
            added = out
            if own is not None:
                scales[f"out_{name}"] = norm_scale(own, out)
                added = _forth(own, out, scales[f"out_{name}"])
                added = added if own.bias is None else added + own.bias.to(added)
            if block.scheme == "post" and norm is not None:
                scales[name] = norm_scale(norm, sums[name] + added)
        z, act, pattern, v = (seen.get((name, i)) for name in ("z", "act", "pattern", "v"))
        layers.append(_Layer(z, attn_out, act, mlp_out, pattern, v, scales))
    final = seen["resid_post", the_map.n_layers - 1]
    scale = final.new_ones(len(final)) if the_map.final_norm is None else norm_scale(the_map.final_norm, final)
    normed = last[0] if the_map.final_norm is None else the_map.final_norm(last[0])
    return DirectParts(the_map, tuple(layers), seen["resid_pre", 0], final, normed.to(final), scale, padded)


def source_shares(
    pattern: Float[Tensor, "batch heads time"],
    v: Float[Tensor, "batch time heads d"],
    directions: Float[Tensor, "some answers heads d"],
) -> Float[Tensor, "batch heads time answers"]:
    """What a head's output gives to some directions, by the token that the head read it from.

    Args:
        pattern: the heads' attention at one position.
        v: values of all tokens.
        directions: at the heads' outputs, the same for all prompts (``some`` = 1) or for each.
    """
    return pattern[..., None] * torch.einsum("bthd,bmhd->bhtm", v, directions)


def node_names(layers: int, heads: int) -> list[str]:
    """Heads and MLP of every layer, by name."""
    return [
        name
        for layer in range(layers)
        for name in (*(f"layers.{layer}.attn.head.{head}" for head in range(heads)), f"layers.{layer}.mlp")
    ]


def parse_node(name: str) -> tuple[int, int | None]:
    """Layer and head of a node; head None for an MLP."""
    match = re.fullmatch(r"layers\.(\d+)\.(?:attn\.head\.(\d+)|mlp)", name)
    if match is None:
        raise InvalidInput(f"{name!r}: expected a head such as 'layers.0.attn.head.1', or 'layers.0.mlp'")
    return int(match[1]), None if match[2] is None else int(match[2])


def readable_head(the_map: BlockMap) -> list[Linear]:
    """The linear steps of a model's head; a soft cap at the end and pooling are left off.

    Raises:
        UnsupportedModel: no head, or one with a step in between that is not linear (BERT's).
    """
    steps = [step for step in the_map.head if not isinstance(step, Pool)]
    if steps and isinstance(steps[-1], Activation):
        steps = steps[:-1]
    linear = [step for step in steps if isinstance(step, Linear)]
    if not linear or len(linear) < len(steps):
        what = "no head" if not steps else "a head with a step that is not linear"
        raise UnsupportedModel(
            f"{type(the_map.model).__name__} has {what}: hand in a model with a linear head, or directions after the "
            "final norm in place of answers"
        )
    return linear


def place_of(padded: RightPadded, positions: int | Tensor | None) -> Int[Tensor, " batch"]:
    """Columns of the prompts as they came, in columns of the prompts moved to the left; None: each one's last token."""
    if positions is None:
        return padded.last
    n, time = padded.input_ids.shape
    at = torch.as_tensor(positions, device=padded.offset.device).expand(n)
    at = torch.where(at < 0, at + time, at) - padded.offset
    if not bool(((at >= 0) & (at <= padded.last)).all()):
        raise InvalidInput(f"positions={positions}: no token of every prompt stands there")
    return at


def norm_scale(norm: Norm, x: Tensor) -> Tensor:
    """What a norm multiplies ``x [batch, d]`` by, its gain left off: ``[batch]``."""
    return replace(norm, gain=None, module=None).scale(x)[..., 0]


def _dot(x: Tensor, direction: Tensor) -> Tensor:
    return torch.einsum("bd,bmd->bm", x, direction)


def _forth(norm: Norm | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """A frozen norm on ``x [batch, d]``, its bias left off."""
    if norm is None or scale is None:
        return x
    x = norm.centre(x) * scale[:, None]
    return x if norm.gain is None else x * norm.gain.to(x)


def back_through(
    norm: Norm | None, direction: Tensor, size: Tensor, bias: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Directions after a frozen norm as directions before it, their size for each row, and what its bias gives.

    Args:
        norm: None for none.
        direction: ``[1 or rows, answer, d_model]``, of which row ``r`` counts ``size[r]`` times.
        size: ``[rows]``.
        bias: ``[rows, answer]``, what has been given by biases so far.
        scale: ``[rows]``, of :func:`norm_scale`; None leaves everything as it is.

    Returns:
        direction, size and bias before the norm.

    Centring is its own transpose, and the scale is one number for each prompt: the directions stay the same for all.
    """
    if norm is None or scale is None:
        return direction, size, bias
    if norm.bias is not None:
        bias = bias + size[:, None] * (direction @ norm.bias.to(direction))
    gained = direction if norm.gain is None else direction * norm.gain.to(direction)
    return norm.centre(gained), size * scale, bias
