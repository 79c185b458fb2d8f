"""Prompts with a few possible answers: as tokens with the places of their labels, and made-up lists to learn from.

:class:`ChoiceBatch` is what methods take. :class:`LabelledLists` makes such prompts as bare tokens, for models trained
on the spot: a list of labelled words, then one of the words; the answer is its label. For questions in words see
:mod:`broadsheet.data.questions`.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator as seeded_generator

ORDERS = ("ordered", "rotated", "shuffled", "random", "mixed")


@dataclass(frozen=True)
class ChoiceBatch:
    """Multiple-choice prompts as tokens.

    Args:
        input_ids: ``[batch, time]``.
        answers: ``[batch, n]``, the token that answers with each item, in the order of the items.
        answer: ``[batch]``, which item is right.
        label_pos: ``[batch, n]``, the column of every item's label.
        content_span: ``[batch, n, 2]``, first column of every item's text and the one after its last; None: unknown.
        attention_mask: ``[batch, time]`` or None for no padding; padding on either side.
        final_pos: ``[batch]``, the column from which the answer is read; None for the last token.
        labels: ``[batch, n]``, the token of every item's label in the list, where it is not the answer's (``"B"`` at
            the beginning of a line, ``" B"`` after ``"Answer:"``); None: the same.

    Raises:
        InvalidInput: no prompt, shapes that do not fit, a right answer out of range, two items of one label, or a label
            that is not at its place.
    """

    input_ids: Int[Tensor, "batch time"]
    answers: Int[Tensor, "rows n"]  # other names than batch: the checks below say more than a shape error
    answer: Tensor
    label_pos: Tensor
    content_span: Tensor | None = None
    attention_mask: Tensor | None = None
    final_pos: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        (size, time), n = self.input_ids.shape, self.answers.shape[1]
        if size == 0:
            raise InvalidInput("the batch holds no prompt: at least one is expected")
        expected = {
            "answers": (size, n), "answer": (size,), "label_pos": (size, n), "content_span": (size, n, 2),
            "attention_mask": (size, time), "final_pos": (size,), "labels": (size, n),
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise InvalidInput(
                    f"{name} has shape {tuple(value.shape)}: for {size} prompts of {time} tokens with {n} items "
                    f"{shape} is expected"
                )
        if n < 2 or int(self.answer.min()) < 0 or int(self.answer.max()) >= n:
            raise InvalidInput(f"answer={self.answer.tolist()[:8]}: expected items 0 to {n - 1}, of two at least")
        twice = (self.answers.sort(1).values.diff(dim=1) == 0).any(1).nonzero()
        if len(twice):
            row = int(twice[0])
            raise InvalidInput(
                f"prompt {row}: answers {self.answers[row].tolist()}: every item needs a label of its own"
            )
        if int(self.label_pos.min()) < 0 or int(self.label_pos.max()) >= time:
            raise InvalidInput(f"label_pos goes beyond the prompts' {time} tokens")
        wrong = (self.input_ids.gather(1, self.label_pos) != self.label_tokens).nonzero()
        if len(wrong):
            row, item = wrong[0].tolist()
            found = int(self.input_ids[row, self.label_pos[row, item]])
            raise InvalidInput(
                f"prompt {row}: token {found} stands at label_pos of item {item}, its label is "
                f"{int(self.label_tokens[row, item])}: tokenize label and prompt alike (a leading space makes another "
                "token; hand in labels= where list and answer differ on purpose)"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_items(self) -> int:
        return self.answers.shape[1]

    @property
    def rows(self) -> Int[Tensor, " batch"]:
        return torch.arange(len(self), device=self.input_ids.device)

    @property
    def label_tokens(self) -> Int[Tensor, "batch n"]:
        """What stands at ``label_pos``."""
        return self.answers if self.labels is None else self.labels

    @property
    def right(self) -> Int[Tensor, " batch"]:
        """The token that answers each prompt."""
        return self.answers[self.rows, self.answer]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each prompt, padding left out."""
        if self.attention_mask is None:
            return torch.full_like(self.rows, self.input_ids.shape[1])
        return self.attention_mask.long().sum(1)

    def select(self, rows: Tensor | slice) -> "ChoiceBatch":
        """Some of the prompts.

        Args:
            rows: indices, a mask ``[batch]``, or a slice.
        """
        return self._each(lambda x: x[rows if isinstance(rows, slice) else rows.to(x.device)])

    def to(self, device: torch.device | str) -> "ChoiceBatch":
        """The same on another device."""
        return self._each(lambda x: x.to(device))

    def _each(self, change) -> "ChoiceBatch":
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: None if x is None else change(x) for name, x in held.items()})


def check_pair(clean: ChoiceBatch, corrupt: ChoiceBatch, same_length: bool = True) -> None:
    """Whether a corrupt prompt stands for every clean one.

    Args:
        clean, corrupt: prompts, paired row by row.
        same_length: False where only the final tokens are set beside each other.

    Raises:
        InvalidInput: other numbers or lengths of prompts, or a corrupt prompt with the same right label.
    """
    if len(clean) != len(corrupt):
        raise InvalidInput(f"{len(clean)} clean prompts and {len(corrupt)} corrupt ones: hand in one for each")
    other = (clean.lengths != corrupt.lengths).nonzero()
    if same_length and len(other):
        row = int(other[0])
        raise InvalidInput(
            f"prompt {row}: {int(clean.lengths[row])} tokens clean, {int(corrupt.lengths[row])} corrupt: patching "
            "needs prompts of the same length (move the options of the same question, or align the final tokens only)"
        )
    same = (clean.right == corrupt.right).nonzero()
    if len(same):
        raise InvalidInput(
            f"prompt {int(same[0])}: clean and corrupt have the same right label; choose another corrupt one"
        )


