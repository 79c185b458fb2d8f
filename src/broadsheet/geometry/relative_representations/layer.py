"""The layer between an encoder and a head, and the small head of the paper's frozen encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.similarity import SIMILARITIES, relative_projection, unit

OUTPUTS = ("layernorm", "l2")


class RelativeLayer(nn.Module, PyTorchModelHubMixin, library_name="broadsheet"):
    """Absolute latents and anchors in, relative latents out.

    Args:
        k: anchors.
        normalise_output: ``"layernorm"`` over the k columns, as the paper trains autoencoders and classifiers; ``"l2"``
            for rows of length 1, as it has frozen encoders; None for none.
        quantise: width of the bins that similarities are rounded to; gradients pass as if they were not.
        per_class_mean: ``[k]`` labels 0, 1, ... of the anchors: one column for each class, the mean of its anchors'.
        similarity: one of :data:`SIMILARITIES`.
        frame: None, ``"centred"`` or ``"whitened"``, as in :func:`relative_projection`; fitted to the anchors.
        heads: slices of the latents, each compared on its own, side by side in the result.

    Attributes:
        width: columns of the result.
    """

    def __init__(
        self,
        k: int,
        normalise_output: str | None = "layernorm",
        quantise: float | None = None,
        per_class_mean: Sequence[int] | None = None,
        similarity: str = "cosine",
        frame: str | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        if k < 1 or heads < 1:
            raise InvalidInput(f"k={k}, heads={heads}: at least one anchor and one slice are needed")
        if normalise_output is not None and normalise_output not in OUTPUTS:
            raise InvalidInput(f"normalise_output={normalise_output!r}: expected {', '.join(OUTPUTS)} or None")
        if quantise is not None and not quantise > 0:
            raise InvalidInput(f"quantise={quantise}: the width of a bin must be positive")
        if similarity not in SIMILARITIES:
            raise InvalidInput(f"similarity={similarity!r}: expected one of {', '.join(SIMILARITIES)}")
        groups = k
        self.labels: Tensor | None
        if per_class_mean is None:
            self.labels = None
        else:
            labels = torch.as_tensor([int(label) for label in per_class_mean])
            if labels.shape != (k,) or int(labels.min()) < 0 or len(labels.unique()) != int(labels.max()) + 1:
                raise InvalidInput(f"per_class_mean: expected {k} labels 0, 1, ... without a gap")
            groups = int(labels.max()) + 1
            self.register_buffer("labels", labels)
        self.k, self.quantise, self.similarity, self.frame, self.heads = k, quantise, similarity, frame, heads
        self.normalise_output = normalise_output
        self.width = groups * heads
        self.norm = nn.LayerNorm(self.width) if normalise_output == "layernorm" else nn.Identity()

    def projection(self, x: Float[Tensor, "n d"], anchors: Float[Tensor, "k d"]) -> Float[Tensor, "n w"]:
        """Similarities, rounded and averaged as asked, before the output is normalised: nothing in it is trained."""
        if len(anchors) != self.k:
            raise InvalidInput(f"{len(anchors)} anchors: this layer has {self.k} columns, one for each anchor")
        if x.shape[1] % self.heads:
            raise InvalidInput(f"heads={self.heads} does not divide the {x.shape[1]} features of the latents")
        # The checks make an accelerator wait; in training every step would.
        how: Any = {"similarity": self.similarity, "frame": self.frame, "check": not self.training}
        parts = zip(x.chunk(self.heads, 1), anchors.chunk(self.heads, 1), strict=True)
        return torch.cat([self._grouped(relative_projection(a, b, **how)) for a, b in parts], 1)

    def forward(self, x: Float[Tensor, "n d"], anchors: Float[Tensor, "k d"]) -> Float[Tensor, "n w"]:
        """Relative latents.

        Args:
            x: ``[n, d]`` absolute latents.
            anchors: ``[k, d]``, by the same encoder.

        Raises:
            InvalidInput: another number of anchors, or latents of another width than they.
        """
        return self.finish(self.projection(x, anchors))

    def finish(self, similarities: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """The trained part: what a head gets from a projection, its own or another encoder's."""
        return unit(similarities) if self.normalise_output == "l2" else self.norm(similarities)

    def _grouped(self, r: Tensor) -> Tensor:
        if self.labels is not None:
            classes = int(self.labels.max()) + 1
            share = nn.functional.one_hot(self.labels, classes).to(r)
            r = r @ (share / share.sum(0))
        if self.quantise is not None:
            rounded = (r / self.quantise).round() * self.quantise
            r = r + (rounded - r).detach()
        return r

    def same_columns(self, other: "RelativeLayer") -> bool:
        """Whether the other layer's projections mean the same, column by column."""

        def settings(layer: "RelativeLayer") -> tuple[Any, ...]:
            labels = None if layer.labels is None else tuple(layer.labels.tolist())
            return layer.k, layer.quantise, layer.similarity, layer.frame, layer.heads, labels

        return settings(self) == settings(other)


class RelativeHead(nn.Module, PyTorchModelHubMixin, library_name="broadsheet"):
    """The small classifier that the paper puts on frozen encoders: norm, linear, tanh, norm, linear.

    Args:
        k: columns of its input.
        n_classes: logits.
        official: the released head's second norm, which takes mean and variance of every feature from the batch at
            hand, in evaluation too: what a sample is called then depends on its company. For comparisons only.

    Example:
        >>> RelativeHead(4, 3)(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, k: int, n_classes: int, official: bool = False) -> None:
        super().__init__()
        self.official = official
        self.before = nn.Sequential(nn.LayerNorm(k), nn.Linear(k, k), nn.Tanh())
        self.norm: nn.Module = _BatchCompany() if official else nn.LayerNorm(k)
        self.out = nn.Linear(k, n_classes)

    def forward(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
        """Logits; rows are brought to length 1 first."""
        return self.out(self.norm(self.before(unit(r))))


class _BatchCompany(nn.Module):
    """Every feature less its mean over the batch, divided by its deviation there."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise InvalidInput("the released head normalises over the batch: it needs at least two samples at a time")
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
