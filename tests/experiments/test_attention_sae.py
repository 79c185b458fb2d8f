"""The experiment runs in small, measures every claim, draws, and its full path runs on a tiny GPT-2 from disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from broadsheet.catalog import paper
from broadsheet.data.mixture import TaskMixture
from broadsheet.data.tasks import IOI_TEMPLATES, NAMES, OBJECTS, PLACES
from broadsheet.errors import DataMissing
from broadsheet.experiments import attention_sae, attention_sae_full
from broadsheet.interpretability.attention_sae import AttentionSAE
from broadsheet.lab import Context
from broadsheet.lab.testing import trial
from broadsheet.nn.seeding import generator

TINY: dict[str, Any] = {
    "PLANTED": {"heads": 2, "d_head": 6, "features": 14, "rows": 3000, "chance": 0.05},
    "PLANTED_FIT": {"steps": 150, "batch": 128, "l1": 0.8, "lr": 3e-3},
    "MODEL": {"width": 16, "hidden": 16, "heads": 2, "steps": 60, "batch": 16, "lr": 1e-2, "texts": 200},
    "SAE": {"steps": 60, "batch": 128, "lr": 3e-3, "texts": 40},
    "L1": (0.5, 1.0),
    "WORDS": 18,
    "TEST": 60,
    "PLACES": 40,
    "TREES": 4,
    "PREFIX": {"lengths": (1, 2), "samples": 10, "length": 10},
}


def sure(model: torch.nn.Module, text: Any) -> torch.Tensor:
    """An untrained model is sure of nothing: every place where a word comes again counts."""
    return text.source[:, :-1] >= 0


def test_small_measures_every_claim_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sae, "predicted", sure)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    context, record, plates = trial("attention-sae", seed=0, **TINY)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = {claim.id for claim in paper("attention-sae").claims if "small" in claim.presets}
    assert set(context.measured) == wanted
    assert {p.name for p in plates} >= {"planted", "quality", "roles", "heads", "ablation", "recursion", "prefixes"}
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["attribution-adds-up"][0] < 1e-5
    assert context.measured["one-position-is-not-all"][0] == 0
    kept, dropped, _ = context.measured["norm-scale-kept"]
    assert kept < 1e-4 < dropped
    json.dumps(record)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sae, "predicted", sure)
    first, second = (trial("attention-sae", seed=3, **TINY)[0] for _ in range(2))
    assert first.measured == second.measured


def test_information_is_entropy_less_what_is_left() -> None:
    draw = np.random.default_rng(0)
    truth = (draw.random((4000, 2)) < 0.3).astype(float)
    noise = draw.random(4000)
    values = np.stack([truth[:, 0], noise], 1)
    bins = attention_sae.binned(values, values)
    told = attention_sae.information(bins, truth)
    assert told[0, 0] == pytest.approx(1, abs=1e-6)
    assert abs(told[0, 1]) < 0.01 and abs(told[1]).max() < 0.01
    from sklearn.metrics import mutual_info_score, roc_auc_score

    mixed = truth[:, 0] + 0.8 * noise
    bins = attention_sae.binned(mixed[:, None], mixed[:, None])
    p = truth[:, 0].mean()
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    wanted = mutual_info_score(bins[:, 0], truth[:, 0]) / entropy
    assert attention_sae.information(bins, truth)[0, 0] == pytest.approx(wanted, rel=1e-6)
    area = attention_sae.auc(mixed[:, None], truth)
    assert area[0, 0] == pytest.approx(roc_auc_score(truth[:, 0], mixed))
    assert attention_sae.auc(truth[:, :1], truth)[0, 0] == 1


def test_roles_are_what_they_say() -> None:
    mixture = TaskMixture()
    text = mixture.sample(30, generator(0))
    names, truth = attention_sae.roles(mixture, text, text.source[:, :-1] >= 0)
    assert len(names) == len(truth) == 24
    assert (truth[:18].sum(0) == (text.source[:, :-1] >= 0)).all()
    place = truth[4].nonzero()[0]
    assert text.input_ids[place[0], place[1] + 1] == mixture.first_word + 4


def save_gpt2(folder: Path) -> None:
    """A random GPT-2 with a tokenizer of whole words that knows the prompts."""
    import re

    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = [frame.format(A="A", B="B", S="S", place="p", object="o") for frame in IOI_TEMPLATES]
    texts += [*NAMES, *PLACES, *OBJECTS, attention_sae_full.FILLER, "then alongside"]
    pieces = sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]+", text)})
    vocab = {word: i for i, word in enumerate(["<|endoftext|>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocab), n_embd=48, n_layer=7, n_head=6, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    small = {"expansion": 2, "steps": 6, "batch": 32, "buffer": 2, "texts": 4, "context": 16, "resample_every": 3}
    monkeypatch.setattr(attention_sae_full, "FIT", {**attention_sae_full.FIT, **small})
    monkeypatch.setattr(attention_sae_full, "HELD_OUT", 4)
    monkeypatch.setattr(attention_sae_full, "PREFIX", {"lengths": (1, 2), "samples": 4, "length": 12})
    monkeypatch.setattr(attention_sae_full, "PROMPTS", 4)
    return Context.for_tests("attention-sae", 0, tmp_path, "full")


CLAIMS = {"gpt2-loss-recovered", "gpt2-long-prefix", "gpt2-and-is-the-position"}


def test_full_path_on_a_tiny_model_from_disk(full: Context) -> None:
    with pytest.raises(DataMissing, match=r"model\.safetensors.*texts\.txt.*tokens\.npy"):
        attention_sae_full.measure(full)
    save_gpt2(full.data_dir / "gpt2")
    own = full.data_dir / "attention-sae"
    own.mkdir()
    lines = [
        f"{a} and {b} went to the {p} , then {a} gave" for a, b, p in zip(NAMES, NAMES[1:], PLACES * 3, strict=False)
    ]
    (own / "texts.txt").write_text("\n\n".join(lines))
    record = attention_sae_full.measure(full)
    assert set(full.measured) == CLAIMS
    assert len(record["prefix"]["attention"]) == 6
    assert len(attention_sae_full.draw([record])[0].figure.axes) == 3
    json.dumps(record)


def test_full_takes_token_files_and_the_users_own_autoencoder(full: Context) -> None:
    save_gpt2(full.data_dir / "gpt2")
    own = full.data_dir / "attention-sae"
    own.mkdir()
    np.save(own / "tokens.npy", np.random.default_rng(0).integers(2, 50, (8, 14)))
    sae = AttentionSAE(6, 8, 20, scale=1.0, site="layers.2.attn.z")
    sae.save_saelens(own / "sae")
    record = attention_sae_full.measure(full)
    assert set(full.measured) == CLAIMS and len(record["density"]) == 20
