"""Tensors of a safetensors checkpoint on disk, sharded or not, read one at a time: a model larger than memory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from broadsheet.errors import CheckpointError, DataMissing, InvalidInput

INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of a folder in Hugging Face's layout (``model.safetensors``, or shards with their index), or a file.

    Nothing is kept: memory holds what has been read for as long as the caller holds it.

    Args:
        path: a folder, or one ``.safetensors`` file.

    Raises:
        DataMissing: no such files, or the index names shards that are not there.

    Attributes:
        files: name of each tensor -> the file that holds it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            self.files = {name: self.path / shard for name, shard in weight_map.items()}
            missing = sorted({str(file.name) for file in self.files.values() if not file.is_file()})
            if missing:
                raise DataMissing(f"{index} names files that are not there: {', '.join(missing)}. Download them again")
            return
        found = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not found:
            raise DataMissing(f"{self.path}: no .safetensors file. Hand in a folder written by save_pretrained")
        self.files = {name: file for file in found for name in _names(file)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header; no values are read."""
        with safe_open(self._file(name), framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(
        self,
        name: str,
        rows: slice | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A tensor, or some of its rows, as memory of its own.

        Args:
            name: of the tensor.
            rows: of its first dimension; None for all.
            dtype: to convert to; None for that of the file.
            device: where it goes.

        Raises:
            InvalidInput: no tensor of that name; the message holds names that are nearly it.
        """
        with safe_open(self._file(name), framework="pt") as file:
            part: Any = file.get_slice(name)
            # A copy: a view would keep the whole file mapped.
            return part[rows if rows is not None else slice(None)].to(device, dtype, copy=True)

    def _file(self, name: str) -> Path:
        if name not in self.files:
            from difflib import get_close_matches

            near = get_close_matches(name, self.files, n=4, cutoff=0.3)
            raise InvalidInput(f"{self.path} holds no tensor {name!r}; nearest names: {', '.join(near) or 'none'}")
        return self.files[name]


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}): download it again") from error
