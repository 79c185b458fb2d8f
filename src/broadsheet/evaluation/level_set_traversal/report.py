"""Blind spots of a whole classifier: every pair of some images, and a report over many."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.evaluation.level_set_traversal.distances import Perceptual, image_distances
from broadsheet.evaluation.level_set_traversal.inputs import classifier
from broadsheet.evaluation.level_set_traversal.probes import path_confidence, triangle_confidence
from broadsheet.evaluation.level_set_traversal.traversal import Traversal, level_set_traversal, show
from broadsheet.nn.plotting import new_figure, style
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator

METHODS = ("level set", "straight", "random")


@dataclass(frozen=True)
class BlindSpotGrid:
    """Ends of the walks between all pairs of some images.

    Attributes:
        images: ``[k, ...]``.
        ends: ``[k, k, ...]``, from the row's image towards the column's; the diagonal holds the images.
        confidence: ``[k, k]``, in the row's class.
        classes: ``[k]``.
    """

    images: Tensor
    ends: Tensor
    confidence: Float[Tensor, "k k"]
    classes: tuple[Any, ...]

    def plot(self, axes: Any = None, names: Sequence[str] | None = None) -> Any:
        """All pictures with their confidences; returns the axes.

        Args:
            axes: ``k x k`` matplotlib axes, or None for new ones.
            names: of the classes.
        """
        k = len(self.images)
        if axes is None:
            with style():
                _, axes = new_figure(1.05 * k, 1.2 * k, k, k, squeeze=False)
        names = [str(name) for name in (self.classes if names is None else names)]
        for i in range(k):
            for j in range(k):
                show(axes[i][j], self.ends[i, j], f"{float(self.confidence[i, j]):.2f}")
            axes[i][0].set_ylabel(f"is {names[i]}", fontsize=8)
            axes[k - 1][i].set_xlabel(f"looks {names[i]}", fontsize=8)
        return axes


def blind_spot_grid(
    model: Any, images: Tensor, classes: Tensor | Sequence[int] | None = None, **how: Any
) -> BlindSpotGrid:
    """Walk from each image towards each other one.

    Args:
        model: as in :func:`level_set_traversal`.
        images: ``[k, ...]``, each classified as its class.
        classes: ``[k]``; None for what the model says.
        **how: handed to :func:`level_set_traversal`.
    """
    k = len(images)
    if k < 2:
        raise InvalidInput(f"{k} image: at least two are needed")
    f = classifier(model, how.get("normalise"))
    with torch.no_grad(), f.ready(images):
        predicted = f.logits(images).argmax(1)
    y = predicted if classes is None else torch.as_tensor(classes, device=images.device).long()
    wrong = (y != predicted).nonzero().flatten().tolist()
    if wrong:
        raise InvalidInput(f"image {wrong[0]} is classified as {int(predicted[wrong[0]])}, not as {int(y[wrong[0]])}")
    i, j = torch.cartesian_prod(torch.arange(k), torch.arange(k)).T.to(images.device)
    found = level_set_traversal(model, images[i], images[j], y[i], **how)
    ends = found.images.view(k, k, *images.shape[1:])
    return BlindSpotGrid(images, ends, found.confidence.view(k, k), tuple(y.tolist()))


@dataclass(frozen=True)
class BlindSpotReport:
    """One model (or several) over many pairs.

    Attributes:
        table: one row for each model, method and pair.
        walks: (model, method) -> the walks.
    """

    table: pd.DataFrame
    walks: dict[tuple[str, str], Traversal]

    def summary(self) -> pd.DataFrame:
        """Means over pairs, one row for each model and method."""
        groups = self.table.drop(columns="pair").groupby(["model", "method"], sort=False)
        return pd.DataFrame(groups.mean(numeric_only=True))


def blind_spot_report(
    model: Any | Mapping[str, Any],
    loader: Iterable[Any],
    n: int = 1000,
    *,
    confidence: float = 0.6,
    methods: Sequence[str] = METHODS,
    triangles: bool = True,
    perceptual: Perceptual | None = None,
    batch_size: int = 128,
    seed: int = 0,
    normalise: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = SILENT,
    **how: Any,
) -> BlindSpotReport:
    """Walks between random pairs of confidently and rightly classified images, and what they end in.

    Sources and targets are the same for every model: images that all of them classify rightly with more than
    ``confidence``; each image's target is another one of another class.

    Args:
        model: a classifier, or several by name, which are compared.
        loader: batches (images, labels).
        n: pairs at most.
        confidence: that sources and targets need.
        methods: of ``"level set"``, ``"straight"`` (a straight line, stopped where confidence is lost), ``"random"``.
        triangles: also the triangles of each source and two ends (twice as many walks for the level set).
        perceptual: as in :func:`image_distances`.
        batch_size: pairs walked at a time.
        seed: of pairs and noise.
        normalise: as in :func:`level_set_traversal`.
        progress: where walks are shown.
        **how: handed to :func:`level_set_traversal`.

    Raises:
        InvalidInput: no or too few images of two classes that all models are sure of.
    """
    models = dict(model) if isinstance(model, Mapping) else {"model": model}
    x, y = _chosen(models, loader, n, confidence, normalise)
    first, second = _targets(y, seed), _targets(y, seed + 1)
    rows, walks = [], {}
    for name, one in models.items():
        for method in methods:
            settings = {**how, "method": method, "normalise": normalise, "seed": seed}
            if method == "straight":
                settings |= {"mode": "stop", "adaptive": False}

            def walk(target: Tensor, one: Any = one, settings: dict[str, Any] = settings) -> Traversal:
                parts = [
                    level_set_traversal(one, a, b, c, progress=progress, **settings)
                    for a, b, c in zip(
                        x.split(batch_size), x[target].split(batch_size), y.split(batch_size), strict=True
                    )
                ]
                return _joined(parts)

            found = walk(first)
            walks[name, method] = found
            path = path_confidence(one, found.source, found.images, label=found.labels, normalise=normalise)
            part = found.to_frame().drop(columns="rows")
            part = part.assign(path_mean=path.mean(1).cpu(), path_min=path.min(1).values.cpu())
            part = pd.concat([part, image_distances(found.images, found.target, perceptual)], axis=1)
            if triangles and method == "level set":
                other = walk(second)
                corners = triangle_confidence(
                    one, found.source, found.images, other.images, found.labels, normalise=normalise
                )
                part = pd.concat([part, corners.to_frame().add_prefix("triangle_")], axis=1)
            rows.append(part.assign(pair=range(len(part)), model=name, method=method))
    table = pd.concat(rows, ignore_index=True)
    leading = ["model", "method", "pair"]
    return BlindSpotReport(table.reindex(columns=[*leading, *table.columns.drop(leading)]), walks)


def _chosen(
    models: Mapping[str, Any],
    loader: Iterable[Any],
    n: int,
    confidence: float,
    normalise: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Images that all models are rightly sure of, and their labels."""
    xs, ys, count = [], [], 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise InvalidInput("the loader gives no labels: batches (images, labels) are expected")
        x, y = batch[0], torch.as_tensor(batch[1]).long()
        sure = torch.ones(len(x), dtype=torch.bool)
        for model in models.values():
            f = classifier(model, normalise)
            with torch.no_grad(), f.ready(x):
                p = f.logits(x).softmax(1)
            sure &= (p.argmax(1).cpu() == y.cpu()) & (p.max(1).values > confidence).cpu()
        xs.append(x[sure])
        ys.append(y[sure])
        count += int(sure.sum())
        if count >= n:
            break
    if not xs or len(torch.cat(ys)[:n].unique()) < 2:
        raise InvalidInput(f"{min(count, n)} images that every model is rightly sure of: two classes are needed")
    return torch.cat(xs)[:n], torch.cat(ys)[:n]


