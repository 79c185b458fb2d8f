"""Direct, total and indirect effects of heads, MLPs and hidden units on the answer; how few direct ones do the task."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability.circuit_analysis.batch import ChoiceBatch, check_pair
from broadsheet.nn.attribution import Attribution, DirectParts, direct_parts, place_of
from broadsheet.nn.blocks import BlockMap, block_map
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded


def decoder_map(model: nn.Module | BlockMap) -> BlockMap:
    """The block map of a causal model.

    Raises:
        UnsupportedModel: a model in which positions see later ones.
    """
    the_map = model if isinstance(model, BlockMap) else block_map(model)
    if not the_map.causal:
        raise UnsupportedModel(f"{type(the_map.model).__name__} is not a causal decoder: hand in a language model")
    return the_map


def logit_attribution(model: nn.Module | BlockMap, batch: ChoiceBatch, neurons: bool = False) -> Attribution:
    """Every head's and MLP's share of the labels' logits at the final token.

    Args:
        model: any mapped decoder.
        batch: the prompts.
        neurons: also every hidden unit's share.
    """
    return _parts(decoder_map(model), batch).attribute(batch.answers, answer=batch.answer, neurons=neurons)


@dataclass(frozen=True)
class PatchEffects:
    """What replacing one node at the final token by its activation on the corrupt prompt costs; mean over prompts.

    Attributes:
        nodes: names.
        total: ``[node]``, fall of the right answer's logit (less the mean over the answers).
        direct: ``[node]``, the same by the node's own share alone, norms held at the clean run's scales.
        loss: ``[node]``, rise of the loss over the answers, nats.
    """

    nodes: tuple[str, ...]
    total: Float[Tensor, " nodes"]
    direct: Float[Tensor, " nodes"]
    loss: Float[Tensor, " nodes"]

    @property
    def indirect(self) -> Float[Tensor, " nodes"]:
        """What goes by way of later parts and the final norm's scale; negative where they make up for the node."""
        return self.total - self.direct

    def to_frame(self) -> pd.DataFrame:
        """One row for each node."""
        columns = {name: getattr(self, name).cpu().tolist() for name in ("total", "direct", "indirect", "loss")}
        return pd.DataFrame({"node": self.nodes, **columns})


@torch.no_grad()
def patch_effects(
    model: nn.Module | BlockMap, clean: ChoiceBatch, corrupt: ChoiceBatch, nodes: Sequence[str] | None = None
) -> PatchEffects:
    """Total and direct effect of every node; one run from the node's layer on for each.

    Args:
        model: any mapped decoder.
        clean, corrupt: prompts of the same length with other right labels; swap them to go from noise to clean.
        nodes: ``"layers.3.attn.head.5"``, ``"layers.3.mlp"``, ``"layers.3.mlp.neuron.117"``; None: all heads and
            MLPs.
    """
    check_pair(clean, corrupt)
    the_map = decoder_map(model)
    parts, other = _parts(the_map, clean), _parts(the_map, corrupt)
    names = tuple(parts.names if nodes is None else nodes)
    units = any("neuron" in name for name in names)
    shares = parts.attribute(clean.answers, answer=clean.answer, neurons=units).centred()
    moved = other.attribute(clean.answers, answer=clean.answer, neurons=units, frozen=parts).centred()
    padded = right_padded(clean.input_ids, clean.attention_mask)
    at, rows = place_of(padded, clean.final_pos), clean.rows
    starts: list[Tensor] = []

    def note(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "resid_pre":
            starts.append(x)
        return x

    total, direct, loss = [], [], []
    with evaluating(the_map.model):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=note)
        whole = _metric(parts.logits(parts.final, clean.answers), clean)
        for name in names:
            layer, kind, index = _node(the_map, name)
            there = other.layers[layer]
            new = {"z": there.z, "mlp_out": there.mlp_out, "act": there.act}[kind]

            def put(
                field: str, i: int, x: Tensor, kind: str = kind, index: int | None = index, new: object = new
            ) -> Tensor:
                if i != 0 or field != kind or not isinstance(new, Tensor):
                    return x
                x = x.clone()
                if index is None:
                    x[rows, at] = new.to(x)
                else:
                    x[rows, at, index] = new[:, index].to(x)
                return x

            rest = replace(
                the_map,
                blocks=the_map.blocks[layer:],
                embed=lambda ids, mask, x=starts[layer]: x,
                final_norm=None,
                head=(),
            )
            final = rest.forward(padded.input_ids, padded.attention_mask, edit=put)[rows, at]
            logit, nats = _metric(parts.logits(final.to(parts.final), clean.answers), clean)
            total.append(whole[0] - logit)
            loss.append(nats - whole[1])
            change = _share(shares, layer, kind, index) - _share(moved, layer, kind, index)
            direct.append(change[rows, clean.answer].mean())
    return PatchEffects(names, torch.stack(total), torch.stack(direct), torch.stack(loss))


