"""Direct, total and indirect effects of heads, MLPs and hidden units on the answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch, check_pair
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.skill import decoder_map, metric, parts_of, places
from broadsheet.nn.attribution import Attribution, DirectParts, place_of
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.prefix import cached_prefix
from broadsheet.nn.progress import SILENT, Progress

ABLATIONS = ("resample", "mean", "zero")
POSITIONS = ("final", "labels", "all")


def logit_attribution(model: nn.Module | BlockMap, batch: ChoiceBatch, neurons: bool = False) -> Attribution:
    """Every head's and MLP's share of the answers' logits at the final token.

    Args:
        model: any mapped decoder.
        batch: the prompts.
        neurons: also every hidden unit's share.

    Returns:
        shares ``[batch, layer, head, item]`` and so on; they sum to the logits.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    return parts_of(decoder_map(model), batch).attribute(batch.answers, answer=batch.answer, neurons=neurons)


@dataclass(frozen=True)
class PatchEffects:
    """What replacing one node's output costs; mean over prompts.

    Attributes:
        nodes: names.
        total: ``[node]``, fall of the right answer's logit (less the mean over the answers).
        direct: ``[node]``, the same by the node's own share alone, norms held at the clean run's scales.
        loss: ``[node]``, rise of the loss over the answers, nats.
        shape: layers and heads of the model.
    """

    nodes: tuple[str, ...]
    total: Float[Tensor, " nodes"]
    direct: Float[Tensor, " nodes"]
    loss: Float[Tensor, " nodes"]
    shape: tuple[int, int] = (0, 0)

    @property
    def indirect(self) -> Float[Tensor, " nodes"]:
        """What goes by way of later parts and the final norm's scale; negative where they make up for the node."""
        return self.total - self.direct

    def to_frame(self) -> pd.DataFrame:
        """One row for each node."""
        columns = {name: getattr(self, name).cpu().tolist() for name in ("total", "direct", "indirect", "loss")}
        return pd.DataFrame({"node": self.nodes, **columns})

    def plot(self, ax: Any = None, what: str = "total") -> Any:
        """Layers by heads, MLPs in the last column.

        Args:
            ax: matplotlib axes.
            what: ``"total"``, ``"direct"``, ``"indirect"`` or ``"loss"``.
        """
        from broadsheet.interpretability.circuit_analysis.figures import node_map

        if what not in ("total", "direct", "indirect", "loss"):
            raise InvalidInput(f"what={what!r}: expected 'total', 'direct', 'indirect' or 'loss'")
        return node_map(dict(zip(self.nodes, getattr(self, what).tolist(), strict=True)), self.shape, ax, what)

    def plot_direct_total(self, ax: Any = None, named: int = 5) -> Any:
        """Every node's total effect against its direct one; below the diagonal later parts make up for it.

        Args:
            ax: matplotlib axes.
            named: nodes with the largest direct effect that are named.
        """
        from broadsheet.interpretability.circuit_analysis.figures import direct_total

        return direct_total(self.nodes, self.direct.tolist(), self.total.tolist(), ax, named)


