"""Circuit analysis on tiny models: sums, patching against hooks on the model itself, attention, compression."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability.circuit_analysis import (
    ChoiceBatch,
    attention_table,
    categorise_heads,
    compress_heads,
    logit_attribution,
    output_nodes,
    patch_effects,
)
from broadsheet.nn.attribution import direct_parts
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.hooks import replace as hooked
from broadsheet.nn.tiny_models import HEADS, LAYERS, tiny_model

FAMILIES = ["gpt2", "neox-parallel", "llama", "qwen3", "gemma2", "gemma3", "opt"]


def batch(seed: int, shift: int = 0, n: int = 12) -> ChoiceBatch:
    random = torch.Generator().manual_seed(seed)
    answers = torch.stack([torch.randperm(20, generator=random)[:4] + 2 for _ in range(n)])
    if shift:
        answers = torch.flip(batch(seed - shift, n=n).answers, (1,))
    words = torch.randint(22, 29, (n, 4), generator=random)
    ids = torch.cat([torch.zeros(n, 1).long(), torch.stack([answers, words], 2).flatten(1), words[:, :1]], 1)
    place = torch.arange(1, 9, 2).expand(n, 4)
    return ChoiceBatch(ids, answers, torch.arange(n) % 4, place, torch.stack([place + 1, place + 2], -1))


CLEAN, CORRUPT = batch(0), batch(1, shift=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effects_are_those_of_hooks(family: str) -> None:
    model = tiny_model(family)
    names = [f"layers.0.attn.head.{h}" for h in range(HEADS)] + ["layers.1.mlp", "layers.0.mlp.neuron.3"]
    effects = patch_effects(model, CLEAN, CORRUPT, names)
    parts = direct_parts(model, CLEAN.input_ids)

    def metric() -> float:
        with capture(model, block_map(model).resolve("layers.1.resid_post")) as seen, torch.no_grad():
            model(CLEAN.input_ids)
        logits = parts.logits(next(iter(seen.values()))[:, -1], CLEAN.answers)
        return float((logits[CLEAN.rows, CLEAN.answer] - logits.mean(-1)).mean())

    whole = metric()
    for i, name in enumerate(names):
        site = block_map(model).resolve(name)
        with capture(model, site) as seen, torch.no_grad():
            model(CORRUPT.input_ids)
        with hooked(model, {site: seen[site.label][:, -1:]}, positions=-1):
            assert float(effects.total[i]) == pytest.approx(whole - metric(), abs=2e-6)
    assert effects.total.abs().min() > 1e-6
    assert effects.to_frame().shape == (len(names), 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_nodes_give_the_clean_answer_and_none_the_corrupt_one(family: str) -> None:
    model = tiny_model(family)
    found = output_nodes(model, CLEAN, CORRUPT)
    assert len(found.accuracy) == LAYERS * (HEADS + 1) + 1
    ends = [direct_parts(model, b.input_ids) for b in (CORRUPT, CLEAN)]
    for at, parts in zip((0, -1), ends, strict=True):
        final = parts.final
        if at:  # the embedding of the last token stays the corrupt run's
            final = final - parts.embed + ends[0].embed
        logits = parts.logits(final, CLEAN.answers)
        expected = nn.functional.cross_entropy(logits, CLEAN.answer)
        torch.testing.assert_close(found.loss[at], expected, atol=1e-5, rtol=0)


def test_the_last_mlp_acts_directly_only() -> None:
    """With the final norm's scale held too, its total effect is its direct one."""
    model = tiny_model("llama")
    effects = patch_effects(model, CLEAN, CORRUPT, ["layers.1.mlp"])
    parts, other = (direct_parts(model, b.input_ids) for b in (CLEAN, CORRUPT))
    changed = parts.final - parts.vector("layers.1.mlp") + other.vector("layers.1.mlp")
    directions = parts.block_map.final_norm.gain * parts.scale[:, None, None] * model.lm_head.weight[CLEAN.answers]
    fall = torch.einsum("bd,bmd->bm", parts.final - changed, directions)
    expected = (fall[CLEAN.rows, CLEAN.answer] - fall.mean(-1)).mean()
    torch.testing.assert_close(effects.direct[0], expected.detach(), atol=1e-8, rtol=0)
    assert abs(float(effects.indirect[0])) > 1e-6  # the scale does move where it is not held


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_attention_is_the_model_s_own(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    table = attention_table(model, CLEAN)
    with torch.no_grad():
        own = torch.stack(model(CLEAN.input_ids, output_attentions=True).attentions, 1)[:, :, :, -1]
    torch.testing.assert_close(table.rows, own, atol=1e-6, rtol=0)
    torch.testing.assert_close(table.labels, own[..., 1:9:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.content, own[..., 2:10:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.last, own[..., -3:].sum(-1), atol=1e-6, rtol=0)


def test_categories_of_made_up_attention() -> None:
    table = attention_table(tiny_model("gpt2"), CLEAN)
    labels = torch.zeros_like(table.labels)
    labels[CLEAN.rows, 0, 0, CLEAN.answer] = 0.9
    labels[:, 0, 1] = 0.2
    labels[:, 0, 2, 1] = 0.8
    last = torch.zeros_like(table.last)
    last[:, 0, 3] = 0.9
    kinds = categorise_heads(replace(table, labels=labels, last=last))
    for head, kind in enumerate(["correct_letter", "uniform", "single_letter", "amplification"]):
        assert kinds.named(kind) == [f"layers.0.attn.head.{head}"]


@pytest.mark.parametrize("basis", ["class_means", "svd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compression(family: str, basis: str) -> None:
    model = tiny_model(family)
    heads = [f"layers.{layer}.attn.head.{h}" for layer in range(LAYERS) for h in range(HEADS)]
    size = block_map(model).head_dim
    whole = compress_heads(model, heads, CLEAN, rank=size, parts="qkv", basis=basis)
    plain = whole.evaluate(CLEAN, compressed=False)
    assert whole.evaluate(CLEAN).loss == pytest.approx(plain.loss, abs=1e-6)
    small = compress_heads(model, heads, CLEAN, rank=0, parts="qkv", basis=basis)
    assert abs(small.evaluate(CLEAN).loss - plain.loss) > 1e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_on_the_left_changes_nothing() -> None:
    model = tiny_model("llama")
    pad, ones = torch.ones(12, 3, dtype=torch.long), torch.ones_like(CLEAN.input_ids)
    span = CLEAN.content_span + 3 if CLEAN.content_span is not None else None
    padded = replace(
        CLEAN, input_ids=torch.cat([pad, CLEAN.input_ids], 1), attention_mask=torch.cat([0 * pad, ones], 1),
        label_pos=CLEAN.label_pos + 3, content_span=span,
    )  # fmt: skip
    for name in ("labels", "content", "last"):
        torch.testing.assert_close(
            getattr(attention_table(model, padded), name), getattr(attention_table(model, CLEAN), name)
        )
    torch.testing.assert_close(logit_attribution(model, padded).effects(), logit_attribution(model, CLEAN).effects())
    heads = ["layers.1.attn.head.0"]
    one, other = (compress_heads(model, heads, b, rank=2).evaluate(b) for b in (padded, CLEAN))
    assert one.loss == pytest.approx(other.loss, abs=1e-9)


def test_bad_input() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(InvalidInput, match="same right label"):
        patch_effects(model, CLEAN, CLEAN)
    with pytest.raises(InvalidInput, match="same length"):
        patch_effects(model, CLEAN, batch(0, n=4))
    with pytest.raises(InvalidInput, match="stands at label_pos"):
        replace(CLEAN, label_pos=CLEAN.label_pos + 1)
    with pytest.raises(InvalidInput, match="rank=7"):
        compress_heads(model, ["layers.0.attn.head.0"], CLEAN, rank=7)
    with pytest.raises(InvalidInput, match="at least 2"):
        compress_heads(model, ["layers.0.attn.head.0"], batch(0, n=4))
    with pytest.raises(UnsupportedModel, match="causal"):
        logit_attribution(tiny_model("bert-mlm"), CLEAN)
