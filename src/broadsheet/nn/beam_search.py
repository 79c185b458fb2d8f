"""Beam search over many inputs at once, for any model that gives log-probabilities step by step.

Every hypothesis of every input goes through the model in the same call. A finished hypothesis keeps its score and its
place in the beam; lengths are not normalised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Beams:
    """Hypotheses of every input, the best first.

    Attributes:
        tokens: ``[n, beam, length]``, without the start token; after the stop token only padding.
        score: ``[n, beam]``, the sum of the steps' scores; minus infinity where there was no further hypothesis.
        finished: ``[n, beam]``, whether the stop token was reached.
    """

    tokens: Int[Tensor, "n beam length"]
    score: Float[Tensor, "n beam"]
    finished: Bool[Tensor, "n beam"]


@torch.no_grad()
def beam_search(
    step: Step,
    state: Any,
    n: int,
    *,
    beam: int,
    max_length: int,
    start: int,
    stop: int,
    pad: int,
    device: torch.device | str = "cpu",
) -> Beams:
    """The best continuations of every input.

    Args:
        step: ``(tokens [rows], state) -> (scores [rows, vocab], state)``; scores are log-probabilities, or anything
            else that is added up, minus infinity for what may not come.
        state: what the first step gets: tensors with the inputs in their first dimension, in tuples, lists or dicts.
        n: inputs.
        beam: hypotheses kept of each; 1 is greedy search.
        max_length: tokens at most, the stop token included.
        start, stop, pad: token ids.
        device: of the tokens.

    Raises:
        InvalidInput: a width or length below 1.
    """
    for name, value in {"n": n, "beam": beam, "max_length": max_length}.items():
        if value < 1:
            raise InvalidInput(f"{name}={value}: must be at least 1")
    last = torch.full((n,), start, device=device)
    width = 1
    tokens = torch.empty(n, 1, 0, dtype=torch.long, device=device)
    total: Tensor | None = None
    finished = torch.zeros(n, 1, dtype=torch.bool, device=device)
    for _ in range(max_length):
        scores, state = step(last, state)
        vocab = scores.shape[-1]
        scores = scores.view(n, width, vocab)
        only_pad = torch.full((vocab,), -torch.inf, dtype=scores.dtype, device=scores.device)
        only_pad[pad] = 0
        scores = torch.where(finished[..., None], only_pad, scores)
        total = scores if total is None else total[..., None] + scores
        kept = min(beam, width * vocab)
        best = total.view(n, -1).topk(kept, dim=1)
        total, parent, chosen = best.values, best.indices // vocab, best.indices % vocab
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, tokens.shape[2])), chosen[..., None]], 2)
        finished = finished.gather(1, parent) | (chosen == stop)
        rows = (torch.arange(n, device=device)[:, None] * width + parent).flatten()
        state = _rows(state, rows)
        last, width = chosen.flatten(), kept
        if bool(finished.all()):
            break
    assert total is not None
    missing = max_length - tokens.shape[2]
    tokens = torch.nn.functional.pad(tokens, (0, missing), value=pad)
    return Beams(tokens, total, finished)


def _rows(state: Any, rows: Tensor) -> Any:
    """The same state for chosen rows of its tensors."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, tuple | list):
        return type(state)(_rows(part, rows) for part in state)
    if isinstance(state, dict):
        return {name: _rows(part, rows) for name, part in state.items()}
    return state
