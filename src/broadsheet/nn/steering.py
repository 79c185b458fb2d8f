"""What every comparison of steering methods needs: how strong is too strong, and what does steering cost elsewhere.

Methods steer in different units (a length, a multiple of a spread, a factor on a weight). They are compared at equal
side effect: :func:`strength_at` finds each method's strength at which :func:`steering_kl` reaches the same value.

    kl = partial(steering_kl, model, feature, batches=neutral, base=base_log_probs(model, neutral))
    alpha = strength_at(kl, 0.1)
    with feature.steered(model, alpha): model.generate(...)
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import block_map
from broadsheet.nn.divergence import kl_divergence
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.padding import RightPadded, right_padded

Batch = Tensor | tuple[Tensor, Tensor | None]
FLAT = 1e-3  # a doubling that changes the measure by a smaller share than this counts as none
PATIENCE = 8  # so many of them in a row: the measure has reached its end


class StrengthOutOfReach(UserWarning):
    """No strength gives the wanted value: the measure stays below it however strong the steering."""


@runtime_checkable
class Steers(Protocol):
    """Anything with ``steered(model, alpha)``, such as :class:`broadsheet.nn.features.Feature`."""

    def steered(self, model: nn.Module, alpha: float) -> AbstractContextManager[Any]:
        """The model steered inside the block."""
        ...


How = Steers | Callable[[nn.Module, float], AbstractContextManager[Any]]


def steered(model: nn.Module, how: How, alpha: float) -> AbstractContextManager[Any]:
    """The context in which a model is steered, whichever of the two forms the method has.

    Args:
        model: to steer.
        how: an object with ``steered(model, alpha)``, or a function of both that gives a context manager.
        alpha: strength, in the method's own unit.
    """
    return how.steered(model, alpha) if isinstance(how, Steers) else how(model, alpha)


def strength_at(
    measure: Callable[[float], float],
    target: float,
    *,
    first: float = 1.0,
    rtol: float = 0.05,
    limit: float = 1e6,
    steps: int = 60,
) -> float:
    """The strength at which a measure that grows with it reaches a value: doubling, then bisection.

    The measure need not grow everywhere: what comes back is a crossing of the target, near the first one that doubling
    meets. Where the measure jumps over the target, it is the strongest known strength below the jump.

    Args:
        measure: of the strength; near 0 at 0. A value that is not finite (half precision overflowed) counts as beyond.
        target: above 0.
        first: the first strength tried; negative to look on the other side of 0.
        rtol: how near to the target the measure has to come, as a share of it.
        limit: no strength of larger size is tried.
        steps: evaluations at most.

    Returns:
        the strength; NaN where there is none, with a warning.

    Raises:
        InvalidInput: a target, tolerance, limit or first strength that makes no sense.

    Warns:
        StrengthOutOfReach: the measure has stopped growing, or the limit is met, below the target.

    Example:
        >>> round(strength_at(lambda x: x**2, 9.0, rtol=1e-6), 3)
        3.0
    """
    if not (target > 0 and math.isfinite(target)):
        raise InvalidInput(f"target={target}: expected a finite number above 0")
    if not (first != 0 and abs(first) <= limit):
        raise InvalidInput(f"first={first}: expected a number other than 0, at most limit={limit:g} in size")
    if not rtol > 0 or steps < 2:
        raise InvalidInput(f"rtol={rtol}, steps={steps}: expected a tolerance above 0 and at least 2 steps")

    def close(value: float) -> bool:
        return abs(value - target) <= rtol * target

    low, high, value, flat = 0.0, first, _finite(measure(first)), 0
    used = 1
    while value < target and not close(value):
        if abs(high) >= limit or flat >= PATIENCE or used >= steps:
            why = f"the limit is {limit:g}" if abs(high) >= limit else "it has stopped growing"
            warnings.warn(
                f"the measure is {value:.4g} at strength {high:.4g} and {why}: {target:g} is out of reach",
                StrengthOutOfReach,
                stacklevel=2,
            )
            return math.nan
        low, before = high, value
        high = math.copysign(min(abs(high) * 2, limit), first)
        value, used = _finite(measure(high)), used + 1
        flat = flat + 1 if abs(value - before) <= FLAT * max(abs(value), abs(before)) else 0
    if close(value):
        return high
    while used < steps and abs(high - low) > 1e-9 * abs(high):
        middle = (low + high) / 2
        value, used = _finite(measure(middle)), used + 1
        if close(value):
            return middle
        low, high = (middle, high) if value < target else (low, middle)
    return low  # the measure jumps: below it the side effect is within what was asked for


def _finite(value: Any) -> float:
    value = float(value)
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def base_log_probs(model: nn.Module, batches: Iterable[Batch]) -> list[Float[Tensor, "tokens vocab"]]:
    """What the model predicts when it is let alone, one row for each token that counts, batch by batch.

    Hand it to :func:`steering_kl`, which otherwise runs the unsteered model anew for every strength. It holds
    tokens times vocabulary numbers: for a large vocabulary leave it out.

    Args:
        model: a Hugging Face causal language model, or any module from token ids to logits.
        batches: ids ``[batch, time]``, or pairs of them and attention masks.
    """
    with evaluating(model):
        return [_rows(model, padded).log_softmax(-1) for padded in _batches(model, batches)]


@torch.no_grad()
def steering_kl(
    model: nn.Module,
    how: How,
    alpha: float,
    batches: Iterable[Batch],
    base: Sequence[Tensor] | None = None,
) -> float:
    """How far steering moves the model's predictions on a text: mean KL(base || steered) per token, in nats.

    Args:
        model: as in :func:`base_log_probs`.
        how, alpha: as in :func:`steered`.
        batches: neutral text, ids ``[batch, time]``, or pairs of them and attention masks; padding may stand on either
            side and does not count. A list, not an iterator, where ``base`` is given.
        base: of :func:`base_log_probs` on the same batches; None computes it.

    Returns:
        nats; infinite or NaN where the steered model overflows.

    Raises:
        InvalidInput: no token counts.
    """
    total, n = 0.0, 0
    with evaluating(model):
        for i, padded in enumerate(_batches(model, batches)):
            before = _rows(model, padded) if base is None else base[i]
            with steered(model, how, alpha):
                after = _rows(model, padded)
            total += float(kl_divergence(before, after).sum())
            n += len(before)
    return total / _some(n)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Exponential of the mean cross-entropy of the next token; padding does not count.

    Args:
        model: as in :func:`base_log_probs`; call it inside a steering context for the steered one.
        batches: ids ``[batch, time]``, or pairs of them and attention masks.
    """
    total, n = 0.0, 0
    with evaluating(model):
        for padded in _batches(model, batches):
            ids, mask = padded.input_ids[:, 1:], padded.attention_mask
            log_probs = _logits(model, padded)[:, :-1].float().log_softmax(-1)
            loss = -log_probs.gather(-1, ids[..., None]).squeeze(-1)
            counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, 1:].bool()
            total, n = total + float(loss[counted].double().sum()), n + int(counted.sum())
    mean = total / _some(n)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def mean_norms(
    model: nn.Module, batches: Iterable[Batch], site: str = "resid_post", layers: Sequence[int] | None = None
) -> Float[Tensor, " layers"]:
    """Mean Euclidean norm of what stands at one place of every layer: the unit that makes strengths portable.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        batches: ids ``[batch, time]``, or pairs of them and attention masks; padding does not count.
        site: a place's name without its layer, such as ``"resid_post"`` or ``"mlp"``.
        layers: which; None for all.

    Returns:
        ``[layers]``, float32, on the CPU.
    """
    the_map = block_map(model)
    chosen = list(range(the_map.n_layers)) if layers is None else list(layers)
    names = [f"layers.{layer}.{site}" for layer in chosen]
    total, n = torch.zeros(len(names), dtype=torch.float64), 0
    with evaluating(model), capture(model, [the_map.resolve(name) for name in names]) as seen:
        for padded in _batches(model, batches):
            _logits(model, padded)
            mask = padded.attention_mask
            counted = torch.ones_like(padded.input_ids) if mask is None else mask
            for i, name in enumerate(names):
                norms = seen[name].float().norm(dim=-1)
                total[i] += float(norms[counted.bool()].double().sum())
            n += int(counted.sum())
    return (total / _some(n)).float()


