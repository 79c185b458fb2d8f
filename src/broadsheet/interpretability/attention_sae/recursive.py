"""A feature followed back, layer by layer, to earlier features, heads, MLPs and tokens.

Direct feature attribution ends at the values that heads read at source tokens. A value is a linear function of the
normalized residual stream there; with the norm held at its scale in this run it is linear in what earlier parts wrote,
so each of them has an exact share: the token's embedding, MLPs (or the features of an autoencoder of an MLP), earlier
heads or features of earlier attention autoencoders. Heads and attention features are followed further in the same way,
their pattern held. The children of a node sum to it.

Source: arXiv:2406.17759, section 4.3. The authors' code leaves the norm's scale out, which keeps the order of the parts
at one token but not their sum; here it is kept.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE
from broadsheet.nn.attribution import back_through, norm_scale, place_of
from broadsheet.nn.blocks import Block, BlockMap, LayerTotals, Linear
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class AttributionNode:
    """A part at one token and what it gave to the feature at the root.

    Attributes:
        name: ``"layers.1.attn.z.latent.7"``, ``"layers.0.attn.head.2"``, ``"layers.0.mlp"``, ``"embed"``, ``"error of
            layers.0.attn.z"``, ``"bias"``, or ``"rest"`` for all smaller parts together.
        position: column of the text; -1 for biases and rests, which stand at no token.
        value: its share of the root's pre-activation.
        children: what it is made of; empty where it was not followed further.
    """

    name: str
    position: int
    value: float
    children: tuple["AttributionNode", ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, "AttributionNode"]]:
        """This node and all below it, each with its depth."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    @property
    def leaves(self) -> Iterator["AttributionNode"]:
        return (node for _, node in self.walk() if not node.children)


@dataclass(frozen=True)
class AttributionTree:
    """A feature's activation at one token, taken apart.

    Attributes:
        root: the feature; its value is its pre-activation.
        token_ids: of the text.
    """

    root: AttributionNode
    token_ids: tuple[int, ...] = field(default=())

    @property
    def by_token(self) -> Float[Tensor, " time"]:
        """What the leaves at every token sum to; biases and rests stand at none."""
        total = torch.zeros(len(self.token_ids), dtype=torch.float64)
        for leaf in self.root.leaves:
            if leaf.position >= 0:
                total[leaf.position] += leaf.value
        return total

    def to_frame(self) -> pd.DataFrame:
        """One row for each node, parents before children: ``depth``, ``name``, ``position``, ``value``, ``leaf``."""
        rows = [(depth, n.name, n.position, n.value, not n.children) for depth, n in self.root.walk()]
        return pd.DataFrame(rows, columns=["depth", "name", "position", "value", "leaf"])

    def to_text(self, tokens: list[str] | None = None) -> str:
        """The tree as indented lines.

        Args:
            tokens: of the text; None shows positions only.
        """
        lines = []
        for depth, node in self.root.walk():
            where = ""
            if node.position >= 0:
                where = f" at {node.position}" + (f" {tokens[node.position]!r}" if tokens is not None else "")
            lines.append(f"{'  ' * depth}{node.value:+.4g}  {node.name}{where}")
        return "\n".join(lines)

    def plot(self, tokens: list[str] | None = None, ax: Any = None) -> Any:
        """Parts as rows, the feature on top, over the tokens; lines go from a part to what it is made of.

        Args:
            tokens: of the text, to label the axis.
            ax: matplotlib axes.
        """
        from broadsheet.nn.plotting import COLOURS, INK, new_axes

        time = len(self.token_ids)
        placed = [node for _, node in self.root.walk() if node.position >= 0]
        rows = sorted({node.name for node in placed} - {self.root.name}, key=_order)
        row = {name: -i for i, name in enumerate([self.root.name, *rows])}
        ax = new_axes(ax, figsize=(max(6.0, 0.42 * time), 1.2 + 0.36 * len(row)))
        most = max(abs(node.value) for node in placed) or 1.0

        def draw(node: AttributionNode) -> None:
            for child in node.children:
                if child.position < 0:
                    continue
                colour, size = COLOURS["ours" if child.value > 0 else "baseline"], abs(child.value) / most
                x, y = (node.position, child.position), (row[node.name], row[child.name])
                ax.plot(x, y, color=colour, lw=0.5 + 4 * size, alpha=0.45, solid_capstyle="round", zorder=2)
                ax.plot(x[1], y[1], "o", color=colour, ms=3 + 8 * size, mec="white", mew=0.6, zorder=3)
                draw(child)

        draw(self.root)
        ax.plot(self.root.position, 0, "o", color=INK, ms=9, zorder=4)
        ax.set_yticks(list(row.values()), list(row), fontsize=8)
        ax.set_ylim(-len(row) + 0.5, 0.6)
        ax.set_xlim(-0.6, time - 0.4)
        labels = tokens if tokens is not None else [str(i) for i in self.token_ids]
        ax.set_xticks(range(time), [label.replace("$", r"\$") for label in labels], rotation=60, ha="right", fontsize=8)
        return ax


