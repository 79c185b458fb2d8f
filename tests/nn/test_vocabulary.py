"""Words of directions, against the whole matrix of logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.errors import InvalidInput
from broadsheet.nn.vocabulary import SkippedDirections, exact_topk, rank_vocabulary


def made(n: int = 13, size: int = 700, d: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64):
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=random, dtype=torch.float64)
    w = torch.randn(size, d, generator=random, dtype=torch.float64)
    bias = torch.randn(size, generator=random, dtype=torch.float64)
    return u.to(dtype), w.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("blocks", [(1, 1), (4, 7), (5, 64), (13, 699), (100, 10_000)], ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_blocks_give_what_the_whole_matrix_gives(blocks: tuple[int, int], temperature: float) -> None:
    u, w, bias = made()
    ours = rank_vocabulary(
        u,
        w,
        bias=bias,
        k=6,
        k_bottom=3,
        temperature=temperature,
        block_directions=blocks[0],
        block_vocabulary=blocks[1],
    )
    logits = u @ w.T + bias
    dense = torch.distributions.Categorical(logits=logits / temperature)
    assert torch.equal(ours.tokens, logits.topk(6).indices)
    assert torch.equal(ours.bottom_tokens, logits.topk(3, largest=False).indices)
    torch.testing.assert_close(ours.logits, logits.gather(1, ours.tokens))
    torch.testing.assert_close(ours.bottom_logits, logits.gather(1, ours.bottom_tokens))
    torch.testing.assert_close(ours.logsumexp, (logits / temperature).logsumexp(1))
    torch.testing.assert_close(ours.entropy, dense.entropy())
    torch.testing.assert_close(ours.probs, dense.probs.gather(1, ours.tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    u, w, _ = made(size=3000, dtype=dtype)
    ours = rank_vocabulary(u, w, k=8, block_vocabulary=512)
    logits = u.double() @ w.double().T  # products of half numbers are exact in single precision
    assert ours.logits.dtype == torch.float32
    torch.testing.assert_close(ours.logits.double(), logits.gather(1, ours.tokens), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.logits.double(), logits.topk(8).values, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.logsumexp.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)


@given(
    st.integers(1, 4), st.integers(1, 900), st.integers(0, 12), st.integers(1, 40), st.booleans(), st.integers(0, 10**6)
)
@settings(max_examples=150, deadline=None)
def test_of_equal_values_the_first_column_wins(
    n: int, size: int, k: int, levels: int, largest: bool, seed: int
) -> None:
    k = min(k, size)
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (n, size)).astype(np.float32))
    values, index = exact_topk(x, k, largest)
    order = x.sort(dim=1, descending=largest, stable=True)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(index, order.indices[:, :k])


@pytest.mark.parametrize("block", [16, 100, 5000])
def test_ties_across_blocks_go_to_the_smaller_id(block: int) -> None:
    w = torch.ones(2000, 3)
    ours = rank_vocabulary(torch.ones(2, 3), w, k=5, block_vocabulary=block)
    assert ours.tokens.tolist() == ours.bottom_tokens.tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.testing.assert_close(ours.entropy, torch.full((2,), 2000.0).log())


def test_excluded_words_do_not_count() -> None:
    u, w, bias = made(size=50)
    out = [0, 7, 49, 7]
    ours = rank_vocabulary(u, w, bias=bias, k=4, exclude=out, block_vocabulary=8)
    logits = u @ w.T + bias
    kept = [i for i in range(50) if i not in out]
    torch.testing.assert_close(ours.logsumexp, logits[:, kept].logsumexp(1))
    assert torch.equal(ours.tokens, torch.tensor(kept)[logits[:, kept].topk(4).indices])
    assert torch.equal(ours.bottom_tokens, torch.tensor(kept)[logits[:, kept].topk(4, largest=False).indices])


def test_a_soft_cap_keeps_the_order() -> None:
    u, w, _ = made()
    ours = rank_vocabulary(u, w, transform=lambda x: 2 * torch.tanh(x / 2))
    capped = 2 * torch.tanh(u @ w.T / 2)
    assert torch.equal(ours.tokens, rank_vocabulary(u, w).tokens)
    torch.testing.assert_close(ours.logsumexp, capped.logsumexp(1))


def test_directions_that_are_not_finite_are_reported_and_left_out() -> None:
    u, w, _ = made()
    whole = rank_vocabulary(u, w, k=3)
    u[4, 2], u[9, 0] = torch.nan, torch.inf
    with pytest.warns(SkippedDirections, match=r"2 of 13 directions .* \(rows 4, 9\)"):
        ours = rank_vocabulary(u, w, k=3)
    bad = torch.tensor([4, 9])
    good = torch.tensor([i for i in range(13) if i not in (4, 9)])
    assert bool((ours.tokens[bad] == -1).all()) and bool(ours.logits[bad].isnan().all())
    assert bool(ours.entropy[bad].isnan().all())
    assert torch.equal(ours.tokens[good], whole.tokens[good])
    torch.testing.assert_close(ours.logsumexp[good], whole.logsumexp[good])


def test_no_directions_and_a_single_word() -> None:
    _, w, _ = made()
    assert rank_vocabulary(torch.empty(0, 9, dtype=torch.float64), w, k=3).tokens.shape == (0, 3)
    one = rank_vocabulary(torch.ones(2, 9, dtype=torch.float64), w[:1], k=1, k_bottom=0)
    assert one.probs.tolist() == [[1.0], [1.0]] and one.bottom_tokens.shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": torch.ones(5, 4)}, "9 features, the words 4"),
        ({"bias": torch.ones(3)}, "3 entries for 700 words"),
        ({"k": 0}, "k=0"),
        ({"k": 701}, "701"),
        ({"k": 698, "exclude": [1, 2, 3]}, "697 words count"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"exclude": [700]}, "exclude holds 700"),
        ({"exclude": [-1]}, "exclude holds -1"),
        ({"block_vocabulary": 0}, "at least 1"),
        ({"directions": torch.empty(2, 9, device="meta")}, "meta"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_bad_input_is_refused_with_its_value(change: dict, message: str) -> None:
    u, w, _ = made(dtype=torch.float32)
    with pytest.raises(InvalidInput, match=message):
        rank_vocabulary(**{"directions": u, "vocabulary": w, **change})


def test_nan_in_the_vocabulary_and_overflow_are_refused() -> None:
    u, w, _ = made(dtype=torch.float32)
    with pytest.raises(InvalidInput, match=r"overflow torch\.float16"):
        rank_vocabulary(u * 1e4, w * 1e4, dtype=torch.float16)
    w[33, 0] = torch.nan
    with pytest.raises(InvalidInput, match="token 33"):
        rank_vocabulary(u, w)


def test_gradients_are_not_recorded_and_inputs_stay() -> None:
    u, w, _ = made(dtype=torch.float32)
    before = (u.clone(), w.clone())
    assert not rank_vocabulary(u.requires_grad_(), w).logits.requires_grad
    assert torch.equal(u, before[0]) and torch.equal(w, before[1])
