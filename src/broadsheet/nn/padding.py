"""Padding on either side: rows moved so that it stands on the right, and results moved back.

A decoder counts positions from the first column. Where padding stands there, Hugging Face's ``generate`` counts from
the first real token instead, but a plain forward pass does not, and a prompt's activations then depend on what it is
batched with. Moving the rows is right for every architecture, learned and rotary positions alike.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class RightPadded:
    """Prompts that begin in the first column.

    Attributes:
        input_ids: ``[batch, time]``, or images, which have no padding.
        attention_mask: ``[batch, time]``, ones first; None where nothing is padded.
        offset: ``[batch]``, columns by which each row was moved to the left.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    offset: Int[Tensor, " batch"]

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The column of each prompt's last token."""
        if self.attention_mask is None:
            return torch.full_like(self.offset, self.input_ids.shape[1] - 1)
        return self.attention_mask.sum(1).long() - 1

    def restore(self, x: Tensor) -> Tensor:
        """Results ``[batch, time, ...]`` of the moved rows, each back in the column of its token."""
        return _roll(x, -self.offset)


def right_padded(input_ids: Tensor, attention_mask: Tensor | None = None) -> RightPadded:
    """Move rows with padding on the left so that it stands on the right.

    Args:
        input_ids: ``[batch, time]``; images are handed on as they are.
        attention_mask: ``[batch, time]``, 1 for tokens and 0 for padding; None for no padding.

    Raises:
        InvalidInput: a mask of another shape, with holes, or a row without any token.
    """
    offset = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    if attention_mask is None or bool(attention_mask.all()):
        return RightPadded(input_ids, None, offset)
    if attention_mask.shape != input_ids.shape:
        raise InvalidInput(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts {tuple(input_ids.shape)}: "
            "one value for each token is expected"
        )
    mask = attention_mask.bool()
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise InvalidInput(f"prompt {int(empty[0])} holds nothing but padding: leave it out")
    offset = mask.int().argmax(1)  # the first real token
    moved = _roll(mask, offset)
    holes = (moved[:, 1:] & ~moved[:, :-1]).any(1).nonzero()
    if len(holes):
        raise InvalidInput(f"attention_mask of prompt {int(holes[0])} has a hole: padding may stand at either end only")
    return RightPadded(_roll(input_ids, offset), moved.to(attention_mask.dtype), offset)


def _roll(x: Tensor, by: Tensor) -> Tensor:
    """Each row of ``[batch, time, ...]`` moved to the left by its own number of columns, around the end."""
    time = x.shape[1]
    columns = (torch.arange(time, device=x.device) + by[:, None]) % time
    return x[torch.arange(len(x), device=x.device)[:, None], columns]
