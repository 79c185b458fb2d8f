"""Follow a layer's entropy and information through training, compare initialisations, and rank pretrained models."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.diffusion_spectral_entropy.entropy import (
    Bandwidth,
    BandwidthWarning,
    as_points,
    diffusion_spectral_entropy,
)
from broadsheet.geometry.diffusion_spectral_entropy.information import (
    diffusion_spectral_mutual_information,
    reference_clusters,
)
from broadsheet.nn.batches import device_of
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.plotting import COLOURS, CYCLE, new_axes
from broadsheet.nn.seeding import seeded

Reduce = str | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Snapshot:
    """One moment of training.

    Attributes:
        epoch: as counted by the caller.
        dse: entropy of the layer, DSE(Z), bits.
        dsmi_labels: DSMI(Z; Y), bits; NaN without labels.
        dsmi_inputs: DSMI(Z; X), bits; NaN when switched off.
        accuracy: share of samples whose largest output is their label; NaN where that makes no sense.
    """

    epoch: int | float
    dse: float
    dsmi_labels: float
    dsmi_inputs: float
    accuracy: float


class RepresentationMonitor:
    """Entropy of a layer and what it tells about labels and inputs, measured whenever asked.

    The model is run in evaluation mode without gradients and is left as it was.

    Args:
        model: any module.
        layer: name of the submodule whose output is followed, as in ``model.named_modules()``.
        loader: goes through the same held-out samples in the same order every time (``shuffle=False``): (inputs,
            labels) batches, or inputs alone.
        sigma: bandwidth, see :func:`diffusion_spectral_entropy`.
        t: diffusion time.
        max_samples: a larger set is represented by that many samples, the same ones every time.
        input_clusters: clusters of the inputs for DSMI(Z; X), made once; None leaves DSMI(Z; X) out.
        reduce: for layers with more than (samples, features): ``"flatten"``, ``"mean"`` (over all further dimensions)
            or a function of the activation.
        repetitions: random subsets of each size.
        seed: of the subsets and the clustering.

    Attributes:
        history: the :class:`Snapshot` objects so far.

    Raises:
        InvalidInput: no such layer, an activation of more than two dimensions without ``reduce``, or a loader whose
            order changes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> data = [(torch.randn(32, 4), torch.arange(32) % 2)]
        >>> monitor = RepresentationMonitor(model, "1", data, sigma=1.0, input_clusters=None)
        >>> 0 < monitor.record(epoch=0).dse < 5
        True
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        loader: Iterable[Any],
        sigma: Bandwidth = 10.0,
        t: int | float = 1,
        max_samples: int = 10_000,
        input_clusters: int | None = 10,
        reduce: Reduce = None,
        repetitions: int = 5,
        seed: int = 0,
    ) -> None:
        self.model, self.layer, self.loader = model, layer, loader
        self.sigma, self.t, self.max_samples = sigma, t, max_samples
        self.input_clusters, self.reduce, self.repetitions, self.seed = input_clusters, reduce, repetitions, seed
        self.history: list[Snapshot] = []
        self._inputs: Tensor | None = None
        self._clusters: np.ndarray | None = None

    def record(self, epoch: int | float | None = None) -> Snapshot:
        """Measure now.

        Args:
            epoch: what the snapshot is filed under; None for the number of snapshots so far.
        """
        activations, labels, outputs, inputs = self._run()
        seen = inputs.double().sum(tuple(range(1, inputs.ndim)))
        if self._inputs is None:
            self._inputs = seen
            if self.input_clusters is not None:
                self._clusters = reference_clusters(inputs.flatten(1), False, self.input_clusters, self.seed)
        elif self._inputs.shape != seen.shape or not torch.allclose(self._inputs, seen):
            raise InvalidInput(
                "the loader gave other samples, or another order, than the first time: use shuffle=False"
            )
        options = {"sigma": self.sigma, "t": self.t, "max_samples": self.max_samples, "seed": self.seed}
        dse = diffusion_spectral_entropy(activations, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BandwidthWarning)  # said once, by the entropy
            about_labels, about_inputs = (
                float("nan")
                if codes is None
                else float(
                    diffusion_spectral_mutual_information(
                        activations, None, clusters=codes, repetitions=self.repetitions, **options
                    )
                )
                for codes in (labels, self._clusters)
            )
        snapshot = Snapshot(
            len(self.history) if epoch is None else epoch,
            float(dse),
            about_labels,
            about_inputs,
            _accuracy(outputs, labels),
        )
        self.history.append(snapshot)
        return snapshot

    def activations(self) -> tuple[Tensor, np.ndarray | None]:
        """The layer's (N, D) activations on the loader's samples, and their labels, as of now."""
        return self._run()[:2]

    def callback(self, every: int) -> Callable[[int, nn.Module], None]:
        """A ``callback(step, model)`` for a training loop that measures every so many steps.

        Args:
            every: steps between two snapshots, such as those of an epoch; snapshots are filed under ``step / every``.
        """

        def measure(step: int, _: nn.Module) -> None:
            if step % every == 0:
                self.record(step / every)

        return measure

    def to_frame(self) -> Any:
        """A pandas table with one row per snapshot."""
        import pandas as pd

        names = [entry.name for entry in fields(Snapshot)]
        return pd.DataFrame([[getattr(one, name) for name in names] for one in self.history], columns=names)

    def plot(self, ax: Any = None, against: str = "epoch") -> Any:
        """DSE and both DSMI, in bits, against the epoch or the accuracy; returns the axes.

        Args:
            ax: matplotlib axes, or None for new ones.
            against: ``"epoch"`` or ``"accuracy"``.
        """
        if against not in ("epoch", "accuracy"):
            raise InvalidInput(f"against={against!r}: expected 'epoch' or 'accuracy'")
        ax = new_axes(ax)
        frame = self.to_frame().sort_values(against, kind="stable")
        lines = {"dse": "DSE(Z)", "dsmi_labels": "DSMI(Z; Y)", "dsmi_inputs": "DSMI(Z; X)"}
        for (name, label), colour in zip(lines.items(), CYCLE, strict=False):
            if frame[name].notna().any():
                ax.plot(frame[against], frame[name], color=colour, marker="o", markersize=3, label=label)
        ax.set(xlabel=against, ylabel="bits")
        ax.legend()
        return ax

    @torch.no_grad()
    def _run(self) -> tuple[Tensor, np.ndarray | None, Tensor | None, Tensor]:
        """Activations, labels, outputs and inputs of the whole loader."""
        device = device_of(self.model)
        kept: dict[str, list[Tensor]] = {"activations": [], "labels": [], "outputs": [], "inputs": []}
        with evaluating(self.model), capture(self.model, self.layer) as seen:
            for batch in self.loader:
                inputs, labels = (batch[0], batch[1]) if isinstance(batch, tuple | list) else (batch, None)
                output = self.model(inputs.to(device))
                kept["activations"].append(self._reduced(seen[self.layer]))
                kept["inputs"].append(inputs.cpu())
                if labels is not None:
                    kept["labels"].append(torch.as_tensor(labels).cpu())
                if isinstance(output, Tensor):
                    kept["outputs"].append(output)
        if not kept["activations"]:
            raise InvalidInput("the loader gave no batches")
        labels = torch.cat(kept["labels"]).numpy() if kept["labels"] else None
        outputs = torch.cat(kept["outputs"]) if kept["outputs"] else None
        return torch.cat(kept["activations"]), labels, outputs, torch.cat(kept["inputs"])

    def _reduced(self, activation: Tensor) -> Tensor:
        if callable(self.reduce):
            return self.reduce(activation)
        if activation.ndim == 2:
            return activation
        if self.reduce == "flatten":
            return activation.flatten(1)
        if self.reduce == "mean":
            return activation.flatten(2).mean(2)
        raise InvalidInput(
            f"{self.layer!r} has activations of shape {tuple(activation.shape)}: pass reduce='flatten', reduce='mean' "
            "(over space) or a function to (samples, features)"
        )


