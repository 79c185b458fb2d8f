"""Running top-k, quantiles, beam search, ablation and early stopping against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.ablation import ablated, ablation_curve, by_layer
from broadsheet.nn.beam_search import beam_search
from broadsheet.nn.early_stopping import BestWeights
from broadsheet.nn.exemplars import RunningQuantile, RunningTopK, UpperTail


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_top_k_is_that_of_everything_at_once(seed: int, k: int, sizes: list[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, (sum(sizes), 3), generator=rng).float()  # many ties: the first one stays
    payload = torch.randn(sum(sizes), 3, 2, generator=rng)
    top, at = RunningTopK(3, k), 0
    for size in sizes:
        ids = torch.arange(at, at + size)
        top.add(values[ids], ids, payload[ids])
        at += size
    for unit in range(3):
        order = sorted(range(len(values)), key=lambda i: (-float(values[i, unit]), i))[:k]
        assert top.ids[unit].tolist() == order
        assert torch.equal(top.values[unit], values[order, unit])
        assert top.payload is not None and torch.equal(top.payload[unit], payload[order, unit])


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_quantiles_are_exact_while_everything_fits(q: float, n: int) -> None:
    values = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    sketch, tail = RunningQuantile(3, capacity=64), UpperTail(3, n, q)
    for part in values.split(5):
        sketch.add(part)
        tail.add(part)
    expected = torch.quantile(values, q, dim=0)
    torch.testing.assert_close(sketch.quantile(q), expected)
    torch.testing.assert_close(tail.quantile(), expected)
    assert sketch.rank_error == 0


def test_the_sketch_stays_within_its_error_of_rank() -> None:
    values = torch.randn(60_000, 8, generator=torch.Generator().manual_seed(0)).sort(0).values  # the hardest order
    sketch = RunningQuantile(8, capacity=512)
    for part in values.split(1000):
        sketch.add(part)
    held = sum(level.shape[1] for level in sketch._levels)
    assert held < 512 * 9  # not everything is kept
    for q in (0.01, 0.5, 0.99):
        share = (values <= sketch.quantile(q)).double().mean(0)
        assert float((share - q).abs().max()) < 6 * sketch.rank_error
    assert torch.equal(sketch.quantile(1.0), values[-1]) and torch.equal(sketch.quantile(0.0), values[0])


def test_streams_refuse_what_has_no_rank() -> None:
    with pytest.raises(InvalidInput, match="NaN"):
        RunningQuantile(1).add(torch.tensor([[float("nan")]]))
    with pytest.raises(InvalidInput, match="NaN"):
        RunningTopK(1, 1).add(torch.tensor([[float("nan")]]), torch.tensor([0]))
    with pytest.raises(InvalidInput, match="1 of 2"):
        tail = UpperTail(1, 2, 0.5)
        tail.add(torch.zeros(1, 1))
        tail.quantile()
    with pytest.raises(InvalidInput, match="3 units"):
        RunningTopK(2, 1).add(torch.zeros(1, 3), torch.tensor([0]))


# ------------------------------------------------------------------------------------------------------- beam search

START, STOP, PAD, WORDS = 0, 1, 2, 5


def table(n: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities of the next word given the last one and the place: few enough sentences to try them all."""
    logits = torch.randn(n, 4, WORDS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits[..., [START, PAD]] = -torch.inf
    return logits.log_softmax(-1)


def search(chain: torch.Tensor, beam: int, length: int = 4):
    def step(token: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]):
        rows, place = state
        return rows[torch.arange(len(token)), place, token], (rows, place + 1)

    state = (chain, torch.zeros(len(chain), dtype=torch.long))
    return beam_search(step, state, len(chain), beam=beam, max_length=length, start=START, stop=STOP, pad=PAD)


def enumerated(chain: torch.Tensor, length: int = 4) -> list[tuple[float, tuple[int, ...]]]:
    found = {}
    for words in itertools.product((1, 3, 4), repeat=length):
        cut = words[: words.index(STOP) + 1] if STOP in words else words
        found[cut] = sum(float(chain[t, a, b]) for t, (a, b) in enumerate(itertools.pairwise((START, *cut))))
    return sorted(((score, words) for words, score in found.items()), reverse=True)


