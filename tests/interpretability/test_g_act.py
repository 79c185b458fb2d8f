"""G-ACT and its rivals: exact invariants of steering, probes against slow references, every family, either padding."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability import g_act
from broadsheet.interpretability.g_act import (
    ACT,
    GACT,
    ACTModel,
    Collapsed,
    DroppedPairs,
    FewerClusters,
    PairActivations,
    QuantizedBlocks,
    SteeringModel,
    bias_profile,
    collect_pairs,
    mean_difference,
    neuron_attribution,
    prompt_hint,
    refine,
    refine_directly,
    scale_neuron,
    steering_overhead,
    steering_report,
    two_folds,
)
from broadsheet.interpretability.g_act.model import chosen
from broadsheet.interpretability.g_act.neurons import single_tokens
from broadsheet.interpretability.g_act.probes import clusters_of, split_prompts
from broadsheet.nn.blocks import block_map
from broadsheet.nn.generation import generate_tokens
from broadsheet.nn.hooks import capture
from broadsheet.nn.tiny_models import FAMILIES, HEADS, LAYERS, VOCAB, WIDTH, tiny_inputs, tiny_model

DECODERS = [f for f in FAMILIES if FAMILIES[f][0].endswith(("LMHeadModel", "ForCausalLM"))]
SITES = ("attn_out", "mlp_out", "resid_mid", "resid_post", "head_out")
# transformers' eager Gemma 2 gives NaN for a row of padding, which sees nothing: with or without steering
GENERATES = [f for f in DECODERS if f != "gemma2"]


# families that join attention and MLP in other ways
MIDDLES = ("opt", "opt-post-norm", "gemma2", "neox-sequential")


def numbers(text: str) -> list[int]:
    """A tokenizer for tests: numbers are their own ids."""
    return [int(x) for x in text.split()]


def text_of(ids: Tensor) -> str:
    return " ".join(str(int(i)) for i in ids)


def some_pairs(n: int = 12, seed: int = 0) -> list[tuple[str, str, str]]:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(4, VOCAB, (n, 6), generator=random)
    lengths = torch.randint(3, 7, (n,), generator=random).tolist()
    heads = [text_of(row[:k]) for row, k in zip(rows, lengths, strict=True)]
    return [(head, f"{head} 2", f"{head} 3") for head in heads]


def fitted(family: str = "llama", site: str = "resid_post", k: int = 2, dtype: torch.dtype = torch.float64, **how: Any):
    model = tiny_model(family, dtype)
    pairs = collect_pairs(model, numbers, some_pairs(), site=site)
    return model, pairs, GACT(n_clusters=k, layers=pairs.layers, epochs=how.pop("epochs", 20), **how).fit(pairs)


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return (model(ids) if mask is None else model(ids, attention_mask=mask)).logits


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def planted(
    n: int = 40, layers: int = 3, d: int = 16, k: int = 3, noise: float = 0.05, seed: int = 0
) -> PairActivations:
    """States of prompts in ``k`` groups that stand apart, whose differences do too."""
    random = torch.Generator().manual_seed(seed)
    groups = torch.arange(n) % k
    where = torch.randn(k, layers, d, generator=random)
    push = torch.randn(k, layers, d, generator=random)
    minus = where[groups] + noise * torch.randn(n, layers, d, generator=random)
    plus = minus + push[groups] + noise * torch.randn(n, layers, d, generator=random)
    return PairActivations(plus, minus)


# ------------------------------------------------------------------------------------------------ states of pairs


@pytest.mark.parametrize("family", DECODERS)
def test_states_are_those_of_each_prompt_alone(family: str) -> None:
    model, texts = tiny_model(family), some_pairs(2)
    field = {"attn_out": "attn_out", "mlp_out": "mlp_out", "resid_mid": "resid_mid", "resid_post": "resid_post"}
    alone = {}  # an independent forward pass, written from the weights
    for pair in texts:
        for text in pair:
            with torch.no_grad():
                alone[text] = block_map(model).forward(torch.tensor([numbers(text)]), cache=True)[1].layers
    for site in SITES:
        if site == "resid_mid" and any(block.scheme == "parallel" for block in block_map(model).blocks):
            with pytest.raises(InvalidInput, match="none between them; sites: attn_out"):
                collect_pairs(model, numbers, texts, site=site)
            continue
        found = collect_pairs(model, numbers, texts, site=site, batch_size=2)
        assert found.h_prompt is not None and found.h_plus.dtype == torch.float32
        for at, states in enumerate((found.h_prompt, found.h_plus, found.h_minus)):
            for i, pair in enumerate(texts):
                for layer, own in enumerate(alone[pair[at]]):
                    wanted = own.z[0, -1].flatten() if site == "head_out" else getattr(own, field[site])[0, -1]
                    torch.testing.assert_close(states[i, layer].double(), wanted, atol=2e-5, rtol=2e-5)


def test_answers_are_averaged_from_where_versions_part() -> None:
    model = tiny_model("llama")
    texts = [("5 6 7 8 9", "5 6 10 11"), ("12 13", "12 14 15")]
    found = collect_pairs(model, numbers, texts, position="answer")
    for i, pair in enumerate(texts):
        for states, text, start in ((found.h_plus, pair[0], (2, 1)[i]), (found.h_minus, pair[1], (2, 1)[i])):
            with torch.no_grad():
                totals = block_map(model).forward(torch.tensor([numbers(text)]), cache=True)[1]
            wanted = totals.layers[1].resid_post[0, start:].mean(0)
            torch.testing.assert_close(states[i, 1].double(), wanted, atol=1e-5, rtol=1e-5)


def test_forms_of_pairs_are_the_same() -> None:
    model, texts = tiny_model("gpt2"), some_pairs(4)
    named = [dict(zip(("prompt", "plus", "minus"), pair, strict=True)) for pair in texts]
    one, two = collect_pairs(model, numbers, texts), collect_pairs(model, numbers, named)
    assert torch.equal(one.h_plus, two.h_plus) and torch.equal(one.h_prompt, two.h_prompt)  # type: ignore[arg-type]
    short = collect_pairs(model, numbers, [pair[1:] for pair in texts], layers=[-1])
    assert short.h_prompt is None and short.layers == (1,)
    torch.testing.assert_close(short.h_minus[:, 0], one.h_minus[:, 1])


# ------------------------------------------------------------------------------------------------ fit


def test_centroids_are_means_of_their_members_and_the_planted_groups_are_found() -> None:
    pairs = planted()
    model = GACT(epochs=400, lr=0.01).fit(pairs)
    groups = np.arange(40) % 3
    assert len({(int(a), int(b)) for a, b in zip(groups, model.clusters, strict=True)}) == 3  # one to one
    for c in range(3):
        wanted = pairs.differences[model.clusters == c].double().mean(0)
        torch.testing.assert_close(model.centroids[:, c].double(), wanted, atol=1e-6, rtol=1e-6)
    assert model.val_accuracy.tolist() == [1.0] * 3 and model.macro_f1.tolist() == [1.0] * 3
    assert model.steered_layers == (0, 1, 2)
    unsteered = pairs.h_minus.double().norm(dim=-1).mean(0)
    torch.testing.assert_close(model.norms.double(), unsteered, atol=1e-5, rtol=1e-5)
    assert (model.select(1, pairs.h_minus[:, 1]) == model.clusters).all()


def test_clusters_are_those_of_scaled_layers_side_by_side() -> None:
    """One deep layer with long, uninformative differences does not decide alone."""
    pairs = planted(noise=0.2)
    loud = torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(5)) * 1000
    plus = torch.cat([pairs.h_plus, pairs.h_minus[:, :1] + loud], 1)
    minus = torch.cat([pairs.h_minus, pairs.h_minus[:, :1]], 1)
    model = GACT(epochs=5).fit(PairActivations(plus, minus))
    d = (plus - minus).double().numpy()
    d = d / np.linalg.norm(d, axis=-1, keepdims=True).mean(0, keepdims=True)
    labels = KMeans(3, n_init=10, random_state=42).fit_predict(d.reshape(40, -1))
    assert len(set(zip(labels.tolist(), model.clusters.tolist(), strict=True))) == 3
    assert len({(i % 3, int(c)) for i, c in enumerate(model.clusters)}) == 3


def test_probes_are_a_softmax_regression() -> None:
    """The same loss, gradient by gradient, in NumPy."""
    pairs = planted(12, 1, 4, 2, 0.5)
    settings = GACT(n_clusters=2, epochs=3)
    model = settings.fit(pairs)
    train, _ = split_prompts(12, 0.2, 42)
    x = torch.cat([pairs.h_minus[train, 0], pairs.h_plus[train, 0]]).double().numpy()
    y = np.tile(model.clusters[train].numpy(), 2)
    x = (x - x.mean(0)) / x.std(0)
    w, b = np.zeros((2, 4)), np.zeros(2)
    state = {id_: [np.zeros_like(p), np.zeros_like(p)] for id_, p in (("w", w), ("b", b))}
    for step in range(1, 4):
        z = x @ w.T + b
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        g = (p - np.eye(2)[y]) / len(x)
        for name, grad in (("w", g.T @ x), ("b", g.sum(0))):
            value, (m, v) = {"w": w, "b": b}[name], state[name]
            value *= 1 - 1e-3 * 1e-2
            m[:], v[:] = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            value -= 1e-3 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    torch.testing.assert_close(model.weight[0].double(), torch.from_numpy(w), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model.bias[0].double(), torch.from_numpy(b), atol=1e-6, rtol=1e-4)


def test_order_of_prompts_permutes_labels_only_and_fits_repeat() -> None:
    pairs = planted()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    one, again, other = GACT().fit(pairs), GACT().fit(pairs), GACT().fit(pairs.subset(order))
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert len(set(zip(one.clusters[order].tolist(), other.clusters.tolist(), strict=True))) == 3
    match = [int(one.clusters[order][other.clusters == c][0]) for c in range(3)]
    torch.testing.assert_close(one.centroids[:, match], other.centroids, atol=1e-5, rtol=1e-5)


def test_shared_centroids_pool_all_layers() -> None:
    pairs = planted()
    model = GACT(shared=True).fit(pairs)
    assert model.clusters.shape == (40, 3)
    everything = pairs.differences.flatten(0, 1)
    for c in range(3):
        wanted = everything[model.clusters.flatten() == c].mean(0)
        torch.testing.assert_close(model.centroids[:, c], wanted.expand(3, 16), atol=1e-5, rtol=1e-5)


def test_layers_whose_probes_know_nothing_are_left_alone() -> None:
    pairs = planted(60)
    noise = torch.randn(60, 1, 16, generator=torch.Generator().manual_seed(9))
    blind = PairActivations(
        torch.cat([pairs.h_plus, noise + pairs.differences[:, :1]], 1), torch.cat([pairs.h_minus, noise], 1)
    )
    model = GACT(lr=0.01, margin=0.4).fit(blind)
    assert model.steered_layers == (0, 1, 2)  # the last one is guessed from its difference in half of the states
    assert GACT(layers=[3]).fit(blind).steered_layers == (3,)
    with pytest.raises(InvalidInput, match="layer 7: fitted to layers 0, 1, 2, 3"):
        GACT(layers=[7]).fit(blind)


# ------------------------------------------------------------------------------------------------ steering


@pytest.mark.parametrize("family", DECODERS)
def test_nothing_changes_at_strength_zero_and_hooks_are_gone(family: str) -> None:
    model, _, steering = fitted(family)
    ids, before = tiny_inputs(family), hooks_of(tiny_model(family))
    plain = logits(model, ids)
    for how in ({"alpha": 0.0}, {"alpha": 0.5, "layers": []}):
        with steering(model, **how):
            assert torch.equal(logits(model, ids), plain)
    with pytest.raises(ZeroDivisionError), steering(model, 0.5):
        assert hooks_of(model) > before
        assert not torch.equal(logits(model, ids), plain)
        _ = 1 / 0
    assert hooks_of(model) == before and "generate" not in model.__dict__
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        *(("llama", site) for site in SITES),
        ("gpt2", "resid_post"),
        *((f, "resid_mid") for f in MIDDLES),
        ("opt", "mlp_out"),
    ],
)
def test_what_is_added_has_its_length_and_direction(family: str, site: str) -> None:
    model, _, steering = fitted(family, site)
    ids, layer, alpha = tiny_inputs(family), 1, 0.3
    the_map = block_map(model)
    with torch.no_grad():
        before = the_map.forward(ids, cache=True)[1].layers[layer]
    names = {"attn_out": "attn_out", "mlp_out": "mlp_out", "resid_mid": "resid_mid", "resid_post": "resid_post"}
    old = before.z.flatten(-2) if site == "head_out" else getattr(before, names[site])
    picked = steering.select(layer, old[:, -1])
    wanted = alpha * steering.directions()[layer][picked].double()
    torch.testing.assert_close(
        wanted.norm(dim=-1), (alpha * steering.norms[layer].double()).expand(2), atol=1e-5, rtol=1e-5
    )

    seen: list[Tensor] = []

    def record(i: int, states: Tensor, steered: Tensor | None) -> None:
        seen.append(states)

    where = steering.places(model, [layer])[0]
    with steering(model, alpha, layers=[layer], record=record), capture(model, where.site) as after:
        changed = logits(model, ids)
    torch.testing.assert_close(seen[0][:, -1], old[:, -1].float().to(seen[0]), atol=1e-5, rtol=1e-5)
    with capture(model, where.site) as own:
        plain = logits(model, ids)
    key = where.site.label or where.site.module
    added = after[key].reshape(own[key].shape) - own[key]
    torch.testing.assert_close(added[:, -1].double(), wanted, atol=1e-6, rtol=1e-6)
    assert added[:, :-1].abs().max() == 0
    assert (changed[:, -1] - plain[:, -1]).abs().max() > 1e-6 and torch.equal(changed[:, :-1], plain[:, :-1])


def test_resid_mid_reaches_the_stream_that_goes_on() -> None:
    """Adding between attention and MLP changes what the MLP reads and what is carried past it."""
    model, _, steering = fitted("llama", "resid_mid")
    ids = tiny_inputs("llama")
    with torch.no_grad():
        old = block_map(model).forward(ids, cache=True)[1].layers[0].resid_mid
    vector = 0.4 * steering.directions()[0][steering.select(0, old[:, -1])].double()

    def edit(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "resid_mid" and layer == 0:
            x = x.clone()
            x[:, -1] += vector
        return x

    with torch.no_grad():
        wanted = block_map(model).forward(ids, edit=edit)
    with steering(model, 0.4, layers=[0]):
        torch.testing.assert_close(logits(model, ids), wanted, atol=1e-6, rtol=1e-6)


def test_one_cluster_is_mean_difference() -> None:
    model, pairs, steering = fitted(k=1)
    plain = mean_difference(pairs)
    ids = tiny_inputs("llama")
    vector = pairs.differences.double().mean(0)

    def add(layer: int) -> Any:
        unit = vector[layer] / vector[layer].norm() * steering.norms[layer].double() * 0.3
        return lambda module, args, output: (output[0] if isinstance(output, tuple) else output) + unit

    handles = [block.register_forward_hook(add(i)) for i, block in enumerate(model.model.layers)]  # type: ignore
    wanted = logits(model, ids)
    for handle in handles:
        handle.remove()
    for one in (steering, plain):
        with one(model, 0.3, positions="all"):
            torch.testing.assert_close(logits(model, ids), wanted, atol=1e-6, rtol=1e-6)
    with plain.features(0)[0].steered(model, 0.3 * float(plain.norms[0])):
        alone = logits(model, ids)
    with plain(model, 0.3, layers=[0], positions="all"):
        torch.testing.assert_close(logits(model, ids), alone, atol=1e-5, rtol=1e-5)


def test_soft_becomes_hard_as_temperature_falls() -> None:
    model, _, steering = fitted(k=3)
    ids = tiny_inputs("llama")
    with steering(model, 0.3):
        hard = logits(model, ids)
    gaps = []
    for temperature in (1.0, 1e-2, 1e-6):
        with steering(model, 0.3, soft=True, temperature=temperature):
            gaps.append(float((logits(model, ids) - hard).abs().max()))
    assert gaps[0] > 1e-3 and gaps[-1] < 1e-9
    units = nn.functional.normalize(torch.randn(3, 8), dim=1) * 2
    mixed = chosen(torch.randn(5, 3), units, soft=True)
    torch.testing.assert_close(mixed.norm(dim=1), torch.full((5,), 2.0))
    solved = torch.linalg.lstsq(units.T, mixed.T)  # in the span
    torch.testing.assert_close(units.T @ solved.solution, mixed.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        *((f, p) for f in GENERATES for p in ("last",)),
        *((f, p) for f in ("gpt2", "llama") for p in ("prompt", "all", 2)),
    ],
)
def test_cache_and_padding_do_not_change_what_is_generated(family: str, positions: Any) -> None:
    model, _, steering = fitted(family)
    texts = [tiny_inputs(family, 1, seed)[0, : 7 - seed] for seed in range(2)]
    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 7 - len(text) :], mask[row, 7 - len(text) :] = text, 1
    how: dict[str, Any] = {"max_new_tokens": 4, "pad": 1}
    with steering(model, 0.6, positions=positions):
        cached, whole = (generate_tokens(model, ids, mask, use_cache=c, **how) for c in (True, False))
        alone = [generate_tokens(model, text[None], **how)[0] for text in texts]
    assert torch.equal(cached, whole)
    assert torch.equal(cached, torch.stack(alone))


def test_generated_tokens_are_steered_and_prompts_only_at_their_end() -> None:
    """Against a reference that knows nothing of caches: each token from a whole pass with a mask of steered tokens."""
    model, _, steering = fitted()
    ids = tiny_inputs("llama")
    with steering(model, 0.5):
        found = generate_tokens(model, ids, max_new_tokens=5, pad=1)
    with steering(model, 0.5, positions="prompt"):
        only = generate_tokens(model, ids, max_new_tokens=5, pad=1)
    for tokens, every in ((found, True), (only, False)):
        text = ids
        for step in range(5):
            steered = torch.zeros_like(text, dtype=torch.bool)
            steered[:, 6 : None if every else 7] = True
            with steering(model, 0.5, positions=steered):
                text = torch.cat([text, logits(model, text)[:, -1].argmax(-1)[:, None]], 1)
            assert torch.equal(text[:, 7 + step], tokens[:, step])
    assert not torch.equal(found, only)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["last", "all", 1])
def test_padding_on_either_side_of_a_plain_pass(side: str, positions: Any) -> None:
    model, _, steering = fitted()
    texts = [tiny_inputs("llama", 1, seed)[0, : 7 - seed] for seed in range(3)]
    ids, mask = torch.ones(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
        ids[row, where], mask[row, where] = text, 1
    place = mask.cumsum(1).sub(1).clamp_min(0)
    with steering(model, 0.5, positions=positions), torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=place).logits
        for row, text in enumerate(texts):
            torch.testing.assert_close(found[row][mask[row].bool()], logits(model, text[None])[0], atol=1e-9, rtol=1e-9)


def test_one_strength_for_each_row() -> None:
    model, _, steering = fitted()
    ids = tiny_inputs("llama", 3)
    with steering(model, torch.tensor([0.0, 0.2, 0.4])):
        many = logits(model, ids)
    for i, alpha in enumerate((0.0, 0.2, 0.4)):
        with steering(model, alpha):
            torch.testing.assert_close(many[i], logits(model, ids[i : i + 1])[0], atol=1e-9, rtol=1e-9)


def test_nested_steering_is_refused_unless_asked_for() -> None:
    model, _, steering = fitted()
    ids = tiny_inputs("llama")
    with steering(model, 0.2):
        with pytest.raises(InvalidInput, match="already steered"), steering(model, 0.2):
            pass
        with steering(model, 0.3, allow_nested=True, layers=[1]):
            twice = logits(model, ids)
        once = logits(model, ids)
    with steering(model, 0.2):
        assert torch.equal(logits(model, ids), once)
    assert not torch.equal(once, twice)


def test_half_precision_adds_in_its_own_and_probes_in_float32() -> None:
    model, _, steering = fitted(dtype=torch.bfloat16)
    ids = tiny_inputs("llama")
    seen: list[Tensor] = []
    with steering(model, 0.3, layers=[0], record=lambda i, x, m: seen.append(x)):
        found = logits(model, ids)
    assert found.dtype == torch.bfloat16 and seen[0].dtype == torch.bfloat16 and bool(found.isfinite().all())
    with steering(model, 0.3, layers=[0]), capture(model, "model.layers.0") as after:
        logits(model, ids)
    with capture(model, "model.layers.0") as before:
        logits(model, ids)
    old = before["model.layers.0"][:, -1]
    picked = (old.float() @ steering.probes.folded()[0][0].T + steering.probes.folded()[1][0]).argmax(-1)
    wanted = old + (0.3 * steering.directions()[0][picked]).to(torch.bfloat16)
    assert torch.equal(after["model.layers.0"][:, -1], wanted)


class Plain(nn.Module):
    """A causal model of its own: a list of blocks, no mask, no generate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.stack = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.stack:
            x = x + torch.tanh(block(x.cumsum(1)))
        return self.head(x)