@dataclass(frozen=True)
class OutputNodes:
    """How much of the task is left with only some direct contributions.

    Attributes:
        nodes: all nodes, the largest mean direct effect first.
        accuracy: ``[node + 1]``, with the first n contributions from the clean run and all others from the corrupt one.
        loss: ``[node + 1]``, nats over the answers.
        n: the fewest nodes that reach the wanted share of the clean accuracy.
    """

    nodes: tuple[str, ...]
    accuracy: Float[Tensor, " counts"]
    loss: Float[Tensor, " counts"]
    n: int

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.nodes[: self.n]


@torch.no_grad()
def output_nodes(
    model: nn.Module | BlockMap, clean: ChoiceBatch, corrupt: ChoiceBatch, recover: float = 0.9
) -> OutputNodes:
    """Rank nodes by direct effect and find how few of them answer the questions.

    Args:
        model: any mapped decoder.
        clean, corrupt: as in :func:`patch_effects`.
        recover: wanted share of the clean accuracy.
    """
    if not 0 < recover <= 1:
        raise InvalidInput(f"recover={recover}: expected a share above 0, at most 1")
    check_pair(clean, corrupt)
    the_map = decoder_map(model)
    parts, other = _parts(the_map, clean), _parts(the_map, corrupt)
    effect = parts.attribute(clean.answers, answer=clean.answer).effects().mean(0)
    names = [parts.names[i] for i in effect.argsort(descending=True, stable=True).tolist()]
    stream, accuracy, loss = other.final, [], []
    for i in range(len(names) + 1):
        if i:
            stream = stream + parts.vector(names[i - 1]) - other.vector(names[i - 1])
        logits = parts.logits(stream, clean.answers)
        accuracy.append((logits.argmax(-1) == clean.answer).double().mean())
        loss.append(_metric(logits, clean)[1])
    curve = torch.stack(accuracy)
    full = (parts.logits(parts.final, clean.answers).argmax(-1) == clean.answer).double().mean()
    enough = (curve >= recover * full).nonzero()
    return OutputNodes(tuple(names), curve, torch.stack(loss), int(enough[0]) if len(enough) else len(names))


def _parts(the_map: BlockMap, batch: ChoiceBatch) -> DirectParts:
    return direct_parts(the_map, batch.input_ids, batch.attention_mask, batch.final_pos)


def _metric(logits: Tensor, batch: ChoiceBatch) -> tuple[Tensor, Tensor]:
    """Mean logit of the right answer less the mean over the answers, and mean loss over the answers."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred[batch.rows, batch.answer].mean(), nn.functional.cross_entropy(logits, batch.answer)


def _node(the_map: BlockMap, name: str) -> tuple[int, str, int | None]:
    """Layer, field of the block map's pass and index in it."""
    the_map.resolve(name)  # refuses what is not there
    match = re.fullmatch(r"layers\.(\d+)\.(?:attn\.head\.(\d+)|mlp(?:\.neuron\.(\d+))?)", name)
    if match is None:
        raise InvalidInput(f"{name!r}: expected a head, an MLP or one of its units ('layers.0.mlp.neuron.3')")
    if match[2] is not None:
        return int(match[1]), "z", int(match[2])
    if match[3] is not None:
        return int(match[1]), "act", int(match[3])
    return int(match[1]), "mlp_out", None


def _share(shares: Attribution, layer: int, kind: str, index: int | None) -> Tensor:
    if kind == "mlp_out":
        return shares.mlps[:, layer]
    table = shares.heads if kind == "z" else shares.neurons
    assert table is not None
    return table[:, layer, index]
