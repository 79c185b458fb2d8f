"""Walk from one image towards another along the level set of a classifier's confidence.

Source: Balasubramanian, Sadasivan, Sriramanan and Feizi, arXiv:2310.19889, algorithm 1. The published code differs from
the text: it rejects a step that loses too much confidence and tries again with a larger correction (``mode="retry"``)
where the text stops (``mode="stop"``), and it takes half of the correction's rate.

The size of the correction matters. It saturates at ``parallel`` a pixel while the walk is pulled by ``step`` times the
distance, so a walk stalls where that distance is about ``parallel / step``: 0.2 a pixel with the values for ImageNet,
wherever gradients are not tiny. ``parallel="auto"`` takes 3% of the first step's mean size instead.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.evaluation.level_set_traversal.inputs import (
    Box,
    Classifier,
    SkippedSources,
    check_images,
    classifier,
    correct_sources,
)
from broadsheet.nn.plotting import new_axes, new_figure, style
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator

FLAT = 1e-24  # squared gradient below which the level set is flat and nothing has to be projected away
AUTO = 0.03  # of the first step's mean size
GROWTH, LARGEST = 1.1, 0.5  # of an adaptive step


@dataclass(frozen=True)
class Traversal:
    """Where the walks ended; one row for each pair whose source the model classifies as its label.

    Attributes:
        images: ``[B, ...]``, the last accepted point of each walk.
        source, target: ``[B, ...]``, of the same rows.
        labels: ``[B]``, the class whose confidence is held.
        rows: ``[B]``, which of the pairs handed in these are.
        confidence: ``[B]``, of ``images``.
        start_confidence: ``[B]``, of ``source``.
        accepted: ``[B]``, steps taken.
        distance: ``[B, T + 1]``, Euclidean distance to the target after each iteration.
        same_class: ``[B]``, whether the model puts the target into the source's class as well: nothing blind there.
        path: ``[B, R, ...]``, recorded points, or None.
        path_steps: iterations at which they were recorded.
        step, parallel: as they were used; ``parallel`` of each row ``[B]``.
    """

    images: Tensor
    source: Tensor
    target: Tensor
    labels: Int[Tensor, " B"]
    rows: Int[Tensor, " B"]
    confidence: Float[Tensor, " B"]
    start_confidence: Float[Tensor, " B"]
    accepted: Int[Tensor, " B"]
    distance: Float[Tensor, "B steps"]
    same_class: Bool[Tensor, " B"]
    step: float
    parallel: Float[Tensor, " B"]
    path: Tensor | None = None
    path_steps: tuple[int, ...] = ()

    @property
    def remaining(self) -> Float[Tensor, " B"]:
        """What is left of the distance, as a share of that at the start; 0 where source and target are the same."""
        start = (self.target - self.source).flatten(1).double().norm(dim=1)
        return torch.where(start > 0, self.distance[:, -1].double() / start.clamp_min(1e-300), 0.0)

    def to_frame(self) -> pd.DataFrame:
        """One row for each walk."""
        columns = ("rows", "labels", "start_confidence", "confidence", "remaining", "accepted", "same_class")
        return pd.DataFrame({name: getattr(self, name).cpu().tolist() for name in columns})

    def plot(self, row: int = 0, frames: int = 6, axes: Any = None) -> Any:
        """A film strip: recorded points of one walk, from source to target; returns the axes.

        Args:
            row: of the result.
            frames: pictures between source and target, evenly taken from what was recorded.
            axes: as many matplotlib axes as pictures, or None for new ones.
        """
        if not 0 <= row < len(self.images):
            raise InvalidInput(f"row={row}: the result has {len(self.images)}")
        shots = [("source", self.source[row])]
        if self.path is not None and len(self.path_steps) > 0:
            chosen = (
                torch.linspace(0, len(self.path_steps) - 1, min(frames, len(self.path_steps))).round().long().unique()
            )
            shots += [(f"step {self.path_steps[i]}", self.path[row, i]) for i in chosen.tolist()]
        shots += [("end", self.images[row]), ("target", self.target[row])]
        if axes is None:
            with style():
                _, axes = new_figure(1.3 * len(shots), 1.7, len(shots))
        for ax, (title, image) in zip(axes, shots, strict=False):
            show(ax, image, title)
        return axes

    def plot_distance(self, ax: Any = None, **line: Any) -> Any:
        """Mean share of the distance that is left, against the iterations; returns the axes."""
        ax = new_axes(ax)
        share = self.distance / self.distance[:, :1].clamp_min(1e-30)
        ax.plot(share.mean(0).cpu(), **line)
        ax.set(xlabel="iteration", ylabel="distance to the target, share", ylim=(0, 1.02))
        return ax


def show(ax: Any, image: Tensor, title: str = "") -> None:
    """One picture, grey or in colour, without ticks."""
    picture = image.detach().float().cpu()
    picture = picture.reshape(1, -1) if picture.ndim == 1 else picture
    if picture.ndim == 3:
        picture = picture[0] if picture.shape[0] != 3 else picture.permute(1, 2, 0)
    ax.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=8, loc="center", fontweight="normal")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


Propose = Callable[["_Walk"], tuple[Tensor, Tensor]]


@dataclass
class _Walk:
    """The state of all walks: points, their gradients, the correction carried along."""

    x: Tensor
    target: Tensor
    gradient: Tensor  # of the loss at x
    correction: Tensor  # v
    step: Tensor  # [B, 1, ...]
    parallel: Tensor  # [B, 1, ...]
    random: torch.Generator
    history: list[Tensor] = field(default_factory=list)


def project(direction: Tensor, gradient: Tensor) -> Tensor:
    """A direction without its part along the gradient, each row for itself; products are taken in float64.

    Args:
        direction, gradient: ``[B, ...]``. Where the gradient is zero the direction is kept as it is.
    """
    d, g = direction.flatten(1).double(), gradient.flatten(1).double()
    size = (g * g).sum(1)
    flat = size < FLAT
    share = torch.where(flat, 0.0, (g * d).sum(1) / torch.where(flat, 1.0, size))
    return (d - share[:, None] * g).to(direction.dtype).view_as(direction)


def _along_the_level_set(walk: _Walk) -> tuple[Tensor, Tensor]:
    correction = walk.correction - walk.parallel * walk.gradient
    correction = torch.minimum(torch.maximum(correction, -walk.parallel), walk.parallel)
    return walk.x + walk.step * project(walk.target - walk.x, walk.gradient) + correction, correction


def _straight(walk: _Walk) -> tuple[Tensor, Tensor]:
    return walk.x + walk.step * (walk.target - walk.x), walk.correction


def _random_walk(walk: _Walk) -> tuple[Tensor, Tensor]:
    """A random direction in the level set, as long as the step towards the target would be."""
    draw = torch.randn(walk.x.shape, generator=walk.random, dtype=torch.float32).to(walk.x)
    draw = project(draw, walk.gradient)
    aim = project(walk.target - walk.x, walk.gradient)
    length = aim.flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1).clamp_min(1e-30)
    return walk.x + walk.step * draw * _rows(length, draw), walk.correction


METHODS: dict[str, Propose] = {"level set": _along_the_level_set, "straight": _straight, "random": _random_walk}


def level_set_traversal(
    model: nn.Module | Callable[[Tensor], Tensor],
    source: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    step: float = 1e-2,
    parallel: float | str = "auto",
    threshold: float = 0.2,
    iterations: int = 400,
    init_noise: float | int = 4 / 255,
    mode: str = "retry",
    record_every: int | None = None,
    box: Box = (0, 1),
    *,
    adaptive: bool = False,
    method: str = "level set",
    normalise: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Traversal:
    """Walk from sources to targets, one pair in a row, without losing the source's confidence.

    Args:
        model: a classifier, ``[B, ...]`` to logits ``[B, K]``; a single output is taken as the logit of class 1.
        source, target: ``[B, C, H, W]`` or ``[B, d]``, floating, inside the box.
        labels: ``[B]``, the sources' classes; None for what the model says. Sources that the model puts elsewhere are
            left out, with a warning.
        step: share of the way that an iteration goes (eta), in (0, 1].
        parallel: largest correction along the gradient in every entry (epsilon); 0 for none; ``"auto"``.
        threshold: confidence that may be lost against the source (delta).
        iterations: at most.
        init_noise: width of the uniform noise on the first point, centred at 0.
        mode: ``"retry"``: a step that loses too much is not taken, the correction grows and it is tried again;
            ``"stop"``: the walk ends.
        record_every: keep the points of every so many iterations.
        box: smallest and largest value of an entry; None for no bounds.
        adaptive: halve a row's step when it is rejected and let it grow by a tenth when it is taken.
        method: ``"level set"``, or for comparison ``"straight"`` (no projection, no correction) or ``"random"`` (a
            random direction in the level set).
        normalise: applied to images before the model, so that box and distances are in pixels.
        seed: of the noise.
        progress: where iterations are shown.

    Raises:
        InvalidInput: numbers out of range, other shapes, images outside the box or of integers, probabilities in the
            place of logits, or a model through which no gradient flows.
    """
    _check(step, parallel, threshold, iterations, init_noise, mode, method, record_every)
    f = classifier(model, normalise)
    source, target = check_images(source, target, box)
    with f.ready(source):
        kept, y, start = correct_sources(f, source, labels)
        source, target = source[kept], target[kept]
        if len(kept) == 0:
            raise InvalidInput("the model puts none of the sources into its class: nothing to hold the confidence of")
        random = generator(seed)
        x = source
        if init_noise > 0:
            noise = (torch.rand(source.shape, generator=random) - 0.5) * init_noise
            x = _clip(source + noise.to(source), box)
        gradient, p = f.gradient(x, y)
        if init_noise > 0:  # noise that costs more than a step may is not taken
            lost = start - p > threshold
            x = torch.where(_rows(lost, x), source, x)
            gradient, p = f.gradient(x, y) if bool(lost.any()) else (gradient, p)
        aim = (target - source).abs().flatten(1).mean(1)
        size = AUTO * step * aim if isinstance(parallel, str) else torch.full_like(aim, parallel)
        walk = _Walk(
            x, target, gradient, torch.zeros_like(x), _rows(torch.full_like(aim, step), x), _rows(size, x), random
        )
        if (
            size.numel()
            and method == "level set"
            and not bool(gradient.flatten(1).abs().sum(1).gt(0).any())
            and bool((p < 1 - 1e-6).any())
        ):
            raise InvalidInput("no gradient reaches the images: is the model differentiable in its input?")
        n, live = len(x), torch.ones(len(x), dtype=torch.bool, device=x.device)
        accepted = torch.zeros(n, dtype=torch.long, device=x.device)
        walk.history.append(_distance(x, target))
        path: list[Tensor] = []
        steps: list[int] = []
        with progress.task("level set", total=iterations) as task:
            for i in range(1, iterations + 1):
                rows = live.nonzero().flatten()
                if len(rows) == 0:
                    break
                p = _advance(
                    walk, METHODS[method], f, y, start, p, threshold, rows, live, accepted, mode, adaptive, box
                )
                walk.history.append(_distance(walk.x, target))
                if record_every is not None and i % record_every == 0:
                    path.append(walk.x)
                    steps.append(i)
                task.advance(1, distance=float(walk.history[-1].mean()))
        if int(accepted.max()) == 0 and bool((walk.history[0] > 0).any()):
            warnings.warn(
                f"no step was taken: every first step lost more than {threshold}; try a step smaller than {step}",
                SkippedSources,
                stacklevel=2,
            )
        same = f.logits(target).argmax(1) == y
    return Traversal(
        walk.x, source, target, y, kept, p, start, accepted, torch.stack(walk.history, 1), same, float(step),
        walk.parallel.flatten(1)[:, 0], torch.stack(path, 1) if path else None, tuple(steps),
    )  # fmt: skip


def _advance(
    walk: _Walk,
    propose: Propose,
    f: Classifier,
    y: Tensor,
    start: Tensor,
    p: Tensor,
    threshold: float,
    rows: Tensor,
    live: Tensor,
    accepted: Tensor,
    mode: str,
    adaptive: bool,
    box: Box,
) -> Tensor:
    """One iteration of the rows that still walk: one forward and one backward pass. Gives the new confidences.

    The forward pass that checks a step is the one whose gradient the next step needs; where a step is rejected the
    point and its gradient stay as they were.
    """
    part = _Walk(
        walk.x[rows], walk.target[rows], walk.gradient[rows], walk.correction[rows], walk.step[rows],
        walk.parallel[rows], walk.random,
    )  # fmt: skip
    fresh, correction = propose(part)
    fresh = _clip(fresh, box)
    gradient, confidence = f.gradient(fresh, y[rows])
    taken = start[rows] - confidence <= threshold
    chosen = _rows(taken, fresh)

    def put(whole: Tensor, new: Tensor) -> Tensor:
        return whole.index_copy(0, rows, new)

    walk.x = put(walk.x, torch.where(chosen, fresh, part.x))
    walk.gradient = put(walk.gradient, torch.where(chosen, gradient, part.gradient))
    walk.correction = put(walk.correction, correction)  # a rejected step's correction goes on growing
    accepted[rows] += taken.long()
    if adaptive:
        grown = torch.where(chosen, (part.step * GROWTH).clamp_max(LARGEST), part.step / 2)
        walk.step = put(walk.step, grown)
    elif mode == "stop":
        live[rows[~taken]] = False
    return put(p, torch.where(taken, confidence, p[rows]))


def _distance(x: Tensor, target: Tensor) -> Tensor:
    return (target - x).flatten(1).double().norm(dim=1).to(x.dtype)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """``[B]`` in the shape ``[B, 1, ...]`` of another tensor."""
    return values.view(-1, *[1] * (like.ndim - 1)).to(like.dtype if values.is_floating_point() else values.dtype)


def _clip(x: Tensor, box: Box) -> Tensor:
    return x if box is None else x.clamp(box[0], box[1])


def _check(
    step: float,
    parallel: float | str,
    threshold: float,
    iterations: int,
    init_noise: float,
    mode: str,
    method: str,
    record_every: int | None,
) -> None:
    if not 0 < step <= 1:
        raise InvalidInput(f"step={step}: expected a share of the way, above 0 and at most 1")
    if parallel != "auto" and (isinstance(parallel, str) or not 0 <= parallel < math.inf):
        raise InvalidInput(f"parallel={parallel!r}: expected a number of at least 0, or 'auto'")
    if not threshold > 0:
        raise InvalidInput(f"threshold={threshold}: expected a positive loss of confidence")
    if iterations < 1 or (record_every is not None and record_every < 1):
        raise InvalidInput(f"iterations={iterations}, record_every={record_every}: expected at least 1")
    if not 0 <= init_noise < math.inf:
        raise InvalidInput(f"init_noise={init_noise}: expected a width of at least 0")
    if mode not in ("retry", "stop"):
        raise InvalidInput(f"mode={mode!r}: expected 'retry' or 'stop'")
    if method not in METHODS:
        raise InvalidInput(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}")
