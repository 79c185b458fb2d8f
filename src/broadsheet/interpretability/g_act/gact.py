"""Fit steering directions and probes to pairs of prompts: clusters of differences, a centroid and a probe each.

The method has no public code. What its description leaves open is decided here: one cluster for each prompt, from the
differences of all layers side by side (``shared=True`` pools them instead, and has one set of centroids for all
layers); three clusters; probes trained on the states that they will meet, the unsteered ones included.

Reference: Sharma and Raman (arXiv:2506.18887).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.model import SteeringModel
from broadsheet.interpretability.g_act.pairs import PairActivations, flattened
from broadsheet.interpretability.g_act.probes import (
    clusters_of,
    renumbered,
    score_probes,
    split_prompts,
    train_probes,
)


class FewerClusters(UserWarning):
    """A cluster had fewer than two prompts: there are fewer clusters than asked for."""


class DroppedPairs(UserWarning):
    """Pairs whose two versions leave the same state: they say nothing about a direction."""


@dataclass(frozen=True)
class GACT:
    """Gradient-refined adaptive steering.

    Args:
        n_clusters: directions in each layer.
        layers: blocks to steer by default; None for those whose probe beats the largest cluster's share by ``margin``.
        alpha: strength by default, as a share of the layer's mean norm.
        epochs, lr, weight_decay: of the probes (AdamW, full batches).
        shared: one set of centroids, from the differences of all layers pooled.
        margin: by how much a probe's validation accuracy has to beat chance for its layer to be steered.
        validation: share of the prompts that no probe is trained on.
        n_init: starts of k-means.
        seed: of k-means and of the split.
    """

    n_clusters: int = 3
    layers: tuple[int, ...] | list[int] | None = None
    alpha: float = 0.1
    epochs: int = 200
    lr: float = 1e-3
    weight_decay: float = 1e-2
    shared: bool = False
    margin: float = 0.1
    validation: float = 0.2
    n_init: int = 10
    seed: int = 42

    def __post_init__(self) -> None:
        for name, low in {"n_clusters": 1, "epochs": 1, "n_init": 1}.items():
            if getattr(self, name) < low:
                raise InvalidInput(f"{name}={getattr(self, name)}: must be at least {low}")

    def fit(self, pairs: PairActivations) -> SteeringModel:
        """Directions and probes from the states of paired prompts.

        Args:
            pairs: of :func:`~broadsheet.interpretability.g_act.pairs.collect_pairs`.

        Returns:
            the fitted :class:`SteeringModel`, on the CPU.

        Raises:
            InvalidInput: fewer pairs than twice the clusters, or no pair whose versions differ.

        Warns:
            DroppedPairs: pairs without any difference were left out.
            FewerClusters: a cluster had fewer than two members.
        """
        pairs = self._differing(pairs)
        n, n_layers, d = pairs.h_plus.shape
        if n < 2 * self.n_clusters:
            raise InvalidInput(f"{n} pairs for {self.n_clusters} clusters: at least {2 * self.n_clusters} are needed")
        differences = pairs.differences.float().cpu()
        labels = self._clusters(differences)
        k = int(labels.max()) + 1
        model = _empty(pairs, k, n, self.alpha, label_layers=n_layers if self.shared else 1)
        model.labels.copy_(labels if self.shared else labels[:, :1])
        if self.shared:
            everything = differences.flatten(0, 1)
            centroids = torch.stack([everything[labels.flatten() == c].mean(0) for c in range(k)])
            model.centroids.copy_(centroids.expand(n_layers, k, d))
        else:
            for c in range(k):  # c_{k,l}: the mean difference of its members, in every layer
                model.centroids[:, c] = differences[labels[:, 0] == c].mean(0)
        self._probe(model, pairs, labels)
        if self.layers is not None:
            for layer in self.layers:
                model._row(layer)
            model.steered_layers = tuple(self.layers)
        else:
            _, held = split_prompts(n, self.validation, self.seed)
            chance = labels[held].T.float()
            largest = torch.stack([row.long().bincount().max() / len(held) for row in chance])
            good = (model.val_accuracy > largest + self.margin) | torch.tensor(k == 1)
            model.steered_layers = tuple(layer for layer, keep in zip(pairs.layers, good.tolist(), strict=True) if keep)
        _remember(model)
        return model

    def _differing(self, pairs: PairActivations) -> PairActivations:
        same = pairs.differences.flatten(1).norm(dim=1) == 0
        if bool(same.all()):
            raise InvalidInput(f"all {len(pairs)} pairs leave the same state in both versions: are the texts the same?")
        if bool(same.any()):
            warnings.warn(
                f"{int(same.sum())} of {len(pairs)} pairs differ in nothing: left out", DroppedPairs, stacklevel=3
            )
            return pairs.subset((~same).nonzero().flatten())
        return pairs

    def _clusters(self, differences: Tensor) -> Tensor:
        """Labels ``[n, layers]``, the same in every layer unless ``shared``."""
        n, n_layers, d = differences.shape
        points = differences.reshape(n * n_layers, d) if self.shared else flattened(differences)
        k = self.n_clusters
        while True:
            found = clusters_of(points.double().numpy(), k, self.n_init, self.seed)
            if k == 1 or np.bincount(found, minlength=k).min() >= 2:
                break
            k -= 1
        if k < self.n_clusters:
            warnings.warn(
                f"{self.n_clusters} clusters asked for, one had fewer than two members: {k} made", FewerClusters,
                stacklevel=3,
            )  # fmt: skip
        labels = torch.from_numpy(renumbered(found))
        return labels.reshape(n, n_layers) if self.shared else labels[:, None].expand(n, n_layers)

    def _probe(self, model: SteeringModel, pairs: PairActivations, labels: Tensor) -> None:
        train, held = split_prompts(len(pairs), self.validation, self.seed)
        x, y = stacked(pairs, labels, train)
        probes = train_probes(x, y, model.n_clusters, epochs=self.epochs, lr=self.lr, weight_decay=self.weight_decay)
        model.set_probes(probes)
        set_scores(model, *stacked(pairs, labels, held))


def stacked(pairs: PairActivations, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """States of all roles ``[layers, n, d]`` and their clusters ``[layers, n]``, for some prompts."""
    states = torch.cat([h[rows] for h in pairs.states.values()]).transpose(0, 1).float().cpu()
    return states, labels[rows].repeat(len(pairs.states), 1).T.contiguous()


def set_scores(model: SteeringModel, states: Tensor, labels: Tensor) -> None:
    """Validation scores of a model's probes."""
    scores = score_probes(model.probes, states, labels)
    model.val_accuracy.copy_(scores.accuracy)
    model.macro_f1.copy_(scores.macro_f1)


