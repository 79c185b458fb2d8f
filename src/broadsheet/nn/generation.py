"""Text from any causal language model: Hugging Face's ``generate`` where there is one, a plain loop elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.seeding import generator, seeded


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos: int | None = None,
    pad: int = 0,
    seed: int = 0,
    use_cache: bool = True,
) -> Int[Tensor, "batch new"]:
    """Continuations of prompts, without the prompts themselves.

    Args:
        model: a Hugging Face causal language model, or any module from token ids (and ``attention_mask``, where
            prompts differ in length) to logits.
        input_ids, attention_mask: ``[batch, time]``; padding may stand on either side.
        max_new_tokens: at most so many.
        temperature: of sampling; 0 takes the likeliest token.
        eos: the token that ends a text; None for none.
        pad: what stands behind an ended text.
        seed: of sampling; the global generators are left as they were.
        use_cache: keep keys and values of past tokens, where the model can.

    Returns:
        ``[batch, at most max_new_tokens]``.

    Raises:
        InvalidInput: no new token, or a negative temperature.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise InvalidInput(f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least 1 and 0")
    own: Any = getattr(model, "generate", None)
    if own is None:
        return _loop(model, input_ids, attention_mask, max_new_tokens, temperature, eos, pad, seed)
    padded = right_padded(input_ids, attention_mask)
    ids, mask = padded.input_ids, padded.attention_mask
    if mask is not None:  # generate goes on from the last column: padding on the left
        shift = padded.last + 1
        columns = (torch.arange(ids.shape[1], device=ids.device) + shift[:, None]) % ids.shape[1]
        ids, mask = ids.gather(1, columns), mask.gather(1, columns)
    mask = torch.ones_like(ids) if mask is None else mask
    how: dict[str, Any] = {"do_sample": temperature > 0, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    how |= {"temperature": temperature} if temperature > 0 else {"do_sample": False}
    with evaluating(model), seeded(seed):
        whole = own(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad,
            use_cache=use_cache, **how,
        )  # fmt: skip
    return whole[:, ids.shape[1] :]


def _loop(
    model: nn.Module, ids: Tensor, mask: Tensor | None, n: int, temperature: float, eos: int | None, pad: int, seed: int
) -> Tensor:
    """One whole pass for each token; rows are as long as their texts, padding on the right."""
    padded = right_padded(ids, mask)
    length = padded.last + 1
    room = torch.full((len(ids), n), pad, device=ids.device)
    whole = torch.cat([padded.input_ids, room.to(ids.dtype)], 1)
    real = torch.arange(whole.shape[1], device=ids.device) < length[:, None]
    whole = whole.masked_fill(~real, pad)
    rows = torch.arange(len(ids), device=ids.device)
    random, done = generator(seed, ids.device), torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    # Rows of one length need no mask, so that modules that know none work too.
    even = padded.attention_mask is None
    new: list[Tensor] = []
    with evaluating(model):
        for step in range(n):
            end = int(length.max()) + step
            shown = whole[:, :end]
            real = torch.arange(end, device=ids.device) < (length + step)[:, None]
            output: Any = model(shown) if even else model(shown, attention_mask=real.long())
            logits = getattr(output, "logits", output)[rows, length + step - 1].float()
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]
            else:
                token = logits.argmax(-1)
            token = torch.where(done, pad, token)
            whole[rows, length + step] = token.to(whole.dtype)
            new.append(token)
            if eos is not None:
                done |= token == eos
                if bool(done.all()):
                    break
    return torch.stack(new, 1)


def texts_of(tokens: Int[Tensor, "batch new"], tokenizer: Any, eos: int | None = None) -> list[str]:
    """Continuations as text, each up to its end.

    Args:
        tokens: of :func:`generate_tokens`.
        tokenizer: turns ids into text.
        eos: the token that ends a text; it is kept, so that an ended text can be told from one that was cut off.
    """
    return [tokenizer.decode(row, skip_special_tokens=False) for row in until(tokens, eos)]


def until(tokens: Int[Tensor, "batch new"], eos: int | None = None) -> list[list[int]]:
    """Continuations as lists, each up to and with its first ``eos``."""
    return [row[: row.index(eos) + 1] if eos in row else row for row in tokens.tolist()]


def encode(texts: Sequence[str], tokenizer: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Prompts as ids and mask ``[batch, time]``, padded on the left.

    Args:
        texts: the prompts.
        tokenizer: of the model, or a function from text to a list of ids; its own padding is not used.
        device: of the model.

    Raises:
        InvalidInput: no prompt, or an empty one.
    """
    coded = [tokenizer(text) for text in texts]
    rows = [list(ids["input_ids"] if isinstance(ids, Mapping) else ids) for ids in coded]
    if not rows or not all(rows):
        which = "none" if not rows else f"prompt {next(i for i, row in enumerate(rows) if not row)} is empty"
        raise InvalidInput(f"prompts: {which}; texts of at least one token are expected")
    length = max(map(len, rows))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    return ids.to(device), mask.to(device)
