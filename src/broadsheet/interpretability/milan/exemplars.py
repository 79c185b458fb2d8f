"""What a unit looks like: the pictures that excite it most, and where in them it is active.

One pass over the data keeps each unit's best pictures, their maps, and the level that only the highest share of all its
activations exceeds (appendix A of the paper). Only the kept pictures are read a second time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.layers import as_maps
from broadsheet.nn.batches import device_of
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.exemplars import RunningQuantile, RunningTopK, UpperTail
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.plotting import new_axes
from broadsheet.nn.progress import SILENT, Progress

EXACT_BYTES = 2**29  # an exact quantile keeps the tail of all activations; beyond this a sketch takes over


@dataclass(frozen=True)
class Exemplars:
    """The best pictures of some units of one layer.

    Attributes:
        layer: the submodule's name.
        units: ``[units]``, numbers within the layer.
        pictures: ``[m, 3, height, width]``, each picture once.
        index: ``[units, k]``, which picture, the most exciting first.
        ids: ``[units, k]``, the pictures' numbers in the data set.
        activations: ``[units, k]``, the largest activation in each.
        maps: ``[units, k, rows, columns]``, the activation at every place of the layer.
        level: ``[units]``, what a place must exceed to count as active.
        alive: ``[units]``; False for a unit that is constant or never exceeds its level: it cannot be described.
    """

    layer: str
    units: Int[Tensor, " units"]
    pictures: UInt8[Tensor, "m 3 height width"]
    index: Int[Tensor, "units k"]
    ids: Int[Tensor, "units k"]
    activations: Float[Tensor, "units k"]
    maps: Float[Tensor, "units k rows columns"]
    level: Float[Tensor, " units"]
    alive: Bool[Tensor, " units"]

    def __len__(self) -> int:
        return len(self.units)

    @property
    def k(self) -> int:
        """Pictures of each unit."""
        return self.index.shape[1]

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Layer and number of each unit, as :func:`broadsheet.nn.ablation.ablated` takes them."""
        return tuple((self.layer, int(unit)) for unit in self.units)

    @property
    def images(self) -> UInt8[Tensor, "units k 3 height width"]:
        """The pictures of every unit; take ``exemplars[rows].images`` where all do not fit into memory."""
        return self.pictures[self.index]

    @property
    def masks(self) -> Bool[Tensor, "units k 1 height width"]:
        """Where each unit is above its level, at the pictures' size (bilinear)."""
        units, k = self.index.shape
        size = self.pictures.shape[-2:]
        wide = functional.interpolate(self.maps.flatten(0, 1)[:, None].float(), size=size, mode="bilinear")
        return wide.view(units, k, 1, *size) > self.level.float().view(-1, 1, 1, 1, 1)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Exemplars":
        """Some of the units, by row."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.index.device)
        parts = ("units", "index", "ids", "activations", "maps", "level", "alive")
        return replace(self, **{name: getattr(self, name)[rows] for name in parts})

    def to_frame(self) -> pd.DataFrame:
        """One row for each unit and picture: ``layer``, ``unit``, ``rank``, ``image``, ``activation``, ``active``.

        ``active`` is the share of the layer's places above the level in that picture.
        """
        above = (self.maps > self.level.view(-1, 1, 1, 1)).flatten(2).float().mean(2)
        units, k = self.index.shape
        return pd.DataFrame(
            {
                "layer": self.layer,
                "unit": self.units.repeat_interleave(k).tolist(),
                "rank": list(range(k)) * units,
                "image": self.ids.flatten().tolist(),
                "activation": self.activations.flatten().tolist(),
                "active": above.flatten().tolist(),
            }
        )

    def save(self, folder: str | Path) -> None:
        """Keep everything in a folder (safetensors and JSON)."""
        save_tree(Path(folder), {name: getattr(self, name) for name in self.__dataclass_fields__}, kind="exemplars")

    @classmethod
    def load(cls, folder: str | Path) -> "Exemplars":
        """What :meth:`save` kept."""
        return cls(**load_tree(Path(folder))[0])

    def plot(
        self, rows: Sequence[int] | None = None, texts: Sequence[str] | None = None, ax: Any = None, dim: float = 0.25
    ) -> Any:
        """Each unit's pictures in a row, everything outside the mask dimmed, with a sentence beneath.

        Args:
            rows: which units; None for the first six.
            texts: a sentence for each of them; None for the unit's name.
            ax: matplotlib axes.
            dim: brightness outside the mask.
        """
        chosen = list(range(min(6, len(self)))) if rows is None else list(rows)
        some = self[chosen]
        words = [f"{layer}, unit {unit}" for layer, unit in some.names] if texts is None else list(texts)
        if len(words) != len(chosen):
            raise InvalidInput(f"texts has {len(words)} sentences for {len(chosen)} units")
        return draw_grid(some.images, some.masks, words, ax=ax, dim=dim)


def draw_grid(
    images: UInt8[Tensor, "units k 3 height width"],
    masks: Bool[Tensor, "units k 1 height width"],
    texts: Sequence[str],
    *,
    ax: Any = None,
    dim: float = 0.25,
    columns: int = 2,
    lines: int = 1,
) -> Any:
    """Rows of pictures with the sentence beneath each, units in columns side by side.

    Args:
        images, masks: of :class:`Exemplars`.
        texts: one for each unit.
        ax: matplotlib axes.
        dim: brightness outside the mask.
        columns: of units.
        lines: of text beneath each.
    """
    units, k = images.shape[:2]
    rows = -(-units // columns)
    step = 1.2 + 0.22 * lines
    gap, wide = 0.06, k * 1.06 + 0.5
    ax = new_axes(ax, figsize=(0.82 * wide * columns, (1.06 + 0.2 * lines) * rows))
    shade = torch.where(masks, 1.0, dim)
    picture = (images.float() / 255 * shade + 0.0).permute(0, 1, 3, 4, 2).cpu().numpy()
    for i, text in enumerate(texts):
        left, top = (i // rows) * wide, -step * (i % rows)
        for j in range(k):
            x = left + j * (1 + gap)
            ax.imshow(picture[i, j], extent=(x, x + 1, top - 1, top), interpolation="nearest", aspect="equal")
        ax.text(left, top - 1.07, text, va="top", ha="left", fontsize=8.5)
    ax.set_xlim(-0.02, wide * columns - 0.5)
    ax.set_ylim(-step * rows + 0.1, 0.05)
    ax.set_axis_off()
    return ax


def top_exemplars(
    model: nn.Module,
    dataset: Any,
    layer: str,
    *,
    units: Sequence[int] | None = None,
    k: int = 15,
    quantile: float = 0.99,
    size: int | None = None,
    preprocess: Callable[[Tensor], Any] | None = None,
    grid: tuple[int, int] | None = None,
    generative: bool = False,
    to_picture: Callable[[Any], Tensor] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress = SILENT,
) -> Exemplars:
    """The pictures that excite each unit of a layer most, and where.

    Args:
        model: any module; evaluated, and given back in the mode in which it came.
        dataset: has a length and gives pictures by number: ``[3, height, width]``, uint8 or floats from 0 to 1,
            alone, first in a tuple, or under ``"pixel_values"`` or ``"image"``. For a generator: latents.
        layer: a submodule whose output is ``[batch, units, rows, columns]`` or ``[batch, tokens, units]``.
        units: numbers of units; None for all.
        k: pictures of each unit.
        quantile: share of all activations of a unit that lie below its level.
        size: pictures are kept with this height and width; None for their own.
        preprocess: from a batch of pictures, floats from 0 to 1, to what the model is called with (normalisation).
        grid: rows and columns of a transformer's patches, where they do not make a square.
        generative: the data are latents, the model's output is the picture, and the layer is one of its inner ones.
        to_picture: from a generator's output to pictures in 0 to 1; None takes them to be in -1 to 1.
        batch_size, num_workers: of the loader.
        progress: where pictures read are shown.

    Raises:
        InvalidInput: an unknown layer (with the nearest names), an output that is neither, pictures out of range, more
            exemplars than pictures, a unit that the layer does not have.
    """
    device = device_of(model)
    prepare = preprocess or (lambda x: x)

    def maps(items: Tensor) -> tuple[Tensor, Any]:
        with capture(model, layer) as seen:
            output = model(items) if generative else model(prepare(items))
        return as_maps(seen[layer], layer, grid), output

    def batches() -> Iterator[Tensor]:
        # A loader without a generator of its own draws from the global one, even when it does not shuffle.
        items_of = _Items(dataset, not generative)
        for items in DataLoader(items_of, batch_size, num_workers=num_workers, generator=torch.Generator()):
            yield maps(items.to(device))[0]

    def fetch(ids: list[int]) -> Tensor:
        found = []
        for start in range(0, len(ids), batch_size):
            rows = [_picture(dataset[i]) for i in ids[start : start + batch_size]]
            items = torch.stack([row if generative else _checked(row) for row in rows])
            if generative:
                output = maps(items.to(device))[1]
                items = (to_picture or _from_tanh)(output)
            found.append(items.cpu())
        return torch.cat(found)

    if len(dataset) < 1:
        raise InvalidInput("the data set is empty")
    with torch.no_grad(), evaluating(model):
        return _collect(batches(), len(dataset), fetch, layer, units, k, quantile, size, progress)


def exemplars_from_maps(
    maps: Iterable[Tensor] | Tensor,
    pictures: UInt8[Tensor, "n 3 height width"],
    *,
    layer: str = "maps",
    units: Sequence[int] | None = None,
    k: int = 15,
    quantile: float = 0.99,
    size: int | None = None,
    progress: Progress = SILENT,
) -> Exemplars:
    """As :func:`top_exemplars`, where the maps are there already.

    Args:
        maps: ``[n, units, rows, columns]``, or batches of that, in the pictures' order.
        pictures: what they are maps of.
        layer: the name that the result bears.
        units, k, quantile, size, progress: as in :func:`top_exemplars`.
    """
    batches = maps.split(256) if isinstance(maps, Tensor) else maps
    return _collect(iter(batches), len(pictures), lambda ids: pictures[ids], layer, units, k, quantile, size, progress)


def _collect(
    batches: Iterator[Tensor],
    n: int,
    fetch: Callable[[list[int]], Tensor],
    layer: str,
    units: Sequence[int] | None,
    k: int,
    quantile: float,
    size: int | None,
    progress: Progress,
) -> Exemplars:
    if not 0 < quantile < 1:
        raise InvalidInput(f"quantile={quantile}: expected a share between 0 and 1, such as 0.99")
    if not 1 <= k <= n:
        raise InvalidInput(f"k={k}: the data set has {n} pictures")
    top: RunningTopK | None = None
    levels: Any = None
    high: Tensor | None = None
    done = 0
    chosen: Tensor | None = None
    with progress.task(f"exemplars of {layer}", total=n) as task:
        for found in batches:
            if top is None:
                chosen = _chosen(units, found.shape[1], layer).to(found.device)
                top = RunningTopK(len(chosen), k)
                levels = _levels(len(chosen), n * found[0, 0].numel(), quantile)
            assert chosen is not None
            found = found[:, chosen] if units is not None else found
            peak = found.flatten(2).amax(2)
            top.add(peak, torch.arange(done, done + len(found)), found)
            levels.add(found.movedim(1, -1).flatten(0, -2))
            high = peak.amax(0) if high is None else torch.maximum(high, peak.amax(0))
            done += len(found)
            task.advance(len(found))
    if top is None or chosen is None or high is None or top.payload is None:
        raise InvalidInput("the data set gave no pictures")
    if done != n:
        raise InvalidInput(f"maps of {done} pictures for {n} pictures: one for each is expected")
    level = (levels.quantile() if isinstance(levels, UpperTail) else levels.quantile(quantile)).to(high)
    ids = top.ids.cpu()
    wanted, index = ids.unique(return_inverse=True)
    pictures = _as_bytes(fetch(wanted.tolist()), size)
    return Exemplars(
        layer, chosen.cpu(), pictures, index, ids, top.values.cpu(), top.payload.cpu(), level.cpu(),
        (high > level).cpu(),
    )  # fmt: skip


def _levels(units: int, total: int, quantile: float) -> UpperTail | RunningQuantile:
    exact = UpperTail(units, total, quantile)
    return exact if 4 * units * exact.size <= EXACT_BYTES else RunningQuantile(units)


def _chosen(units: Sequence[int] | None, width: int, layer: str) -> Tensor:
    if units is None:
        return torch.arange(width)
    if not len(units) or (wrong := [unit for unit in units if not 0 <= unit < width]):
        what = f"unit {wrong[0]}" if len(units) else "no unit"
        raise InvalidInput(f"{what} of {layer!r}: the layer has {width} units (0 to {width - 1})")
    return torch.tensor(list(units))


class _Items(torch.utils.data.Dataset):
    def __init__(self, dataset: Any, pictures: bool) -> None:
        self.dataset, self.pictures = dataset, pictures

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Tensor:
        item = _picture(self.dataset[i])
        return _checked(item) if self.pictures else item


def _picture(item: Any) -> Tensor:
    if isinstance(item, dict):
        item = next((item[name] for name in ("pixel_values", "image", "images") if name in item), item)
    elif isinstance(item, tuple | list):
        item = item[0]
    if not isinstance(item, Tensor) and not hasattr(item, "__array__"):
        raise InvalidInput(f"the data set gives {type(item).__name__}: expected a tensor [3, height, width]")
    return torch.as_tensor(item)


def _checked(picture: Tensor) -> Float[Tensor, "3 height width"]:
    """A picture as floats from 0 to 1."""
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InvalidInput(f"a picture of shape {tuple(picture.shape)}: expected [3, height, width]")
    if picture.dtype == torch.uint8:
        return picture.float() / 255
    low, high = float(picture.min()), float(picture.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InvalidInput(
            f"a picture with values from {low:.3g} to {high:.3g}: expected 0 to 1, or uint8. Hand the pictures in as "
            "they are seen and the normalisation as preprocess="
        )
    return picture.float().clamp(0, 1)


def _from_tanh(output: Any) -> Tensor:
    output = output if isinstance(output, Tensor) else output[0]
    return ((output.float() + 1) / 2).clamp(0, 1)


def _as_bytes(pictures: Tensor, size: int | None) -> UInt8[Tensor, "m 3 height width"]:
    if size is not None and tuple(pictures.shape[-2:]) != (size, size):
        floats = pictures.float() / (255 if pictures.dtype == torch.uint8 else 1)
        pictures = functional.interpolate(floats, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
    if pictures.dtype == torch.uint8:
        return pictures
    return (pictures * 255).round().to(torch.uint8)
