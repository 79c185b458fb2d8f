"""What changed between two maps: a base model and its fine-tuned version, or two trainings."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.lm_head_neurons.maps import SETTINGS, NeuronMap
from broadsheet.nn.plotting import COLOURS, new_axes


@dataclass(frozen=True)
class MapComparison:
    """How far two maps agree, neuron by neuron.

    Attributes:
        same: ``[L, F]``, whether the first word is the same.
        jaccard: ``[L, F]``, of the two sets of top words: those shared over all.
        counted: ``[L, F]``, neurons with finite weights in both; the others count for nothing.
        a, b: the maps.
    """

    same: Bool[Tensor, "L F"]
    jaccard: Float[Tensor, "L F"]
    counted: Bool[Tensor, "L F"]
    a: NeuronMap
    b: NeuronMap

    @property
    def same_top(self) -> float:
        """Share of neurons with the same first word."""
        return float(self.same[self.counted].double().mean())

    @property
    def per_layer(self) -> Float[Tensor, " L"]:
        """The same for each layer."""
        count = self.counted.sum(1).clamp_min(1)
        return (self.same & self.counted).sum(1).double() / count

    @property
    def jaccard_topk(self) -> float:
        """Mean overlap of the top words."""
        return float(self.jaccard[self.counted].double().mean())

    @property
    def moved(self) -> pd.DataFrame:
        """The neurons whose first word changed, those that were surest of their old word first.

        Columns ``layer``, ``neuron``, ``before``, ``after``, ``prob_before``, ``prob_after``, ``jaccard``, ``name``.
        """
        where = (self.counted & ~self.same).nonzero()
        row, neuron = where[:, 0], where[:, 1]
        layer = torch.tensor(self.a.layers)[row].tolist()
        table = pd.DataFrame({"layer": layer, "neuron": neuron.tolist()})
        for when, found in (("before", self.a), ("after", self.b)):
            table[when] = [found.word(i) for i in found.labels[row, neuron].tolist()]
        table["prob_before"] = self.a.probs[row, neuron, 0].tolist()
        table["prob_after"] = self.b.probs[row, neuron, 0].tolist()
        table["jaccard"] = self.jaccard[row, neuron].tolist()
        table["name"] = [f"layers.{x}.mlp.neuron.{n}" for x, n in zip(layer, neuron.tolist(), strict=True)]
        return table.sort_values("prob_before", ascending=False, ignore_index=True, kind="stable")

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer: share of the same first word, mean overlap of the top words."""
        overlap = [float(j[c].double().mean()) for j, c in zip(self.jaccard, self.counted, strict=True)]
        return pd.DataFrame({"layer": self.a.layers, "same_top": self.per_layer.tolist(), "jaccard_topk": overlap})

    def plot(self, ax: Any = None) -> Any:
        """Share of neurons with the same first word, layer by layer.

        Args:
            ax: matplotlib axes; None makes new ones.
        """
        ax = new_axes(ax)
        x = range(self.a.n_layers)
        ax.bar(x, self.per_layer.tolist(), color=COLOURS["ours"], width=0.7)
        ax.axhline(self.same_top, color=COLOURS["neutral"], linestyle="--", linewidth=0.8)
        step = max(1, self.a.n_layers // 12)
        ax.set_xticks(list(x)[::step], [str(layer) for layer in self.a.layers[::step]])
        ax.set(xlabel="layer", ylabel="same first word", ylim=(0, 1))
        ax.set_title(f"{self.same_top:.1%} of all neurons keep their first word")
        return ax


def compare(map_a: NeuronMap, map_b: NeuronMap, topk: int | None = None) -> MapComparison:
    """Which neurons two maps give the same words.

    Args:
        map_a, map_b: of models of one shape and vocabulary, made with the same settings.
        topk: words whose overlap counts; None for as many as both maps hold.

    Raises:
        InvalidInput: what differs, by name: layers, width, vocabulary, words, or a setting.
    """
    for name, left, right in (
        ("depth", map_a.layers, map_b.layers),
        ("width", map_a.width, map_b.width),
        ("vocabulary", map_a.vocab_size, map_b.vocab_size),
        *((setting, getattr(map_a, setting), getattr(map_b, setting)) for setting in SETTINGS),
    ):
        if left != right:
            raise InvalidInput(
                f"the maps differ in {name}: {left!r} and {right!r}. Compare models of one shape and vocabulary, "
                "decoded with the same settings"
            )
    if map_a.words is not None and map_b.words is not None and map_a.words != map_b.words:
        at = next(i for i, (x, y) in enumerate(zip(map_a.words, map_b.words, strict=True)) if x != y)
        raise InvalidInput(
            f"the maps differ in their words: token {at} is {map_a.words[at]!r} and {map_b.words[at]!r}. Decode both "
            "with the same tokenizer"
        )
    most = min(map_a.tokens.shape[-1], map_b.tokens.shape[-1])
    k = most if topk is None else topk
    if not 1 <= k <= most:
        raise InvalidInput(f"topk={topk}: the maps hold {most} words for each neuron")
    a, b = map_a.tokens[..., :k], map_b.tokens[..., :k]
    shared = torch.stack([(row[..., :, None] == other[..., None, :]).any(-1).sum(-1)
                          for row, other in zip(a, b, strict=True)])  # fmt: skip
    counted = (a[..., 0] >= 0) & (b[..., 0] >= 0)
    return MapComparison(a[..., 0] == b[..., 0], shared.double() / (2 * k - shared), counted, map_a, map_b)
