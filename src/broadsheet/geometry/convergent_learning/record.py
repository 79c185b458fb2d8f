"""Several networks and several of their layers, followed at once through the same batches."""

import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.statistics import ConvergentLearningWarning, UnitStatistics
from broadsheet.nn.batches import by_position, device_of, model_inputs, unit_samples
from broadsheet.nn.exemplars import RunningTopK
from broadsheet.nn.hooks import capture, evaluating, expand
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator

Models = Mapping[str, nn.Module] | Sequence[nn.Module]
Layer = str | Sequence[str]


@dataclass
class Stream:
    """What is kept of one layer.

    Attributes:
        names: the submodule in each network.
        halves: statistics of the samples that pairs are chosen on and of those they are scored on; one only where all
            do both.
        shuffled: the same with each network's samples in an order of their own; empty without that null.
        top: for each network, samples with the largest activation of each unit; empty where none are kept.
    """

    names: tuple[str, ...]
    halves: list[UnitStatistics]
    shuffled: list[UnitStatistics] = field(default_factory=list)
    top: list[RunningTopK] = field(default_factory=list)
    places: Tensor | None = None


def named_models(models: Models) -> dict[str, nn.Module]:
    """Networks by name, two or more; numbered from 1 where they have none."""
    named = dict(models) if isinstance(models, Mapping) else {str(i): m for i, m in enumerate(models, 1)}
    if len(named) < 2:
        raise InvalidInput(f"{len(named)} networks: two or more are needed to compare")
    if len({id(model) for model in named.values()}) < len(named):
        warnings.warn(
            "the same network is there twice: its units match themselves", ConvergentLearningWarning, stacklevel=3
        )
    return named


def layer_names(models: Mapping[str, nn.Module], layers: Layer | Sequence[Layer]) -> list[tuple[str, ...]]:
    """Each layer as a submodule's name in each network, wildcards expanded.

    Args:
        models: by name.
        layers: names that all networks share, or for each layer a tuple with the name in each network.
    """
    found: list[tuple[str, ...]] = []
    for layer in [layers] if isinstance(layers, str) else layers:
        wanted = [layer] * len(models) if isinstance(layer, str) else list(layer)
        if len(wanted) != len(models):
            raise InvalidInput(f"layer {wanted}: one name for each of {len(models)} networks is expected")
        columns = [[key for key, _ in expand(m, name)] for m, name in zip(models.values(), wanted, strict=True)]
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(f"{len(c)} in {name!r}" for c, name in zip(columns, models, strict=True))
            raise InvalidInput(f"{layer!r} stands for {counts}: as many in each network are expected")
        found += list(zip(*columns, strict=True))
    if not found:
        raise InvalidInput("layers: name at least one submodule")
    return found