def _targets(y: Tensor, seed: int) -> Tensor:
    """For each image another one of another class, each as often as may be."""
    random = generator(seed)
    order = torch.randperm(len(y), generator=random)
    targets = torch.empty_like(order)
    for i in range(len(y)):
        # the first of a random order, begun at another place for each image, that is of another class
        turned = order.roll(-i)
        targets[i] = turned[(y.cpu()[turned] != y[i].cpu()).nonzero()[0, 0]]
    return targets


def _joined(parts: Sequence[Traversal]) -> Traversal:
    """Several results as one."""
    if len(parts) == 1:
        return parts[0]
    offsets = torch.tensor([0, *(len(part.images) for part in parts[:-1])]).cumsum(0).tolist()
    longest = max(part.distance.shape[1] for part in parts)

    def padded(d: Tensor) -> Tensor:
        return torch.cat([d, d[:, -1:].expand(-1, longest - d.shape[1])], 1)

    fields = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in (
            "images", "source", "target", "labels", "confidence", "start_confidence", "accepted", "same_class",
            "parallel",
        )
    }  # fmt: skip
    rows = torch.cat([part.rows + offset for part, offset in zip(parts, offsets, strict=True)])
    distance = torch.cat([padded(part.distance) for part in parts])
    recorded = parts[0].path_steps
    whole = all(part.path is not None and part.path_steps == recorded for part in parts)
    path = torch.cat([part.path for part in parts if part.path is not None]) if whole else None
    return Traversal(
        rows=rows, distance=distance, step=parts[0].step, path=path, path_steps=recorded if whole else (), **fields
    )