def test_a_wide_beam_finds_the_best_of_all_sentences() -> None:
    chain = table(3)
    beams = search(chain, 100)
    for i in range(3):
        everything = enumerated(chain[i])
        for j, (score, words) in enumerate(everything):
            kept = [t for t in beams.tokens[i, j].tolist() if t != PAD]
            assert kept == list(words) and float(beams.score[i, j]) == pytest.approx(score)
            assert bool(beams.finished[i, j]) == (words[-1] == STOP)
        assert bool((beams.score[i, len(everything) :] == -torch.inf).all())


def test_width_one_is_greedy_and_inputs_do_not_mix() -> None:
    chain = table(4, seed=1)
    together = search(chain, 1)
    for i in range(4):
        token, words = START, []
        while len(words) < 4 and token != STOP:
            token = int(chain[i, len(words), token].argmax())
            words.append(token)
        assert [t for t in together.tokens[i, 0].tolist() if t != PAD] == words
        alone = search(chain[i : i + 1], 3)
        assert torch.equal(alone.tokens[0], search(chain, 3).tokens[i])


# ---------------------------------------------------------------------------------------------------------- ablation


def test_ablation_zeroes_just_those_units_and_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(4, 5))
    x = torch.randn(2, 3, 4, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = model[0](x)
    with ablated(model, [("0", 1), ("0", 3)]):
        seen = model[0](x)
    assert not seen[:, [1, 3]].any() and torch.equal(seen[:, [0, 2]], whole[:, [0, 2]])
    assert torch.equal(model[0](x), whole)
    with ablated(model, {"0": range(4)}):
        assert not model[0](x).any()
    with ablated(model, {"3": [2]}, value={"3": torch.arange(5.0)}):  # tokens: the last axis
        tokens = model(x)
    assert bool((tokens[..., 2] == 2).all()) and bool((tokens[..., 0] != 0).any())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert by_layer([("a", 1), ("b", 2), ("a", 3)]) == {"a": [1, 3], "b": [2]}


def test_ablation_says_what_is_wrong() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(InvalidInput, match=r"unit 4 of '0': the layer has 4 units"), ablated(model, {"0": [4]}):
        model(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InvalidInput, match="no submodule 'conv'"), ablated(model, {"conv": [0]}):
        pass
    with pytest.raises(InvalidInput, match="count 3"):
        ablation_curve(model, lambda _: 0.0, [("0", 0)], [3])
    sums = ablation_curve(
        model, lambda m: float(m(torch.ones(1, 3, 3, 3)).detach().abs().sum()), [("0", i) for i in range(4)], range(5)
    )
    assert sums[-1] == 0 and sums == sorted(sums, reverse=True)


# ----------------------------------------------------------------------------------------------------- early stopping


def overshooting(**how):
    """A parameter that walks past its best value: the score rises to step 3, then falls."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    keeper = BestWeights(lambda net: -abs(float(net.weight) - 3), every=1, patience=2)
    report = keeper.fit(
        model,
        lambda net, _: -net.weight.sum(),
        [0],
        steps=20,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        **how,
    )
    return model, keeper, report


def test_the_best_weights_come_back_not_the_last() -> None:
    model, keeper, report = overshooting()
    assert float(model.weight) == 3 and keeper.best_step == 3 and list(keeper.history) == [1, 2, 3, 4, 5]
    assert report.steps == 5 and not model.training
    model, _, _ = overshooting(restore=False)
    assert float(model.weight) == 5  # what references instead of copies would have given


def test_a_stopped_training_is_not_done_again(tmp_path) -> None:
    _, first, _ = overshooting(checkpoint=tmp_path)
    model, second, report = overshooting(checkpoint=tmp_path)
    assert second.history == first.history and report.steps == 0 and float(model.weight) == 3
    with pytest.raises(InvalidInput, match="patience=0"):
        BestWeights(lambda _: 0.0, every=1, patience=0)


def test_quantile_of_a_normal_distribution() -> None:
    tail = UpperTail(2, 10_000, 0.99)
    draws = np.random.default_rng(0).normal(size=(10_000, 2))
    for part in np.array_split(draws, 7):
        tail.add(torch.from_numpy(part))
    np.testing.assert_allclose(tail.quantile().numpy(), np.quantile(draws, 0.99, axis=0))
