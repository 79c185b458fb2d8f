"""Codebook models: snap off is the base model, codes, search, interventions and generation, training, other methods."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import InvalidInput, TrainingDiverged, UnsupportedModel
from broadsheet.interpretability.codebook_features import (
    CodebookModel,
    CodeIndex,
    codes,
    compare_with_neurons,
    fit,
    index_codes,
    intervene,
    merged_inputs,
    neuron_outputs,
    neuron_scores,
    patch_codes,
    similar_codes,
    wrap_codebooks,
)
from broadsheet.nn.cards import feature_card
from broadsheet.nn.hooks import capture
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model
from broadsheet.nn.tiny_models import FAMILIES, tiny_inputs, tiny_model

ALL = ("attn_heads", "attn", "mlp", "mlp_mid", "block", "qkv")


def output(model, ids, mask=None):
    with torch.no_grad():
        out = model(ids) if mask is None else model(ids, attention_mask=mask)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def wrapped(family="gpt2", at=("attn_heads", "mlp"), num_codes=20, k=2, **how):
    return wrap_codebooks(tiny_model(family, torch.float64), at, num_codes, k, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_base_model_and_on_it_runs_on_codes(family):
    model, ids = tiny_model(family), tiny_inputs(family)
    before = output(model, ids)
    cb = wrap_codebooks(model, ALL, 15, 2)
    on = output(cb, ids)
    assert not torch.equal(on, before)
    with cb.off():
        assert torch.equal(output(cb, ids), before)
    cb.snap = False
    assert torch.equal(output(cb, ids), before)
    cb.snap = True
    assert torch.equal(output(cb, ids), on)
    heads = [site for site in cb.sites if ".attn.head." in site]
    assert len(heads) == 8  # of z, which has query heads whatever the keys and values have
    found = codes(cb, ids)
    assert set(found) == set(cb.sites)
    assert all(ids.dtype == torch.int32 and ids.shape[-1] == 2 and int(ids.max()) < 15 for ids in found.values())
    with patch_codes(cb, found):
        torch.testing.assert_close(output(cb, ids), on)
    cb.unwrap()
    assert torch.equal(output(model, ids), before)
    assert torch.equal(output(wrap_codebooks(model, "mlp", 5).off().__enter__(), ids), before)


@pytest.mark.parametrize("at", ["attn_heads", "mlp", "mlp_mid", "qkv"])
def test_what_stands_at_the_place_is_a_mean_of_codes(at):
    cb = wrapped(at=at, k=3)
    ids = tiny_inputs("gpt2")
    sites = [place.site for place in cb.places]
    with capture(cb.model, sites) as seen:
        output(cb, ids)
    found = codes(cb, ids)
    for place in cb.places:
        rows = [cb.codebook(site)[found[site].long()].mean(-2) for site in place.codebooks]
        torch.testing.assert_close(seen[place.name], torch.cat(rows, -1))


def test_padding_on_either_side_gives_the_same_codes():
    cb = wrapped("llama")
    ids = tiny_inputs("llama", batch=1)
    alone = codes(cb, ids)
    for left in (True, False):
        pad = torch.ones(1, 3, dtype=torch.long)
        long = torch.cat([pad, ids] if left else [ids, pad], 1)
        mask = torch.cat([pad * 0, torch.ones_like(ids)] if left else [torch.ones_like(ids), pad * 0], 1)
        both_ids = torch.cat([long, tiny_inputs("llama", batch=1, seed=3).repeat(1, 2)[:, :10]])
        found = codes(cb, both_ids, torch.cat([mask, torch.ones(1, 10, dtype=torch.long)]))
        for site, of_site in found.items():
            part = of_site[:1, 3:] if left else of_site[:1, :7]
            rest = of_site[:1, :3] if left else of_site[:1, 7:]
            assert torch.equal(part, alone[site])
            assert bool((rest == -1).all())


def test_any_module_by_names_of_submodules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
    x = torch.randn(5, 3)
    before = model(x)
    cb = wrap_codebooks(model, ("0", "3"), 7, groups=2, example=x)
    assert cb.sites == ("0.group.0", "0.group.1", "3.group.0", "3.group.1")
    out = cb(x)
    (out.sum() + cb.loss).backward()
    assert float(cb.quantizer("0").codebook.grad.abs().sum()) > 0
    assert float(model[0].weight.grad.abs().sum()) > 0
    with cb.off():
        assert torch.equal(model(x), before)
    with pytest.raises(InvalidInput, match="only places in mapped blocks"):
        cb.feature("0.group.0", 1)
    other = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    assert wrap_codebooks(other, "0", 7).sites == ("0",)
    with pytest.raises(InvalidInput, match="is a ReLU, whose width cannot be told: hand in example="):
        wrap_codebooks(nn.Sequential(nn.Linear(3, 8), nn.ReLU()), "1", 7)
    with pytest.raises(UnsupportedModel, match="name submodules"):
        wrap_codebooks(nn.Sequential(nn.Linear(3, 8)), "mlp", 7)


# ------------------------------------------------------------------------------------------------------ interventions


def test_replace_puts_the_codes_in():
    cb = wrapped(k=2)
    ids = tiny_inputs("gpt2")
    site, head = "layers.0.mlp", "layers.1.attn.head.2"
    cases = [
        ({(site, 3): None}, None, {site: (slice(None), [3, 3])}),
        ({(site, 3): 4}, None, {site: ([4], [3, 3])}),
        ({(site, 3): -1, (site, 7): -1}, None, {site: ([6], [3, 7])}),
        ({(head, 5): slice(2, 5)}, None, {head: ([2, 3, 4], [5, 5])}),
        ({(site, 3): [1, 2]}, 1, {site: ([1, 2], [None, 3])}),
    ]
    plain = codes(cb, ids)
    for on, slot, expected in cases:
        with intervene(cb, on, slot=slot):
            found = codes(cb, ids)
        for name, (columns, wanted) in expected.items():
            changed = plain[name].clone()
            for slot_number, code in enumerate(wanted):
                if code is not None:
                    changed[:, columns, slot_number] = code
            assert torch.equal(found[name], changed)
        if head not in expected:
            assert torch.equal(found["layers.0.attn.head.0"], plain["layers.0.attn.head.0"])
    assert torch.equal(codes(cb, ids)[site], plain[site])  # nothing is left behind


def test_a_boolean_mask_tells_texts_apart():
    cb = wrapped(k=1)
    ids = tiny_inputs("gpt2")
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 3] = True
    plain = codes(cb, ids)["layers.0.mlp"]
    new = (int(plain[1, 3, 0]) + 1) % 20
    with intervene(cb, {("layers.0.mlp", new): mask}):
        found = codes(cb, ids)["layers.0.mlp"]
    assert (found != plain).nonzero()[:, :2].tolist() == [[1, 3]]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_append_and_ablate_change_the_shares(reduce):
    cb = wrapped(at="mlp", k=2, reduce=reduce)
    ids = tiny_inputs("gpt2")
    place = cb.places[0]
    book = cb.codebook(place.name)
    plain = codes(cb, ids)[place.name].long()
    share = 1 / 2 if reduce == "mean" else 1.0
    with capture(cb.model, place.site) as seen, intervene(cb, {(place.name, 4): [2]}, "append"):
        output(cb, ids)
    expected = book[plain].sum(-2) * share
    expected[:, 2] = (book[plain[:, 2]].sum(-2) + book[4]) * (1 / 3 if reduce == "mean" else 1.0)
    torch.testing.assert_close(seen[place.name], expected)
    code = int(plain[0, 3, 1])
    with capture(cb.model, place.site) as seen, intervene(cb, {(place.name, code): None}, "ablate"):
        output(cb, ids)
    kept = (plain != code).double()[..., None]
    torch.testing.assert_close(seen[place.name], (book[plain] * kept).sum(-2) * share)


def test_disable_is_as_if_the_row_were_not_there():
    cb = wrapped(at="mlp", layers=[0], k=2)
    ids = tiny_inputs("gpt2")
    site = "layers.0.mlp"
    plain = codes(cb, ids)[site]
    gone = int(plain[0, 0, 0])
    with intervene(cb, {(site, gone): None}, "disable"):
        found = codes(cb, ids)[site].long()
    fewer = wrapped(at="mlp", layers=[0], k=2, num_codes=19)
    keep = torch.arange(20) != gone
    with torch.no_grad():
        fewer.quantizer(site).codebook.copy_(cb.quantizer(site).codebook[:, keep])
    assert torch.equal(found, keep.nonzero().flatten()[codes(fewer, ids)[site].long()])
    with intervene(cb, {(site, gone): [0]}, "disable"):
        some = codes(cb, ids)[site]
    assert torch.equal(some[:, 1:], plain[:, 1:])
    assert not bool((some[:, 0] == gone).any())


@pytest.mark.parametrize("family", ["gpt2", "neox-sequential", "llama", "opt", "gemma2"])
@pytest.mark.parametrize("positions", [None, -1, slice(5, 9), [3, 8]])
def test_generation_with_and_without_cache_is_the_same(family, positions):
    cb = wrapped(family, k=1, num_codes=12)
    ids = tiny_inputs(family)
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    mask = torch.ones_like(ids)
    seen, switched = [], []

    def watch(place, x, ids, weights, clock):
        if place == "layers.0.mlp":
            seen.append((clock.offset, x.shape[1]))
            natural = cb.quantizer(place).assign(x)
            switched.extend(clock.offset + i for i in (ids != natural).any(-1).any(0).nonzero().flatten().tolist())
            at = torch.zeros(12, dtype=torch.bool)
            at[slice(None) if positions is None else 6 if positions == -1 else positions] = True
            now = at[clock.offset : clock.offset + x.shape[1]]
            assert bool((ids[:, now] == 3).all())
            assert torch.equal(ids[:, ~now], natural[:, ~now])
        return ids, weights

    on = {("layers.0.mlp", 3): positions, ("layers.1.attn.head.1", 5): positions}
    with intervene(cb, on), cb.edited(watch):
        cached = cb.generate(ids, attention_mask=mask, use_cache=True, **how)
    assert seen == [(0, 7), *((7 + i, 1) for i in range(4))]  # every column once
    assert len(switched) == len(set(switched))
    with intervene(cb, on):
        whole = cb.generate(ids, attention_mask=mask, use_cache=False, **how)
        beams = cb.generate(ids, attention_mask=mask, num_beams=2, **how)
    assert torch.equal(cached, whole)
    assert beams.shape == (2, 12)
    with torch.no_grad():
        logits = []
        for text in (cached, cached[:, :-1]):
            with intervene(cb, on if positions != -1 else dict.fromkeys(on, 6)):
                logits.append(cb(text).logits[:, 6:-1].argmax(-1))
    assert torch.equal(logits[0], cached[:, 7:])  # as if the whole text had been read at once


def test_codes_of_another_text_carry_its_prediction():
    cb = wrapped(at=("attn_heads", "mlp"), k=2)
    a, b = tiny_inputs("gpt2", batch=3, seed=1), tiny_inputs("gpt2", batch=3, seed=2)
    b[:, -1] = a[:, -1]  # the token itself is all that codes do not carry
    with patch_codes(cb, codes(cb, b), positions=-1):
        torch.testing.assert_close(output(cb, a)[:, -1], output(cb, b)[:, -1])
    assert not torch.allclose(output(cb, a)[:, -1], output(cb, b)[:, -1])


# ---------------------------------------------------------------------------------------------------- index and search


@pytest.fixture(scope="module")
def corpus():
    return TopicCorpus(n_topics=4, words_per_topic=4, n_common=6)


@pytest.fixture(scope="module")
def indexed(corpus):
    model = small_language_model(corpus.vocab_size, width=24, layers=2, heads=2, length=24)
    ids = corpus.sample(60, 12, generator(0))[0]
    mask = torch.ones_like(ids)
    mask[::3, 9:] = 0
    batches = [(ids[:40], mask[:40]), (ids[40:], mask[40:])]
    cb = wrap_codebooks(model, num_codes=30, k=2, init="kmeans", batches=batches)
    return cb, batches, index_codes(cb, batches, corpus.tokenizer())


def test_the_index_holds_the_codes_of_every_real_token(indexed):
    cb, batches, index = indexed
    assert len(index) == int(sum(mask.sum() for _, mask in batches))
    assert index.codes["layers.0.mlp"].dtype == torch.int16
    found = codes(cb, *batches[1])["layers.1.mlp"]
    mine = index.text == 45
    assert torch.equal(index.of("layers.1.mlp")[mine], found[5][: int(mine.sum())].long())
    usage = index.usage().set_index("site")
    assert usage.loc["layers.0.mlp", "active"] == len(index.of("layers.0.mlp").unique())


def test_search_is_precision_and_recall_counted_by_hand(indexed, corpus):
    _, _, index = indexed
    words = corpus.words
    pattern = r"\b(" + "|".join(words[int(i)] for i in corpus.topic_tokens[0]) + r")\b"
    wanted = torch.isin(index.token_ids, corpus.topic_tokens[0])
    assert torch.equal(index.matches(pattern), wanted)
    assert torch.equal(index.matches(corpus.topic_tokens[0].tolist()), wanted)
    found = index.search_codes(pattern, min_precision=0.2)
    assert found.matches == int(wanted.sum())
    assert len(found) > 0
    for row in found.table.itertuples():
        fires = (index.of(row.site) == row.code).any(-1)
        assert row.precision == pytest.approx(float((fires & wanted).sum() / fires.sum()))
        assert row.recall == pytest.approx(float((fires & wanted).sum() / wanted.sum()))
        assert row.recall > 0.01
        assert row.f1 == pytest.approx(2 * row.precision * row.recall / (row.precision + row.recall))
    assert found.table["f1"].is_monotonic_decreasing
    assert found.best == (found.table["site"][0], found.table["code"][0])
    found.plot()
    every = {(s, c) for s in index.sites for c in range(30)}
    missed = every - {(r.site, r.code) for r in found.table.itertuples()}
    for site, code in list(missed)[:200]:
        fires = (index.of(site) == code).any(-1)
        hits = int((fires & wanted).sum())
        assert hits / max(1, int(fires.sum())) < 0.2 or hits / int(wanted.sum()) <= 0.01
    two = index.matches(rf"{words[4]} {words[5]}", where="end")
    texts = [(a, b) for a, b in zip(index.token_ids[:-1], index.token_ids[1:], strict=True) if (a, b) == (4, 5)]
    assert int(two.sum()) >= 1 or not texts
    assert bool((index.token_ids[two] == 5).all())


def test_contexts_counts_purity_and_parts(indexed):
    _, _, index = indexed
    site = "layers.0.mlp"
    code = int(index.counts(site).argmax())
    fires = (index.of(site) == code).any(-1)
    table = index.token_counts(site, code)
    assert table["count"][0] == int(index.token_ids[fires].bincount().max())
    assert list(table.columns) == ["token_id", "count", "share", "token"]
    contexts = index.top_contexts(site, code, n=3, window=4)
    row = contexts.iloc[0]
    place = (index.text == row["text"]) & (index.position == row["position"])
    assert bool(fires[place])
    assert row["token"].strip() == index.tokenizer.decode([int(index.token_ids[place])]).strip()
    parts = index.partition_inputs(site)
    assert torch.equal(parts[code].sort().values, fires.nonzero().flatten())
    purity = index.code_purity(index.token_ids).set_index("site").loc[site]
    pure, majority = [], 0
    for members in parts.values():
        counts = index.token_ids[members].bincount()
        pure.append(int((counts > 0).sum()) == 1)
        majority += int(counts.max())
    assert purity["pure"] == pytest.approx(np.mean(pure))
    assert purity["majority"] == pytest.approx(majority / (2 * len(index)))


def test_scores_of_codes_and_neurons_are_the_best_there_are(indexed):
    cb, batches, index = indexed
    labels = torch.where(index.token_ids < 12, index.token_ids - 3, -1).clamp_min(-1)
    scores = index.label_scores(labels)
    site = "layers.1.mlp"
    for label in (0, 4):
        f1 = []
        for code in range(30):
            fires = (index.of(site) == code).any(-1)
            hits = float((fires & (labels == label)).sum())
            f1.append(2 * hits / float(fires.sum() + (labels == label).sum()))
        assert float(scores.f1[site][label]) == pytest.approx(max(f1))
    values = {"layers.0.mlp": neuron_outputs(cb, batches)["layers.0.mlp"][:, :3]}
    values["layers.0.mlp"][:, 1] = values["layers.0.mlp"][:, 1].round()  # ties stand or fall together
    found = neuron_scores(values, labels)
    for label in (0, 4):
        best = 0.0
        for column in values["layers.0.mlp"].T:
            for sign in (1, -1):
                for threshold in column.unique():
                    fires = sign * column >= sign * threshold
                    hits = float((fires & (labels == label)).sum())
                    best = max(best, 2 * hits / float(fires.sum() + (labels == label).sum()))
        assert float(found.f1["layers.0.mlp"][label]) == pytest.approx(best)


def test_neurons_are_what_goes_into_the_bottleneck(indexed):
    cb, batches, _ = indexed
    values = neuron_outputs(cb, batches)
    ids, mask = batches[0]
    with cb.keeping_inputs(), torch.no_grad():
        cb(ids, attention_mask=mask)
    raw = cb.latest["layers.1.mlp"].inputs
    torch.testing.assert_close(values["layers.1.mlp"][: int(mask.sum())], raw[mask.bool()])
    assert set(values) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")}


def test_a_neuron_is_compared_at_the_code_s_recall(indexed, corpus):
    cb, batches, index = indexed
    values = neuron_outputs(cb, batches)
    pattern = corpus.words[12]
    compared = compare_with_neurons(index, [pattern], values, min_precision=0.0)
    row = compared.table.iloc[0]
    wanted = index.matches(pattern)
    best = 0.0
    for x in values.values():
        for column in x.T:
            for sign in (1, -1):
                for threshold in column[wanted]:
                    fires = sign * column >= sign * threshold
                    if float((fires & wanted).sum() / wanted.sum()) >= row["recall"] - 1e-6:
                        best = max(best, float((fires & wanted).sum() / fires.sum()))
    assert row["neuron_precision"] == pytest.approx(best, rel=1e-5)
    compared.plot()
    planted = {"x": torch.where(wanted, 5.0, torch.rand(len(index), generator=generator(0)))[:, None]}
    assert compare_with_neurons(index, [pattern], planted, min_precision=0.0).neuron_precision == 1


def test_index_saved_and_loaded(indexed, tmp_path, corpus):
    _, _, index = indexed
    index.save(tmp_path / "index")
    back = CodeIndex.load(tmp_path / "index", corpus.tokenizer())
    assert torch.equal(back.of("layers.0.mlp"), index.of("layers.0.mlp"))
    assert back.num_codes == index.num_codes
    assert back.search_codes([4], min_precision=0).matches == index.search_codes([4], min_precision=0).matches


def test_near_codes_and_merged_inputs(indexed, corpus):
    cb, _, _ = indexed
    table = similar_codes(cb, "layers.0.mlp", 3, 5)
    book = cb.codebook("layers.0.mlp").double()
    cosine = torch.nn.functional.cosine_similarity(book, book[3], dim=1)
    cosine[3] = -2
    assert table["code"].tolist() == cosine.topk(5).indices.tolist()
    ids = corpus.sample(30, 6, generator(5))[0]
    merged = merged_inputs(cb, ids, ["layers.1.mlp"])["layers.1.mlp"]
    found = codes(cb, ids)["layers.1.mlp"][:, -1]
    pairs = sum(bool(set(found[i].tolist()) & set(found[j].tolist())) for i in range(30) for j in range(i + 1, 30))
    assert len(merged.within) == pairs
    assert 0 < float(merged.random.mean()) < np.log(2)
    merged.plot()


# ----------------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize("site", ["layers.1.mlp", "layers.0.attn.head.1"])
def test_a_code_is_a_feature_of_every_other_method(indexed, site):
    cb, batches, index = indexed
    code = int(index.counts(site).argmax())
    feature = cb.feature(site, code)
    ids, mask = batches[0]
    expected = (codes(cb, ids, mask)[site] == code).any(-1).float()
    torch.testing.assert_close(feature.activations(cb.model, ids, mask), expected)
    assert 0 < float(expected.mean()) < 1
    with feature.ablated(cb.model):
        without = output(cb.model, ids, mask)
    with intervene(cb, {(site, code): None}, "ablate"):
        torch.testing.assert_close(output(cb, ids, mask), without, atol=1e-4, rtol=1e-4)
    card = feature_card(cb.model, feature, batches, tokenizer=index.tokenizer)
    assert card.density == pytest.approx(float(index.counts(site)[code]) / len(index), rel=1e-3)
    assert "code" in card.to_html()
    attribution = feature.attribution(cb.model, ids[:2], mask[:2])
    assert bool(attribution.heads.isfinite().all())


# ----------------------------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_logs_every_codebook(corpus):
    def sample(n, draw):
        return corpus.sample(n, 10, draw)[0]

    def fresh():
        model = small_language_model(corpus.vocab_size, width=16, layers=1, heads=2, length=16)
        return wrap_codebooks(model, num_codes=24)

    cb = fresh()
    before = [p.detach().clone() for p in cb.parameters()]
    report = fit(cb, sample, steps=60, batch=16, lr=1e-2, log_every=20)
    assert report.losses[-1] < 0.95 * report.losses[0]
    assert report.log["task"].iloc[-1] < report.log["task"].iloc[0] - 0.1
    assert report.log["step"].unique().tolist() == [20, 40, 60]
    assert report.log["site"].unique().tolist() == ["layers.0.attn.head.0", "layers.0.attn.head.1", "layers.0.mlp"]
    assert (report.log["active"] / 24 + report.log["dead_fraction"]).round(6).eq(1).all()
    assert not any(torch.equal(a, b) for a, b in zip(before, cb.parameters(), strict=True))
    report.plot()
    again = fresh()
    assert fit(again, sample, steps=60, batch=16, lr=1e-2, log_every=20).losses == report.losses
    frozen = fresh()
    weights = [p.detach().clone() for p in frozen.model.parameters()]
    fit(frozen, sample, steps=3, batch=4, model_lr_factor=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, frozen.model.parameters(), strict=True))
    assert all(p.requires_grad for p in frozen.model.parameters())


def test_the_loss_of_a_step_is_task_plus_reconstruction(corpus):
    model = small_language_model(corpus.vocab_size, width=16, layers=1, heads=2, length=16)
    cb = wrap_codebooks(model, num_codes=9)
    ids = corpus.sample(4, 10, generator(0))[0]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with cb.keeping_inputs(), torch.no_grad():
        logits = cb(ids, attention_mask=mask).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = float(-logp[mask[:, 1:].bool()].mean())
    for name, snap in cb.latest.items():
        q = cb.quantizer(name)
        x = q.normalised(snap.inputs)
        off = (q.decode(snap.codes) - x).square().flatten(2).sum(-1)
        expected += float(off[mask.bool()].mean().detach())
    report = fit(cb, [(ids, mask)], steps=1, lr=1e-9)
    assert report.losses[0] == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_training_goes_on_exactly(corpus, tmp_path):
    def sample(n, draw):
        return corpus.sample(n, 8, draw)[0]

    def fresh():
        return wrap_codebooks(
            small_language_model(corpus.vocab_size, width=16, layers=1, heads=2, length=16), "mlp", 12
        )

    how = {"steps": 12, "batch": 4, "replace_after": 3, "log_every": 4}
    whole = fresh()
    losses = fit(whole, sample, **how).losses
    part = fresh()

    def stop(cb, batch):
        stop.calls += 1
        if stop.calls > 7:
            raise KeyboardInterrupt
        from broadsheet.interpretability.codebook_features import next_token_loss

        return next_token_loss(cb, batch)

    stop.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(part, sample, **{**how, "log_every": 100, "replace_after": None}, loss_fn=stop, checkpoint=tmp_path / "c")
    resumed = fresh()
    plain = fit(fresh(), sample, **{**how, "replace_after": None}).losses
    report = fit(resumed, sample, **{**how, "replace_after": None}, checkpoint=tmp_path / "c")
    assert 0 < report.resumed_from < 12
    assert report.losses == plain
    assert losses != plain  # replacement does something


def test_training_warns_and_stops_where_it_makes_no_sense(corpus):
    model = small_language_model(corpus.vocab_size, width=16, layers=1, heads=2, length=16)
    cb = wrap_codebooks(model, "mlp", 12)
    ids = corpus.sample(4, 8, generator(0))[0]
    cb.snap = False
    with pytest.warns(UserWarning, match="snap is False"):
        fit(cb, [ids], steps=1)
    cb.snap = True
    with pytest.raises(TrainingDiverged, match="k-means"):
        fit(cb, [ids], steps=3, loss_fn=lambda cb, ids: cb(ids).logits.sum() * torch.nan)
    for wrong, message in (({"steps": 0}, "steps=0"), ({"lr": 0.0}, "lr=0"), ({"schedule": "step"}, "schedule='step'")):
        with pytest.raises(InvalidInput, match=message):
            fit(cb, [ids], **{"steps": 1, **wrong})
    with pytest.raises(InvalidInput, match="empty"):
        fit(cb, [], steps=1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saved_and_loaded_the_codes_are_the_same(family, tmp_path):
    cb = wrapped(family, num_codes=11, k=2, reduce="sum", similarity="euclidean")
    cb.save_pretrained(tmp_path / "cb")
    back = CodebookModel.from_pretrained(tmp_path / "cb")
    back.double()
    ids = tiny_inputs(family)
    for site, found in codes(cb, ids).items():
        assert torch.equal(found, codes(back, ids)[site])
    torch.testing.assert_close(output(back, ids), output(cb, ids))


def test_a_module_of_the_user_s_is_saved_and_loaded(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    torch.manual_seed(0)
    cb = wrap_codebooks(make(), "0", 7)
    cb.save_pretrained(tmp_path / "cb")
    with pytest.raises(InvalidInput, match="hand in model="):
        CodebookModel.from_pretrained(tmp_path / "cb")
    x = torch.randn(4, 3)
    assert torch.equal(CodebookModel.from_pretrained(tmp_path / "cb", model=make())(x), cb(x))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"at": ("mlpp",)}, "no submodule 'mlpp'.*attn_heads"),
        ({"at": ()}, "at is empty"),
        ({"at": ("mlp", "mlp")}, None),
        ({"layers": [2]}, r"layer 2: the model has 2 layers \(0 to 1\)"),
        ({"layers": "first"}, "layers='first'"),
        ({"k": 21}, "k=21: a codebook has 20 codes"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"init": "kmeans"}, "needs batches="),
        ({"batches": []}, "is for init='kmeans'"),
    ],
)
def test_bad_settings_say_what_is_expected(wrong, message):
    if message is None:
        assert len(wrapped(**wrong).sites) == 2  # the same kind twice is the kind
        return
    model = tiny_model("gpt2")
    with pytest.raises(InvalidInput, match=message):
        wrap_codebooks(model, **{"at": ("mlp",), "num_codes": 20, **wrong})
    assert not hasattr(model, "_codebook_features")
    with pytest.raises(InvalidInput, match="batches is empty"):
        wrap_codebooks(model, "mlp", 5, init="kmeans", batches=[])
    wrap_codebooks(model, "mlp", 5)  # and a failed attempt leaves the model free
    with pytest.raises(InvalidInput, match="carries codebooks already"):
        wrap_codebooks(model, "mlp", 5)


def test_bad_questions_say_what_is_expected(indexed):
    cb, _, index = indexed
    with pytest.raises(InvalidInput, match=re.escape("no codebook 'layers.0.mpl'; nearest of 6: layers.0.mlp")):
        cb.codebook("layers.0.mpl")
    with pytest.raises(InvalidInput, match=r"code 30: the codebook at 'layers\.0\.mlp' has 30 \(0 to 29\)"):
        cb.feature("layers.0.mlp", 30)
    with pytest.raises(InvalidInput, match="code -1"):
        index.token_counts("layers.0.mlp", -1)
    with pytest.raises(InvalidInput, match="matches none of"):
        index.search_codes("zebra")
    with pytest.raises(InvalidInput, match="no regular expression"):
        index.search_codes("(")
    with pytest.raises(InvalidInput, match="token mask is"):
        index.search_codes(torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="needs a tokenizer"):
        CodeIndex(index.codes, index.num_codes, index.token_ids, index.text, index.position).search_codes("a")
    with pytest.raises(InvalidInput, match="lower min_precision"):
        _ = index.search_codes([4], min_precision=1.0, min_recall=1.0).best
    with pytest.raises(InvalidInput, match="batches is empty"):
        index_codes(cb, [])
    with cb.off(), pytest.raises(InvalidInput, match="snap is False"):
        codes(cb, torch.zeros(1, 3, dtype=torch.long))
    site = "layers.0.mlp"
    for on, how, message in (
        ({}, {}, "no code is named"),
        ({(site, 1): None}, {"mode": "add"}, "mode='add'"),
        ({(site, 1): None}, {"slot": 2}, "slot=2"),
        ({(site, 1): None}, {"slot": 0, "mode": "ablate"}, "slot=0 is for mode='replace'"),
        ({(site, 1): None, (site, 2): None, (site, 3): None}, {}, "3 codes for 2 slots"),
        ({(site, c): None for c in range(29)}, {"mode": "disable"}, "1 are left for k=2"),
    ):
        with pytest.raises(InvalidInput, match=message), intervene(cb, on, **how):
            pass
    with intervene(cb, {(site, 1): -20}), pytest.raises(InvalidInput, match="position -20: the text has 3 columns"):
        cb(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(InvalidInput, match=r"\[batch, time, 2\]"), patch_codes(cb, {site: torch.zeros(1, 3, 1).int()}):
        pass