def _accuracy(outputs: Tensor | None, labels: np.ndarray | None) -> float:
    if outputs is None or labels is None or outputs.ndim != 2 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return float("nan")
    return float((outputs.argmax(1).cpu().numpy() == labels).mean())


def reinitialise(
    model: nn.Module, std: int | float, kinds: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d), seed: int = 0
) -> nn.Module:
    """Draw the weights of a model's convolutions anew from N(0, std^2), in place.

    Args:
        model: changed in place and handed back.
        std: standard deviation, not negative.
        kinds: module types whose ``weight`` is drawn; ``(nn.Linear,)`` for a network without convolutions.
        seed: of the draw.

    Raises:
        InvalidInput: the model has no module of these kinds.
    """
    if not std >= 0:
        raise InvalidInput(f"std={std}: a standard deviation is not negative")
    chosen = [module for module in model.modules() if isinstance(module, kinds)]
    if not chosen:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise InvalidInput(f"{type(model).__name__} has no {names}: pass kinds=(nn.Linear,) or the types it is made of")
    with seeded(seed), torch.no_grad():
        for module in chosen:
            nn.init.normal_(module.get_parameter("weight"), std=std)
    return model


@dataclass(frozen=True)
class InitialisationStudy:
    """The entropy at which a network starts, for several spreads of its initial weights.

    Attributes:
        stds: standard deviations of the weights.
        dse: entropy of the layer before training, bits.
        ceiling: log2 of the number of samples, the largest entropy there is.
        sigma: bandwidth.
    """

    stds: tuple[int | float, ...]
    dse: tuple[float, ...]
    ceiling: float
    sigma: Any

    @property
    def best(self) -> int | float:
        """The spread with the lowest entropy, which the paper found to train faster and end better."""
        return self.stds[int(np.argmin(self.dse))]

    def to_frame(self) -> Any:
        """A pandas table with one row per spread."""
        import pandas as pd

        return pd.DataFrame({"std": self.stds, "dse": self.dse, "share_of_ceiling": np.array(self.dse) / self.ceiling})

    def plot(self, ax: Any = None) -> Any:
        """Entropy against the spread; returns the axes."""
        ax = new_axes(ax)
        ax.plot(self.stds, self.dse, "o-", color=COLOURS["ours"])
        ax.axhline(self.ceiling, color=COLOURS["neutral"], linestyle=":", label="log2 N")
        ax.set(xscale="log", xlabel="standard deviation of the initial weights", ylabel="DSE (bits)")
        ax.legend()
        return ax


