"""The experiment runs in small, measures every claim, draws, and its full path runs on a tiny pair from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from broadsheet.data.language import word_tokenizer
from broadsheet.errors import DataMissing
from broadsheet.experiments import lm_head_neurons as experiment
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.small_lm import small_language_model

TINY: dict[str, Any] = {
    "MODEL": {"width": 16, "layers": 2, "heads": 2, "hidden": 24},
    "TRAIN": {"steps": 6, "batch": 4, "lr": 5e-3},
    "TUNE": {"steps": 2, "batch": 4, "lr": 1e-3},
    "TEXTS": {"truth": 128, "labels": 16, "prompts": 4},
    "SWEEP": (-3.0, 0.0, 3.0),
    "SWEPT_TOPICS": 2,
    "CONTROLS": 2,
    "DIFFERING": 3,
    "COST": {"width": 8, "neurons": 16, "vocab": 64},
    "DISK": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64},
}


def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("lm-head-neurons", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in plates} == {
        "specialised-neurons", "labels", "clamps", "generated", "same-word", "sharpness", "cost",
    }  # fmt: skip
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["streaming-exact"][0] < 1e-6
    assert context.measured["oriented-label-stays"][0] == 1.0
    assert len(record["labels"]["share"]["ours"]) == 2 and len(record["clamps"]["controls"]) == 4


def test_the_naive_loop_gives_the_same_words() -> None:
    random = torch.Generator().manual_seed(0)
    rows, head = torch.randn(5, 8, generator=random), torch.randn(40, 8, generator=random)
    for row, (tokens, probs, entropy) in zip(rows, experiment.naive_map(rows, head, 3), strict=True):
        whole = (head.double() @ row.double()).softmax(-1)
        assert torch.equal(tokens, whole.topk(3).indices) and torch.allclose(probs.double(), whole.topk(3).values)
        assert entropy == pytest.approx(float(-(whole * whole.log()).sum()), abs=1e-5)


def save_pair(folder: Path) -> None:
    """A tiny base model and its tuned version with a tokenizer, in the files of published ones."""
    texts = [*experiment.FULL["words"], *experiment.FULL["words"].values(), *experiment.FULL["neutral"]]
    words = ["<bos>", "<pad>", "<unk>", *dict.fromkeys(" ".join(texts).split())]
    model: Any = small_language_model(len(words), width=16, layers=2, heads=2, hidden=48)
    model.lm_head.weight.data *= 20  # untrained rows are so short that no hidden state could make a word probable
    # Both words have a neuron that is surest of them.
    for neuron, word in enumerate(experiment.FULL["words"]):
        row = model.lm_head.weight.data[words.index(word)]
        model.model.layers[1].mlp.up_proj.weight.data[neuron] = 3 * row
        model.model.layers[1].mlp.down_proj.weight.data[:, neuron] = 1e3 * row
    for name in ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"):
        model.save_pretrained(folder / name, max_shard_size="10KB")
        word_tokenizer(words).save_pretrained(folder / name)
        model.model.layers[0].mlp.up_proj.weight.data[:12] *= -1


def test_full_path_on_a_tiny_pair_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("lm-head-neurons", 0, tmp_path, "full")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(DataMissing, match=r"Llama-3\.1-8B and .*hf download"):
        experiment._published(context)
    save_pair(tmp_path / "data")
    monkeypatch.setattr(experiment, "FULL", {**experiment.FULL, "naive": 4})
    record = experiment._published(context)
    assert set(context.measured) == {
        "published-keeps-labels", "published-faster-than-naive", "published-memory", "published-clamp",
    }  # fmt: skip
    assert context.measured["published-keeps-labels"][0] == pytest.approx(1 - 12 / 96)
    assert context.measured["published-clamp"][0] > 0.7
    assert [entry["neuron"] for entry in record["texts"]] == [[1, 0], [1, 1]]
    assert len(experiment._draw_published(record).figure.axes) == 1


def test_models_are_taken_from_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("lm-head-neurons", 0, tmp_path, "full")
    save_pair(tmp_path / "hub")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, file: str(tmp_path / "hub" / repo.split("/")[1] / file)
    )
    base, tuned = experiment._folders(context)
    assert (base.name, tuned.name) == ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct") and base.parent == tmp_path / "hub"
    save_pair(tmp_path / "data")
    assert experiment._folders(context)[0].parent == tmp_path / "data"  # the user's own folder comes first
