"""Units of two networks: planted pairs, mixtures and groups are found, and nothing is found where nothing is."""

import math
import warnings
from itertools import permutations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.linear_model import Lasso
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning import (
    ConvergentLearningWarning,
    MappingLayer,
    UnitStatistics,
    convergence_report,
    hierarchical_unit_clusters,
    match_units,
    matched_layer,
    sparse_map,
    sparse_path,
    spectral_unit_clusters,
    subspace_overlap,
    unit_correlation,
    unit_mutual_information,
)
from broadsheet.geometry.convergent_learning.information import bin_codes
from broadsheet.nn.hooks import capture, replace
from broadsheet.nn.small_classifiers import small_cnn
from broadsheet.nn.tiny_models import FAMILIES, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*samples for.*units")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def units(n=600, p=12, seed=0):
    """Rectified, of different scales and correlated, as units are."""
    return ((randn(n, p, seed=seed) @ randn(p, p, seed=seed + 1) + 0.3).relu()) * torch.linspace(0.5, 20, p).double()


# --- one to one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bipartite", "semi"])
def test_a_network_matches_itself(mode):
    x = units()
    found = match_units(unit_correlation(x, x), mode)
    assert found.partner.tolist() == list(range(12))
    assert float((found.score - 1).abs().max()) < 1e-10
    assert (found.mean_rank, found.repeats, found.unmatched) == (1, 0, ())


@pytest.mark.parametrize("shape", ["dense", "maps", "tokens"])
def test_a_hidden_permutation_of_rescaled_units_is_found(shape):
    p = 12
    x = {"dense": units(), "maps": units().view(6, 10, 10, p).movedim(-1, 1), "tokens": units().view(60, 10, p)}[shape]
    at = 1 if shape == "maps" else -1
    order = torch.randperm(p, generator=torch.Generator().manual_seed(3))
    scale = torch.linspace(0.1, 30, p).double()
    y = x.index_select(at, order) * (scale[:, None, None] if shape == "maps" else scale)
    found = UnitStatistics.of(x, y).match()
    assert torch.equal(order[found.partner], torch.arange(p))
    assert found.mean == pytest.approx(1, abs=1e-10)
    shown = found.permuted(UnitStatistics.of(x, y).correlation().xy)
    torch.testing.assert_close(shown.diagonal(), torch.ones(p, dtype=torch.float64))


