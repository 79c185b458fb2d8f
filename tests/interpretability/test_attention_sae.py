"""Autoencoders of head outputs: shares add up in every architecture, edits change what they say, files are exchanged."""

import json
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.errors import CheckpointError, InvalidInput, UnsupportedModel
from broadsheet.interpretability.attention_sae import (
    AttentionSAE,
    ablate_features,
    capture_z,
    dfa,
    edit_features,
    evaluate_sae,
    feature_effects,
    head_attribution,
    head_weights,
    latent_cards,
    natural_prefixes,
    prefix_induction_scores,
    recursive_dfa,
    specificity_sensitivity,
    top_features,
)
from broadsheet.interpretability.attention_sae.induction import _matching, _texts
from broadsheet.nn.activations import ActivationBuffer, RowBatches
from broadsheet.nn.blocks import block_map
from broadsheet.nn.cards import feature_page
from broadsheet.nn.features import Feature
from broadsheet.nn.hooks import capture, replace
from broadsheet.nn.matching import match_directions
from broadsheet.nn.seeding import generator
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.nn.tiny_models import FAMILIES, HEADS, VOCAB, tiny_inputs, tiny_model

mpl.use("Agg")
F64 = torch.float64
TEXT = [f for f in FAMILIES if not f.startswith("vit")]
DECODERS = [f for f in TEXT if not any(x in f for x in ("bert", "classifier", "llama-base"))]
IN_FLOAT32 = (
    "gemma",
    "llama",
    "qwen",
    "mistral",
    "gpt-neo",
)  # norms or scores in single precision whatever the model's


def random_sae(model, layer: int = 1, n_features: int = 20, seed: int = 0, dtype: torch.dtype = F64) -> AttentionSAE:
    """An autoencoder with random weights and biases, half of whose features are active."""
    sae = AttentionSAE.for_layer(model, layer, n_features, scale=0.7, seed=seed).to(dtype)
    draw = generator(seed + 50)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, sae.b_dec):
            weight.copy_(torch.randn(weight.shape, generator=draw, dtype=dtype) * 0.4)
    return sae


def padded_either_way(ids):
    """The same texts with two columns of padding on the left, and on the right."""
    pad = torch.ones(len(ids), 2, dtype=torch.long)
    for left in (True, False):
        parts = (pad, ids) if left else (ids, pad)
        mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1)
        yield torch.cat(parts, 1), mask, 2 if left else 0


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------- heads side by side


@pytest.mark.parametrize("family", TEXT)
def test_z_is_what_the_output_matrix_reads(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    the_map = block_map(model)
    z = capture_z(model, ids, 1)
    attention = the_map.blocks[1].attention
    assert z.shape == (2, 7, HEADS, attention.head_dim)
    with capture(model, the_map.resolve("layers.1.attn")) as seen, torch.no_grad():
        model(ids)
    torch.testing.assert_close(attention.o(z.flatten(2)), seen["layers.1.attn"], atol=1e-9, rtol=1e-9)
    for padded, mask, offset in padded_either_way(ids):
        other = capture_z(model, padded, 1, mask)
        torch.testing.assert_close(other[:, offset : offset + 7], z, atol=1e-6, rtol=1e-6)
        assert (other[mask == 0] == 0).all()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_autoencoder_knows_its_layer(family):
    model = tiny_model(family)
    sae = AttentionSAE.for_layer(model, 1)
    d = HEADS * block_map(model).head_dim
    assert (sae.n_heads, sae.d_in, sae.n_features) == (HEADS, d, 32 * d)
    assert (sae.site, sae.layer) == ("layers.1.attn.z", 1)
    z = capture_z(model, tiny_inputs(family), 1).float()
    assert torch.equal(sae.encode(z), sae.encode(z.flatten(-2)))
    assert sae.heads_apart(sae(z)[0]).shape == z.shape
    one = AttentionSAE(1, 6, 8)
    assert one.encode(torch.randn(3, 6)).shape == (3, 8)


def test_head_shares_are_shares_and_follow_their_heads():
    model = tiny_model("gpt2")
    sae = random_sae(model)
    shares = head_weights(sae)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(20, dtype=F64))
    by_hand = [float(sae.W_dec[3, 6 * h : 6 * h + 6].detach().norm()) for h in range(4)]
    np.testing.assert_allclose(shares[3].numpy(), np.array(by_hand) / sum(by_hand))
    table = top_features(sae, 2, k=5)
    assert table["feature"].tolist() == shares[:, 2].argsort(descending=True)[:5].tolist()
    alive = torch.zeros(20, dtype=torch.bool)
    alive[[4, 9]] = True
    assert set(top_features(sae, 2, k=5, alive=alive)["feature"]) == {4, 9}
    # Heads of the model and blocks of the autoencoder in another order: the shares are in that order.
    order = torch.tensor([2, 0, 3, 1])
    moved = random_sae(model)
    with torch.no_grad():
        moved.W_dec.copy_(sae.heads_apart(sae.W_dec)[:, order].flatten(1))
        moved.W_enc.copy_(sae.heads_apart(sae.W_enc.T)[:, order].flatten(1).T)
    torch.testing.assert_close(head_weights(moved), shares[:, order])
    z = capture_z(model, tiny_inputs("gpt2"), 1)
    torch.testing.assert_close(
        head_attribution(moved, z[:, :, order], [1, 5]), head_attribution(sae, z, [1, 5])[..., order]
    )


