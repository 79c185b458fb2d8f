"""The experiment runs in small, measures every claim, draws, and its full path runs on annotations from disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broadsheet.errors import DataMissing
from broadsheet.experiments import milan, milan_full
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

TINY: dict[str, Any] = {
    "SCENES": 120,
    "UNITS": 120,
    "TEST_UNITS": 20,
    "DIGIT_UNITS": 20,
    "K": 3,
    "BEAM": 4,
    "LAMBDAS": (0.0, 0.2, 0.8),
    "ENCODER": {"epochs": 2, "batch": 32, "lr": 5e-3},
    "DESCRIBER": {
        "hidden": 16, "embedding": 8, "dropout": 0.0, "epochs": 4, "lr": 1e-2, "held_out": 0.1,
        "lm_sizes": {"hidden": 8, "embedding": 8, "layers": 1, "epochs": 2},
    },
    "CLASSIFIER": {"pictures": 100, "test": 20, "epochs": 1, "batch": 50, "lr": 5e-3},
    "FRACTIONS": (0.0, 0.1),
    "RANDOM_SETS": 2,
}  # fmt: skip


def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("milan", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in plates} == {
        "made-units", "lambda-sweep", "beam", "methods", "classifier-units", "repair", "importance",
    }  # fmt: skip
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["masks-one-percent"][0] < 0.1
    assert context.measured["dead-units-flagged"][0] == 1
    recall = [row["recall"] for row in record["sweep"].values()]
    assert len(recall) == 3 and all(0 <= value <= 1 for value in recall)


def test_scores_count_names_by_unit_and_truth_by_name() -> None:
    named = [frozenset({"red"}), frozenset({"red", "circle"}), frozenset()]
    truth = [frozenset({"red", "circle"}), frozenset({"red", "square"}), frozenset({"blue"})]
    found = milan.scores(named, truth)
    assert found["recall"] == pytest.approx((0.5 + 0.5 + 0) / 3) and found["precision"] == pytest.approx(2 / 3)
    assert found["generic"] == pytest.approx(1 / 3) and found["f1_compound"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_pictures_travel_in_the_record() -> None:
    images = torch.randint(256, (2, 3, 3, 5, 5), dtype=torch.uint8)
    maps = torch.rand(2, 3, 5, 5)
    level = torch.tensor([0.3, 0.8])
    found = milan.Exemplars(
        "x", torch.arange(2), images.flatten(0, 1), torch.arange(6).view(2, 3), torch.arange(6).view(2, 3),
        torch.zeros(2, 3), maps, level, torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    back, masks = milan.unpack(milan.pack(found))
    assert torch.equal(back, images) and torch.equal(masks, found.masks)


def test_full_path_on_annotations_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ResNetConfig, ResNetModel

    context = Context.for_tests("milan", 0, tmp_path, "full")
    with pytest.raises(DataMissing, match=r"alexnet-imagenet.*microsoft/resnet-50"):
        milan_full.measure(context)
    sources = ("net-a", "net-b")
    draw = np.random.default_rng(0)
    for source in (*sources, "net-c"):
        folder = tmp_path / "data" / "milannotations" / source / "conv1"
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", draw.integers(0, 256, (5, 2, 3, 16, 16)).astype(np.uint8))
        np.save(folder / "masks.npy", draw.random((5, 2, 1, 16, 16)) > 0.5)
        rows = [f"conv1,{unit},{text}" for unit in range(5) for text in ("red things", "edges of things", "things")]
        (folder.parent / "annotations.csv").write_text("\n".join(["layer,unit,summary", *rows]))
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 8], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "data" / "resnet-50")
    monkeypatch.setattr(milan_full, "TRAIN", sources)
    monkeypatch.setattr(milan_full, "TEST", "net-c")
    monkeypatch.setattr(milan_full, "BEAM", 3)
    sizes = {"hidden": 8, "embedding": 4, "epochs": 2, "held_out": 0.2, "lm_sizes": {"hidden": 4, "epochs": 1}}
    monkeypatch.setattr(milan_full, "FIT", sizes)
    result = milan_full.measure(context)
    assert set(context.measured) == {"annotations-above-likelihood", "annotations-above-constant"}
    assert milan_full.draw([{"annotations": result}]).figure.axes
