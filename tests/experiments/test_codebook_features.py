"""The experiment runs in small, measures every claim, draws, and its full path runs on a tiny model from disk."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import DataMissing
from broadsheet.experiments import codebook_features
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model

TINY = replace(
    codebook_features.SMALL, states=9, successors=3, base=3, length=7, batch=16, before=30, steps=25, codes=30,
    start_steps=2, texts=60, model={"kind": "llama", "width": 12, "layers": 2, "heads": 2, "hidden": 24},
)  # fmt: skip
TOPICS: dict[str, Any] = {
    **codebook_features.TOPICS, "corpus": {"n_topics": 2, "words_per_topic": 3, "n_common": 4}, "before": 40,
    "steps": 15, "codes": 20, "texts": 40, "samples": 4, "write": 4, "batch": 16,
    "model": {"kind": "llama", "width": 16, "layers": 2, "heads": 2, "hidden": 16},
}  # fmt: skip
TEXT: dict[str, Any] = {
    "codes": 12, "k": 2, "at": ("attn_heads",), "steps": 4, "batch": 4, "lr": 1e-3, "length": 12, "held_out": 4,
    "patterns": 2, "samples": 2, "write": 4, "index": 20,
}  # fmt: skip


def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sizes = {"SMALL": TINY, "TOPICS": TOPICS, "PAIRS": 40}
    context, record, plates = trial("codebook-features", seed=0, **sizes)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.name for p in plates} == {"states", "intervention", "merged-inputs", "training", "topics"}
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["state-is-in-the-codes"][0] > 0.5
    assert set(record["machine"]["left"]) == set(codebook_features.PARTS)
    assert len(record["topics"]["names"]) == 2


def save_model_and_text(home: Path) -> None:
    """A random model, its tokenizer and a text, in the files of published ones."""
    corpus = TopicCorpus(n_topics=4, words_per_topic=3, n_common=4)
    tokenizer = corpus.tokenizer()
    model: Any = small_language_model(corpus.vocab_size, kind="gpt2", width=16, layers=1, heads=2, length=32)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    ids = corpus.sample(40, 10, generator(0))[0]
    (home / "text.txt").write_text("\n".join(corpus.text(row[1:]) for row in ids) + "\n\n")


def test_full_path_on_a_tiny_model_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("codebook-features", 0, tmp_path, "full")
    with pytest.raises(DataMissing, match=r"config\.json.*text\.txt.*TinyStories.*topics\.txt"):
        codebook_features.run(context)
    home = context.data_dir / "codebook-features"
    save_model_and_text(home)
    paper = replace(TINY, before=0, kmeans=False, layer=1, model={**TINY.model, "kind": "gpt_neox"})
    for name, value in {"PAPER": paper, "TOPICS": TOPICS, "TEXT": TEXT, "PAIRS": 20}.items():
        monkeypatch.setattr(codebook_features, name, value)
    record = codebook_features.run(context)
    assert not context.missing()
    assert "own-text" in {p.name for p in codebook_features.draw([record])}
    ours, plain, _ = context.measured["text-loss"]
    assert 0 < plain < 2 * math.log(25) and 0 < ours < 4 * math.log(25)
    patterns = [row[0] for row in record["text"]["steering"]]
    assert len(patterns) == 2
    (home / "topics.txt").write_text("dog|eagle|violin\n")
    text = codebook_features._text(
        Context.for_tests("codebook-features", 1, tmp_path / "b", "full"), home / "model", home / "text.txt"
    )
    assert [row[0] for row in text["steering"]] == ["dog|eagle|violin"]


def test_frequent_words_are_long_and_not_everywhere() -> None:
    lines = ["always apples", "always bananas", "always apples", "always the", "always x", *["always"] * 8]
    assert codebook_features._frequent(lines, 5) == [r"\bapples\b", r"\bbananas\b"]