@pytest.mark.parametrize("blocks", ["stack", lambda model: model.stack])
def test_any_module_with_a_list_of_blocks(blocks: Any) -> None:
    torch.manual_seed(0)
    model = Plain()
    texts = some_pairs(8)
    pairs = collect_pairs(model, numbers, texts, blocks=blocks)
    steering = GACT(n_clusters=2, layers=[0, 2], epochs=5).fit(pairs)
    ids = tiny_inputs("gpt2")
    with torch.no_grad(), steering(model, 0.5):
        first = generate_tokens(model, ids, max_new_tokens=3)
        assert first.shape == (2, 3)
    with torch.no_grad():
        assert not torch.allclose(model(ids), _within(steering, model, ids))
    with pytest.raises(UnsupportedModel, match="blocks='name"):
        collect_pairs(model, numbers, texts)
    with pytest.raises(InvalidInput, match="lists of modules: stack"):
        collect_pairs(model, numbers, texts, blocks="layers")
    with pytest.raises(InvalidInput, match="only 'resid_post'"):
        collect_pairs(model, numbers, texts, site="mlp_out", blocks=blocks)


def _within(steering: SteeringModel, model: nn.Module, ids: Tensor) -> Tensor:
    with steering(model, 0.5, positions="all"):
        return model(ids)


