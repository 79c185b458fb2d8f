"""How much steering wins, what it costs other text, and what it costs in time."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.profile import bias_profile
from broadsheet.nn.generation import generate_tokens
from broadsheet.nn.plotting import CYCLE, new_axes
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.steering import Batch, How, base_log_probs, distinct_n, perplexity, steered, steering_kl

COLLAPSED = 0.3  # share of different word pairs in an answer, below which text has fallen into repetition


class Collapsed(UserWarning):
    """Steered so strongly that answers repeat themselves."""


@dataclass(frozen=True)
class SteeringReport:
    """One row for each method and strength.

    Attributes:
        rows: ``method``, ``alpha``, ``target`` (share of answers), ``perplexity`` and ``kl`` on neutral text,
            ``distinct_2`` (mean over answers), ``tokens_per_second``.
        target: the category that is steered to.
    """

    rows: tuple[dict[str, Any], ...]
    target: str

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows))

    def best(self, method: str, most_kl: float = np.inf) -> dict[str, Any]:
        """The row of the largest target share whose side effect stays within a bound; ties go to the weaker one."""
        rows = [row for row in self.rows if row["method"] == method and row["kl"] <= most_kl]
        if not rows:
            raise InvalidInput(f"no strength of {method!r} stays within kl={most_kl}: measure weaker ones")
        return max(rows, key=lambda row: (row["target"], -abs(row["alpha"])))

    def plot(self, method: str | None = None, ax: Any = None) -> Any:
        """Target share over strength, with the perplexity of neutral text on a second axis.

        Args:
            method: which; None for the first one.
            ax: matplotlib axes or None.
        """
        ax = new_axes(ax)
        name = self.rows[0]["method"] if method is None else method
        rows = sorted((row for row in self.rows if row["method"] == name), key=lambda row: row["alpha"])
        alpha = [row["alpha"] for row in rows]
        (one,) = ax.plot(
            alpha, [row["target"] for row in rows], marker="o", color=CYCLE[0], label=f"{self.target} share"
        )
        ax.set(xlabel="strength", ylabel=f"share of {self.target} answers", ylim=(-0.02, 1.02))
        other = ax.twinx()
        (two,) = other.plot(
            alpha, [row["perplexity"] for row in rows], marker="s", linestyle="--", color=CYCLE[1],
            label="perplexity of neutral text",
        )  # fmt: skip
        other.set_ylabel("perplexity of neutral text")
        other.grid(visible=False)
        ax.legend(handles=[one, two], loc="upper left")
        return ax


def steering_report(
    model: nn.Module,
    tokenizer: Any,
    methods: Mapping[str, How],
    alphas: Sequence[float] | Mapping[str, Sequence[float]],
    prompts: Sequence[str],
    classify: Callable[..., str | None],
    target: str,
    neutral: Sequence[Batch],
    *,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    eos: int | None = None,
    neutral_how: Callable[[How], How] | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> SteeringReport:
    """Steer with every method at every strength; measure what is won and what is lost.

    Args:
        model, tokenizer: the model.
        methods: name -> something with ``steered(model, alpha)``, or a function of both that gives a context manager.
        alphas: strengths for all methods, or name -> strengths.
        prompts: asked.
        classify: as in :func:`~broadsheet.interpretability.g_act.profile.bias_profile`.
        target: the category that is steered to.
        neutral: text on which steering should change nothing, token ids or pairs of ids and masks.
        n, temperature, max_new_tokens, eos, seed: of the answers.
        neutral_how: how a method steers neutral text; None as it steers prompts, with ``positions="all"`` where the
            method knows positions, because a plain pass has no generated tokens.
        progress: where strengths are counted.

    Warns:
        Collapsed: answers repeat themselves (mean share of different word pairs below 0.3).
    """
    if not len(neutral):
        raise InvalidInput("neutral is empty: hand in token ids of text that has nothing to do with the target")
    base, rows = base_log_probs(model, neutral), []
    plan = [
        (name, how, float(alpha))
        for name, how in methods.items()
        for alpha in (alphas[name] if isinstance(alphas, Mapping) else alphas)
    ]
    with progress.task("strengths", total=len(plan)) as task:
        for name, how, alpha in plan:
            everywhere = (neutral_how or at_all_positions)(how)
            begin = time.perf_counter()
            with steered(model, how, alpha):
                profile = bias_profile(
                    model, tokenizer, prompts, classify, n, temperature, max_new_tokens=max_new_tokens, eos=eos,
                    seed=seed, categories=[target],
                )  # fmt: skip
            seconds = time.perf_counter() - begin
            texts = [answer.split() for answers in profile.answers for answer in answers]
            with steered(model, everywhere, alpha):
                surprise = perplexity(model, neutral)
            varied = float(np.mean([distinct_n([text]) for text in texts]))
            if varied < COLLAPSED:
                warnings.warn(
                    f"{name} at strength {alpha:g}: answers repeat themselves (distinct pairs {varied:.2f})", Collapsed,
                    stacklevel=2,
                )  # fmt: skip
            rows.append(
                {
                    "method": name,
                    "alpha": alpha,
                    "target": profile.share(target),
                    "perplexity": surprise,
                    "kl": steering_kl(model, everywhere, alpha, neutral, base),
                    "distinct_2": varied,
                    "tokens_per_second": sum(map(len, texts)) / seconds,
                }
            )
            task.advance()
    return SteeringReport(tuple(rows), target)


def at_all_positions(how: How) -> How:
    """The same method at every token, where it knows positions."""
    import inspect

    own = getattr(how, "steered", None)
    if own is None or inspect.signature(own).parameters.get("positions") is None:
        return how
    if inspect.signature(own).parameters["positions"].default is None:
        return how  # a Feature: None is every position already
    return lambda model, alpha: own(model, alpha, positions="all")


@dataclass(frozen=True)
class Overhead:
    """Speed of generation by number of steered layers.

    Attributes:
        n_layers: steered.
        tokens_per_second: median over repetitions; 0 layers is the model let alone.
        ratio: time of a token over that of the unsteered model, paired within repetitions, median.
    """

    n_layers: tuple[int, ...]
    tokens_per_second: tuple[float, ...]
    ratio: tuple[float, ...]

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame(
            {"n_layers": self.n_layers, "tokens_per_second": self.tokens_per_second, "ratio": self.ratio}
        )

    def plot(self, ax: Any = None) -> Any:
        """Time of a token, unsteered = 1, over the number of steered layers."""
        ax = new_axes(ax)
        ax.plot(self.n_layers, self.ratio, marker="o", color=CYCLE[0])
        ax.axhline(1, color=CYCLE[-1], linestyle=":")
        ax.set(xlabel="steered layers", ylabel="time per token, unsteered = 1", xticks=self.n_layers)
        return ax


def steering_overhead(
    model: nn.Module,
    steering: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    alpha: float | None = None,
    counts: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    repeats: int = 3,
) -> Overhead:
    """Measure what steering costs per generated token.

    Args:
        model: with or without ``generate``.
        steering: a fitted model with ``layers`` and ``steered(model, alpha, layers=...)``.
        input_ids, attention_mask: prompts.
        alpha: strength; None for the fitted one.
        counts: numbers of steered layers, the first ones of ``steering.layers``; None for 0 to all.
        max_new_tokens: generated for each prompt.
        repeats: rounds; each round measures every count once, so that a slow spell hits all alike.
    """
    layers = list(steering.layers)
    counts = sorted({0, *(range(len(layers) + 1) if counts is None else counts)})
    if counts[-1] > len(layers):
        raise InvalidInput(f"counts: {counts[-1]} layers asked for, fitted to {len(layers)}")
    seconds = np.zeros((repeats, len(counts)))
    for round_ in range(-1, repeats):  # the first round warms up
        for i, count in enumerate(counts):
            with steering.steered(model, alpha, layers=layers[:count]):
                _wait(input_ids)
                begin = time.perf_counter()
                generate_tokens(model, input_ids, attention_mask, max_new_tokens=max_new_tokens)
                _wait(input_ids)
            if round_ >= 0:
                seconds[round_, i] = time.perf_counter() - begin
    tokens = len(input_ids) * max_new_tokens
    ratio = np.median(seconds / seconds[:, :1], axis=0)
    return Overhead(tuple(counts), tuple((tokens / np.median(seconds, axis=0)).tolist()), tuple(ratio.tolist()))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
