"""Zero-shot stitching: one model's encoder under another's head, nothing trained in between (section 4)."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.anchors import Anchors, check_same
from broadsheet.geometry.relative_representations.encoder import RelativeEncoder
from broadsheet.geometry.relative_representations.model import AbsoluteModel, RelativeModel, latents_of
from broadsheet.nn.alignment import Similarity, procrustes
from broadsheet.nn.plotting import COLOURS, new_figure
from broadsheet.nn.progress import SILENT, Progress

BASELINES = ("absolute", "procrustes")


class StitchWarning(UserWarning):
    """A stitch whose numbers need a grain of salt."""


class StitchedModel(nn.Module):
    """An encoder of one model and a head of another; made by :func:`stitch`.

    Attributes:
        source: the model whose encoder it is.
        target: the model whose head it is.
        turn: absolute latents of the source brought to those of the target; None leaves them.
        label: ``"relative"``, or the baseline's name: ``"absolute"`` or ``"procrustes"``.
    """

    def __init__(
        self,
        source: RelativeEncoder | AbsoluteModel,
        target: RelativeModel | AbsoluteModel,
        label: str,
        turn: Similarity | None = None,
    ) -> None:
        super().__init__()
        self.source, self.target, self.label, self.turn = source, target, label, turn

    def forward(self, x: Any) -> Any:
        if isinstance(self.source, RelativeEncoder):
            assert isinstance(self.target, RelativeModel)
            return self.target.head(self.target.layer.finish(self.source.projection(x)))
        latents = self.source.encode(x)
        if self.turn is None:
            first = next((m for m in self.target.head.modules() if isinstance(m, nn.Linear)), None)
            if first is not None and first.in_features != latents.shape[1]:
                raise InvalidInput(
                    f"the head reads {first.in_features} features, the other encoder gives {latents.shape[1]}: "
                    "absolute latents of different width do not fit; baseline='procrustes' or relative latents do"
                )
        return self.target.head(latents if self.turn is None else self.turn(latents))


def stitch(
    model_a: RelativeModel | RelativeEncoder | AbsoluteModel,
    model_b: RelativeModel | AbsoluteModel,
    anchors_a: Any = None,
    anchors_b: Any = None,
    *,
    parallel: bool = False,
    baseline: str | None = None,
) -> StitchedModel:
    """The encoder of one model under the head of another.

    Args:
        model_a: gives the encoder; a :class:`RelativeEncoder` needs no head of its own.
        model_b: gives the head, and the trained norm before it.
        anchors_a, anchors_b: other anchors than the models' own: samples or :class:`Anchors` as that side's encoder
            reads them. With anchors of one meaning in two languages or modalities, models meet that never saw a common
            sample. Needed for ``"procrustes"`` of absolute models.
        parallel: item i of one side's anchors means the same as item i of the other's, though they are not the same.
        baseline: ``"absolute"`` hands absolute latents to a head trained on another's: only to show what that gives.
            ``"procrustes"`` rotates them first, by the anchors: the strong rival.

    Returns:
        a model in evaluation mode; it shares its parts with the two.

    Raises:
        InvalidInput: anchors that do not match, layers that compare differently, absolute models without ``baseline``,
            or (absolute) latents of different width.

    Warns:
        StitchWarning: a model in training mode; it is switched to evaluation.
    """
    _settle(model_a, model_b)
    if isinstance(model_a, RelativeModel | RelativeEncoder) and isinstance(model_b, RelativeModel):
        own = model_a if isinstance(model_a, RelativeEncoder) else model_a.relative
        if baseline is not None:
            raise InvalidInput(f"baseline={baseline!r} is for heads trained on absolute latents: these are relative")
        a = own if anchors_a is None else own.replaced(anchors_a)
        check_same(a.anchors, model_b.anchors if anchors_b is None else Anchors.of(anchors_b), parallel)
        if not a.layer.same_columns(model_b.layer):
            raise InvalidInput(
                "the two relative layers compare differently (similarity, frame, bins, heads or classes)"
            )
        joined = StitchedModel(a, model_b, "relative")
    elif isinstance(model_a, AbsoluteModel) and isinstance(model_b, AbsoluteModel):
        joined = _stitched_absolute(model_a, model_b, anchors_a, anchors_b, parallel, baseline)
    else:
        raise InvalidInput("one head reads relative latents, the other absolute ones: stitch models of one kind")
    return joined.eval()


def _stitched_absolute(
    a: AbsoluteModel, b: AbsoluteModel, anchors_a: Any, anchors_b: Any, parallel: bool, baseline: str | None
) -> StitchedModel:
    if baseline not in BASELINES:
        raise InvalidInput(
            f"baseline={baseline!r}: heads trained on absolute latents can be stitched as a baseline only; say "
            f"{' or '.join(map(repr, BASELINES))}, or train RelativeModels"
        )
    if baseline == "absolute":
        return StitchedModel(a, b, "absolute")
    if anchors_a is None:
        raise InvalidInput("a rotation is fitted on anchors: hand in anchors_a= (and anchors_b= where they differ)")
    left = Anchors.of(anchors_a)
    right = left if anchors_b is None else Anchors.of(anchors_b)
    check_same(left, right, parallel)
    turn = procrustes(latents_of(a, left.samples), latents_of(b, right.samples))
    return StitchedModel(a, b, "procrustes", turn)


def _settle(*models: nn.Module) -> None:
    busy = [model for model in models if any(module.training for module in model.modules())]
    for model in busy:
        model.eval()
    if busy:
        warnings.warn(
            f"{len(busy)} of the models were in training mode: switched to evaluation, so that dropout and batch "
            "statistics do not decide",
            StitchWarning,
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------- all against all


@dataclass(frozen=True)
class StitchingMatrix:
    """Scores of every encoder (row) under every head (column); the diagonal is not stitched.

    Attributes:
        names: of the models.
        metric: what is scored.
        relative: ``[M, M]``.
        absolute: ``[M, M]``, of models trained on absolute latents; NaN where widths differ; None where not asked for.
        procrustes: ``[M, M]``, the same after a rotation fitted on the anchors.
    """

    names: tuple[str, ...]
    metric: str
    relative: Float[Tensor, "m m"]
    absolute: Float[Tensor, "m m"] | None = None
    procrustes: Float[Tensor, "m m"] | None = None

    def tables(self) -> dict[str, Tensor]:
        """Kind -> matrix, those that there are."""
        found = {"relative": self.relative, "absolute": self.absolute, "procrustes": self.procrustes}
        return {kind: table for kind, table in found.items() if table is not None}

    def own(self, kind: str = "relative") -> float:
        """Mean of the diagonal: encoder and head that were trained together."""
        return float(self.tables()[kind].diagonal().mean())

    def stitched(self, kind: str = "relative") -> float:
        """Mean off the diagonal, over the pairs that fit together."""
        table = self.tables()[kind]
        return float(table[~torch.eye(len(table), dtype=torch.bool)].nanmean())

    def to_frame(self) -> pd.DataFrame:
        """One row for each kind, encoder and head."""
        rows = [
            {"kind": kind, "encoder": a, "head": b, "stitched": i != j, self.metric: float(table[i, j])}
            for kind, table in self.tables().items()
            for i, a in enumerate(self.names)
            for j, b in enumerate(self.names)
        ]
        return pd.DataFrame(rows)

    def plot(self, axes: Any = None, better: str = "higher") -> Any:
        """Heat maps side by side on one scale; returns the axes.

        Args:
            axes: one for each of :meth:`tables`; None makes a figure.
            better: ``"higher"`` or ``"lower"``; the better cell is the darker one.
        """
        tables = self.tables()
        if axes is None:
            _, grid = new_figure(3.1 * len(tables), 3.2, len(tables), squeeze=False)
            axes = grid[0]
        values = torch.cat([table.flatten() for table in tables.values()])
        values = values[values.isfinite()]
        low, high = float(values.min()), float(values.max())
        colours = "YlGnBu" if better == "higher" else "YlGnBu_r"
        for ax, (kind, table) in zip(axes, tables.items(), strict=True):
            ax.imshow(np.ma.masked_invalid(table.numpy()), cmap=colours, vmin=low, vmax=high)
            ax.set_facecolor(COLOURS["light"])
            ax.grid(False)
            for (i, j), value in np.ndenumerate(table.numpy()):
                shade = (value - low) / max(high - low, 1e-12)
                dark = shade > 0.55 if better == "higher" else shade < 0.45
                text = "–" if np.isnan(value) else f"{value:.2f}" if high >= 0.2 else f"{value:.3f}"
                ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
            ax.set(title=kind, xticks=range(len(self.names)), yticks=range(len(self.names)), xlabel="head of")
            ax.set_xticklabels(self.names, rotation=35, ha="right")
            ax.set_yticklabels(self.names)
        axes[0].set_ylabel("encoder of")
        return axes


def stitching_matrix(
    models: Sequence[RelativeModel] | Mapping[str, RelativeModel],
    loader: Iterable[Any],
    metric: str | Callable[[Any, Any], Tensor] = "accuracy",
    *,
    absolute: Sequence[AbsoluteModel] | None = None,
    anchors: Any = None,
    parallel: bool = False,
    progress: Progress = SILENT,
) -> StitchingMatrix:
    """Every encoder under every head: each encoder sees each batch once, each head M times.

    Args:
        models: M of them, by name or in a list.
        loader: batches (inputs, targets), or inputs alone, which are then their own targets (autoencoders). Models of
            different modalities or languages get inputs of their own: a mapping from every model's name to its inputs.
        metric: ``"accuracy"``, ``"mse"``, or a function (output, target) -> one number for each sample.
        absolute: M models trained on absolute latents, for the tables beside; widths may differ.
        anchors: that Procrustes rotations are fitted on; None for those of the relative models.
        parallel: as in :func:`stitch`.
        progress: shows the batches.

    Raises:
        InvalidInput: no models, no batches, anchors or layers that do not match.
    """
    named = dict(models) if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models)}
    if not named:
        raise InvalidInput("no models: at least one is needed")
    whole = list(named.values())
    rivals = list(absolute or [])
    if rivals and len(rivals) != len(whole):
        raise InvalidInput(f"{len(whole)} relative and {len(rivals)} absolute models: as many of each are expected")
    _settle(*whole, *rivals)
    for other in whole[1:]:
        check_same(whole[0].anchors, other.anchors, parallel)
        if not whole[0].layer.same_columns(other.layer):
            raise InvalidInput("the relative layers compare differently (similarity, frame, bins, heads or classes)")
    score = _METRICS.get(metric) if isinstance(metric, str) else metric
    if score is None:
        raise InvalidInput(f"metric={metric!r}: expected {', '.join(_METRICS)} or a function of output and target")
    m = len(whole)
    turns = _rotations(rivals, whole, anchors) if rivals else []
    sums = {kind: torch.zeros(m, m, dtype=torch.float64) for kind in ("relative", *(BASELINES if rivals else ()))}
    n = 0
    with torch.no_grad(), progress.task("stitching") as task:
        for batch in loader:
            inputs, targets = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
            inputs = inputs[0] if targets is None and isinstance(inputs, tuple | list) else inputs
            targets = inputs if targets is None else targets
            seen = _inputs_of(inputs, named)
            shared = [model.relative.projection(x) for model, x in zip(whole, seen, strict=True)]
            n += len(shared[0])
            for j, model in enumerate(whole):
                for i, r in enumerate(shared):
                    sums["relative"][i, j] += _summed(score, model.head(model.layer.finish(r)), targets)
            for i, z in enumerate([model.encode(x) for model, x in zip(rivals, seen, strict=False)]):
                for j, model in enumerate(rivals):
                    fits = z.shape[1] == turns[0][j].rotation.shape[1]
                    plain = _summed(score, model.head(z), targets) if fits else torch.nan
                    sums["absolute"][i, j] += plain
                    turned = z if i == j else turns[i][j](z)
                    sums["procrustes"][i, j] += _summed(score, model.head(turned), targets)
            task.advance()
    if n == 0:
        raise InvalidInput("the loader gave no batches")
    tables = {kind: table / n for kind, table in sums.items()}
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "score")
    return StitchingMatrix(tuple(named), name, **tables)


def _inputs_of(inputs: Any, named: Mapping[str, Any]) -> list[Any]:
    """What every model reads: inputs of its own under its name, or the same for all."""
    by_name = isinstance(inputs, Mapping) and set(inputs) == set(named)
    return [inputs[name] if by_name else inputs for name in named]


def _rotations(rivals: list[AbsoluteModel], whole: list[RelativeModel], anchors: Any) -> list[list[Similarity]]:
    own = [Anchors.of(anchors)] * len(rivals) if anchors is not None else [model.anchors for model in whole]
    latents = [latents_of(model, kept.samples) for model, kept in zip(rivals, own, strict=True)]
    return [[procrustes(x, y) for y in latents] for x in latents]


def _summed(score: Callable[[Any, Any], Tensor], output: Any, target: Any) -> float:
    return float(score(output, target.to(output.device) if isinstance(target, Tensor) else target).double().sum())


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double()


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1) - target.flatten(1)).square().mean(1)


_METRICS: dict[str, Callable[[Any, Any], Tensor]] = {"accuracy": _accuracy, "mse": _squared_error}
