"""Strengths are found where they are, and side effects are those of a plain reference, padding or not."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.features import Feature
from broadsheet.nn.hooks import capture
from broadsheet.nn.steering import (
    StrengthOutOfReach,
    base_log_probs,
    distinct_n,
    mean_norms,
    perplexity,
    steering_kl,
    strength_at,
)
from broadsheet.nn.tiny_models import FAMILIES, VOCAB, tiny_inputs, tiny_model

DECODERS = [f for f in FAMILIES if FAMILIES[f][0].endswith(("LMHeadModel", "ForCausalLM"))]


# ------------------------------------------------------------------------------------------------- finding a strength


@given(st.floats(0.5, 3), st.floats(-8, 12), st.floats(-6, 6))
def test_a_strength_is_found_wherever_it_is(power: float, log_answer: float, log_first: float) -> None:
    answer = 2.0**log_answer
    found = strength_at(lambda x: x**power, answer**power, first=2.0**log_first, rtol=1e-4)
    assert abs(found**power / answer**power - 1) <= 1e-4 * (1 + 1e-9)


def test_the_other_side_of_zero() -> None:
    found = strength_at(lambda x: x * x if x < 0 else 0.0, 25.0, first=-1.0, rtol=1e-6)
    assert found == pytest.approx(-5, rel=1e-5)


def test_few_evaluations() -> None:
    calls: list[float] = []

    def measure(x: float) -> float:
        calls.append(x)
        return x**2

    strength_at(measure, 1000.0)
    assert len(calls) <= 12 and len(set(calls)) == len(calls)


def test_a_saturated_measure_has_no_strength() -> None:
    calls = []
    with pytest.warns(StrengthOutOfReach, match="stopped growing"):
        found = strength_at(lambda x: calls.append(x) or math.tanh(x), 2.0)
    assert math.isnan(found) and len(calls) < 20
    with pytest.warns(StrengthOutOfReach, match="limit is 10"):
        assert math.isnan(strength_at(lambda x: x, 100.0, limit=10.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert strength_at(lambda x: x, 100.0, limit=100.0, rtol=1e-3) == pytest.approx(100, rel=1e-3)


def test_slow_starts_are_not_taken_for_saturation() -> None:
    """KL grows with the square at first: it never looks flat, however small."""
    assert strength_at(lambda x: 1e-9 * x * x, 1.0, rtol=1e-3) == pytest.approx(10**4.5, rel=1e-3)


def test_a_jump_gives_the_strength_below_it() -> None:
    found = strength_at(lambda x: 0.0 if x < 0.3 else 5.0, 1.0)
    assert 0.299 < found < 0.3
    assert strength_at(lambda x: x if x < 3 else math.nan, 2.5, rtol=1e-3) == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"target": 0.0}, {"target": math.inf}, {"first": 0.0}, {"first": 1e7}, {"rtol": 0.0}, {"steps": 1}]
)
def test_strength_bad_input(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        strength_at(lambda x: x, **{"target": 1.0, **wrong})


# ------------------------------------------------------------------------------------------------------- side effects


def padded(model: nn.Module, side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    texts = [tiny_inputs("gpt2", 1, seed)[0, : 7 - seed] for seed in range(3)]
    ids, mask = torch.ones(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
        ids[row, where], mask[row, where] = text, 1
    return ids, mask, texts


def log_probs(model: Any, text: Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(text[None]).logits[0].double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def push(model: nn.Module, site: str = "layers.0.resid_post") -> Feature:
    random = torch.Generator().manual_seed(3)
    return Feature(site, torch.randn(24, dtype=torch.float64, generator=random))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_kl_and_perplexity_of_each_text_alone(family: str, side: str) -> None:
    model = tiny_model(family)
    feature = push(model)
    ids, mask, texts = padded(model, side)
    kl, loss = [], []
    for text in texts:
        before = log_probs(model, text)
        with feature.steered(model, 3.0):
            after = log_probs(model, text)
        kl += list((np.exp(before) * (before - after)).sum(-1))
        loss += [-before[i, int(token)] for i, token in enumerate(text[1:])]
    found = steering_kl(model, feature, 3.0, [(ids, mask)])
    assert found == pytest.approx(np.mean(kl), rel=2e-4) and found > 1e-3
    base = base_log_probs(model, [(ids, mask)])
    assert steering_kl(model, feature, 3.0, [(ids, mask)], base) == pytest.approx(found, rel=1e-5)
    assert steering_kl(model, feature, 0.0, [(ids, mask)]) == 0
    assert perplexity(model, [(ids, mask)]) == pytest.approx(math.exp(np.mean(loss)), rel=1e-4)


def test_batches_count_by_their_tokens() -> None:
    model = tiny_model("llama")
    feature = push(model)
    ids = tiny_inputs("llama", 4)
    whole = steering_kl(model, feature, 2.0, [ids])
    assert steering_kl(model, feature, 2.0, [ids[:1], ids[1:]]) == pytest.approx(whole, rel=1e-5)
    assert perplexity(model, [ids[:1], ids[1:]]) == pytest.approx(perplexity(model, [ids]), rel=1e-6)


def test_a_function_steers_too_and_the_strength_matches() -> None:
    model = tiny_model("gpt2")
    feature = push(model)

    @contextmanager
    def twice(model: nn.Module, alpha: float) -> Iterator[nn.Module]:
        with feature.steered(model, 2 * alpha):
            yield model

    ids = [tiny_inputs("gpt2", 4)]
    base = base_log_probs(model, ids)
    strengths = {
        name: strength_at(lambda x, how=how: steering_kl(model, how, x, ids, base), 0.2, rtol=0.01)
        for name, how in {"one": feature, "two": twice}.items()
    }
    assert strengths["one"] == pytest.approx(2 * strengths["two"], rel=0.03)
    measure = partial(steering_kl, model, feature, batches=ids, base=base)
    assert measure(strengths["one"]) == pytest.approx(0.2, rel=0.011)


def test_mode_is_given_back() -> None:
    model = tiny_model("gpt2").train()
    steering_kl(model, push(model), 1.0, [tiny_inputs("gpt2")])
    perplexity(model, [tiny_inputs("gpt2")])
    assert model.training


@pytest.mark.parametrize("site", ["resid_post", "attn", "mlp.act"])
def test_mean_norms(site: str) -> None:
    model = tiny_model("opt")
    ids, mask, texts = padded(model, "left")
    found = mean_norms(model, [(ids, mask)], site)
    from broadsheet.nn.blocks import block_map

    for layer in range(2):
        norms = []
        for text in texts:
            with capture(model, block_map(model).resolve(f"layers.{layer}.{site}")) as seen, torch.no_grad():
                model(text[None])
            norms += seen[f"layers.{layer}.{site}"][0].norm(dim=-1).tolist()
        assert float(found[layer]) == pytest.approx(np.mean(norms), rel=1e-5)
    assert torch.equal(mean_norms(model, [(ids, mask)], site, [1]), found[1:])


def test_distinct() -> None:
    assert distinct_n([[1, 2, 3, 4]]) == 1
    assert distinct_n([[1, 1, 1, 1, 1]]) == 1 / 4
    assert distinct_n([["a", "b"], ["a", "b"]]) == 1 / 2
    assert distinct_n([[1, 2], [2, 3]], 1) == 3 / 4
    assert distinct_n([[1], []]) == 1
    with pytest.raises(InvalidInput, match="n=0"):
        distinct_n([[1]], 0)


def test_nothing_to_count() -> None:
    model = tiny_model("gpt2")
    for call in (lambda: steering_kl(model, push(model), 1.0, []), lambda: perplexity(model, [])):
        with pytest.raises(InvalidInput, match="no token"):
            call()
    assert int(tiny_inputs("gpt2").max()) < VOCAB
