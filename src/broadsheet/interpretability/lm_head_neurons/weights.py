"""Where weights come from: a model in memory, or the safetensors files of one, read tensor by tensor; LoRA on either.

Both are seen as names with shapes, so that everything after this module is the same for them.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import CheckpointError, DataMissing, InvalidInput, UnsupportedModel
from broadsheet.nn.shards import Shards

PART = 2**23  # bytes read at a time: what has been read of a file counts as memory until it is closed
LOADABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Weights(ABC):
    """Weights by name. What varies is where they are: :class:`ModelWeights`, :class:`FileWeights`.

    Attributes:
        about: what error messages call it.
        config: the model's configuration as a dictionary; empty where there is none.
        names: of all tensors.
        device: where the tensors come to.
    """

    about: str
    config: Mapping[str, Any]
    names: tuple[str, ...]
    device: torch.device

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""

    def transposed(self, name: str) -> bool | None:
        """Whether a matrix is stored as ``[in, out]``, as GPT-2 does; None where that is not known."""
        return None

    def head(self) -> str | None:
        """Name of the matrix ``[V, D]`` that the model itself declares as its output embedding."""
        return None

    def __contains__(self, name: str) -> bool:
        return name in self._set

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(self.names)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))


class ModelWeights(Weights):
    """The weights of a module in memory; nothing is copied. Adapters of ``peft`` are added to what they adapt.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.about = model, type(model).__name__
        config: Any = getattr(model, "config", None)
        self.config = _flat(config.to_dict() if hasattr(config, "to_dict") else {})
        self._modules = dict(model.named_modules(remove_duplicate=False))
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self._tensors: dict[str, Tensor] = {}
        self._paths: dict[str, str] = {}
        for path, tensor in tensors.items():
            if ".lora_" in path:
                continue
            name = path.replace(".base_layer.", ".").removeprefix("base_model.model.")
            self._tensors[name], self._paths[name] = tensor, path
        self.names = tuple(self._tensors)
        self.device = next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))

    def module(self, name: str) -> str:
        """The path of the submodule that holds a tensor."""
        return self._paths[name].rpartition(".")[0].removesuffix(".base_layer")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise InvalidInput(
                f"{self.about}: {name} has no values (meta device, or offloaded). Load the model without device_map, "
                "or hand in the folder of its safetensors files: they are read layer by layer"
            )
        _check_dtype(self.about, name, tensor.dtype)
        module = self._modules[self.module(name)]
        if hasattr(module, "lora_A") and name.endswith(".weight"):
            tensor = tensor + _peft_delta(module, name).to(tensor)
        return tensor if rows is None else tensor[rows]

    def transposed(self, name: str) -> bool | None:
        from transformers.pytorch_utils import Conv1D

        module = self._modules[self._paths[name].rpartition(".")[0]]
        return True if isinstance(module, Conv1D) else False if isinstance(module, nn.Linear) else None

    def head(self) -> str | None:
        getter = getattr(self.model, "get_output_embeddings", None)
        module = getter() if callable(getter) else None
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return next((name for name, tensor in self._tensors.items() if tensor is weight), None)
        return None


