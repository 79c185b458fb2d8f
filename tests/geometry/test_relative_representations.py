"""Relative representations: what drops out, what does not, and what goes together."""

import copy
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.geometry.relative_representations import (
    SIMILARITIES,
    AbsoluteModel,
    Anchors,
    AnchorWarning,
    Frame,
    RelativeEncoder,
    RelativeHead,
    RelativeLayer,
    RelativeModel,
    StitchWarning,
    anchor_curve,
    bootstrap_anchors,
    check_same,
    compare_spaces,
    farthest_points,
    latent_plot,
    latents_of,
    mean_pairwise_cosine,
    parallel_anchors,
    performance_proxy,
    pooled,
    proxy_study,
    reconstruction_plot,
    relative_projection,
    select_anchors,
    shared_words,
    stitch,
    stitching_matrix,
)

ROTATION = {"cosine", "angular", "inner", "euclidean", "basis_change"}
SCALE = {"cosine", "angular"}  # a positive factor for every row
SHIFT = {"euclidean", "l1"}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(d, e=None, seed=0):
    """``[d, e]`` with orthonormal rows."""
    e = e or d
    return torch.linalg.qr(randn(e, e, seed=seed))[0][:d]


def slow(x, a, similarity):
    """One entry after the other, numpy in double precision."""
    x, a = x.double().numpy(), a.double().numpy()
    out = np.zeros((len(x), len(a)))
    for i, row in enumerate(x):
        for j, anchor in enumerate(a):
            cosine = row @ anchor / (np.linalg.norm(row) * np.linalg.norm(anchor))
            out[i, j] = {
                "cosine": cosine,
                "angular": 1 - 2 * np.arccos(np.clip(cosine, -1, 1)) / np.pi,
                "inner": row @ anchor / np.sqrt(len(row)),
                "euclidean": -np.linalg.norm(row - anchor),
                "l1": -np.abs(row - anchor).sum(),
                "basis_change": np.nan,
            }[similarity]
    if similarity == "basis_change":
        out = np.stack([np.linalg.lstsq(a.T, row, rcond=None)[0] for row in x])
    return torch.from_numpy(out)


def same(x, y, tolerance=1e-10):
    assert x.shape == y.shape
    assert float((x - y).detach().abs().max()) < tolerance


# --- the projection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("k", [3, 6, 11])
def test_as_the_slow_reference(similarity, k):
    x, a = randn(9, 6), randn(k, 6, seed=1)
    same(relative_projection(x, a, similarity), slow(x, a, similarity))
    quick = relative_projection(x.float(), a.float(), similarity)
    assert quick.dtype == torch.float32
    same(quick.double(), slow(x, a, similarity), 1e-4 if similarity == "basis_change" else 1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(n=st.integers(1, 7), d=st.integers(2, 6), extra=st.integers(0, 3), k=st.integers(2, 8), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_what_drops_out(similarity, n, d, extra, k, seed):
    z, a = randn(n, d, seed=seed), randn(k, d, seed=seed + 1)
    r = relative_projection(z, a, similarity)
    q = rotation(d, d + extra, seed=seed + 2)  # into a wider space, too
    factor = 1.0 if similarity == "inner" else None
    if similarity in ROTATION:
        # the released inner product divides by the root of the width
        scale = 1.0 if factor is None else ((d + extra) / d) ** 0.5
        same(scale * relative_projection(z @ q, a @ q, similarity), r, 1e-8)
    if similarity in SCALE:
        s = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)).double() * 1e6 + 1e-6
        t = torch.rand(k, 1, generator=torch.Generator().manual_seed(seed + 1)).double() * 1e6 + 1e-6
        same(relative_projection(s * z, a, similarity), r)
        same(relative_projection(z, t * a, similarity), r)
        same(relative_projection(s * z @ q, t * a @ q, similarity), r, 1e-8)
        assert float(r.abs().max()) <= 1
        itself = relative_projection(a, a, similarity, check=False).diagonal()
        same(itself, torch.ones_like(itself), 1e-7)
    if similarity in SHIFT:
        b = randn(1, d, seed=seed + 4)
        same(relative_projection(z + b, a + b, similarity), r)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    same(relative_projection(z, a[order], similarity), r[:, order], 1e-8)


@pytest.mark.parametrize("similarity", ["cosine", "inner"])
def test_the_rank_is_that_of_the_space(similarity):
    r = relative_projection(randn(40, 5), randn(30, 5, seed=1), similarity)
    assert int(torch.linalg.matrix_rank(r)) == 5


def test_any_invertible_map_drops_out_of_spanning_bases():
    z, a, m = randn(8, 5), randn(5, 5, seed=1), randn(5, 5, seed=2)
    same(relative_projection(z @ m, a @ m, "basis_change"), relative_projection(z, a, "basis_change"), 1e-8)


def test_a_shift_does_not_drop_out_unless_a_frame_takes_it_off():
    z, a, b = randn(20, 6), randn(9, 6, seed=1), 3 * randn(1, 6, seed=2)
    moved = float((relative_projection(z + b, a + b) - relative_projection(z, a)).abs().max())
    assert moved > 0.3
    for frame in ("centred", "whitened"):
        same(relative_projection(z + b, a + b, frame=frame), relative_projection(z, a, frame=frame))
    m = randn(6, 6, seed=3)
    same(relative_projection(z @ m + b, a @ m + b, frame="whitened"), relative_projection(z, a, frame="whitened"), 1e-7)
    turned = relative_projection(z @ m, a @ m, frame="centred") - relative_projection(z, a, frame="centred")
    assert float(turned.abs().max()) > 0.1


