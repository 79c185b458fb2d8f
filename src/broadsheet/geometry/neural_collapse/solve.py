"""Unconstrained features: the exact global minimiser, and the same reached by gradient descent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput, TrainingDiverged
from broadsheet.geometry.neural_collapse.metrics import CollapseMetrics, collapse_metrics
from broadsheet.geometry.neural_collapse.theory import Decay, _counts, _decays, gof_prediction
from broadsheet.nn.plotting import CYCLE, new_axes
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator

LOSSES = ("mse", "ce")
CURVES = {
    "nc1": "NC1",
    "nc2_w": "NC2, weights",
    "nc2_h": "NC2, means",
    "nc3_wh": "NC3, logits",
    "nc3_duality": "NC3, duality",
}


@dataclass(frozen=True)
class FreeFeatures:
    """Features and a deep linear head, optimised directly.

    Attributes:
        weights: of each layer, ``[d_1, d]`` ... ``[K, d_(M-1)]``; the logits are ``W_M ... W_1 h``.
        bias: ``[K]`` of the last layer, or None.
        features: ``[n, d]``.
        labels: ``[n]``.
        loss: ``"mse"`` or ``"ce"``.
        weight_decay: of each layer.
        feature_decay: of the features.
        losses: the objective at every step of the optimisation; empty for an exact minimiser.
        curve: step -> metrics, where they were recorded.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    loss: str
    weight_decay: tuple[float, ...]
    feature_decay: float
    losses: Float[Tensor, " steps"]
    curve: dict[int, dict[str, float]]

    @property
    def product(self) -> Float[Tensor, "K d"]:
        """All weights multiplied."""
        product = self.weights[0]
        for weight in self.weights[1:]:
            product = weight @ product
        return product

    @property
    def counts(self) -> Int[Tensor, " K"]:
        return torch.bincount(self.labels, minlength=len(self.weights[-1]))

    def objective(self) -> Tensor:
        """The loss with all decays, differentiable in weights, bias and features."""
        return objective(
            self.weights, self.bias, self.features, self.labels, self.loss, self.weight_decay, self.feature_decay
        )

    def metrics(self, target: str = "auto") -> CollapseMetrics:
        """Distances from the collapsed geometry; targets as in :func:`collapse_metrics`."""
        return collapse_metrics(
            self.features, self.labels, self.product, self.bias, target, self.counts, self.weight_decay,
            self.feature_decay, len(self.weights),
        )  # fmt: skip

    def imbalance(self) -> float:
        """Largest relative difference between neighbouring layers' decayed Gram matrices; 0 at stationary points."""
        decays, weights = self.weight_decay, [weight.detach() for weight in self.weights]
        h = self.features.detach()
        pairs = [(a * w @ w.T, b * v.T @ v) for (w, v), (a, b) in zip(pairwise(weights), pairwise(decays), strict=True)]
        first = decays[0] * weights[0].T @ weights[0]
        pairs.append((self.feature_decay * h.T @ h, first))
        return max(float((a - b).norm() / a.norm().clamp_min(1e-300)) for a, b in pairs)

    def to_frame(self) -> pd.DataFrame:
        """The recorded metrics, one row for each step."""
        return pd.DataFrame.from_dict(self.curve, orient="index").rename_axis("step").reset_index()

    def plot(self, ax: Any = None) -> Any:
        """The metrics against the steps, both on logarithmic scales; returns the axes."""
        if not self.curve:
            raise InvalidInput("nothing was recorded: hand record= to solve_ufm")
        ax, table = new_axes(ax), self.to_frame()
        for (name, label), colour in zip(CURVES.items(), CYCLE, strict=False):
            if bool(table[name].notna().to_numpy().any()):
                ax.plot(table["step"].clip(lower=1), table[name], color=colour, label=label)
        ax.set(xscale="log", yscale="log", xlabel="step", ylabel="distance from collapse")
        ax.legend()
        return ax


def objective(
    weights: Sequence[Tensor],
    bias: Tensor | None,
    features: Tensor,
    labels: Tensor,
    loss: str,
    weight_decay: Sequence[float],
    feature_decay: float,
) -> Tensor:
    """``1/(2N) ||W_M ... W_1 H - Y||^2`` (or mean cross-entropy), and half of every decay times what it is on."""
    out = features
    for weight in weights:
        out = out @ weight.T
    if bias is not None:
        out = out + bias
    if loss == "mse":
        y = torch.nn.functional.one_hot(labels, out.shape[1]).to(out)
        fit = (out - y).square().sum() / (2 * len(out))
    else:
        fit = torch.nn.functional.cross_entropy(out, labels)
    parts = [decay / 2 * weight.square().sum() for decay, weight in zip(weight_decay, weights, strict=True)]
    return fit + torch.stack(parts).sum() + feature_decay / 2 * features.square().sum()


