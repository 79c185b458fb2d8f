"""The experiment runs in small, measures every claim, draws, and its full path runs on a tiny model from disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import DataMissing
from broadsheet.experiments import snmf
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.matching import match_directions
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model

TINY: dict[str, Any] = {
    "PLANTED": {"n": 300, "d": 64, "k": 6, "few": 4, "iterations": 40},
    "CELLS": ((0.2, 0.0), (0.2, 0.1)),
    "FEW_TOKENS": 60,
    "SAE_GRID": ((0.5, 0.03),),
    "SAE_STEPS": 30,
    "SAE_STEPS_FEW": 30,
    "DICTIONARY_PENALTIES": (0.5,),
    "LM": {"width": 16, "hidden": 48, "steps": 25, "batch": 8, "lr": 1e-2, "length": 10, "layer": 0},
    "TEXTS": 48,
    "HELD_OUT": 4,
    "FACTORS": 10,
    "ITERATIONS": 25,
    "TARGETS": (0.02,),
    "SEARCHED": 1,
    "FAMILIES": {"n": 200, "d": 48, "families": 2, "children": 2, "core": 4, "own": 2},
    "TUNING_STEPS": 10,
}


def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("snmf", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in plates} == {
        "planted-features", "loss-curves", "feature-cards", "steering", "concept-tree", "neuron-overlap",
    }  # fmt: skip
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["tuned-stays-non-negative"][0] == 0
    assert context.measured["tuned-stays-non-negative"][1] > 0
    assert json.loads(json.dumps(record)) == record  # what a worker hands back
    assert len(record["topics"]["cards"]) == 4
    snmf.draw([json.loads(json.dumps(record))] * 2)


@pytest.mark.slow
def test_a_seed_says_what_is_measured() -> None:
    one, other = (trial("snmf", seed=1, **TINY)[0].measured for _ in range(2))
    assert one == other


def test_planted_data_are_what_they_say() -> None:
    data, features = snmf.plant(500, 40, 5, 3, 0.2, 0.0, generator(0))
    assert (features != 0).sum(1).tolist() == [3] * 5
    assert int(torch.linalg.matrix_rank(data)) == 5
    data, features, labels = snmf.plant_families(300, 60, 3, 2, 5, 2, generator(1), noise=0.0)
    has = features != 0
    assert has.sum(1).tolist() == [7] * 6
    for i in range(6):
        for j in range(i):
            assert int((has[i] & has[j]).sum()) == (5 if labels[i] == labels[j] else 0)
    row = data[0] / data[0].norm()
    assert float((features / features.norm(dim=1, keepdim=True) @ row).max()) == pytest.approx(1.0, abs=1e-5)


def test_auc_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    activity, labels = torch.rand(60, 3, generator=generator(0)).round(decimals=1), np.arange(60) % 4
    expected = [[roc_auc_score(labels == t, activity[:, k]) for k in range(3)] for t in range(4)]
    np.testing.assert_allclose(snmf._auc(activity, labels, 4), expected)


def test_baselines_find_what_they_can() -> None:
    data, features = snmf.plant(600, 40, 5, 4, 0.2, 0.02, generator(3))
    assert match_directions(features, snmf._dictionary(data, 5, 0.5, 0)).mean > 0.7
    assert match_directions(features, snmf._clusters(data, 5, 0)).mean > 0.5
    assert snmf._components(data, 5).shape == (5, 40)


def own_files(folder: Path, concepts: dict[str, Any] | None = None) -> None:
    corpus = TopicCorpus(n_topics=4, words_per_topic=5, n_common=10)
    words = corpus.tokenizer()
    model: Any = small_language_model(corpus.vocab_size, kind="gpt2", width=16, layers=2, heads=2, hidden=40, length=24)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim == 2 else 1.0)
    (folder / "snmf").mkdir(parents=True)
    model.save_pretrained(folder / "snmf" / "model")
    words.save_pretrained(folder / "snmf" / "model")
    if concepts is None:
        ids, topics = corpus.sample(48, 9, generator(0))
        table: dict[str, Any] = {
            name: [corpus.text(row[1:]) for row in ids[topics == t]] for t, name in enumerate(corpus.names)
        }
        first = corpus.names[0]
        table[first] = {"sentences": table[first], "words": ["dog", "cat"]}
        concepts = table
    (folder / "snmf" / "concepts.json").write_text(json.dumps(concepts))


def test_full_path_on_a_tiny_model_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    context = Context.for_tests("snmf", 0, tmp_path, "full")
    with pytest.raises(DataMissing, match=r"config\.json.*hf download.*concepts\.json"):
        snmf.run(context)
    own_files(tmp_path / "data")
    small = {"n_components": 8, "sparsity": 0.2, "max_iter": 30, "patience": 30, "samples": 2, "new_tokens": 4}
    monkeypatch.setattr(snmf, "FULL", snmf.FULL | small)
    monkeypatch.setattr(snmf, "PROMPT", "the a and")
    monkeypatch.setattr(snmf, "KL_TARGETS", (0.02, 0.05))
    record = snmf.run(context)
    assert set(context.measured) == {"full-detects", "full-steers"} and not context.missing()
    rows = record["full"]["rows"]
    assert [row["label"] for row in rows] == list(TopicCorpus(n_topics=4).names)
    assert all(0.4 < row["auc"] <= 1 and len(row["snmf"]["mass"]) == 2 for row in rows)
    assert any("animals" in question for question in record["full"]["judge_prompts"])
    assert json.loads(json.dumps(record)) == record
    (plate,) = snmf.draw([record])
    assert plate.name == "your-concepts" and len(plate.figure.axes) == 2


def test_too_few_sentences_are_said(tmp_path: Path) -> None:
    own_files(tmp_path / "data", {"weekdays": ["on the dog"] * 9, "rivers": ["a cat"]})
    with pytest.raises(DataMissing, match="rivers has less"):
        snmf.run(Context.for_tests("snmf", 0, tmp_path, "full"))


def test_words_of_a_concept_are_those_that_tell_it_apart() -> None:
    tokenizer = TopicCorpus(n_topics=4, words_per_topic=5).tokenizer()
    own, others = (
        ["the dog and the cat", "that dog from this cat"],
        ["the jury and this court", "that court from the jury"],
    )
    found = {tokenizer.convert_ids_to_tokens(int(i)) for i in snmf._word_ids(own, own, others, tokenizer)}
    assert {"dog", "cat"} <= found
    given = snmf._word_ids({"words": ["jury"]}, own, others, tokenizer)
    assert tokenizer.convert_ids_to_tokens(given.tolist()) == ["jury"]