def test_a_frame_of_the_training_set():
    train = randn(500, 4) @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.1]).double()) + 7
    frame = Frame.fit(train, whiten=True)
    made = frame(train)
    same(made.mean(0), torch.zeros(4).double(), 1e-9)
    same(made.T @ made / 500, torch.eye(4).double(), 1e-9)
    soft = Frame.fit(train, whiten=True, ridge=0.1)(train)
    assert float(soft.var(0).min()) < 0.1 < float(soft.var(0).max())
    flat = torch.cat([train, torch.ones(500, 1).double()], 1)
    assert Frame.fit(flat, whiten=True).map.shape == (5, 4)  # a direction without spread is left out
    assert relative_projection(train[:3], train[:9], frame=frame).shape == (3, 9)


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_lengths_beyond_the_range_of_squares(size):
    z, a = randn(4, 5), randn(3, 5, seed=1)
    same(relative_projection(z * size, a), relative_projection(z, a))
    small = relative_projection((z * 1e-30).float(), (a * 1e25).float())
    same(small.double(), relative_projection(z, a), 1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("frame", [None, "centred", "whitened"])
def test_gradients(similarity, frame):
    if frame == "whitened":  # the whitening itself is fitted, not learned through
        frame = Frame.fit(randn(30, 4, seed=5), whiten=True)
    x, a = randn(3, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: relative_projection(x, a, similarity, frame=frame), (x, a))


def test_gradients_at_the_ends_of_the_range():
    a = randn(4, 3).requires_grad_()
    for similarity in ("cosine", "angular"):
        r = relative_projection(a, a, similarity, check=False)
        assert bool(torch.isfinite(torch.autograd.grad(r.sum(), a)[0]).all())
        zero = torch.zeros(2, 3).double().requires_grad_()
        r = relative_projection(zero, randn(4, 3, seed=1), similarity, check=False)
        assert not torch.autograd.grad(r.sum(), zero)[0].any()


def test_half_precision_follows_the_inputs():
    for dtype in (torch.float16, torch.bfloat16):
        z = randn(6, 8).to(dtype)
        assert relative_projection(z, z[:3]).dtype == dtype


@pytest.mark.parametrize(
    ("x", "a", "how", "message"),
    [
        (randn(3, 4), randn(2, 5), {}, "4 features, anchors 5"),
        (randn(3, 4), randn(0, 4), {}, "k=0"),
        (randn(3, 4), randn(2, 4), {"similarity": "dot"}, "'dot'"),
        (randn(3, 4), randn(2, 4), {"frame": "white"}, "'white'"),
        (torch.full((3, 4), torch.nan), randn(2, 4), {}, "NaN"),
        (randn(3, 4), torch.full((2, 4), torch.inf), {}, "anchor_latents"),
        (randn(3, 4), torch.ones(3, 4).double(), {"frame": "whitened"}, "all the same"),
    ],
)
def test_bad_latents(x, a, how, message):
    with pytest.raises(InvalidInput, match=message):
        relative_projection(x, a, **how)


def test_a_latent_of_length_zero_warns_and_counts_as_unlike_everything():
    z = randn(4, 5)
    z[2] = 0
    with pytest.warns(AnchorWarning, match=r"1 of the latents.*row 2"):
        r = relative_projection(z, randn(3, 5, seed=1))
    assert not r[2].any()


def test_anchors_that_all_point_one_way_warn_and_centring_helps():
    a = 100 + randn(6, 5)
    with pytest.warns(AnchorWarning, match="centred"):
        relative_projection(randn(2, 5), a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relative_projection(randn(2, 5), a, frame="centred")
    unit = (a / a.norm(dim=1, keepdim=True)).numpy()
    cosines = unit @ unit.T
    expected = (cosines.sum() - 6) / 30
    assert mean_pairwise_cosine(a) == pytest.approx(expected, abs=1e-12)


# --- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "fps", "kmeans"])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_anchors_are_different_sorted_and_seeded(method, k):
    z = randn(40, 3)
    chosen = select_anchors(z, k, method, seed=3)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == k
    assert int(chosen.min()) >= 0 and int(chosen.max()) < 40
    assert chosen.equal(select_anchors(z, k, method, seed=3))
    assert (
        k == 40
        or (k, method) == (1, "kmeans")
        or any(not chosen.equal(select_anchors(z, k, method, seed=s)) for s in range(4, 10))
    )


def test_classes_get_their_share():
    labels = ["cat"] * 30 + ["dog"] * 8 + ["eel"] * 2
    chosen = select_anchors(randn(40, 3), 12, stratify=labels)
    counts = [sum(labels[i] == name for i in chosen.tolist()) for name in ("cat", "dog", "eel")]
    assert counts == [5, 5, 2]
    for method in ("fps", "kmeans"):
        chosen = select_anchors(randn(40, 3), 9, method, stratify=torch.arange(40) % 3)
        assert [int((chosen % 3 == c).sum()) for c in range(3)] == [3, 3, 3]
    uneven = [
        tuple(
            int((select_anchors(randn(40, 3), 10, stratify=torch.arange(40) % 3, seed=s) % 3 == c).sum())
            for c in range(3)
        )
        for s in range(12)
    ]
    assert all(sorted(shares) == [3, 3, 4] for shares in uneven)
    assert len(set(uneven)) == 3  # who gets the odd one is drawn


def test_farthest_points_are_farthest():
    z = randn(60, 4)
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    chosen = [5]
    while len(chosen) < 8:
        nearest = np.max(unit @ unit[chosen].T, axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
    assert farthest_points(z, 8, 5).tolist() == chosen
    copies = torch.ones(5, 3).double()
    assert sorted(farthest_points(copies, 5).tolist()) == [0, 1, 2, 3, 4]


def test_centroids_have_an_anchor_each():
    centres = 10 * torch.eye(6).double()
    z = centres.repeat_interleave(20, 0) + 0.1 * randn(120, 6)
    assert sorted((select_anchors(z, 6, "kmeans") // 20).tolist()) == list(range(6))
    chosen = select_anchors(z, 6, "kmeans")
    unit = z / z.norm(dim=1, keepdim=True)
    middle = unit.reshape(6, 20, 6).mean(1)
    away = (unit.reshape(6, 20, 6) - middle[:, None]).norm(dim=2)
    assert chosen.tolist() == (away.argmin(1) + 20 * torch.arange(6)).tolist()
    copies = torch.ones(9, 3).double()  # clusters stay empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(set(select_anchors(copies, 4, "kmeans").tolist())) == 4


def test_top_and_held_out_limit_the_choice():
    chosen = select_anchors(list("abcdefghij"), 3, "top", top=4, held_out=[1])
    assert set(chosen.tolist()) == {0, 2, 3}
    assert 7 not in select_anchors(randn(9, 2), 8, "fps", held_out=[7]).tolist()


@pytest.mark.parametrize(
    ("data", "k", "how", "message"),
    [
        (randn(5, 2), 0, {}, "k=0"),
        (randn(5, 2), 6, {}, "1 to 5"),
        (randn(5, 2), 5, {"held_out": [0]}, "1 to 4"),
        (randn(5, 2), 2, {"held_out": [9]}, "held_out holds 9"),
        (randn(5, 2), 2, {"method": "best"}, "'best'"),
        (randn(5, 2), 2, {"method": "top"}, "top=None"),
        (randn(5, 2), 2, {"method": "top", "top": 0}, "top=0"),
        (randn(5, 2), 2, {"top": 3}, "top=3"),
        (["a", "b"], 1, {"method": "fps"}, "needs latents"),
        ("ab", 1, {}, "one text"),
        (randn(5, 2), 2, {"stratify": [1, 2]}, "one label"),
        (torch.full((5, 2), torch.nan), 2, {"method": "kmeans"}, "NaN"),
    ],
)
def test_bad_choices(data, k, how, message):
    with pytest.raises(InvalidInput, match=message):
        select_anchors(data, k, **how)


def test_anchors_know_who_they_are():
    x = randn(6, 3)
    assert Anchors.of(x).ids == Anchors.of(x.clone()).ids
    assert Anchors.of(x.float()).ids != Anchors.of(x.float() + 1).ids
    assert Anchors.take(x, [4, 1]).ids == (4, 1)
    assert Anchors.take(x, [4, 1]).samples.equal(x[[4, 1]])
    texts = Anchors.of(["one", "two"])
    assert len(texts) == 2
    both = Anchors.of({"input_ids": torch.arange(6).reshape(3, 2), "attention_mask": torch.ones(3, 2)})
    assert len(both) == 3
    data = torch.utils.data.TensorDataset(x, torch.arange(6))
    assert Anchors.take(data, [2]).samples.equal(x[[2]])
    for samples, ids, message in (
        (x[:0], None, "k=0"),
        (x, [1], "1 ids"),
        (x[[0, 0]], None, "more than once"),
        (x[:2], [3, 3], "more than once"),
        ("text", None, "one text"),
        ([object()], None, "ids="),
    ):
        with pytest.raises(InvalidInput, match=message):
            Anchors.of(samples, ids)
    with pytest.raises(InvalidInput, match="anchor 6"):
        Anchors.take(x, [6])


def test_anchors_from_the_test_set_warn():
    with pytest.warns(AnchorWarning, match="leak|test samples"):
        Anchors.take(randn(6, 3), [1, 2], held_out=[2, 3])


def test_lists_must_match():
    x = randn(6, 3)
    a, b = Anchors.of(x), Anchors.of(x.flip(0))
    check_same(a, Anchors.of(x))
    with pytest.raises(InvalidInput, match="another order"):
        check_same(a, b)
    with pytest.raises(InvalidInput, match="only 3 of 6"):
        check_same(a, Anchors.of(torch.cat([x[:3], randn(3, 3, seed=1)])))
    check_same(a, b, parallel=True)
    with pytest.raises(InvalidInput, match="6 anchors on one side, 5"):
        check_same(a, Anchors.of(x[:5]), parallel=True)


def test_parallel_anchors_pair_what_means_the_same():
    left, right = ["dog", "cat", "eel", "owl"], ["chat", "chien", "loup", "hibou"]
    pairs = [("cat", "chat"), ("dog", "chien"), ("wolf", "loup"), ("owl", "hibou"), ("owl", "chien")]
    a, b = parallel_anchors(left, right, pairs=pairs)
    assert [(left[i], right[j]) for i, j in zip(a, b, strict=True)] == [
        ("dog", "chien"),
        ("cat", "chat"),
        ("owl", "hibou"),
    ]
    a, b = parallel_anchors({"x": 1, "y": 2, "z": 3}, ["z", "x"], 1, seed=1)
    assert ["x", "y", "z"][int(a)] == ["z", "x"][int(b)]
    with pytest.raises(InvalidInput, match="k=4: 3 pairs"):
        parallel_anchors(left, right, 4, pairs=pairs)


# --- layer and head --------------------------------------------------------------------------------------------------


def test_the_layer_s_options():
    x, a = randn(6, 8), randn(4, 8, seed=1)
    r = relative_projection(x, a)
    same(RelativeLayer(4, None)(x, a), r)
    layer = RelativeLayer(4).double()
    same(layer(x, a), nn.functional.layer_norm(r, (4,)))
    same(RelativeLayer(4, "l2")(x, a).norm(dim=1), torch.ones(6).double())
    rounded = RelativeLayer(4, None, quantise=0.25)(x, a)
    same(rounded * 4, (rounded * 4).round())
    assert float((rounded - r).abs().max()) <= 0.125
    grouped = RelativeLayer(4, None, per_class_mean=[0, 1, 1, 0])(x, a)
    same(grouped, torch.stack([r[:, [0, 3]].mean(1), r[:, [1, 2]].mean(1)], 1))
    heads = RelativeLayer(4, None, heads=2)(x, a)
    same(heads, torch.cat([relative_projection(x[:, :4], a[:, :4]), relative_projection(x[:, 4:], a[:, 4:])], 1))
    assert [RelativeLayer(4, heads=2).width, RelativeLayer(4, per_class_mean=[0, 0, 1, 1]).width] == [8, 2]


def test_gradients_pass_rounding():
    x, a = randn(3, 4).requires_grad_(), randn(5, 4, seed=1)
    plain, rounded = (RelativeLayer(5, None, quantise=q)(x, a).sum() for q in (None, 0.1))
    same(torch.autograd.grad(plain, x)[0], torch.autograd.grad(rounded, x)[0])
    layer = RelativeLayer(5).double()
    assert torch.autograd.gradcheck(lambda x: layer(x, a), (x,))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 3, "heads": 0}, "heads=0"),
        ({"k": 3, "normalise_output": "batch"}, "'batch'"),
        ({"k": 3, "quantise": 0.0}, "bin"),
        ({"k": 3, "similarity": "dot"}, "'dot'"),
        ({"k": 3, "per_class_mean": [0, 1]}, "3 labels"),
        ({"k": 3, "per_class_mean": [0, 2, 2]}, "gap"),
    ],
)
def test_bad_layers(how, message):
    with pytest.raises(InvalidInput, match=message):
        RelativeLayer(**how)


def test_a_layer_says_what_does_not_fit():
    with pytest.raises(InvalidInput, match="5 anchors"):
        RelativeLayer(4)(randn(2, 6).float(), randn(5, 6).float())
    with pytest.raises(InvalidInput, match="divide"):
        RelativeLayer(4, heads=4)(randn(2, 6).float(), randn(4, 6).float())


def test_layer_and_head_are_saved(tmp_path):
    layer = RelativeLayer(4, "layernorm", 0.1, [0, 0, 1, 1], "angular", "centred")
    nn.init.normal_(layer.norm.weight)
    layer.save_pretrained(tmp_path / "layer")
    again = RelativeLayer.from_pretrained(tmp_path / "layer")
    x, a = randn(3, 6).float(), randn(4, 6, seed=1).float()
    assert again(x, a).equal(layer.eval()(x, a))
    assert again.same_columns(layer)
    head = RelativeHead(4, 3)
    head.save_pretrained(tmp_path / "head")
    assert RelativeHead.from_pretrained(tmp_path / "head")(x[:, :4]).equal(head(x[:, :4]))


def test_the_released_head_looks_at_the_company_and_ours_does_not():
    torch.manual_seed(0)
    r = randn(8, 5).float()
    ours, released = RelativeHead(5, 3).eval(), RelativeHead(5, 3, official=True).eval()
    same(ours(r)[:4], ours(r[:4]), 1e-6)
    assert float((released(r)[:4] - released(r[:4])).abs().max()) > 0.05
    hidden = released.before(nn.functional.normalize(r))
    expected = nn.functional.instance_norm(hidden.T[None])[0].T  # features as channels, samples as places
    same(released(r), released.out(expected), 1e-5)
    with pytest.raises(InvalidInput, match="two samples"):
        released(r[:1])


# --- pooling and encoders --------------------------------------------------------------------------------------------


def test_padding_counts_for_nothing_on_either_side():
    hidden = randn(2, 4, 3)
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    right = left.flip(1)
    turned = torch.cat([hidden[:, 2:], hidden[:, :2]], 1)
    moved = torch.where(torch.tensor([True, False])[:, None, None], turned, hidden)
    for pool in ("mean", "first", "last"):
        same(pooled(hidden, pool, left), pooled(moved, pool, right))
    same(pooled(hidden, "mean", left)[0], hidden[0, 2:].mean(0))
    same(pooled(hidden, "first", left)[0], hidden[0, 2])
    same(pooled(hidden, "last", right)[0], hidden[0, 1])
    same(pooled(hidden, "flatten"), hidden.flatten(1))
    same(pooled(randn(2, 5, 3, 3), "mean"), randn(2, 5, 3, 3).mean((2, 3)))
    same(pooled((hidden, None), lambda h, m: h.sum(1)), hidden.sum(1))
    for pool, mask, message in (
        (None, None, "pool="),
        ("max", None, "'max'"),
        ("mean", torch.ones(2, 3), "not known"),
    ):
        with pytest.raises(InvalidInput, match=message):
            pooled(hidden, pool, mask)


class Counted(nn.Module):
    """A linear encoder that counts its passes."""

    def __init__(self, inputs=4, latent=3, norm=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.map = nn.Linear(inputs, latent)
        self.norm = nn.BatchNorm1d(latent) if norm else nn.Identity()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.norm(self.map(x))


def test_anchors_are_embedded_with_the_weights_of_now():
    encoder, anchors, x = Counted(), randn(5, 4).float(), randn(7, 4, seed=1).float()
    model = RelativeModel(encoder, nn.Linear(5, 2), anchors)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        r = model.relative(x)
        same(r, model.layer.norm(relative_projection(encoder.map(x), encoder.map(anchors))), 1e-6)
        model.head(r).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        same(model.relative.projection(x), relative_projection(encoder.map(x), encoder.map(anchors)), 1e-6)


def test_only_the_samples_move_the_weights_unless_asked():
    anchors, x = randn(5, 4).float(), randn(7, 4, seed=1).float()
    gradients = []
    for passes, both in (("two", False), ("one", False), ("one", True), ("two", True)):
        encoder = Counted()
        relative = RelativeEncoder(encoder, anchors, anchor_gradient=both, passes=passes)
        relative(x)[:, 0].sum().backward()
        fixed = encoder.map(anchors) if both else encoder.map(anchors).detach()
        expected = torch.autograd.grad(relative_projection(encoder.map(x), fixed)[:, 0].sum(), encoder.map.weight)[0]
        same(encoder.map.weight.grad, expected, 1e-6)
        gradients.append(encoder.map.weight.grad)
    assert float((gradients[0] - gradients[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("how", [{"passes": "one"}, {"passes": "two"}, {"anchor_gradient": True}])
def test_one_pass_and_two_give_the_same(how):
    encoder = Counted()
    relative = RelativeEncoder(encoder, randn(5, 4).float(), **how)
    x = randn(7, 4, seed=1).float()
    same(relative(x), relative_projection(encoder.map(x), encoder.map(randn(5, 4).float())), 1e-6)
    assert encoder.passes == (2 if how == {"passes": "two"} else 1)


def test_batch_norm_keeps_anchors_out_of_the_batch():
    encoder = Counted(norm=True)
    relative = RelativeEncoder(encoder, randn(5, 4).float() + 3, passes="one", anchor_gradient=True)
    x = randn(7, 4, seed=1).float()
    alone = copy.deepcopy(encoder)
    same(relative.both(x)[0], alone(x), 1e-6)
    assert encoder.passes == 2


def test_a_frozen_encoder_embeds_its_anchors_once_and_again_when_it_changes():
    encoder = Counted()
    model = RelativeModel(encoder, nn.Linear(5, 2), randn(5, 4).float(), frozen=True)
    x = randn(7, 4, seed=1).float()
    model.train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    for _ in range(3):
        model(x).sum().backward()
    assert encoder.passes == 4
    changes = [
        lambda: encoder.map.weight.mul_(2),
        lambda: encoder.load_state_dict(Counted(seed=1).state_dict()),
        lambda: setattr(encoder.map, "weight", nn.Parameter(torch.randn(3, 4))),
        lambda: setattr(encoder.map.weight, "data", torch.randn(3, 4)),
    ]
    for change in changes:
        before = model.relative.anchor_latents()
        with torch.no_grad():
            change()
        after = model.relative.anchor_latents()
        assert not after.equal(before)
        same(after, encoder.map(randn(5, 4).float()).detach(), 1e-6)
    before = model.relative.anchor_latents()
    encoder.map.weight.data.mul_(3)  # leaves no trace
    model.relative.forget()
    assert not before.equal(model.relative.anchor_latents())


def test_latents_kept_in_inference_mode_serve_gradients_later():
    relative = RelativeEncoder(Counted(), randn(5, 4).float(), RelativeLayer(5, None, similarity="inner"), frozen=True)
    with torch.inference_mode():
        relative(randn(2, 4).float())
    x = randn(2, 4).float().requires_grad_()
    relative(x).sum().backward()
    assert x.grad is not None


def test_a_function_is_frozen_but_not_one_that_trains():
    relative = RelativeEncoder(lambda x: x.numpy() * 2, randn(5, 4).float())
    assert relative.frozen
    same(relative(randn(3, 4).float()), relative_projection(randn(3, 4).float(), randn(5, 4).float()), 1e-6)
    inner = Counted()
    with pytest.raises(InvalidInput, match="the module itself"):
        RelativeEncoder(lambda x: inner(x), randn(5, 4).float())(randn(3, 4).float())


def test_mappings_and_texts_go_in_by_name():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 6)

        def forward(self, input_ids, attention_mask=None):
            return {"last_hidden_state": self.table(input_ids)}

    def tokenizer(texts, padding, truncation, return_tensors):
        rows = [[len(w) for w in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # padded on the left
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "texts": texts}

    texts = ["a bb ccc", "dddd", "a a", "bb ccc dddd eeeee"]
    relative = RelativeEncoder(Text(), texts[:3], tokenizer=tokenizer, pool="mean").eval()
    r = relative(texts)
    assert r.shape == (4, 3)
    same(r[:3].diagonal(), torch.ones(3), 1e-6)
    same(r, torch.cat([relative([text]) for text in texts]), 1e-6)  # padding counts for nothing
    by_name = RelativeEncoder(relative.encoder, tokenizer(texts[:3], 1, 1, "pt"), pool="mean").eval()
    same(by_name(tokenizer(texts, 1, 1, "pt")), r, 1e-6)


def test_bad_encoders():
    with pytest.raises(InvalidInput, match="k=4, there are 5"):
        RelativeEncoder(Counted(), randn(5, 4), RelativeLayer(4))
    with pytest.raises(InvalidInput, match="passes='three'"):
        RelativeEncoder(Counted(), randn(5, 4), passes="three")
    with pytest.raises(InvalidInput, match="batch_size=0"):
        RelativeEncoder(Counted(), randn(5, 4), batch_size=0)
    with pytest.raises(InvalidInput, match="pool="):
        RelativeEncoder(nn.Conv2d(1, 2, 1), randn(5, 1, 3, 3).float())(randn(2, 1, 3, 3).float())
    with pytest.raises(InvalidInput, match="anchors are missing"):
        RelativeModel(Counted(), nn.Linear(5, 2))
    with pytest.raises(InvalidInput, match="nothing but the head"):
        RelativeModel(RelativeEncoder(Counted(), randn(5, 4)), nn.Linear(5, 2), frozen=True)


def test_a_graph_network_s_nodes():
    graph = (randn(6, 6) > 0).float()
    net = nn.Linear(4, 3)
    nodes = randn(6, 4).float()

    class Nodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, rows):
            return (graph @ self.net(nodes))[rows]

    relative = RelativeEncoder(Nodes(), torch.tensor([0, 3, 5])).eval()
    same(relative(torch.arange(6))[[0, 3, 5]].diagonal(), torch.ones(3), 1e-6)


# --- models, saved and stitched --------------------------------------------------------------------------------------


def network(seed=0, latent=6, k=12, outputs=3, **how):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, latent))
    head = nn.Sequential(nn.Linear(k, 8), nn.GELU(), nn.Linear(8, outputs))
    layer = RelativeLayer(k, **how)
    model = RelativeModel(encoder, head, randn(k, 4, seed=9).float(), layer)
    if how.get("normalise_output", "layernorm") == "layernorm":
        nn.init.normal_(layer.norm.weight)
    return model.eval()


class Turned(nn.Module):
    """An encoder whose latents are rotated, scaled row by row, and put into a wider space."""

    def __init__(self, encoder, d, wider=0, scaled=True):
        super().__init__()
        self.encoder, self.scaled = encoder, scaled
        self.register_buffer("q", rotation(d, d + wider).float())

    def forward(self, x):
        scale = 1 + x.abs().sum(1, keepdim=True) if self.scaled else 2.5
        return scale * self.encoder(x) @ self.q


def test_a_model_is_saved_whole(tmp_path):
    texts = [f"text {i}" for i in range(12)]
    model = network(similarity="angular", frame="centred", quantise=0.01)
    model.save_pretrained(tmp_path)
    again = RelativeModel.from_pretrained(tmp_path, encoder=network(5).encoder, head=network(5).head)
    x = randn(7, 4).float()
    assert again(x).equal(model(x))
    assert again.anchors.ids == model.anchors.ids
    assert not again.training
    assert stitch(again, model)(x).equal(model(x))
    with pytest.raises(InvalidInput, match="encoder= and head="):
        RelativeModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another encoder or head"):
        RelativeModel.from_pretrained(tmp_path, encoder=nn.Linear(4, 6), head=network().head)
    (tmp_path / "relative.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"relative\.json"):
        RelativeModel.from_pretrained(tmp_path, encoder=network().encoder, head=network().head)
    table = {text: randn(1, 6, seed=i)[0].float() for i, text in enumerate(texts)}
    words = RelativeModel(lambda rows: torch.stack([table[t] for t in rows]), nn.Linear(12, 2), texts).eval()
    words.save_pretrained(tmp_path / "texts")
    assert json.loads((tmp_path / "texts" / "relative.json").read_text())["encoder"]["frozen"]
    again = RelativeModel.from_pretrained(tmp_path / "texts", encoder=words.encoder, head=nn.Linear(12, 2))
    assert again(texts).equal(words(texts))


def test_a_model_stitched_with_itself_is_the_model():
    model, x = network(), randn(7, 4).float()
    joined = stitch(model, model)
    assert joined(x).equal(model(x))
    assert joined.label == "relative"
    assert {id(p) for p in joined.parameters()} == {id(p) for p in model.parameters()}  # moved together


@pytest.mark.parametrize("how", [{}, {"similarity": "angular"}, {"normalise_output": "l2"}, {"frame": "centred"}])
@pytest.mark.parametrize("wider", [0, 3])
def test_a_rotated_encoder_gives_the_same_predictions_under_the_old_head(how, wider):
    model, x = network(**how), randn(50, 4).float()
    scaled = "frame" not in how  # a mean moves with every row's own scale
    other = RelativeModel(Turned(model.encoder, 6, wider, scaled), model.head, model.anchors, RelativeLayer(12, **how))
    joined = stitch(other.eval(), model)
    same(joined(x), model(x), 1e-4)
    assert joined(x).argmax(1).equal(model(x).argmax(1))


def test_absolute_latents_do_not_survive_a_rotation_and_procrustes_undoes_it():
    torch.manual_seed(0)
    x = randn(600, 8).float()
    y = x @ randn(8, 6, seed=1).float()
    labels = y.argmax(1)
    encoder, head = nn.Linear(8, 16), nn.Linear(16, 6)
    with torch.no_grad():  # a head that reads the encoder well
        w = randn(8, 16, seed=2).float()
        encoder.weight.copy_(w.T), encoder.bias.zero_()
        head.weight.copy_((torch.linalg.pinv(w) @ randn(8, 6, seed=1).float()).T), head.bias.zero_()
    model = AbsoluteModel(encoder, head).eval()
    turned = AbsoluteModel(Turned(encoder, 16, scaled=False), nn.Linear(16, 6)).eval()
    assert float((model(x).argmax(1) == labels).float().mean()) == 1
    bad = stitch(turned, model, baseline="absolute")
    assert bad.label == "absolute"
    assert float((bad(x).argmax(1) == labels).float().mean()) < 0.4
    good = stitch(turned, model, x[:40], baseline="procrustes")
    same(good(x), model(x), 1e-3)


def test_parallel_anchors_join_two_languages():
    torch.manual_seed(0)
    meaning = randn(40, 6).float()
    english = {f"word{i}": z for i, z in enumerate(meaning)}
    french = {f"mot{i}": 3 * z @ rotation(6).float() for i, z in enumerate(meaning)}
    pick = lambda table: lambda words: torch.stack([table[w] for w in words])  # noqa: E731
    names = [list(english), list(french)]
    rows = list(range(0, 40, 3))
    a = RelativeEncoder(pick(english), [names[0][i] for i in rows])
    b = RelativeModel(pick(french), nn.Linear(len(rows), 4), [names[1][i] for i in rows]).eval()
    with pytest.raises(InvalidInput, match="parallel=True"):
        stitch(a.eval(), b)
    other = RelativeModel(a, nn.Linear(len(rows), 4))
    with pytest.raises(InvalidInput, match=r"compare differently|only 0"):
        stitch(other.eval(), b)
    joined = stitch(a.eval(), b, parallel=True)
    same(joined(names[0]), b(names[1]), 1e-4)
    joined = stitch(a, b, anchors_a=[names[0][i] for i in rows], parallel=True)  # handed in here
    same(joined(names[0]), b(names[1]), 1e-4)
    table = stitching_matrix(
        {
            "en": RelativeModel(RelativeEncoder(pick(english), a.anchors, RelativeLayer(len(rows))), b.head).eval(),
            "fr": b,
        },
        [({"en": names[0], "fr": names[1]}, b(names[1]).argmax(1))],
        parallel=True,
    )
    assert float(table.relative.min()) == 1


def test_what_cannot_be_stitched():
    model = network()
    absolute = AbsoluteModel(model.encoder, nn.Linear(6, 3)).eval()
    with pytest.raises(InvalidInput, match="one kind"):
        stitch(model, absolute)
    with pytest.raises(InvalidInput, match="baseline=None"):
        stitch(absolute, absolute)
    with pytest.raises(InvalidInput, match="are relative"):
        stitch(model, model, baseline="absolute")
    with pytest.raises(InvalidInput, match="anchors_a="):
        stitch(absolute, absolute, baseline="procrustes")
    with pytest.raises(InvalidInput, match="compare differently"):
        stitch(model, network(similarity="angular"))
    with pytest.raises(InvalidInput, match="12 anchors on one side, 11"):
        stitch(model, network(k=11))
    with pytest.raises(InvalidInput, match="k=12, there are 11"):
        stitch(model, model, anchors_a=randn(11, 4).float())
    wide = AbsoluteModel(nn.Linear(4, 9), nn.Linear(9, 3)).eval()
    with pytest.raises(InvalidInput, match="reads 6 features, the other encoder gives 9"):
        stitch(wide, absolute, baseline="absolute")(randn(2, 4).float())
    assert stitch(wide, absolute, randn(20, 4).float(), baseline="procrustes")(randn(2, 4).float()).shape == (2, 3)
    with pytest.raises(InvalidInput, match="one vector"):
        AbsoluteModel(nn.Identity(), nn.Identity())(randn(2, 3, 4))


def test_models_in_training_are_switched_to_evaluation():
    model = network()
    model.head.append(nn.Dropout(0.9))
    model.train()
    with pytest.warns(StitchWarning, match="training mode"):
        joined = stitch(model, model)
    assert not model.training
    x = randn(5, 4).float()
    assert joined(x).equal(joined(x))


def test_the_matrix_is_that_of_every_stitch():
    models = [network(i, latent=5 + i) for i in range(3)]
    absolute = [AbsoluteModel(m.encoder, nn.Linear(5 + i, 3)).eval() for i, m in enumerate(models)]
    x, y = randn(31, 4, seed=3).float(), torch.arange(31) % 3
    loader = list(zip(x.split(8), y.split(8), strict=True))
    found = stitching_matrix({"a": models[0], "b": models[1], "c": models[2]}, loader, absolute=absolute)
    for i, a in enumerate(models):
        for j, b in enumerate(models):
            expected = float((stitch(a, b)(x).argmax(1) == y).double().mean())
            assert float(found.relative[i, j]) == pytest.approx(expected)
            turned = (
                stitch(absolute[i], absolute[j], models[0].anchors, baseline="procrustes") if i != j else absolute[i]
            )
            expected = float((turned(x).argmax(1) == y).double().mean())
            assert float(found.procrustes[i, j]) == pytest.approx(expected)
            assert bool(found.absolute[i, j].isnan()) is (i != j)
    assert found.own() == pytest.approx(float(found.relative.diagonal().mean()))
    off = [float(found.relative[i, j]) for i in range(3) for j in range(3) if i != j]
    assert found.stitched() == pytest.approx(np.mean(off))
    frame = found.to_frame()
    assert len(frame) == 27
    assert set(frame.kind) == {"relative", "absolute", "procrustes"}
    axes = found.plot()
    assert [ax.get_title() for ax in axes] == ["relative", "absolute", "procrustes"]
    errors = stitching_matrix([network(i, outputs=4) for i in range(2)], x.split(10), "mse")
    assert errors.metric == "mse" and errors.absolute is None
    expected = (stitch(network(0, outputs=4), network(1, outputs=4))(x) - x).square().mean()
    assert float(errors.relative[0, 1]) == pytest.approx(float(expected), rel=1e-5)
    errors.plot(better="lower")
    plt.close("all")


def test_bad_matrices():
    model, x = network(), randn(4, 4).float()
    for models, loader, how, message in (
        ([], [x], {}, "no models"),
        ([model], [], {}, "no batches"),
        ([model], [x], {"metric": "f1"}, "'f1'"),
        ([model], [x], {"absolute": [AbsoluteModel(model.encoder, model.head).eval()] * 2}, "1 relative and 2"),
        ([model, network(similarity="angular")], [x], {}, "compare differently"),
    ):
        with pytest.raises(InvalidInput, match=message):
            stitching_matrix(models, loader, **how)


# --- comparing spaces ------------------------------------------------------------------------------------------------


def slow_comparison(r1, r2, k):
    unit = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in (r1.numpy(), r2.numpy())]
    jaccard, mrr = [], []
    for i in range(len(r1)):
        theirs = list(np.argsort(-(unit[1] @ unit[0][i]), kind="stable")[:k])
        own = list(np.argsort(-(unit[1] @ unit[1][i]), kind="stable")[:k])
        jaccard.append(len(set(theirs) & set(own)) / len(set(theirs) | set(own)))
        mrr.append(1 / (theirs.index(i) + 1) if i in theirs else 0.0)
    return np.mean(jaccard), np.mean(mrr), np.mean((unit[0] * unit[1]).sum(1))


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("rows", [7, 1024])
def test_scores_as_counted_one_by_one(k, rows):
    z1, z2 = randn(30, 5), randn(30, 5) + 0.5 * randn(30, 5, seed=1)
    found = compare_spaces(z1, z2, None, k, rows=rows)
    assert (found.jaccard, found.mrr, found.cosine) == pytest.approx(slow_comparison(z1, z2, k), abs=1e-12)
    anchors = [3, 7, 11]
    found = compare_spaces(z1, z2, anchors, k, rows=rows)
    r = [relative_projection(z, z[anchors]) for z in (z1, z2)]
    assert (found.jaccard, found.mrr, found.cosine) == pytest.approx(slow_comparison(*r, k), abs=1e-12)
    assert found.n == 30 and found.k_neighbours == k


def test_a_turned_copy_is_the_same_space_relative_to_anchors_only():
    z = randn(200, 20)
    turned = 3 * z @ rotation(20, 25)
    found = compare_spaces(z, turned, select_anchors(z, 40))
    assert (found.jaccard, found.mrr, found.cosine, found.cka) == pytest.approx((1, 1, 1, 1))
    plain = compare_spaces(z, z @ rotation(20))
    assert plain.jaccard < 0.1 and plain.mrr < 0.2 and abs(plain.cosine) < 0.3
    assert plain.cka == pytest.approx(1)  # CKA does not mind rotations
    words = {f"w{i}": row.tolist() for i, row in enumerate(z)}
    mapped = {f"w{i}": row.numpy() for i, row in reversed(list(enumerate(turned)))} | {"more": turned[0].numpy()}
    assert compare_spaces(words, mapped, ["w3", "w70", "w9"]).jaccard == pytest.approx(1)
    frame = found.to_frame()
    assert list(frame.columns) == ["jaccard", "mrr", "cosine", "cka", "k_neighbours", "n"]
    found.plot()


def test_anchors_can_be_held_out():
    z = randn(30, 4)
    assert compare_spaces(z, z, [1, 2, 3], hold_out_anchors=True).n == 27


@pytest.mark.parametrize(
    ("z1", "z2", "anchors", "k", "message"),
    [
        (randn(9, 3), randn(8, 3), None, 2, "9 and 8"),
        (randn(9, 3), randn(9, 4), None, 2, "anchors="),
        (randn(9, 3), randn(9, 3), None, 10, "k_neighbours=10"),
        (randn(9, 3), randn(9, 3), [9], 2, "0 to 8"),
        (randn(9, 3), randn(9, 3), [], 2, "at least one"),
        (randn(9, 3), {"a": [1.0]}, None, 2, "one kind"),
        ({"a": [1.0]}, {"b": [1.0]}, None, 1, "no word"),
        ({"a": [1.0], "b": [2.0]}, {"a": [1.0], "b": [2.0]}, ["c"], 1, "'c'"),
        (torch.full((9, 3), torch.nan).double(), randn(9, 3), None, 2, "NaN"),
    ],
)
def test_bad_comparisons(z1, z2, anchors, k, message):
    with pytest.raises(InvalidInput, match=message):
        compare_spaces(z1, z2, anchors, k)


def test_the_proxy_is_the_distance_of_the_anchors():
    z, reference = randn(30, 5), randn(30, 5) + 0.2 * randn(30, 5, seed=1)
    rows = [2, 5, 9, 20]
    left, right = (slow(s[rows], s[rows], "cosine") for s in (z, reference))
    assert performance_proxy(z, reference, rows) == pytest.approx(float((left - right).norm(dim=1).mean()))
    assert performance_proxy(2 * z @ rotation(5, 8), z) == pytest.approx(0, abs=1e-9)


def test_a_study_finds_that_noise_costs():
    reference = randn(60, 6)
    noise = [0.05, 0.2, 0.5, 1.0, 2.0]
    spaces = [(reference + s * randn(60, 6, seed=i)) @ rotation(6, seed=i) for i, s in enumerate(noise)]
    study = proxy_study(spaces, noise, reference, names=list("abcde"))
    assert study.spearman == pytest.approx(1)
    assert proxy_study(spaces, noise[::-1], reference).spearman == pytest.approx(-1)
    inside = proxy_study(spaces, noise, 0)
    assert inside.distances[0] == 0
    assert inside.to_frame().reference.tolist() == [True, False, False, False, False]
    # the reference itself would only flatter: it is not part of the correlation
    assert proxy_study(spaces, [9.0, 0.2, 0.5, 1.0, 2.0], 0).spearman == pytest.approx(1)
    inside.plot(label="loss")
    with pytest.raises(InvalidInput, match="at least three"):
        proxy_study(spaces[:3], noise[:3], 0)
    with pytest.raises(InvalidInput, match="5 models and 2 scores"):
        proxy_study(spaces, noise[:2], 0)


def test_scores_over_the_number_of_anchors():
    z = randn(120, 10)
    other = z @ rotation(10) + 0.3 * randn(120, 10, seed=1)
    curve = anchor_curve(z, other, [3, 10, 60], draws=2)
    assert curve.mean("relative")[0] < curve.mean("relative")[2]
    assert curve.mean("procrustes")[2] > 0.5 > curve.mean("absolute")[0]
    assert len(curve.to_frame()) == 3 * (2 + 2 + 1)
    one = compare_spaces(z, other, select_anchors(z, 10, seed=1))
    assert curve.scores["relative"][1][1] == one
    curve.plot()
    assert "absolute" not in anchor_curve(z, other @ rotation(10, 12), [5]).scores
    plt.close("all")


def test_pictures():
    spaces = {"a": randn(30, 5).float(), "b": randn(30, 5).float() @ rotation(5).float()}
    axes = latent_plot(spaces, torch.arange(30) % 3, named=True)
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    rest = spaces["a"].double() - spaces["a"].double().mean(0)
    points = axes[0].collections[0].get_offsets()
    assert np.cov(points.T)[0, 1] == pytest.approx(0, abs=1e-6)  # its own main plane
    assert np.var(points[:, 0], ddof=1) == pytest.approx(float(torch.linalg.eigvalsh(torch.cov(rest.T))[-1]))
    assert abs(np.cov(axes[1].collections[0].get_offsets().T)[0, 1]) > 1e-3  # not the other's
    latent_plot({"flat": randn(9, 2).float(), "line": randn(9, 2).float()})
    with pytest.raises(InvalidInput, match="one width"):
        latent_plot({"a": randn(3, 2), "b": randn(3, 3)})
    ax = reconstruction_plot({"in": torch.rand(4, 8, 8), "out": torch.rand(4, 8, 8)})
    assert ax.images[0].get_array().shape == (17, 35)
    plt.close("all")


# --- words, texts, more anchors --------------------------------------------------------------------------------------


def test_words_of_two_spaces():
    left = {word: np.full(3, i) for i, word in enumerate(["the", "bread", "it", "b2b", "cake", "milk", "wine"])}

    class Vectors:
        index_to_key = ("wine", "bread", "the", "milk", "it", "b2b")
        vectors = randn(6, 2).numpy()

    found = shared_words(left, Vectors(), skip=1, min_length=3)
    assert found.words == ("bread", "milk", "wine")
    assert found.left[:, 0].tolist() == [1, 5, 6]
    same(found.right[1].double(), torch.from_numpy(Vectors.vectors[3]), 1e-6)
    assert shared_words(left, Vectors(), skip=0, min_length=1, alphabetic=False, top=2).words == ("the", "bread")
    with pytest.raises(InvalidInput, match="no word is left"):
        shared_words(left, Vectors())
    with pytest.raises(InvalidInput, match="KeyedVectors"):
        shared_words([1], left)


def test_anchors_grow_from_a_few():
    z = randn(300, 12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    right = torch.empty(300, 12).double()
    right[order] = 2 * z @ rotation(12) + 0.15 * randn(300, 12, seed=1)  # row i on the left is row order[i] there
    right = torch.cat([right, randn(40, 12, seed=2)])  # and some are nobody's partner
    seeds = select_anchors(z, 8)
    found = bootstrap_anchors(z, right, seeds, order[seeds], 100)
    assert len(found) == 100 and found.n_seeds == 8
    assert found.left[:8].equal(seeds) and found.right[:8].equal(order[seeds])
    assert len(set(found.left.tolist())) == len(set(found.right.tolist())) == 100
    assert float((order[found.left] == found.right).double().mean()) > 0.97
    frame = found.to_frame()
    assert frame.seed.sum() == 8 and np.isinf(frame.confidence[:8]).all()
    few = bootstrap_anchors(z, right, seeds[:3], order[seeds[:3]], 80, rounds=10)
    once = bootstrap_anchors(z, right, seeds[:3], order[seeds[:3]], 80, rounds=1)
    hits = [float((order[b.left] == b.right).double().mean()) for b in (few, once)]
    assert hits[0] > hits[1] + 0.05  # turns help where seeds are few
    wrong = bootstrap_anchors(z, right, seeds, order[seeds].roll(1), 100)  # wrong seeds lead nowhere
    assert float((order[wrong.left] == wrong.right).double().mean()) < 0.3


def test_samples_near_everything_take_no_partners():
    z, q = randn(300, 12) + 2 * randn(1, 12, seed=5), rotation(12)
    hubs = (z.mean(0) + 0.3 * randn(40, 12, seed=2)) @ q
    right = torch.cat([z @ q + 0.5 * randn(300, 12, seed=1), hubs])
    seeds = select_anchors(z, 8)
    found = bootstrap_anchors(z, right, seeds, seeds, 150)
    assert int((found.left == found.right).sum()) > 140  # 126 where hubs are not corrected for


@pytest.mark.parametrize(
    ("left", "right", "k", "rounds", "message"),
    [
        ([1, 2], [1], 5, 3, "2 and 1 seeds"),
        ([], [], 5, 3, "at least one"),
        ([1], [99], 5, 3, "not among"),
        ([-1], [1], 5, 3, "not among"),
        ([1, 2], [1, 2], 1, 3, "k=1"),
        ([1], [1], 5, 0, "rounds=0"),
    ],
)
def test_bad_seeds(left, right, k, rounds, message):
    z = randn(20, 4)
    with pytest.raises(InvalidInput, match=message):
        bootstrap_anchors(z, z, torch.tensor(left).long(), torch.tensor(right).long(), k, rounds=rounds)


TOPICS = {
    0: ("the striker scored a late goal", "the goalkeeper saved a penalty", "our team won the league match",
        "the coach praised the midfield", "fans cheered in the stadium", "a defender was sent off"),
    1: ("stir the sauce and add salt", "bake the bread until golden", "chop the onions and garlic",
        "simmer the soup for an hour", "whisk the eggs with sugar", "roast the potatoes in butter"),
    2: ("the rocket reached its orbit", "astronomers saw a distant galaxy", "the probe landed on mars",
        "a telescope photographed the comet", "the satellite circles the moon", "gravity bends light near stars"),
}  # fmt: skip


@pytest.mark.slow
def test_the_real_minilm_under_a_head_that_never_saw_it():
    from broadsheet.nn.minilm import load_minilm, minilm_folder

    try:
        minilm_folder()
    except Exception as error:  # without its weights there is nothing to test
        pytest.skip(str(error))
    network, tokenizer = load_minilm()
    texts = [text for rows in TOPICS.values() for text in rows]
    labels = torch.tensor([topic for topic, rows in TOPICS.items() for _ in rows])
    anchors = [texts[i] for i in range(0, 18, 2)]
    how = {"tokenizer": tokenizer, "pool": "mean", "frozen": True}
    whole = RelativeEncoder(network, anchors, RelativeLayer(9, "l2"), **how)

    # The other encoder: the same words seen through a random rotation of the token-averaged third layer.
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network
            self.register_buffer("q", rotation(384).float())

        def forward(self, input_ids, attention_mask, token_type_ids=None):
            hidden = self.network(input_ids, attention_mask, output_hidden_states=True).hidden_states[4]
            return hidden @ self.q

    early = RelativeEncoder(Early(), anchors, RelativeLayer(9, "l2", frame="centred"), **how)
    plain = RelativeEncoder(network, anchors, RelativeLayer(9, "l2", frame="centred"), **how)
    r = plain(texts)
    weights = torch.linalg.pinv(torch.cat([r, torch.ones(18, 1)], 1)) @ nn.functional.one_hot(labels).float()
    head = nn.Linear(9, 3)
    with torch.no_grad():
        head.weight.copy_(weights[:-1].T), head.bias.copy_(weights[-1])
    model = RelativeModel(plain, head).eval()
    fresh = [
        "the referee stopped the football match",
        "fry the mushrooms in olive oil",
        "the spacecraft left for jupiter",
    ]
    assert model(fresh).argmax(1).tolist() == [0, 1, 2]
    joined = stitch(early.eval(), model)
    assert float((joined(texts).argmax(1) == labels).double().mean()) > 0.85
    with pytest.raises(InvalidInput, match="compare differently"):
        stitch(whole.eval(), model)
    same(whole(anchors).argmax(1), torch.arange(9))


def test_as_latentis_on_the_same_latents():
    theirs = pytest.importorskip("latentis.transform.projection", exc_type=ImportError)
    x, a = randn(20, 6).float(), randn(9, 6, seed=1).float()
    same(relative_projection(x, a), theirs.cosine_proj(x, anchors=a), 1e-6)
    same(relative_projection(x, a, "angular"), 1 - 2 * theirs.angular_proj(x, anchors=a), 1e-3)
    same(relative_projection(x, a, "euclidean"), -theirs.euclidean_proj(x, anchors=a), 1e-4)
    same(relative_projection(x, a, "l1"), -theirs.l1_proj(x, anchors=a), 1e-5)
    square = a[:6]
    same(relative_projection(x, square, "basis_change"), theirs.change_of_basis_proj(x, anchors=square), 1e-3)


def test_latents_of_switches_nothing():
    model = network()
    model.train()
    x = randn(3, 4).float()
    same(latents_of(model, x), model.encoder(x).detach())
    assert model.training
