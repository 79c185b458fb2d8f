"""Continuations: by generate and by the plain loop, the same tokens; padding on either side; sampling by a seed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.generation import encode, generate_tokens, texts_of, until
from broadsheet.nn.tiny_models import tiny_inputs, tiny_model


class Without(nn.Module):
    """A model whose ``generate`` is out of sight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "neox-parallel"])
def test_both_ways_and_both_paddings_give_the_same_tokens(family: str, side: str) -> None:
    model = tiny_model(family)
    texts = [tiny_inputs(family, 1, seed)[0, : 7 - 2 * seed] for seed in range(2)]
    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(7 - len(text), 7)
        ids[row, where], mask[row, where] = text, 1
    wanted = []
    for text in texts:
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat([text, model(text[None]).logits[0, -1].argmax()[None]])
        wanted.append(text[-5:])
    for one in (model, Without(model)):
        assert torch.equal(generate_tokens(one, ids, mask, max_new_tokens=5, pad=1), torch.stack(wanted))


@pytest.mark.parametrize("wrap", [lambda m: m, Without])
def test_sampling_follows_the_model_and_its_seed(wrap: Any) -> None:
    model = wrap(tiny_model("llama"))
    ids = tiny_inputs("llama", 1).expand(2000, 7)
    before = torch.get_rng_state()
    how: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.7}
    found = generate_tokens(model, ids, **how, seed=3)[:, 0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, generate_tokens(model, ids, **how, seed=3)[:, 0])
    assert not torch.equal(found, generate_tokens(model, ids, **how, seed=4)[:, 0])
    with torch.no_grad():
        output = model(ids[:1])
    p = (getattr(output, "logits", output)[0, -1] / 0.7).softmax(-1)
    torch.testing.assert_close(found.bincount(minlength=29) / 2000, p.float(), atol=0.04, rtol=0)


def test_texts_end_at_their_end() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2", 3)
    first = generate_tokens(model, ids, max_new_tokens=6)
    eos = int(first[0, 2])
    for one in (model, Without(model)):
        found = generate_tokens(one, ids, max_new_tokens=6, eos=eos, pad=1)
        rows = until(found, eos)
        assert rows == until(first, eos) and (found[0, len(rows[0]) :] == 1).all()
    tokenizer = type("T", (), {"decode": lambda self, row, skip_special_tokens: "-".join(map(str, row))})()
    assert texts_of(first[:1], tokenizer, eos) == ["-".join(map(str, rows[0]))]


def test_prompts_are_padded_on_the_left() -> None:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split()]

    ids, mask = encode(["5 6 7", "8"], numbers)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    for prompts, what in (([], "none"), (["5", ""], "prompt 1 is empty")):
        with pytest.raises(InvalidInput, match=what):
            encode(prompts, numbers)
    with pytest.raises(InvalidInput, match="max_new_tokens=0"):
        generate_tokens(tiny_model("gpt2"), ids, max_new_tokens=0)
