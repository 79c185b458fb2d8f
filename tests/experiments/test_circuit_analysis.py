"""The experiment runs in small, measures every claim, draws, and its full path runs on a tiny model from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from broadsheet.data.choices import LabelledLists
from broadsheet.errors import DataMissing
from broadsheet.experiments import circuit_analysis
from broadsheet.interpretability.circuit_analysis import ModelAtChance
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.seeding import seeded

TINY: dict[str, Any] = {
    "TRAIN": {
        "words": 5,
        "width": 32,
        "hidden": 32,
        "layers": 3,
        "heads": 2,
        "steps": 12,
        "rounds": 1,
        "batch": 16,
        "lr": 4e-3,
    },
    "TEST": 24,
    "FIT": 40,
    "PLANTED": 50,
    "RANKS": (0, 3),
    "FAMILIES": ("gpt2", "gemma2"),
}


@pytest.mark.filterwarnings("ignore::broadsheet.interpretability.circuit_analysis.skill.ModelAtChance")
def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("circuit-analysis", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in plates} == {
        "output-nodes", "direct-effects", "attention", "ranks", "queries-and-keys", "features",
    }  # fmt: skip
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["shares-add-up"][0] < 1e-5
    assert context.measured["planted-letter-head"][0] == 1
    assert context.measured["planted-feature-told"][0] > 0.5
    assert set(record["trained"]["curve"]) == {"class_means", "random"}


@pytest.mark.parametrize(("skill", "rounds"), [(0.5, 3), (1.0, 1)])
def test_a_model_that_has_not_learned_its_task_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skill: float, rounds: int
) -> None:
    seeds = []
    monkeypatch.setattr(circuit_analysis, "TRAIN", {**TINY["TRAIN"], "rounds": 3})
    monkeypatch.setattr(circuit_analysis, "answered", lambda *_: torch.full((4,), skill))
    monkeypatch.setattr(circuit_analysis, "train_language_model", lambda *_, seed, **__: seeds.append(seed))
    context = Context.for_tests("circuit-analysis", 7, tmp_path)
    circuit_analysis.train_letter_model(context, LabelledLists(n_words=5))
    assert seeds == [7, 1007, 2007][:rounds]


def save_model(folder: Path) -> None:
    """A random GPT-2 with a byte-level tokenizer, in the files that Hugging Face saves."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(folder)
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0)
    with seeded(0):
        GPT2LMHeadModel(config).save_pretrained(folder)


def test_full_path_on_a_tiny_model_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("circuit-analysis", 0, tmp_path, "full")
    with pytest.raises(DataMissing, match=r"circuit-analysis/model: no Hugging Face model.*mmlu.*data\.tar"):
        circuit_analysis._own(context)
    save_model(tmp_path / "data" / "circuit-analysis" / "model")
    monkeypatch.setattr(circuit_analysis, "FULL", {**circuit_analysis.FULL, "questions": 24, "batch": 16})
    with pytest.warns(ModelAtChance):
        record = circuit_analysis._own(context)
    assert set(context.measured) == {"own-model-three-dimensions", "own-model-output-nodes"}
    assert set(record["mutated"]) == {"shuffled", "rotated", "random_letters", "digits"}
    assert len(record["nodes"]) == 2 * 3 and len(circuit_analysis._draw_own(record).figure.axes) == 2


@pytest.mark.filterwarnings("ignore::broadsheet.interpretability.circuit_analysis.skill.ModelAtChance")
def test_full_path_reads_mmlu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("circuit-analysis", 0, tmp_path, "full")
    folder = tmp_path / "data" / "circuit-analysis"
    save_model(folder / "model")
    (folder / "mmlu").mkdir()
    rows = [
        f"What is {i} and one?,{i + 1},{i + 3},{i + 4},{i + 5},{'ABCD'[i % 4]}" for i in range(1, 5) for _ in range(10)
    ]
    (folder / "mmlu" / "sums_test.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(circuit_analysis, "FULL", {**circuit_analysis.FULL, "questions": 16, "batch": 16})
    record = circuit_analysis._own(context)
    assert 0 <= record["accuracy"] <= 1 and record["heads"]