def mean_difference(
    pairs: PairActivations, *, layers: tuple[int, ...] | list[int] | None = None, alpha: float = 0.1
) -> SteeringModel:
    """The rival to beat: one direction in each layer, the mean difference of all pairs (CAA).

    Args:
        pairs: of :func:`~broadsheet.interpretability.g_act.pairs.collect_pairs`.
        layers: blocks to steer by default; None for all.
        alpha: strength by default, as a share of the layer's mean norm.

    Reference: Rimsky et al. (arXiv:2312.06681).
    """
    if not bool(pairs.differences.norm() > 0):
        raise InvalidInput(f"all {len(pairs)} pairs leave the same state in both versions: are the texts the same?")
    model = _empty(pairs, 1, len(pairs), alpha)
    model.centroids.copy_(pairs.differences.float().mean(0)[:, None])
    model.val_accuracy.fill_(1)
    model.macro_f1.fill_(1)
    for layer in layers or ():
        model._row(layer)
    model.steered_layers = model.layers if layers is None else tuple(layers)
    _remember(model)
    return model


def prompt_hint(prompts: list[str], hint: str, template: str = "{prompt} {hint}") -> list[str]:
    """Ask for it: the baseline that changes the prompt and leaves the model alone.

    Args:
        prompts: as they are.
        hint: such as ``"Write it in C++."``.
        template: with ``{prompt}`` and ``{hint}``.
    """
    if "{prompt}" not in template or "{hint}" not in template:
        raise InvalidInput(f"template={template!r}: expected one with {{prompt}} and {{hint}}")
    return [template.replace("{hint}", hint).replace("{prompt}", prompt) for prompt in prompts]


def _empty(pairs: PairActivations, k: int, n: int, alpha: float, label_layers: int = 1) -> SteeringModel:
    blocks: Any = pairs.blocks
    model = SteeringModel(
        list(pairs.layers), pairs.h_plus.shape[-1], k, n, pairs.site, float(alpha),
        blocks=blocks if isinstance(blocks, str) else None, label_layers=label_layers,
    )  # fmt: skip
    model.blocks_finder = blocks
    unsteered = [h for role, h in pairs.states.items() if role != "plus"]
    # s_l: the mean norm of what is there before steering.
    model.norms.copy_(torch.stack([h.float().norm(dim=-1).mean(0) for h in unsteered]).mean(0))
    return model


def _remember(model: SteeringModel) -> None:
    """Write what fitting decided into the configuration that is saved beside the weights."""
    config: Any = getattr(model, "_hub_mixin_config", None)
    if isinstance(config, dict):
        config["steered_layers"] = list(model.steered_layers)
