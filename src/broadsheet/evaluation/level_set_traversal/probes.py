"""Confidence on straight paths, on triangles and around a path: how large the level set is, and of what shape."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.evaluation.level_set_traversal.inputs import classifier
from broadsheet.evaluation.level_set_traversal.traversal import show
from broadsheet.nn.plotting import SEQUENTIAL, new_figure, style
from broadsheet.nn.seeding import generator

DROPS = (0.0, 0.1, 0.2, 0.3)


def path_confidence(
    model: Any,
    a: Tensor,
    b: Tensor,
    n: int = 21,
    label: Tensor | None = None,
    *,
    normalise: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 512,
) -> Float[Tensor, "B n"]:
    """Confidence in a class along the straight line from ``a`` to ``b``.

    Args:
        model: as in :func:`level_set_traversal`.
        a, b: ``[B, ...]``.
        n: points, both ends included.
        label: ``[B]``; None for the class of ``a``.
        normalise: as in :func:`level_set_traversal`.
        batch_size: images in a forward pass.
    """
    if n < 2 or a.shape != b.shape:
        raise InvalidInput(f"n={n}, shapes {tuple(a.shape)} and {tuple(b.shape)}: expected 2 points or more, one shape")
    f = classifier(model, normalise)
    t = torch.linspace(0, 1, n, device=a.device, dtype=a.dtype)
    with f.ready(a):
        y = _labels(f, a, label)
        points = a[:, None] + t.view(1, -1, *[1] * (a.ndim - 1)) * (b - a)[:, None]
        return f.confidence(points.flatten(0, 1), y.repeat_interleave(n), batch_size).view(len(a), n)


def star_score(confidence: Float[Tensor, "B n"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Mean and least confidence over each path; a level set that keeps both high is star-shaped around its source.

    Args:
        confidence: of :func:`path_confidence`.
    """
    return confidence.mean(1), confidence.min(1).values


@dataclass(frozen=True)
class TriangleConfidence:
    """Confidence in the source's class over the triangle of a source and two ends.

    Attributes:
        weights: ``[P, 3]``, barycentric: of source, first and second end; rows sum to 1.
        confidence: ``[B, P]``.
        images: ``[B, 3, ...]``, the corners.
        n: intervals along an edge.
    """

    weights: Float[Tensor, "P 3"]
    confidence: Float[Tensor, "B P"]
    images: Tensor
    n: int

    @property
    def source_confidence(self) -> Float[Tensor, " B"]:
        return self.confidence[:, int(self.weights[:, 0].argmax())]

    @property
    def mean(self) -> Float[Tensor, " B"]:
        """Over all points of the grid."""
        return self.confidence.mean(1)

    def above(self, drop: float | int) -> Float[Tensor, " B"]:
        """Share of the points whose confidence is at most ``drop`` below the source's."""
        return (self.confidence >= self.source_confidence[:, None] - drop).to(self.confidence.dtype).mean(1)

    @property
    def edges(self) -> Float[Tensor, "B edge"]:
        """On the two edges from the source, the source itself once."""
        on = (self.weights[:, 1] == 0) | (self.weights[:, 2] == 0)
        return self.confidence[:, on.to(self.confidence.device)]

    @property
    def edge_drop(self) -> Float[Tensor, " B"]:
        """By how much the confidence falls on those edges at most."""
        return self.source_confidence - self.edges.min(1).values

    def to_frame(self) -> pd.DataFrame:
        """One row for each triangle."""
        table = {"mean": self.mean, "edge_mean": self.edges.mean(1), "edge_drop": self.edge_drop}
        table |= {f"above_{drop:g}": self.above(drop) for drop in DROPS}
        return pd.DataFrame({name: values.cpu().tolist() for name, values in table.items()})

    def plot(self, row: int = 0, ax: Any = None, pictures: bool = True) -> Any:
        """Filled contours of one triangle, its corners' images beside them; returns the axes.

        Args:
            row: which triangle.
            ax: matplotlib axes, or None for new ones.
            pictures: draw the three images.
        """
        if ax is None:
            with style():
                _, ax = new_figure(3.8, 3.4)
        corners = np.array([[0.5, math.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])  # source on top
        at = self.weights.cpu().double().numpy() @ corners
        drawn = ax.tricontourf(
            at[:, 0], at[:, 1], self.confidence[row].cpu().double().clamp(0, 1).numpy(),
            levels=np.linspace(0, 1, 11), cmap=SEQUENTIAL.removesuffix("_r"),
        )  # fmt: skip
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label="confidence in the source's class")
        ax.set(xlim=(-0.28, 1.28), ylim=(-0.3, 1.16), xticks=[], yticks=[], aspect="equal")
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        if pictures:
            places = ((0.36, 0.88), (-0.28, -0.3), (1.0, -0.3))
            for (x, y), image, name in zip(places, self.images[row], ("source", "end 1", "end 2"), strict=True):
                inset = ax.inset_axes((x, y, 0.28, 0.28), transform=ax.transData)
                show(inset, image)
                inset.set_xlabel(name, fontsize=7, labelpad=1)
        return ax


