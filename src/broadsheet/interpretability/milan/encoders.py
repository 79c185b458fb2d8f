"""From pictures and masks to one vector for each picture: what the describer is shown (section 3.2 of the paper)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.exemplars import Exemplars
from broadsheet.interpretability.milan.layers import as_maps
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.progress import SILENT, Progress


@dataclass(frozen=True)
class VectorExemplars:
    """Exemplars as vectors, whatever they are of: pictures, excerpts of text, windows of a recording.

    Attributes:
        vectors: ``[units, k, d]``.
        names: of the units, for people.
        units: layer and number of each, where they are units of a layer; else None.
        alive: ``[units]``, False for those that cannot be described.
        excerpts: what the exemplars are, for people: ``units`` lists of ``k`` texts; None where there are none.
    """

    vectors: Float[Tensor, "units k d"]
    names: tuple[str, ...]
    units: tuple[tuple[str, int], ...] | None = None
    alive: Bool[Tensor, " units"] | None = None
    excerpts: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.vectors)
        if len(self.names) != n or (self.units is not None and len(self.units) != n):
            raise InvalidInput(f"names has {len(self.names)} entries for {n} units")
        if self.alive is None:
            object.__setattr__(self, "alive", torch.ones(n, dtype=torch.bool))
        if not bool(self.vectors.isfinite().all()):
            raise InvalidInput("vectors hold NaN or infinite values: look for them in the encoder's output")

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> "VectorExemplars":
        """Some of the units, by row."""
        chosen = [int(i) for i in rows]
        assert self.alive is not None
        return VectorExemplars(
            self.vectors[chosen], tuple(self.names[i] for i in chosen),
            None if self.units is None else tuple(self.units[i] for i in chosen), self.alive[chosen],
            None if self.excerpts is None else tuple(self.excerpts[i] for i in chosen),
        )  # fmt: skip


class PyramidEncoder(nn.Module):
    """Masked averages of a backbone's features at several depths, side by side.

    The picture goes in whole; at each layer the mask is shrunk to the layer's grid, made to sum to 1, and used as the
    weights of an average over places. A mask that is empty there gives zeros. The backbone is not trained.

    Args:
        backbone: any module on pictures: torchvision's or transformers' ResNet, a vision transformer, your own.
        layers: names of its submodules whose outputs are maps or tokens.
        mean, std: of each colour, for the normalisation before the backbone; None for none.
        size: pictures are resized to it before the backbone; None leaves them.
        call: how to run the backbone on a batch; None for ``backbone(pictures)``.

    Example::

        PyramidEncoder(resnet, ["relu", "layer1", "layer2", "layer3", "layer4"], IMAGENET_MEAN, IMAGENET_STD)
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        call: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise InvalidInput("layers is empty: name at least one submodule of the backbone")
        if isinstance(layers, str):
            raise InvalidInput(f"layers={layers!r}: hand in a list of names")
        self.backbone, self.layers, self.size, self.call = backbone, tuple(layers), size, call
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        for name, value in {"mean": mean, "std": std}.items():
            self.register_buffer(name, None if value is None else torch.tensor(value).view(1, -1, 1, 1))
        self.mean: Tensor | None
        self.std: Tensor | None

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "n 3 height width"], masks: Tensor | None = None) -> Float[Tensor, "n d"]:
        """The vector of every picture.

        Args:
            images: floats from 0 to 1.
            masks: ``[n, 1, height, width]``, bool or weights of at least 0, on any scale; None for all of the picture.
        """
        weights = torch.ones_like(images[:, :1]) if masks is None else masks.to(images)
        pooled = []
        for found in self.maps(images):
            weight = functional.interpolate(weights, size=found.shape[-2:], mode="bilinear", align_corners=False)
            weight = weight / weight.sum((2, 3), keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
            pooled.append((found * weight.to(found)).sum((2, 3)))
        return torch.cat(pooled, 1)

    def maps(self, images: Float[Tensor, "n 3 height width"]) -> list[Tensor]:
        """The backbone's features at each layer, ``[n, units, rows, columns]``."""
        if self.size is not None:
            images = functional.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        if self.mean is not None:
            images = images - self.mean.to(images)
        if self.std is not None:
            images = images / self.std.to(images)
        with evaluating(self.backbone), capture(self.backbone, self.layers) as seen:
            (self.call or self.backbone)(images)
        return [as_maps(seen[layer], layer) for layer in self.layers]


class SpatialEncoder(PyramidEncoder):
    """All places of one layer as vectors of their own, instead of one average: ``[n, places, width]``.

    The mask multiplies the features; attention then chooses among places of all exemplars.

    Args:
        backbone, mean, std, size, call: as in :class:`PyramidEncoder`.
        layer: name of the submodule.
    """

    def __init__(self, backbone: nn.Module, layer: str, **how: Any) -> None:
        super().__init__(backbone, [layer], **how)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "n 3 height width"], masks: Tensor | None = None
    ) -> Float[Tensor, "n places d"]:
        """The vectors of every picture; arguments as in :class:`PyramidEncoder`."""
        weights = torch.ones_like(images[:, :1]) if masks is None else masks.to(images)
        (found,) = self.maps(images)
        weight = functional.interpolate(weights, size=found.shape[-2:], mode="bilinear", align_corners=False)
        return (found * weight.to(found)).flatten(2).transpose(1, 2)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@torch.no_grad()
def encode_pictures(
    encoder: nn.Module, images: UInt8[Tensor, "units k 3 height width"], masks: Tensor
) -> Float[Tensor, "units places d"]:
    """The vectors of pictures and masks at hand.

    Args:
        encoder: from pictures ``[n, 3, h, w]`` (0 to 1) and masks ``[n, 1, h, w]`` to ``[n, d]`` or ``[n, places, d]``.
        images: 0 to 255.
        masks: ``[units, k, 1, height, width]``, bool or weights.
    """
    first = next(iter([*encoder.parameters(), *encoder.buffers()]), torch.zeros(()))
    with evaluating(encoder):
        pictures = (images.flatten(0, 1).float() / 255).to(first.device)
        vectors = encoder(pictures, masks.flatten(0, 1).to(first.device))
    return vectors.reshape(len(images), -1, vectors.shape[-1])


def encode(
    encoder: nn.Module, exemplars: Exemplars, *, batch_size: int = 256, progress: Progress = SILENT
) -> VectorExemplars:
    """The exemplars as an encoder sees them; computed once, used for training and describing.

    Args:
        encoder: as in :func:`encode_pictures`.
        exemplars: of pictures.
        batch_size: pictures at a time.
        progress: where units done are shown.
    """
    found = []
    step = max(1, batch_size // exemplars.k)
    with progress.task("looking at exemplars", total=len(exemplars)) as task:
        for start in range(0, len(exemplars), step):
            some = exemplars[start : start + step]
            found.append(encode_pictures(encoder, some.images, some.masks))
            task.advance(len(some))
    names = tuple(f"{layer}, unit {unit}" for layer, unit in exemplars.names)
    return VectorExemplars(torch.cat(found), names, exemplars.names, exemplars.alive)
