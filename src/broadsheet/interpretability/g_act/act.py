"""ACT, the baseline: heads are steered by probes of clusters, each as strongly as the state needs it.

Heads' outputs are taken where they are still apart, before the output matrix. For every head the questions are
clustered by the difference between their two versions; in each cluster a logistic regression tells the versions apart.
The heads with the most accurate probes, a number for each cluster, are steered along their probe's normal::

    z <- z + alpha * sigma * theta * (w0 + 1 - p(z))        p: what the probe gives the wanted version

Reference: Wang et al. (arXiv:2406.00034), built from its description.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.injection import Positions, Strength, injecting, strength
from broadsheet.interpretability.g_act.pairs import PairActivations
from broadsheet.interpretability.g_act.probes import clusters_of, split_prompts
from broadsheet.interpretability.g_act.sites import places

LEAST_VALIDATION = 5  # questions of a cluster; with fewer its probes count as worth nothing


class ACTModel(nn.Module, PyTorchModelHubMixin):
    """Heads to steer, with a probe each; made by :class:`ACT`.

    Args:
        n_layers, n_heads, head_dim, n_clusters: sizes of what was fitted.
        n_chosen: (head, cluster) pairs that are steered.
        alpha, w0: strength, and what is added whatever the probe says.
        layers: numbers of the blocks.
    """

    accuracy: Tensor
    macro_f1: Tensor
    questions: Tensor
    chosen: Tensor
    coef: Tensor
    intercept: Tensor
    sigma: Tensor

    def __init__(
        self,
        n_layers: int,
        n_heads: int,
        head_dim: int,
        n_clusters: int,
        n_chosen: int,
        alpha: float = 12.0,
        w0: float = 0.0,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.alpha, self.w0 = n_heads, head_dim, alpha, w0
        self.layers = tuple(range(n_layers)) if layers is None else tuple(layers)
        self.register_buffer("accuracy", torch.zeros(n_layers, n_heads, n_clusters))
        self.register_buffer("macro_f1", torch.zeros(n_layers, n_heads, n_clusters))
        self.register_buffer("questions", torch.zeros(n_layers, n_heads, n_clusters, dtype=torch.long))
        self.register_buffer("chosen", torch.zeros(n_chosen, 3, dtype=torch.long))  # layer's row, head, cluster
        self.register_buffer("coef", torch.zeros(n_chosen, head_dim))
        self.register_buffer("intercept", torch.zeros(n_chosen))
        self.register_buffer("sigma", torch.zeros(n_chosen))

    def steered(
        self,
        model: nn.Module,
        alpha: Strength | None = None,
        *,
        layers: Sequence[int] | None = None,
        positions: Positions = "last",
        allow_nested: bool = False,
    ) -> AbstractContextManager[nn.Module]:
        """The model steered inside the block.

        Args:
            model: the one that the states came from.
            alpha: strength; None for the fitted one, ``[batch]`` for one of each row.
            layers: blocks to steer; None for all that have chosen heads.
            positions, allow_nested: as in :meth:`~broadsheet.interpretability.g_act.model.SteeringModel.steered`.
        """
        changes, times_alpha = strength(self.alpha if alpha is None else alpha)
        rows = sorted(set(self.chosen[:, 0].tolist()))
        rows = [row for row in rows if layers is None or self.layers[row] in layers]
        if not changes or not rows:
            return injecting(model, [], lambda i, x: x)
        where = places(model, "head_out", [self.layers[row] for row in rows])
        rules = [_Heads(self, row) for row in rows]

        def rule(i: int, states: Tensor) -> Tensor:
            return times_alpha(rules[i](states))

        return injecting(model, where, rule, positions, allow_nested=allow_nested)

    def to_frame(self) -> pd.DataFrame:
        """One row for each steered (head, cluster): ``layer``, ``head``, ``cluster``, ``accuracy``, ``sigma``."""
        rows = [
            (self.layers[layer], head, cluster, float(self.accuracy[layer, head, cluster]), float(sigma))
            for (layer, head, cluster), sigma in zip(self.chosen.tolist(), self.sigma, strict=True)
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "cluster", "accuracy", "sigma"])


class _Heads:
    """What is added to the heads' outputs of one layer, ``[batch, time, heads * head_dim]``."""

    def __init__(self, act: ACTModel, row: int) -> None:
        mine = act.chosen[:, 0] == row
        coef = act.coef[mine]
        unit = coef / coef.norm(dim=1, keepdim=True)
        step = act.sigma[mine, None] * unit
        self.parts = (act.chosen[mine, 1], coef, act.intercept[mine], step)
        self.at: dict[torch.device, tuple[Tensor, ...]] = {}
        self.w0, self.size = act.w0, act.head_dim

    def __call__(self, x: Tensor) -> Tensor:
        if x.device not in self.at:
            self.at[x.device] = tuple(part.to(x.device) for part in self.parts)
        heads, coef, intercept, step = self.at[x.device]
        z = x.float().unflatten(-1, (-1, self.size))  # heads apart
        wanted = torch.sigmoid((z[..., heads, :] * coef).sum(-1) + intercept)
        added = (self.w0 + 1 - wanted)[..., None] * step
        return torch.zeros_like(z).index_add(-2, heads, added).flatten(-2)


