"""Any encoder made relative: it keeps its anchors, knows their latents, and gives similarities to them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.anchors import Anchors, n_samples, take_rows
from broadsheet.geometry.relative_representations.layer import RelativeLayer
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.pooling import Pool, pooled

PASSES = ("auto", "one", "two")


class RelativeEncoder(nn.Module):
    """An encoder that gives relative latents: similarities to its own anchors, embedded by itself.

    A frozen encoder embeds its anchors once, and again only when its weights or its device have changed; so does any
    encoder that is only evaluated. One in training embeds them at every step with its weights of that step: together
    with the batch, or apart where a layer mixes the samples of a batch (BatchNorm) or where batch and anchors do not go
    into one tensor.

    Args:
        encoder: a module or function from samples to latents: tensors ``[n, ...]``, Hugging Face models (mappings of
            tensors, texts with ``tokenizer``), sentence-transformers' ``encode``.
        anchors: the anchor samples, as the encoder reads them, or :class:`Anchors`.
        layer: how they are compared; None for plain cosines (no normalisation of the output).
        frozen: no gradients, evaluation mode always, anchors' latents kept. None: whatever has no weights to train.
        pool: as in :func:`broadsheet.nn.pooling.pooled`.
        tokenizer: turns texts into the encoder's inputs; called as Hugging Face's.
        anchor_gradient: whether the loss moves the anchors' latents too; the paper holds them fixed in each step.
        passes: ``"one"`` for batch and anchors together, where that is allowed; ``"two"``; ``"auto"`` takes one for
            gradients through the anchors, and two for anchors held fixed, which need no backward pass.
        ids: of the anchors, as in :meth:`Anchors.of`.
        batch_size: anchors in a forward pass of a frozen encoder.

    Attributes:
        anchors: the :class:`Anchors`.
        layer: the :class:`RelativeLayer`.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        anchors: Any,
        layer: RelativeLayer | None = None,
        *,
        frozen: bool | None = None,
        pool: Pool = None,
        tokenizer: Callable[..., Any] | None = None,
        anchor_gradient: bool = False,
        passes: str = "auto",
        ids: Any = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if passes not in PASSES:
            raise InvalidInput(f"passes={passes!r}: expected one of {', '.join(PASSES)}")
        if batch_size < 1:
            raise InvalidInput(f"batch_size={batch_size}: at least 1 is needed")
        self.encoder = encoder
        self.anchors = Anchors.of(anchors, ids)
        self.layer = layer if layer is not None else RelativeLayer(len(self.anchors), None)
        if self.layer.k != len(self.anchors):
            raise InvalidInput(f"the layer has k={self.layer.k}, there are {len(self.anchors)} anchors")
        weights = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
        self.frozen = not any(p.requires_grad for p in weights) if frozen is None else frozen
        self.pool, self.tokenizer = pool, tokenizer
        self.anchor_gradient, self.passes, self.batch_size = anchor_gradient, passes, batch_size
        self._kept: tuple[Any, Tensor] | None = None
        if self.frozen and isinstance(encoder, nn.Module):
            encoder.requires_grad_(False)
            encoder.eval()

    # ------------------------------------------------------------------------------------------------ latents

    def forward(self, x: Any) -> Float[Tensor, "n w"]:
        """Relative latents of a batch, ``[n, k]`` (or as many columns as the layer gives)."""
        return self.layer(*self.both(x))

    def projection(self, x: Any) -> Float[Tensor, "n w"]:
        """The same before the layer's trained output norm."""
        return self.layer.projection(*self.both(x))

    def both(self, x: Any) -> tuple[Float[Tensor, "n d"], Float[Tensor, "k d"]]:
        """Absolute latents of a batch and of the anchors, with the weights of now."""
        if self.frozen or not (self.training or torch.is_grad_enabled()):
            latents = self.encode(x)
            if latents.requires_grad and not isinstance(self.encoder, nn.Module) and not _wants_gradient(x):
                raise InvalidInput(
                    "the encoder is a function with weights in training inside: its anchors would grow stale. Hand in "
                    "the module itself, or frozen=False"
                )
            return latents, self.anchor_latents()
        x, anchors = self._inputs(x), self._inputs(self.anchors.samples)
        joined = _joined(x, anchors) if self._one_pass() else None
        if joined is not None:
            together = self._latents(joined)
            latents, anchor_latents = together[: n_samples(x)], together[n_samples(x) :]
            return latents, anchor_latents if self.anchor_gradient else anchor_latents.detach()
        with torch.set_grad_enabled(self.anchor_gradient and torch.is_grad_enabled()):
            anchor_latents = self._latents(anchors)
        return self._latents(x), anchor_latents

    def encode(self, x: Any) -> Float[Tensor, "n d"]:
        """Absolute latents of samples."""
        return self._latents(self._inputs(x))

    def anchor_latents(self) -> Float[Tensor, "k d"]:
        """Latents of the anchors in evaluation mode, without gradient; kept until weights or device change.

        A write through ``weight.data`` leaves no trace: call :meth:`forget` after one.
        """
        state = self._state()
        if self._kept is None or self._kept[0] != state:
            starts = range(0, len(self.anchors), self.batch_size)
            parts = []
            # Kept beyond this call, so no tensor of the caller's inference mode, which no gradient may pass later.
            with torch.inference_mode(False), torch.no_grad(), evaluating(self):
                for start in starts:
                    rows = take_rows(self.anchors.samples, slice(start, start + self.batch_size))
                    parts.append(self._latents(self._inputs(rows)))
                self._kept = state, torch.cat(parts)
        return self._kept[1]

    def forget(self) -> None:
        """Embed the anchors anew at the next call."""
        self._kept = None

    def replaced(self, anchors: Any, ids: Any = None) -> "RelativeEncoder":
        """The same encoder and layer with other anchors."""
        return RelativeEncoder(
            self.encoder, anchors, self.layer, frozen=self.frozen, pool=self.pool, tokenizer=self.tokenizer,
            anchor_gradient=self.anchor_gradient, passes=self.passes, ids=ids, batch_size=self.batch_size,
        )  # fmt: skip

    def train(self, mode: bool = True) -> "RelativeEncoder":
        """As any module; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen and isinstance(self.encoder, nn.Module):
            self.encoder.eval()
        return self

    # ------------------------------------------------------------------------------------------------ inside

    def _one_pass(self) -> bool:
        if self.passes == "two" or (self.training and mixes_samples(self.encoder)):
            return False
        return self.passes == "one" or self.anchor_gradient or not torch.is_grad_enabled()

    def _inputs(self, x: Any) -> Any:
        """What the encoder is called with, on its device."""
        if self.tokenizer is not None and not isinstance(x, Tensor | Mapping):
            x = self.tokenizer(list(x), padding=True, truncation=True, return_tensors="pt")
        return _to(x, self._device())

    def _latents(self, x: Any) -> Tensor:
        mask = x.get("attention_mask") if isinstance(x, Mapping) else None
        output = self.encoder(**x) if isinstance(x, Mapping) and _takes_names(self.encoder) else self.encoder(x)
        if isinstance(output, np.ndarray):
            output = torch.as_tensor(output)
        return pooled(output, self.pool, mask)

    def _device(self) -> torch.device | None:
        weight = next(iter(self.encoder.parameters()), None) if isinstance(self.encoder, nn.Module) else None
        return None if weight is None else weight.device

    def _state(self) -> Any:
        """Changes whenever a weight, a buffer or its place does: every write in place counts a tensor's version up."""
        if not isinstance(self.encoder, nn.Module):
            return id(self.anchors)
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()]
        # Tensors made in inference mode count no versions; nobody can train them either.
        versions = [0 if t.is_inference() else t._version for t in tensors]
        places = tuple((id(t), t.data_ptr(), t.device, t.dtype) for t in tensors)
        return id(self.anchors), tuple(versions), places


