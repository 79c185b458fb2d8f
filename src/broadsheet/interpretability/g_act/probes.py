"""Linear probes of all layers at once: from a state to the cluster of the prompt that it belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class Probes:
    """One linear map for each layer, on standardised states.

    Attributes:
        weight: ``[layers, clusters, d]``.
        bias: ``[layers, clusters]``.
        mean, std: ``[layers, d]``, of the states in training.
    """

    weight: Float[Tensor, "layers clusters d"]
    bias: Float[Tensor, "layers clusters"]
    mean: Float[Tensor, "layers d"]
    std: Float[Tensor, "layers d"]

    def logits(self, states: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers n clusters"]:
        """One score for each cluster, layer by layer."""
        x = (states - self.mean[:, None]) / self.std[:, None]
        return torch.einsum("lnd,lkd->lnk", x, self.weight) + self.bias[:, None]

    def predict(self, states: Float[Tensor, "layers n d"]) -> Int[Tensor, "layers n"]:
        return self.logits(states).argmax(-1)

    def folded(self) -> tuple[Float[Tensor, "layers clusters d"], Float[Tensor, "layers clusters"]]:
        """Weight and bias that take states as they are: one product for each token."""
        weight = self.weight / self.std[:, None]
        return weight, self.bias - torch.einsum("lkd,ld->lk", weight, self.mean)


def train_probes(
    states: Float[Tensor, "layers n d"],
    labels: Int[Tensor, "layers n"],
    n_clusters: int,
    *,
    start: Probes | None = None,
    epochs: int = 200,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
) -> Probes:
    """Softmax regression by full batches of AdamW; deterministic, because it begins at zero.

    Args:
        states: of each layer.
        labels: cluster of each state.
        n_clusters: classes.
        start: probes to go on with, standardisation included; None begins afresh.
        epochs, lr, weight_decay: of the optimizer.
    """
    if start is None:
        mean, std = states.mean(1), states.std(1, correction=0)
        std = torch.where(std > 1e-6 * std.amax(1, keepdim=True).clamp_min(1e-12), std, 1.0)
        shape = (len(states), n_clusters)
        start = Probes(states.new_zeros(*shape, states.shape[-1]), states.new_zeros(shape), mean, std)
    weight, bias = (x.clone().requires_grad_() for x in (start.weight, start.bias))
    optimizer = torch.optim.AdamW([weight, bias], lr, weight_decay=weight_decay)
    x = (states - start.mean[:, None]) / start.std[:, None]
    with torch.enable_grad():
        for _ in range(epochs):
            logits = torch.einsum("lnd,lkd->lnk", x, weight) + bias[:, None]
            # Sum over layers: each has its own loss, the mean over its states.
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Probes(weight.detach(), bias.detach(), start.mean, start.std)


@dataclass(frozen=True)
class ProbeScores:
    """How well clusters are told from states that no probe was trained on.

    Attributes:
        accuracy, macro_f1: ``[layers]``.
    """

    accuracy: Float[Tensor, " layers"]
    macro_f1: Float[Tensor, " layers"]


def score_probes(probes: Probes, states: Float[Tensor, "layers n d"], labels: Int[Tensor, "layers n"]) -> ProbeScores:
    """Accuracy, and F1 averaged over the clusters that occur."""
    from sklearn.metrics import f1_score

    found = probes.predict(states)
    f1 = [
        float(f1_score(y.numpy(), p.numpy(), labels=np.unique(y.numpy()), average="macro", zero_division=0.0))  # type: ignore[arg-type]
        for y, p in zip(labels.cpu(), found.cpu(), strict=True)
    ]
    return ProbeScores((found == labels).float().mean(1).cpu(), torch.tensor(f1))


def split_prompts(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts for training and for validation, at least one of each.

    Args:
        n: prompts.
        share: for validation.
        seed: of the order.
    """
    if not 0 < share < 1 or n < 2:
        raise InvalidInput(f"validation={share}, {n} prompts: expected a share between 0 and 1, and at least 2 prompts")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(n - 1, max(1, round(share * n)))
    return order[held:].sort().values, order[:held].sort().values


def clusters_of(points: np.ndarray, k: int, n_init: int, seed: int) -> np.ndarray:
    """K-means labels, numbered by each cluster's first member, so that equal groupings have equal labels."""
    from sklearn.cluster import KMeans

    if k == 1:
        return np.zeros(len(points), dtype=np.int64)
    starts: Any = n_init  # the stubs know "auto" only
    labels = KMeans(k, n_init=starts, random_state=seed).fit_predict(points)
    return renumbered(labels)


def renumbered(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same groups, numbered in the order in which they first come."""
    labels = np.asarray(labels)
    order = {label: i for i, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()], dtype=np.int64)