def distinct_n(texts: Iterable[Sequence[Any]], n: int = 2) -> float:
    """Share of different n-grams among all n-grams: low where generation repeats itself.

    Args:
        texts: token ids or words, one sequence for each text; n-grams do not cross texts.
        n: at least 1.

    Returns:
        in (0, 1]; 1 where no text is long enough to hold an n-gram.
    """
    if n < 1:
        raise InvalidInput(f"n={n}: expected at least 1")
    grams = [tuple(text[i : i + n]) for text in map(list, texts) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _batches(model: nn.Module, batches: Iterable[Batch]) -> Iterator[RightPadded]:
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
        yield right_padded(ids.to(device), None if mask is None else mask.to(device))


def _logits(model: nn.Module, padded: RightPadded) -> Float[Tensor, "batch time vocab"]:
    ids, mask = padded.input_ids, padded.attention_mask
    output = model(ids) if mask is None else model(ids, attention_mask=mask)
    return getattr(output, "logits", output)


def _rows(model: nn.Module, padded: RightPadded) -> Float[Tensor, "tokens vocab"]:
    logits = _logits(model, padded).float()
    mask = padded.attention_mask
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def _some(n: int) -> int:
    if n == 0:
        raise InvalidInput("no token counts: batches is empty, or an iterator that is used up")
    return n