def test_quantized_blocks_are_said() -> None:
    model, _, steering = fitted()
    model.model.layers[0].register_parameter(  # type: ignore[union-attr]
        "packed", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    )
    with pytest.warns(QuantizedBlocks, match=r"layer 0: weights are torch\.uint8"), steering(model, 0.1):
        pass


def test_save_and_load(tmp_path: Path) -> None:
    model, pairs, _ = fitted()
    steering = GACT(n_clusters=2, layers=[1], alpha=0.25, epochs=5).fit(pairs)
    steering.save_pretrained(tmp_path / "steering")
    again = SteeringModel.from_pretrained(tmp_path / "steering")
    ids = tiny_inputs("llama")
    assert again.steered_layers == (1,) and again.alpha == 0.25
    with steering(model):
        wanted = logits(model, ids)
    with again(model):
        assert torch.equal(logits(model, ids), wanted)
    heads = collect_pairs(model, numbers, some_pairs(), site="head_out")
    act = ACT(n_clusters=2, n_heads=3).fit(heads)
    act.save_pretrained(tmp_path / "act")
    other = ACTModel.from_pretrained(tmp_path / "act")
    with act.steered(model, 2.0):
        wanted = logits(model, ids)
    with other.steered(model, 2.0):
        assert torch.equal(logits(model, ids), wanted)