@dataclass(frozen=True)
class LabelledLists:
    """Lists of labelled words, then one of the words: which label does it have?

    A prompt is ``BOS label word label word ... SEP word``; the next token is the label before that word in the list.
    Token ids: 0 is BOS, 1 SEP, then the labels, then the words.

    Args:
        n_labels: labels there are, such as the letters; at least ``n_items``.
        n_words: words there are.
        n_items: of each list.

    Example:
        >>> lists = LabelledLists()
        >>> batch = lists.sample(2, seed=0)
        >>> batch.input_ids.shape, lists.text(batch.input_ids[0, :4])
        (torch.Size([2, 11]), 'BOS A w33 B')
    """

    n_labels: int = 26
    n_words: int = 40
    n_items: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.n_items <= min(self.n_labels, self.n_words):
            raise InvalidInput(
                f"n_items={self.n_items}: expected at least 2, and no more than the {self.n_labels} labels and "
                f"{self.n_words} words"
            )

    @property
    def vocab_size(self) -> int:
        return 2 + self.n_labels + self.n_words

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return 3 + 2 * self.n_items

    def text(self, ids: Tensor) -> str:
        """Ids as labels (letters, as far as they go) and words (``w0``, ...)."""
        names = ["BOS", "SEP"]
        names += [chr(65 + i) if i < 26 else f"L{i}" for i in range(self.n_labels)]
        names += [f"w{i}" for i in range(self.n_words)]
        return " ".join(names[int(i)] for i in ids)

    def sample(
        self, n: int, order: str = "ordered", seed: int = 0, generator: torch.Generator | None = None
    ) -> ChoiceBatch:
        """Draw prompts.

        Args:
            n: prompts.
            order: of the labels: ``"ordered"`` (the first ones, in order), ``"rotated"`` (the same, begun with another
                one), ``"shuffled"`` (the same, in any order), ``"random"`` (any labels), or ``"mixed"`` (half of the
                prompts ordered, half random).
            seed: of everything.
            generator: in the place of a seed.
        """
        if order not in ORDERS or n < 1:
            raise InvalidInput(f"n={n}, order={order!r}: expected at least one prompt, of {', '.join(ORDERS)}")
        random = seeded_generator(seed) if generator is None else generator
        items = self.n_items
        ordered = torch.arange(items).expand(n, items)
        if order in ("random", "mixed"):
            labels = torch.rand(n, self.n_labels, generator=random).argsort(1)[:, :items]
            if order == "mixed":
                labels = torch.where((torch.rand(n, generator=random) < 0.5)[:, None], ordered, labels)
        elif order == "shuffled":
            labels = torch.rand(n, items, generator=random).argsort(1)
        elif order == "rotated":
            labels = (ordered + torch.randint(1, items, (n, 1), generator=random)) % items
        else:
            labels = ordered
        words = torch.rand(n, self.n_words, generator=random).argsort(1)[:, :items] + 2 + self.n_labels
        answer = torch.randint(items, (n,), generator=random)
        return self._batch(labels + 2, words, answer)

    def corrupted(self, batch: ChoiceBatch, seed: int = 0, generator: torch.Generator | None = None) -> ChoiceBatch:
        """The same lists with another of their words asked for: another answer, every token but the last as it was.

        Args:
            batch: of :meth:`sample`.
            seed, generator: as there.
        """
        random = seeded_generator(seed) if generator is None else generator
        step = torch.randint(1, self.n_items, (len(batch),), generator=random).to(batch.answer)
        answer = (batch.answer + step) % self.n_items
        words = batch.input_ids.gather(1, batch.label_pos + 1)
        return self._batch(batch.answers, words, answer)

    def training(self, n: int, generator: torch.Generator, order: str = "mixed") -> tuple[Tensor, Tensor]:
        """Prompts with their answers, for :func:`broadsheet.nn.small_lm.train_language_model`.

        Returns:
            ids ``[n, length + 1]`` and labels of the same shape: only the answer counts, all else is -100.
        """
        batch = self.sample(n, order, generator=generator)
        ids = torch.cat([batch.input_ids, batch.right[:, None]], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return ids, labels

    def _batch(self, labels: Tensor, words: Tensor, answer: Tensor) -> ChoiceBatch:
        n = len(labels)
        ends = [torch.full_like(labels[:, :1], token) for token in (0, 1)]
        pairs = torch.stack([labels, words], 2).flatten(1)
        ids = torch.cat([ends[0], pairs, ends[1], words.gather(1, answer[:, None])], 1)
        place = torch.arange(1, 2 * self.n_items, 2, device=labels.device).expand(n, -1)
        return ChoiceBatch(ids, labels, answer, place, torch.stack([place + 1, place + 2], -1))
