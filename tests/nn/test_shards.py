"""Checkpoints on disk, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from broadsheet.errors import CheckpointError, DataMissing, InvalidInput
from broadsheet.lab.memory import peak
from broadsheet.nn.shards import INDEX, Shards


def sharded(folder: Path, layers: int = 3, rows: int = 6, columns: int = 4) -> Path:
    names = {}
    for layer in range(layers):
        shard = f"model-{layer}.safetensors"
        random = torch.Generator().manual_seed(layer)
        save_file({f"layers.{layer}.up.weight": torch.randn(rows, columns, generator=random)}, folder / shard)
        names[f"layers.{layer}.up.weight"] = shard
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def test_every_tensor_is_what_the_file_holds(tmp_path: Path) -> None:
    shards = Shards(sharded(tmp_path))
    for layer in range(3):
        name = f"layers.{layer}.up.weight"
        whole = load_file(tmp_path / f"model-{layer}.safetensors")[name]
        assert shards.shape(name) == (6, 4)
        assert torch.equal(shards.read(name), whole)
        assert torch.equal(shards.read(name, slice(2, 5), dtype=torch.float64), whole[2:5].double())
    single = Shards(tmp_path / "model-1.safetensors")
    assert list(single.files) == ["layers.1.up.weight"]
    (tmp_path / INDEX).unlink()
    assert set(Shards(tmp_path).files) == set(shards.files)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"no \.safetensors"):
        Shards(tmp_path)
    shards = Shards(sharded(tmp_path))
    with pytest.raises(InvalidInput, match=r"nearest names: .*layers\.0\.up\.weight"):
        shards.read("layers.0.upp.weight")
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(DataMissing, match=r"model-2\.safetensors"):
        Shards(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        Shards(tmp_path / "model-1.safetensors")


@pytest.mark.slow
def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    shards = Shards(sharded(tmp_path, layers=20, rows=2048, columns=2048))  # 16 MiB each

    def all_kept() -> list[torch.Tensor]:
        return [shards.read(name) for name in shards.files]

    def one_at_a_time() -> float:
        return sum(float(shards.read(name).sum()) for name in shards.files)

    one_at_a_time()  # what the first call imports is not the tensors'
    assert peak(one_at_a_time)[1] < 6 * 16  # four, measured: the file's pages, their copy, the last tensor, the sum
    assert peak(all_kept)[1] > 18 * 16  # the measure sees what is held
