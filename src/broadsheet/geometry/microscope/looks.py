"""The microscope itself: what is measured at a look, and what of it is kept."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning import match_units
from broadsheet.geometry.diffusion_spectral_entropy import (
    BandwidthWarning,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
)
from broadsheet.geometry.diffusion_spectral_entropy.information import reference_clusters
from broadsheet.geometry.microscope.plots import plot_looks
from broadsheet.geometry.neural_collapse import linear_head, metrics_of, nearest_mean_agreement
from broadsheet.geometry.neural_collapse.metrics import choose_target
from broadsheet.geometry.neural_collapse.theory import Decay
from broadsheet.nn.alignment import linear_cka
from broadsheet.nn.batches import ModelInputs, class_labels, device_of, model_inputs, unit_samples
from broadsheet.nn.hooks import Site, capture, evaluating
from broadsheet.nn.moments import ClassMoments, PairMoments
from broadsheet.nn.pooling import Pool, pooled
from broadsheet.nn.seeding import generator, seeded


@dataclass(frozen=True)
class Look:
    """One layer at one moment.

    Attributes:
        at: step or epoch, as counted by the caller.
        layer: submodule name.
        values: the measures by name: ``dse``, ``dsmi_labels``, ``dsmi_inputs`` (bits); ``nc1``, ``nc2_h`` and, for the
            layers of the head, ``nc2_w``, ``nc3_wh``, ``nc3_duality``, ``ncc_agreement``; ``matched_correlation`` and
            ``cka`` with the reference network; ``accuracy`` of the model, the same for all layers.
        seconds: that the look took for this layer, the forward pass aside.
    """

    at: float | int
    layer: str
    values: Mapping[str, float]
    seconds: float


@dataclass
class _Layer:
    """What is gathered of one layer during a look."""

    name: str
    points: list[Tensor] = field(default_factory=list)
    classes: ClassMoments | None = None
    pair: PairMoments | None = None
    seconds: float = 0.0


class TrainingMicroscope:
    """Measures chosen layers whenever asked, in one pass over held-out samples that keeps moments only.

    Nothing of a look touches the training: the model runs in evaluation mode without gradients, and modes, random
    states and the data's order are afterwards what they were.

    Cost of a look, beside one forward pass over the samples (two with a reference): for each layer of ``d`` features
    ``n d^2`` multiply-adds for collapse, ``n d (d + q)`` for convergence with ``q`` units, ``p^3`` for the entropy of
    ``p`` kept points. Memory: ``8 (2 d^2 + d q)`` bytes and the ``p d`` points. :meth:`cost` says what it took.

    Args:
        model: the module that is trained.
        loader: batches that can be gone through again, the same samples in the same order: ``(inputs, labels)``, or
            dictionaries as Hugging Face's data collators give them, with ``labels`` among them.
        layers: names of submodules whose outputs are looked at.
        head: name(s) of the linear layer(s) that end the model, as in
            :func:`broadsheet.geometry.neural_collapse.collapse_report`: their inputs are looked at too, beside their
            weights; None for none.
        reference: a second network on the same inputs, with whose layers the units are matched; None for none.
        reference_layers: the reference's layer for each of ``layers``; None: the same names.
        entropy, collapse: False leaves those measures out.
        sigma, t: bandwidth and time of the entropy. ``"median"`` follows the scale of the layer, so that layers and
            looks compare by shape alone; a number keeps the scale in.
        max_points: samples of which the entropy is taken, the same ones at every look.
        input_clusters: clusters of the inputs for DSMI(Z; X); None leaves it out.
        n_classes: labels are 0 to ``n_classes`` - 1; None: as many as the first look finds.
        target, wd, fd: of the collapse, as in :func:`broadsheet.geometry.neural_collapse.collapse_metrics`.
        pool: how an output with more than (samples, features) becomes that, as in :func:`broadsheet.nn.pooling.pooled`:
            ``"mean"`` over positions, ``"first"`` or ``"last"`` token (padding does not count), ``"flatten"``, or a
            function. Convergence takes every position as a sample instead.
        seed: of the points and clusters.

    Attributes:
        history: the looks so far.

    Raises:
        InvalidInput: no such layer, or nothing to measure.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(30, 4), torch.arange(30) % 3)]
        >>> scope = TrainingMicroscope(model, data, ["1"], head="2", sigma=1.0)
        >>> sorted({look.layer for look in scope.look(0)})
        ['1', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        layers: Sequence[str] = (),
        *,
        head: str | Sequence[str] | None = None,
        reference: nn.Module | None = None,
        reference_layers: Sequence[str] | None = None,
        entropy: bool = True,
        collapse: bool = True,
        sigma: Any = "median",
        t: float | int = 1,
        max_points: int = 500,
        input_clusters: int | None = None,
        n_classes: int | None = None,
        target: str = "auto",
        wd: Decay | None = None,
        fd: float | int | None = None,
        pool: Pool = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loader, self.layers = model, loader, tuple(layers)
        self.reference, self.entropy, self.collapse = reference, entropy, collapse
        self.sigma, self.t, self.max_points, self.input_clusters = sigma, t, max_points, input_clusters
        self.n_classes, self.target, self.wd, self.fd = n_classes, target, wd, fd
        self.pool, self.seed = pool, seed
        self.head, self._linears = linear_head(model, head) if head is not None else ([], [])
        other = self.layers if reference_layers is None else tuple(reference_layers)
        if len(other) != len(self.layers):
            raise InvalidInput(
                f"reference_layers: {len(other)} names for {len(self.layers)} layers: one each is expected"
            )
        self.reference_layers = other
        if not self.layers and not self.head:
            raise InvalidInput("no layers and no head: there is nothing to look at")
        if input_clusters is not None and not entropy:
            raise InvalidInput("input_clusters: DSMI(Z; X) is an entropy, and entropy=False")
        if max_points < 2:
            raise InvalidInput(f"max_points={max_points}: an entropy needs at least 2")
        for name, module, names in (("model", model, self.layers), ("reference", reference, other)):
            known = dict(module.named_modules()) if module is not None else dict.fromkeys(names)
            if missing := [layer for layer in names if layer not in known]:
                raise InvalidInput(f"{name} has no submodule {missing[0]!r}: see {name}.named_modules()")
        self.history: list[Look] = []
        self._kept: Tensor | None = None  # which samples stand for all in the entropy
        self._clusters: np.ndarray | None = None
        self._warned: set[str] = set()
        self._print: Tensor | None = None  # of the inputs, so that another order is noticed

    # ---------------------------------------------------------------------------------------------------- looking

    def look(self, at: float | int | None = None) -> tuple[Look, ...]:
        """Measure now.

        Args:
            at: what the look is filed under; None for the number of looks so far.

        Returns:
            one :class:`Look` for each layer.

        Raises:
            InvalidInput: no batches, other samples than before, an output that needs ``pool``, no labels where the
                collapse is asked for.
        """
        filed = len({look.at for look in self.history}) if at is None else at
        with seeded(self.seed), torch.no_grad(), evaluating(self.model):
            gathered, labels, accuracy, agreement = self._pass()
            looks = tuple(self._measured(layer, labels, accuracy, agreement, filed) for layer in gathered)
        self.history.extend(looks)
        return looks

    def _pass(self) -> tuple[list[_Layer], Tensor | None, float, dict[str, float]]:
        """One pass over the loader: moments of every layer, points for the entropy."""
        layers = [_Layer(name) for name in dict.fromkeys([*self.layers, *self.head])]
        sites = [Site(name, label=f"out:{name}") for name in self.layers]
        sites += [Site(name, "input", label=f"in:{name}") for name in self.head]
        all_labels: list[Tensor] = []
        prints: list[Tensor] = []
        raw: list[Tensor] = []
        right = judged = seen = 0
        device = device_of(self.model)
        with ExitStack() as stack:
            values = stack.enter_context(capture(self.model, sites))
            others: dict[str, Tensor] = {}
            if self.reference is not None:
                stack.enter_context(evaluating(self.reference))
                names = [Site(name, label=name) for name in dict.fromkeys(self.reference_layers)]
                others = stack.enter_context(capture(self.reference, names))
            for batch in self.loader:
                given, classes = model_inputs(batch), class_labels(batch)
                output = given.to(device).call(self.model)
                if self.reference is not None:
                    given.to(device_of(self.reference)).call(self.reference)
                n = given.n
                prints.append(given.first.detach().double().flatten(1).sum(1).cpu())
                if self._wants_inputs():
                    raw.append(given.first.flatten(1).cpu()[self._choose(seen, n)])
                if classes is not None:
                    all_labels.append(classes.cpu())
                    logits = getattr(output, "logits", output)
                    if isinstance(logits, Tensor) and logits.ndim == 2:
                        right += int((logits.argmax(1).cpu() == classes.cpu()).sum())
                        judged += n
                for layer in layers:
                    self._gather(layer, values, others, given, classes, seen)
                seen += n
        if seen == 0:
            raise InvalidInput("the loader gave no batches")
        self._check_order(torch.cat(prints), torch.cat(raw) if raw else None)
        labels = torch.cat(all_labels) if all_labels else None
        if self.collapse and labels is None:
            raise InvalidInput("the loader gives no labels: collapse=False, or batches (inputs, labels)")
        if labels is not None and len(labels) != seen:
            raise InvalidInput(f"{len(labels)} of {seen} samples have a label: all or none are expected")
        return layers, labels, right / judged if judged else math.nan, self._agreement(layers)

    def _wants_inputs(self) -> bool:
        return self.input_clusters is not None and self._clusters is None

    def _gather(
        self,
        layer: _Layer,
        values: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        given: ModelInputs,
        classes: Tensor | None,
        seen: int,
    ) -> None:
        began = time.perf_counter()
        is_head = layer.name in self.head and layer.name not in self.layers
        value = values[f"in:{layer.name}"] if is_head else values[f"out:{layer.name}"]
        try:
            flat = pooled(value, self.pool, given.mask)
        except InvalidInput as error:
            raise InvalidInput(f"{layer.name!r}: {error}") from error
        if self.entropy:
            kept = self._choose(seen, len(flat))
            layer.points.append(flat[kept].float().cpu())
        if self.collapse and classes is not None:
            if layer.classes is None:
                layer.classes = ClassMoments(self._classes())
            layer.classes.update(flat, classes.to(flat.device))
        if not is_head and self.reference is not None:
            other = others[self.reference_layers[self.layers.index(layer.name)]]
            layer.pair = layer.pair or PairMoments()
            layer.pair.update(unit_samples(value, given.mask), unit_samples(other, given.mask).to(value.device))
        layer.seconds += time.perf_counter() - began

    def _classes(self) -> int:
        if self.n_classes is None:  # once: how many classes there are
            found = [class_labels(batch) for batch in self.loader]
            self.n_classes = max(int(labels.max()) + 1 for labels in found if labels is not None)
        return self.n_classes

    def _choose(self, seen: int, n: int) -> Tensor:
        """Rows of this batch that stand for all in the entropy: the same samples at every look."""
        if self._kept is None:
            total = sum(model_inputs(batch).n for batch in self.loader)
            order = torch.randperm(total, generator=generator(self.seed))
            self._kept = order[: self.max_points].sort().values
        here = (self._kept >= seen) & (self._kept < seen + n)
        return self._kept[here] - seen

    def _check_order(self, fingerprint: Tensor, inputs: Tensor | None) -> None:
        if self._print is None:
            self._print = fingerprint
            if inputs is not None:  # of the kept samples alone
                assert self.input_clusters is not None
                self._clusters = reference_clusters(inputs.double().numpy(), False, self.input_clusters, self.seed)
        elif self._print.shape != fingerprint.shape or not torch.allclose(self._print, fingerprint):
            raise InvalidInput(
                "the loader gave other samples, or another order, than the first time: use shuffle=False"
            )

    # -------------------------------------------------------------------------------------------------- measuring

    def _products(self) -> list[Tensor]:
        products: list[Tensor] = []
        for linear in reversed(self._linears):
            weight = linear.weight.detach().double()
            products.append(products[-1] @ weight if products else weight)
        return products[::-1]

    def _agreement(self, layers: Sequence[_Layer]) -> dict[str, float]:
        """NC4 of each layer of the head: how often it decides as the nearest class mean does, on the kept points."""
        found = {}
        bias = self._linears[-1].bias if self._linears else None
        for name, product in zip(self.head, self._products(), strict=True):
            layer = next(one for one in layers if one.name == name)
            if layer.classes is None or not layer.points or name in self.layers:
                continue
            points = torch.cat(layer.points).to(layer.classes.means)
            agree = nearest_mean_agreement(points, layer.classes.means, product, bias)
            found[name] = float(agree.double().mean())
        return found

    def _measured(
        self, layer: _Layer, labels: Tensor | None, accuracy: float, agreement: Mapping[str, float], at: float | int
    ) -> Look:
        began = time.perf_counter()
        values: dict[str, float] = {}
        if self.entropy:
            values |= self._entropies(layer.name, torch.cat(layer.points), labels)
        if layer.classes is not None:
            values |= self._collapse(layer)
            if layer.name in agreement:
                values["ncc_agreement"] = agreement[layer.name]
        if layer.pair is not None:
            values |= _convergence(layer.pair)
        values["accuracy"] = accuracy
        return Look(at, layer.name, values, layer.seconds + time.perf_counter() - began)

    def _entropies(self, name: str, points: Tensor, labels: Tensor | None) -> dict[str, float]:
        options: dict[str, Any] = {"sigma": self.sigma, "t": self.t, "seed": self.seed}
        x = points.double().numpy()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BandwidthWarning)
            values = {"dse": float(diffusion_spectral_entropy(x, **options))}
            assert self._kept is not None
            codes = {
                "dsmi_labels": None if labels is None else labels[self._kept].numpy(),
                "dsmi_inputs": self._clusters,
            }
            for measure, clusters in codes.items():
                if clusters is not None:
                    found = diffusion_spectral_mutual_information(x, None, clusters=clusters, **options)
                    values[measure] = float(found)
        narrow = [str(one.message) for one in caught if issubclass(one.category, BandwidthWarning)]
        if narrow and name not in self._warned:  # once for each layer, not at every look
            self._warned.add(name)
            warnings.warn(f"{name!r}: {narrow[0]}", BandwidthWarning, stacklevel=5)
        return values

    def _collapse(self, layer: _Layer) -> dict[str, float]:
        moments = layer.classes
        assert moments is not None
        if layer.name not in self.head or layer.name in self.layers:
            plain = metrics_of(moments, None, "etf")
            return {"nc1": plain.nc1, "nc2_h": plain.nc2_h}
        number = list(self.head).index(layer.name)
        bias = self._linears[-1].bias
        kind, prediction = choose_target(self.target, moments.counts, bias, self.wd, self.fd, len(self.head))
        found = metrics_of(moments, self._products()[number], kind, prediction, number + 1).numbers()
        found.pop("ncc_agreement")
        return found

    # -------------------------------------------------------------------------------------------------- callbacks

    def callback(self, every: int) -> Callable[[int, nn.Module], None]:
        """``callback(step, model)`` for a training loop of torch; looks are filed under the step.

        Args:
            every: steps between two looks.
        """
        _positive(every)

        def measure(step: int, _: nn.Module) -> None:
            if step % every == 0:
                self.look(step)

        return measure

    def transformers(self, every: int) -> Any:
        """A ``transformers.TrainerCallback`` that looks every so many steps, and when training begins."""
        from broadsheet.geometry.microscope.trainers import transformers_callback

        return transformers_callback(self, _positive(every))

    def lightning(self, every: int) -> Any:
        """A Lightning ``Callback`` that looks every so many steps, and when training begins."""
        from broadsheet.geometry.microscope.trainers import lightning_callback

        return lightning_callback(self, _positive(every))

    def skorch(self, every: int = 1) -> Any:
        """A skorch ``Callback`` that looks every so many epochs, and when training begins."""
        from broadsheet.geometry.microscope.trainers import skorch_callback

        return skorch_callback(self, _positive(every))

    # ----------------------------------------------------------------------------------------------------- showing

    def to_frame(self) -> pd.DataFrame:
        """One row for each look and layer: ``at``, ``layer``, the measures, ``seconds``."""
        rows = [{"at": look.at, "layer": look.layer, **look.values, "seconds": look.seconds} for look in self.history]
        return pd.DataFrame(rows)

    def cost(self) -> pd.DataFrame:
        """Mean seconds of a look at each layer, the forward pass aside."""
        if not self.history:
            raise InvalidInput("no look yet: call look() or train with a callback")
        table = self.to_frame().rename(columns={"seconds": "seconds_per_look"})
        return table.groupby("layer", sort=False)[["seconds_per_look"]].mean().reset_index()

    def plot(self, axes: Any = None) -> Any:
        """All measures over training: a row for entropy, collapse and agreement each, a column for each layer.

        Args:
            axes: ``[rows, layers]`` matplotlib axes, or None for new ones.

        Returns:
            the axes.
        """
        if not self.history:
            raise InvalidInput("no look yet: call look() or train with a callback")
        return plot_looks(self.to_frame(), axes)


def _convergence(pair: PairMoments) -> dict[str, float]:
    """How well the units of two networks can be paired, one to one, and how alike the layers are as a whole.

    Signed correlations, the best assignment of units, dead ones left out (arXiv:1511.07543, section 3).
    """
    matching = match_units(pair)
    if len(matching.matched) == 0:
        return {"matched_correlation": math.nan, "cka": math.nan}
    return {"matched_correlation": matching.mean, "cka": linear_cka(pair)}


def _positive(every: int) -> int:
    if every < 1:
        raise InvalidInput(f"every={every}: at least 1 is expected")
    return every
