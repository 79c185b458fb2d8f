"""The metrics of a network of the user's own: every linear layer of its head, over training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.neural_collapse.metrics import (
    CollapseMetrics,
    as_labels,
    choose_target,
    metrics_of,
    nearest_mean_agreement,
)
from broadsheet.geometry.neural_collapse.theory import Decay
from broadsheet.nn.hooks import Site, capture, evaluating
from broadsheet.nn.moments import ClassMoments
from broadsheet.nn.plotting import CYCLE, new_axes


@dataclass(frozen=True)
class CollapseReport:
    """The metrics of each linear layer of a head at one moment.

    Attributes:
        layers: submodule names, first to last.
        metrics: one for each.
        epoch: as counted by the caller.
    """

    layers: tuple[str, ...]
    metrics: tuple[CollapseMetrics, ...]
    epoch: int | float = 0

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer."""
        rows = [{"epoch": self.epoch, "layer": name, "target": m.target, **m.numbers()} for name, m in self._pairs()]
        return pd.DataFrame(rows)

    def _pairs(self) -> Iterable[tuple[str, CollapseMetrics]]:
        return zip(self.layers, self.metrics, strict=True)


def linear_head(model: nn.Module, head: str | Sequence[str] | None = None) -> tuple[list[str], list[nn.Linear]]:
    """The linear layers that end a model, and their names.

    Args:
        model: any module.
        head: a submodule that is, or holds, the head; or the layers' names in order; None for the last ``nn.Linear``.

    Raises:
        InvalidInput: no such submodule, or none that is linear; widths that do not follow on each other.
    """
    known = dict(model.named_modules())
    if head is None:
        names = [name for name, module in known.items() if isinstance(module, nn.Linear)][-1:]
    elif isinstance(head, str):
        if head not in known:
            raise InvalidInput(f"{type(model).__name__} has no submodule {head!r}: see model.named_modules()")
        inside = known[head].named_modules()
        names = [
            f"{head}.{inner}" if inner and head else head or inner
            for inner, module in inside
            if isinstance(module, nn.Linear)
        ]
    else:
        names = list(head)
        missing = [name for name in names if not isinstance(known.get(name), nn.Linear)]
        if missing:
            raise InvalidInput(f"{missing[0]!r} is no nn.Linear of {type(model).__name__}")
    layers = [known[name] for name in names]
    if not layers:
        raise InvalidInput(f"{type(model).__name__} has no nn.Linear: hand in head= with the name of its linear head")
    for before, after in pairwise(layers):
        if before.out_features != after.in_features:
            raise InvalidInput(
                f"a layer gives {before.out_features} features, the next reads {after.in_features}: not one chain"
            )
    return names, layers  # type: ignore[reportReturnType]