@dataclass(frozen=True)
class ACT:
    """Adaptive activation steering by clusters of questions.

    Args:
        n_clusters: of the questions, in every head.
        n_heads: heads steered for each cluster.
        alpha, w0: strength, and what is added whatever the probe says.
        validation: share of the questions that no probe is trained on.
        n_init: starts of k-means.
        seed: of k-means and of the split.
    """

    n_clusters: int = 3
    n_heads: int = 24
    alpha: float = 12.0
    w0: float = 0.0
    validation: float = 0.2
    n_init: int = 10
    seed: int = 42

    def fit(self, pairs: PairActivations) -> ACTModel:
        """Probes of every head and cluster, and the heads to steer.

        Args:
            pairs: collected at ``site="head_out"``.

        Raises:
            InvalidInput: states of another site, or fewer pairs than twice the clusters.
        """
        if pairs.site != "head_out":
            raise InvalidInput(f"site={pairs.site!r}: ACT works on heads, collect the pairs at site='head_out'")
        n, n_layers, width = pairs.h_plus.shape
        if n < 2 * self.n_clusters:
            raise InvalidInput(f"{n} pairs for {self.n_clusters} clusters: at least {2 * self.n_clusters} are needed")
        heads = pairs.n_heads
        if width % heads:
            raise InvalidInput(f"{width} features in {heads} heads: these states do not divide")
        plus, minus = (h.double().unflatten(-1, (heads, width // heads)).numpy() for h in (pairs.h_plus, pairs.h_minus))
        train, held = (rows.numpy() for rows in split_prompts(n, self.validation, self.seed))
        shape = (n_layers, heads, self.n_clusters)
        accuracy, macro_f1, questions = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
        fitted: dict[tuple[int, int, int], tuple[np.ndarray, float, float]] = {}
        for layer in range(n_layers):
            for head in range(heads):
                a, b = plus[:, layer, head], minus[:, layer, head]
                labels = clusters_of(a - b, self.n_clusters, self.n_init, self.seed)
                for cluster in range(self.n_clusters):
                    at = (layer, head, cluster)
                    inside, tested = (rows[labels[rows] == cluster] for rows in (train, held))
                    if not len(inside):
                        continue
                    questions[at] = len(tested)
                    fitted[at], score, f1 = _probe(a, b, inside, tested)
                    # A cluster with too few held-out questions cannot be judged: it counts as worth nothing.
                    if len(tested) >= LEAST_VALIDATION:
                        accuracy[at], macro_f1[at] = score, f1
        chosen = self._best(accuracy, fitted)
        model = ACTModel(
            n_layers, heads, width // heads, self.n_clusters, len(chosen), float(self.alpha), float(self.w0),
            list(pairs.layers),
        )  # fmt: skip
        model.accuracy.copy_(torch.from_numpy(accuracy))
        model.macro_f1.copy_(torch.from_numpy(macro_f1))
        model.questions.copy_(torch.from_numpy(questions))
        model.chosen.copy_(torch.tensor(chosen))
        model.coef.copy_(torch.from_numpy(np.stack([fitted[at][0] for at in chosen])))
        model.intercept.copy_(torch.tensor([fitted[at][1] for at in chosen]))
        model.sigma.copy_(torch.tensor([fitted[at][2] for at in chosen]))
        return model

    def _best(self, accuracy: np.ndarray, fitted: dict) -> list[tuple[int, int, int]]:
        """The most accurate heads of every cluster; ties go to earlier ones."""
        found = []
        for cluster in range(self.n_clusters):
            known = [at for at in fitted if at[2] == cluster]
            known.sort(key=lambda at: (-accuracy[at], at))
            found += known[: self.n_heads]
        return sorted(found)


def _probe(
    a: np.ndarray, b: np.ndarray, train: np.ndarray, held: np.ndarray
) -> tuple[tuple[np.ndarray, float, float], float, float]:
    """Coefficients, intercept and spread along the normal; accuracy and macro-F1 on held-out questions."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    x, y = np.concatenate([a[train], b[train]]), np.repeat([1, 0], len(train))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=1000).fit(x, y)
    coef = probe.coef_[0]
    size = np.linalg.norm(coef)
    sigma = float((x @ (coef / size)).std()) if size > 0 else 0.0
    if not len(held):
        return (coef, float(probe.intercept_[0]), sigma), 0.0, 0.0
    answer = probe.predict(np.concatenate([a[held], b[held]]))
    truth = np.repeat([1, 0], len(held))
    f1 = float(f1_score(truth, answer, average="macro", zero_division=0.0))  # type: ignore[arg-type]
    return (coef, float(probe.intercept_[0]), sigma), float((answer == truth).mean()), f1


def two_folds(n: int, seed: int = 42) -> list[tuple[Int[Tensor, " fit"], Int[Tensor, " test"]]]:
    """The baseline's own protocol: fit on one half of the questions, steer the other, and the other way round.

    Args:
        n: questions.
        seed: of the order.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    halves = order[: n // 2].sort().values, order[n // 2 :].sort().values
    return [halves, (halves[1], halves[0])]
