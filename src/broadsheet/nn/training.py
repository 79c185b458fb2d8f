"""One training loop, on accelerate: mixed precision, several GPUs, accumulation, checkpoints that resume exactly."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from broadsheet.errors import CheckpointError, InvalidInput, TrainingDiverged
from broadsheet.nn.batches import device_of
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.progress import SILENT, Progress


class ExponentialMovingAverage:
    """A shadow of a module's parameters: shadow <- decay * shadow + (1 - decay) * parameter.

    Args:
        model: the module to follow; buffers are copied as they are.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InvalidInput(f"decay={decay}: a moving average needs 0 <= decay < 1")
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadow towards the module's present values."""
        for name, value in model.state_dict().items():
            shadow = self.shadow[name]
            if shadow.device != value.device:
                shadow = self.shadow[name] = shadow.to(value.device)
            if shadow.is_floating_point():
                shadow.lerp_(value, 1 - self.decay)
            else:
                shadow.copy_(value)

    def copy_to(self, model: nn.Module) -> None:
        """Write the shadow into the module."""
        model.load_state_dict(self.shadow)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The module with the averaged values inside the block, with its own ones afterwards."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield model
        finally:
            model.load_state_dict(own)


@dataclass(frozen=True)
class TrainingReport:
    """What a call of :func:`fit` did.

    Attributes:
        losses: loss of every optimizer step, in order (steps done before a resumption included).
        resumed_from: the step at which a checkpoint was taken up, 0 when training started afresh.
    """

    losses: list[float]
    resumed_from: int

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps (at least one)."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


class _Stream:
    """Batches without end, from an iterable gone through again and again, with a position that can be taken up."""

    def __init__(self, batches: Iterable[Any], generators: Sequence[torch.Generator]) -> None:
        self.batches = batches
        own = [getattr(batches, "generator", None), getattr(getattr(batches, "sampler", None), "generator", None)]
        self.generators = [*generators, *(g for g in own if isinstance(g, torch.Generator))]
        self.at_start = self._random_states()
        self.taken = 0
        self._iterator: Iterator[Any] | None = None

    def _random_states(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "generators": [g.get_state() for g in self.generators]}

    def _set_random_states(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["torch"])
        for generator, state in zip(self.generators, states["generators"], strict=True):
            generator.set_state(state)

    def __next__(self) -> Any:
        if self._iterator is None:
            self.at_start, self.taken = self._random_states(), 0
            self._iterator = iter(self.batches)
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self.taken == 0:
                raise InvalidInput(
                    "batches is empty (or an iterator that is used up): give a list or a DataLoader"
                ) from None
            self._iterator = None
            return next(self)
        self.taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"at_start": self.at_start, "taken": self.taken, "now": self._random_states()}

    def resume(self, state: dict[str, Any]) -> None:
        # Replay the epoch's order from the generators' states at its start, then go on with those of the checkpoint.
        self._set_random_states(state["at_start"])
        self._iterator = None
        for _ in range(state["taken"]):
            next(self)
        self._set_random_states(state["now"])


def _other_random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cuda": cuda}  # noqa: NPY002


