"""What a model answers when nobody tells it how: shares of categories for every prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.generation import encode, generate_tokens, texts_of
from broadsheet.nn.plotting import CYCLE, new_axes
from broadsheet.nn.progress import SILENT, Progress


@dataclass(frozen=True)
class BiasProfile:
    """How often each category answers each prompt.

    Attributes:
        prompts: asked.
        categories: what the classifier said, the most frequent first.
        counts: ``[prompts, categories]``.
        answers: of every prompt, the texts themselves.
    """

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    counts: np.ndarray
    answers: tuple[tuple[str, ...], ...]

    @property
    def shares(self) -> np.ndarray:
        """``[prompts, categories]``, each row sums to 1."""
        return self.counts / self.counts.sum(1, keepdims=True)

    def share(self, category: str) -> float:
        """Of one category over all prompts; 0 where it never came."""
        if category not in self.categories:
            return 0.0
        return float(self.shares[:, self.categories.index(category)].mean())

    def majorities(self) -> dict[str, float]:
        """For each category the share of prompts that it answers most often (how the paper counts)."""
        first = self.counts.argmax(1)
        return {name: float((first == i).mean()) for i, name in enumerate(self.categories)}

    def to_frame(self) -> pd.DataFrame:
        """One row for each prompt: its counts and, as ``share of ...``, its shares."""
        table = pd.DataFrame(self.counts, columns=list(self.categories))
        table.insert(0, "prompt", self.prompts)
        for i, name in enumerate(self.categories):
            table[f"share of {name}"] = self.shares[:, i]
        return table

    def plot(self, groups: Sequence[str] | None = None, ax: Any = None) -> Any:
        """Stacked bars of the shares.

        Args:
            groups: one for each prompt; prompts of a group share a bar. None: one bar for all.
            ax: matplotlib axes or None.
        """
        ax = new_axes(ax)
        names = ["all prompts"] * len(self.prompts) if groups is None else [str(group) for group in groups]
        bars = list(dict.fromkeys(names))
        left = np.zeros(len(bars))
        for i, category in enumerate(self.categories):
            width = np.array([self.shares[[n == bar for n in names], i].mean() for bar in bars])
            ax.barh(bars, width, left=left, color=CYCLE[i % len(CYCLE)], label=category, height=0.66)
            left += width
        ax.set(xlabel="share of answers", xlim=(0, 1))
        ax.invert_yaxis()
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return ax


def bias_profile(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    classify: Callable[..., str | None],
    n: int = 25,
    temperature: float = 1.0,
    *,
    max_new_tokens: int = 256,
    eos: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    categories: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BiasProfile:
    """Sample answers to every prompt and count their categories.

    Args:
        model: a causal language model; call this inside a steering context for the steered one.
        tokenizer: of the model.
        prompts: texts, as the model should see them (chat template included).
        classify: ``(answer) -> category``; None counts as ``"other"``. A function of two arguments is also given the
            prompt's number.
        n: answers to each prompt.
        temperature: of sampling; 0 takes the likeliest token (then ``n=1`` is enough).
        max_new_tokens: of an answer.
        eos: token that ends an answer; None for the tokenizer's own.
        batch_size: answers at once.
        seed: of sampling.
        categories: names that come first in the table, whether or not they occur.
        progress: where answers are counted.
    """
    if n < 1 or batch_size < 1:
        raise InvalidInput(f"n={n}, batch_size={batch_size}: expected at least 1")
    eos = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
    pad = getattr(tokenizer, "pad_token_id", None)
    ids, mask = encode(prompts, tokenizer, next(model.parameters()).device)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    answers: list[str] = []
    with progress.task("answers", total=len(ids)) as task:
        for begin in range(0, len(ids), batch_size):
            rows = slice(begin, begin + batch_size)
            tokens = generate_tokens(
                model, ids[rows], mask[rows], max_new_tokens=max_new_tokens, temperature=temperature, eos=eos,
                pad=(eos or 0) if pad is None else pad, seed=seed * 100_003 + begin,
            )  # fmt: skip
            answers += texts_of(tokens, tokenizer, eos)
            task.advance(len(tokens))
    wants_number = _arguments(classify) > 1
    found = [(classify(text, i // n) if wants_number else classify(text)) or "other" for i, text in enumerate(answers)]
    names = list(dict.fromkeys(categories))
    names += [name for name, _ in sorted(_counted(found).items(), key=lambda x: -x[1]) if name not in names]
    counts = np.zeros((len(prompts), len(names)), dtype=np.int64)
    for i, name in enumerate(found):
        counts[i // n, names.index(name)] += 1
    grouped = tuple(tuple(answers[i * n : (i + 1) * n]) for i in range(len(prompts)))
    return BiasProfile(tuple(prompts), tuple(names), counts, grouped)


def _arguments(function: Callable[..., Any]) -> int:
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _counted(names: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
