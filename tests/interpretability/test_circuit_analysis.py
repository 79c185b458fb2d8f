"""Circuit analysis on tiny and hand-built models: sums, patching against hooks on the model itself, known circuits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch, LabelledLists
from broadsheet.data.planted_choice import PlantedChoice
from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability import circuit_analysis as ca
from broadsheet.nn.attribution import direct_parts
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.hooks import replace as hooked
from broadsheet.nn.tiny_models import HEADS, LAYERS, tiny_model

# Random models answer nothing; that they are warned of has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore::broadsheet.interpretability.circuit_analysis.skill.ModelAtChance")
FAMILIES = [
    "gpt2", "gpt2-scaled-by-layer", "neox-parallel", "neox-sequential", "llama", "llama-biases", "mistral-window",
    "qwen2", "qwen2-window", "qwen3", "qwen3-window", "gemma", "gemma2", "gemma3", "opt", "opt-post-norm", "gpt-neo",
]  # fmt: skip
LISTS = LabelledLists(n_labels=12, n_words=8)


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
ALL_HEADS = [f"layers.{layer}.attn.head.{h}" for layer in range(LAYERS) for h in range(HEADS)]


def padded(given: ChoiceBatch, side: str, by: int = 3) -> ChoiceBatch:
    pad, ones = torch.ones(len(given), by, dtype=torch.long), torch.ones_like(given.input_ids)
    left = side == "left"
    shift = by if left else 0
    return replace(
        given,
        input_ids=torch.cat([pad, given.input_ids] if left else [given.input_ids, pad], 1),
        attention_mask=torch.cat([0 * pad, ones] if left else [ones, 0 * pad], 1),
        label_pos=given.label_pos + shift,
        content_span=None if given.content_span is None else given.content_span + shift,
    )


# ------------------------------------------------------------------------------------------------------ effects


def effect_by_hooks(model: nn.Module, clean: ChoiceBatch, name: str, value: Tensor, positions: Any) -> float:
    """Fall of the centred right logit when hooks on the model itself put a value in a node's place."""
    the_map = block_map(model)
    parts = direct_parts(model, clean.input_ids)
    end = the_map.resolve(f"layers.{the_map.n_layers - 1}.resid_post")

    def metric() -> float:
        with capture(model, end) as seen, torch.no_grad():
            model(clean.input_ids)
        logits = parts.logits(next(iter(seen.values()))[:, -1], clean.answers)
        return float((logits[clean.rows, clean.answer] - logits.mean(-1)).mean())

    whole = metric()
    with hooked(model, {the_map.resolve(name): value}, positions=positions):
        return whole - metric()


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("positions", ["final", "labels", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_ablation_is_that_of_hooks(family: str, positions: str, ablation: str) -> None:
    model = tiny_model(family)
    names = ["layers.0.attn.head.1", "layers.0.mlp", "layers.0.mlp.neuron.3"]
    effects = ca.patch_effects(model, CLEAN, CORRUPT, names, ablation=ablation, positions=positions)
    columns = {"final": [9], "labels": [1, 3, 5, 7], "all": list(range(10))}[positions]
    for i, name in enumerate(names):
        site = block_map(model).resolve(name)
        with capture(model, site) as seen, torch.no_grad():
            model(CORRUPT.input_ids)
        value = seen[site.label][:, columns]
        value = value.mean(0, keepdim=True) if ablation == "mean" else value * (ablation != "zero")
        expected = effect_by_hooks(model, CLEAN, name, value, columns)
        assert float(effects.total[i]) == pytest.approx(expected, abs=5e-6)
        assert abs(expected) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effects_are_those_of_hooks(family: str) -> None:
    model = tiny_model(family)
    names = [*ALL_HEADS[:HEADS], "layers.1.mlp", "layers.0.mlp.neuron.3"]
    effects = ca.patch_effects(model, CLEAN, CORRUPT, names, max_batch=30)
    for i, name in enumerate(names):
        site = block_map(model).resolve(name)
        with capture(model, site) as seen, torch.no_grad():
            model(CORRUPT.input_ids)
        expected = effect_by_hooks(model, CLEAN, name, seen[site.label][:, -1:], -1)
        assert float(effects.total[i]) == pytest.approx(expected, abs=5e-6)
    assert effects.total.abs().min() > 1e-7
    assert effects.to_frame().shape == (len(names), 5)


def test_a_node_patched_with_itself_changes_nothing_and_all_of_them_give_the_corrupt_run() -> None:
    model = tiny_model("gpt2")
    same = replace(CORRUPT, input_ids=CORRUPT.input_ids)
    parts = ca.patch_effects(model, CLEAN, CLEAN, ablation="mean", nodes=["layers.0.mlp"])
    assert float(parts.total[0].abs()) > 1e-6
    one = replace(CLEAN, answers=CLEAN.answers)  # one prompt, its own mean
    alone = one.select(slice(0, 1))
    itself = ca.patch_effects(model, alone, alone, ablation="mean")
    assert itself.total.abs().max() < 1e-8 and itself.direct.abs().max() < 1e-8
    # Heads and MLPs of both layers at all tokens, and the embedding: what is left is the corrupt run.
    the_map = block_map(model)
    with torch.no_grad():
        other = the_map.forward(same.input_ids, cache=True)[1]

        def edit(name: str, layer: int, x: Tensor) -> Tensor:
            if name == "resid_pre" and layer == 0:
                return other.layers[0].resid_pre
            return getattr(other.layers[layer], name) if name in ("z", "mlp_out") else x

        torch.testing.assert_close(the_map.forward(CLEAN.input_ids, edit=edit), model(same.input_ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_nodes_give_the_clean_answer_and_none_the_corrupt_one(family: str) -> None:
    model = tiny_model(family)
    found = ca.output_nodes(model, CLEAN, CORRUPT)
    assert len(found.accuracy) == LAYERS * (HEADS + 1) + 1
    ends = [direct_parts(model, b.input_ids) for b in (CORRUPT, CLEAN)]
    for at, parts in zip((0, -1), ends, strict=True):
        final = parts.final
        if at and family != "opt-post-norm":  # the embedding of the last token stays the corrupt run's
            final = final - parts.embed + ends[0].embed
        if at and family == "opt-post-norm":
            continue  # norms after every sum: the embedding's way is scaled by them
        logits = parts.logits(final, CLEAN.answers)
        expected = nn.functional.cross_entropy(logits, CLEAN.answer)
        torch.testing.assert_close(found.loss[at], expected, atol=1e-5, rtol=0)


def test_the_last_mlp_acts_directly_only() -> None:
    """With the final norm's scale held too, its total effect is its direct one."""
    model = tiny_model("llama")
    effects = ca.patch_effects(model, CLEAN, CORRUPT, ["layers.1.mlp"])
    parts, other = (direct_parts(model, b.input_ids) for b in (CLEAN, CORRUPT))
    changed = parts.final - parts.vector("layers.1.mlp") + other.vector("layers.1.mlp")
    directions = parts.block_map.final_norm.gain * parts.scale[:, None, None] * model.lm_head.weight[CLEAN.answers]
    fall = torch.einsum("bd,bmd->bm", parts.final - changed, directions)
    expected = (fall[CLEAN.rows, CLEAN.answer] - fall.mean(-1)).mean()
    torch.testing.assert_close(effects.direct[0], expected.detach(), atol=1e-8, rtol=0)
    assert abs(float(effects.indirect[0])) > 1e-6  # the scale does move where it is not held


def test_the_search_stops_where_it_is_told_and_orders_can_be_given() -> None:
    model = tiny_model("gpt2")
    ranked, searched = (ca.output_nodes(model, CLEAN, CORRUPT, search=s, n=3) for s in ("ranked", "iterated"))
    assert ranked.n == searched.n == 3 and len(searched.chosen) == 3
    assert float(searched.loss[1]) <= float(ranked.loss[1]) + 1e-9  # the first step is the best there is
    backwards = ca.output_nodes(model, CLEAN, CORRUPT, order=list(reversed(ranked.nodes)))
    assert backwards.nodes == tuple(reversed(ranked.nodes))
    torch.testing.assert_close(backwards.loss[-1], ranked.loss[-1])
    assert ranked.to_frame().shape == (len(ranked.nodes) + 1, 4)


def test_paths_are_those_of_the_two_steps_by_hand() -> None:
    model = tiny_model("gpt2")
    paths = ca.path_effects(model, CLEAN, CORRUPT)
    source, target = "layers.0.attn.head.1", "layers.1.attn.head.2"
    the_map = block_map(model)
    with torch.no_grad():
        clean, other = (the_map.forward(b.input_ids, cache=True)[1] for b in (CLEAN, CORRUPT))
    held: dict[str, Tensor] = {}

    def first(name: str, layer: int, x: Tensor) -> Tensor:
        if name != "z":
            return x
        if layer == 0:
            x = clean.layers[0].z.clone()
            x[:, :, 1] = other.layers[0].z[:, :, 1]
            return x
        held["z"] = x
        return clean.layers[layer].z

    def second(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "z" and layer == 1:
            x = clean.layers[1].z.clone()
            x[:, :, 2] = held["z"][:, :, 2]
        return x

    def metric(logits: Tensor) -> float:
        chosen = logits[:, -1].gather(1, CLEAN.answers)
        return float((chosen[CLEAN.rows, CLEAN.answer] - chosen.mean(-1)).mean())

    with torch.no_grad():
        whole = metric(the_map.forward(CLEAN.input_ids))
        direct = metric(the_map.forward(CLEAN.input_ids, edit=first))
        carried = metric(the_map.forward(CLEAN.input_ids, edit=second))
    assert paths.between(source) == pytest.approx(whole - direct, abs=1e-9)
    assert paths.between(source, target) == pytest.approx(whole - carried, abs=1e-9)
    assert abs(whole - carried) > 1e-6
    assert paths.to_frame().shape == (2 * HEADS + HEADS * HEADS, 3)
    with pytest.raises(InvalidInput, match="later layer"):
        paths.between(target, source)
    with pytest.raises(InvalidInput, match="expected a head of 2 layers of 4"):
        paths.between("layers.0.mlp")


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama", "qwen3", "gemma2", "gemma3", "opt"])
def test_attention_is_the_model_s_own(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    table = ca.attention_table(model, CLEAN)
    with torch.no_grad():
        own = torch.stack(model(CLEAN.input_ids, output_attentions=True).attentions, 1)[:, :, :, -1]
    torch.testing.assert_close(table.rows, own, atol=1e-6, rtol=0)
    torch.testing.assert_close(table.labels, own[..., 1:9:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.content, own[..., 2:10:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(table.last, own[..., -3:].sum(-1), atol=1e-6, rtol=0)


def test_categories_of_made_up_attention() -> None:
    table = ca.attention_table(tiny_model("gpt2"), CLEAN)
    labels = torch.zeros_like(table.labels)
    labels[CLEAN.rows, 0, 0, CLEAN.answer] = 0.9
    labels[:, 0, 1] = 0.2
    labels[:, 0, 2, 1] = 0.8
    labels[CLEAN.answer == 2, 1, 0, 2] = 0.9  # "looks at C where C is right", at all alike otherwise
    labels[CLEAN.answer != 2, 1, 0] = 0.1
    last = torch.zeros_like(table.last)
    last[:, 0, 3] = 0.9
    kinds = ca.categorise_heads(replace(table, labels=labels, last=last))
    for head, kind in enumerate(["correct_letter", "uniform", "single_letter", "amplification"]):
        assert f"layers.0.attn.head.{head}" in kinds.named(kind)
    assert kinds.named("single_letter") == ["layers.0.attn.head.2", "layers.1.attn.head.0"]
    assert set(kinds.to_frame()["kind"]) == {"correct_letter", "uniform", "single_letter", "amplification", "other"}
    by_answer = replace(table, labels=labels).by_answer("layers.0.attn.head.0")
    torch.testing.assert_close(by_answer, 0.9 * torch.eye(4, dtype=by_answer.dtype))
    with pytest.raises(InvalidInput, match="kind='best'"):
        kinds.named("best")


# -------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_the_model_do_what_the_map_does(family: str) -> None:
    """Padding on both sides, shared keys, rotary positions, norms of queries and keys, windows and soft caps."""
    model = tiny_model(family)
    heads = ["layers.0.attn.head.1", "layers.0.attn.head.2", "layers.1.attn.head.3"]
    found = ca.compress_heads(model, heads, CLEAN, rank=1, parts="qkv")
    for side in ("left", "right", None):
        given = CLEAN if side is None else padded(CLEAN, side, 2)
        if side == "left" and not family.startswith(("llama", "mistral", "qwen", "gemma", "neox")):
            continue  # learned positions count from the first column in a plain run
        ends = torch.full((12,), given.input_ids.shape[1] - (3 if side == "right" else 1))
        with torch.no_grad():
            plain = model(given.input_ids, attention_mask=given.attention_mask).logits[given.rows, ends]
            with found.apply(given) as same:
                logits = same(given.input_ids, attention_mask=given.attention_mask).logits[given.rows, ends]
            after = model(given.input_ids, attention_mask=given.attention_mask).logits[given.rows, ends]
        if not plain.isfinite().all():
            assert family == "gemma2"  # its own eager attention gives NaN for rows of padding
            assert side == "left"
            continue
        assert same is model and torch.equal(plain, after)
        chosen = logits.gather(1, given.answers)
        expected = found.evaluate(given)
        loss = float(nn.functional.cross_entropy(chosen.float(), given.answer))
        assert loss == pytest.approx(expected.loss, abs=1e-5)
        assert (logits - plain).abs().max() > 1e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("basis", ["class_means", "svd"])
@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama", "qwen3", "gemma2", "opt"])
def test_full_rank_changes_nothing_and_rank_none_does(family: str, basis: str) -> None:
    model = tiny_model(family)
    size = block_map(model).head_dim
    whole = ca.compress_heads(model, ALL_HEADS, CLEAN, rank=size, parts="qkv", basis=basis)
    plain = whole.evaluate(CLEAN, compressed=False)
    score = whole.evaluate(CLEAN)
    assert score.loss == pytest.approx(plain.loss, abs=1e-6) and score.explained == pytest.approx(1, abs=1e-6)
    small = ca.compress_heads(model, ALL_HEADS, CLEAN, rank=0, parts="qkv", basis=basis)
    assert abs(small.evaluate(CLEAN).loss - plain.loss) > 1e-4
    assert small.evaluate(CLEAN).explained < 0.1
    both = small.evaluate([CLEAN.select(slice(0, 8)), CLEAN.select(slice(8, 12))])
    assert both.loss == pytest.approx(small.evaluate(CLEAN).loss, abs=1e-5)


def test_three_dimensions_hold_four_class_means() -> None:
    """Of queries, or of keys, exactly; of both together only where they lie in one subspace: up to six are needed."""
    model = tiny_model("gpt2")
    head = ["layers.1.attn.head.0"]
    seen = ca.substitution.collect(model, head, CLEAN)
    q, k = seen.q[1, 0], seen.k[1, 0]
    means = {"q": torch.stack([q[CLEAN.answer == i].mean(0) for i in range(4)]), "k": k.mean(0)}
    apart = ca.compress_heads(model, head, CLEAN, rank=3, shared=False)
    six = ca.compress_heads(model, head, CLEAN, rank=6)
    for part in "qk":
        x = means[part]
        torch.testing.assert_close(apart.spaces[1, 0, part](x), x, atol=1e-9, rtol=0)
        torch.testing.assert_close(six.spaces[1, 0, part](x), x, atol=1e-9, rtol=0)
    three = ca.compress_heads(model, head, CLEAN, rank=3)
    missed = max(float((three.spaces[1, 0, part](means[part]) - means[part]).abs().max()) for part in "qk")
    assert missed > 1e-3
    vectors = three.spaces[1, 0, "q"].basis
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=vectors.dtype), atol=1e-9, rtol=0)


def test_half_precision_is_fitted_in_single() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = ca.compress_heads(model, ALL_HEADS, CLEAN, rank=2)
    assert found.spaces[0, 0, "q"].basis.dtype == torch.float32
    assert torch.isfinite(torch.tensor(found.evaluate(CLEAN).loss))
    with found.apply(CLEAN), torch.no_grad():
        assert model(CLEAN.input_ids).logits.dtype == torch.bfloat16


def test_directions_are_features_of_their_head() -> None:
    model = tiny_model("llama")
    found = ca.compress_heads(model, ["layers.1.attn.head.3"], CLEAN, rank=2, parts="qkv")
    seen = ca.substitution.collect(model, found.names, CLEAN)
    for part, width in (("q", 24), ("k", 12), ("v", 24)):
        feature = found.feature("layers.1.attn.head.3", part, 1)
        assert feature.site == f"layers.1.attn.{'z' if part == 'v' else part}" and len(feature.write) == width
        space = found.spaces[1, 3, part]
        if part != "v":
            values = feature.activations(model, CLEAN.input_ids)
            got = values[:, -1] if part == "q" else values.gather(1, CLEAN.label_pos)
            x = getattr(seen, part)[1, 3]
            torch.testing.assert_close(got, space.coordinates(x)[..., 1], atol=1e-5, rtol=0)
    found.feature("layers.1.attn.head.3", "v").promoted(model, 3)
    with pytest.raises(InvalidInput, match=r"compressed are layers\.1\.attn\.head\.3"):
        found.feature("layers.0.attn.head.0")
    normed = ca.compress_heads(tiny_model("qwen3"), ["layers.1.attn.head.3"], CLEAN, rank=2)
    with pytest.raises(InvalidInput, match="norms its q"):
        normed.feature("layers.1.attn.head.3", "q")


# ----------------------------------------------------------------------------------------------- known circuits


@pytest.mark.parametrize("feature", ["nth_item", "token"])
def test_a_planted_circuit_is_found_with_its_feature(feature: str) -> None:
    model = PlantedChoice(LISTS, feature, seed=3)
    ordered, shuffled = (LISTS.sample(100, o, seed=i) for i, o in enumerate(("ordered", "shuffled")))
    corrupt = LISTS.corrupted(shuffled, seed=1)
    assert bool(ca.answered(model, shuffled).all())
    shares = ca.logit_attribution(model, shuffled)
    kinds = ca.categorise_heads(ca.attention_table(model, shuffled), shares)
    assert kinds.named("correct_letter") == [model.letter_head]
    assert shares.to_frame()["node"][0] == model.letter_head
    for search in ("ranked", "iterated"):
        assert ca.output_nodes(model, shuffled, corrupt, search=search).chosen == (model.letter_head,)
    effects = ca.patch_effects(model, shuffled, corrupt).to_frame().set_index("node")
    gatherer = "layers.1.attn.head.0"
    assert abs(effects.loc[gatherer, "direct"]) < 0.05 < 5 < effects.loc[gatherer, "total"]
    few = slice(0, 24)
    paths = ca.path_effects(model, shuffled.select(few), corrupt.select(few))
    assert paths.to_frame()["source"][0] in (gatherer, model.letter_head)
    assert paths.between(gatherer, model.letter_head) == pytest.approx(effects.loc[gatherer, "total"], rel=0.02)
    assert abs(paths.between(gatherer)) < 0.05

    # The planted feature lives in three dimensions; the model cannot do without them.
    three, none = (ca.compress_heads(model, [model.letter_head], ordered, rank=r) for r in (3, 0))
    assert three.evaluate(shuffled).accuracy == 1 and none.evaluate(shuffled).accuracy < 0.5
    assert ca.compress_heads(model, [model.letter_head], ordered, basis="random").evaluate(shuffled).accuracy < 0.9
    # And centroids tell which it is.
    fit = LISTS.sample(400, "shuffled", seed=9)
    found = {f: ca.feature_test(model, [model.letter_head], f, shuffled, fit) for f in ("nth_item", "token")}
    other = "token" if feature == "nth_item" else "nth_item"
    assert found[feature].recovered > 0.95 and found[other].recovered < 0.1
    assert found[feature].to_frame().shape == (3, 4)
    table = ca.compare_features(model, [model.letter_head], {"shuffled": shuffled}, {"shuffled": fit})
    assert table.set_index("feature").loc[feature, "recovered"] == pytest.approx(found[feature].recovered)


def test_centroids_of_one_kind_of_prompts_are_alike_on_another() -> None:
    model = PlantedChoice(LISTS, "nth_item", seed=3)
    one, other = (
        ca.centroids(model, [model.letter_head], LISTS.sample(300, o, seed=1), "nth_item")
        for o in ("ordered", "random")
    )
    for key, centroid in one.items():
        assert centroid.cosine(other[key]).min() > 0.99
    letters = ca.centroids(model, [model.letter_head], LISTS.sample(300, "shuffled", seed=1), "token")
    assert letters[2, 0, "k"].cosine(letters[2, 0, "k"]).min() > 0.99
    with pytest.raises(InvalidInput, match="no class"):
        ca.centroids(model, [model.letter_head], LISTS.sample(300, seed=1), "token")[2, 0, "k"].cosine(
            replace(letters[2, 0, "k"], classes=torch.tensor([90, 91, 92, 93]))
        )


def test_a_rank_curve_and_all_figures() -> None:
    from matplotlib.figure import Figure

    model = PlantedChoice(LISTS, "nth_item", seed=3)
    prompts, corrupt = LISTS.sample(40, seed=1), LISTS.corrupted(LISTS.sample(40, seed=1))
    heads = [model.letter_head]
    curve = ca.rank_curve(model, heads, prompts, {"shuffled": LISTS.sample(60, "shuffled", seed=2)}, (0, 1, 3))
    frame = curve.to_frame()
    assert len(frame) == 6 and curve.full["shuffled"].accuracy == 1
    rising = frame[frame["basis"] == "class_means"]["accuracy"].tolist()
    assert rising == sorted(rising) and rising[-1] == 1
    shares = ca.logit_attribution(model, prompts)
    table = ca.attention_table(model, prompts)
    compression = ca.compress_heads(model, heads, prompts)
    effects = ca.patch_effects(model, prompts, corrupt)
    outputs = ca.output_nodes(model, prompts, corrupt)
    axes = [
        curve.plot(), curve.plot(what="loss"), effects.plot(), effects.plot(what="indirect"),
        effects.plot_direct_total(), outputs.plot(), outputs.plot(what="loss"),
        table.plot(heads, tokens=LISTS.text(prompts.input_ids[0]).split()), ca.categorise_heads(table, shares).plot(),
        ca.attribution_bars(shares.names, shares.effects().mean(0).tolist()),
        compression.plot(prompts), compression.plot(prompts, by="token"),
        ca.path_effects(model, prompts, corrupt).plot(),
    ]  # fmt: skip
    assert all(ax.get_xlabel() and isinstance(ax.figure, Figure) for ax in axes)
    own = Figure().subplots()
    assert outputs.plot(own) is own
    for wrong in (
        lambda: effects.plot(what="best"),
        lambda: outputs.plot(what="best"),
        lambda: curve.plot(basis="svd"),
        lambda: compression.plot(prompts, head="layers.0.attn.head.0"),
        lambda: table.plot(["layers.0.mlp"]),
        lambda: table.plot(heads, tokens=["a"]),
    ):
        with pytest.raises(InvalidInput):
            wrong()


# ------------------------------------------------------------------------------------------- padding, bad input


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = tiny_model(family)
    other, corrupt = padded(CLEAN, side), padded(CORRUPT, side)
    for name in ("labels", "content", "last"):
        torch.testing.assert_close(
            getattr(ca.attention_table(model, other), name), getattr(ca.attention_table(model, CLEAN), name)
        )
    torch.testing.assert_close(
        ca.logit_attribution(model, other).effects(), ca.logit_attribution(model, CLEAN).effects(), atol=1e-6, rtol=0
    )
    heads = ["layers.1.attn.head.0"]
    one, two = (ca.compress_heads(model, heads, b, rank=2).evaluate(b) for b in (other, CLEAN))
    assert one.loss == pytest.approx(two.loss, abs=1e-6)
    for positions in ("final", "labels"):
        effects = [
            ca.patch_effects(model, *pair, ["layers.0.attn.head.2", "layers.1.mlp"], positions=positions)
            for pair in ((CLEAN, CORRUPT), (other, corrupt))
        ]
        torch.testing.assert_close(effects[0].total, effects[1].total, atol=1e-6, rtol=0)
    paths = [ca.path_effects(model, *pair).to_frame() for pair in ((CLEAN, CORRUPT), (other, corrupt))]
    merged = paths[0].merge(paths[1], on=["source", "target"])
    assert (merged["effect_x"] - merged["effect_y"]).abs().max() < 1e-6


def test_a_model_at_chance_is_warned_of() -> None:
    model = tiny_model("gpt2")
    with pytest.warns(ca.ModelAtChance, match="guessing gives 25%"):
        ca.logit_attribution(model, CLEAN)
    for run in (
        lambda: ca.patch_effects(model, CLEAN, CORRUPT, ["layers.0.mlp"]),
        lambda: ca.output_nodes(model, CLEAN, CORRUPT, n=1),
        lambda: ca.attention_table(model, CLEAN),
        lambda: ca.compress_heads(model, ["layers.0.attn.head.0"], CLEAN),
        lambda: ca.path_effects(model, CLEAN, CORRUPT),
    ):
        with pytest.warns(ca.ModelAtChance):
            run()


def test_a_model_that_knows_is_not(recwarn: pytest.WarningsRecorder) -> None:
    ca.logit_attribution(PlantedChoice(LISTS), LISTS.sample(8, seed=0))
    assert not [w for w in recwarn if w.category is ca.ModelAtChance]


def test_bad_input() -> None:
    model = tiny_model("gpt2")
    head = ["layers.0.attn.head.0"]
    few = LISTS.sample(3, seed=0)
    longer = padded(CORRUPT, "right")
    longer = replace(longer, attention_mask=torch.ones_like(longer.input_ids))
    for run, message in (
        (lambda: ca.patch_effects(model, CLEAN, CLEAN), "same right label"),
        (lambda: ca.patch_effects(model, CLEAN, batch(0, n=4)), "12 clean prompts and 4 corrupt"),
        (lambda: ca.patch_effects(model, CLEAN, longer), "10 tokens clean, 13 corrupt"),
        (lambda: ca.output_nodes(model, CLEAN, longer), "10 tokens clean, 13 corrupt"),
        (lambda: ca.patch_effects(model, CLEAN), "needs corrupt="),
        (lambda: ca.patch_effects(model, CLEAN, CORRUPT, ablation="half"), "ablation='half'"),
        (lambda: ca.patch_effects(model, CLEAN, CORRUPT, ["layers.9.mlp"]), "2 layers"),
        (lambda: ca.patch_effects(model, CLEAN, CORRUPT, ["layers.0.attn.head.4"]), "has 4 heads"),
        (lambda: ca.patch_effects(model, CLEAN, CORRUPT, ["layers.0.mlp.neuron.40"]), "has 40 hidden units"),
        (lambda: ca.patch_effects(model, CLEAN, CORRUPT, ["layers.0.attn"]), "expected a head, an MLP"),
        (lambda: ca.output_nodes(model, CLEAN, CORRUPT, recover=0.0), "recover=0"),
        (lambda: ca.output_nodes(model, CLEAN, CORRUPT, n=11), "n=11: the model has 10 nodes"),
        (lambda: ca.output_nodes(model, CLEAN, CORRUPT, order=["x"]), "each once"),
        (lambda: ca.compress_heads(model, head, CLEAN, rank=7), "rank=7"),
        (lambda: ca.compress_heads(model, head, CLEAN, parts="qx"), "parts='qx'"),
        (lambda: ca.compress_heads(model, head, batch(0, n=4)), "at least 2"),
        (lambda: ca.compress_heads(model, [], CLEAN), r"heads=\[\]"),
        (lambda: ca.compress_heads(model, ["layers.0.mlp"], CLEAN), "only heads"),
        (lambda: ca.feature_test(model, head, "colour", CLEAN), "feature='colour'"),
        (lambda: ca.feature_test(PlantedChoice(LISTS), head, "token", few), "at least 2"),
        (lambda: ca.path_effects(model, CLEAN), "needs corrupt="),
        (lambda: ca.path_effects(model, CLEAN, CORRUPT, ablation="half"), "ablation='half'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            run()
    # Of another length on purpose, at the final tokens only.
    assert len(ca.patch_effects(model, CLEAN, longer, ["layers.0.mlp"], same_length=False).total) == 1
    with pytest.raises(InvalidInput, match="10 tokens clean, 13 corrupt"):
        ca.patch_effects(model, CLEAN, longer, same_length=False, positions="all")
    with (
        ca.compress_heads(model, head, CLEAN).apply(CLEAN),
        pytest.raises(InvalidInput, match=r"shape \(12, 4\), the batch has \(12, 10\)"),
    ):
        model(CLEAN.input_ids[:, :4])


def test_models_that_are_no_decoders_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="causal"):
        ca.logit_attribution(tiny_model("bert-mlm"), CLEAN)
    pair = nn.Module()
    pair.config = type("Config", (), {"is_encoder_decoder": True})()  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        ca.attention_table(pair, CLEAN)
    with pytest.raises(UnsupportedModel, match="register_block_map"):
        ca.attention_table(nn.Linear(2, 2), CLEAN)
