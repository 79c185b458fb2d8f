"""Batches of any loader as what a model is called with, and a layer's output as samples of its units.

given = model_inputs(batch)
given.to(device).call(model)
unit_samples(activation)                 # conv maps, tokens, features -> [samples, units]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.padding import right_padded


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies; the CPU for one without any."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class ModelInputs:
    """A batch as arguments of a forward pass.

    Attributes:
        args, kwargs: what the model is called with; padding of tokens on the right.
        mask: ``[n, time]``, True for tokens that count, where there is a mask.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """The first tensor that goes in."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise InvalidInput("a batch holds no tensor")

    @property
    def n(self) -> int:
        """Samples in the batch."""
        return len(self.first)

    def to(self, device: torch.device | str) -> "ModelInputs":
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in self.args)
        kwargs = {name: a.to(device) if isinstance(a, Tensor) else a for name, a in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


def model_inputs(batch: Any) -> ModelInputs:
    """What a model is called with, labels left out.

    Args:
        batch: inputs; ``(inputs, labels, ...)``; token ids with their attention mask, ``(ids, mask)`` of one shape; or
            a mapping such as a tokenizer gives (``labels`` and ``label`` are left out). Rows of tokens that are padded
            on the left are moved, so that positions are counted from the first token.

    Raises:
        InvalidInput: no tensor in it.
    """
    if isinstance(batch, Mapping):
        return _moved({name: value for name, value in batch.items() if name not in ("labels", "label")})
    if isinstance(batch, Tensor):
        return ModelInputs((batch,), {})
    if not isinstance(batch, tuple | list) or not batch:
        raise InvalidInput(f"a batch is a {type(batch).__name__}: expected a tensor, a tuple or a mapping of tensors")
    first = batch[0]
    if isinstance(first, Mapping):
        return model_inputs(first)
    if not isinstance(first, Tensor):
        raise InvalidInput(f"a batch begins with a {type(first).__name__}: expected the inputs, a tensor")
    if first.is_floating_point() or first.ndim != 2 or len(batch) < 2:
        return ModelInputs((first,), {})
    second = batch[1]
    if not isinstance(second, Tensor) or second.shape != first.shape or not _is_mask(second):
        return ModelInputs((first,), {})
    moved = _moved({"input_ids": first, "attention_mask": second})
    return ModelInputs((moved.kwargs["input_ids"],), {"attention_mask": moved.kwargs["attention_mask"]}, moved.mask)


def _is_mask(values: Tensor) -> bool:
    """Zeros and ones only, unlike the labels of a language model, which have the same shape."""
    return bool(((values == 0) | (values == 1)).all())


def class_labels(batch: Any) -> Int[Tensor, " n"] | None:
    """The classes of a batch, where it names some.

    Args:
        batch: ``(inputs, labels, ...)`` or a mapping with ``labels`` or ``label``. Rows with one number for each
            class are taken as one-hot; anything else that is not one integer for each sample is no class.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[1]
    else:
        return None
    if labels is None or isinstance(labels, Mapping | str):
        return None
    labels = torch.as_tensor(labels)
    if labels.ndim == 2 and labels.is_floating_point():
        labels = labels.argmax(1)
    return None if labels.ndim != 1 or labels.is_floating_point() else labels.long()


def _moved(given: dict[str, Any]) -> ModelInputs:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return ModelInputs((), given)
    if not isinstance(ids, Tensor) or ids.shape != mask.shape:
        return ModelInputs((), given, mask.bool())
    padded = right_padded(ids, mask)
    if padded.attention_mask is None:
        return ModelInputs((), given, mask.bool())
    forward = replace(padded, offset=-padded.offset)  # every other row of tokens goes the same way
    rows = {
        name: forward.restore(value) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in given.items()
        if name != "position_ids"
    }
    rows |= {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    return ModelInputs((), rows, padded.attention_mask.bool())


def unit_samples(
    activation: Tensor,
    mask: Tensor | None = None,
    channels: str = "auto",
    places: Int[Tensor, " places"] | None = None,
) -> Float[Tensor, "samples units"]:
    """A layer's output with every position as a sample of its own.

    Args:
        activation: features ``[n, units]``, tokens ``[n, time, units]``, or maps ``[n, units, height, width]`` (further
            dimensions likewise).
        mask: ``[n, time]``, tokens that count.
        channels: where the units are: ``"first"`` (dimension 1), ``"last"``, or ``"auto"``, which takes the last one of
            two and three dimensions and the first one of maps.
        places: numbers of the positions to keep, counted along the flattened positions; None keeps all.

    Raises:
        InvalidInput: no dimension for units, or a place that is not there.
    """
    values = by_position(activation, channels)
    if activation.ndim == 2:
        return activation
    if mask is not None and mask.shape != values.shape[:2]:
        mask = None  # a pooled layer, or positions that are not tokens
    if places is not None:
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < values.shape[1]:
            raise InvalidInput(f"places up to {int(places.max())}: there are {values.shape[1]} positions")
        places = places.to(values.device)
        values, mask = values[:, places], None if mask is None else mask.to(values.device)[:, places]
    return values.flatten(0, 1) if mask is None else values[mask.to(values.device).bool()]


def by_position(activation: Tensor, channels: str = "auto") -> Float[Tensor, "n positions units"]:
    """A layer's output with its positions in one dimension, features as one position.

    Args:
        activation, channels: as in :func:`unit_samples`.
    """
    if channels not in ("auto", "first", "last"):
        raise InvalidInput(f"channels={channels!r}: expected 'auto', 'first' or 'last'")
    if activation.ndim < 2 or not activation.is_floating_point():
        raise InvalidInput(
            f"an activation of shape {tuple(activation.shape)} and {activation.dtype}: expected floating numbers, "
            "[samples, units] or with positions"
        )
    if activation.ndim == 2:
        return activation[:, None]
    first = channels == "first" or (channels == "auto" and activation.ndim > 3)
    return (activation.movedim(1, -1) if first else activation).flatten(1, -2)
