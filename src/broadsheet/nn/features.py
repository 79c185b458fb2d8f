"""A feature of a model's activations in one form, whatever method found it: read it, ablate it, steer with it, name it.

An SAE latent, a factor of a matrix, a code of a codebook, a neuron, a steering vector: each has a *site* (a component's
name as in :mod:`broadsheet.nn.blocks`), a direction that it *writes* there, and a way to *read* how active it is. Every
method hands its findings over as :class:`Feature`, so that each can go to any other.

    feature = sae.feature(17)                       # or snmf.feature(3), neuron(model, "layers.3.mlp.neuron.117")
    feature.activations(model, input_ids)           # [batch, time]
    with feature.ablated(model): model(input_ids)   # without it, everything else kept
    with feature.steered(model, 8.0): model.generate(input_ids)
    feature.promoted(model)                         # tokens whose logits it raises
    feature.attribution(model, input_ids)           # which heads and MLPs made it active
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.blocks import BlockMap, Linear, Norm, Totals, block_map
from broadsheet.nn.hooks import Positions, Site, capture, evaluating, replace
from broadsheet.nn.padding import right_padded

# where a site's value stands in the block map's own forward pass
FIELDS = {
    "resid_pre": "resid_pre",
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.z": "z",
    "attn": "attn_out",
    "mlp.act": "act",
    "mlp": "mlp_out",
    "resid_post": "resid_post",
}


@dataclass(frozen=True)
class Projection:
    """Reads a feature as ``(x - centre) . direction + bias``, cut at zero where it is rectified.

    Args:
        direction: ``[d]``.
        bias: added.
        rectified: negative values count as none (an SAE's latent).
        centre: ``[d]`` or None for zero.
    """

    direction: Float[Tensor, " d"]
    bias: float = 0.0
    rectified: bool = False
    centre: Float[Tensor, " d"] | None = None

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        direction = self.direction.to(x)
        offset = self.bias if self.centre is None else self.bias - float(self.centre.to(direction) @ direction)
        value = x @ direction + offset
        return value.clamp_min(0) if self.rectified else value


@dataclass(frozen=True)
class Feature:
    """A direction at a place in a model, and how to read it.

    Attributes:
        site: a component's name such as ``"layers.3.attn.z"``, ``"layers.3.mlp.act"`` or ``"layers.3.resid_post"``.
        write: ``[d]``, what one unit of activation adds at the site.
        read: from the site's value ``[..., d]`` to the activation ``[...]``; by default the projection on ``write``
            that gives 1 for ``write`` itself.
        name: for people.
    """

    site: str
    write: Tensor
    read: Callable[[Tensor], Tensor] = field(default=None)  # type: ignore[assignment]
    name: str = ""

    def __post_init__(self) -> None:
        size = self.write.norm() if self.write.is_floating_point() else torch.tensor(0.0)
        if self.write.ndim != 1 or not bool(size > 0) or not bool(size.isfinite()):
            raise InvalidInput(
                f"the feature {self.name or self.site!r} writes a tensor of shape {tuple(self.write.shape)} and length "
                f"{float(size):g}: expected one direction [d] of finite, positive length"
            )
        if self.read is None:
            object.__setattr__(self, "read", Projection(self.write / self.write.square().sum()))

    @property
    def layer(self) -> int:
        return _parse(self.site)[0]

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The direction, of length 1."""
        return self.write / self.write.norm()

    def scaled(self, by: float) -> "Feature":
        """The same feature in other units: ``by`` times the activation, a ``by``-th of the direction."""
        if not by > 0:
            raise InvalidInput(f"by={by}: expected a positive number")
        read = self.read
        return changed(self, write=self.write / by, read=lambda x: read(x) * by)

    @torch.no_grad()
    def activations(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch time"]:
        """How active the feature is at every token; 0 at padding, which may stand on either side.

        Args:
            model: a Hugging Face model, or any module with a registered block map.
            input_ids: ``[batch, time]``.
            attention_mask: ``[batch, time]``.
        """
        padded = right_padded(input_ids, attention_mask)
        site = self._site(block_map(model))
        with evaluating(model), capture(model, site) as seen:
            _run(model, padded.input_ids, padded.attention_mask)
        value = self.read(seen[self.site])
        if padded.attention_mask is not None:
            value = torch.where(padded.attention_mask.bool(), value, 0)
        return padded.restore(value)

    @contextmanager
    def edited(
        self, model: nn.Module, to: Callable[[Tensor], Tensor | float], positions: Positions = None
    ) -> Iterator[nn.Module]:
        """Change the activation; whatever else the site holds stays (an SAE's error, too).

        Args:
            model: as in :meth:`activations`.
            to: from the activation ``[batch, time]`` to the wanted one.
            positions: along time; None for all, the ones that ``generate`` adds too.
        """

        def edit(x: Tensor) -> Tensor:
            value = self.read(x)
            wanted = torch.as_tensor(to(value), dtype=value.dtype, device=value.device)
            return x + ((wanted - value)[..., None] * self.write.to(value)).to(x.dtype)

        with replace(model, {self._site(block_map(model)): edit}, positions=positions):
            yield model

    def ablated(self, model: nn.Module, positions: Positions = None) -> Any:
        """Without the feature inside the block; arguments as in :meth:`edited`."""
        return self.edited(model, torch.zeros_like, positions)

    def clamped(self, model: nn.Module, value: float, positions: Positions = None) -> Any:
        """The activation held at a value inside the block; arguments as in :meth:`edited`."""
        _finite("value", value)
        return self.edited(model, lambda old: torch.full_like(old, value), positions)

    @contextmanager
    def steered(self, model: nn.Module, alpha: float, positions: Positions = None) -> Iterator[nn.Module]:
        """Add ``alpha`` times the direction, of length 1, inside the block; ``generate`` too.

        Args:
            model, positions: as in :meth:`edited`.
            alpha: length of what is added; 0 leaves every number as it is.
        """
        _finite("alpha", alpha)
        site = self._site(block_map(model))
        if alpha == 0:
            yield model
            return
        with replace(model, {site: lambda x: x + (alpha * self.unit).to(x)}, positions=positions):
            yield model

    def in_residual(self, model: nn.Module | BlockMap) -> Float[Tensor, " d_model"]:
        """What one unit of the feature adds to the residual stream, where its branch has no norm of its own output.

        Args:
            model: as in :meth:`activations`.

        Raises:
            InvalidInput: a feature of queries or keys, which write nothing there.
        """
        the_map = mapped(model)
        layer, part = _parse(self.site)
        block = the_map.blocks[layer]
        write = self.write
        matrix: Linear | None = None
        if part == "attn.z" and block.attention is not None:
            matrix = block.attention.o
        elif part == "mlp.act" and block.mlp is not None:
            matrix = block.mlp.w_out
        elif part not in ("attn", "mlp", "resid_pre", "resid_post"):
            raise InvalidInput(f"a feature at {self.site!r} writes nothing to the residual stream by itself")
        return write if matrix is None else write.to(matrix.weight) @ matrix.weight

    @torch.no_grad()
    def logit_effect(self, model: nn.Module | BlockMap) -> Float[Tensor, " vocab"]:
        """By how much the feature raises every token's logit directly, up to the final norm's scale.

        The final norm's gain and centring are applied, its scale depends on the text and is left at 1: the order of
        tokens is right, the unit is not nats.

        Args:
            model: as in :meth:`activations`; its head has to be one matrix (a soft cap after it keeps the order).
        """
        the_map = mapped(model)
        head = unembedding(the_map)
        x = self.in_residual(the_map).to(head.weight)
        norm = the_map.final_norm
        if norm is not None:
            x = norm.centre(x) if norm.gain is None else norm.centre(x) * norm.gain.to(x)
        return x @ head.weight

    def promoted(self, model: nn.Module | BlockMap, k: int = 10, tokenizer: Any = None) -> pd.DataFrame:
        """The tokens whose logits the feature raises most, and those it lowers most.

        Args:
            model: as in :meth:`logit_effect`.
            k: tokens on either side.
            tokenizer: turns ids into text.

        Returns:
            columns ``sign`` ("promoted" or "suppressed"), ``token_id``, ``effect`` and, with a tokenizer, ``token``.
        """
        effect = self.logit_effect(model).float().cpu()
        if not 1 <= k <= len(effect):
            raise InvalidInput(f"k={k}: the vocabulary has {len(effect)} tokens")
        rows = []
        for sign, order in (("promoted", effect.topk(k)), ("suppressed", (-effect).topk(k))):
            rows += [(sign, int(i), float(effect[i])) for i in order.indices]
        table = pd.DataFrame(rows, columns=["sign", "token_id", "effect"])
        if tokenizer is not None:
            table["token"] = [tokenizer.decode([i]) for i in table["token_id"]]
        return table

    def attribution(
        self,
        model: nn.Module | BlockMap,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        position: int | None = None,
    ) -> "FeatureAttribution":
        """Which heads, MLPs and tokens made the feature active: gradient times activation, one backward pass.

        Each part's whole effect, its way through later parts included: a first-order estimate (attribution patching
        against zero, arXiv:2310.10348), exact for what reaches the feature by straight ways only. A head and the MLP
        that reads it both count what they share, so the parts do not add up to the activation.

        Args:
            model, input_ids, attention_mask: as in :meth:`activations`.
            position: the token at which the feature is read; None for where it is most active in each text.
        """
        the_map = mapped(model)
        layer, part = _parse(self.site)
        self._site(the_map)
        padded = right_padded(input_ids, attention_mask)
        leaves: dict[tuple[str, int], Tensor] = {}

        def watch(name: str, at: int, x: Tensor) -> Tensor:
            if name in ("z", "mlp_out") or (name == "resid_pre" and at == 0):
                x = x if x.requires_grad else x.requires_grad_()
                leaves[name, at] = x
            return x

        with evaluating(the_map.model), torch.enable_grad():
            totals: Totals = the_map.forward(padded.input_ids, padded.attention_mask, cache=True, edit=watch)[1]
            value = getattr(totals.layers[layer], FIELDS[part])
            value = self.read(value.flatten(2))
            if position is None:
                where = _unpadded(value, padded.attention_mask).argmax(1)
            else:
                where = torch.full((len(input_ids),), position, device=value.device) - padded.offset
                if not bool(((where >= 0) & (where <= padded.last)).all()):
                    raise InvalidInput(f"position={position}: no token of every text stands there")
            chosen = value[torch.arange(len(value), device=value.device), where]
            gradients = torch.autograd.grad(chosen.sum(), list(leaves.values()), allow_unused=True)
        products = {
            key: torch.zeros_like(x) if gradient is None else (x * gradient).detach()
            for (key, x), gradient in zip(leaves.items(), gradients, strict=True)
        }
        n, time = padded.input_ids.shape
        heads = chosen.new_zeros(n, the_map.n_layers, the_map.n_heads, time)
        mlps = chosen.new_zeros(n, the_map.n_layers, time)
        for (name, at), product in products.items():
            if name == "z":
                heads[:, at, : product.shape[2]] = product.sum(-1).transpose(1, 2)
            elif name == "mlp_out":
                mlps[:, at] = product.sum(-1)
        embed = products["resid_pre", 0].sum(-1)

        def back(x: Tensor) -> Tensor:
            return padded.restore(x.movedim(-1, 1)).movedim(1, -1)

        return FeatureAttribution(
            chosen.detach(), where + padded.offset, back(heads.detach()), back(mlps.detach()), back(embed)
        )

    @torch.no_grad()
    def top_examples(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        k: int = 10,
        window: int = 15,
    ) -> "Examples":
        """The texts in which the feature is most active: one pass, ``k`` kept.

        Args:
            model: as in :meth:`activations`.
            batches: ids ``[batch, time]``, or pairs of them and attention masks.
            k: texts.
            window: tokens shown on either side of the most active one.
        """
        if k < 1 or window < 0:
            raise InvalidInput(f"k={k}, window={window}: expected at least 1 and 0")
        best: list[tuple[float, int, list[int], list[float], int]] = []
        row = 0
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            values = self.activations(model, ids, mask)
            tops, places = _unpadded(values, mask).max(1)
            masks = [None] * len(ids) if mask is None else mask
            texts = zip(ids, masks, values, tops, places, strict=True)
            best += [_excerpt(*text, window, row + i) for i, text in enumerate(texts)]
            row += len(ids)
            best = sorted(best, key=lambda example: -example[0])[:k]
        if not best:
            raise InvalidInput("batches is empty: hand in token ids [batch, time]")
        return Examples(
            torch.tensor([example[0] for example in best]),
            tuple(example[1] for example in best),
            tuple(tuple(example[2]) for example in best),
            tuple(tuple(example[3]) for example in best),
            tuple(example[4] for example in best),
        )

    def _site(self, the_map: BlockMap) -> Site:
        site = the_map.resolve(self.site)
        if re.search(r"\.(head|neuron)\.", self.site):
            raise InvalidInput(
                f"site={self.site!r}: name the whole place ('...attn.z', '...mlp.act'), not a part of it"
            )
        width = site_width(the_map, self.site)
        if len(self.write) != width:
            raise InvalidInput(
                f"the feature has {len(self.write)} entries, {self.site!r} has {width}: another model's?"
            )
        return site


@dataclass(frozen=True)
class FeatureAttribution:
    """What made a feature active, ``[batch, ...]``; positions in the last axis.

    Attributes:
        activation: ``[batch]``, the feature at its position.
        position: ``[batch]``, where it was read.
        heads: ``[batch, layer, head, time]``: by each head's output at each token.
        mlps: ``[batch, layer, time]``.
        embed: ``[batch, time]``: by the tokens' own embeddings.
    """

    activation: Float[Tensor, " batch"]
    position: Int[Tensor, " batch"]
    heads: Float[Tensor, "batch layers heads time"]
    mlps: Float[Tensor, "batch layers time"]
    embed: Float[Tensor, "batch time"]

    def to_frame(self) -> pd.DataFrame:
        """One row for each component, mean over texts, the largest by size first."""
        rows = [("embed", float(self.embed.sum(-1).mean()))]
        for layer in range(self.heads.shape[1]):
            rows += [
                (f"layers.{layer}.attn.head.{head}", float(self.heads[:, layer, head].sum(-1).mean()))
                for head in range(self.heads.shape[2])
            ]
            rows.append((f"layers.{layer}.mlp", float(self.mlps[:, layer].sum(-1).mean())))
        table = pd.DataFrame(rows, columns=["component", "attribution"])
        return table.sort_values("attribution", key=lambda x: -x.abs(), ignore_index=True)


@dataclass(frozen=True)
class Examples:
    """Excerpts around the places where a feature is most active, the most active first.

    Attributes:
        activation: ``[k]``.
        text: number of each text, counted over all batches.
        token_ids: of each excerpt.
        values: the feature at each of its tokens.
        place: which token of the excerpt is the most active one.
    """

    activation: Float[Tensor, " k"]
    text: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    values: tuple[tuple[float, ...], ...]
    place: tuple[int, ...]

    def to_frame(self, tokenizer: Any = None) -> pd.DataFrame:
        """Columns ``activation``, ``text``, ``token_id`` (the most active one) and the ``excerpt``, as text if it can.

        Args:
            tokenizer: turns ids into text; without one the ids are given.
        """
        shown = [ids if tokenizer is None else tokenizer.decode(ids) for ids in self.token_ids]
        at = [ids[place] for ids, place in zip(self.token_ids, self.place, strict=True)]
        return pd.DataFrame(
            {"activation": self.activation.tolist(), "text": self.text, "token_id": at, "excerpt": shown}
        )


def neuron(model: nn.Module | BlockMap, name: str) -> Feature:
    """A hidden unit of an MLP as a feature.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        name: such as ``"layers.3.mlp.neuron.117"``.
    """
    the_map = mapped(model)
    match = re.fullmatch(r"(layers\.\d+)\.mlp\.neuron\.(\d+)", name)
    the_map.resolve(name)
    if match is None:
        raise InvalidInput(f"{name!r}: expected a name such as 'layers.0.mlp.neuron.3'")
    site = f"{match[1]}.mlp.act"
    weight = next(the_map.model.get_submodule(the_map.resolve(site).module).parameters())
    write = torch.zeros(site_width(the_map, site), dtype=weight.dtype, device=weight.device)
    write[int(match[2])] = 1
    return Feature(site, write, name=name)


def mapped(model: nn.Module | BlockMap) -> BlockMap:
    """The block map of a model, or the one that was handed in."""
    return model if isinstance(model, BlockMap) else block_map(model)


def site_width(model: nn.Module | BlockMap, site: str) -> int:
    """How many features a place has.

    Args:
        model: a model or its block map.
        site: a component's name, such as ``"layers.0.mlp.act"``.
    """
    the_map = mapped(model)
    layer, part = _parse(site)
    the_map.resolve(site)
    block = the_map.blocks[layer]
    if part == "mlp.act" and block.mlp is not None:
        return block.mlp.w_out.weight.shape[0]
    if part.startswith("attn.") and block.attention is not None:
        matrix = {"attn.z": None, "attn.q": block.attention.q, "attn.k": block.attention.k, "attn.v": block.attention.v}
        chosen = matrix[part]
        return block.attention.o.weight.shape[0] if chosen is None else chosen.weight.shape[1]
    return the_map.d_model


def unembedding(model: nn.Module | BlockMap) -> Linear:
    """The matrix from the final hidden state to the logits, ``[d_model, vocab]``.

    Raises:
        UnsupportedModel: no head, or one of several steps (BERT's), which no matrix stands for.
    """
    the_map = mapped(model)
    steps = [step for step in the_map.head if isinstance(step, Linear | Norm)]
    if len(steps) != 1 or not isinstance(steps[0], Linear):
        kind = type(the_map.model).__name__
        what = "no head" if not steps else f"a head of {len(steps)} steps"
        raise UnsupportedModel(
            f"{kind} has {what}: a language model with one matrix from hidden state to logits is needed"
        )
    return steps[0]


def _parse(site: str) -> tuple[int, str]:
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", site)
    if match is None:
        raise InvalidInput(f"{site!r}: expected a component's name such as 'layers.0.mlp.act'")
    return int(match[1]), match[2]


def _run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if attention_mask is None:
        model(input_ids)
    else:
        model(input_ids, attention_mask=attention_mask)


def _finite(name: str, value: float) -> None:
    if not torch.isfinite(torch.as_tensor(value)):
        raise InvalidInput(f"{name}={value}: expected a finite number")


def _unpadded(values: Tensor, mask: Tensor | None) -> Tensor:
    """``[batch, time]`` with minus infinity at padding."""
    return values if mask is None else values.masked_fill(mask.to(values.device) == 0, -torch.inf)


def _excerpt(
    ids: Tensor, mask: Tensor | None, values: Tensor, top: Tensor, place: Tensor, window: int, row: int
) -> tuple[float, int, list[int], list[float], int]:
    real = torch.arange(len(ids)) if mask is None else mask.cpu().nonzero().flatten()
    first, last = max(int(real[0]), int(place) - window), min(int(real[-1]), int(place) + window)
    return (
        float(top), row, ids[first : last + 1].tolist(), values[first : last + 1].float().tolist(), int(place) - first,
    )  # fmt: skip