# ------------------------------------------------------------------------------------------------ refinement


def test_online_refinement_learns_the_states_of_the_steered_model() -> None:
    model = tiny_model("llama", torch.float32)
    texts = some_pairs(20, seed=1)
    pairs = collect_pairs(model, numbers, texts)
    settings = GACT(n_clusters=2, layers=[0, 1], epochs=60, lr=0.01)
    steering = settings.fit(pairs)
    weights = copy.deepcopy(model.state_dict())
    prompts = [text[0] for text in texts]
    how: dict[str, Any] = {"alpha": 0.6, "fitted": settings, "rounds": 2, "epochs": 100, "lr": 0.02}
    refined = refine(steering, model, numbers, prompts, pairs, **how)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(refined.centroids, steering.centroids) and not torch.equal(refined.weight, steering.weight)
    again = refine(steering, model, numbers, prompts, pairs, **how)
    assert torch.equal(refined.weight, again.weight)
    # states of steered training prompts, labelled by their prompt
    train, _ = split_prompts(20, 0.2, 42)
    right = {"before": 0.0, "after": 0.0}
    for name, one in {"before": steering, "after": refined}.items():
        kept: list[Tensor] = []
        for i in train.tolist():
            ids = torch.tensor([numbers(prompts[i])])
            with refined(model, 0.6, record=lambda layer, x, m, kept=kept: kept.append(x[0, -1]) if layer else None):
                generate_tokens(model, ids, max_new_tokens=8)
            states = torch.stack(kept)
            right[name] += float((one.select(1, states) == steering.clusters[i]).float().mean()) / len(train)
            kept.clear()
    assert right["after"] > right["before"] + 0.05