@torch.no_grad()
def patch_effects(
    model: nn.Module | BlockMap,
    clean: ChoiceBatch,
    corrupt: ChoiceBatch | None = None,
    nodes: Sequence[str] | None = None,
    *,
    ablation: str = "resample",
    positions: str = "final",
    same_length: bool = True,
    max_batch: int = 512,
    progress: Progress = SILENT,
) -> PatchEffects:
    """Total and direct effect of every node, each replaced by itself.

    At the final token a run costs one token, from the node's layer on: earlier ones are kept from the clean run.

    Args:
        model: any mapped decoder.
        clean: prompts.
        corrupt: for ``"resample"`` a prompt for every clean one, with another right label (swap the two to go from
            noise to clean); for ``"mean"`` reference prompts, as many as you like (None: the clean ones).
        nodes: ``"layers.3.attn.head.5"``, ``"layers.3.mlp"``, ``"layers.3.mlp.neuron.117"``; None: all heads and
            MLPs.
        ablation: what a node's output is replaced by: ``"resample"``, ``"mean"`` or ``"zero"``.
        positions: ``"final"`` token, ``"labels"`` of the items, or ``"all"`` tokens.
        same_length: False allows corrupt prompts of another length, which only the final token and labels can be.
        max_batch: nodes times prompts in one run.
        progress: where nodes done are shown.

    Raises:
        InvalidInput: prompts that do not go together, or an unknown node.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    if ablation not in ABLATIONS or positions not in POSITIONS:
        raise InvalidInput(
            f"ablation={ablation!r}, positions={positions!r}: expected one of {ABLATIONS} and one of {POSITIONS}"
        )
    the_map = decoder_map(model)
    if ablation == "resample":
        if corrupt is None:
            raise InvalidInput("ablation='resample' needs corrupt=: a prompt with another right label for every one")
        check_pair(clean, corrupt, same_length or positions == "all")
    source = clean if corrupt is None or ablation == "zero" else corrupt
    parts = parts_of(the_map, clean)
    other = _averaged(parts_of(the_map, source, warn=False), ablation, len(clean))
    names = all_nodes(the_map) if nodes is None else tuple(nodes)
    where = [split_node(the_map, name) for name in names]
    units = any(kind == "act" for _, kind, _ in where)
    shares = parts.attribute(clean.answers, answer=clean.answer, neurons=units).centred()
    moved = other.attribute(clean.answers, answer=clean.answer, neurons=units, frozen=parts).centred()
    whole = metric(parts.logits(parts.final, clean.answers), clean)
    total = torch.zeros(len(names), dtype=parts.final.dtype, device=parts.final.device)
    direct, loss = total.clone(), total.clone()
    for i, (layer, kind, index) in enumerate(where):
        change = _share(shares, layer, kind, index) - _share(moved, layer, kind, index)
        direct[i] = change[clean.rows, clean.answer].mean()
    step = max(1, max_batch // len(clean))
    run = _final_runs if positions == "final" else _whole_runs
    with progress.task("patching", total=len(names)) as task:
        for rows, finals in run(the_map, clean, source, other, where, step, ablation, positions):
            for row, final in zip(rows, finals, strict=True):
                logit, nats = metric(parts.logits(final.to(parts.final), clean.answers), clean)
                total[row], loss[row] = whole[0] - logit, nats - whole[1]
            task.advance(len(rows))
    return PatchEffects(names, total, direct, loss, (the_map.n_layers, the_map.n_heads))


def split_node(the_map: BlockMap, name: str) -> tuple[int, str, int | None]:
    """Layer, field of the block map's pass and index in it.

    Raises:
        InvalidInput: a name that is none of a head, an MLP or a unit, or one that the model does not have.
    """
    match = re.fullmatch(r"layers\.(\d+)\.(?:attn\.head\.(\d+)|mlp(?:\.neuron\.(\d+))?)", name)
    if match is None:
        raise InvalidInput(f"{name!r}: expected a head, an MLP or one of its units ('layers.0.mlp.neuron.3')")
    layer = int(match[1])
    if layer >= the_map.n_layers:
        raise InvalidInput(f"{name!r}: the model has {the_map.n_layers} layers (0 to {the_map.n_layers - 1})")
    attention, mlp = the_map.blocks[layer].attention, the_map.blocks[layer].mlp
    kind, index, there = "mlp_out", None, 0 if mlp is None else 1
    if match[2] is not None:
        kind, index, there = "z", int(match[2]), 0 if attention is None else attention.n_heads
    elif match[3] is not None:
        kind, index, there = "act", int(match[3]), 0 if mlp is None else mlp.w_out.weight.shape[0]
    if (index or 0) >= there:
        what = {"z": "heads", "act": "hidden units", "mlp_out": "MLPs"}[kind]
        raise InvalidInput(f"{name!r}: layer {layer} has {there} {what}" + f" (0 to {there - 1})" * (there > 1))
    return layer, kind, index


def all_nodes(the_map: BlockMap) -> tuple[str, ...]:
    """Every head and MLP that the model has."""
    found = []
    for layer, block in enumerate(the_map.blocks):
        heads = 0 if block.attention is None else block.attention.n_heads
        found += [f"layers.{layer}.attn.head.{head}" for head in range(heads)]
        found += [f"layers.{layer}.mlp"] * (block.mlp is not None)
    return tuple(found)


def _averaged(parts: DirectParts, ablation: str, n: int) -> DirectParts:
    """The run that replacements are taken from: as it is, its mean over prompts, or zeros."""
    if ablation == "resample":
        return parts

    def made(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        one = torch.zeros_like(x[:1]) if ablation == "zero" else x.mean(0, keepdim=True)
        return one.expand(n, *x.shape[1:])

    layers = tuple(
        replace(layer, z=made(layer.z), attn_out=made(layer.attn_out), act=made(layer.act), mlp_out=made(layer.mlp_out))
        for layer in parts.layers
    )
    fixed = {name: getattr(parts, name)[:1].expand(n, *getattr(parts, name).shape[1:]) for name in _EACH}
    return replace(parts, layers=layers, **fixed)


_EACH = ("embed", "final", "normed", "scale")


def _grouped(where: Sequence[tuple[int, str, int | None]], step: int) -> Any:
    """Numbers of nodes, a layer's together, ``step`` at once."""
    for layer in sorted({layer for layer, _, _ in where}):
        rows = [i for i, node in enumerate(where) if node[0] == layer]
        for start in range(0, len(rows), step):
            yield layer, rows[start : start + step]


