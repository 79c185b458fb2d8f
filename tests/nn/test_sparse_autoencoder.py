"""Autoencoders: the loss is what it says, directions of length 1, planted features found, files exchanged."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from broadsheet.errors import CheckpointError, InvalidInput, TrainingDiverged
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.matching import match_directions
from broadsheet.nn.seeding import generator
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.nn.tiny_models import tiny_inputs, tiny_model


def planted(n: int, d: int = 16, k: int = 24, chance: float = 0.06, seed: int = 0, offset: float = 1.0):
    """Activations made of few of ``k`` directions, their directions and amounts."""
    draw = generator(seed)
    directions = torch.randn(k, d, generator=generator(99))
    directions /= directions.norm(dim=1, keepdim=True)
    amounts = (torch.rand(n, k, generator=draw) < chance) * (0.5 + torch.rand(n, k, generator=draw))
    return amounts @ directions + offset, directions, amounts


def batches(x: torch.Tensor, size: int = 512):
    return DataLoader(x, batch_size=size, shuffle=True, generator=generator(1))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained():
    x, directions, _ = planted(20_000)
    sae = SparseAutoencoder(16, 48, site="layers.0.mlp")
    report = sae.fit(batches(x), steps=1500, l1=0.6, lr=3e-3, warmup=50, resample_every=500)
    return sae, directions, report


def test_planted_features_are_found(trained):
    sae, directions, report = trained
    match = match_directions(directions, sae.W_dec.detach())
    assert match.mean > 0.95
    x, _, amounts = planted(4000, seed=7)
    f = sae.encode(x)
    found = np.corrcoef(amounts[:, 3], f[:, match.index[3]].detach())[0, 1]
    assert found > 0.9
    figures = sae.statistics([x[:1000], x[1000:]])
    assert figures["l0"] < 6
    assert figures["fve"] > 0.75  # the rest is what l1 shrinks
    assert report.losses[-1] < report.losses[0] / 4
    untrained = SparseAutoencoder(16, 48, scale=1.0)
    assert match_directions(directions, untrained.W_dec.detach()).mean < 0.8


def test_rows_keep_length_one_and_the_gradient_is_across_them():
    x = planted(2000)[0]
    sae = SparseAutoencoder(16, 20)
    seen = []

    def look(step, model):
        seen.append(model.W_dec.grad.detach().clone())

    original = sae._across

    def watched(gradient):
        changed = original(gradient)
        seen.append(float((changed * sae.W_dec.detach()).sum(1).abs().max() / gradient.abs().max()))
        assert not torch.equal(changed, gradient)
        return changed

    sae._across = watched  # type: ignore[method-assign]
    sae.fit(batches(x), steps=5, l1=0.1)
    assert len(seen) == 5
    assert max(seen) < 1e-5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_the_first_step_s_loss_is_the_formula():
    x = planted(64)[0]
    sae = SparseAutoencoder(16, 20, seed=3)
    report = sae.fit([x], steps=1, l1=0.7)
    scale = 4 / float(x.norm(dim=1).mean())
    assert float(sae.scale) == pytest.approx(scale, rel=1e-5)
    fresh = SparseAutoencoder(16, 20, seed=3)
    xs = (x * scale).double().numpy()
    w, v = fresh.W_enc.detach().double().numpy(), fresh.W_dec.detach().double().numpy()
    f = np.maximum(xs @ w, 0)
    loss = ((xs - f @ v) ** 2).sum(1).mean() + 0.7 * f.sum(1).mean()
    assert report.losses[0] == pytest.approx(loss, rel=1e-5)
    plain = SparseAutoencoder(16, 20, scale=1.0)
    plain.fit([x], steps=1)
    assert float(plain.scale) == 1


def test_units_are_the_model_s(trained):
    """Whatever the scale, features and reconstruction are in the units of the activations."""
    sae = trained[0]
    x = planted(50, seed=5)[0]
    rebuilt, f = sae(x)
    torch.testing.assert_close(rebuilt, f @ sae.W_dec + sae.b_dec / sae.scale)
    assert (x - rebuilt).square().mean() < x.var() / 4
    for index in (0, 7):
        torch.testing.assert_close(sae.feature(index).read(x), f[:, index], atol=1e-5, rtol=1e-4)
    doubled = SparseAutoencoder(16, 48, scale=float(sae.scale) / 2)
    doubled.load_state_dict({**sae.state_dict(), "scale": sae.scale / 2})
    torch.testing.assert_close(doubled.encode(2 * x), 2 * f)


def test_a_latent_is_a_feature_of_the_model():
    model = tiny_model("gpt2", torch.float32)
    ids = tiny_inputs("gpt2")
    sae = SparseAutoencoder(24, 30, scale=1.0, site="layers.1.attn.z")
    with torch.no_grad():
        sae.b_enc += 0.3
    feature = sae.feature(4)
    with capture(model, block_map(model).resolve(sae.site)) as seen, torch.no_grad():
        model(ids)
    z = seen[sae.site]
    values = feature.activations(model, ids)
    assert values.max() > 0
    torch.testing.assert_close(values, sae.encode(z)[..., 4].detach(), atol=1e-5, rtol=1e-5)
    with feature.ablated(model), capture(model, block_map(model).resolve(sae.site)) as seen, torch.no_grad():
        model(ids)
    torch.testing.assert_close(seen[sae.site], z - values[..., None] * sae.W_dec[4].detach(), atol=1e-5, rtol=1e-5)


def test_resampled_features_point_to_what_is_badly_rebuilt():
    sae = SparseAutoencoder(16, 20, scale=1.0)
    x = torch.zeros(100, 16)
    x[:, 0] = 0.01
    x[17] = torch.eye(16)[5] * 3
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
    sum(p.sum() for p in sae.parameters()).backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    dead = torch.zeros(20, dtype=torch.bool)
    dead[3] = True
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    before["W_dec"] = sae.W_dec.detach().clone()
    sae.resample(dead, x, generator(0), optimizer)
    wanted = x[17] - before["b_dec"]
    torch.testing.assert_close(sae.W_dec[3].detach(), wanted / wanted.norm())
    size = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, 3].norm().detach(), size)
    assert float(sae.b_enc[3]) == 0
    for name, index in (("W_dec", 3), ("W_enc", (slice(None), 3)), ("b_enc", 3)):
        state = optimizer.state[getattr(sae, name)]
        assert (state["exp_avg"][index] == 0).all()
        assert (state["exp_avg_sq"][index] == 0).all()
    torch.testing.assert_close(sae.W_dec[~dead], before["W_dec"][~dead])
    assert optimizer.state[sae.W_dec]["exp_avg"].abs().sum() > 0


def test_resampling_brings_dead_features_back():
    x = planted(20_000)[0]
    dead = {}
    for every in (None, 150):
        sae = SparseAutoencoder(16, 64)
        with torch.no_grad():
            sae.b_enc[:40] = -50  # they never fire
        sae.fit(batches(x), steps=600, l1=0.4, lr=3e-3, warmup=20, resample_every=every)
        dead[every] = sae.statistics([x])["dead_fraction"]
    assert dead[None] >= 40 / 64
    assert dead[150] < 0.3


def test_permuting_features_permutes_everything():
    x = planted(30)[0]
    sae = SparseAutoencoder(16, 20, scale=1.0)
    order = torch.randperm(20, generator=generator(0))
    other = SparseAutoencoder(16, 20, scale=1.0)
    state = sae.state_dict()
    other.load_state_dict(
        {**state, "W_dec": state["W_dec"][order], "W_enc": state["W_enc"][:, order], "b_enc": state["b_enc"][order]}
    )
    torch.testing.assert_close(other.encode(x), sae.encode(x)[:, order])
    torch.testing.assert_close(other(x)[0], sae(x)[0])


def test_statistics_count_what_they_say():
    sae = SparseAutoencoder(3, 3, scale=1.0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3))
        sae.W_enc.copy_(torch.eye(3))
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    figures = sae.statistics([x[:1], x[1:]])
    assert figures["l0"] == 1.0
    torch.testing.assert_close(figures["density"], torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    assert figures["dead_fraction"] == pytest.approx(1 / 3)
    variance = float(((x - x.mean(0)) ** 2).sum())
    assert figures["fve"] == pytest.approx(1 - 1 / variance)  # only the -1 is lost


def test_save_and_load(trained, tmp_path):
    sae = trained[0]
    sae.save_pretrained(tmp_path / "own")
    again = SparseAutoencoder.from_pretrained(tmp_path / "own")
    x = planted(20, seed=3)[0]
    assert torch.equal(again(x)[0], sae(x)[0])
    assert again.site == "layers.0.mlp"


def test_saelens_files_are_exchanged(trained, tmp_path):
    sae = trained[0]
    sae.save_saelens(tmp_path / "lens", model_name="tiny", hook_name="blocks.0.hook_mlp_out")
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"], config["metadata"]["model_name"]) == (16, 48, "tiny")
    again = SparseAutoencoder.from_saelens(tmp_path / "lens", site="layers.0.mlp")
    x = planted(20, seed=3)[0]
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again(x)[0], sae(x)[0], atol=1e-5, rtol=1e-4)


def test_a_saelens_file_that_leaves_the_decoder_s_bias_in(tmp_path):
    draw = generator(0)
    weights = {
        "W_enc": torch.randn(4, 6, generator=draw), "W_dec": torch.randn(6, 4, generator=draw),
        "b_enc": torch.randn(6, generator=draw), "b_dec": torch.randn(4, generator=draw),
    }  # fmt: skip
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "apply_b_dec_to_input": False}))
    x = torch.randn(5, 4, generator=draw)
    f = torch.relu(x @ weights["W_enc"] + weights["b_enc"])
    sae = SparseAutoencoder.from_saelens(tmp_path)
    torch.testing.assert_close(sae.encode(x).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x)[0].detach(), f @ weights["W_dec"] + weights["b_dec"], atol=1e-5, rtol=1e-5)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "gated"}))
    with pytest.raises(CheckpointError, match="gated"):
        SparseAutoencoder.from_saelens(tmp_path)
    with pytest.raises(CheckpointError, match=r"cfg\.json"):
        SparseAutoencoder.from_saelens(tmp_path / "nowhere")
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == set(weights)


def test_bad_input():
    x = planted(64)[0]
    sae = SparseAutoencoder(16, 20)
    for bad, how, word in (
        ([], {}, "batches is empty"),
        ([x[:, :3]], {}, "takes 16"),
        ([x * 0], {}, "all zero"),
        ([x * torch.nan], {}, "NaN"),
        ([x], {"l1": -1.0}, "l1=-1"),
        ([x], {"lr": float("inf")}, "lr=inf"),
    ):
        with pytest.raises(InvalidInput, match=word):
            sae.fit(bad, steps=1, **how)
    with pytest.raises(InvalidInput, match="n_features=0"):
        SparseAutoencoder(3, 0)
    with pytest.raises(InvalidInput, match="scale=0"):
        SparseAutoencoder(3, 2, scale=0)
    with pytest.raises(InvalidInput, match="feature 20"):
        SparseAutoencoder(16, 20, site="layers.0.mlp").feature(20)
    with pytest.raises(InvalidInput, match="does not know its place"):
        sae.feature(1)
    with pytest.raises(InvalidInput, match="batches is empty"):
        sae.statistics([])


def test_all_dead_is_told():
    x = planted(512)[0]
    sae = SparseAutoencoder(16, 20)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(TrainingDiverged, match="every feature is dead"):
        sae.fit(itertools.repeat(x), steps=3)


def test_training_computes_the_same_features_and_gradients():
    x = planted(40)[0].double()
    sae = SparseAutoencoder(16, 20, scale=1.7).double()
    with torch.no_grad():
        sae.b_dec += 0.3
        sae.b_enc -= 0.1
    found = {}
    for training in (True, False):
        sae.train(training)
        rebuilt, f = sae(x)
        sae.zero_grad()
        ((x - rebuilt).square().sum() + f.sum()).backward()
        found[training] = (f.detach(), *(p.grad.clone() for p in sae.parameters()))
    for fast, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-8)
    assert found[True][0].count_nonzero() > 50
