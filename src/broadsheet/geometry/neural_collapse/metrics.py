"""How near a layer's features and weights are to the collapsed geometry: NC1 to NC4.

NC1: samples lie at their class's mean. NC2: means and weights form the frame. NC3: weights and means are the same up to
scale. NC4: the head decides as the nearest mean does. Frames are compared after division by the Frobenius norm:

============== ========================================= =================================================
``target``     frame                                     where theory puts it
============== ========================================= =================================================
``etf``        ``I - 11^T/K`` (simplex), means centred   balanced, last layer with bias; cross entropy
``orthogonal`` ``I``                                     balanced, squared error, no bias
``gof``        ``diag`` of lengths from counts and decay imbalanced, squared error, no bias
============== ========================================= =================================================
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.neural_collapse.theory import Decay, FramePrediction, LayerPrediction, gof_prediction
from broadsheet.nn.moments import ClassMoments
from broadsheet.nn.plotting import COLOURS, new_axes, new_figure, style

TARGETS = ("etf", "orthogonal", "gof")


class CollapseWarning(UserWarning):
    """A class that cannot collapse, or a head too narrow for the frame."""


@dataclass(frozen=True)
class CollapseMetrics:
    """Distances from the collapsed geometry, 0 at it; NaN where weights were not given.

    Attributes:
        target: the frame that was compared with.
        nc1: within-class over between-class scatter, ``trace(S_W pinv(S_B)) / K``.
        nc2_w: of the weights' Gram matrix from the frame.
        nc2_h: of the class means' Gram matrix.
        nc3_wh: of the logits of the class means.
        nc3_duality: of the weights from the class means.
        ncc_agreement: share of samples that head and nearest class mean put into the same class (NC4).
        class_means: ``[K, d]``, float64.
        global_mean: ``[d]``, of all samples.
        counts: ``[K]``.
        weights_gram, means_gram, logits: ``[K, K]``, what was compared, each of Frobenius norm 1.
        frame_weights, frame_means, frame_logits: ``[K, K]``, what they were compared with.
    """

    target: str
    nc1: float
    nc2_w: float
    nc2_h: float
    nc3_wh: float
    nc3_duality: float
    ncc_agreement: float
    class_means: Float[Tensor, "K d"]
    global_mean: Float[Tensor, " d"]
    counts: Int[Tensor, " K"]
    weights_gram: Tensor | None = None
    means_gram: Tensor | None = None
    logits: Tensor | None = None
    frame_weights: Tensor | None = None
    frame_means: Tensor | None = None
    frame_logits: Tensor | None = None

    def numbers(self) -> dict[str, float]:
        """The metrics by name."""
        names = ("nc1", "nc2_w", "nc2_h", "nc3_wh", "nc3_duality", "ncc_agreement")
        return {name: getattr(self, name) for name in names}

    def plot(self, which: str = "weights", axes: Any = None) -> Any:
        """Gram matrices found and predicted, side by side; returns the two axes.

        Args:
            which: ``"weights"``, ``"means"`` or ``"logits"``.
            axes: two matplotlib axes, or None for new ones.
        """
        found = {"weights": self.weights_gram, "means": self.means_gram, "logits": self.logits}
        if which not in found:
            raise InvalidInput(f"which={which!r}: expected one of {', '.join(found)}")
        frame, seen = getattr(self, f"frame_{which}"), found[which]
        if seen is None:
            raise InvalidInput("there are no weights: hand in weight= to compare them")
        return gram_plot(seen, frame, axes)


def gram_plot(found: Tensor, predicted: Tensor, axes: Any = None) -> Any:
    """Two matrices on one scale of colours, found and predicted; returns the axes."""
    if axes is None:
        with style():
            _, axes = new_figure(6.4, 3.0, 2)
    limit = float(torch.stack([found.abs().max(), predicted.abs().max()]).max())
    for ax, matrix, title in zip(axes, (found, predicted), ("found", "predicted"), strict=True):
        picture = ax.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(title=title, xlabel="class", xticks=[], yticks=[])
        ax.grid(False)
    axes[0].set_ylabel("class")
    axes[0].figure.colorbar(picture, ax=list(axes), shrink=0.8)
    return axes


def collapse_metrics(
    features: Float[Tensor, "n d"],
    labels: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    target: str = "auto",
    class_counts: Tensor | None = None,
    wd: Decay | None = None,
    fd: float | int | None = None,
    depth: int = 1,
    layer: int = 1,
) -> CollapseMetrics:
    """All metrics of one set of features.

    Args:
        features: ``[n, d]``, the input of the (first) linear layer; moments are taken in float64.
        labels: ``[n]`` integers, or one-hot rows ``[n, K]``.
        weight: ``[K, d]``: the last layer's, or the product of the head's linear layers from these features on.
        bias: ``[K]``, of the last layer.
        target: ``"etf"``, ``"orthogonal"``, ``"gof"``, or ``"auto"``: etf with a bias, orthogonal without one where
            classes are balanced, gof else where decays are given.
        class_counts: ``[K]``, of the training set where ``features`` is only a part of it; for ``"gof"``.
        wd, fd: weight decay (of each layer) and feature decay; for ``"gof"``.
        depth: linear layers of the whole head; for ``"gof"``.
        layer: which of them reads ``features``.

    Raises:
        InvalidInput: labels that are not classes, other shapes, a target that theory does not give, NaN.
    """
    labels = as_labels(labels)
    n_classes = int(labels.max()) + 1 if weight is None else len(weight)
    moments = ClassMoments(n_classes).update(features, labels)
    counts = moments.counts if class_counts is None else class_counts
    name, prediction = choose_target(target, counts, bias, wd, fd, depth)
    metrics = metrics_of(moments, weight, name, prediction, layer)
    if weight is None:
        return metrics
    agree = nearest_mean_agreement(features, metrics.class_means, weight, bias)
    return CollapseMetrics(**{**vars(metrics), "ncc_agreement": float(agree.double().mean())})


def choose_target(
    target: str, counts: Tensor, bias: Tensor | None, wd: Decay | None, fd: float | None, depth: int
) -> tuple[str, FramePrediction | None]:
    """The frame to compare with, and its lengths where it is the general one."""
    balanced = int(counts.min()) == int(counts.max())
    known = wd is not None and fd is not None
    if target == "auto":
        if bias is not None:
            target = "etf"
        elif not balanced and known:
            target = "gof"
        else:
            target = "orthogonal"
    if target not in TARGETS:
        raise InvalidInput(f"target={target!r}: expected 'auto', {', '.join(map(repr, TARGETS))}")
    if target != "gof":
        return target, None
    if bias is not None:
        raise InvalidInput("target='gof': the general orthogonal frame is proved only for a head without bias")
    if wd is None or fd is None:
        raise InvalidInput("target='gof': its lengths depend on the decays: hand in wd= and fd=")
    return target, gof_prediction(counts, wd, fd, depth)


def metrics_of(
    moments: ClassMoments,
    weight: Tensor | None = None,
    target: str = "etf",
    prediction: FramePrediction | None = None,
    layer: int = 1,
) -> CollapseMetrics:
    """The metrics from moments that were streamed; NC4 needs the samples and is left NaN.

    Args:
        moments: of the features.
        weight: ``[K, d]``, as in :func:`collapse_metrics`.
        target: ``"etf"``, ``"orthogonal"`` or ``"gof"``.
        prediction: for ``"gof"``.
        layer: of the head, for ``"gof"``.
    """
    counts, means = moments.counts, moments.means
    n_classes, width = means.shape
    _present(counts)
    centred = means - moments.global_mean
    frames = _frames(target, n_classes, prediction, layer, means)
    seen = centred if target == "etf" else means
    means_gram = _unit(seen @ seen.T)
    gram = logits = None
    nc2_w = nc3_wh = duality = math.nan
    if weight is not None:
        if weight.shape != means.shape:
            raise InvalidInput(f"weight has shape {tuple(weight.shape)}: expected {(n_classes, width)}")
        a = weight.detach().to(means)
        needed = n_classes - 1 if target == "etf" else n_classes
        if width < needed:
            warnings.warn(
                f"{width} features for {n_classes} classes: the whole frame does not fit, distances from it stay large",
                CollapseWarning,
                stacklevel=3,
            )
        gram, logits = _unit(a @ a.T), _unit(a @ seen.T)
        nc2_w, nc3_wh = float((gram - frames[0]).norm()), float((logits - frames[2]).norm())
        scaled = seen if prediction is None else prediction.layer(layer).ratio.to(seen)[:, None] * seen
        duality = float((_unit(a) - _unit(scaled)).norm())
    return CollapseMetrics(
        target,
        nc1(moments),
        nc2_w,
        float((means_gram - frames[1]).norm()),
        nc3_wh,
        duality,
        math.nan,
        means,
        moments.global_mean,
        counts,
        gram,
        means_gram,
        logits,
        *frames,
    )


def nc1(moments: ClassMoments) -> float:
    """Within-class scatter in units of the scatter between class means, ``trace(S_W pinv(S_B)) / K``.

    Only the directions of the class means matter, K - 1 of them at most, so no ``d x d`` matrix is inverted; and none
    beyond those can blow the pseudo-inverse up when the classes are nearly points.
    """
    means = moments.means - moments.global_mean
    n_classes = len(means)
    _, s, vt = torch.linalg.svd(means / math.sqrt(n_classes), full_matrices=False)
    keep = torch.zeros_like(s, dtype=torch.bool)
    keep[: n_classes - 1] = True
    keep &= s > 1e-8 * s[0].clamp_min(1e-300)
    if not bool(keep.any()):
        return math.nan  # all class means are the same: between-class scatter is nothing
    directions = vt[keep]
    inside = ((directions @ moments.within) * directions).sum(1)
    return float((inside / s[keep].square()).sum() / n_classes)


def nearest_mean_agreement(features: Tensor, class_means: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """For which samples head and nearest class mean agree, ``[n]`` bool.

    Args:
        features: ``[n, d]``.
        class_means: ``[K, d]``.
        weight: ``[K, d]``.
        bias: ``[K]`` or None.
    """
    h = features.to(class_means)
    logits = h @ weight.to(h).T
    if bias is not None:
        logits = logits + bias.to(h)
    # |h - m|^2 without |h|^2: no [n, K, d] in between
    near = class_means.square().sum(1) - 2 * h @ class_means.T
    return logits.argmax(1) == near.argmin(1)


def as_labels(labels: Tensor) -> Int[Tensor, " n"]:
    """Labels ``[n]`` from labels or one-hot rows."""
    if labels.ndim == 2:
        rows = labels.double()
        if not bool(((rows == 0) | (rows == 1)).all()) or not bool((rows.sum(1) == 1).all()):
            raise InvalidInput(f"labels of shape {tuple(labels.shape)} are no one-hot rows: hand in integers [n]")
        return rows.argmax(1)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InvalidInput(f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: expected integers [n]")
    return labels.long()


def _present(counts: Tensor) -> None:
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise InvalidInput(f"class {missing[0]} has no samples: leave it out, or hand in more data")
    single = (counts == 1).nonzero().flatten().tolist()
    if single:
        warnings.warn(
            f"class {single[0]} has a single sample: it has no scatter within it, NC1 is too good",
            CollapseWarning,
            stacklevel=4,
        )


def _frames(
    target: str, n: int, prediction: FramePrediction | None, layer: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices of weights and means and the logits of the means that the frame has, each of norm 1."""
    if target == "gof":
        if prediction is None:
            raise InvalidInput("target='gof' needs a prediction: see gof_prediction")
        if len(prediction.counts) != n:
            raise InvalidInput(f"the prediction is for {len(prediction.counts)} classes, the features have {n}")
        at: LayerPrediction = prediction.layer(layer)
        return tuple(_unit(torch.diag(part).to(like)) for part in (at.weights, at.features, at.outputs))  # type: ignore[reportReturnType]
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    frame = _unit(eye - 1 / n if target == "etf" else eye)
    return frame, frame, frame


def _unit(x: Tensor) -> Tensor:
    """Of Frobenius norm 1; zeros stay."""
    return x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)


def lengths_plot(counts: Tensor, found: Tensor, predicted: Tensor, ax: Any = None, label: str = "found") -> Any:
    """Lengths of class vectors against class counts beside what theory says; returns the axes."""
    ax = new_axes(ax)
    order = counts.argsort()
    ax.plot(counts[order], predicted[order], color=COLOURS["neutral"], label="theory")
    ax.plot(counts, found, "o", color=COLOURS["ours"], label=label)
    ax.set(xlabel="samples of the class", ylabel="length")
    ax.legend()
    return ax
