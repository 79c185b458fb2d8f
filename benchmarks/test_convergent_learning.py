"""Matching, sparse maps and statistics of units against the ways of the published code, on the same activations."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from broadsheet.geometry.convergent_learning import UnitStatistics, match_units, sparse_map, unit_mutual_information


def made(n, p):
    """Two networks that see the same 32 factors, rectified."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(n, 32, generator=draw)
    return [(factors @ torch.randn(32, p, generator=draw) + torch.randn(n, p, generator=draw)).relu() for _ in range(2)]


# --- one to one ------------------------------------------------------------------------------------------------------


def by_networkx(table):
    nx = pytest.importorskip("networkx")
    graph = nx.Graph()
    p = len(table)
    for i, row in enumerate(table.tolist()):
        graph.add_weighted_edges_from((i, p + j, value) for j, value in enumerate(row))
    pairs = dict(tuple(sorted(pair)) for pair in nx.max_weight_matching(graph, maxcardinality=True))
    return float(sum(table[i, j - p] for i, j in pairs.items()))


def correlations(p):
    table = UnitStatistics.of(*made(4096, p)).correlation().xy
    assert table is not None
    return table


@pytest.mark.benchmark(group="convergent-learning: one-to-one matching, 96 units")
class TestMatchingSmall:
    def test_ours(self, benchmark):
        table = correlations(96)
        found = benchmark.pedantic(match_units, (table,), rounds=5, warmup_rounds=1)
        assert float(found.score.sum()) == pytest.approx(by_networkx(table), abs=1e-9)

    def test_networkx(self, benchmark):
        pytest.importorskip("networkx")
        benchmark.pedantic(by_networkx, (correlations(96),), rounds=1, warmup_rounds=0)


@pytest.mark.benchmark(group="convergent-learning: one-to-one matching, 4096 units")
class TestMatchingLarge:
    def test_ours(self, benchmark):
        found = benchmark.pedantic(match_units, (correlations(4096),), rounds=1, warmup_rounds=0)
        assert len(found.matched) == 4096


# --- statistics ------------------------------------------------------------------------------------------------------


def streamed(a, b):
    stats = UnitStatistics()
    for x, y in zip(a.split(2048), b.split(2048), strict=True):
        stats.update(x, y)
    return stats.correlation().xy


def at_once(a, b):
    """Everything in memory, as numpy does it."""
    p = a.shape[1]
    return np.corrcoef(a.numpy().T, b.numpy().T)[:p, p:]


@pytest.mark.benchmark(group="convergent-learning: correlations, 40,000 samples of 256 units")
class TestCorrelations:
    def test_ours(self, benchmark):
        a, b = made(40_000, 256)
        found = benchmark.pedantic(streamed, (a, b), rounds=3, warmup_rounds=1)
        np.testing.assert_allclose(found, at_once(a.double(), b.double()), atol=1e-9)

    def test_numpy(self, benchmark):
        benchmark.pedantic(at_once, made(40_000, 256), rounds=3, warmup_rounds=1)


# --- a few to one ----------------------------------------------------------------------------------------------------

L1 = 0.02


def by_samples(a, b):
    """Scikit-learn's coordinate descent on the samples."""
    a, b = ((x - x.mean(0)) / x.std(0, correction=0) for x in (a.double(), b.double()))
    return Lasso(L1, fit_intercept=False, tol=1e-9, max_iter=20_000).fit(a.numpy(), b.numpy()).coef_


def by_subgradient(a, b):
    """The published solver settings: 4500 steps, which leave no weight at zero."""
    return sparse_map(a, b, L1, "sgd").weight


@pytest.mark.benchmark(group="convergent-learning: sparse map, 20,000 samples of 96 units")
class TestSparse:
    def test_ours(self, benchmark):
        a, b = made(20_000, 96)
        found = benchmark.pedantic(lambda: sparse_map(a, b, L1), rounds=3, warmup_rounds=1)
        np.testing.assert_allclose(found.weight, by_samples(a, b), atol=1e-4)

    def test_scikit_learn(self, benchmark):
        benchmark.pedantic(by_samples, made(20_000, 96), rounds=1, warmup_rounds=0)

    def test_subgradient_steps(self, benchmark):
        found = benchmark.pedantic(by_subgradient, made(20_000, 96), rounds=1, warmup_rounds=0)
        assert int((found == 0).sum()) == 0


# --- mutual information ----------------------------------------------------------------------------------------------


def pair_by_pair(a, b, bins=10):
    """A two-dimensional histogram of each pair, as in the published helper (its bins at the deciles)."""
    a, b = a.double().numpy(), b.double().numpy()
    edges = [[np.unique(np.quantile(x, np.linspace(0, 1, bins + 1))) for x in part.T] for part in (a, b)]
    found = np.zeros((a.shape[1], b.shape[1]))
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            joint = np.histogram2d(a[:, i], b[:, j], (edges[0][i], edges[1][j]))[0] / len(a)
            apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
            seen = joint > 0
            found[i, j] = (joint[seen] * np.log(joint[seen] / apart[seen])).sum()
    return found


@pytest.mark.benchmark(group="convergent-learning: mutual information, 5000 samples of 48 units")
class TestInformation:
    def test_ours(self, benchmark):
        a, b = made(5000, 48)
        found = benchmark.pedantic(lambda: unit_mutual_information(a, b, bias="none"), rounds=3, warmup_rounds=1)
        other = pair_by_pair(a, b)
        assert np.corrcoef(found.flatten(), other.flatten())[0, 1] > 0.98  # other bins, the same relations

    def test_pair_by_pair(self, benchmark):
        benchmark.pedantic(pair_by_pair, made(5000, 48), rounds=1, warmup_rounds=0)
