"""Steering vectors of every layer, and probes that choose among them from the state that they find."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.injection import Positions, Recorder, Strength, injecting, strength
from broadsheet.interpretability.g_act.probes import Probes
from broadsheet.interpretability.g_act.sites import NAMES, Blocks, Place, places
from broadsheet.nn.features import Feature
from broadsheet.nn.plotting import COLOURS, new_axes


class SteeringModel(nn.Module, PyTorchModelHubMixin):
    """Directions and the probes that pick one of them, for the layers of one model.

    At a steered layer, with h the state and c_k the layer's centroids::

        k = argmax_k  w_k . h + b_k
        h <- h + alpha * s * c_k / |c_k|            s: the layer's mean norm, so that alpha means the same everywhere

    Made by :class:`GACT`, or by :func:`mean_difference` (one direction, nothing to choose).

    Args:
        layers: numbers of the blocks that it has directions for.
        d: features of a state.
        n_clusters: directions of each layer.
        n_prompts: prompts that it was fitted to.
        site: where it reads and writes.
        alpha: strength where none is given; a share of the layer's mean norm.
        steered_layers: blocks that are steered where none are given; None for all.
        blocks: name of the list of blocks of a model without a block map.
        label_layers: 1 where a prompt has one cluster for all layers, else the number of layers.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    centroids: Tensor
    norms: Tensor
    val_accuracy: Tensor
    macro_f1: Tensor
    labels: Tensor

    def __init__(
        self,
        layers: list[int],
        d: int,
        n_clusters: int,
        n_prompts: int,
        site: str = "resid_post",
        alpha: float = 0.1,
        steered_layers: list[int] | None = None,
        blocks: str | None = None,
        label_layers: int = 1,
    ) -> None:
        super().__init__()
        self.layers, self.site, self.alpha, self.blocks = tuple(layers), site, alpha, blocks
        self.steered_layers = self.layers if steered_layers is None else tuple(steered_layers)
        n, k = len(layers), n_clusters
        shapes: dict[str, tuple[int, ...]] = {
            "centroids": (n, k, d), "weight": (n, k, d), "bias": (n, k), "mean": (n, d), "std": (n, d), "norms": (n,),
            "val_accuracy": (n,), "macro_f1": (n,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("labels", torch.zeros(n_prompts, label_layers, dtype=torch.long))
        self.std.fill_(1)
        self.blocks_finder: Blocks = blocks

    @property
    def n_clusters(self) -> int:
        return self.centroids.shape[1]

    @property
    def clusters(self) -> Int[Tensor, "n *layers"]:
        """The cluster of every prompt (``shared``: in every layer)."""
        return self.labels[:, 0] if self.labels.shape[1] == 1 else self.labels

    @property
    def probes(self) -> Probes:
        return Probes(self.weight, self.bias, self.mean, self.std)

    def set_probes(self, probes: Probes) -> None:
        """Put other probes in the place of these, of the same shapes."""
        for name in ("weight", "bias", "mean", "std"):
            getattr(self, name).copy_(getattr(probes, name))

    def directions(self) -> Float[Tensor, "layers clusters d"]:
        """What is added at ``alpha = 1``: each centroid at its layer's mean norm."""
        size = self.centroids.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return self.centroids / size * self.norms[:, None, None]

    def select(self, layer: int, states: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The cluster that a layer's probe picks.

        Args:
            layer: number of the block.
            states: at the site.
        """
        weight, bias = self.probes.folded()
        i = self._row(layer)
        return (states.float() @ weight[i].T.to(states.device) + bias[i].to(states.device)).argmax(-1)

    def features(self, layer: int) -> list[Feature]:
        """A layer's directions for every other method; one unit of activation is the centroid itself."""
        rows = self.centroids[self._row(layer)]
        if self.site not in NAMES:
            raise InvalidInput(f"site={self.site!r} has no component's name: fit at 'resid_post' to get features")
        name = f"layers.{layer}.{NAMES[self.site]}"
        return [Feature(name, row.clone(), name=f"cluster {k} of layer {layer}") for k, row in enumerate(rows)]

    def steered(
        self,
        model: nn.Module,
        alpha: Strength | None = None,
        *,
        layers: Sequence[int] | None = None,
        positions: Positions = "last",
        soft: bool = False,
        temperature: float | int = 1.0,
        allow_nested: bool = False,
        record: Recorder | None = None,
    ) -> AbstractContextManager[nn.Module]:
        """The model steered inside the block, ``generate`` and plain passes alike.

        Args:
            model: the one that the states came from, in any precision, on any device.
            alpha: strength as a share of the mean norm, about 0.02 to 0.5; None for the fitted one, ``[batch]`` for
                one of each row. 0 changes nothing.
            layers: blocks to steer; None for the fitted ones.
            positions: ``"last"`` (the prompt's last token and all generated ones), ``"prompt"``, ``"all"``, or as in
                :func:`~broadsheet.interpretability.g_act.injection.injecting`.
            soft: mix the directions by the probe's probabilities instead of taking one; the length stays.
            temperature: of these probabilities; towards 0 the mixture becomes the choice.
            allow_nested: steer a model that is already steered.
            record: as in :func:`~broadsheet.interpretability.g_act.injection.injecting`.
        """
        changes, times_alpha = strength(self.alpha if alpha is None else alpha)
        if soft and not temperature > 0:
            raise InvalidInput(f"temperature={temperature}: expected a positive number")
        chosen = self.steered_layers if layers is None else tuple(layers)
        rows = [self._row(layer) for layer in chosen] if changes else []
        weight, bias = self.probes.folded()
        where = self.places(model, chosen) if rows else []
        pick = _Pick(self.directions()[rows], weight[rows], bias[rows], soft, float(temperature))

        def rule(i: int, states: Tensor) -> Tensor:
            return times_alpha(pick(i, states))

        return injecting(model, where, rule, positions, record=record, allow_nested=allow_nested)

    def __call__(self, model: nn.Module, alpha: Strength | None = None, **how: Any) -> Any:
        """The same as :meth:`steered`: ``with steering(model, alpha=0.1): model.generate(...)``."""
        return self.steered(model, alpha, **how)

    def places(self, model: nn.Module, layers: Sequence[int] | None = None) -> list[Place]:
        """Where it reads and writes in a model, in the order of the given layers."""
        chosen = self.layers if layers is None else layers
        found = {place.layer: place for place in places(model, self.site, chosen, self.blocks_finder)}
        return [found[layer] for layer in chosen]

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise InvalidInput(f"layer {layer}: fitted to layers {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer: ``layer``, ``val_accuracy``, ``macro_f1``, ``norm``, ``steered``."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "val_accuracy": self.val_accuracy.tolist(),
                "macro_f1": self.macro_f1.tolist(),
                "norm": self.norms.tolist(),
                "steered": [layer in self.steered_layers for layer in self.layers],
            }
        )

    def plot(self, ax: Any = None) -> Any:
        """Validation accuracy and macro-F1 of the probes by layer."""
        ax = new_axes(ax)
        ax.plot(self.layers, self.val_accuracy, marker="o", color=COLOURS["ours"], label="accuracy")
        ax.plot(self.layers, self.macro_f1, marker="s", color=COLOURS["accent"], label="macro-F1")
        chance = float(self.labels.flatten().bincount().max() / self.labels.numel()) if self.labels.numel() else 1.0
        ax.axhline(chance, color=COLOURS["neutral"], linestyle=":", label="largest cluster")
        ax.set(xlabel="layer", ylabel="of held-out prompts", ylim=(0, 1.03), xticks=self.layers)
        ax.legend(loc="lower right")
        return ax


class _Pick:
    """What is added to a state: the direction that the probe picks, or their mixture; all on the state's device."""

    def __init__(self, directions: Tensor, weight: Tensor, bias: Tensor, soft: bool, temperature: float) -> None:
        self.parts = (directions, weight, bias)
        self.soft, self.temperature = soft, temperature
        self.at: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, i: int, states: Tensor) -> Tensor:
        key = (i, states.device)
        if key not in self.at:
            directions, weight, bias = (part[i].detach().float().to(states.device) for part in self.parts)
            self.at[key] = directions, weight.T.contiguous(), bias
        directions, weight, bias = self.at[key]
        if len(directions) == 1:
            return directions[0].expand(states.shape)
        scores = states.float() @ weight + bias  # in float32 whatever the model's precision
        return chosen(scores, directions, self.soft, self.temperature)


def chosen(
    scores: Float[Tensor, "*batch clusters"],
    directions: Float[Tensor, "clusters d"],
    soft: bool = False,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch d"]:
    """The direction of the highest score, or the mixture by softmax at the same length.

    Args:
        scores: of the probe.
        directions: all of one length.
        soft, temperature: as in :meth:`SteeringModel.steered`.
    """
    if not soft:
        return directions[scores.argmax(-1)]
    mixed = (scores / temperature).softmax(-1) @ directions
    length = directions.norm(dim=-1).amax()
    return mixed / mixed.norm(dim=-1, keepdim=True).clamp_min(1e-30) * length
