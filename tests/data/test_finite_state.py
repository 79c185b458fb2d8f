"""The finite-state language: a proper machine, texts of its edges only, and what a model is scored by."""

import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.data.finite_state import TokFSM
from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator


@pytest.mark.parametrize(
    ("states", "successors", "base", "digits"), [(100, 10, 10, 2), (9, 2, 3, 2), (20, 3, 3, 3), (5, 5, 8, 1)]
)
def test_rows_sum_to_one_and_texts_walk_along_edges(states, successors, base, digits):
    fsm = TokFSM(states, successors, base, seed=3)
    assert fsm.digits == digits
    torch.testing.assert_close(fsm.transitions.sum(1), torch.ones(states))
    assert bool(((fsm.transitions > 0).sum(1) == successors).all())
    ids = fsm.sample(50, 1 + 6 * digits, generator(0))
    assert ids.shape == (50, 1 + 6 * digits)
    decoded = fsm.decode(ids)
    assert bool((fsm.transitions[decoded[:, :-1], decoded[:, 1:]] > 0).all())
    assert fsm.transition_accuracy(ids) == 1
    assert torch.equal(fsm.encode(decoded).flatten(1), ids[:, 1:])
    assert torch.equal(fsm.sample(50, 1 + 6 * digits, generator(0)), ids)
    assert torch.equal(TokFSM(states, successors, base, seed=3).transitions, fsm.transitions)


def test_every_successor_is_equally_likely():
    fsm = TokFSM(6, 3, 6)
    walk = fsm.walk(20_000, 2, generator(0))
    counts = torch.zeros(6, 6).index_put_((walk[:, 0], walk[:, 1]), torch.ones(()), accumulate=True)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), fsm.transitions, atol=0.03, rtol=0)


def test_the_machine_is_numpys_draw():
    """As the published generator makes it: a fresh NumPy generator, one row after the other."""
    random = np.random.default_rng(42)
    expected = np.zeros((100, 100))
    for row in expected:
        row[random.choice(100, size=10, replace=False)] = 0.1
    np.testing.assert_allclose(TokFSM(seed=42).transitions, expected, atol=1e-7)


@pytest.mark.parametrize("length", [12, 13])
def test_contexts_are_counted_by_hand(length):
    fsm = TokFSM(20, 3, 3, seed=1)  # three digits
    ids = fsm.sample(4, length, generator(0))
    contexts = fsm.contexts(ids)
    for text, row in zip(ids.tolist(), contexts.tolist(), strict=True):
        for t, context in enumerate(row):
            whole, known = divmod(t, 3)
            if t < 3:
                assert context == -1
                continue
            digits = text[1 : 1 + 3 * whole]
            state = digits[-3] * 9 + digits[-2] * 3 + digits[-1]
            seen = text[1 + 3 * whole : t + 1]
            number = sum(d * 3 ** (len(seen) - 1 - i) for i, d in enumerate(seen))
            expected = [0, 20, 20 + 60][known] + state * 3**known + number
            assert context == expected
            if t + 1 < length:
                assert float(fsm.next_digit[context, text[t + 1]]) > 0
            allowed = {s[known] for s in fsm.encode(fsm.successors[state]).tolist() if s[:known] == seen}
            assert set(fsm.next_digit[context].nonzero().flatten().tolist()) == allowed
            assert float(fsm.next_digit[context].sum()) == pytest.approx(1)


class Oracle(nn.Module):
    """Knows the machine; ``wrong`` of its probability goes to every digit alike."""

    def __init__(self, fsm, wrong):
        super().__init__()
        self.fsm, self.wrong, self.p = fsm, wrong, nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        contexts = self.fsm.contexts(ids)
        p = self.fsm.next_digit[contexts.clamp_min(0)] * (1 - self.wrong) + self.wrong / self.fsm.base
        p = torch.cat([p, torch.zeros(*p.shape[:2], 1)], -1)
        return type("Output", (), {"logits": (p + 1e-9).log()})


def test_a_model_that_knows_the_machine_scores_one():
    fsm = TokFSM(36, 6, 6)
    ids = fsm.sample(200, 9, generator(0))
    model = Oracle(fsm, 0.0)
    assert fsm.first_transition_accuracy(model) == 1
    np.testing.assert_allclose(fsm.valid_mass(model(ids).logits, ids), [1, 1], atol=1e-5)
    half = fsm.valid_mass(Oracle(fsm, 0.5)(ids).logits, ids)
    contexts = fsm.contexts(ids)
    allowed = (fsm.next_digit > 0).float().mean(1)
    for place in (0, 1):
        chosen = contexts[:, 2 + place :: 2]
        chosen = chosen[chosen >= 0]
        assert float(half[place]) == pytest.approx(0.5 + 0.5 * float(allowed[chosen].mean()), abs=1e-5)
    assert fsm.first_transition_accuracy(Oracle(fsm, 1.0)) < 0.6


def test_texts_that_are_none():
    fsm = TokFSM(30, 3, 6)
    with pytest.raises(InvalidInput, match="3 digits are no whole number of states of 2: leave out the last 1"):
        fsm.decode(fsm.sample(2, 4))
    with pytest.raises(InvalidInput, match="BOS"):
        fsm.decode(torch.zeros(1, 3, dtype=torch.long))
    wrong = torch.tensor([[6, 5, 5, 0, 1], [6, 6, 0, 0, 1]])  # state 35 of 30; BOS as a digit
    assert fsm.decode(wrong).tolist() == [[-1, 1], [-1, 1]]
    assert fsm.transition_accuracy(wrong) == 0
    with pytest.raises(InvalidInput, match="two states"):
        fsm.transition_accuracy(fsm.sample(2, 3))
    for how, message in (
        ({"n_states": 1}, "n_states=1"),
        ({"n_states": 5, "n_successors": 6}, "n_successors=6"),
        ({"base": 1}, "base=1"),
    ):
        with pytest.raises(InvalidInput, match=message):
            TokFSM(**how)
    with pytest.raises(InvalidInput, match="length=1"):
        fsm.sample(2, 1)