def triangle_confidence(
    model: Any,
    source: Tensor,
    end1: Tensor,
    end2: Tensor,
    label: Tensor | None = None,
    n: int = 10,
    *,
    normalise: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 512,
) -> TriangleConfidence:
    """Confidence on a grid over triangles, ``(n + 1)(n + 2) / 2`` points each.

    Args:
        model, normalise: as in :func:`level_set_traversal`.
        source, end1, end2: ``[B, ...]``.
        label: ``[B]``; None for the class of the source.
        n: intervals along an edge.
        batch_size: images in a forward pass.
    """
    if n < 1 or not source.shape == end1.shape == end2.shape:
        raise InvalidInput(
            f"n={n}, shapes {[tuple(x.shape) for x in (source, end1, end2)]}: expected n >= 1, one shape"
        )
    f = classifier(model, normalise)
    steps = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
    counts = torch.tensor([(n - i - j, i, j) for i, j in steps], device=source.device)
    weights = counts.to(source.dtype) / n
    corners = torch.stack([source, end1, end2], 1)
    with f.ready(source):
        y = _labels(f, source, label)
        rows = []
        for triangle, one in zip(corners, y, strict=True):  # a triangle at a time: 66 images, not 66 B
            points = torch.tensordot(weights, triangle, dims=1)
            rows.append(f.confidence(points, one.expand(len(points)), batch_size))
    return TriangleConfidence(weights, torch.stack(rows), corners, n)


@dataclass(frozen=True)
class PathWidth:
    """Confidence around a point in directions that are orthogonal to the way.

    Attributes:
        distances: ``[D]``, Euclidean.
        confidence: ``[B, D, S]``, of every direction drawn.
    """

    distances: Float[Tensor, " D"]
    confidence: Float[Tensor, "B D S"]

    def quantiles(self, low: float = 0.05, high: float = 0.95) -> Float[Tensor, "B D 2"]:
        """Two quantiles over the directions."""
        q = torch.tensor([low, high], dtype=self.confidence.dtype, device=self.confidence.device)
        return self.confidence.quantile(q, dim=2).permute(1, 2, 0)


def path_width(
    model: Any,
    x: Tensor,
    direction: Tensor,
    label: Tensor | None = None,
    distances: Sequence[float | int] = (0.5, 1.0, 1.5, 2.0),
    n_dirs: int = 256,
    *,
    normalise: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 512,
) -> PathWidth:
    """Probe how wide the level set is beside a path.

    Args:
        model, normalise: as in :func:`level_set_traversal`.
        x: ``[B, ...]``, points of a path.
        direction: ``[B, ...]``, of the path there; directions are drawn orthogonal to it.
        label: ``[B]``; None for the class of ``x``.
        distances: how far to go, Euclidean.
        n_dirs: directions.
        seed: of the directions.
        batch_size: images in a forward pass.
    """
    if x.shape != direction.shape or n_dirs < 1 or not distances or min(distances) < 0:
        raise InvalidInput(
            f"n_dirs={n_dirs}, distances={list(distances)}: expected one direction or more, distances >= 0"
        )
    f, random = classifier(model, normalise), generator(seed)
    far = torch.tensor(list(distances), dtype=x.dtype, device=x.device)
    with f.ready(x):
        y = _labels(f, x, label)
        rows = []
        for point, along, one in zip(x, direction, y, strict=True):
            draw = torch.randn(n_dirs, point.numel(), generator=random, dtype=torch.float64).to(x)
            unit = along.flatten() / along.norm().clamp_min(torch.finfo(x.dtype).tiny)
            draw = draw - (draw @ unit)[:, None] * unit
            draw = draw / draw.norm(dim=1, keepdim=True)
            probes = point + (far[:, None, None] * draw).view(-1, *point.shape)
            rows.append(f.confidence(probes, one.expand(len(probes)), batch_size).view(len(far), n_dirs))
    return PathWidth(far, torch.stack(rows))


def _labels(f: Any, x: Tensor, label: Tensor | None) -> Int[Tensor, " B"]:
    if label is None:
        with torch.no_grad():
            return f.logits(x).argmax(1)
    y = torch.as_tensor(label, device=x.device).long()
    return y.expand(len(x)) if y.ndim == 0 else y
