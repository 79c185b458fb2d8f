"""The experiment runs in small, measures every claim, draws, and its full path runs on a folder of made images."""

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from broadsheet.errors import DataMissing
from broadsheet.experiments import level_set_traversal
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

TINY: dict[str, Any] = {
    "PAIRS": 6,
    "WALK": {"step": 5e-2, "iterations": 60, "threshold": 0.2, "init_noise": 0.0},
    "NETWORK": {"channels": (8, 8), "hidden": 16, "epochs": 8, "lr": 5e-3},
    "ROBUST": {"eps": 0.05, "steps": 2, "epochs": 6},
}


def test_small_measures_every_claim_and_draws():
    context, record, plates = trial("level-set-traversal", seed=1, **TINY)
    assert [plate.name for plate in plates] == ["film-strip", "grid", "methods", "distance", "triangles"]
    assert all(plate.caption and plate.figure.axes for plate in plates)
    ours, line, _ = context.measured["comes-nearer"]
    assert 0 < ours < line
    assert set(record["digits"]["table"]) == {*level_set_traversal.METHODS, "robust network"}
    again, _, _ = trial("level-set-traversal", seed=1, **TINY)
    assert {k: v[:2] for k, v in again.measured.items()} == {k: v[:2] for k, v in context.measured.items()}


class FakeTimm(types.ModuleType):
    """What the experiment uses of timm: models that see mean colours."""

    class data(types.ModuleType):
        @staticmethod
        def resolve_model_data_config(model):
            return {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    @staticmethod
    def create_model(name, pretrained):
        assert pretrained
        torch.manual_seed(0)
        pool = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten())
        head = torch.nn.Linear(48, 3)
        head.weight.data = torch.eye(3).repeat_interleave(16, 1)
        return torch.nn.Sequential(pool, head)


def test_full_says_what_is_missing_and_runs_on_files(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(DataMissing, match="ImageNet"):
        level_set_traversal.run(Context.for_tests("level-set-traversal", 0, tmp_path, "full"))
    draw = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "data" / "imagenet" / "val" / f"n0{label}"
        folder.mkdir(parents=True)
        pixels = draw.integers(0, 120, (260, 240, 3), np.uint8)
        pixels[..., label] += 100
        image.fromarray(pixels).save(folder / "a.png")
    fake = FakeTimm("timm")
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setattr(level_set_traversal, "FULL", {"models": ("a", "b"), "pairs": 3, "batch": 2})
    for name, value in TINY.items():
        monkeypatch.setattr(level_set_traversal, name, value)
    context = Context.for_tests("level-set-traversal", 0, tmp_path, "full")
    record = level_set_traversal.run(context)
    assert not context.missing()
    assert set(record["imagenet"]) == {"a", "b"}
