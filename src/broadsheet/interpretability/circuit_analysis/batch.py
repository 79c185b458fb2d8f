"""Prompts with a few possible answers, and where in them the labels stand."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class ChoiceBatch:
    """Multiple-choice prompts as tokens.

    Args:
        input_ids: ``[batch, time]``.
        answers: ``[batch, n]``, the label token of every item, in the order of the items.
        answer: ``[batch]``, which item is right.
        label_pos: ``[batch, n]``, the column of every item's label.
        content_span: ``[batch, n, 2]``, first column of every item's text and the one after its last; None: unknown.
        attention_mask: ``[batch, time]`` or None for no padding; padding on either side.
        final_pos: ``[batch]``, the column from which the answer is read; None for the last token.

    Raises:
        InvalidInput: shapes that do not fit, a right answer out of range, or a label that is not at its place.
    """

    input_ids: Int[Tensor, "batch time"]
    answers: Int[Tensor, "batch n"]
    answer: Int[Tensor, " batch"]
    label_pos: Int[Tensor, "batch n"]
    content_span: Tensor | None = None
    attention_mask: Tensor | None = None
    final_pos: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.answers.shape[1]
        if n < 2 or int(self.answer.min()) < 0 or int(self.answer.max()) >= n:
            raise InvalidInput(f"answer={self.answer.tolist()[:8]}: expected items 0 to {n - 1}, of two at least")
        time = self.input_ids.shape[1]
        if int(self.label_pos.min()) < 0 or int(self.label_pos.max()) >= time:
            raise InvalidInput(f"label_pos goes beyond the prompts' {time} tokens")
        wrong = (self.input_ids.gather(1, self.label_pos) != self.answers).nonzero()
        if len(wrong):
            row, item = wrong[0].tolist()
            found = int(self.input_ids[row, self.label_pos[row, item]])
            raise InvalidInput(
                f"prompt {row}: token {found} stands at label_pos of item {item}, its label is "
                f"{int(self.answers[row, item])}: tokenize label and prompt alike (a leading space makes another token)"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self), device=self.input_ids.device)


def check_pair(clean: ChoiceBatch, corrupt: ChoiceBatch) -> None:
    """Whether a corrupt prompt stands for every clean one.

    Raises:
        InvalidInput: other lengths, or a corrupt prompt with the same right label.
    """
    if clean.input_ids.shape != corrupt.input_ids.shape:
        raise InvalidInput(
            f"clean prompts are {tuple(clean.input_ids.shape)}, corrupt ones {tuple(corrupt.input_ids.shape)}: "
            "patching needs as many of the same length"
        )
    right = [batch.answers[batch.rows, batch.answer] for batch in (clean, corrupt)]
    same = (right[0] == right[1]).nonzero()
    if len(same):
        raise InvalidInput(
            f"prompt {int(same[0])}: clean and corrupt have the same right label; choose another corrupt one"
        )