class FileWeights(Weights):
    """The weights in a folder of safetensors files: one tensor, or some rows of it, is read at a time.

    Args:
        path: a folder as ``save_pretrained`` writes it, with ``config.json``.
        adapter: a folder of ``peft``'s with a LoRA for it, which is added as tensors are read.
        device: where the tensors come to.
    """

    def __init__(self, path: str | Path, adapter: str | Path | None = None, device: Any = None) -> None:
        self.path = Path(path)
        self.about = str(path)
        if (self.path / "adapter_config.json").is_file():
            raise InvalidInput(
                f"{path} is an adapter: hand in the folder of its base model, and this one as adapter={str(path)!r}"
            )
        self._shards = Shards(self.path)
        folder = self.path if self.path.is_dir() else self.path.parent
        config = folder / "config.json"
        if not config.is_file():
            raise DataMissing(f"{config} is missing: it says which model the weights beside it belong to")
        self.config = _flat(json.loads(config.read_text()))
        self.names = tuple(self._shards.files)
        self.device = torch.device("cpu" if device is None else device)
        self._adapter = None if adapter is None else _Adapter(Path(adapter), self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shape(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        shape = self.shape(name)
        start, stop, _ = (rows or slice(None)).indices(shape[0])
        step = max(1, PART // (4 * max(1, math.prod(shape[1:]))))
        out: Tensor | None = None
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = self._shards.read(name, slice(first, last))
            if out is None:
                _check_dtype(self.about, name, part.dtype)
                out = torch.empty((stop - start, *shape[1:]), dtype=part.dtype, device=self.device)
            out[first - start : last - start] = part
        if out is None:
            raise CheckpointError(f"{self.about}: rows {start} to {stop} of {name} hold nothing")
        return out if self._adapter is None else self._adapter.add(out, name, slice(start, stop))


def open_weights(model: Any, adapter: str | Path | None = None, device: Any = None) -> Weights:
    """The weights of a model, or of the folder of one.

    Args:
        model: a module, or the path of a folder with safetensors files and ``config.json``.
        adapter: of a folder: a LoRA folder of ``peft``'s.
        device: of a folder: where tensors are brought to.
    """
    if isinstance(model, Weights):
        return model
    if isinstance(model, nn.Module):
        if adapter is not None:
            raise InvalidInput("adapter= goes with a folder of weights; a model in memory carries its own adapters")
        return ModelWeights(model)
    if isinstance(model, str | Path):
        if not Path(model).exists():
            raise DataMissing(
                f"{model}: no such folder. Weights are read from disk: download them first "
                "(huggingface_hub.snapshot_download), or hand in the model itself"
            )
        return FileWeights(model, adapter, device)
    raise InvalidInput(f"{type(model).__name__}: expected a model, or the folder of one")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what its text model says in the front."""
    inner = config.get("text_config")
    return {**config, **{k: v for k, v in inner.items() if v is not None}} if isinstance(inner, dict) else dict(config)


def _check_dtype(about: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in LOADABLE:
        raise UnsupportedModel(
            f"{about}: {name} is stored as {dtype}, so it is quantized. Dequantize the model first (load it with "
            "torch_dtype=torch.bfloat16, or model.dequantize()) and hand in the result"
        )


# ---------------------------------------------------------------------------------------------------------------- LoRA


def _peft_delta(module: Any, name: str) -> Tensor:
    """What the active adapters of a module of ``peft``'s add to its weight, in the layout in which it is stored."""
    if getattr(module, "merged", False):
        return torch.zeros(())
    total: Tensor = torch.zeros(())
    for adapter in getattr(module, "active_adapters", list(module.lora_A)):
        if adapter not in module.lora_A:
            continue
        if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_magnitude_vector", {}):
            raise UnsupportedModel(f"{name}: DoRA is not a plain sum; call merge_and_unload() and hand in the result")
        delta = module.lora_B[adapter].weight.detach() @ module.lora_A[adapter].weight.detach()
        total = total + module.scaling[adapter] * (delta.T if getattr(module, "fan_in_fan_out", False) else delta)
    return total


class _Adapter:
    """A LoRA on disk: ``W + scaling * B A``."""

    PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "layer_replication")

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        config = path / "adapter_config.json"
        if not config.is_file():
            raise DataMissing(f"{config} is missing: hand in a folder that peft has saved")
        settings = json.loads(config.read_text())
        strange = [key for key in self.PLAIN if settings.get(key) not in (None, False, {}, [], "none")]
        if settings.get("peft_type", "LORA") != "LORA" or strange:
            what = ", ".join(f"{key}={settings[key]!r}" for key in strange) or f"peft_type={settings['peft_type']!r}"
            raise UnsupportedModel(f"{path}: {what}: merge it into the model (merge_and_unload) and hand in the result")
        rank = settings["r"]
        self.scaling = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        self.swapped = bool(settings.get("fan_in_fan_out"))
        self.shards = Shards(path / "adapter_model.safetensors")
        self.adapted = {}
        for name in self.shards.files:
            if name.endswith(".lora_A.weight"):
                target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
                self.adapted[target] = name.removesuffix("lora_A.weight")
        unknown = sorted(set(self.adapted) - set(names))
        if unknown:
            raise InvalidInput(
                f"{path} adapts {unknown[0]}, which the base model does not have: another model's adapter?"
            )

    def add(self, weight: Tensor, name: str, rows: slice) -> Tensor:
        if name not in self.adapted:
            return weight
        a, b = (self.shards.read(f"{self.adapted[name]}lora_{part}.weight").to(weight) for part in "AB")
        delta = (b @ a).T[rows] if self.swapped else b[rows] @ a
        return weight.add_(delta, alpha=self.scaling)
