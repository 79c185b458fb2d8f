"""Train a model with its codebooks: the task's loss plus the reconstruction loss of every codebook."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, TrainingDiverged
from broadsheet.interpretability.codebook_features.model import CodebookModel
from broadsheet.nn.plotting import COLOURS, CYCLE, new_axes, style
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.quantization import CodeUsage
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.small_lm import IGNORED, language_model_loss
from broadsheet.nn.training import cosine_schedule
from broadsheet.nn.training import fit as train


@dataclass(frozen=True)
class FitReport:
    """What a training did.

    Attributes:
        losses: task plus reconstruction, every step.
        log: one row for each codebook and logged step: ``step``, ``site``, ``task`` (the task's loss), ``mse`` (squared
            distance of normalised input and output), ``input_norm``, ``output_norm``, ``active`` codes,
            ``dead_fraction`` and ``entropy`` of their use since the row before. A resumed training logs from there on.
        resumed_from: step at which a checkpoint was taken up.
    """

    losses: list[float]
    log: pd.DataFrame
    resumed_from: int = 0

    def to_frame(self) -> pd.DataFrame:
        """The log."""
        return self.log

    def plot(self, ax: Any = None) -> Any:
        """The task's loss, and the share of dead codes for every codebook."""
        with style():
            ax = new_axes(ax)
            if not len(self.log):
                return ax
            first = self.log.groupby("step")["task"].first()
            ax.plot(first.index, first, color=COLOURS["neutral"], label="task loss (left)")
            ax.set(xlabel="step", ylabel="task loss, nats")
            twin = ax.twinx()
            for i, (_, rows) in enumerate(self.log.groupby("site", sort=False)):
                twin.plot(rows["step"], rows["dead_fraction"], color=CYCLE[i % len(CYCLE)], lw=1.1, alpha=0.7)
            twin.set(ylim=(0, 1), ylabel="share of codes unused")
            twin.grid(False)
            ax.legend()
        return ax


class _Samples:
    """Batches from a function, without end."""

    def __init__(self, sample: Callable[[int, torch.Generator], Any], batch: int, random: torch.Generator) -> None:
        self.sample, self.batch, self.random = sample, batch, random

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.sample(self.batch, self.random)