def mixes_samples(encoder: Any) -> bool:
    """Whether an encoder in training lets the samples of a batch see each other: its BatchNorm layers do."""
    if not isinstance(encoder, nn.Module):
        return False
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in encoder.modules())


def _joined(x: Any, y: Any) -> Any:
    """Two batches as one, or None where their shapes do not allow it."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.cat([x, y.to(x)]) if x.shape[1:] == y.shape[1:] else None
    if isinstance(x, Mapping) and isinstance(y, Mapping) and set(x) == set(y):
        parts = {key: _joined(x[key], y[key]) for key in x}
        return parts if all(isinstance(part, Tensor) for part in parts.values()) else None
    return None


def _wants_gradient(x: Any) -> bool:
    parts = x.values() if isinstance(x, Mapping) else [x]
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def _to(x: Any, device: torch.device | None) -> Any:
    if isinstance(x, Tensor):
        return x if device is None else x.to(device)
    if isinstance(x, Mapping):
        return {key: _to(value, device) for key, value in x.items() if isinstance(value, Tensor)}
    return x


def _takes_names(encoder: Any) -> bool:
    """Whether a mapping goes in as named arguments: not where the encoder has one argument of its own."""
    call = encoder.forward if isinstance(encoder, nn.Module) else encoder
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return len(named) > 1 or any(p.kind == p.VAR_KEYWORD for p in parameters)
