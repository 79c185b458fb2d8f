"""Made-up text in which four tasks alternate, each token labelled with what it takes to predict the next one.

A small transformer that learns it has several jobs for a few heads, and all of them are known: a subject for methods
that say what parts of a model are for.

- *induction*: a run of distinct words, then the same run again;
- *double*: a sign, then every word twice;
- *bracket*: a bracket, words of the kind that it announces, the bracket's other half;
- *copy*: a sign, words, another sign, the same words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.data.language import BOS, COMMON, PAD, TOPICS, UNKNOWN, word_tokenizer
from broadsheet.errors import InvalidInput

TASKS = ("induction", "double", "bracket", "copy")
BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"))
SIGNS = ("twice:", "copy:", "=")


@dataclass(frozen=True)
class LabelledText:
    """Texts and what is known of every token.

    Attributes:
        input_ids: ``[n, time]``, BOS first.
        task: ``[n, time]``, index into :data:`TASKS` where the token and what came before settle which kind of token
            comes next; -1 elsewhere.
        bracket: ``[n, time]``, the kind of bracket that the token stands in; -1 outside.
        source: ``[n, time]``, where the next token stood before (tasks induction and copy); -1 elsewhere.
    """

    input_ids: Int[Tensor, "n time"]
    task: Int[Tensor, "n time"]
    bracket: Int[Tensor, "n time"]
    source: Int[Tensor, "n time"]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class TaskMixture:
    """A generator of such texts.

    Args:
        n_words: words, a multiple of the three kinds of bracket, at least 9 and at most 96.
        length: tokens of a text, BOS included.
    """

    n_words: int = 18
    length: int = 48

    def __post_init__(self) -> None:
        if self.n_words % len(BRACKETS) or not 9 <= self.n_words <= 96:
            raise InvalidInput(f"n_words={self.n_words}: expected a multiple of {len(BRACKETS)} from 9 to 96")
        if self.length < 8:
            raise InvalidInput(f"length={self.length}: expected at least 8")

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, by id: BOS, padding, unknown, brackets and signs, words."""
        topical = [word for words in zip(*TOPICS.values(), strict=True) for word in words if word not in COMMON]
        signs = [half for pair in BRACKETS for half in pair]
        return (BOS, PAD, UNKNOWN, *signs, *SIGNS, *topical[: self.n_words])

    @property
    def first_word(self) -> int:
        """The id of the first of the words."""
        return 3 + 2 * len(BRACKETS) + len(SIGNS)

    @property
    def vocab_size(self) -> int:
        return self.first_word + self.n_words

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer of this vocabulary."""
        return word_tokenizer(self.words)

    def sample(self, n: int, generator: torch.Generator | None = None) -> LabelledText:
        """Draw texts; tasks come equally often.

        Args:
            n: texts.
            generator: of everything.
        """
        size = self.length
        table = torch.full((4, n, size + 24), -1)
        table[0] = 0

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        for row in range(n):
            at = 1
            while at < size:
                kind = number(0, len(TASKS))
                at = self._segment(table[:, row], at, kind, number, generator)
        return LabelledText(*table[:, :, :size])

    def _segment(
        self, row: Tensor, at: int, kind: int, draw: Callable[[int, int], int], generator: torch.Generator | None
    ) -> int:
        """Write one task's tokens and labels from ``at`` on; where the next one begins."""
        ids, task, bracket, source = row
        first, sign = self.first_word, 3 + 2 * len(BRACKETS)
        if kind == 0:
            m = draw(4, 9)
            run = torch.randperm(self.n_words, generator=generator)[:m] + first
            ids[at : at + m] = ids[at + m : at + 2 * m] = run
            known = torch.arange(at + m, at + 2 * m - 1)
            task[known], source[known] = 0, known - m + 1
            return at + 2 * m
        if kind == 1:
            m = draw(2, 5)
            words = torch.randint(self.n_words, (m,), generator=generator) + first
            ids[at] = sign
            ids[at + 1 : at + 1 + 2 * m] = words.repeat_interleave(2)
            task[at + 1 : at + 1 + 2 * m : 2] = 1
            return at + 1 + 2 * m
        if kind == 2:
            b, m = draw(0, len(BRACKETS)), draw(3, 9)
            words = torch.randint(self.n_words // len(BRACKETS), (m,), generator=generator) * len(BRACKETS) + b + first
            ids[at], ids[at + 1 : at + 1 + m], ids[at + 1 + m] = 3 + 2 * b, words, 4 + 2 * b
            task[at : at + 1 + m], bracket[at : at + 1 + m] = 2, b
            return at + 2 + m
        m = draw(2, 5)
        words = torch.randint(self.n_words, (m,), generator=generator) + first
        ids[at], ids[at + 1 : at + 1 + m], ids[at + 1 + m] = sign + 1, words, sign + 2
        ids[at + 2 + m : at + 2 + 2 * m] = words
        known = torch.arange(at + 1 + m, at + 1 + 2 * m)
        task[known], source[known] = 3, known - m
        return at + 2 + 2 * m