def next_token_loss(cb: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of the next token, nats.

    Args:
        cb: the model.
        batch: ids ``[batch, time]``, or a pair of them and an attention mask; padding on the right.
    """
    ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
    device = next(cb.parameters()).device
    ids = ids.to(device)
    if mask is None:
        return language_model_loss(cb, (ids, ids))
    mask = mask.to(device)

    def run(ids: Tensor) -> Any:
        return cb(ids, attention_mask=mask)

    return language_model_loss(run, (ids, ids.masked_fill(mask == 0, IGNORED)))


def fit(
    cb: CodebookModel,
    data: Iterable[Any] | Callable[[int, torch.Generator], Any],
    *,
    steps: int,
    lr: float | int = 1e-3,
    batch: int = 32,
    weight_decay: float | int = 0.01,
    model_lr_factor: float | int = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: str = "constant",
    warmup: int = 0,
    clip_norm: float | int | None = 1.0,
    loss_fn: Callable[[Any, Any], Tensor] = next_token_loss,
    replace_after: int | None = None,
    replace_noise: float | int = 0.01,
    log_every: int = 50,
    seed: int = 0,
    progress: Progress = SILENT,
    **how: Any,
) -> FitReport:
    """Train from scratch or fine-tune, codebooks in place.

    Args:
        cb: trained in place, left in evaluation mode.
        data: batches of ids ``[batch, time]``, or pairs of them and attention masks; or a function
            ``(batch, generator) -> batch``. With a ``loss_fn`` of your own, whatever it takes.
        steps: optimizer steps.
        lr: of AdamW, for codebooks; the model's is ``model_lr_factor`` times it (0 leaves the model as it is).
        batch: texts that ``data`` is asked for where it is a function.
        weight_decay: of the model; codebooks have none.
        betas: of AdamW.
        schedule: ``"constant"`` (the paper's) or ``"cosine"``, down to a tenth.
        warmup: steps of linear warm-up.
        clip_norm: largest gradient norm; None for no limit.
        loss_fn: ``(cb, batch) -> loss`` of the task.
        replace_after: codes that no input chose for so many steps become random inputs of the last batch; None: never.
        replace_noise: added to those inputs, as a share of their length.
        log_every: steps between rows of the log.
        seed: of the batches, dropout and replacement.
        progress: where steps are shown.
        **how: handed to :func:`broadsheet.nn.training.fit` (``checkpoint``, ``mixed_precision``, ...).

    Raises:
        InvalidInput: a number out of range, no batches.
        TrainingDiverged: the loss is not finite.

    Warns:
        UserWarning: ``snap`` is False: codebooks get no gradient.
    """
    if schedule not in ("constant", "cosine"):
        raise InvalidInput(f"schedule={schedule!r}: expected 'constant' or 'cosine'")
    for name, value in {"steps": steps, "batch": batch, "log_every": log_every}.items():
        if value < 1:
            raise InvalidInput(f"{name}={value}: must be at least 1")
    if not lr > 0:
        raise InvalidInput(f"lr={lr}: expected a positive number")
    if not cb.snap:
        warnings.warn(
            "snap is False: the codebooks are not in the model and get no gradient", UserWarning, stacklevel=2
        )
    random, draw = generator(seed), generator(seed + 1)
    batches = _Samples(data, batch, random) if callable(data) else data
    optimizer = torch.optim.AdamW(cb.parameter_groups(lr, weight_decay, model_lr_factor), lr, betas=betas)
    scheduler: Any = None
    if schedule == "cosine":
        scheduler = cosine_schedule(optimizer, steps, min(warmup, steps - 1), final=0.1)
    elif warmup:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    frozen = model_lr_factor <= 0
    flags = [(p, p.requires_grad) for p in cb.model.parameters()]
    counts: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    last: dict[str, Any] = {}

    def loss(wrapped: Any, given: Any) -> Tensor:
        last["batch"] = given
        task = loss_fn(wrapped, given)
        last["task"] = task.detach()
        if not cb.snap:
            return task
        total = task + cb.loss.to(task)
        last["codes"] = {name: snap.codes.detach() for name, snap in cb.latest.items()}
        return total

    def after(step: int, _: nn.Module) -> None:
        if not cb.snap:
            return
        for name, ids in last["codes"].items():
            quantizer = cb.quantizer(name)
            quantizer.observe(ids)
            seen = quantizer.count(ids)
            counts[name] = counts[name] + seen if name in counts else seen
        stale = replace_after is not None and any(bool((q.idle >= replace_after).any()) for q in cb.codebooks.values())
        log = step % log_every == 0 or step == steps
        if not (stale or log):
            return
        inputs = _inputs(cb, loss_fn, last["batch"])
        if log:
            rows.extend(_rows(cb, step, float(last["task"]), inputs, counts))
            counts.clear()
        if stale:
            assert replace_after is not None
            for name, x in inputs.items():
                quantizer = cb.quantizer(name)
                quantizer.replace(quantizer.idle >= replace_after, x, replace_noise, draw, optimizer)

    try:
        if frozen:
            cb.model.requires_grad_(False)
        with seeded(seed):
            report = train(
                cb, loss, batches, steps=steps, optimizer=optimizer, scheduler=scheduler, clip_norm=clip_norm,
                generators=[random, draw, *how.pop("generators", ())], progress=progress, callback=after,
                description=how.pop("description", "codebooks"), **how,
            )  # fmt: skip
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error}; or start the codes from k-means (init='kmeans')") from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        cb.eval()
    return FitReport(report.losses, pd.DataFrame(rows), report.resumed_from)


@torch.no_grad()
def _inputs(cb: CodebookModel, loss_fn: Any, batch: Any) -> dict[str, Tensor]:
    """The bottlenecks' inputs on a batch; dropout off."""
    flags = [(module, module.training) for module in cb.modules()]
    try:
        cb.eval()
        with cb.keeping_inputs():
            loss_fn(cb, batch)
        return {name: snap.inputs for name, snap in cb.latest.items() if snap.inputs is not None}
    finally:
        for module, training in flags:
            module.training = training


@torch.no_grad()
def _rows(
    cb: CodebookModel, step: int, task: float, inputs: dict[str, Tensor], counts: dict[str, Tensor]
) -> list[dict[str, Any]]:
    rows = []
    for place in cb.places:
        if place.name not in inputs:
            continue
        quantizer = cb.quantizer(place.name)
        x = quantizer.normalised(inputs[place.name])
        y = quantizer.decode(quantizer.assign(x))
        x, y = (v.reshape(-1, len(place.codebooks), place.width) for v in (x, y))
        use = CodeUsage(counts[place.name])
        for group, site in enumerate(place.codebooks):
            rows.append(
                {
                    "step": step,
                    "site": site,
                    "task": task,
                    "mse": float((x[:, group] - y[:, group]).square().sum(-1).mean()),
                    "input_norm": float(x[:, group].norm(dim=-1).mean()),
                    "output_norm": float(y[:, group].norm(dim=-1).mean()),
                    "active": int(use.active[group]),
                    "dead_fraction": float(use.dead_fraction[group]),
                    "entropy": float(use.entropy[group]),
                }
            )
    return rows
