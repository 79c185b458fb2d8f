"""Small image classifiers, trained on the spot: subjects whose training is known."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import TrainingReport, fit


def small_cnn(
    channels: Sequence[int] = (32, 48, 64), hidden: int = 64, classes: int = 10, size: int = 8, in_channels: int = 1,
    seed: int = 0, halve: Sequence[int] = (2,), norm: bool = False,
) -> nn.Sequential:  # fmt: skip
    """Convolutions of width 3 with ReLU, maps halved in between, one hidden dense layer, a linear head.

    Args:
        channels: of the convolutions; their outputs (after ReLU) are the submodules ``conv1``, ``conv2``, ...
        hidden: units of the dense layer ``fc``; the head is ``head``.
        classes: outputs.
        size: height and width of the images.
        in_channels: of the images.
        seed: of the weights.
        halve: numbers of the convolutions, from 1, behind which height and width are halved (``pool2``, ...).
        norm: batch normalisation before each ReLU.
    """
    with seeded(seed):
        model, before = nn.Sequential(), in_channels
        for i, width in enumerate(channels, 1):
            between = [nn.BatchNorm2d(width)] if norm else []
            model.add_module(f"conv{i}", nn.Sequential(nn.Conv2d(before, width, 3, padding=1), *between, nn.ReLU()))
            if i in halve:
                model.add_module(f"pool{i}", nn.MaxPool2d(2))
                size //= 2
            before = width
        model.add_module("flat", nn.Flatten())
        model.add_module("fc", nn.Sequential(nn.Linear(before * size * size, hidden), nn.ReLU()))
        model.add_module("head", nn.Linear(hidden, classes))
    return model.eval()


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, last: bool = False, seed: int = 0
) -> nn.Sequential:
    """Dense layers, an activation between them.

    Args:
        sizes: features of input, hidden layers and output.
        activation: makes the activation's module.
        last: an activation behind the last layer, too.
        seed: of the weights.
    """
    if len(sizes) < 2:
        raise InvalidInput(f"sizes={list(sizes)}: at least an input and an output are needed")
    with seeded(seed):
        parts: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(pairwise(sizes)):
            parts.append(nn.Linear(a, b))
            if last or i < len(sizes) - 2:
                parts.append(activation())
        return nn.Sequential(*parts).eval()


def classification_loss(model: Any, batch: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of a batch (samples, labels), nats."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def train_classifier(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    loss_fn: Callable[[Any, Any], Tensor] = classification_loss,
    progress: Progress = SILENT,
    description: str = "classifier",
    **how: Any,
) -> TrainingReport:
    """Train with Adam on shuffled batches; the model is left in evaluation mode.

    Args:
        model: trained in place, on its own device.
        x, y: samples ``[n, ...]`` and labels ``[n]``.
        epochs: times through the samples.
        batch_size, lr: of the optimizer.
        seed: of the order.
        loss_fn: ``(model, (x, y)) -> loss``.
        progress, description: what the training is called where it is shown.
        **how: handed to :func:`broadsheet.nn.training.fit` (``checkpoint``, ``callback``, ...).
    """
    if len(x) != len(y) or len(x) == 0:
        raise InvalidInput(f"{len(x)} samples and {len(y)} labels: one label for each sample is expected")
    device = next(model.parameters()).device
    order = generator(seed)
    data = torch.utils.data.TensorDataset(x.to(device), y.to(device))
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True, generator=order)
    with seeded(seed):
        report = fit(
            model, loss_fn, loader, steps=epochs * len(loader), optimizer=torch.optim.Adam(model.parameters(), lr),
            generators=[order], progress=progress, description=description, **how,
        )  # fmt: skip
    model.eval()
    return report


@torch.no_grad()
def accuracy(model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], batch_size: int = 1024) -> float:
    """Share of samples whose largest output is their label; the model is run in evaluation mode."""
    device = next(model.parameters()).device
    right = 0
    with evaluating(model):
        for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True):
            right += int((model(a.to(device)).argmax(1).cpu() == b.cpu()).sum())
    return right / max(len(x), 1)