@pytest.mark.parametrize("centroids", [False, True])
def test_direct_refinement_raises_what_it_is_asked_to(centroids: bool) -> None:
    model, _, steering = fitted(k=3, dtype=torch.float32)
    prompts = [pair[0] for pair in some_pairs()]
    answers = ["2 5 2"] * len(prompts)

    def loss(one: SteeringModel) -> float:
        total = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            head, tail = numbers(prompt), numbers(answer)
            ids = torch.tensor([head + tail])
            with one(model, 0.5, positions=torch.arange(ids.shape[1])[None] >= len(head) - 1):
                scores = logits(model, ids)[0].log_softmax(-1)
            total -= sum(float(scores[len(head) - 1 + i, token]) for i, token in enumerate(tail))
        return total / len(prompts)

    frozen = copy.deepcopy(model.state_dict())
    refined = refine_directly(
        steering, model, numbers, prompts, answers, alpha=0.5, epochs=12, lr=0.1, centroids=centroids
    )
    assert loss(refined) < loss(steering) - 0.02
    assert torch.equal(refined.centroids, steering.centroids) is not centroids
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and hooks_of(model) == 0


# ------------------------------------------------------------------------------------------------ ACT


def test_act_against_scikit_learn() -> None:
    model = tiny_model("llama")
    pairs = collect_pairs(model, numbers, some_pairs(60), site="head_out")
    act = ACT(n_clusters=2, n_heads=3, seed=7).fit(pairs)
    train, held = (rows.numpy() for rows in split_prompts(60, 0.2, 7))
    size = WIDTH // HEADS
    accuracy = np.zeros((LAYERS, HEADS, 2))
    normals, spreads = {}, {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            a, b = (h[:, layer, part].double().numpy() for h in (pairs.h_plus, pairs.h_minus))
            labels = KMeans(2, n_init=10, random_state=7).fit(a - b).labels_
            labels = labels if labels[0] == 0 else 1 - labels
            for c in range(2):
                i, j = train[labels[train] == c], held[labels[held] == c]
                x, y = np.concatenate([a[i], b[i]]), np.repeat([1, 0], len(i))
                probe = LogisticRegression(max_iter=1000).fit(x, y)
                normal = probe.coef_[0] / np.linalg.norm(probe.coef_)
                normals[layer, head, c], spreads[layer, head, c] = probe, (x @ normal).std()
                if len(j) >= 5:
                    accuracy[layer, head, c] = probe.score(np.concatenate([a[j], b[j]]), np.repeat([1, 0], len(j)))
    np.testing.assert_allclose(act.accuracy.numpy(), accuracy, atol=1e-6)
    for c in range(2):
        best = set(map(tuple, act.chosen[act.chosen[:, 2] == c][:, :2].tolist()))
        order = sorted((-accuracy[at][c], at) for at in np.ndindex(LAYERS, HEADS))
        assert best == {at for _, at in order[:3]}

    ids, layer = tiny_inputs("llama"), int(act.chosen[0, 0])
    name = f"model.layers.{layer}.self_attn.o_proj"
    from broadsheet.nn.hooks import Site

    with capture(model, Site(name, "input", label="z")) as before:
        logits(model, ids)
    with act.steered(model, 3.0, layers=[layer]), capture(model, Site(name, "input", label="z")) as after:
        logits(model, ids)
    wanted = before["z"].clone()
    for row, head, c in act.chosen.tolist():
        if row == layer:
            part = slice(head * size, (head + 1) * size)
            probe = normals[row, head, c]
            p = torch.from_numpy(probe.predict_proba(before["z"][:, -1, part].numpy())[:, 1])
            unit = torch.from_numpy(probe.coef_[0] / np.linalg.norm(probe.coef_))
            wanted[:, -1, part] += 3.0 * spreads[row, head, c] * (1 - p)[:, None] * unit
    torch.testing.assert_close(after["z"], wanted, atol=1e-4, rtol=1e-4)


def test_clusters_too_small_to_judge_count_as_worth_nothing() -> None:
    model = tiny_model("gpt2")
    act = ACT(n_clusters=3, n_heads=2).fit(collect_pairs(model, numbers, some_pairs(12), site="head_out"))
    assert float(act.accuracy.sum()) == 0 and int(act.questions.max()) < 5
    assert list(act.to_frame().columns) == ["layer", "head", "cluster", "accuracy", "sigma"]
    ids = tiny_inputs("gpt2")
    with act.steered(model, 0.0):
        assert hooks_of(model) == 0
    with act.steered(model, 5.0):
        assert hooks_of(model) > 0
    assert torch.equal(logits(model, ids), logits(tiny_model("gpt2"), ids))


def test_two_folds_cover_every_question_once() -> None:
    folds = two_folds(11)
    assert [len(set(fit.tolist()) & set(test.tolist())) for fit, test in folds] == [0, 0]
    assert sorted(folds[0][1].tolist() + folds[1][1].tolist()) == list(range(11))


# ------------------------------------------------------------------------------------------------ neurons


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt"])
def test_the_neuron_that_writes_the_target_comes_first(family: str) -> None:
    model = tiny_model(family)
    the_map = block_map(model)
    target, layer, unit = 9, 1, 17
    head = the_map.head[0]
    row = head.weight[:, target] * 4  # type: ignore[union-attr]
    mlp = the_map.blocks[layer].mlp
    with torch.no_grad():
        if mlp.w_gate is None:  # type: ignore[union-attr]
            mlp.w_out.weight[unit] = row  # type: ignore[union-attr]
        else:
            mlp.w_gate.weight[:, unit] = 0  # type: ignore[union-attr]
            mlp.w_in.weight[:, unit] = row  # type: ignore[union-attr]
    scores = neuron_attribution(block_map(model).model, None, [target], k=5, chunk=7)
    assert scores.top(1) == [(layer, unit)] and scores.gated is (family in ("llama", "gemma"))
    table = scores.to_frame(3)
    assert list(table.columns) == ["layer", "neuron", "P_t", "A_N"] and table.A_N.is_monotonic_decreasing


def test_neuron_scores_in_numpy() -> None:
    model = tiny_model("llama")
    mlp, head = block_map(model).blocks[0].mlp, block_map(model).head[0]
    up, gate = (x.detach().numpy() for x in (mlp.w_in.weight, mlp.w_gate.weight))  # type: ignore[union-attr]
    effective = (up / (1 + np.exp(-gate))).T
    z = effective @ head.weight.detach().numpy()  # type: ignore[union-attr]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    wanted = p[:, [3, 8]].sum(1) / np.sort(p, axis=1)[:, -10:].mean(1)
    found = neuron_attribution(model, None, [3, 8])
    np.testing.assert_allclose(found.score[0].numpy(), wanted, rtol=1e-4)
    assert not torch.allclose(neuron_attribution(model, None, [3, 8], norm=True).score, found.score)


def test_scaling_a_neuron_is_scaling_its_weights() -> None:
    model, ids = tiny_model("llama"), tiny_inputs("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5] *= 3  # type: ignore[union-attr,index,operator]
    with scale_neuron(model, 1, 5, 3.0):
        torch.testing.assert_close(logits(model, ids), logits(other, ids), atol=1e-10, rtol=1e-10)
    with scale_neuron(model, 1, 5, torch.tensor([1.0, 3.0])):
        mixed = logits(model, ids)
    torch.testing.assert_close(mixed[0], logits(model, ids)[0])
    torch.testing.assert_close(mixed[1], logits(other, ids)[1])


class Speller:
    """A tokenizer that knows only short words."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        known = {"cpp": [4], " cpp": [5], "C++": [6, 7], " C++": [8]}
        return known.get(text, [1, 2])


def test_target_words_have_variants() -> None:
    assert single_tokens(Speller(), ["cpp", "C++"], 29) == [4, 5, 8]
    with pytest.raises(InvalidInput, match=r"'Rust' is no single token: 'Rust' -> \[1, 2\]; ' Rust'"):
        single_tokens(Speller(), ["Rust"], 29)
    with pytest.raises(InvalidInput, match="token 40"):
        single_tokens(None, [40], 29)
    with pytest.raises(InvalidInput, match="hand in the model's tokenizer"):
        single_tokens(None, ["x"], 29)


# ------------------------------------------------------------------------------------------------ profile and report


class Tokens:
    """Numbers as words, with what a profile needs of a tokenizer."""

    pad_token_id, eos_token_id = 1, 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": numbers(text)}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def parity(answer: str) -> str:
    return "even" if int(answer.split()[0]) % 2 == 0 else "odd"


def test_profile_counts_answers() -> None:
    model = tiny_model("llama")
    prompts = ["5 6 7", "8 9"]
    profile = bias_profile(
        model, Tokens(), prompts, parity, n=200, max_new_tokens=1, batch_size=150, categories=["odd"]
    )
    assert profile.counts.sum(1).tolist() == [200, 200] and profile.categories[0] == "odd"
    for i, prompt in enumerate(prompts):
        p = logits(model, torch.tensor([numbers(prompt)]))[0, -1].softmax(-1)[1::2].sum()
        assert profile.shares[i, 0] == pytest.approx(float(p), abs=0.12)
    again = bias_profile(model, Tokens(), prompts, parity, n=200, max_new_tokens=1, batch_size=150, categories=["odd"])
    assert again.answers == profile.answers
    assert profile.share("neither") == 0 and sum(profile.majorities().values()) == 1
    table = profile.to_frame()
    assert table["share of odd"].tolist() == profile.shares[:, 0].tolist()
    assert len(profile.plot(["a", "b"]).patches) == 4
    numbered = bias_profile(model, Tokens(), prompts, lambda text, i: f"prompt {i}", n=3, max_new_tokens=2)
    assert numbered.counts.tolist() in ([[3, 0], [0, 3]], [[0, 3], [3, 0]])


def test_report_and_overhead() -> None:
    model, _, steering = fitted(dtype=torch.float32)
    neutral = [tiny_inputs("llama", 4, 9)]
    prompts = ["5 6 7", "8 9", "10 11 12 13"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Collapsed)
        report = steering_report(
            model, Tokens(), {"ours": steering, "other": mean_difference_of(model)}, [0.0, 0.3], prompts, parity, "even",
            neutral, max_new_tokens=6,
        )  # fmt: skip
    table = report.to_frame()
    assert len(table) == 4 and (table[table.alpha == 0].kl < 1e-7).all() and (table[table.alpha > 0].kl > 0).all()
    plain = steering_report(model, Tokens(), {"x": steering}, [0.0], prompts, parity, "even", neutral, max_new_tokens=6)
    assert plain.rows[0]["perplexity"] == pytest.approx(table.perplexity[0])
    assert report.best("ours", 1e-6)["alpha"] == 0
    with pytest.raises(InvalidInput, match="stays within"):
        report.best("ours", -1.0)
    assert report.plot("ours").get_xlabel() == "strength"
    overhead = steering_overhead(model, steering, tiny_inputs("llama"), max_new_tokens=2, repeats=1, counts=(1, 2))
    assert overhead.n_layers == (0, 1, 2) and overhead.ratio[0] == 1 and min(overhead.tokens_per_second) > 0
    assert list(overhead.to_frame().columns) == ["n_layers", "tokens_per_second", "ratio"]
    with pytest.raises(InvalidInput, match="9 layers"):
        steering_overhead(model, steering, tiny_inputs("llama"), counts=(9,))


def mean_difference_of(model: nn.Module) -> SteeringModel:
    return mean_difference(collect_pairs(model, numbers, some_pairs()))


def test_repetition_is_said() -> None:
    model = tiny_model("llama", torch.float32)
    neutral = [tiny_inputs("llama", 2, 9)]
    with pytest.warns(Collapsed, match="repeat themselves"):
        steering_report(
            model, Tokens(), {"g-act": lambda m, a: _stuck(m)}, [1.0], ["5 6 7"], parity, "even", neutral,
            max_new_tokens=16,
        )  # fmt: skip


def _stuck(model: Any) -> Any:
    from broadsheet.nn.hooks import replace

    return replace(model, {"lm_head": lambda x: torch.where(torch.arange(VOCAB) == 4, 100.0, x)})


def test_figures_and_tables() -> None:
    pairs = planted()
    model = GACT().fit(pairs)
    assert list(model.to_frame().columns) == ["layer", "val_accuracy", "macro_f1", "norm", "steered"]
    assert len(model.plot().lines) == 3
    assert len(pairs.plot(model.clusters.tolist()).collections) == 3
    assert [f.site for f in model.features(1)] == ["layers.1.resid_post"] * 3
    torch.testing.assert_close(model.features(1)[2].write, model.centroids[1, 2])


def test_hint() -> None:
    assert prompt_hint(["sort {x}", "b"], "in C++") == ["sort {x} in C++", "b in C++"]
    with pytest.raises(InvalidInput, match="template"):
        prompt_hint(["a"], "b", "{prompt}")


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_pairs() -> None:
    model = tiny_model("llama")
    for pairs, what in (
        ([], "pairs is empty"),
        (["5 6"], "pair 0 holds one text"),
        ([("5", "6", "7", "8")], "pair 0 holds 4 texts"),
        ([{"plus": "5"}], "pair 0 has no 'minus'"),
        ([("5", "")], "minus of pair 0 is empty"),
    ):
        with pytest.raises(InvalidInput, match=what):
            collect_pairs(model, numbers, pairs)  # type: ignore[arg-type]
    for how, what in (
        ({"site": "resid"}, "expected one of attn_out"),
        ({"layers": [2]}, r"layer 2: the model has 2 layers \(0 to 1\)"),
        ({"position": "first"}, "position='first'"),
    ):
        with pytest.raises(InvalidInput, match=what):
            collect_pairs(model, numbers, some_pairs(), **how)


def test_states_that_are_not_finite_name_their_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # type: ignore[union-attr,index,operator]
    with pytest.raises(InvalidInput, match="layer 1: states are not finite"):
        collect_pairs(model, numbers, some_pairs())
    h = torch.randn(4, 2, 3)
    bad = h.clone()
    bad[2, 1, 0] = torch.nan
    with pytest.raises(InvalidInput, match="layer 5: the states hold NaN"):
        PairActivations(h, bad, layers=(3, 5))
    with pytest.raises(InvalidInput, match="both versions"):
        PairActivations(h, h, layers=(1,))


def test_fit_refuses_too_little_and_drops_what_says_nothing() -> None:
    pairs = planted(10)
    with pytest.raises(InvalidInput, match="5 pairs for 3 clusters: at least 6"):
        GACT().fit(pairs.subset(range(5)))
    same = PairActivations(pairs.h_minus, pairs.h_minus)
    for call in (GACT().fit, mean_difference):
        with pytest.raises(InvalidInput, match="all 10 pairs leave the same state"):
            call(same)
    plus = pairs.h_plus.clone()
    plus[[2, 7]] = pairs.h_minus[[2, 7]]
    with pytest.warns(DroppedPairs, match="2 of 10"):
        assert len(GACT().fit(PairActivations(plus, pairs.h_minus)).clusters) == 8
    lone = planted(20, k=2)
    far = lone.h_plus.clone()
    far[0] += 100
    with pytest.warns(FewerClusters, match="fewer than two members: "):
        assert GACT().fit(PairActivations(far, lone.h_minus)).n_clusters < 3
    with pytest.raises(InvalidInput, match="n_clusters=0"):
        GACT(n_clusters=0)


def test_bad_steering() -> None:
    model, pairs, steering = fitted()
    for call, what in (
        (lambda: steering(model, float("nan")), "alpha=nan"),
        (lambda: steering(model, 0.1, layers=[5]), "layer 5: fitted to layers 0, 1"),
        (lambda: steering(model, 0.1, soft=True, temperature=0.0), "temperature=0.0"),
        (lambda: steering(model, 0.1, positions="first"), "positions='first'"),
    ):
        with pytest.raises(InvalidInput, match=what), call():
            pass
    with pytest.raises(InvalidInput, match="mask of positions"), steering(model, 0.1, positions=torch.ones(1, 3)):
        logits(model, tiny_inputs("llama"))
    with pytest.raises(InvalidInput, match="site='resid_post': ACT works on heads"):
        ACT().fit(pairs)
    heads = collect_pairs(model, numbers, some_pairs(4), site="head_out")
    with pytest.raises(InvalidInput, match="4 pairs for 3 clusters"):
        ACT().fit(heads)
    with pytest.raises(InvalidInput, match="the same prompts in the same order"):
        refine(steering, model, numbers, ["5"], pairs)
    with pytest.raises(InvalidInput, match="one answer for each prompt"):
        refine_directly(steering, model, numbers, ["5"], [])
    with pytest.raises(InvalidInput, match="nothing for a probe"):
        refine(mean_difference(pairs), model, numbers, [p[0] for p in some_pairs()], pairs)
    assert clusters_of(np.zeros((3, 2)), 1, 1, 0).tolist() == [0, 0, 0]


def test_public_names() -> None:
    for name in g_act.__all__:
        assert getattr(g_act, name) is not None
