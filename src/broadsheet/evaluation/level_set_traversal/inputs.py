"""What every function of the method checks and needs: images in their box, a frozen classifier that gives logits."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import evaluating

Box = tuple[float | int, float | int] | None


class SkippedSources(UserWarning):
    """Sources that are not classified as their label, or walks that took no step."""


@dataclass(frozen=True)
class Classifier:
    """Logits, confidences and input gradients of a model that is left as it was.

    Attributes:
        model: the module or function.
        normalise: applied to images first, or None.
    """

    model: Any
    normalise: Callable[[Tensor], Tensor] | None = None

    @contextmanager
    def ready(self, example: Tensor) -> Iterator[None]:
        """Evaluation mode, no gradients to the weights; the model's outputs are looked at once.

        Args:
            example: images.

        Raises:
            InvalidInput: the outputs are not ``[B, K]``, or are probabilities.
        """
        with ExitStack() as stack:
            if isinstance(self.model, nn.Module):
                if self.model.training:
                    warnings.warn("the model is in training mode: it is run in evaluation mode", stacklevel=4)
                stack.enter_context(evaluating(self.model))
                stack.enter_context(_frozen(self.model))
            self._look(example)
            yield

    def _look(self, example: Tensor) -> None:
        with torch.no_grad():
            raw = self._raw(example[:64])
        if raw.ndim != 2 and not (raw.ndim == 1 and len(raw) == len(example[:64])):
            raise InvalidInput(f"the model gives {tuple(raw.shape)} for {len(example[:64])} images: expected [B, K]")
        if raw.ndim == 2 and raw.shape[1] > 1:
            sums = raw.double().sum(1)
            if bool((raw >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all()):
                raise InvalidInput(
                    "the model's outputs are probabilities (rows sum to 1): hand in one that gives logits, the outputs "
                    "before the softmax"
                )
        if not bool(raw.isfinite().all()):
            raise InvalidInput("the model's outputs hold NaN or infinite values")

    def _raw(self, x: Tensor) -> Tensor:
        out = self.model(x if self.normalise is None else self.normalise(x))
        return getattr(out, "logits", out)

    def logits(self, x: Tensor) -> Float[Tensor, "B K"]:
        """``[B, K]`` in float64; a single logit stands beside a 0."""
        raw = self._raw(x).double()
        raw = raw[:, None] if raw.ndim == 1 else raw
        return torch.cat([torch.zeros_like(raw), raw], 1) if raw.shape[1] == 1 else raw

    @torch.no_grad()
    def confidence(self, x: Tensor, labels: Int[Tensor, " B"], batch_size: int = 512) -> Float[Tensor, " B"]:
        """Probability of each image's label, ``[B]``, in the images' type."""
        parts = [
            self.logits(a).softmax(1).gather(1, b[:, None])[:, 0]
            for a, b in zip(x.split(batch_size), labels.split(batch_size), strict=True)
        ]
        return torch.cat(parts).to(x.dtype) if parts else x.new_zeros(0)

    def gradient(self, x: Tensor, labels: Int[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Gradient of each image's cross entropy ``[B, ...]`` and its confidence ``[B]``.

        The loss is summed, so rows do not touch one another, and taken from logits in float64: at confidences near 1 a
        float32 softmax leaves no gradient at all.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.logits(leaf)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            if not loss.requires_grad:
                raise InvalidInput("no gradient reaches the images: is the model differentiable in its input?")
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if gradient is None:
            raise InvalidInput("no gradient reaches the images: is the model differentiable in its input?")
        return gradient, logits.detach().softmax(1).gather(1, labels[:, None])[:, 0].to(x.dtype)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights that ask for no gradient inside the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def classifier(model: Any, normalise: Callable[[Tensor], Tensor] | None = None) -> Classifier:
    """The model with what is done to images before it."""
    return model if isinstance(model, Classifier) else Classifier(model, normalise)


def check_images(source: Tensor, target: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Sources and targets of one shape, floating, finite and inside the box.

    Raises:
        InvalidInput: otherwise, with what was found.
    """
    if source.shape != target.shape:
        raise InvalidInput(f"source has shape {tuple(source.shape)}, target {tuple(target.shape)}: they have to match")
    if source.ndim < 2 or len(source) == 0:
        raise InvalidInput(f"images of shape {tuple(source.shape)}: expected [B, ...] with at least one")
    for name, images in {"source": source, "target": target}.items():
        if not images.is_floating_point():
            raise InvalidInput(
                f"{name} is of type {images.dtype}, values {int(images.min())} to {int(images.max())}: hand in floats, "
                "such as images / 255"
            )
        low, high = float(images.min()), float(images.max())
        if not bool(images.isfinite().all()):
            raise InvalidInput(f"{name} holds NaN or infinite values")
        if box is not None and (low < box[0] - 1e-6 or high > box[1] + 1e-6):
            raise InvalidInput(
                f"{name} holds values from {low:.4g} to {high:.4g}, outside box={box}: hand in images in pixel space "
                "(the model's own normalisation as normalise=), or box=None"
            )
    return source, target.to(source)


def correct_sources(f: Classifier, source: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which sources the model classifies as their label: their rows, labels and confidences."""
    with torch.no_grad():
        predicted = torch.cat([f.logits(part).argmax(1) for part in source.split(512)])
    if labels is None:
        y = predicted
    else:
        y = torch.as_tensor(labels, device=source.device)
        if y.shape != (len(source),) or y.is_floating_point():
            raise InvalidInput(
                f"labels of shape {tuple(y.shape)} and type {y.dtype}: expected integers [{len(source)}]"
            )
        y = y.long()
    kept = (predicted == y).nonzero().flatten()
    if len(kept) < len(source):
        gone = (predicted != y).nonzero().flatten().tolist()
        warnings.warn(
            f"{len(gone)} of {len(source)} sources are not classified as their label and are left out: rows "
            f"{', '.join(map(str, gone[:8]))}{', ...' if len(gone) > 8 else ''}",
            SkippedSources,
            stacklevel=4,
        )
    return kept, y[kept], f.confidence(source[kept], y[kept])
