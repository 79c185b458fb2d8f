"""Matched cosines find a hidden permutation; divergences agree with scipy."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from broadsheet.errors import InvalidInput
from broadsheet.nn.divergence import js_divergence, kl_divergence
from broadsheet.nn.matching import best_pairs, cosines, match_directions
from broadsheet.nn.seeding import generator


def test_a_permutation_is_found_and_lengths_do_not_matter() -> None:
    draw = generator(0)
    wanted = torch.randn(6, 9, generator=draw)
    order = torch.randperm(6, generator=draw)
    found = torch.cat([wanted[order] * torch.rand(6, 1, generator=draw).add(0.1), torch.randn(3, 9, generator=draw)])
    match = match_directions(wanted, found)
    assert torch.equal(order[match.index], torch.arange(6))
    assert match.mean == pytest.approx(1.0, abs=1e-6)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])
    assert match_directions(wanted, wanted * signs[:, None], signed=False).mean == pytest.approx(1.0, abs=1e-6)
    assert match_directions(wanted, wanted * signs[:, None]).mean < 0.9


def test_each_direction_is_used_once() -> None:
    wanted = torch.tensor([[1.0, 0], [1.0, 0.1]])
    match = match_directions(wanted, torch.tensor([[1.0, 0.05]]))
    assert sorted(match.index.tolist()) == [-1, 0]
    assert match.cosine.count_nonzero() == 1
    assert match.mean == pytest.approx(0.5, abs=0.01)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_pairs_are_the_best_of_all_there_are(seed: int, n: int, m: int, minimise: bool) -> None:
    table = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, m)))
    found = best_pairs(table, minimise)
    there = found >= 0
    assert int(there.sum()) == min(n, m) == len(found[there].unique())
    sums = [
        sum(float(table[i, j] if n <= m else table[j, i]) for i, j in enumerate(order))
        for order in permutations(range(max(n, m)), min(n, m))
    ]
    best = min(sums) if minimise else max(sums)
    assert float(table[there, found[there]].sum()) == pytest.approx(best, abs=1e-12)


def test_a_table_with_holes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="table of pairs holds NaN"):
        best_pairs(torch.tensor([[0.0, torch.nan]]))


def test_cosines_of_nothing_are_nothing() -> None:
    table = cosines(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0]]))
    torch.testing.assert_close(table, torch.tensor([[1.0], [0.0]]))


def test_bad_directions() -> None:
    with pytest.raises(InvalidInput, match="3 features, found ones 2"):
        match_directions(torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(InvalidInput, match="NaN"):
        match_directions(torch.ones(1, 2), torch.full((1, 2), torch.nan))


@given(st.integers(0, 1000), st.integers(2, 20))
def test_divergences_are_scipys(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    p, q = draw.normal(size=(2, 3, n)) * 4
    a, b = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q))
    logits = torch.from_numpy(p), torch.from_numpy(q)
    np.testing.assert_allclose(kl_divergence(*logits), [entropy(*rows) for rows in zip(a, b, strict=True)], atol=1e-10)
    expected = [jensenshannon(*rows) ** 2 for rows in zip(a, b, strict=True)]
    np.testing.assert_allclose(js_divergence(*logits), expected, atol=1e-10)
    np.testing.assert_allclose(js_divergence(*logits), js_divergence(*reversed(logits)), atol=1e-12)


def test_what_cannot_come() -> None:
    never = torch.tensor([0.0, -math.inf])
    even = torch.zeros(2)
    assert float(kl_divergence(never, even)) == pytest.approx(math.log(2), abs=1e-6)
    assert math.isinf(float(kl_divergence(even, never)))
    assert float(js_divergence(never, torch.tensor([-math.inf, 0.0]))) == pytest.approx(math.log(2), abs=1e-6)
    assert float(kl_divergence(even, even)) == 0
    half = torch.randn(4, 50, generator=generator(0)).half()
    assert kl_divergence(half, half + 1).dtype == torch.float32
    assert kl_divergence(half, half).abs().max() < 1e-6