def _set_other_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _accelerator(device: torch.device, mixed_precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state and not PartialState().use_distributed:
        # Without several processes the shared state only pins the first call's device and precision: start from none.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def fit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    ema: ExponentialMovingAverage | None = None,
    clip_norm: float | None = None,
    gradient_accumulation: int = 1,
    mixed_precision: str = "no",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    generators: Sequence[torch.Generator] = (),
    progress: Progress = SILENT,
    description: str = "training",
    callback: Callable[[int, nn.Module], None] | None = None,
) -> TrainingReport:
    """Train a module for a number of optimizer steps.

    The module trains on the device of its parameters; started by ``accelerate launch``, on every process's own.

    Args:
        model: trained in place and left in training mode.
        loss_fn: ``loss_fn(model, batch)`` -> scalar tensor. Call the model as ``model(...)``: it may be wrapped.
        batches: a ``DataLoader`` or any iterable that can be gone through again; cycled until ``steps`` are done.
        steps: optimizer steps.
        optimizer: over the module's parameters.
        scheduler: stepped once per optimizer step.
        ema: updated after every optimizer step.
        clip_norm: largest gradient norm.
        gradient_accumulation: batches per optimizer step; their losses are averaged.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        checkpoint: folder. Saved every ``checkpoint_every`` steps and when training is interrupted; if it exists,
            training goes on from there, to the same result as if it had never stopped.
        checkpoint_every: steps between checkpoints.
        generators: further ``torch.Generator`` objects that ``batches`` or ``loss_fn`` draw from, so that the
            checkpoint can hold their states.
        progress: where steps and losses are shown.
        description: what the progress calls this training.
        callback: ``callback(step, model)`` after each optimizer step, ``step`` counted from 1, ``model`` unwrapped.

    Raises:
        InvalidInput: a number out of range, or no batches.
        TrainingDiverged: the loss became NaN or infinite.
        CheckpointError: the checkpoint is corrupt, or belongs to another model or length.
    """
    for name, value in {
        "steps": steps,
        "gradient_accumulation": gradient_accumulation,
        "checkpoint_every": checkpoint_every,
    }.items():
        if value < 1:
            raise InvalidInput(f"{name}={value}: must be at least 1")
    device = device_of(model)
    accelerator = _accelerator(device, mixed_precision)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if isinstance(batches, DataLoader) and accelerator.num_processes > 1:
        batches = accelerator.prepare(batches)
    # In one process and full precision accelerate's own step and backward do the same as torch's, and look for optional
    # packages each time, which costs more than a small model's step.
    plain = accelerator.num_processes == 1 and mixed_precision == "no"
    stepped: Any = optimizer if plain else prepared
    stream = _Stream(batches, generators)
    folder = None if checkpoint is None else Path(checkpoint) / f"rank-{accelerator.process_index}"
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    recent: list[torch.Tensor] = []  # losses still on the device: reading each one would make a GPU wait
    losses: list[float] = []
    done = resumed_from = 0

    if folder is not None and folder.exists():
        saved, about = load_tree(folder)
        if about.get("shapes") != shapes:
            raise CheckpointError(
                f"{folder}: the checkpoint belongs to a model of other shapes; delete it or use another folder"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(saved["scheduler"])
        if ema is not None:
            ema.shadow = {name: value.to(device) for name, value in saved["ema"].items()}
        losses, done = list(saved["losses"]), int(saved["done"])
        if done > steps:
            raise CheckpointError(
                f"{folder}: the checkpoint stands at step {done}, beyond steps={steps}; delete it or train longer"
            )
        resumed_from = done
        stream.resume(saved["stream"])
        _set_other_random_states(saved["random"])

    def read_losses() -> None:
        if not recent:
            return
        values = torch.stack(recent).float().cpu().tolist()
        recent.clear()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                step = len(losses) + offset + 1
                raise TrainingDiverged(
                    f"{description}: the loss is {value} at step {step}: lower the learning rate or set clip_norm"
                )
        losses.extend(values)

    def randomness() -> dict[str, Any]:
        return {"stream": stream.state(), "random": _other_random_states()}

    def save(at: dict[str, Any]) -> None:
        if folder is None:
            return
        read_losses()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else dict(scheduler.state_dict()),
            "ema": None if ema is None else ema.shadow,
            "losses": losses,
            "done": done,
            **at,
        }
        save_tree(folder, state, shapes=shapes)

    model.train()
    read_every = 1 if device.type == "cpu" else 50
    begun, stepping = randomness(), False
    try:
        with progress.task(description, total=steps) as task:
            task.advance(done)
            while done < steps:
                begun = randomness()  # an interruption in the middle of this step goes back to its beginning
                total = torch.zeros((), device=accelerator.device)
                for micro in range(gradient_accumulation):
                    batch = next(stream)
                    if accelerator.device.type != "cpu":
                        from accelerate.utils import send_to_device

                        batch = send_to_device(batch, accelerator.device)
                    waits = micro + 1 < gradient_accumulation
                    with accelerator.no_sync(wrapped) if waits else nullcontext():
                        with accelerator.autocast():
                            loss = loss_fn(wrapped, batch)
                        if plain:
                            (loss / gradient_accumulation).backward()
                        else:
                            accelerator.backward(loss / gradient_accumulation)
                    total += loss.detach() / gradient_accumulation
                recent.append(total)
                if len(recent) >= read_every:
                    read_losses()  # before the step: a NaN must not reach the weights
                stepping = True
                if clip_norm is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
                stepped.step()
                stepped.zero_grad(set_to_none=True)
                if scheduler is not None:
                    scheduler.step()
                if ema is not None:
                    ema.update(model)
                done, begun, stepping = done + 1, randomness(), False
                if callback is not None:
                    callback(done, model)
                task.advance(1, **({"loss": losses[-1]} if losses else {}))
                if done % checkpoint_every == 0 and done < steps:
                    save(randomness())
    except KeyboardInterrupt:
        if not stepping:  # no weight has moved since the last whole step
            del recent[max(0, done - len(losses)) :], losses[done:]  # the loss of the step that was not made
            save(begun)
        raise
    finally:
        # accelerate wraps forward in place for mixed precision: the module goes back as it came.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    read_losses()
    save(randomness())
    return TrainingReport(losses=losses, resumed_from=resumed_from)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> Any:
    """Linear warm-up over ``warmup`` steps, then a half cosine down to ``final`` times the learning rate.

    Args:
        optimizer: whose learning rates are scaled.
        steps: optimizer steps in all.
        warmup: steps of warm-up, fewer than ``steps``.
        final: share of the learning rate left at the end, in [0, 1].
    """
    if not 0 <= warmup < steps:
        raise InvalidInput(f"warmup={warmup}: must be at least 0 and below steps={steps}")

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
