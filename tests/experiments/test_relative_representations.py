"""The experiment runs in small, measures every claim, draws, and its full path runs on files in the real formats."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from broadsheet.catalog import paper
from broadsheet.errors import DataMissing
from broadsheet.experiments import relative_representations
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

SLUG = "relative-representations"
TINY: dict[str, Any] = {
    "K": 20,
    "ISOMETRY": {"n": 60, "d": 16, "k": 20},
    "CLASSIFIERS": {"models": 2, "steps": 12, "lr": 3e-3, "hidden": (16,), "latent": 8},
    "CNN": {"channels": (2, 3), "latent": 12},
    "DECODERS": {"models": 2, "steps": 12, "lr": 2e-3, "hidden": (16,), "latent": 8},
    "PROXY": {"rates": (1e-3, 3e-3), "runs": 2, "marks": (3, 6)},
    "WORDS": {"n": 120, "contexts": 80, "rate": 1.0, "counts": (5, 20), "draws": 1},
    "COMPANY": {"steps": 10, "lr": 1e-3, "batch": 32},
    "REAL": {"anchors": 6, "steps": 12, "lr": 1e-3, "train": 40, "test": 20, "batch": 8},
}
PLATES = ["latents", "stitched-classifiers", "stitched-decoders", "words", "proxy"]


def test_small_measures_every_claim_and_draws():
    context, record, plates = trial(SLUG, seed=1, **TINY)
    assert [plate.name for plate in plates] == PLATES
    assert all(plate.caption and plate.figure.axes for plate in plates)
    assert context.measured["rotation-drops-out"][0] == pytest.approx(1)
    assert len(record["proxy"]["errors"]) == 4
    again, _, _ = trial(SLUG, seed=1, **TINY)
    assert {k: v[:2] for k, v in again.measured.items()} == {k: v[:2] for k, v in context.measured.items()}
    other, _, _ = trial(SLUG, seed=2, **TINY)
    assert other.measured["decoders-stitched"] != context.measured["decoders-stitched"]


def word_files(folder):
    """The same words in a text file and in a binary one, turned."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    words = ["".join(letters) for letters in draw.choice(list("abcdefgh"), (700, 6))]
    words = list(dict.fromkeys(words))
    vectors = draw.normal(size=(len(words), 8)).astype(np.float32)
    turned = vectors @ np.linalg.qr(draw.normal(size=(8, 8)))[0].astype(np.float32)
    lines = [f"{w} " + " ".join(f"{v:.6f}" for v in row) for w, row in zip(words, vectors, strict=True)]
    (folder / "left.vec").write_text(f"{len(words)} 8\n" + "\n".join(lines) + "\n")
    raw = b"".join(
        w.encode() + b" " + row.astype("<f4").tobytes() + b"\n" for w, row in zip(words, turned, strict=True)
    )
    (folder / "right.bin").write_bytes(f"{len(words)} 8\n".encode() + raw)


def text_encoder(folder, seed):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"{side}{i}" for side in ("en", "fr") for i in range(30))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 12 + 4 * seed, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **size)).save_pretrained(folder)


def texts(folder, parallel):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    for end, language in (("", "en"), ("-b", "fr")) if parallel else (("", "en"),):
        for split, n in (("train", 40), ("test", 20)):
            rows = [
                f"{'sport' if i % 2 else 'food'}\t"
                + " ".join(f"{language}{w + 15 * (i % 2)}" for w in draw.integers(0, 15, 5))
                for i in range(n)
            ]
            (folder / f"{split}{end}.tsv").write_text("\n".join(rows) + "\n")
    if parallel:
        rows = [f"en{i} en{i + 1}\tfr{i} fr{i + 1}" for i in range(0, 28, 3)]
        (folder / "anchors.tsv").write_text("\n".join(rows) + "\n")
    for seed, side in enumerate("ab"):
        text_encoder(folder / f"encoder-{side}", seed)


def images(root):
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    batches = root / "cifar10" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {b"data": draw.integers(0, 255, (20, 3072), np.uint8), b"labels": (np.arange(20) % 10).tolist()}
        (batches / name).write_bytes(pickle.dumps(batch))
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    folder = root / SLUG / "images"
    ViTModel(ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "encoder-a")
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder / "encoder-b")
    about = '{"size": {"shortest_edge": 32}, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}'
    (folder / "encoder-b" / "preprocessor_config.json").write_text(about)


@pytest.mark.parametrize("parallel", [False, True])
def test_full_says_what_is_missing_and_runs_on_files(tmp_path, monkeypatch, parallel):
    for name, value in TINY.items():
        monkeypatch.setattr(relative_representations, name, value)
    root = tmp_path / "data" / SLUG

    def missing(message):
        with pytest.raises(DataMissing, match=message):
            relative_representations.run(Context.for_tests(SLUG, 0, tmp_path, "full"))

    missing(r"left\.vec")
    word_files(root / "words")
    missing("neither texts/")
    (root / "texts").mkdir()
    missing("encoder-b")
    (root / "texts").rmdir()
    texts(root / "texts", parallel)
    kinds = ["texts"]
    if not parallel:
        (root / "images").mkdir()
        missing("none of mnist")
        images(tmp_path / "data")
        kinds.append("images")
    context = Context.for_tests(SLUG, 0, tmp_path, "full")
    record = relative_representations.run(context)
    assert not context.missing()
    assert context.measured["real-words"][0] > 0.99  # the right file is the left one, turned
    assert context.measured["real-encoders-stitched"][2]["of"] == kinds
    assert all(np.shape(record["real"][kind]) == (2, 2) for kind in kinds)
    assert [plate.name for plate in relative_representations.draw([record])] == [*PLATES, "real"]


def test_caveats_point_at_claims():
    entry = paper(SLUG)
    shown = {caveat.shown_by for caveat in entry.caveats if caveat.shown_by}
    assert len(shown) == 4
    assert shown <= {claim.id for claim in entry.claims}
