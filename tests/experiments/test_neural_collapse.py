"""The experiment runs in small, measures every claim, draws, and its full path runs on CIFAR-10 files of noise."""

import pickle
from typing import Any

import numpy as np
import pytest

from broadsheet.catalog import paper
from broadsheet.errors import DataMissing
from broadsheet.experiments import neural_collapse
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

TINY: dict[str, Any] = {
    "DEPTHS": (1, 2),
    "FREE": {"d": 8, "wd": 1e-2, "fd": 1e-2, "steps": 60, "init_std": 0.3, "record": 5},
    "SLOW": 80,
    "DIGITS": {
        **neural_collapse.DIGITS,
        "counts": (20, 15, 10, 5),
        "width": 16,
        "steps": 20,
        "points": 5,
        "depths": (1,),
    },
}


def test_small_measures_every_claim_and_draws():
    context, record, plates = trial("neural-collapse", seed=1, **TINY)
    assert [plate.name for plate in plates] == ["free-features", "gram", "lengths", "cross-entropy", "network-digits"]
    assert all(plate.caption and plate.figure.axes for plate in plates)
    assert context.measured["simplex-not-best-when-deep"][:2] == pytest.approx((0.0781, 0.1020), abs=1e-4)
    assert set(record["free"]["distances"]) == {"gof", "etf", "orthogonal"}
    again, _, _ = trial("neural-collapse", seed=1, **TINY)
    assert {k: v[:2] for k, v in again.measured.items()} == {k: v[:2] for k, v in context.measured.items()}
    other, _, _ = trial("neural-collapse", seed=2, **TINY)
    assert other.measured["frame-found"] != context.measured["frame-found"]


def test_full_says_what_is_missing_and_runs_on_files(tmp_path, monkeypatch):
    with pytest.raises(DataMissing, match="CIFAR-10"):
        neural_collapse.run(Context.for_tests("neural-collapse", 0, tmp_path, "full"))
    folder = tmp_path / "data" / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": draw.integers(0, 255, (20, 3072), np.uint8), b"labels": (np.arange(20) % 10).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    for name, value in TINY.items():
        monkeypatch.setattr(neural_collapse, name, value)
    sizes = {**neural_collapse.CIFAR, "counts": (8, 8, 6, 6, 5, 5, 4, 4, 3, 3), "width": 12, "steps": 10, "points": 4}
    monkeypatch.setattr(neural_collapse, "CIFAR", sizes)
    context = Context.for_tests("neural-collapse", 0, tmp_path, "full")
    record = neural_collapse.run(context)
    assert not context.missing()
    assert "network-cifar" in {plate.name for plate in neural_collapse.draw([record])}


def test_caveats_point_at_claims():
    entry = paper("neural-collapse")
    shown = {caveat.shown_by for caveat in entry.caveats if caveat.shown_by}
    assert len(shown) >= 3
    assert shown <= {claim.id for claim in entry.claims}