def compare_initialisations(
    model_fn: Callable[[], nn.Module],
    stds: Sequence[int | float],
    loader: Iterable[Any],
    layer: str,
    kinds: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    seed: int = 0,
    **options: Any,
) -> InitialisationStudy:
    """Measure the entropy of a layer before training for several spreads of the initial weights.

    Args:
        model_fn: makes a fresh model.
        stds: standard deviations of the weights to compare.
        loader: samples, as for :class:`RepresentationMonitor`.
        layer: name of the submodule that is measured.
        kinds: module types whose weights are drawn anew, see :func:`reinitialise`.
        seed: of the model and the draw, the same for every spread.
        **options: ``sigma``, ``t``, ``max_samples`` and ``reduce`` of :class:`RepresentationMonitor`.
    """
    if not stds:
        raise InvalidInput("stds is empty: give the standard deviations to compare")
    measured, samples = [], 0
    for std in stds:
        with seeded(seed):
            model = model_fn()
        monitor = RepresentationMonitor(
            reinitialise(model, std, kinds, seed), layer, loader, input_clusters=None, seed=seed, **options
        )
        activations, _ = monitor.activations()
        samples = min(len(activations), monitor.max_samples)
        measured.append(
            float(
                diffusion_spectral_entropy(
                    activations, sigma=monitor.sigma, t=monitor.t, max_samples=monitor.max_samples, seed=seed
                )
            )
        )
    return InitialisationStudy(tuple(stds), tuple(measured), math.log2(samples), options.get("sigma", 10.0))