def collapse_report(
    model: nn.Module,
    loader: Iterable[Any],
    head: str | Sequence[str] | None = None,
    *,
    target: str = "auto",
    wd: Decay | None = None,
    fd: float | int | None = None,
    epoch: int | float = 0,
    agreement: bool = True,
) -> CollapseReport:
    """Measure each linear layer of the head: one pass for all moments, one more for NC4.

    The model runs in evaluation mode without gradients and is left as it was. Nothing but moments is kept. Cost of a
    pass beside the forward pass itself: ``d^2`` multiply-adds a sample and layer.

    Args:
        model: a classifier; called with a batch's inputs.
        loader: batches (inputs, labels), the same ones when gone through again.
        head: as in :func:`linear_head`. Layers of a theory's head have nothing between them and no bias but the last
            one's.
        target, wd, fd: as in :func:`collapse_metrics`; ``"gof"`` needs both decays.
        epoch: what the report is filed under.
        agreement: False leaves NC4 out, and its pass.

    Raises:
        InvalidInput: no batches, features of more than two dimensions, NaN, or a hidden bias where theory's frame of a
            deep head was asked for.
    """
    names, layers = linear_head(model, head)
    hidden_bias = any(layer.bias is not None for layer in layers[:-1])
    if hidden_bias and target in ("gof", "orthogonal"):
        raise InvalidInput(f"target={target!r}: a hidden layer of the head has a bias, which the theory does not cover")
    sites = [Site(name, "input", label=name) for name in names]
    device = next(model.parameters()).device
    moments: list[ClassMoments] = [ClassMoments(layers[-1].out_features) for _ in names]
    with torch.no_grad(), evaluating(model), capture(model, sites) as seen:
        for number, (inputs, labels) in enumerate(_pairs(loader)):
            model(inputs.to(device))
            for name, moment in zip(names, moments, strict=True):
                try:
                    moment.update(_flat(seen[name], name), labels)
                except InvalidInput as error:
                    raise InvalidInput(f"{name}, batch {number}: {error}") from None
        if moments[0].count == 0:
            raise InvalidInput("the loader gave no batches")
        products = _products(layers)
        bias = layers[-1].bias
        kind, prediction = choose_target(target, moments[0].counts, bias, wd, fd, len(layers))
        found = [
            metrics_of(moment, product, kind, prediction, layer)
            for layer, (moment, product) in enumerate(zip(moments, products, strict=True), 1)
        ]
        if agreement:
            right, n = [0] * len(names), 0
            for inputs, _ in _pairs(loader):
                model(inputs.to(device))
                n += len(inputs)
                for i, (name, product) in enumerate(zip(names, products, strict=True)):
                    agree = nearest_mean_agreement(_flat(seen[name], name), found[i].class_means, product, bias)
                    right[i] += int(agree.sum())
            found = [replace(m, ncc_agreement=r / n) for m, r in zip(found, right, strict=True)]
    return CollapseReport(tuple(names), tuple(found), epoch)


class CollapseMonitor:
    """Reports over training, in a loop of one's own or as the ``callback`` of a training function.

    Args:
        model, loader, head, target, wd, fd: as in :func:`collapse_report`.

    Attributes:
        history: the reports so far.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], head: str | Sequence[str] | None = None, **how: Any
    ) -> None:
        self.model, self.loader, self.head, self.how = model, loader, head, how
        self.history: list[CollapseReport] = []
        linear_head(model, head)

    def record(self, epoch: int | float | None = None) -> CollapseReport:
        """Measure now; filed under ``epoch``, or the number of reports so far."""
        at = len(self.history) if epoch is None else epoch
        report = collapse_report(self.model, self.loader, self.head, epoch=at, **self.how)
        self.history.append(report)
        return report

    def callback(self, every: int) -> Callable[[int, nn.Module], None]:
        """``callback(step, model)`` that measures every so many steps, filed under ``step / every``."""
        if every < 1:
            raise InvalidInput(f"every={every}: at least 1 step is expected")

        def measure(step: int, _: nn.Module) -> None:
            if step % every == 0:
                self.record(step / every)

        return measure

    def to_frame(self) -> pd.DataFrame:
        """All reports, one row for each epoch and layer."""
        if not self.history:
            return pd.DataFrame()
        return pd.concat([report.to_frame() for report in self.history], ignore_index=True)

    def plot(self, metric: str = "nc1", ax: Any = None) -> Any:
        """One metric of every layer against the epoch, on a logarithmic scale; returns the axes."""
        ax, table = new_axes(ax), self.to_frame()
        if metric not in table:
            raise InvalidInput(f"metric={metric!r}: expected one of {', '.join(table.columns[3:])}")
        for (name, rows), colour in zip(table.groupby("layer", sort=False), CYCLE, strict=False):
            ax.plot(rows["epoch"], rows[metric], color=colour, marker="o", markersize=3, label=str(name))
        ax.set(yscale="log", xlabel="epoch", ylabel=metric)
        ax.legend(title="layer")
        return ax


def _pairs(loader: Iterable[Any]) -> Iterable[tuple[Tensor, Tensor]]:
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise InvalidInput("the loader gives no labels: batches (inputs, labels) are expected")
        yield batch[0], as_labels(torch.as_tensor(batch[1]))


def _flat(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2:
        raise InvalidInput(f"{name!r} reads a tensor of shape {tuple(x.shape)}: features [samples, d] are expected")
    return x


def _products(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """For each layer the product of its weights and all later ones, in float64."""
    product, found = None, []
    for layer in reversed(layers):
        weight = layer.weight.detach().double()
        product = weight if product is None else product @ weight
        found.append(product)
    return found[::-1]
