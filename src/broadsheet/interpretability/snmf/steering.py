"""Steering with a feature at a wanted side effect, and what the steered model says then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.divergence import kl_divergence
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.plotting import COLOURS, new_axes
from broadsheet.nn.seeding import seeded
from broadsheet.nn.steering import How, steered, strength_at

KL_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)  # nats, the paper's
PROMPT = "I think that"  # the paper's


@torch.no_grad()
def next_token_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Float[Tensor, "batch vocab"]:
    """Logits after each prompt's last token; padding may stand on either side.

    Args:
        model: a causal language model.
        input_ids: ``[batch, time]``.
        attention_mask: ``[batch, time]``.
    """
    padded = right_padded(input_ids, attention_mask)
    ids, mask = padded.input_ids, padded.attention_mask
    with evaluating(model):
        output = model(ids) if mask is None else model(ids, attention_mask=mask)
    logits = getattr(output, "logits", output)
    return logits[torch.arange(len(ids), device=ids.device), padded.last]


def next_token_kl(
    model: nn.Module,
    how: How,
    alpha: float,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    base: Tensor | None = None,
) -> float:
    """Mean KL(base || steered) of the next token after the prompts, in nats.

    Args:
        model, input_ids, attention_mask: as in :func:`next_token_logits`.
        how: a feature, or anything else that steers.
        alpha: strength.
        base: the unsteered logits; None computes them.
    """
    base = next_token_logits(model, input_ids, attention_mask) if base is None else base
    with steered(model, how, alpha):
        after = next_token_logits(model, input_ids, attention_mask)
    return float(kl_divergence(base.float(), after.float()).mean())


def alpha_for_kl(
    model: nn.Module,
    how: How,
    input_ids: Tensor,
    target_kl: float,
    attention_mask: Tensor | None = None,
    *,
    sign: int = 1,
    rtol: float = 0.05,
    limit: float = 1e6,
) -> float:
    """The strength at which steering moves the prediction after the prompts by a given KL divergence.

    Args:
        model, how, input_ids, attention_mask: as in :func:`next_token_kl`.
        target_kl: nats.
        sign: 1, or -1 to steer away.
        rtol, limit: as in :func:`broadsheet.nn.steering.strength_at`.

    Returns:
        alpha, negative for ``sign=-1``; NaN where the divergence stays below the target, with the warning
        :class:`~broadsheet.nn.steering.StrengthOutOfReach`.
    """
    if sign not in (1, -1):
        raise InvalidInput(f"sign={sign}: expected 1 or -1")
    base = next_token_logits(model, input_ids, attention_mask)
    measure = partial(_kl_at, model, how, input_ids, attention_mask, base)
    return strength_at(measure, target_kl, first=float(sign), rtol=rtol, limit=limit)


def _kl_at(
    model: nn.Module, how: How, input_ids: Tensor, attention_mask: Tensor | None, base: Tensor, alpha: float
) -> float:
    return next_token_kl(model, how, alpha, input_ids, attention_mask, base)


@dataclass(frozen=True)
class SteeringCurve:
    """What steering brings about at each side effect.

    Attributes:
        targets: KL divergences asked for, nats.
        alpha: strength at each; NaN where it was out of reach.
        kl: the divergence reached.
        mass: probability of the concept's tokens after the prompts.
        base_mass: the same without steering.
        name: of the feature.
    """

    targets: tuple[float, ...]
    alpha: tuple[float, ...]
    kl: tuple[float, ...]
    mass: tuple[float, ...]
    base_mass: float
    name: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row for each target."""
        return pd.DataFrame({"target": self.targets, "alpha": self.alpha, "kl": self.kl, "mass": self.mass})

    def plot(self, ax: Any = None, **line: Any) -> Any:
        """Mass of the concept's tokens against the divergence.

        Args:
            ax: matplotlib axes; None for new ones.
            **line: keyword arguments of ``plot``.
        """
        ax = new_axes(ax)
        ax.plot([0, *self.targets], [self.base_mass, *self.mass], **({"marker": "o", "label": self.name} | line))
        ax.axhline(self.base_mass, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
        ax.set(xlabel="KL divergence from the unsteered model, nats", ylabel="probability of the concept's tokens")
        return ax


def steering_curve(
    model: nn.Module,
    how: How,
    input_ids: Tensor,
    tokens: Tensor | Sequence[int],
    attention_mask: Tensor | None = None,
    *,
    targets: Sequence[float] = KL_TARGETS,
    sign: int = 1,
    rtol: float = 0.05,
) -> SteeringCurve:
    """How much probability of a concept's tokens steering brings at equal KL divergence.

    Args:
        model, how, input_ids, attention_mask: as in :func:`next_token_kl`.
        tokens: ids of the concept's tokens.
        targets: KL divergences, nats.
        sign: 1, or -1 to steer away.
        rtol: how near each target has to come.

    Warns:
        StrengthOutOfReach: a target is out of reach; its numbers are NaN.
    """
    chosen = torch.as_tensor(tokens, device=input_ids.device).flatten()
    base = next_token_logits(model, input_ids, attention_mask)

    def mass(logits: Tensor) -> float:
        return float(logits.float().softmax(-1)[:, chosen].sum(-1).mean())

    alphas, kls, masses = [], [], []
    for target in targets:
        alpha = alpha_for_kl(model, how, input_ids, target, attention_mask, sign=sign, rtol=rtol)
        alphas.append(alpha)
        if math.isnan(alpha):
            kls.append(math.nan)
            masses.append(math.nan)
            continue
        with steered(model, how, alpha):
            after = next_token_logits(model, input_ids, attention_mask)
        kls.append(float(kl_divergence(base.float(), after.float()).mean()))
        masses.append(mass(after))
    name = getattr(how, "name", "")
    return SteeringCurve(tuple(targets), tuple(alphas), tuple(kls), tuple(masses), mass(base), name)


def logit_shift(
    model: nn.Module,
    how: How,
    alpha: float,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    top: int = 50,
    by_size: bool = False,
    tokenizer: Any = None,
) -> pd.DataFrame:
    """The tokens whose logits after the prompts rise most when steered.

    Args:
        model, how, alpha, input_ids, attention_mask: as in :func:`next_token_kl`.
        top: tokens.
        by_size: rank by size instead of sign, as the official code does for autoencoders, but not for factors.
        tokenizer: turns ids into text.

    Returns:
        columns ``token_id``, ``shift`` (mean over prompts) and, with a tokenizer, ``token``.
    """
    base = next_token_logits(model, input_ids, attention_mask)
    with steered(model, how, alpha):
        shift = (next_token_logits(model, input_ids, attention_mask) - base).float().mean(0)
    if not 1 <= top <= len(shift):
        raise InvalidInput(f"top={top}: the vocabulary has {len(shift)} tokens")
    order = (shift.abs() if by_size else shift).topk(top).indices.cpu()
    table = pd.DataFrame({"token_id": order.tolist(), "shift": shift.cpu()[order].tolist()})
    if tokenizer is not None:
        table["token"] = [tokenizer.decode([i]) for i in table["token_id"]]
    return table


@torch.no_grad()
def steered_texts(
    model: Any,
    how: How,
    alpha: float,
    input_ids: Tensor,
    *,
    samples: int = 8,
    new_tokens: int = 50,
    top_k: int = 30,
    top_p: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """Continuations of a prompt by the steered model, drawn as in the paper.

    Args:
        model: a causal language model with ``generate``.
        how, alpha: as in :func:`next_token_kl`; every position is steered, generated ones too.
        input_ids: one prompt, ``[1, time]``.
        samples, new_tokens: how many, and how long.
        top_k, top_p: of the sampling.
        seed: of the sampling.

    Returns:
        ids ``[samples, time + new_tokens]``, prompt included.
    """
    if input_ids.shape[0] != 1:
        raise InvalidInput(f"input_ids has shape {tuple(input_ids.shape)}: one prompt [1, time] is expected")
    ids = input_ids.repeat(samples, 1)
    with evaluating(model), seeded(seed), steered(model, how, alpha):
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=True, top_k=top_k, top_p=top_p,
        )  # fmt: skip


def judge_prompts(concept: str, texts: Sequence[str]) -> list[str]:
    """Questions to a language model that is to judge steered texts; nothing is asked here.

    Args:
        concept: what the feature is about, in words.
        texts: of the steered model.

    Returns:
        one prompt for each text, which asks for two marks from 0 to 2; :func:`judged` puts them together.
    """
    return [
        "Mark a text that a language model wrote.\n"
        f"Concept: {concept}\n"
        f"Text: {text}\n"
        "First mark, the concept: 0 if the text has nothing to do with it, 1 if it touches on it, 2 if it is plainly "
        "about it.\n"
        "Second mark, the language: 0 if it cannot be read, 1 if it has slips or repeats itself, 2 if it reads well.\n"
        'Answer with one line of JSON: {"concept": 0, "fluency": 0}'
        for text in texts
    ]


def judged(concept: Sequence[float | int], fluency: Sequence[float | int]) -> float:
    """Mean over texts of the harmonic mean of the two marks; 0 where either is 0.

    Args:
        concept, fluency: marks from 0 to 2, one for each text.
    """
    a, b = np.asarray(concept, float), np.asarray(fluency, float)
    if a.shape != b.shape or a.size == 0 or not ((a >= 0) & (a <= 2) & (b >= 0) & (b <= 2)).all():
        raise InvalidInput("concept and fluency: expected as many marks of either, each from 0 to 2")
    both = a * b
    return float(np.where(both > 0, 2 * both / np.maximum(a + b, 1e-12), 0.0).mean())