@pytest.mark.parametrize("family", TEXT)
def test_head_attribution_and_the_constant_are_the_pre_activation(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    sae = random_sae(model)
    z = capture_z(model, ids, 1)
    shares = head_attribution(sae, z, range(20))
    assert shares.shape == (2, 7, 20, HEADS)
    pre = shares.sum(-1) + sae.constants
    torch.testing.assert_close(pre.clamp_min(0), sae.encode(z).detach(), atol=1e-10, rtol=1e-10)
    slow = ((z.flatten(2) * 0.7 - sae.b_dec) @ sae.W_enc + sae.b_enc).detach() / 0.7
    torch.testing.assert_close(pre, slow, atol=1e-6, rtol=1e-6)  # the scale is a float32


# ------------------------------------------------------------------------------------------ direct attribution


@pytest.mark.parametrize("family", TEXT)
def test_direct_attribution_sums_to_the_pre_activation_and_is_attention_times_value(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    sae = random_sae(model)
    found = dfa(model, sae, ids, torch.tensor([3, 8]), torch.tensor([6, 4]))
    assert found.by_head_source.shape == (2, HEADS, 7)
    torch.testing.assert_close(found.total, found.pre_activation, atol=1e-10, rtol=1e-10)
    z = capture_z(model, ids, 1)
    tolerance = 1e-6 if family.startswith(IN_FLOAT32) else 1e-10
    own = head_attribution(sae, z, [3, 8])
    own = torch.stack([own[0, 6, 0], own[1, 4, 1]])
    torch.testing.assert_close(found.by_head, own, atol=tolerance, rtol=tolerance)
    f = sae.encode(z).detach()
    wanted = torch.stack([f[0, 6, 3], f[1, 4, 8]])
    torch.testing.assert_close(found.activation, wanted, atol=tolerance, rtol=tolerance)
    if "bert" not in family and "classifier" not in family:
        assert (found.by_head_source[1, :, 5:] == 0).all()  # nothing comes from later tokens
    # The slow way: a numpy loop over heads and sources.
    totals = block_map(model).forward(ids, cache=True)[1].layers[1]
    pattern, v, readers = (x.detach().numpy() for x in (totals.pattern, totals.v, sae.readers))
    for h in range(HEADS):
        for s in range(7):
            share = pattern[0, h, 6, s] * float(v[0, s, h] @ readers[3, h])
            assert float(found.by_head_source[0, h, s]) == pytest.approx(share, abs=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bert", "neox-parallel"])
def test_direct_attribution_in_single_precision(family):
    model, ids = tiny_model(family, torch.float32), tiny_inputs(family)
    sae = random_sae(model, dtype=torch.float32)
    found = dfa(model, sae, ids, 3, 6)
    torch.testing.assert_close(found.total, found.pre_activation, atol=1e-5, rtol=1e-5)
    half = tiny_model(family, torch.bfloat16)
    assert dfa(half, sae, ids, 3, 6).by_head_source.dtype == torch.float32


@pytest.mark.parametrize("family", TEXT)
def test_padding_changes_no_attribution(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    sae, tree_of = random_sae(model), recursive_dfa
    plain, tree = dfa(model, sae, ids, 3, 5), tree_of(model, sae, ids[:1], 3, 5, top=50, threshold=0)
    for padded, mask, offset in padded_either_way(ids):
        other = dfa(model, sae, padded, 3, 5 + offset, mask)
        torch.testing.assert_close(other.pre_activation, plain.pre_activation, atol=1e-6, rtol=1e-6)
        inside = other.by_head_source[..., offset : offset + 7]
        torch.testing.assert_close(inside, plain.by_head_source, atol=1e-6, rtol=1e-6)
        assert other.position.tolist() == [5 + offset] * 2
        again = tree_of(model, sae, padded[:1], 3, 5 + offset, mask[:1], top=50, threshold=0)
        torch.testing.assert_close(again.by_token[offset : offset + 7], tree.by_token, atol=1e-5, rtol=1e-5)
        assert dfa(model, sae, padded, 3, None, mask).position.tolist() == [
            p + offset for p in dfa(model, sae, ids, 3).position.tolist()
        ]


def test_what_comes_back_can_be_shown():
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")
    sae = random_sae(model)
    found = dfa(model, sae, ids, 3)
    frame = found.to_frame()
    assert len(frame) == 28 and frame["share"].sum() == pytest.approx(float(found.by_head_source[0].sum()))
    assert frame["share"].abs().is_monotonic_decreasing
    assert found.plot([str(i) for i in range(7)]) is not None and found.plot(text=1) is not None
    tree = recursive_dfa(model, sae, ids[:1], 3)
    assert tree.plot([f"${i}" for i in range(7)]) is not None
    assert tree.to_text([str(i) for i in range(7)]).splitlines()[0].endswith("'")
    assert list(tree.to_frame().columns) == ["depth", "name", "position", "value", "leaf"]


# --------------------------------------------------------------------------------------- recursive attribution


def every_sum_is_right(node, tolerance):
    if node.children:
        assert sum(child.value for child in node.children) == pytest.approx(node.value, abs=tolerance)
    for child in node.children:
        every_sum_is_right(child, tolerance)


@pytest.mark.parametrize("family", TEXT)
def test_the_children_of_every_node_sum_to_it(family):
    model, ids = tiny_model(family), tiny_inputs(family)[:1]
    sae = random_sae(model)
    tolerance = 2e-5 if family.startswith(IN_FLOAT32) else 1e-9
    for how in ({}, {"top": 200, "threshold": 0.0}, {"depth": 1}):
        tree = recursive_dfa(model, sae, ids, 3, 6, **how)
        assert tree.root.value == pytest.approx(float(dfa(model, sae, ids, 3, 6).pre_activation), abs=tolerance)
        every_sum_is_right(tree.root, tolerance)
    assert max(depth for depth, _ in recursive_dfa(model, sae, ids, 3, 6, depth=1).root.walk()) == 1
    names = {node.name for _, node in tree.root.walk()}
    assert names <= {"rest", "bias", "embed", "layers.0.mlp", "layers.1.attn.z.latent.3"} | {
        f"layers.0.attn.head.{h}" for h in range(HEADS)
    }
    full = recursive_dfa(model, sae, ids, 3, 6, top=200, threshold=0.0)
    heads = [n for _, n in full.root.walk() if ".head." in n.name]
    assert heads and all(n.children for n in heads)  # followed to the tokens
    assert {leaf.name for leaf in full.root.leaves} <= {"rest", "bias", "embed", "layers.0.mlp"}


@pytest.mark.parametrize("family", ["gpt2", "opt-post-norm", "gemma2", "neox-parallel", "bert", "llama-biases"])
def test_earlier_features_take_the_place_of_heads_and_mlps(family):
    model, ids = tiny_model(family), tiny_inputs(family)[:1]
    sae, first = random_sae(model), random_sae(model, layer=0, seed=3)
    d = block_map(model).d_model
    mlp = SparseAutoencoder(d, 15, scale=1.3, site="layers.0.mlp", seed=1).to(F64)
    stream = SparseAutoencoder(d, 15, scale=0.6, site="layers.1.resid_pre", seed=2).to(F64)
    with torch.no_grad():
        mlp.b_dec += 0.3
        stream.b_dec -= 0.2
    tolerance = 2e-5 if family.startswith(IN_FLOAT32) else 1e-9
    tree = recursive_dfa(
        model, sae, ids, 3, 6, earlier={"layers.0.attn.z": first, "layers.0.mlp": mlp}, top=400, threshold=0.0
    )
    every_sum_is_right(tree.root, tolerance)
    names = [node.name for _, node in tree.root.walk()]
    assert any(name.startswith("layers.0.attn.z.latent.") for name in names)
    assert any(name.startswith("layers.0.mlp.latent.") for name in names)
    assert "error of layers.0.attn.z" in names and "bias of layers.0.mlp" in names
    assert not any(".head." in name for name in names) and "layers.0.mlp" not in names
    followed = [n for _, n in tree.root.walk() if "attn.z.latent" in n.name and n.name != tree.root.name]
    assert all(n.children for n in followed)
    # A feature of layer 0 has the same parts as in its own tree, in proportion.
    node = max(followed, key=lambda n: abs(n.value))
    own = recursive_dfa(model, first, ids, int(node.name.rsplit(".", 1)[1]), node.position, top=400, threshold=0.0)
    ratio = node.value / own.root.value
    mine = {(n.name, n.position): n.value for n in node.children}
    for child in own.root.children:
        if (child.name, child.position) in mine:
            assert mine[child.name, child.position] == pytest.approx(child.value * ratio, abs=max(tolerance, 1e-8))
    short = recursive_dfa(model, sae, ids, 3, 6, earlier={"layers.1.resid_pre": stream}, top=400, threshold=0.0)
    every_sum_is_right(short.root, tolerance)
    kinds = {n.name.split(".latent")[0] for n in short.root.children}
    assert kinds == {"layers.1.resid_pre", "error of layers.1.resid_pre", "bias of layers.1.resid_pre", "bias"}


def test_without_attention_before_it_recursion_is_a_product_of_matrices():
    """Layer 0 of GPT-2: LayerNorm of the embedding, value matrix, feature; by hand in numpy."""
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")[:1]
    sae = random_sae(model, layer=0)
    tree = recursive_dfa(model, sae, ids, 5, 4, top=100, threshold=0.0)
    block = model.transformer.h[0]
    x = (model.transformer.wte(ids) + model.transformer.wpe(torch.arange(7)))[0].detach().numpy()
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * block.ln_1.weight.detach().numpy()
    w_v = block.attn.c_attn.weight.detach().numpy()[:, 48:].reshape(24, 4, 6)
    pattern = block_map(model).forward(ids, cache=True)[1].layers[0].pattern[0].detach().numpy()
    readers = sae.readers.numpy()
    for s in range(5):
        share = sum(pattern[h, 4, s] * float(scaled[s] @ w_v[:, h] @ readers[5, h]) for h in range(4))
        node = next(n for n in tree.root.children if (n.name, n.position) == ("embed", s))
        assert node.value == pytest.approx(share, abs=1e-10)


def test_few_parts_and_a_rest():
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")[:1]
    sae = random_sae(model)
    tree = recursive_dfa(model, sae, ids, 3, 6, top=3, depth=2)
    for _, node in tree.root.walk():
        assert len(node.children) <= 5  # three, a rest, the biases
    full = {
        (n.name, n.position): n.value for n in recursive_dfa(model, sae, ids, 3, 6, top=400, threshold=0).root.children
    }
    kept = [n for n in tree.root.children if n.position >= 0]
    assert len(kept) == 3
    largest = sorted((abs(v) for (name, _), v in full.items() if name != "bias"), reverse=True)[:3]
    assert sorted((abs(n.value) for n in kept), reverse=True) == pytest.approx(largest)


# ------------------------------------------------------------------------------------------------------- editing


@pytest.mark.parametrize("family", TEXT)
def test_no_edit_changes_nothing_and_edits_do_what_they_say(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    sae, site = random_sae(model), block_map(model).resolve("layers.1.attn.z")

    def run(*edits):
        with torch.no_grad():
            out = model(ids)
        return getattr(out, "logits", out[0])

    clean, z = run(), capture_z(model, ids, 1).flatten(2)
    with edit_features(model, sae):
        torch.testing.assert_close(run(), clean, atol=1e-6, rtol=1e-6)
    with edit_features(model, sae, error=False):
        rebuilt = run()
    with replace(model, {site: sae(z)[0]}):
        torch.testing.assert_close(rebuilt, run(), atol=1e-9, rtol=1e-9)
    assert (rebuilt - clean).abs().max() > 1e-3
    f = sae.encode(z).detach()
    a, b = f[:, 3].amax(0).topk(2).indices.tolist()
    with ablate_features(model, sae, [a, b], positions=[3]), capture(model, site) as seen:
        run()
    wanted = z.clone()
    wanted[:, 3] -= f[:, 3, a, None] * sae.W_dec[a].detach() + f[:, 3, b, None] * sae.W_dec[b].detach()
    torch.testing.assert_close(seen["layers.1.attn.z"], wanted, atol=1e-9, rtol=1e-9)
    assert f[:, 3, [a, b]].max() > 0
    with edit_features(model, sae, lambda f: f * 2, error=False), capture(model, site) as seen:
        run()
    torch.testing.assert_close(seen["layers.1.attn.z"], sae.decode(2 * f), atol=1e-9, rtol=1e-9)
    assert torch.equal(run(), clean) and hooks_of(model) == 0


def test_gradients_go_through_features_only():
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")
    sae = random_sae(model)
    scales = torch.ones(20, dtype=F64, requires_grad=True)
    with edit_features(model, sae, lambda f: f * scales):
        model(ids).logits[:, -1, 3].sum().backward()
    assert scales.grad is not None
    live = sae.encode(capture_z(model, ids, 1))[:, -1].amax(0) > 0  # after the last layer nothing moves on
    assert ((scales.grad != 0) == live).all() and live.any() and not live.all()


@pytest.mark.parametrize("family", DECODERS)
def test_effects_are_those_of_single_ablations(family):
    model, ids = tiny_model(family), tiny_inputs(family, 3)
    sae = random_sae(model, n_features=6)
    answers = torch.tensor([4, 5, 6])

    def metric(logits):
        return logits[:, -1].gather(1, answers[:, None])[:, 0]

    found = feature_effects(model, sae, ids, metric, position=5, batch=7)
    with torch.no_grad():
        clean = metric(model(ids).logits)
    torch.testing.assert_close(found.metric, clean, atol=1e-6, rtol=1e-6)
    f = sae.encode(capture_z(model, ids, 1)).detach()[:, 5]
    assert found.features.tolist() == (f.amax(0) > 0).nonzero().flatten().tolist()
    torch.testing.assert_close(found.activations, f[:, found.features].T, atol=1e-6, rtol=1e-6)
    for i, feature in enumerate(found.features.tolist()):
        with ablate_features(model, sae, feature, positions=[5]), torch.no_grad():
            effect = metric(model(ids).logits) - clean
        torch.testing.assert_close(found.effects[i], effect, atol=1e-6, rtol=1e-6)
    with edit_features(model, sae, error=False, positions=[5]), torch.no_grad():
        torch.testing.assert_close(found.error, metric(model(ids).logits) - clean, atol=1e-6, rtol=1e-6)
    for padded, mask, offset in padded_either_way(ids) if family in ("gpt2", "llama", "gemma2") else ():
        last = 6 + offset
        other = feature_effects(
            model, sae, padded, lambda x, last=last: x[:, last].gather(1, answers[:, None])[:, 0], 5 + offset, mask
        )
        torch.testing.assert_close(other.effects, found.effects, atol=1e-5, rtol=1e-5)
    assert found.plot() is not None and len(found.to_frame()) == len(found.features)


def test_gradients_estimate_effects_at_every_position():
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2", 3)
    sae = random_sae(model)

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    with torch.no_grad():
        sae.W_dec.mul_(1e-3)  # the smaller the change, the better a first-order estimate
    exact = feature_effects(model, sae, ids, metric)
    quick = feature_effects(model, sae, ids, metric, how="gradient")
    assert quick.features.tolist() == exact.features.tolist()
    assert np.corrcoef(quick.effects.flatten(), exact.effects.flatten())[0, 1] > 0.9999
    assert float(quick.effects.sum()) == pytest.approx(float(exact.effects.sum()), rel=0.01)
    assert quick.error.isnan().all()
    few = feature_effects(model, sae, ids, metric, max_features=3)
    assert len(few.features) == 3


# ---------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("family", DECODERS)
def test_loss_recovered_is_1_for_the_identity_and_0_for_zeros(family):
    model, ids = tiny_model(family), tiny_inputs(family, 4)
    d = HEADS * block_map(model).head_dim
    whole = AttentionSAE.for_layer(model, 1, 2 * d, scale=1.0).to(F64)
    with torch.no_grad():
        eye = torch.eye(d, dtype=F64)
        whole.W_dec.copy_(torch.cat([eye, -eye]))
        whole.W_enc.copy_(torch.cat([eye, -eye]).T)
    found = evaluate_sae(model, whole, [ids])
    assert found.loss_recovered == pytest.approx(1, abs=1e-6)
    assert found.fve == pytest.approx(1, abs=1e-9)
    assert found.l0 == pytest.approx(d, abs=1)
    assert found.tokens == 4 * 6
    with torch.no_grad():
        whole.b_enc.fill_(-1e6)
    nothing = evaluate_sae(model, whole, [ids])
    assert nothing.loss_recovered == pytest.approx(0, abs=1e-6)
    assert (nothing.l0, nothing.dead_fraction) == (0, 1)
    with torch.no_grad():
        logits = model(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.ce_clean == pytest.approx(float(loss), rel=1e-5)
    with replace(model, {block_map(model).resolve("layers.1.attn.z"): 0.0}), torch.no_grad():
        logits = model(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    every = evaluate_sae(model, whole, [ids], skip_first=False)
    assert every.ce_zero == pytest.approx(float(loss), rel=1e-5)
    assert every.tokens == 28


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_evaluation_counts_over_batches_and_leaves_padding_out(family):
    model, ids = tiny_model(family), tiny_inputs(family, 4)
    sae = random_sae(model)
    one = evaluate_sae(model, sae, [ids])
    f = sae.encode(capture_z(model, ids, 1))[:, 1:].detach()
    assert one.l0 == pytest.approx(float((f > 0).sum(-1).double().mean()))
    torch.testing.assert_close(one.density, (f > 0).double().mean((0, 1)))
    parts = evaluate_sae(model, sae, [ids[:1], ids[1:]])
    padded = [evaluate_sae(model, sae, [(x, mask)]) for x, mask, _ in padded_either_way(ids)]
    for other in (parts, *padded):
        for name in ("l0", "fve", "ce_clean", "ce_sae", "ce_zero", "tokens"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5)
    assert one.plot() is not None and len(one.to_frame()) == 1


def test_agreement_with_a_rule():
    rule = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
    value = torch.tensor([3.0, 2.0, 1.0, 0, 0.5, 0, 0, 0, 0, 0])
    found = specificity_sensitivity(value, rule)
    assert (found.sensitivity, found.specificity, found.precision) == (0.75, pytest.approx(5 / 6), 0.75)
    assert found.weighted_precision == pytest.approx(6 / 6.5)
    from sklearn.metrics import roc_auc_score

    draw = generator(0)
    value = torch.randn(2, 300, generator=draw).clamp_min(0)
    rule = torch.rand(2, 300, generator=draw) < 0.3
    found = specificity_sensitivity(value, rule)
    assert found.auc == pytest.approx(roc_auc_score(rule.flatten(), value.flatten()))
    perfect = specificity_sensitivity(rule * 2.0, rule)
    assert (perfect.auc, perfect.sensitivity, perfect.specificity, perfect.precision) == (1, 1, 1, 1)
    assert (perfect.by_decile == 1).all()
    never = specificity_sensitivity(torch.zeros(4), torch.tensor([True, False, False, True]))
    assert math.isnan(never.precision) and never.auc == 0.5
    assert found.plot() is not None and len(found.to_frame()) == 1


# ----------------------------------------------------------------------------------------------------- induction


def test_texts_hold_a_run_twice_and_no_other_repetition():
    for p in (1, 2, 5):
        ids, query, target = _texts(200, p, 14, torch.arange(100, 130), generator(p))
        for row, q, t in zip(ids.tolist(), query.tolist(), target.tolist(), strict=True):
            assert row[q - p + 1 : q + 1] == row[t - p : t]
            assert t < q - p + 2 and len(set(row)) == 14 - p
            assert q == 13 or row[q + 1] != row[t]
            assert min(row) >= 100


def test_matching_counts_tokens_before():
    ids = torch.tensor([[9, 1, 2, 3, 9, 1, 2, 3, 4]])
    run = _matching(ids, None)[0]
    assert run[6, 3] == 3  # "9 1 2" before 3, and up to position 6
    assert run[4, 1] == 0  # what follows the first token does not count
    assert run[5, 2] == 2
    assert run[7, 4] == 4  # 9 1 2 3
    assert run.sum() == 3 + 2 + 4
    mask = torch.tensor([[1] * 7 + [0] * 2])
    assert _matching(ids, mask)[0].sum() == 3 + 2


def test_the_planted_induction_head_scores_and_the_others_do_not():
    from broadsheet.data.planted import PlantedInduction

    model = PlantedInduction(beta=16.0, vocab=16, length=24, n_noise=2, noise=0.02)
    found = prefix_induction_scores(model, lengths=(1, 2, 3), samples=40, length=12, tokens=range(16), batch=16)
    assert found.attention.shape == (2, 3, 3)
    assert (found.attention[1, 0] > 0.9).all()
    others = found.attention.clone()
    others[1, 0] = 0
    assert others.max() < 0.5
    assert found.logits is not None and (found.logits[1, 0] > 0.8).all()
    rest = found.logits.clone()
    rest[1, 0] = 0
    assert rest.abs().max() < 0.3
    assert found.long_prefix() == []
    assert len(found.to_frame()) == 2 * 3 * 3 and found.plot() is not None
    again = prefix_induction_scores(model, lengths=(1, 2, 3), samples=40, length=12, tokens=range(16), batch=40)
    torch.testing.assert_close(again.attention.shape, found.attention.shape)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bert"])
def test_prefix_scores_are_the_model_s_own_attention(family):
    model = tiny_model(family)
    found = prefix_induction_scores(
        model, lengths=(2,), samples=5, length=8, tokens=range(2, VOCAB), bos_token_id=0, generator=generator(3)
    )
    ids, query, target = _texts(5, 2, 8, torch.arange(2, VOCAB), generator(3))
    ids = torch.cat([torch.zeros(5, 1, dtype=torch.long), ids], 1)
    layers = block_map(model).forward(ids, cache=True)[1].layers
    for layer in range(2):
        own = layers[layer].pattern[torch.arange(5), :, query + 1, target + 1].mean(0)
        torch.testing.assert_close(found.attention[layer, :, 0], own.detach(), atol=1e-6, rtol=1e-6)
    assert (found.logits is None) == (family == "bert")


def test_natural_prefixes_tell_long_from_short():
    from broadsheet.data.planted import PlantedInduction

    model = PlantedInduction(beta=16.0, vocab=16, length=24, n_noise=0)
    model.config = type("Config", (), {"vocab_size": 16})()
    draw = generator(0)
    half = torch.stack([torch.randperm(15, generator=draw)[:9] for _ in range(12)])
    ids = torch.cat([torch.full((12, 1), 15), half, half], 1)
    found = natural_prefixes(model, [ids])
    assert found.count[0, 0] == 0
    assert found.count[1, 0] >= 12 * 7
    assert found.prefix[1, 0] > 2
    assert found.compared[1, 0] > 50
    # The planted head needs one token only: it goes on attending when the one before is another.
    assert found.kept[1, 0] > 0.95
    frame = found.to_frame()
    assert frame["head"].tolist() == ["layers.1.attn.head.0"]


def test_spellings_count_as_the_same_token():
    from broadsheet.data.planted import PlantedInduction

    model = PlantedInduction(beta=16.0, vocab=6, length=8, n_noise=0)
    model.config = type("Config", (), {"vocab_size": 6})()

    class Words:
        def decode(self, ids):
            return ["a", " A", "b", "c", "d", "e"][ids[0]]

    ids = torch.tensor([[5, 3, 0, 2, 3, 0, 2]])
    changed = torch.tensor([[5, 3, 1, 2, 3, 0, 2]])  # " A" in the first run
    exact = natural_prefixes(model, [changed])
    fuzzy = natural_prefixes(model, [changed], tokenizer=Words())
    plain = natural_prefixes(model, [ids])
    # The head goes by the token itself. The second "c" matches one token, the second "b" one ("a" is another token than
    # " A"), or three where both count as the same; with "a" in both places there is the second "a" too, which matches two.
    assert [int(found.count[1, 0]) for found in (exact, fuzzy, plain)] == [2, 2, 3]
    assert [float(found.prefix[1, 0]) for found in (exact, fuzzy, plain)] == [1, 2, 2]


# --------------------------------------------------------------------------------------- training and exchange


@pytest.fixture(scope="module")
def planted():
    """Features that live in one head each, and an autoencoder trained on them."""
    draw = generator(1)
    heads, d_head, k = 3, 6, 24
    home = torch.arange(k) % heads
    directions = torch.zeros(k, heads, d_head)
    for i in range(k):
        directions[i, home[i]] = torch.randn(d_head, generator=draw)
    directions = (directions / directions.flatten(1).norm(dim=1)[:, None, None]).flatten(1)
    amounts = (torch.rand(12_000, k, generator=draw) < 0.03) * (0.5 + torch.rand(12_000, k, generator=draw))
    x = amounts @ directions + 0.3
    sae = AttentionSAE(heads, d_head, 48, site="layers.0.attn.z")
    sae.fit(RowBatches(x, 256, generator(1)), steps=600, l1=1.0, lr=2e-2, warmup=30)
    return sae, directions, home, x


def test_planted_features_and_their_home_heads_are_found(planted):
    sae, directions, home, _ = planted
    match = match_directions(directions, sae.W_dec.detach())
    assert match.mean > 0.95
    shares = head_weights(sae)[match.index]
    assert (shares.argmax(1) == home).double().mean() > 0.95
    assert shares.gather(1, home[:, None]).mean() > 0.9


def test_trained_on_a_model_s_own_stream():
    model = tiny_model("llama", torch.float32)
    sae = AttentionSAE.for_layer(model, 1, 48)
    texts = [tiny_inputs("llama", 16, seed=i) for i in range(8)]
    buffer = ActivationBuffer(model, sae.site, texts, batch_size=64, buffer_batches=4, generator=generator(0))
    report = sae.fit(buffer, steps=120, l1=0.05, lr=1e-2, warmup=10)
    after = evaluate_sae(model, sae, texts)
    assert report.losses[-1] < report.losses[0] / 2
    assert after.fve > 0.9
    assert abs(after.ce_sae - after.ce_clean) < 0.1 * abs(after.ce_zero - after.ce_clean)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-6, rtol=0)


def test_save_and_load(planted, tmp_path):
    sae, x = planted[0], planted[3][:20]
    sae.bos_token_id = 7
    sae.save_pretrained(tmp_path / "own")
    again = AttentionSAE.from_pretrained(tmp_path / "own")
    sae.bos_token_id = None
    assert torch.equal(again(x)[0], sae(x)[0])
    assert (again.n_heads, again.d_head, again.site, again.bos_token_id) == (3, 6, "layers.0.attn.z", 7)


def test_saelens_files_both_ways(planted, tmp_path):
    sae, x = planted[0], planted[3][:50]
    sae.save_saelens(tmp_path / "lens", model_name="tiny")
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert config["metadata"]["hook_name"] == "blocks.0.attn.hook_z"
    again = AttentionSAE.from_saelens(tmp_path / "lens", n_heads=3)
    assert again.site == "layers.0.attn.z"
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again(x)[0], sae(x)[0], atol=1e-5, rtol=1e-4)
    lens = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    theirs = lens.SAE.load_from_disk(tmp_path / "lens")
    z = sae.heads_apart(x)
    with torch.no_grad():
        f, rebuilt = theirs.encode(z), theirs(z)
    torch.testing.assert_close(f, sae.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rebuilt.flatten(-2), sae(x)[0], atol=1e-5, rtol=1e-4)
    theirs.save_model(tmp_path / "theirs")
    back = AttentionSAE.from_saelens(tmp_path / "theirs", n_heads=3)
    torch.testing.assert_close(back(x)[0], sae(x)[0], atol=1e-5, rtol=1e-4)


def write_official(folder, draw, d=12, n=20, name="gpt2-small_L3_Hcat_z", **config):
    weights = {
        "W_enc": torch.randn(d, n, generator=draw), "W_dec": torch.randn(n, d, generator=draw),
        "b_enc": torch.randn(n, generator=draw), "b_dec": torch.randn(d, generator=draw),
    }  # fmt: skip
    torch.save(weights, folder / f"{name}.pt")
    about = {"act_size": d, "dict_size": n, "act_name": "blocks.3.attn.hook_z", "model_name": "gpt2-small", **config}
    (folder / f"{name}_cfg.json").write_text(json.dumps(about))
    return weights, folder / f"{name}.pt"


def test_the_released_checkpoints_are_read(tmp_path):
    weights, file = write_official(tmp_path, generator(0))
    sae = AttentionSAE.from_official(file, n_heads=3, bos_token_id=5)
    assert (sae.site, sae.d_head, sae.n_features, sae.bos_token_id) == ("layers.3.attn.z", 4, 20, 5)
    w = {name: value.double().numpy() for name, value in weights.items()}
    x = torch.randn(9, 12, generator=generator(1))
    f = np.maximum((x.double().numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), f, atol=1e-4)
    np.testing.assert_allclose(sae(x)[0].detach().numpy(), f @ w["W_dec"] + w["b_dec"], atol=1e-4)
    _, small = write_official(tmp_path, generator(0), d=768, n=4, name="small")
    assert AttentionSAE.from_official(small).n_heads == 12
    with pytest.raises(InvalidInput, match="n_heads"):
        AttentionSAE.from_official(file)
    with pytest.raises(InvalidInput, match="n_heads=5"):
        AttentionSAE.from_official(file, n_heads=5)
    with pytest.raises(CheckpointError, match="none_cfg"):
        AttentionSAE.from_official(tmp_path / "none.pt", n_heads=3)
    torch.save({"W_enc": weights["W_enc"]}, file)
    with pytest.raises(CheckpointError, match="W_dec"):
        AttentionSAE.from_official(file, n_heads=3)
    _, other = write_official(tmp_path, generator(0), act_name="blocks.3.hook_mlp_out")
    with pytest.raises(CheckpointError, match="hook_mlp_out"):
        AttentionSAE.from_official(other, n_heads=3)


# --------------------------------------------------------------------------------------------------------- cards


def test_cards_show_heads_and_the_tokens_read():
    model = tiny_model("gpt2", torch.float32)
    sae = random_sae(model, dtype=torch.float32)
    texts = [tiny_inputs("gpt2", 4, seed=i) for i in range(5)]
    cards = latent_cards(model, sae, [3, 8], texts, k=3, per_decile=1, generator=generator(0))
    shares = head_weights(sae)
    for card, index in zip(cards, (3, 8), strict=True):
        assert dict(card.parts) == pytest.approx({f"head {h}": float(shares[index, h]) for h in range(4)})
        assert [e.activation for e in card.top] == sorted((e.activation for e in card.top), reverse=True)
        for e in card.top:
            ids = torch.tensor([e.token_ids])
            found = dfa(model, sae, ids, index, e.place)
            assert float(found.activation) == pytest.approx(e.activation, rel=1e-4)
            np.testing.assert_allclose(e.sources, found.by_source[0].numpy(), atol=1e-5)
    assert "head 2" in feature_page(cards)
    bare = latent_cards(model, sae, 3, texts, sources=False)
    assert all(e.sources is None for e in bare[0].top)


def test_a_latent_goes_to_every_other_method():
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")
    sae = random_sae(model)
    feature = sae.feature(3)
    assert isinstance(feature, Feature)
    z = capture_z(model, ids, 1)
    torch.testing.assert_close(feature.activations(model, ids), sae.encode(z)[..., 3].detach(), atol=1e-6, rtol=1e-6)
    with feature.ablated(model), torch.no_grad():
        one = model(ids).logits
    with ablate_features(model, sae, 3), torch.no_grad():
        torch.testing.assert_close(one, model(ids).logits, atol=1e-6, rtol=1e-6)
    o = block_map(model).blocks[1].attention.o
    torch.testing.assert_close(feature.in_residual(model), sae.W_dec[3].detach() @ o.weight.detach())


# ----------------------------------------------------------------------------------------------------- bad input


def test_bad_input(tmp_path):
    model, ids = tiny_model("gpt2"), tiny_inputs("gpt2")
    sae = random_sae(model)
    other = AttentionSAE(5, 6, 8, site="layers.1.attn.z")
    cases: list[tuple[Any, str]] = [
        (lambda: AttentionSAE(0, 4), "n_heads=0"),
        (lambda: AttentionSAE.for_layer(model, 2), "2 layers"),
        (lambda: dfa(model, sae, ids, 20), r"feature 20.*0 to 19"),
        (lambda: dfa(model, sae, ids, -1), "feature -1"),
        (lambda: dfa(model, sae, ids, torch.tensor([1, 2, 3])), "3 indices"),
        (lambda: dfa(model, sae, ids, 1, 7), "positions=7"),
        (lambda: dfa(model, other, ids, 1), r"5 heads of 6.*4 of 6"),
        (lambda: evaluate_sae(model, other, [ids]), "5 heads"),
        (lambda: dfa(model, AttentionSAE(4, 6, 8), ids, 1), "site=''"),
        (lambda: dfa(model, AttentionSAE(4, 6, 8, site="layers.9.attn.z"), ids, 1), "2 layers"),
        (lambda: recursive_dfa(model, sae, ids, 1), "2 texts"),
        (lambda: recursive_dfa(model, sae, ids[:1], 1, depth=0), "depth=0"),
        (lambda: recursive_dfa(model, sae, ids[:1], 1, earlier={"layers.0.mlp.act": sae}), "layers.0.mlp.act"),
        (
            lambda: recursive_dfa(model, sae, ids[:1], 1, earlier={"layers.0.attn.z": SparseAutoencoder(24, 8)}),
            "Attention",
        ),
        (lambda: feature_effects(model, sae, ids, lambda x: x.sum(), how="shapley"), "shapley"),
        (lambda: feature_effects(model, sae, ids, lambda x: x.sum()), "one number for each text"),
        (lambda: evaluate_sae(model, sae, []), "nothing to evaluate"),
        (lambda: specificity_sensitivity(torch.ones(3), torch.ones(4).bool()), "shape"),
        (lambda: specificity_sensitivity(torch.ones(3), torch.ones(3).bool()), "3 of 3"),
        (lambda: top_features(sae, 4), "head=4"),
        (lambda: head_attribution(sae, torch.zeros(2, 3, 6), 1), "expected"),
        (lambda: prefix_induction_scores(model, lengths=(9,), length=12, tokens=range(2, 29)), "fit twice"),
        (lambda: prefix_induction_scores(model, length=40), "29 tokens"),
        (lambda: prefix_induction_scores(nn_without_vocabulary()), "blocks are unknown"),
    ]
    for call, word in cases:
        with pytest.raises((InvalidInput, UnsupportedModel), match=word):
            call()
    silent = random_sae(model)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    with pytest.raises(InvalidInput, match="no feature is active"):
        feature_effects(model, silent, ids, lambda x: x[:, -1, 3])
    sae.bos_token_id = 0
    with pytest.raises(InvalidInput, match="BOS"):
        evaluate_sae(model, sae, [ids])
    begun = ids.clone()
    begun[:, 0] = 0
    assert evaluate_sae(model, sae, [begun]).tokens == 12


def nn_without_vocabulary():
    return nn.Sequential(nn.Linear(2, 2))
