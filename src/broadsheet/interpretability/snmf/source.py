"""Where activations come from: a tensor, an array, or a file larger than memory, in blocks of tokens."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from broadsheet.errors import InvalidInput

RESIDENT = 2**28  # entries that are kept in memory whole unless a batch size is given
BLOCK = 4096  # tokens in a block otherwise


class Source:
    """A matrix ``[n, d]`` read in blocks, each handed out as ``[d, tokens]``: a neuron's activations side by side.

    Args:
        data: tensor or array of a floating type; ``numpy.memmap`` and tensors on one are read block by block.
        batch_size: tokens in memory at a time; None for all where they are in memory already, else 4096.
        dtype: in which blocks are handed out; None for float32 (float64 where the data are).
    """

    def __init__(self, data: object, batch_size: int | None = None, dtype: torch.dtype | None = None) -> None:
        if not isinstance(data, Tensor | np.ndarray) or len(data.shape) != 2:
            what = f"a {type(data).__name__}" if not hasattr(data, "shape") else f"shape {tuple(data.shape)}"
            raise InvalidInput(f"the activations are {what}: expected a matrix [tokens, neurons]")
        if batch_size is not None and batch_size < 1:
            raise InvalidInput(f"batch_size={batch_size}: must be at least 1")
        self.data = data
        self.n, self.d = data.shape
        kind = data.dtype if isinstance(data, Tensor) else torch.from_numpy(np.empty(0, data.dtype)).dtype
        if not kind.is_floating_point:
            raise InvalidInput(f"the activations are of type {kind}: expected floating numbers (are they token ids?)")
        self.dtype = dtype or (torch.float64 if kind == torch.float64 else torch.float32)
        self.device = data.device if isinstance(data, Tensor) else torch.device("cpu")
        resident = not isinstance(data, np.memmap) and self.n * self.d <= RESIDENT
        self.batch = batch_size or (max(1, self.n) if resident else BLOCK)
        # One block is turned once and kept. Several are turned at each pass, and only one is in memory.
        self._whole = self._block(0, self.n) if self.batch >= self.n and not isinstance(data, np.memmap) else None

    def _block(self, start: int, stop: int) -> Tensor:
        rows = self.data[start:stop]
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(np.array(rows) if not rows.flags.writeable else np.asarray(rows))
        return rows.T.to(self.dtype).contiguous()

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of the tokens' places and their block ``[d, tokens]``."""
        if self._whole is not None:
            yield slice(0, self.n), self._whole
            return
        for start in range(0, self.n, self.batch):
            stop = min(start + self.batch, self.n)
            yield slice(start, stop), self._block(start, stop)

    def pieces(self, size: int = 512) -> Iterator[tuple[slice, Tensor]]:
        """The same in small pieces, for what needs memory of a piece's size; views where the data are in memory.

        Args:
            size: tokens at most.
        """
        for where, block in self:
            for start in range(0, block.shape[1], size):
                part = block[:, start : start + size]
                yield slice(where.start + start, where.start + start + part.shape[1]), part

    def row(self, index: int) -> Tensor:
        """One token's activations, ``[d]``."""
        return self._block(index, index + 1)[:, 0] if self._whole is None else self._whole[:, index]

    def scan(self) -> float:
        """The sum of squares, after a look at every number.

        Raises:
            InvalidInput: NaN or infinite values, or rows that are all the same.
        """
        total, same = 0.0, self.n > 1
        first = self.row(0) if self.n else None
        for where, block in self.pieces():
            square = float(block.square().sum()) if self.device.type == "mps" else float(block.double().square().sum())
            if not np.isfinite(square):
                bad = (~block.isfinite()).any(0).nonzero()
                token = where.start + (int(bad[0]) if len(bad) else 0)
                raise InvalidInput(
                    f"the activations hold NaN or infinite values, first in row {token}: read the model in bfloat16 or "
                    "float32, or leave the row out"
                )
            total += square
            same = same and first is not None and bool((block == first[:, None]).all())
        if same:
            raise InvalidInput(
                f"all {self.n} rows of the activations are the same: nothing can be told apart. Is every token BOS or "
                "padding?"
            )
        if total == 0:
            raise InvalidInput("the activations are all zero: is it the right layer, and are they padding?")
        return total