def _order(name: str) -> tuple[int, str]:
    """Later layers first, tokens last."""
    found = re.search(r"layers\.(\d+)", name)
    return (-int(found[1]) if found else 1, name)


@torch.no_grad()
def recursive_dfa(
    model: nn.Module | BlockMap,
    sae: AttentionSAE,
    input_ids: Int[Tensor, "batch time"],
    feature: int,
    position: int | None = None,
    attention_mask: Tensor | None = None,
    *,
    earlier: Mapping[str, SparseAutoencoder] | None = None,
    depth: int = 3,
    top: int = 5,
    threshold: float | int = 0.01,
) -> AttributionTree:
    """Follow a feature's activation back to tokens.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        sae: of the layer that is looked at.
        input_ids: ``[1, time]``, one text.
        feature: of ``sae``.
        position: column of ``input_ids``; None for where the feature is most active.
        attention_mask: ``[1, time]``; padding on either side.
        earlier: autoencoders of earlier places: ``"layers.2.attn.z"`` (:class:`AttentionSAE`; its features take the
            place of heads), ``"layers.2.mlp"`` (its features take the place of the MLP), ``"layers.5.resid_pre"`` (its
            features take the place of everything before layer 5).
        depth: steps back through attention.
        top: parts that are kept for each node; the others are summed up as ``"rest"``.
        threshold: the least share, of the root's absolute value, of a part that is kept.

    Raises:
        InvalidInput: several texts, a feature or position that is not there, or an autoencoder at a place that is not
            followed.
    """
    if len(input_ids) != 1:
        raise InvalidInput(f"input_ids holds {len(input_ids)} texts: hand in one, [1, time]")
    for name, value, least in (("depth", depth, 1), ("top", top, 1), ("threshold", threshold, 0)):
        if value < least:
            raise InvalidInput(f"{name}={value}: must be at least {least}")
    the_map = sae.check_model(model)
    sae.check_feature(feature)
    padded = right_padded(input_ids, attention_mask)
    with evaluating(the_map.model):
        totals = the_map.forward(padded.input_ids, padded.attention_mask, cache=True)[1]
    walker = _Walker(the_map, totals.layers, dict(earlier or {}), top, float(threshold))
    z = walker.wide(totals.layers[sae.layer].z)[0]
    value = torch.einsum("thd,hd->t", z, sae.readers[feature].to(z)) + sae.constants[feature].to(z)
    if position is None:
        at = int(value[: int(padded.last[0]) + 1].argmax())
    else:
        at = int(place_of(padded, position)[0])
    offset = int(padded.offset[0])
    walker.offset, walker.least = offset, float(threshold) * abs(float(value[at]))
    constant = float(sae.constants[feature])
    children = walker.follow(sae.layer, at, sae.readers[feature].to(z), constant, depth)
    root = AttributionNode(f"{sae.site}.latent.{feature}", at + offset, float(value[at]), children)
    return AttributionTree(root, tuple(input_ids[0].tolist()))


@dataclass
class _Part:
    """A part that may be kept, and how to follow it: layer and what is read from that layer's heads."""

    name: str
    position: int
    value: float
    layer: int = -1
    reader: Tensor | None = None
    constant: float = 0.0


