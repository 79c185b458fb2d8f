"""Activations of one place of a model over a lot of text: streamed, collected, or shuffled for training.

    for part in stream_activations(model, "layers.5.mlp.act", token_batches(texts, tokenizer)): ...
    data = collect_activations(model, "layers.5.mlp.act", batches, path="acts.npy")     # an array on disk
    buffer = ActivationBuffer(model, "layers.5.attn.z", batches, batch_size=4096)       # for an autoencoder

The forward pass stops at the place that is read. Padding never counts, on whichever side it stands.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import site_width
from broadsheet.nn.hooks import Site, capture, evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress

Batch = Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Activations:
    """Rows of activations, one for each token that counts.

    Attributes:
        values: ``[n, d]``.
        token_ids: ``[n]``.
        text: ``[n]``, the number of the text, counted over all batches.
        position: ``[n]``, counted from the text's first real token.
    """

    values: Float[Tensor, "n d"]
    token_ids: Int[Tensor, " n"]
    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.values)


class _Reached(Exception):
    """The place is read: nothing after it has to be computed."""


def token_batches(
    texts: Iterable[str] | Iterable[Sequence[int]],
    tokenizer: Any = None,
    *,
    batch_size: int = 16,
    max_length: int = 128,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Texts as padded batches, one after the other.

    Args:
        texts: strings, or token ids; an iterator over a file larger than memory will do.
        tokenizer: of the model, with its special tokens; None where ids are handed in.
        batch_size: texts in a batch.
        max_length: tokens of a text; what is beyond is cut off.

    Yields:
        ids and attention mask, each ``[batch, time]``, padded on the right.

    Raises:
        InvalidInput: an empty text, or strings without a tokenizer.
    """
    rows: list[list[int]] = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise InvalidInput("the texts are strings: hand in the model's tokenizer")
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        else:
            ids = [int(token) for token in text][:max_length]
        if not ids or (isinstance(text, str) and not text.strip()):
            raise InvalidInput(f"text {number} is empty: leave it out")
        rows.append(ids)
        if len(rows) == batch_size:
            yield _padded(rows, tokenizer)
            rows = []
    if rows:
        yield _padded(rows, tokenizer)


