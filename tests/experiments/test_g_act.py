"""The experiment runs in small, measures every claim, draws; its full path runs on a tiny model from disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from broadsheet.data.language import word_tokenizer
from broadsheet.errors import DataMissing, InvalidInput
from broadsheet.experiments import g_act
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

TINY: dict[str, Any] = {
    "MODEL": {"width": 32, "layers": 2, "heads": 2, "hidden": 64},
    "TRAIN": {"texts": 600, "length": 19, "steps": 60, "batch": 32, "lr": 1e-2},
    "SIZES": {"fit": 40, "validation": 6, "test": 6, "neutral": 6, "profile": 6, "samples": 2},
    "SHARES": (0.5, 1.0),
    "WHERE": ((1,), (0, 1)),
    "HEADS": 2,
    "COUNTS": (1, 2),
}


def test_small_measures_every_claim_and_draws() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("g-act", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    names = ["target-share", "strength", "probes", "clusters", "bias", "overhead"]
    assert [p.name for p in plates] == names and all(p.caption and p.figure.axes for p in plates)
    for method in ("g_act", "mean_difference", "act", "neuron"):  # nobody exceeds the side effect allowed
        assert record["methods"][method]["kl"] <= g_act.BUDGET * 1.06
    assert record["methods"]["none"]["new_wordings"]["target"] <= context.measured["as-good-as-asking"][0] + 1
    json.dumps(record)


def save_model(folder: Path) -> None:
    """A random model and its files, as a person would have them."""
    words = ["<bos>", "<pad>", "<unk>", "write", "solve", "heat", "flow", "sort", "in", "C++", "Python", "please"]
    words += [f"w{i}" for i in range(20)]
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(folder / "g-act-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=31, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.4
    model.save_pretrained(folder / "g-act-model")
    bare = [f"write {a} w{i}" for i in range(8) for a in ("solve", "sort heat", "flow")]
    pairs = [{"prompt": p, "plus": f"{p} in C++", "minus": f"{p} in Python"} for p in bare]
    (folder / "g-act-pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "g-act-neutral.txt").write_text("w1 w2 w3\nw4 w5 please\n")


def test_full_path_on_a_tiny_model_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context.for_tests("g-act", 0, tmp_path, "full")
    context.data_dir.mkdir(parents=True)
    with pytest.raises(DataMissing, match=r"g-act-model .*hf download.*g-act-pairs\.jsonl.*plus.*g-act-neutral\.txt"):
        g_act.run(context)
    save_model(context.data_dir)
    small = {"samples": 2, "max_new_tokens": 4, "batch": 16, "n_heads": 2, "validation": 2, "shares": (0.5, 1.0)}
    monkeypatch.setattr(g_act, "FULL", {**g_act.FULL, **small})
    monkeypatch.setattr(g_act, "code_language", lambda text: "C++" if "w1" in text else "Python")
    record = g_act.run(context)
    assert not context.missing()
    assert 0 <= context.measured["above-mean-difference"][0] <= 1
    assert [p.name for p in g_act.draw([record])] == ["target-share", "probes", "overhead"]
    (context.data_dir / "g-act-pairs.jsonl").write_text('{"prompt": "write", "plus": "write in C++"}')
    with pytest.raises(InvalidInput, match="line 1 lacks a key"):
        g_act._files(context)