class Recorder:
    """Runs networks on batches and adds their layers to streams.

    Args:
        models: by name; run in evaluation mode and left as they were.
        layers: as from :func:`layer_names`.
        within: covariances inside networks too.
        halves: 2 for choosing and scoring on different samples.
        shuffled: follow the null of shuffled samples.
        exemplars: samples kept for each unit; 0 for none.
        channels: where the units are, as in :func:`broadsheet.nn.batches.unit_samples`.
        positions: of maps or texts, drawn once and the same for all networks; None keeps all.
        seed: of the draws.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], layers: Sequence[tuple[str, ...]], within: bool, halves: int,
        shuffled: bool, exemplars: int, channels: str, positions: int | None, seed: int,
    ) -> None:  # fmt: skip
        self.models, self.channels, self.positions, self.exemplars = models, channels, positions, exemplars
        self.draw, self.samples = generator(seed), 0
        names = list(models)
        self.streams = [
            Stream(
                layer,
                [UnitStatistics(names, within) for _ in range(halves)],
                [UnitStatistics(names, False) for _ in range(halves)] if shuffled else [],
            )
            for layer in layers
        ]

    def run(self, loader: Iterable[Any], half: int | None = None, progress: Progress = SILENT) -> None:
        """Go through a loader.

        Args:
            loader: batches for :func:`broadsheet.nn.batches.model_inputs`.
            half: where all its samples go; None takes them in turn.
            progress: shows the batches.
        """
        for _ in self.through(loader, half, progress):
            pass

    def through(self, loader: Iterable[Any], half: int | None, progress: Progress) -> Generator[Any, None, None]:
        """The same batch by batch, each handed on when it has been taken in: two recorders share one pass."""
        before = self.samples
        with self._watched() as seen, progress.task("units of the networks") as task:
            for batch in loader:
                self._take(batch, seen, half)
                task.advance(1)
                yield batch
        if self.samples == before:
            raise InvalidInput("the loader gave no batches")

    @torch.no_grad()
    def _take(self, batch: Any, seen: dict[str, dict[str, Tensor]], half: int | None) -> None:
        given, mask = model_inputs(batch), None
        for model in self.models.values():
            moved = given.to(device_of(model))
            moved.call(model)
            mask = moved.mask
        chosen = self._halves(given.n, half)
        for stream in self.streams:
            outputs = [seen[name][layer] for name, layer in zip(self.models, stream.names, strict=True)]
            try:
                self._add(stream, outputs, mask, chosen)
            except InvalidInput as error:
                raise InvalidInput(f"layer {stream.names[0]!r}: {error}") from None
        self.samples += given.n

    @contextmanager
    def _watched(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        training = [name for name, model in self.models.items() if any(m.training for m in model.modules())]
        if training:
            warnings.warn(
                f"in training mode: {', '.join(training)}; run in evaluation mode here (no dropout, kept statistics)",
                ConvergentLearningWarning,
                stacklevel=5,
            )
        with ExitStack() as stack:
            seen: dict[str, dict[str, Tensor]] = {}
            for i, (name, model) in enumerate(self.models.items()):
                stack.enter_context(evaluating(model))
                seen[name] = stack.enter_context(capture(model, [stream.names[i] for stream in self.streams]))
            yield seen

    def _halves(self, n: int, half: int | None) -> list[Bool[Tensor, " n"]]:
        """For each half the samples of a batch that go there."""
        count = len(self.streams[0].halves)
        turn = (torch.arange(n) + self.samples) % count if half is None else torch.full((n,), half)
        return [turn == i for i in range(count)]

    def _add(self, stream: Stream, outputs: list[Tensor], mask: Tensor | None, chosen: list[Tensor]) -> None:
        if any(len(output) != len(chosen[0]) for output in outputs):
            raise InvalidInput(
                f"{len(outputs[0])} rows for {len(chosen[0])} samples: samples in dimension 0 are expected"
            )
        device = outputs[0].device
        outputs = [output.to(device) for output in outputs]
        if self.positions is not None and outputs[0].ndim > 2:
            stream.places = self._places(stream, outputs[0])
        for i, rows in enumerate(chosen):
            if not bool(rows.any()):
                continue
            parts = [output[rows.to(device)] for output in outputs]
            tokens = None if mask is None else mask.to(device)[rows.to(device)]
            how = {"channels": self.channels, "places": stream.places}
            stream.halves[i].update(*parts, mask=tokens, **how)
            if stream.shuffled:
                self._shuffled(stream.shuffled[i], parts, tokens, how)
        if self.exemplars:
            self._exemplars(stream, outputs, mask)

    def _places(self, stream: Stream, output: Tensor) -> Tensor:
        if stream.places is not None:
            return stream.places
        there = by_position(output, self.channels).shape[1]
        kept = torch.randperm(there, generator=self.draw)[: self.positions]
        return kept.sort().values

    def _shuffled(self, into: UnitStatistics, parts: list[Tensor], mask: Tensor | None, how: dict[str, Any]) -> None:
        rows = [unit_samples(part, mask, **how) for part in parts]
        if len(rows[0]) < 2:
            warnings.warn(
                "a batch has one sample: nothing can be shuffled; hand in larger batches or leave this null out",
                ConvergentLearningWarning,
                stacklevel=2,
            )
        orders = [torch.randperm(len(rows[0]), generator=self.draw).to(rows[0].device) for _ in rows]
        into.update(*(part[order] for part, order in zip(rows, orders, strict=True)))

    def _exemplars(self, stream: Stream, outputs: list[Tensor], mask: Tensor | None) -> None:
        for i, output in enumerate(outputs):
            flat = by_position(output, self.channels)
            if mask is not None and mask.shape == flat.shape[:2]:
                flat = flat.masked_fill(~mask.to(flat.device).bool()[..., None], -torch.inf)
            if len(stream.top) <= i:
                stream.top.append(RunningTopK(flat.shape[-1], self.exemplars))
            stream.top[i].add(flat.amax(1), torch.arange(len(flat)) + self.samples)
