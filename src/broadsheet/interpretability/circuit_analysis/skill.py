"""Whether the model has the skill at all: there is no circuit of a task that it cannot do."""

import math
import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import UnsupportedModel
from broadsheet.nn.attribution import DirectParts, direct_parts
from broadsheet.nn.blocks import BlockMap, block_map


class ModelAtChance(UserWarning):
    """The model answers the questions no better than by guessing: whatever is found is no circuit of the skill."""


def decoder_map(model: nn.Module | BlockMap) -> BlockMap:
    """The block map of a causal model.

    Raises:
        UnsupportedModel: an encoder-decoder, or a model in which positions see later ones.
    """
    if not isinstance(model, BlockMap) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder: hand in a language model of one stack")
    the_map = model if isinstance(model, BlockMap) else block_map(model)
    if not the_map.causal:
        raise UnsupportedModel(f"{type(the_map.model).__name__} is not a causal decoder: hand in a language model")
    return the_map


def answered(model: nn.Module | BlockMap, batch: ChoiceBatch) -> Bool[Tensor, " batch"]:
    """Which prompts the model answers right, of the answers that there are to choose from.

    Args:
        model: any mapped decoder.
        batch: the prompts; ``batch.select(answered(model, batch))`` are those to take apart.
    """
    parts = parts_of(decoder_map(model), batch, warn=False)
    return parts.logits(parts.final, batch.answers).argmax(-1) == batch.answer


def parts_of(the_map: BlockMap, batch: ChoiceBatch, warn: bool = True) -> DirectParts:
    """The run taken apart where the answers are due; warns of a model at chance."""
    parts = direct_parts(the_map, batch.input_ids, batch.attention_mask, batch.final_pos)
    if warn:
        warn_at_chance(parts.logits(parts.final, batch.answers), batch)
    return parts


def warn_at_chance(logits: Float[Tensor, "batch n"], batch: ChoiceBatch) -> None:
    """Warn where no more prompts are answered right than guessing gives (two standard deviations above its mean)."""
    chance, n = 1 / batch.n_items, len(batch)
    right = float((logits.argmax(-1) == batch.answer).double().mean())
    if right <= min(chance + 2 * math.sqrt(chance * (1 - chance) / n), 1 - 1e-9):
        warnings.warn(
            f"the model answers {right:.0%} of {n} questions right, guessing gives {chance:.0%}: it does not have the "
            "skill, so what is found here is no circuit of it",
            ModelAtChance,
            stacklevel=4,
        )


def metric(logits: Float[Tensor, "*runs batch n"], batch: ChoiceBatch) -> tuple[Tensor, Tensor]:
    """Mean logit of the right answer less the mean over the answers, and mean loss over the answers (nats)."""
    centred = logits - logits.mean(-1, keepdim=True)
    where = batch.answer[:, None].expand(*logits.shape[:-1], 1)
    loss = -logits.log_softmax(-1).gather(-1, where)
    return centred.gather(-1, where)[..., 0].mean(-1), loss[..., 0].mean(-1)


def places(batch: ChoiceBatch, at: Tensor, offset: Tensor, positions: str, time: int) -> Tensor:
    """Columns (of the prompts moved to the left) that are patched, ``[batch, places]``."""
    if positions == "final":
        return at[:, None]
    if positions == "labels":
        return batch.label_pos - offset[:, None]
    return torch.arange(time, device=at.device).expand(len(at), -1)