@given(st.integers(0, 500), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_the_sum_is_the_best_of_all_and_semi_is_never_worse(seed, p, q, minimise):
    table = torch.from_numpy(np.random.default_rng(seed).normal(size=(p, q)))
    found, semi = match_units(table, minimise=minimise), match_units(table, "semi", minimise)
    small, large = min(p, q), max(p, q)
    sums = [
        sum(float(table[i, j] if p <= q else table[j, i]) for i, j in zip(range(small), order, strict=True))
        for order in permutations(range(large), small)
    ]
    best = min(sums) if minimise else max(sums)
    assert float(found.score[found.matched].sum()) == pytest.approx(best)
    better = semi.score[found.matched] - found.score[found.matched]
    assert float((-better if minimise else better).min()) >= 0
    assert len(found.matched) == small and len(found.without) == p - small and len(found.unmatched) == q - small
    assert (semi.rank[semi.matched] == 1).all()
    order = found.score[found.order]
    assert torch.equal(order, order.sort(descending=not minimise).values)


def test_networkx_agrees():
    """The published code takes networkx's matching of largest weight."""
    table = unit_correlation(units(seed=1), units(seed=5)[:, :9])
    graph = nx.Graph()
    for i, row in enumerate(table.tolist()):
        for j, value in enumerate(row):
            graph.add_edge(i, 100 + j, weight=value)
    pairs = {tuple(sorted(pair)) for pair in nx.max_weight_matching(graph, maxcardinality=True)}
    found = match_units(table)
    assert {(i, 100 + int(found.partner[i])) for i in found.matched.tolist()} == pairs


def test_ranks_repeats_and_cycles():
    table = torch.tensor([[0.9, 0.8, 0.1], [0.85, 0.2, 0.0], [0.7, 0.6, 0.5]])
    found, semi = match_units(table), match_units(table, "semi")
    assert found.partner.tolist() == [1, 0, 2]
    assert found.rank.tolist() == [2, 1, 3]
    assert found.mean_rank == 2
    assert semi.partner.tolist() == [0, 0, 0] and semi.repeats == 2 and semi.unmatched == (1, 2)
    assert found.cycles == (2, 1)
    assert found.share(above=0.6) == pytest.approx(2 / 3) and found.share(below=0.6) == pytest.approx(1 / 3)
    assert found.to_frame()["unit"].tolist() == [1, 0, 2]
    with pytest.raises(InvalidInput, match="loops need"):
        _ = semi.cycles


def test_dead_units_are_left_out_and_listed():
    x, y = units(), units(seed=4)
    x[:, 3], y[:, [0, 5]] = 2.5, 0.0
    table = unit_correlation(x, y)
    assert table[3].isnan().all() and table[:, 5].isnan().all() and int(table.isnan().sum()) == 12 + 2 * 11
    for found in (match_units(table), UnitStatistics.of(x, y).match()):
        assert found.dead_first == (3,) and found.dead_second == (0, 5)
        assert int(found.partner[3]) == -1 and not set(found.partner.tolist()) & {0, 5}
        assert len(found.matched) == 10 and len(found.without) == 1
    assert match_units(torch.full((2, 3), torch.nan)).matched.numel() == 0
    table[0, 1] = torch.nan
    with pytest.raises(InvalidInput, match="unit 0 and 1 is not finite"):
        match_units(table)


def test_the_sign_counts_unless_told_otherwise():
    x = randn(500, 6)
    flipped = -x[:, [1, 0, 3, 2, 5, 4]]
    assert match_units(unit_correlation(x, flipped)).mean < 0.2
    found = match_units(unit_correlation(x, flipped), signed=False)
    assert found.partner.tolist() == [1, 0, 3, 2, 5, 4]
    assert found.mean == pytest.approx(-1)


def test_scores_on_other_samples_are_lower_where_nothing_is_shared():
    x, y = randn(80, 40), randn(80, 40, seed=1)
    chosen = UnitStatistics.of(x[:40], y[:40]).match()
    again = chosen.scored(unit_correlation(x[40:], y[40:]))
    assert chosen.mean > 0.2 > abs(again.mean) + 0.1
    assert torch.equal(again.partner, chosen.partner)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_statistics_are_those_of_everything_for_any_number_of_networks(offset):
    nets = [units(p=p, seed=p) + offset for p in (5, 7, 4)]
    stats, other = UnitStatistics("abc"), UnitStatistics("abc")
    for i, parts in enumerate(zip(*(x.float().double().split(97) for x in nets), strict=True)):
        (stats if i % 2 else other).update(*parts)
    stats.merge(other)
    whole = np.corrcoef(torch.cat([x.float().double() for x in nets], 1).numpy().T)
    np.testing.assert_allclose(stats.stacked().correlation, whole, atol=1e-10 if offset == 0 else 1e-8)
    assert stats.stacked().network.tolist() == [0] * 5 + [1] * 7 + [2] * 4
    np.testing.assert_allclose(stats.correlation(2, 1).xy, whole[12:, 5:12], atol=1e-8)
    np.testing.assert_allclose(stats.correlation(2, 0).x, whole[12:, 12:], atol=1e-8)
    assert stats.widths == (5, 7, 4) and stats.count == 600 and stats.pairs == [(0, 1), (0, 2), (1, 2)]
    assert float(stats.correlation().xy.abs().max()) <= 1
    part = stats.pair(1, 0, torch.tensor([6, 2]), torch.tensor([1]))
    torch.testing.assert_close(part.cov_xy, stats.pair(1, 0).cov_xy[[6, 2]][:, [1]])


def test_memory_does_not_grow_and_is_what_the_documentation_says():
    stats, few = UnitStatistics(), UnitStatistics(within=False)
    for seed in range(3):
        x, y = units(p=50, seed=seed), units(p=50, seed=seed + 9)
        stats.update(x, y)
        few.update(x, y)
        held = stats.nbytes, few.nbytes
    small = 8 * 50 * 10
    assert 3 * 8 * 50**2 <= held[0] <= 3 * 8 * 50**2 + small
    assert 8 * 50**2 <= held[1] <= 8 * 50**2 + small
    assert few.match().mean == pytest.approx(stats.match().mean)
    with pytest.raises(InvalidInput, match="not kept"):
        few.stacked()


def test_what_does_not_belong_together_is_refused():
    x, y = units(), units(seed=4)
    with pytest.raises(InvalidInput, match="'2' gives 599 samples"):
        UnitStatistics.of(x, y[1:])
    with pytest.raises(InvalidInput, match="another order"):
        UnitStatistics.of(x, y, ids=[torch.arange(600), torch.arange(600).flip(0)])
    UnitStatistics.of(x, y, ids=[list("ab"), list("ab")])
    with pytest.raises(InvalidInput, match="'2': unit 4 holds NaN"):
        UnitStatistics.of(x, y.index_fill(1, torch.tensor([4]), torch.nan))
    with pytest.raises(InvalidInput, match="names of their own"):
        UnitStatistics(["a", "a"])
    with pytest.raises(InvalidInput, match="1 activations"):
        UnitStatistics().update(x)
    with pytest.raises(InvalidInput, match="no samples yet"):
        UnitStatistics().match()
    stats = UnitStatistics.of(x, y)
    with pytest.raises(InvalidInput, match="are the same"):
        stats.match(1, 1)
    with pytest.raises(InvalidInput, match="there are 2"):
        stats.correlation(0, 2)
    with pytest.raises(InvalidInput, match="mode='greedy'"):
        stats.match(mode="greedy")
    with pytest.raises(InvalidInput, match="second network's activations"):
        sparse_map(x)


@pytest.mark.filterwarnings("error")
def test_few_samples_are_said():
    with pytest.warns(ConvergentLearningWarning, match="119 samples for 12 units"):
        unit_correlation(units(119), units(119, seed=3))
    unit_correlation(units(120), units(120, seed=3))


# --- mutual information ----------------------------------------------------------------------------------------------


def test_information_is_that_of_the_tables():
    x, y = units(p=4), torch.cat([units(p=2, seed=8), units(p=4)[:, :1].square()], 1)
    one, two = bin_codes(x), bin_codes(y)
    found = unit_mutual_information(x, y, bias="none")
    expected = [[mutual_info_score(one[:, i], two[:, j]) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert float(found[0, 2]) == pytest.approx(mutual_info_score(one[:, 0], one[:, 0]))  # any monotone function
    few = unit_mutual_information(x, y, bias="none", candidates=torch.tensor([[2], [0], [1], [1]]))
    torch.testing.assert_close(few[0, 2], found[0, 2])
    assert int((few != 0).sum()) == 4


def test_bins_are_even_and_zeros_have_their_own():
    x = torch.cat([randn(1000, 1), randn(1000, 1).relu()], 1)
    codes = bin_codes(x, 10)
    assert torch.bincount(codes[:, 0], minlength=10).tolist() == [100] * 10
    zeros = x[:, 1] == 0
    assert torch.equal(codes[:, 1] == 0, zeros)
    rest = torch.bincount(codes[~zeros, 1], minlength=10)[1:]
    assert int(rest.max() - rest.min()) <= 1
    assert int(bin_codes(torch.zeros(9, 1)).max()) == 0


def test_independent_units_have_no_information_after_the_right_correction_only():
    x, y = randn(2000, 20).relu(), randn(2000, 20, seed=1).relu()
    value = {bias: unit_mutual_information(x, y, bias=bias) for bias in ("none", "cells", "official")}
    assert float(value["none"].mean()) > 0.018
    assert abs(float(value["cells"].mean())) < 0.002
    assert float(value["official"].mean()) < -0.012  # a formula for bits, taken from nats
    for bias, cut in (("cells", 81 / 4000), ("official", 100 / 4000 / math.log(2))):
        torch.testing.assert_close(value["none"] - value[bias], torch.full_like(value["none"], cut))


def test_information_sees_what_correlation_does_not():
    x = randn(800, 5)
    order = [3, 1, 4, 0, 2]
    y = x[:, order].square() * torch.tensor([1, -1, 1, -1, 1])
    assert match_units(unit_correlation(x, y)).mean < 0.2
    assert match_units(unit_mutual_information(x, y)).partner.tolist() == [order.index(i) for i in range(5)]
    dead = x.index_fill(1, torch.tensor([2]), 1.0)
    assert unit_mutual_information(dead, y)[2].isnan().all()
    for how, message in (({"bins": 1}, "bins=1"), ({"bias": "x"}, "bias='x'")):
        with pytest.raises(InvalidInput, match=message):
            unit_mutual_information(x, y, **how)
    with pytest.raises(InvalidInput, match="below 5"):
        unit_mutual_information(x, y, candidates=torch.full((5, 2), 5))


# --- a few to one ----------------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_predictions():
    x, y = units(), units(seed=2) + units()
    found = sparse_map(x, y, l1=0.05)
    rest = (found(x) - y) / y.std(0, correction=0)
    torch.testing.assert_close(found.error, rest.square().mean(0) / 2)
    standard = [(part - part.mean(0)) / part.std(0, correction=0) for part in (x, y)]
    other = Lasso(0.05, tol=1e-10, max_iter=50_000).fit(standard[0].numpy(), standard[1].numpy())
    np.testing.assert_allclose(found.weight, other.coef_, atol=1e-6)
    c = unit_correlation(x, y)
    torch.testing.assert_close(found.best_single, (1 - c.square().max(0).values) / 2)
    fresh_x, fresh_y = units(seed=30), units(seed=32) + units(seed=30)
    held = found.scored(fresh_x, fresh_y)
    largest = torch.maximum(y.var(0, correction=0), fresh_y.var(0, correction=0))
    torch.testing.assert_close(held.error, (found(fresh_x) - fresh_y).square().mean(0) / largest / 2)
    assert float(held.best_single.mean()) > float(found.best_single.mean())


def test_a_unit_that_is_silent_where_a_map_is_fitted_does_not_outweigh_the_others():
    x, y = units(), units(seed=2) + units()
    y[1:, 4] = 0  # fires once
    fresh_x, fresh_y = units(seed=30), units(seed=32) + units(seed=30)
    for l1 in (0, 10):
        assert float(sparse_map(x, y, l1).scored(fresh_x, fresh_y).error[4]) < 2


def test_the_two_ends_of_a_path():
    x, y = units(), units(seed=2) + units()
    path = sparse_path(x, y, points=8)
    first, last = path.maps[0], path.maps[-1]
    assert not first.weight.any()
    assert first.mean_error == pytest.approx(0.5)
    residual = np.linalg.lstsq(np.c_[x.numpy(), np.ones(len(x))], y.numpy(), rcond=None)[1] / len(x)
    np.testing.assert_allclose(last.error, residual / y.var(0, correction=0).numpy() / 2, atol=1e-8)
    table = path.to_frame()
    assert table["error"].is_monotonic_decreasing and table["l1"].is_monotonic_decreasing
    at = [one.l1 for one in path.maps].index(path.at_most(3).l1)
    assert path.maps[at].mean_active <= 3 < path.maps[at + 1].mean_active
    with pytest.raises(InvalidInput, match="no map of this path"):
        path.at_most(-1)


def test_units_chosen_without_shrinkage():
    x = units()
    y = x[:, [0, 3, 5]] + x[:, [1, 2, 4]]
    found = sparse_map(x, y, l1=0.02)
    again = sparse_map(x, y, l1=0.02, refit=True)
    assert again.refitted
    assert torch.equal(again.weight != 0, found.weight != 0)
    assert float(again.error.max()) < 1e-12 < float(found.error.min())


def test_the_papers_steps_come_near_the_optimum_without_a_single_zero():
    x, y = units(400, 6), units(400, 6, seed=2) + units(400, 6)
    exact, steps = (sparse_map(x, y, 0.03, solver, **how) for solver, how in (("fista", {}), ("sgd", {"steps": 900})))
    assert int((exact.weight == 0).sum()) > 0
    assert int((steps.weight == 0).sum()) == 0
    value = [m.mean_error + 0.03 * float(m.weight.abs().sum(1).mean()) for m in (exact, steps)]
    assert value[0] <= value[1] + 1e-12 and value[1] - value[0] < 0.02
    with pytest.raises(InvalidInput, match="activations of both"):
        sparse_map(UnitStatistics.of(x, y), solver="sgd")


def test_dead_units_in_maps():
    x, y = units(), units(seed=2)
    x[:, 2], y[:, 0] = 1.0, 3.0
    for l1 in (0.0, 0.05):
        found = sparse_map(x, y, l1)
        assert found.dead_first == (2,) and found.dead_second == (0,)
        assert not found.weight[:, 2].any() and not found.weight[0].any()
        assert found.error.isnan().tolist() == [True] + [False] * 11
        assert math.isfinite(found.mean_error) and math.isfinite(found.mean_active)
        torch.testing.assert_close(found(x)[:, 0], y[:, 0])


def test_bad_penalties():
    x, y = units(), units(seed=2)
    for call in (lambda: sparse_map(x, y, -1), lambda: sparse_path(x, y, [0.1, -0.1])):
        with pytest.raises(InvalidInput, match="0 or more"):
            call()
    with pytest.raises(InvalidInput, match="solver='adam'"):
        sparse_map(x, y, solver="adam")
    with pytest.raises(InvalidInput, match="within=True"):
        sparse_map(UnitStatistics.of(x, y, within=False).between())


# --- the same space in another basis ---------------------------------------------------------------------------------


def test_mixed_units_span_the_same_space():
    x = randn(4000, 32)
    y = x @ rotation(32, seed=1)
    stats = UnitStatistics.of(x, y)
    assert stats.match().mean < 0.7
    full = sparse_map(stats, l1=0)
    assert float(full.error.max()) < 1e-8
    assert full.best_single.min() > 0.1
    overlap = subspace_overlap(stats)
    assert overlap.mean == pytest.approx(1, abs=1e-9) and overlap.cka == pytest.approx(1, abs=1e-9)
    assert overlap.explained_first == pytest.approx(1, abs=1e-9)
    assert overlap.rank_first == pytest.approx(overlap.rank_second) and 31 < overlap.rank_first <= 32


def test_a_part_of_the_space_is_shared():
    x = randn(4000, 10)
    y = torch.cat([x[:, :4] @ rotation(4), 2 * randn(4000, 6, seed=3)], 1)
    overlap = subspace_overlap(x, y)
    assert (overlap.canonical > 0.9).tolist() == [True] * 4 + [False] * 6
    assert overlap.explained_first == pytest.approx(0.4, abs=0.02)
    assert overlap.explained_second == pytest.approx(4 / (4 + 24), abs=0.02)
    assert len(subspace_overlap(x, y, variance=0.5).canonical) < 10


def test_a_map_stitches_two_networks():
    first = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double()
    second = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double()
    order = torch.tensor([4, 2, 0, 1, 3])
    with torch.no_grad():  # the same network with its hidden units in another order and of other scales
        scale = torch.linspace(0.5, 2, 5).double()
        second[0].weight.copy_(first[0].weight[order] * scale[:, None, None, None])
        second[0].bias.copy_(first[0].bias[order] * scale)
        second[2].weight.copy_(first[2].weight[:, order] / scale[:, None, None])
        second[2].bias.copy_(first[2].bias)
    x = randn(20, 1, 9, 9)
    with torch.no_grad(), capture(first, "1") as a, capture(second, "1") as b:
        assert torch.allclose(first(x), second(x))
    stats = UnitStatistics.of(a["1"], b["1"])
    for layer in (sparse_map(stats, l1=0).layer(), matched_layer(stats.match(), stats)):
        torch.testing.assert_close(layer(a["1"]), b["1"])
        with torch.no_grad(), replace(second, {"1": layer(a["1"])}):
            torch.testing.assert_close(second(torch.zeros_like(x)), first(x))
    with pytest.raises(InvalidInput, match="5 units are expected"):
        layer(torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="same partner"):
        matched_layer(match_units(torch.ones(5, 5), "semi"), stats)


def test_a_mapping_layer_is_saved_and_read(tmp_path):
    layer = sparse_map(units(), units(seed=2), l1=0.01).layer().float()
    layer.save_pretrained(tmp_path)
    again = MappingLayer.from_pretrained(tmp_path)
    x = units().float()
    assert torch.equal(again(x), layer(x))
    assert again(x.view(6, 10, 10, 12).movedim(-1, 1)).shape == (6, 12, 10, 10)
    assert again(x.view(60, 10, 12)).dtype == torch.float32


# --- groups ----------------------------------------------------------------------------------------------------------


def planted(networks=2, groups=8, each=4, n=1500, noise=0.5):
    """Each network has several units for each common factor; group of every unit."""
    factors = randn(n, groups)
    order = torch.randperm(groups * each, generator=torch.Generator().manual_seed(1))
    owner = (torch.arange(groups * each) % groups)[order]
    nets = [factors[:, owner] + noise * randn(n, groups * each, seed=9 + i) for i in range(networks)]
    return UnitStatistics.of(*nets), owner.repeat(networks)


@pytest.mark.parametrize("networks", [2, 3])
def test_planted_groups_are_recovered(networks):
    stats, owner = planted(networks)
    found = spectral_unit_clusters(stats, 8)
    assert adjusted_rand_score(owner, found.labels) > 0.95
    assert found.mixed == 1
    torch.testing.assert_close(found.balance.double(), torch.ones(8, dtype=torch.float64))
    assert float(found.across.min()) > 0.7 and 0.7 < float(found.overlap.min()) < 0.85
    assert sorted(len(units) for units in found.members(0).values()) == [4] * networks
    assert found.to_frame().shape == (8, networks + 3)
    again = spectral_unit_clusters(stats, 8)
    assert torch.equal(again.labels, found.labels)


def test_groups_are_those_of_the_normalised_laplacian():
    x, y = units(p=20, seed=3), units(p=15, seed=3)[:, :15] ** 2
    graph = np.abs(np.corrcoef(torch.cat([x, y], 1).numpy().T))
    np.fill_diagonal(graph, 0)
    degree = graph.sum(1)
    laplacian = np.eye(35) - graph / np.sqrt(np.outer(degree, degree))
    vectors = np.linalg.eigh(laplacian)[1][:, :5]
    expected = KMeans(5, n_init=10, random_state=0).fit_predict(vectors / np.linalg.norm(vectors, axis=1)[:, None])
    found = spectral_unit_clusters(UnitStatistics.of(x, y), 5)
    assert adjusted_rand_score(expected, found.labels) == 1


def test_large_graphs_take_a_few_eigenvectors(monkeypatch):
    from broadsheet.geometry.convergent_learning import clusters

    stats, owner = planted()
    monkeypatch.setattr(clusters, "DENSE", 10)
    assert adjusted_rand_score(owner, spectral_unit_clusters(stats, 8).labels) > 0.95
    tree = hierarchical_unit_clusters(stats, 8)
    assert len(tree.order.unique()) == 64


def test_networks_that_share_nothing_have_groups_of_their_own():
    alone = [
        randn(1500, 8, seed=50 + i)[:, torch.arange(32) % 8] + 0.5 * randn(1500, 32, seed=70 + i) for i in range(2)
    ]
    found = spectral_unit_clusters(UnitStatistics.of(*alone), 16)
    assert found.mixed == 0
    assert found.across.isnan().all() and found.overlap.isnan().all()
    assert float(found.balance.max()) == 0


def test_a_tree_splits_down_to_the_planted_groups():
    stats, owner = planted()
    tree = hierarchical_unit_clusters(stats, max_size=8)
    leaves = tree.leaves
    assert all(len(leaf.rows) <= 8 for leaf in leaves)
    labels = torch.empty(64, dtype=torch.long)
    for i, leaf in enumerate(leaves):
        labels[leaf.rows] = i
    assert adjusted_rand_score(owner, labels) > 0.8
    assert tree.order.sort().values.tolist() == list(range(64))
    assert len(list(tree)) == 2 * len(leaves) - 1 and tree.depth >= 3
    assert hierarchical_unit_clusters(stats, 64).parts == ()


def test_dead_units_are_in_no_group_and_bad_numbers_are_refused():
    x, y = units(), units(seed=2)
    x[:, 1] = 0
    stats = UnitStatistics.of(x, y)
    found = spectral_unit_clusters(stats, 3)
    assert (found.labels == -1).nonzero().flatten().tolist() == [1]
    assert int(found.counts.sum()) == 23
    assert 1 not in hierarchical_unit_clusters(stats, 4).order.tolist()
    for k in (1, 24):
        with pytest.raises(InvalidInput, match="expected 2 to 23"):
            spectral_unit_clusters(stats, k)
    with pytest.raises(InvalidInput, match="max_size=0"):
        hierarchical_unit_clusters(stats, 0)
    with pytest.raises(InvalidInput, match="there are 3"):
        found.members(3)


# --- networks --------------------------------------------------------------------------------------------------------


def images(n=96, size=8, seed=0):
    return randn(n, 1, size, size, seed=seed).float()


def batches(x, size=16):
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def nets(n=3):
    return {f"seed {i}": small_cnn((6, 7, 8), 9, seed=i) for i in range(n)}


LAYERS = ["conv1", "conv3", "fc"]


def test_a_report_is_what_the_parts_give():
    models, x = nets(), images()
    report = convergence_report(models, LAYERS, batches(x), held_out=False)
    assert report.names == ("seed 0", "seed 1", "seed 2") and report.samples == 96
    assert [one.layer for one in report] == LAYERS
    for layer in LAYERS:
        seen = []
        for model in models.values():
            with torch.no_grad(), capture(model, layer) as found:
                model(x)
            seen.append(found[layer])
        stats = UnitStatistics.of(*seen)
        torch.testing.assert_close(
            report[layer].chosen.stacked().correlation, stats.stacked().correlation, atol=1e-6, rtol=0
        )
        for i, j in stats.pairs:
            assert torch.equal(report[layer].match(i, j).partner, stats.match(i, j).partner)
    table = report.to_frame()
    assert len(table) == 9
    assert (table["error_all_units"] <= table["error_one_unit"] + 1e-12).all()
    assert table[["bipartite", "untrained", "shuffled", "canonical", "cka"]].abs().le(1 + 1e-9).all().all()


def test_pairs_are_scored_on_other_samples():
    models, x = nets(2), images(96)
    halves = convergence_report(models, "fc", batches(x), null=())["fc"]
    for part, rows in ((halves.chosen, x[::2]), (halves.scored, x[1::2])):
        only = convergence_report(models, "fc", batches(rows), null=(), held_out=False)["fc"].chosen
        torch.testing.assert_close(part.correlation().xy, only.correlation().xy, atol=1e-6, rtol=0)
    assert torch.equal(halves.match().partner, halves.chosen.match().partner)
    found = halves.match()
    at, expected = found.matched, halves.scored.correlation().xy
    torch.testing.assert_close(found.score[at], expected[at, found.partner[at]])
    loaders = convergence_report(models, "fc", batches(x[:60]), null=(), held_out=batches(x[60:]))["fc"]
    assert (loaders.chosen.count, loaders.scored.count) == (60, 36)
    odd = convergence_report(models, "fc", batches(x[:45], 15), null=())["fc"]  # batches of odd length alternate too
    assert (odd.chosen.count, odd.scored.count) == (23, 22)


def test_nulls_share_inputs_or_nothing():
    models, x = nets(2), images(400)
    same = {"a": models["seed 0"], "b": small_cnn((6, 7, 8), 9, seed=0)}
    report = convergence_report(same, ["conv1", "fc"], batches(x, 100))
    for one in report:
        assert one.match().mean > 0.99
        assert one.match(null="untrained").mean < 0.95
        assert abs(one.match(null="shuffled").mean) < 0.1
        assert one.clusters(6).mixed > 0.8 > one.clusters(6, null="shuffled").mixed
    again = convergence_report(same, ["conv1", "fc"], batches(x, 100), untrained=[same["b"], same["b"].cpu()])
    assert again["fc"].match(null="untrained").mean == pytest.approx(1)
    with pytest.raises(InvalidInput, match="null='none'"):
        report["fc"].match(null="none")
    with pytest.raises(InvalidInput, match="not kept"):
        report["fc"].clusters(4, null="untrained")
    with pytest.raises(InvalidInput, match="this report holds conv1, fc"):
        _ = report["conv9"]


def test_one_pass_is_enough_and_the_networks_are_left_alone():
    models = nets(2)
    models["seed 0"].train()
    models["seed 0"].fc.eval()
    before = {k: v.clone() for k, v in models["seed 0"].state_dict().items()}
    with pytest.warns(ConvergentLearningWarning, match="in training mode: seed 0"):
        report = convergence_report(models, "fc", iter(batches(images())))  # an iterator can be used once
    assert report["fc"].match(null="untrained").mean < 1
    assert models["seed 0"].training and not models["seed 0"].fc.training
    assert all(torch.equal(v, before[k]) for k, v in models["seed 0"].state_dict().items())
    assert all(not m._forward_hooks for model in models.values() for m in model.modules())
    broken = [*batches(images()), (torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2))]
    with pytest.raises(InvalidInput, match="layer 'fc': 'seed 0': unit"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convergence_report(models, "fc", broken)
    assert models["seed 0"].training
    assert all(not m._forward_hooks for model in models.values() for m in model.modules())


def test_best_and_worst_units_come_with_their_inputs():
    models, x = nets(2), images()
    report = convergence_report(models, "conv1", batches(x), exemplars=3, null=())["conv1"]
    table = report.most_alike(4)
    assert len(table) == 4 and table["score"].is_monotonic_decreasing
    assert report.least_alike(2)["score"].is_monotonic_increasing
    with torch.no_grad(), capture(models["seed 0"], "conv1") as seen:
        models["seed 0"](x)
    peak = seen["conv1"].flatten(2).amax(2)
    for unit, ids in zip(table["unit"], table["top_first"], strict=True):
        assert ids == peak[:, unit].topk(3).indices.tolist()
    assert "top_first" not in convergence_report(models, "fc", batches(x), exemplars=0)["fc"].most_alike()


def test_layers_of_other_names_widths_and_some_positions():
    models = [small_cnn((6, 7), 9, seed=0), small_cnn((10, 5), 4, seed=1)]
    report = convergence_report(models, [("conv1", "conv1"), ("fc", "fc"), "conv?"], batches(images()), null=())
    assert [one.layer for one in report] == ["conv1", "fc", "conv1", "conv2"]
    assert report["conv1"].match().partner.shape == (6,) and 0 < len(report["fc"].match().matched) <= 4
    few = convergence_report(models, "conv1", batches(images()), null=(), positions=5, held_out=False)
    assert few["conv1"].chosen.count == 96 * 5
    other = convergence_report(models, "conv1", batches(images()), null=(), positions=5, held_out=False)
    torch.testing.assert_close(few["conv1"].chosen.correlation().xy, other["conv1"].chosen.correlation().xy)
    assert few["conv1"].chosen.count < report["conv1"].chosen.count * 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_of_transformers(family):
    models = [tiny_model(family, seed=seed) for seed in (0, 0)]
    name = next(
        name for name, module in models[0].named_modules() if isinstance(module, nn.LayerNorm) or "norm" in name.lower()
    )
    inputs = [tiny_inputs(family, seed=seed) for seed in range(8)]
    null = ("untrained",) if family in ("gpt2", "bert", "vit") else ()  # models of a configuration: tests/nn has more
    report = convergence_report(models, name, inputs, null=null, within=False, exemplars=0)
    assert report[name].match().mean == pytest.approx(1, abs=1e-9)
    assert not null or report[name].match(null="untrained").mean < 0.999
    assert "canonical" not in report.to_frame()


def test_padding_does_not_count_on_either_side():
    models = [tiny_model("gpt2", seed=seed) for seed in (0, 1)]
    draw = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(2, 29, (int(length),), generator=draw) for length in torch.randint(3, 8, (12,), generator=draw)
    ]

    def loader(side):
        found = []
        for pair in zip(texts[::2], texts[1::2], strict=True):
            width = max(map(len, pair))
            rows = [nn.functional.pad(t, (0, width - len(t)) if side == "right" else (width - len(t), 0), value=1)
                    for t in pair]  # fmt: skip
            mask = [nn.functional.pad(torch.ones_like(t), (0, width - len(t)) if side == "right" else (width - len(t), 0))
                    for t in pair]  # fmt: skip
            found.append({"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask)})
        return found

    found = [
        convergence_report(models, "transformer.h.1", batches, null=(), within=False)["transformer.h.1"]
        for batches in (loader("left"), loader("right"), [text[None] for text in texts])
    ]
    assert sum(half.count for half in (found[0].chosen, found[0].scored)) == sum(map(len, texts))
    for other in found[1:]:
        torch.testing.assert_close(found[0].chosen.correlation().xy, other.chosen.correlation().xy, atol=1e-9, rtol=0)
    assert found[0].top[0].ids.shape == found[2].top[0].ids.shape
    assert torch.equal(found[0].top[0].ids, found[2].top[0].ids)


def test_what_cannot_be_compared():
    models, x = nets(2), images()
    with pytest.raises(InvalidInput, match="1 networks"):
        convergence_report([models["seed 0"]], "fc", batches(x))
    with pytest.warns(ConvergentLearningWarning, match="there twice"):
        convergence_report([models["seed 0"]] * 2, "fc", batches(x), null=())
    with pytest.raises(InvalidInput, match=r"no submodule 'conv9'.*conv1"):
        convergence_report(models, "conv9", batches(x))
    with pytest.raises(InvalidInput, match="one name for each of 2"):
        convergence_report(models, [("conv1",)], batches(x))
    with pytest.raises(InvalidInput, match="as many in each"):
        convergence_report([small_cnn((4,), 4), small_cnn((4, 4), 4)], "conv?", batches(x))
    with pytest.raises(InvalidInput, match="null='random'"):
        convergence_report(models, "fc", batches(x), null=("random",))
    with pytest.raises(InvalidInput, match="no batches"):
        convergence_report(models, "fc", [])
    with pytest.raises(InvalidInput, match="held_out=False"):
        convergence_report(models, "fc", batches(x[:1]), null=())
    with pytest.raises(InvalidInput, match="positions=0"):
        convergence_report(models, "fc", batches(x), positions=0)
    with pytest.warns(ConvergentLearningWarning, match="nothing can be shuffled"):
        convergence_report(models, "fc", batches(x[:4], 1), null=("shuffled",), held_out=False)
    with pytest.raises(InvalidInput, match="samples \\(positions included\\)"):
        convergence_report([small_cnn((4, 4), 4), small_cnn((4,), 4)], [("pool2", "conv1")], batches(x), null=())


def test_figures_show_what_they_say():
    models, x = nets(2), images()
    report = convergence_report(models, ["conv1", "fc"], batches(x))
    axes = report.plot()
    assert [ax.get_title() for ax in axes] == ["conv1", "fc"]
    labels = [line.get_label() for line in axes[0].get_lines()]
    assert labels == ["one to one", "each its best", "untrained", "shuffled"]
    one = report["conv1"]
    np.testing.assert_allclose(axes[0].get_lines()[0].get_ydata(), one.match().score.sort(descending=True).values)
    four = one.plot_correlations()
    assert len(four) == 4
    pairs = one.match()
    expected = one.scored.correlation().xy[pairs.order, pairs.partner[pairs.order]]
    np.testing.assert_allclose(four[3].images[0].get_array().diagonal(), expected)
    path = one.sparse_path(points=5)
    line = path.plot().get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), path.to_frame()["active"])
    assert path.maps[-1].plot().images[0].get_array().shape == (6, 6)
    shown = one.clusters(3).plot().images[0].get_array()
    assert shown.shape == (12, 12)
    assert hierarchical_unit_clusters(one.chosen, 4).plot().images
    spectra = one.chosen.plot_spectra().get_lines()
    assert [line.get_label() for line in spectra] == list(models)
    assert one.subspaces().plot(label="both").get_lines()[0].get_ydata()[0] <= 1
