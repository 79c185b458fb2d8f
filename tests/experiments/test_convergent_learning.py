"""The experiment runs in small, measures every claim, draws, and its full path runs on files of noise."""

import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from broadsheet.catalog import paper
from broadsheet.errors import DataMissing
from broadsheet.experiments import convergent_learning
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.small_classifiers import small_cnn

TINY: dict[str, Any] = {
    "DIGITS": {**convergent_learning.DIGITS, "channels": (6, 7, 8), "hidden": 12, "networks": 2, "epochs": 2, "n_choose": 200,
               "n_test": 100},
    "STEPS": 20, "POINTS": 4, "ROWS": 500,
}  # fmt: skip
PLATES = ["matched", "correlations", "sparse", "groups", "stitched", "weights", "spectra", "examples"]


def test_small_measures_every_claim_and_draws(tmp_path, monkeypatch):
    context, record, plates = trial("convergent-learning", seed=1, **TINY)
    assert [plate.name for plate in plates] == PLATES
    assert all(plate.caption and plate.figure.axes for plate in plates)
    assert record["layers"] == ["conv1", "conv2", "conv3", "fc"]
    assert context.measured["zeros-are-zero"][1] == 0
    _, _, details = context.measured["matched-beyond-untrained"]
    gaps = {layer: ours - null for layer, (ours, null) in details["by_layer"].items()}
    assert min(gaps, key=lambda layer: gaps[layer]) == details["layer"]
    for name, value in TINY.items():
        monkeypatch.setattr(convergent_learning, name, value)
    for seed, alike in ((1, True), (2, False)):
        again = Context.for_tests("convergent-learning", seed, tmp_path / str(seed))
        convergent_learning.run(again)
        same = {k: v[:2] for k, v in again.measured.items()} == {k: v[:2] for k, v in context.measured.items()}
        assert same is alike


@pytest.fixture
def cifar(tmp_path):
    """The published layout, twenty images a batch."""
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": draw.integers(0, 255, (20, 3072), np.uint8), b"labels": (np.arange(20) % 10).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    return tmp_path


def full(folder, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(convergent_learning, name, value)
    monkeypatch.setattr(convergent_learning, "CIFAR", {"networks": 2, "epochs": 1, "lr": 1e-3})
    smaller = {"channels": (4, 5, 5), "hidden": 6, "halve": (1, 2, 3)}
    monkeypatch.setattr(convergent_learning, "CIFAR_NETWORK", convergent_learning.CIFAR_NETWORK | smaller)
    context = Context.for_tests("convergent-learning", 0, folder, "full")
    record = convergent_learning.run(context)
    assert not context.missing()
    return record


def test_full_says_what_is_missing_and_runs_on_files(cifar, tmp_path_factory, monkeypatch):
    with pytest.raises(DataMissing, match="CIFAR-10"):
        convergent_learning.run(Context.for_tests("convergent-learning", 0, tmp_path_factory.mktemp("empty"), "full"))
    record = full(cifar, monkeypatch)
    assert record["layers"] == ["conv1", "conv2", "conv3", "fc"]
    assert [plate.name for plate in convergent_learning.draw([record])] == PLATES


def test_full_takes_the_users_own_networks(cifar, monkeypatch):
    folder = cifar / "data" / "convergent-learning"
    folder.mkdir()

    def get_model(name, num_classes):
        assert (name, num_classes) == ("smallnet", 10)
        return small_cnn((4, 5, 6), 7, num_classes, size=32, in_channels=3, seed=9)

    for seed in range(2):
        model = small_cnn((4, 5, 6), 7, size=32, in_channels=3, seed=seed)
        file = folder / f"smallnet-{seed}"
        if seed:
            torch.save(model.state_dict(), file.with_suffix(".pt"))
        else:
            save_file(model.state_dict(), file.with_suffix(".safetensors"))
    library: Any = types.ModuleType("torchvision")
    library.models = types.SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", library)
    record = full(cifar, monkeypatch)
    assert record["layers"] == ["conv1.1", "conv2.1", "conv3.1", "fc.1"]
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataMissing, match="need torchvision"):
        full(cifar, monkeypatch)
    (folder / "smallnet-1.pt").unlink()
    with pytest.raises(DataMissing, match="two or more state dicts"):
        full(cifar, monkeypatch)


def test_caveats_point_at_claims():
    entry = paper("convergent-learning")
    shown = {caveat.shown_by for caveat in entry.caveats if caveat.shown_by}
    assert len(shown) >= 3
    assert shown <= {claim.id for claim in entry.claims}
