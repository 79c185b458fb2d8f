"""Path patching by component names: through which heads does what one head says reach the answer?"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch, check_pair
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.effects import ABLATIONS
from broadsheet.interpretability.circuit_analysis.skill import decoder_map, parts_of
from broadsheet.nn.attribution import parse_node, place_of
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.padding import right_padded
from broadsheet.nn.patching import PathEffects, head_outputs, path_patching

OUTPUT = "output"


@dataclass(frozen=True)
class Paths:
    """What each path, source head -> target head -> answer, carries; mean over prompts.

    Attributes:
        effects: fall of the right answer's logit (less the mean over the answers) where only this path carries the
            other activation; ``to_heads [layer, head, layer, head]`` and ``to_output [layer, head]``.
        at: which of the target's inputs the paths enter.
    """

    effects: PathEffects
    at: str

    def between(self, source: str, target: str = OUTPUT) -> float:
        """The effect of one path.

        Args:
            source: ``"layers.0.attn.head.1"``.
            target: a later head, or ``"output"``.
        """
        layer, head = self._head(source)
        if target == OUTPUT:
            return float(self.effects.to_output[layer, head])
        to_layer, to_head = self._head(target)
        if to_layer <= layer:
            raise InvalidInput(f"{source!r} -> {target!r}: the target must be in a later layer")
        return float(self.effects.to_heads[layer, head, to_layer, to_head])

    def to_frame(self) -> pd.DataFrame:
        """Columns ``source``, ``target`` and ``effect``, the largest by size first."""
        table, rows = self.effects.to_heads, []
        layers, heads = table.shape[:2]
        for layer in range(layers):
            for head in range(heads):
                source = f"layers.{layer}.attn.head.{head}"
                rows.append((source, OUTPUT, float(self.effects.to_output[layer, head])))
                rows += [
                    (source, f"layers.{i}.attn.head.{j}", float(table[layer, head, i, j]))
                    for i in range(layer + 1, layers)
                    for j in range(heads)
                ]
        frame = pd.DataFrame(rows, columns=["source", "target", "effect"])
        return frame.sort_values("effect", key=lambda x: -x.abs(), ignore_index=True)

    def plot(self, ax: Any = None) -> Any:
        """Sources by targets."""
        from broadsheet.interpretability.circuit_analysis.figures import path_map

        return path_map(self, ax)

    def _head(self, name: str) -> tuple[int, int]:
        layer, head = parse_node(name)
        layers, heads = self.effects.to_output.shape
        if head is None or layer >= layers or head >= heads:
            raise InvalidInput(
                f"{name!r}: expected a head of {layers} layers of {heads}, such as 'layers.0.attn.head.1'"
            )
        return layer, head


@torch.no_grad()
def path_effects(
    model: nn.Module | BlockMap,
    clean: ChoiceBatch,
    corrupt: ChoiceBatch | None = None,
    *,
    ablation: str = "resample",
    at: str = "qkv",
    max_batch: int = 512,
) -> Paths:
    """Exact effect of every path between two heads, and from a head to the answer, all other heads held.

    One run for every pair of heads: for models of some hundred heads, not of thousands.

    Args:
        model: any mapped decoder with attention in every block.
        clean: prompts.
        corrupt: for ``"resample"`` a prompt of the same length for every clean one, with another right label; for
            ``"mean"`` reference prompts of that length (None: the clean ones).
        ablation: what a source's output is replaced by, at all tokens: ``"resample"``, ``"mean"`` or ``"zero"``.
        at: which of the target's inputs a path may enter: some of ``q``, ``k``, ``v``.
        max_batch: runs times prompts at once.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    if ablation not in ABLATIONS:
        raise InvalidInput(f"ablation={ablation!r}: expected one of {ABLATIONS}")
    the_map = decoder_map(model)
    if ablation == "resample":
        if corrupt is None:
            raise InvalidInput("ablation='resample' needs corrupt=: a prompt with another right label for every one")
        check_pair(clean, corrupt)
    parts_of(the_map, clean)  # warns of a model at chance
    source = clean if corrupt is None or ablation == "zero" else corrupt
    padded, other = (right_padded(b.input_ids, b.attention_mask) for b in (clean, source))
    z = head_outputs(the_map, other.input_ids, other.attention_mask)
    if ablation != "resample":
        z = torch.zeros_like(z[:, :1]) if ablation == "zero" else z.mean(1, keepdim=True)
    ends = place_of(padded, clean.final_pos)

    def centred(logits: Float[Tensor, "batch time vocab"]) -> Tensor:
        chosen = logits[clean.rows, ends].gather(1, clean.answers)
        return (chosen[clean.rows, clean.answer] - chosen.mean(-1)).mean()

    found = path_patching(
        the_map, padded.input_ids, centred, z, at=tuple(at), attention_mask=padded.attention_mask, max_batch=max_batch
    )
    return Paths(found, at)