def _final_runs(
    the_map: BlockMap, clean: ChoiceBatch, source: ChoiceBatch, other: DirectParts, where: Any, step: int, *_: str
) -> Any:
    """Final residual streams with each node replaced at the final token; ``(numbers, [node, batch, d_model])``."""
    prefix = cached_prefix(the_map, clean.input_ids, clean.attention_mask, clean.final_pos)
    for layer, rows in _grouped(where, step):
        held = other.layers[layer]

        def put(field: str, i: int, x: Tensor, layer: int = layer, rows: Any = rows, held: Any = held) -> Tensor:
            chosen = [(run, where[row][2]) for run, row in enumerate(rows) if where[row][1] == field]
            if i != layer or not chosen:
                return x
            new = getattr(held, field)
            x = x.unflatten(0, (len(rows), -1)).clone()
            for run, index in chosen:
                if index is None:
                    x[run, :, 0] = new.to(x)
                else:
                    x[run, :, 0, index] = new[:, index].to(x)
            return x.flatten(0, 1)

        yield rows, prefix.run(layer, put, len(rows))


def _whole_runs(
    the_map: BlockMap, clean: ChoiceBatch, source: ChoiceBatch, other: DirectParts, where: Any, step: int,
    ablation: str, positions: str,
) -> Any:  # fmt: skip
    """The same at other tokens: whole prompts, from the node's layer on."""
    padded, sourced = (right_padded(b.input_ids, b.attention_mask) for b in (clean, source))
    at = place_of(padded, clean.final_pos)
    to = places(clean, at, padded.offset, positions, padded.input_ids.shape[1])
    taken = places(source, place_of(sourced, source.final_pos), sourced.offset, positions, sourced.input_ids.shape[1])
    if to.shape[1] != taken.shape[1]:
        raise InvalidInput(
            f"positions={positions!r}: {to.shape[1]} places in the clean prompts, {taken.shape[1]} in the others: as "
            "many are needed"
        )
    starts: list[Tensor] = []

    def note(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "resid_pre":
            starts.append(x)
        return x

    with evaluating(the_map.model):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=note)
    rows, others = clean.rows[:, None], source.rows[:, None]
    for layer in sorted({layer for layer, _, _ in where}):
        news: dict[str, Tensor] = {}

        def keep(name: str, i: int, x: Tensor, layer: int = layer, news: Any = news) -> Tensor:
            if i == layer and name in ("z", "act", "mlp_out"):
                part = x[others, taken]
                if ablation != "resample":
                    part = part.mean(0, keepdim=True) if ablation == "mean" else torch.zeros_like(part[:1])
                news[name] = part.expand(len(clean), *part.shape[1:])
            return x

        with evaluating(the_map.model):
            the_map.forward(sourced.input_ids, sourced.attention_mask, edit=keep)
        rest = replace(
            the_map,
            blocks=the_map.blocks[layer:],
            embed=lambda ids, mask, x=starts[layer]: x,
            final_norm=None,
            head=(),
        )
        for row in (i for i, node in enumerate(where) if node[0] == layer):
            _, kind, index = where[row]

            def put(field: str, i: int, x: Tensor, kind: str = kind, index: Any = index, news: Any = news) -> Tensor:
                if i != 0 or field != kind:
                    return x
                x = x.clone()
                if index is None:
                    x[rows, to] = news[kind]
                else:
                    x[rows, to, index] = news[kind][:, :, index]
                return x

            with evaluating(the_map.model):
                final = rest.forward(padded.input_ids, padded.attention_mask, edit=put)[clean.rows, at]
            yield [row], final[None]


def _share(shares: Attribution, layer: int, kind: str, index: int | None) -> Tensor:
    if kind == "mlp_out":
        return shares.mlps[:, layer]
    table = shares.heads if kind == "z" else shares.neurons
    assert table is not None
    return table[:, layer, index]