@dataclass(frozen=True)
class ModelRanking:
    """Entropy and label information of several models' features, and how they go with the models' accuracies.

    Attributes:
        names: models, most label information first.
        dse: DSE(Z), bits, in that order.
        dsmi: DSMI(Z; Y), bits.
        accuracies: as given, or None.
        correlations: ``{"dse": {"pearson": r, "spearman": rho}, "dsmi": {...}}``, empty without accuracies.
    """

    names: tuple[str, ...]
    dse: tuple[float, ...]
    dsmi: tuple[float, ...]
    accuracies: tuple[float, ...] | None
    correlations: dict[str, dict[str, float]]

    def to_frame(self) -> Any:
        """A pandas table with one row per model, best first."""
        import pandas as pd

        frame = pd.DataFrame({"model": self.names, "dse": self.dse, "dsmi": self.dsmi})
        return frame if self.accuracies is None else frame.assign(accuracy=self.accuracies)

    def plot(self, ax: Any = None) -> Any:
        """Accuracy against label information, one point per model; returns the axes.

        Raises:
            InvalidInput: no accuracies were given.
        """
        if self.accuracies is None:
            raise InvalidInput("no accuracies were given: pass accuracies to rank_models to plot against them")
        ax = new_axes(ax)
        ax.plot(self.dsmi, self.accuracies, "o", color=COLOURS["ours"])
        for name, x, y in zip(self.names, self.dsmi, self.accuracies, strict=True):
            ax.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=COLOURS["neutral"])
        rho = self.correlations["dsmi"]
        ax.set(xlabel="DSMI(Z; Y) (bits)", ylabel="accuracy")
        ax.set_title(f"Pearson {rho['pearson']:.2f}, Spearman {rho['spearman']:.2f}")
        return ax


def rank_models(
    features_by_model: Mapping[str, Any],
    labels: Any,
    accuracies: Mapping[str, Any] | None = None,
    sigma: Bandwidth = "sqrt_dim",
    t: int | float = 1,
    max_samples: int = 10_000,
    seed: int = 0,
) -> ModelRanking:
    """Rank pretrained models by what their features tell about the labels, without training anything.

    Args:
        features_by_model: model name -> (N, D) features of the same N samples; D may differ.
        labels: (N,) labels.
        accuracies: model name -> accuracy, to correlate with.
        sigma: bandwidth; sqrt(D) makes models of different width comparable.
        t: diffusion time.
        max_samples: a larger set is represented by that many samples.
        seed: of the subsets.

    Raises:
        InvalidInput: no models, other lengths, or a model without an accuracy.
    """
    if not features_by_model:
        raise InvalidInput("features_by_model is empty: give at least one model's features")
    if accuracies is not None and (missing := [name for name in features_by_model if name not in accuracies]):
        raise InvalidInput(f"accuracies: none for {', '.join(map(repr, missing))}")
    options = {"sigma": sigma, "t": t, "max_samples": max_samples, "seed": seed}
    rows = []
    for name, features in features_by_model.items():
        points = as_points(features, f"features_by_model[{name!r}]")
        information = diffusion_spectral_mutual_information(points, labels, discrete=True, **options)
        rows.append((name, float(diffusion_spectral_entropy(points, **options)), float(information)))
    rows.sort(key=lambda row: -row[2])
    names, dse, dsmi = zip(*rows, strict=True)
    if accuracies is None:
        return ModelRanking(names, dse, dsmi, None, {})
    given = tuple(float(accuracies[name]) for name in names)
    from scipy.stats import pearsonr, spearmanr

    def correlations(values: tuple[float, ...]) -> dict[str, float]:
        if len(set(values)) < 2 or len(set(given)) < 2:
            return {"pearson": float("nan"), "spearman": float("nan")}
        return {
            "pearson": float(pearsonr(values, given).statistic),
            "spearman": float(spearmanr(values, given).statistic),
        }

    return ModelRanking(names, dse, dsmi, given, {"dse": correlations(dse), "dsmi": correlations(dsmi)})