def _padded(rows: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


@torch.no_grad()
def stream_activations(
    model: nn.Module,
    site: str,
    batches: Iterable[Batch],
    *,
    skip_first: bool = False,
    exclude_tokens: Sequence[int] = (),
    progress: Progress = SILENT,
) -> Iterator[Activations]:
    """What stands at one place for every token, batch by batch; nothing is kept.

    Args:
        model: a Hugging Face model, or any module with a registered block map; on its own device.
        site: a component's name, such as ``"layers.5.mlp.act"``.
        batches: ids ``[batch, time]``, or pairs of them and attention masks.
        skip_first: leave out each text's first token, whose activations are often far larger than all others'.
        exclude_tokens: token ids to leave out (BOS, separators).
        progress: where texts read are shown.

    Raises:
        InvalidInput: an unknown place, or activations that are not finite (half precision overflowed), with the text.
    """
    where = block_map(model).resolve(site)
    device = next(model.parameters()).device
    excluded = torch.tensor(list(exclude_tokens), dtype=torch.long, device=device)
    texts = 0
    with evaluating(model), progress.task(f"activations of {site}") as task:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
            ids, mask = padded.input_ids, padded.attention_mask
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().clone()
            values = read_sites(model, [where], ids, mask)[site]
            if skip_first:
                kept[:, 0] = False
            if len(excluded):
                kept &= ~torch.isin(ids, excluded)
            rows, columns = kept.nonzero(as_tuple=True)
            values = values[rows, columns]
            bad = (~values.isfinite()).any(-1).nonzero()
            if len(bad):
                raise InvalidInput(
                    f"{site}: activations of text {texts + int(rows[bad[0, 0]])}, token {int(columns[bad[0, 0]])} are "
                    f"not finite in {values.dtype}: load the model in bfloat16 or float32"
                )
            yield Activations(values, ids[rows, columns], rows + texts, columns)
            texts += len(ids)
            task.advance(len(ids))


def read_sites(
    model: nn.Module, sites: Iterable[Site], input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What stands at some places of a model, the forward pass stopped as soon as all of them are read.

    Args:
        model: any module, called with ids (and a mask where there is one).
        sites: such as a block map's ``resolve`` gives.
        input_ids, attention_mask: of one batch, padding on the right.

    Returns:
        label (or submodule name) of each place -> its value.
    """
    wanted = list(sites)
    labels = {site.label or site.module for site in wanted}
    with capture(model, wanted) as seen, ExitStack() as stack:

        def stop(*_: Any) -> None:
            if labels <= seen.keys():
                raise _Reached

        for site in wanted:  # behind the reading hooks: they run in the order in which they came
            module = model.get_submodule(site.module)
            hook = module.register_forward_pre_hook if site.at == "input" else module.register_forward_hook
            stack.callback(hook(stop).remove)
        with suppress(_Reached):
            model(input_ids) if attention_mask is None else model(input_ids, attention_mask=attention_mask)
    return dict(seen)


def collect_activations(
    model: nn.Module,
    site: str,
    batches: Iterable[Batch],
    *,
    path: str | Path | None = None,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> Activations:
    """All rows as one matrix: in memory, or in a file that is mapped into it.

    Args:
        model, site, batches: as in :func:`stream_activations`, whose other arguments may be given too.
        path: a ``.npy`` file to write, for more than fits into memory; rows are float32 there.
        max_tokens: stop after this many; needed with ``path``.
        dtype: of the values in memory.

    Raises:
        InvalidInput: no token counts, or ``path`` without ``max_tokens``.
    """
    if path is not None and max_tokens is None:
        raise InvalidInput("path= needs max_tokens=: the file's size is fixed when it is made")
    disk = None
    if path is not None:
        file = Path(path).with_suffix(".npy")
        shape = (int(max_tokens or 0), site_width(model, site))
        disk = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    kept: list[Tensor] = []
    about: list[tuple[Tensor, Tensor, Tensor]] = []
    n = 0
    for part in stream_activations(model, site, batches, **how):
        room = len(part) if max_tokens is None else min(len(part), max_tokens - n)
        if disk is None:
            kept.append(part.values[:room].to(dtype))
        else:
            disk[n : n + room] = part.values[:room].float().cpu().numpy()
        about.append((part.token_ids[:room], part.text[:room], part.position[:room]))
        n += room
        if n == max_tokens:
            break
    if n == 0:
        raise InvalidInput("no token is left: the batches are empty, or everything in them is padding or excluded")
    values = torch.cat(kept) if disk is None else torch.from_numpy(disk[:n])
    return Activations(values, *(torch.cat(column) for column in zip(*about, strict=True)))


class RowBatches:
    """Shuffled batches of rows that are in memory already; the last one of an epoch that is not full is left out.

    Args:
        rows: ``[n, d]``.
        batch_size: rows of a batch, at most ``n``.
        generator: of the order, on the CPU; a training that is resumed goes on with it.
    """

    def __init__(self, rows: Float[Tensor, "n d"], batch_size: int, generator: torch.Generator | None = None) -> None:
        if not 1 <= batch_size <= len(rows):
            raise InvalidInput(f"batch_size={batch_size}: there are {len(rows)} rows, so 1 to {len(rows)}")
        self.rows, self.batch_size, self.generator = rows, batch_size, generator

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[Float[Tensor, "batch d"]]:
        order = torch.randperm(len(self.rows), generator=self.generator).to(self.rows.device)
        for part in order.split(self.batch_size)[: len(self)]:
            yield self.rows[part]


class ActivationBuffer:
    """Shuffled batches of activations for training: filled from the model, refilled when half is used.

    Only the buffer is in memory, never all activations. Go through it as often as training asks; ``batches`` is begun
    anew when it ends.

    Args:
        model, site: as in :func:`stream_activations`.
        batches: an iterable that can be gone through again, or a function that gives a fresh iterator.
        batch_size: rows in what it yields.
        buffer_batches: batches that it holds when full.
        dtype: in which rows are kept; what it yields is float32. ``torch.float16`` halves the memory.
        device: where rows are kept; None for the model's.
        generator: of the shuffling, on the CPU.
        skip_first, exclude_tokens: as in :func:`stream_activations`.

    Example::

        buffer = ActivationBuffer(model, "layers.5.attn.z", batches, batch_size=4096)
        for rows in itertools.islice(buffer, 1000):
            ...  # [4096, d]
    """

    def __init__(
        self,
        model: nn.Module,
        site: str,
        batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
        *,
        batch_size: int = 4096,
        buffer_batches: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        skip_first: bool = True,
        exclude_tokens: Sequence[int] = (),
    ) -> None:
        for name, value in {"batch_size": batch_size, "buffer_batches": buffer_batches}.items():
            if value < 1:
                raise InvalidInput(f"{name}={value}: must be at least 1")
        self.model, self.site, self.batches = model, site, batches
        self.batch_size, self.size = batch_size, batch_size * max(buffer_batches, 2)
        self.dtype, self.device, self.generator = dtype, device, generator
        self.how = {"skip_first": skip_first, "exclude_tokens": exclude_tokens}
        self.width = site_width(model, site)
        self.tokens_read = 0

    def __iter__(self) -> Iterator[Float[Tensor, "batch d"]]:
        rows, held = self._rows(), torch.empty(0)
        while True:
            parts, n = [held] if len(held) else [], len(held)
            while n < self.size:
                part = next(rows).to(self.dtype)
                parts.append(part.to(self.device) if self.device is not None else part)
                n += len(part)
            held = torch.cat(parts)
            held = held[torch.randperm(len(held), generator=self.generator).to(held.device)]
            for _ in range(max(1, self.size // 2 // self.batch_size)):
                yield held[: self.batch_size].float()
                held = held[self.batch_size :]

    def _rows(self) -> Iterator[Tensor]:
        while True:
            before = self.tokens_read
            batches = self.batches() if callable(self.batches) else self.batches
            for part in stream_activations(self.model, self.site, batches, **self.how):
                self.tokens_read += len(part)
                if len(part):
                    yield part.values
            if self.tokens_read == before:
                raise InvalidInput(
                    "batches gave no token: it is empty, everything is excluded, or it is an iterator that has ended "
                    "(hand in a list, or a function that makes a new iterator)"
                )
