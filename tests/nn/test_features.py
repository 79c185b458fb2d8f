"""Features: read, ablated, clamped, steered and attributed alike on every family; and what they rest on."""

import pytest
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import FIELDS, Feature, Projection, mapped, neuron, site_width, unembedding
from broadsheet.nn.hooks import capture
from broadsheet.nn.tiny_models import FAMILIES, tiny_inputs, tiny_model

DECODERS = [
    "gpt2", "neox-parallel", "neox-sequential", "llama", "mistral-window", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3", "opt", "gpt-neo",
]  # fmt: skip
SITES = [f"layers.1.{part}" for part in FIELDS]


def direction(model: nn.Module, site: str, seed: int = 1) -> Tensor:
    width = site_width(model, site)
    return torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **how: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids, **how)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", [*DECODERS, "bert", "vit"])
def test_widths_and_values_are_those_of_the_model(family: str, site: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    where = block_map(model).resolve(site)
    with capture(model, where) as seen, torch.no_grad():
        model(ids)
    value = seen[site]
    assert value.shape[-1] == site_width(model, site)
    feature = Feature(site, direction(model, site))
    expected = value @ feature.write / feature.write.square().sum()
    torch.testing.assert_close(feature.activations(model, ids), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("site", ["layers.0.attn.z", "layers.1.mlp.act", "layers.0.resid_post", "layers.1.attn"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert"])
def test_edits_reach_the_wanted_activation_and_nothing_else(family: str, site: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    feature = Feature(site, direction(model, site))
    where = block_map(model).resolve(site)
    with capture(model, where) as seen, torch.no_grad():
        model(ids)
    clean = seen[site]
    for edit, wanted in (
        (feature.ablated(model), torch.zeros(clean.shape[:2], dtype=torch.float64)),
        (feature.clamped(model, 2.5), torch.full(clean.shape[:2], 2.5, dtype=torch.float64)),
        (feature.steered(model, 3.0), feature.read(clean) + 3.0 / feature.write.norm()),
    ):
        with edit, capture(model, where) as seen, torch.no_grad():
            model(ids)
        now = seen[site]
        torch.testing.assert_close(feature.read(now), wanted, atol=1e-10, rtol=0)
        # what is orthogonal to the direction stands as it stood
        across = now - clean - feature.read(now - clean)[..., None] * feature.write
        assert across.abs().max() < 1e-10
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_changes_where_nothing_is_asked() -> None:
    model = tiny_model("llama", torch.float32)
    ids = tiny_inputs("llama")
    feature = Feature("layers.1.mlp.act", direction(model, "layers.1.mlp.act").float())
    clean = logits(model, ids)
    with feature.steered(model, 0.0):
        assert torch.equal(logits(model, ids), clean)
    with pytest.raises(RuntimeError), feature.steered(model, 1.0):
        raise RuntimeError
    assert torch.equal(logits(model, ids), clean)
    with feature.steered(model, 1.0, positions=slice(0, 2)):
        steered = logits(model, ids)
    assert not torch.equal(steered, clean)
    with feature.steered(model, 1.0, positions=-1):
        last = logits(model, ids)
    assert torch.equal(last[:, :-1], clean[:, :-1])
    assert not torch.equal(last[:, -1], clean[:, -1])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "neox-parallel"])
def test_steering_while_generating_is_the_same_with_and_without_cache(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)[:, :3]
    feature = Feature("layers.0.mlp.act", direction(model, "layers.0.mlp.act"))
    made = []
    for cached in (True, False):
        with feature.steered(model, 4.0):
            made.append(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None))
    assert torch.equal(*made)
    assert made[0].shape == (2, 8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "neox-sequential"])
def test_padding_changes_nothing_on_either_side(family: str, side: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    feature = Feature("layers.1.resid_post", direction(model, "layers.1.resid_post"))
    short = ids[1:, :4]
    alone = feature.activations(model, short)
    padding = torch.ones(1, 3, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding], 1)
    mask = torch.cat([padding * 0, short * 0 + 1] if side == "left" else [short * 0 + 1, padding * 0], 1)
    batch, masks = torch.cat([ids[:1], row]), torch.cat([torch.ones_like(mask), mask])
    together = feature.activations(model, batch, masks)
    kept = slice(3, None) if side == "left" else slice(0, 4)
    torch.testing.assert_close(together[1, kept], alone[0], atol=1e-12, rtol=0)
    assert (together[1][masks[1] == 0] == 0).all()
    torch.testing.assert_close(together[:1], feature.activations(model, ids[:1]), atol=1e-12, rtol=0)
    made = feature.attribution(model, batch, masks)
    single = feature.attribution(model, short)
    torch.testing.assert_close(made.activation[1], single.activation[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(made.heads[1, ..., kept], single.heads[0], atol=1e-12, rtol=0)
    assert int(made.position[1]) == int(single.position[0]) + (3 if side == "left" else 0)


def test_a_linear_model_s_attribution_is_exact() -> None:
    """Without norms and nonlinearities gradient times activation is what the parts really wrote."""
    from broadsheet.nn.blocks import MLP, Attention, Block, BlockMap, Linear

    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def block() -> Block:
        q, k, v, o = (Linear(random(6, 6)) for _ in range(4))
        return Block(Attention(2, 3, q, k, v, o), MLP(Linear(random(6, 5)), Linear(random(5, 6)), lambda x: x))

    model = nn.Embedding(9, 6).double()
    the_map = BlockMap(model, (block(),), embed=lambda ids, mask: model(ids))
    ids = torch.tensor([[1, 4, 2], [3, 3, 8]])
    write = random(6)
    feature = Feature("layers.0.resid_post", write)
    object.__setattr__(feature, "_site", lambda _: None)  # a map made by hand has no places to hook
    found = feature.attribution(the_map, ids, position=2)
    layer = the_map.forward(ids, cache=True)[1].layers[0]
    read = write / write.square().sum()
    mlp = the_map.blocks[0].mlp
    torch.testing.assert_close(found.mlps.sum((1, 2)), (layer.mlp_out[:, 2] @ read).detach())
    assert (found.mlps[:, 0, :2] == 0).all()
    for head in range(2):
        z = torch.zeros_like(layer.z)
        z[:, :, head] = layer.z[:, :, head].detach()
        out = z.flatten(2)[:, 2] @ the_map.blocks[0].attention.o.weight
        torch.testing.assert_close(found.heads[:, 0, head].sum(1), (out + mlp(out)) @ read)


def test_attribution_finds_the_head_that_wrote_the_feature() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2", batch=4)
    the_map = block_map(model)
    o = the_map.blocks[1].attention.o.weight
    size = the_map.head_dim
    feature = Feature("layers.1.attn", o[2 * size].clone(), name="head 2's")
    table = feature.attribution(model, ids).to_frame()
    assert set(table.columns) == {"component", "attribution"}
    assert len(table) == 1 + 2 * 5
    by_head = table[table["component"].str.startswith("layers.1.attn.head")].set_index("component")["attribution"]
    # the direct parts of layer 1's heads add up to the activation without the matrix' bias
    bias = feature.read(the_map.blocks[1].attention.o.bias.detach())
    activation = feature.attribution(model, ids).activation.mean()
    assert by_head.sum() == pytest.approx(float(activation - bias), abs=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_promoted_tokens_are_those_whose_logits_rise(family: str) -> None:
    """A large step along a feature of the last layer orders the logits as its effect says."""
    model = tiny_model(family)
    site = "layers.1.resid_post"
    feature = Feature(site, direction(model, site))
    effect = feature.logit_effect(model)
    with feature.steered(model, 1e7):
        far = logits(model, tiny_inputs(family))[0, -1]
    bias = unembedding(model).bias
    far = far if bias is None else far - bias
    if family == "gemma2":  # its soft cap squeezes, in order
        assert torch.equal(effect.argsort(), (effect / effect.std()).argsort())
        assert far.argmax() in effect.topk(3).indices
    else:
        norm_bias = block_map(model).final_norm.bias
        far = far if norm_bias is None else far - norm_bias @ unembedding(model).weight
        torch.testing.assert_close(far / far.norm(), effect / effect.norm(), atol=1e-5, rtol=0)
    table = feature.promoted(model, k=3)
    assert table["token_id"].tolist()[0] == int(effect.argmax())
    assert table["token_id"].tolist()[3] == int(effect.argmin())


def test_in_residual_is_what_the_model_adds() -> None:
    model = tiny_model("llama")
    ids = tiny_inputs("llama")
    for site, out in (("layers.0.attn.z", "layers.0.attn"), ("layers.0.mlp.act", "layers.0.mlp")):
        feature = Feature(site, direction(model, site))
        where = block_map(model).resolve(out)
        with capture(model, where) as clean, torch.no_grad():
            model(ids)
        with feature.steered(model, 2.0), capture(model, where) as seen, torch.no_grad():
            model(ids)
        added = 2.0 * feature.in_residual(model) / feature.write.norm()
        torch.testing.assert_close(seen[out] - clean[out], added.expand_as(seen[out]), atol=1e-10, rtol=0)
    with pytest.raises(InvalidInput, match="writes nothing"):
        Feature("layers.0.attn.q", direction(model, "layers.0.attn.q")).in_residual(model)


def test_neurons_are_features() -> None:
    model = tiny_model("llama")
    ids = tiny_inputs("llama")
    unit = neuron(model, "layers.1.mlp.neuron.7")
    with capture(model, block_map(model).resolve("layers.1.mlp.act")) as seen, torch.no_grad():
        model(ids)
    torch.testing.assert_close(unit.activations(model, ids), seen["layers.1.mlp.act"][..., 7])
    with pytest.raises(InvalidInput, match="40 hidden units"):
        neuron(model, "layers.1.mlp.neuron.40")
    with pytest.raises(InvalidInput, match="expected a name"):
        neuron(model, "layers.1.attn.head.1")


def test_top_examples_are_the_highest_of_all_batches() -> None:
    model = tiny_model("gpt2")
    feature = Feature("layers.1.resid_post", direction(model, "layers.1.resid_post"))
    batches = [tiny_inputs("gpt2", 5, seed) for seed in range(3)]
    found = feature.top_examples(model, batches, k=4, window=2)
    values = torch.cat([feature.activations(model, ids) for ids in batches])
    tops, rows = values.max(1).values.sort(descending=True)
    torch.testing.assert_close(found.activation.double(), tops[:4], atol=1e-6, rtol=1e-6)
    assert list(found.text) == rows[:4].tolist()
    ids = torch.cat(batches)
    for row, excerpt, shown, place in zip(found.text, found.token_ids, found.values, found.place, strict=True):
        at = int(values[row].argmax())
        assert excerpt[place] == int(ids[row, at])
        assert shown[place] == pytest.approx(float(values[row, at]), rel=1e-5)
        assert len(excerpt) <= 5
    assert list(found.to_frame().columns) == ["activation", "text", "token_id", "excerpt"]


def test_units_can_be_changed() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2")
    feature = Feature("layers.0.mlp", direction(model, "layers.0.mlp"))
    double = feature.scaled(2.0)
    torch.testing.assert_close(double.activations(model, ids), 2 * feature.activations(model, ids))
    with feature.ablated(model):
        one = logits(model, ids)
    with double.ablated(model):
        torch.testing.assert_close(logits(model, ids), one)


def test_projection() -> None:
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    read = Projection(torch.tensor([1.0, 1.0]), bias=-0.5, rectified=True, centre=torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(read(x), torch.tensor([2.0, 0.0]))


def test_bad_input() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2")
    for write in (torch.zeros(24), torch.full((24,), torch.nan), torch.ones(2, 24)):
        with pytest.raises(InvalidInput, match="one direction"):
            Feature("layers.0.mlp", write)
    with pytest.raises(InvalidInput, match="has 24"):
        Feature("layers.0.mlp", torch.ones(40)).activations(model, ids)
    with pytest.raises(InvalidInput, match="the model has 2 layers"):
        Feature("layers.9.mlp", torch.ones(24)).activations(model, ids)
    with pytest.raises(InvalidInput, match="not a part of it"):
        Feature("layers.0.attn.head.1", torch.ones(24)).activations(model, ids)
    good = Feature("layers.0.mlp", torch.ones(24, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="finite"), good.steered(model, float("nan")):
        pass
    with pytest.raises(InvalidInput, match="position=9"):
        good.attribution(model, ids, position=9)
    with pytest.raises(InvalidInput, match="29 tokens"):
        good.promoted(model, k=30)
    with pytest.raises(InvalidInput, match="batches is empty"):
        good.top_examples(model, [])
    bert = tiny_model("bert-mlm")
    with pytest.raises(UnsupportedModel, match="head of"):
        Feature("layers.0.mlp", torch.ones(24, dtype=torch.float64)).logit_effect(bert)
    with pytest.raises(UnsupportedModel, match="no head"):
        unembedding(tiny_model("llama-base"))


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if "classifier" not in f and f not in ("bert-mlm", "roberta-mlm")]
)
def test_every_family_has_the_places(family: str) -> None:
    model = tiny_model(family)
    the_map = mapped(model)
    for part in FIELDS:
        the_map.resolve(f"layers.0.{part}")