class _Walker:
    """One forward pass, and the way back through it."""

    def __init__(
        self, the_map: BlockMap, layers: list[LayerTotals], earlier: dict[str, Any], top: int, threshold: float
    ) -> None:
        self.map, self.layers, self.earlier, self.top = the_map, layers, earlier, top
        self.offset, self.least = 0, threshold
        known = {f"layers.{i}.{part}" for i in range(len(layers)) for part in ("attn.z", "mlp", "resid_pre")}
        for site, sae in earlier.items():
            if site not in known:
                raise InvalidInput(f"earlier[{site!r}]: expected places such as 'layers.0.attn.z', 'layers.0.mlp' or "
                                   "'layers.1.resid_pre'")  # fmt: skip
            if site.endswith("attn.z"):
                if not isinstance(sae, AttentionSAE):
                    raise InvalidInput(f"earlier[{site!r}] is a {type(sae).__name__}: an AttentionSAE is expected")
                sae.check_model(the_map)

    def wide(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def follow(self, layer: int, at: int, reader: Tensor, constant: float, depth: int) -> tuple[AttributionNode, ...]:
        """What a reading of a layer's heads at one token is made of; the parts kept are followed further."""
        parts, bias = self.parts(layer, at, reader)
        bias += constant
        parts.sort(key=lambda part: -abs(part.value))
        kept = [part for part in parts[: self.top] if abs(part.value) >= self.least]
        rest = sum(part.value for part in parts) - sum(part.value for part in kept)
        nodes = []
        for part in kept:
            below: tuple[AttributionNode, ...] = ()
            if depth > 1 and part.reader is not None:
                below = self.follow(part.layer, part.position, part.reader, part.constant, depth - 1)
            nodes.append(AttributionNode(part.name, part.position + self.offset, part.value, below))
        if len(kept) < len(parts):
            nodes.append(AttributionNode("rest", -1, rest))
        return (*nodes, AttributionNode("bias", -1, bias))

    def parts(self, layer: int, at: int, reader: Tensor) -> tuple[list[_Part], float]:
        """Shares of everything that stands before a layer, and that of the biases.

        ``reader [heads, d_head]`` reads the heads' outputs at position ``at``. Directions below have one row for each
        source position.
        """
        attention, block, totals = self.map.blocks[layer].attention, self.map.blocks[layer], self.layers[layer]
        assert attention is not None
        pattern = self.wide(totals.pattern)[0, :, at]  # [head, source]
        time = pattern.shape[1]
        values = self._values(layer).to(reader)  # [d_model, head, d_head]
        to_input = torch.einsum("hd,mhd->hm", reader, values)
        direction = torch.einsum("hs,hm->sm", pattern, to_input)[:, None]  # at the normalized stream of every source
        bias = direction.new_zeros(time, 1)
        if attention.v.bias is not None:
            b = attention.repeated(attention.v.bias.to(reader).unflatten(0, (-1, attention.head_dim)))
            bias = bias + torch.einsum("hs,hd,hd->s", pattern, reader, b)[:, None]
        size = direction.new_ones(time)
        stream = self.wide(totals.resid_pre)[0]
        if block.scheme != "post" and block.norm1 is not None:
            direction, size, bias = back_through(block.norm1, direction, size, bias, norm_scale(block.norm1, stream))
        parts: list[_Part] = []
        site = f"layers.{layer}.resid_pre"
        if site in self.earlier:
            parts += self._latents(site, stream, direction[:, 0] * size[:, None], f"{site}.latent")
            return parts, float(bias.sum())
        for i in reversed(range(layer)):
            direction, size, bias, found = self._block(i, direction, size, bias)
            parts += found
        first = self.wide(self.layers[0].resid_pre)[0]
        given = size * torch.einsum("sm,sm->s", first, direction[:, 0])
        parts += [_Part("embed", s, v) for s, v in enumerate(given.tolist()) if v]
        return parts, float(bias.sum())

    def _block(
        self, i: int, direction: Tensor, size: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[_Part]]:
        """Back through one block: directions before it, and the shares of its parts at every source."""
        block, t = self.map.blocks[i], self.layers[i]
        parts: list[_Part] = []
        if block.mlp is not None and t.mlp_out is not None:
            if block.scheme == "post":
                direction, size, bias = self._norm(block, "norm2", t.mlp_sum, direction, size, bias)
            inner, by, bias = self._norm(block, "out_norm2", t.mlp_out, direction, size, bias)
            out, row = self.wide(t.mlp_out)[0], inner[:, 0] * by[:, None]
            site = f"layers.{i}.mlp"
            if site in self.earlier:
                parts += self._latents(site, out, row, f"{site}.latent")
            else:
                given = torch.einsum("sm,sm->s", out, row)
                parts += [_Part(site, s, v) for s, v in enumerate(given.tolist()) if v]
        if block.attention is not None and t.attn_out is not None:
            if block.scheme == "post":
                direction, size, bias = self._norm(block, "norm1", t.attn_sum, direction, size, bias)
            inner, by, bias = self._norm(block, "out_norm1", t.attn_out, direction, size, bias)
            row = inner[:, 0] * by[:, None]
            o: Linear = block.attention.o
            if o.bias is not None:
                bias = bias + (row @ o.bias.to(row))[:, None]
            parts += self._attention(i, row @ o.weight.to(row).T)
        return direction, size, bias, parts

    def _norm(
        self, block: Block, name: str, x: Tensor | None, direction: Tensor, size: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm = getattr(block, name)
        scale = None if norm is None else norm_scale(norm, self.wide(x)[0])
        return back_through(norm, direction, size, bias, scale)

    def _attention(self, i: int, row: Tensor) -> list[_Part]:
        """Heads or features of an earlier layer; ``row [source, heads * d_head]`` reads its outputs there."""
        z = self.wide(self.layers[i].z)[0]
        apart = row.unflatten(-1, z.shape[1:])
        site = f"layers.{i}.attn.z"
        if site not in self.earlier:
            given = torch.einsum("shd,shd->sh", z, apart)
            return [
                _Part(f"layers.{i}.attn.head.{h}", s, v, i, _only(apart[s], h))
                for s, shares in enumerate(given.tolist())
                for h, v in enumerate(shares)
                if v
            ]
        return self._latents(site, z.flatten(1), row, f"{site}.latent", i)

    def _latents(self, site: str, x: Tensor, row: Tensor, name: str, layer: int = -1) -> list[_Part]:
        """Features of an autoencoder at every source, what it leaves out, and its bias."""
        sae: SparseAutoencoder = self.earlier[site]
        f = sae.encode(x.to(sae.W_enc)).to(row)
        written = sae.W_dec.detach().to(row)
        shares = f * (row @ written.T)
        error = x.to(row) - f @ written - (sae.b_dec / sae._scale).detach().to(row)
        missed = torch.einsum("sm,sm->s", error, row)
        parts = [_Part(f"error of {site}", s, v) for s, v in enumerate(missed.tolist()) if v]
        by_bias = row @ (sae.b_dec / sae._scale).detach().to(row)
        parts += [_Part(f"bias of {site}", s, v) for s, v in enumerate(by_bias.tolist()) if v]
        for s, j in shares.nonzero().tolist():
            part = _Part(f"{name}.{j}", s, float(shares[s, j]), layer)
            if layer >= 0 and isinstance(sae, AttentionSAE):
                # An active feature is its pre-activation: what makes that up makes up its share, in proportion.
                ratio = shares[s, j] / f[s, j]
                part.reader = sae.readers[j].to(row) * ratio
                part.constant = float(sae.constants[j].to(row) * ratio)
            parts.append(part)
        return parts

    def _values(self, layer: int) -> Tensor:
        """The value matrices of a layer, shared heads repeated: ``[d_model, head, d_head]``."""
        attention = self.map.blocks[layer].attention
        assert attention is not None
        return attention.repeated(attention.v.weight.unflatten(-1, (-1, attention.head_dim)))


def _only(reader: Tensor, head: int) -> Tensor:
    one = torch.zeros_like(reader)
    one[head] = reader[head]
    return one