def ufm_optimum(
    counts: Sequence[int] | Tensor,
    d: int,
    depth: int = 1,
    wd: Decay = 5e-3,
    fd: float = 5e-3,
    bias: bool = False,
    widths: Sequence[int] | None = None,
    seed: int = 0,
) -> FreeFeatures:
    """One exact global minimiser under squared error; hidden bases are random (arXiv:2301.00437, theorems 3.1 and 4.1).

    Args:
        counts: samples of each class.
        d: of the features.
        depth: linear layers.
        wd: weight decay, or one for each layer.
        fd: feature decay.
        bias: of the last layer, without decay; only for classes of the same size.
        widths: of the hidden layers; None for ``d`` each.
        seed: of the bases.

    Raises:
        InvalidInput: a bias with classes of different sizes, which theory does not cover, or wrong widths.
    """
    n = _counts(counts)
    k, total = len(n), int(n.sum())
    hidden = list(widths) if widths is not None else [d] * (depth - 1)
    if d < 1 or len(hidden) != depth - 1 or any(width < 1 for width in hidden):
        raise InvalidInput(f"d={d}, widths={hidden}: expected positive widths, {depth - 1} of hidden layers")
    if bias and int(n.min()) != int(n.max()):
        raise InvalidInput(f"counts={n.tolist()} with a bias: the minimiser is known for classes of the same size only")
    decays = _decays(wd, fd, depth)
    narrow = min([d, *hidden])
    if bias:
        # In the space across (1, ..., 1) all K - 1 directions are alike: each is one class of the balanced problem.
        frame = torch.linalg.qr(torch.cat([torch.ones(k, 1), torch.eye(k)[:, : k - 1]], 1).double())[0][:, 1:]
        prediction = gof_prediction(n, decays, fd, depth)
        sigma2, used = prediction.sigma2[:1].expand(k - 1).clone(), min(narrow, k - 1)
        sigma2[used:] = 0
    else:
        prediction = gof_prediction(n, decays, fd, depth, narrow)
        frame, sigma2 = torch.eye(k, dtype=torch.float64), prediction.sigma2
    place = sigma2.nonzero().flatten()
    random = generator(seed)
    bases = [_orthonormal(width, len(place), random) for width in [d, *hidden]]  # one direction for each class kept
    c = (sigma2[place] * math.prod(decays)) ** (1 / depth)
    sides = [*bases, frame[:, place]]
    weights = tuple(
        (out * (c / decay).sqrt()) @ into.T for into, out, decay in zip(sides[:-1], sides[1:], decays, strict=True)
    )
    sigma = sigma2[place].sqrt()
    means = (frame[:, place] * (sigma / (sigma2[place] + total * fd))) @ bases[0].T
    labels = torch.arange(k).repeat_interleave(n)
    b = torch.full((k,), 1 / k, dtype=torch.float64) if bias else None
    return FreeFeatures(weights, b, means[labels], labels, "mse", decays, fd, torch.empty(0), {})


def _orthonormal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """Random orthonormal columns, float64."""
    if columns == 0:
        return torch.zeros(rows, 0, dtype=torch.float64)
    return torch.linalg.qr(torch.randn(rows, columns, generator=random, dtype=torch.float64))[0]


def solve_ufm(
    counts: Sequence[int] | Tensor,
    d: int = 64,
    depth: int = 1,
    wd: Decay = 5e-3,
    fd: float = 5e-3,
    loss: str = "mse",
    bias: bool = False,
    *,
    widths: Sequence[int] | None = None,
    steps: int = 4000,
    lr: float = 0.1,
    momentum: float = 0.9,
    init_std: float = 0.1,
    record: int | None = None,
    target: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> FreeFeatures:
    """Find features and head by gradient descent with momentum on everything at once.

    Args:
        counts, d, depth, wd, fd, widths: as in :func:`ufm_optimum`.
        loss: ``"mse"`` or ``"ce"``.
        bias: a bias in the last layer, without decay, from 0.
        steps, lr, momentum: of the descent.
        init_std: standard deviation of all initial entries.
        record: metrics are kept at about this many steps, evenly on a logarithmic scale; None for none.
        target: of the recorded metrics, as in :func:`collapse_metrics`.
        seed: of the initial values.
        dtype, device: of the computation.
        progress: where steps are shown.

    Raises:
        InvalidInput: a setting out of range.
        TrainingDiverged: the objective is not finite.
    """
    n = _counts(counts)
    decays = _decays(wd, fd, depth)
    if loss not in LOSSES:
        raise InvalidInput(f"loss={loss!r}: expected one of {', '.join(map(repr, LOSSES))}")
    if steps < 1 or not lr > 0 or not 0 <= momentum < 1:
        raise InvalidInput(
            f"steps={steps}, lr={lr}, momentum={momentum}: expected at least 1, above 0 and 0 to below 1"
        )
    hidden = list(widths) if widths is not None else [d] * (depth - 1)
    if d < 1 or len(hidden) != depth - 1:
        raise InvalidInput(f"d={d}, widths={hidden}: expected a width for each of the {depth - 1} hidden layers")
    k, total, random = len(n), int(n.sum()), generator(seed)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=random, dtype=torch.float64) * init_std
        return made.to(device, dtype).requires_grad_()

    sizes = [d, *hidden, k]
    weights = [draw(out, into) for into, out in pairwise(sizes)]
    features = draw(total, d)
    b = torch.zeros(k, dtype=dtype, device=device, requires_grad=True) if bias else None
    labels = torch.arange(k).repeat_interleave(n).to(device)
    optimizer = torch.optim.SGD([*weights, features, *([b] if b is not None else [])], lr, momentum)
    moments = set() if record is None else {round(steps ** (i / max(record - 1, 1))) for i in range(record)}
    losses, curve = [], {}

    def result() -> FreeFeatures:
        return FreeFeatures(
            tuple(w.detach() for w in weights), None if b is None else b.detach(), features.detach(), labels, loss,
            decays, fd, torch.stack(losses) if losses else torch.empty(0), curve,
        )  # fmt: skip

    with progress.task("free features", total=steps) as task:
        for step in range(1, steps + 1):
            value = objective(weights, b, features, labels, loss, decays, fd)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
            if step in moments:
                curve[step] = result().metrics(target).numbers()
            if step % 100 == 0 or step == steps:
                if not bool(value.isfinite()):
                    raise TrainingDiverged(
                        f"the objective is {float(value)} at step {step}: try a smaller lr than {lr}"
                    )
                task.advance(100 if step % 100 == 0 else step % 100, loss=float(losses[-1]))
    return result()
