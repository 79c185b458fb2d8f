"""One position run again from a cached prefix: the same as the whole model with the same change there."""

import pytest
import torch
from torch import Tensor

from broadsheet.errors import UnsupportedModel
from broadsheet.nn.blocks import block_map
from broadsheet.nn.prefix import cached_prefix
from broadsheet.nn.tiny_models import HEADS, LAYERS, tiny_inputs, tiny_model

DECODERS = [
    "gpt2", "gpt2-scaled-by-layer", "neox-parallel", "neox-sequential", "llama", "llama-biases", "mistral-window",
    "qwen2", "qwen2-window", "qwen3", "qwen3-window", "gemma", "gemma2", "gemma3", "opt", "opt-post-norm", "gpt-neo",
]  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
def test_a_rerun_is_the_whole_run(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, batch=3)
    at = torch.tensor([6, 3, 5])
    rows = torch.arange(3)
    prefix = cached_prefix(model, ids, positions=at)
    new = torch.randn(HEADS, 3, block_map(model).head_dim, dtype=torch.float64)
    tolerance = {"atol": 2e-6 if family == "gpt-neo" else 1e-8, "rtol": 0}
    for layer in range(LAYERS):

        def whole(name: str, i: int, x: Tensor, head: int, ends: list[Tensor], layer: int = layer) -> Tensor:
            if name == "resid_post" and i == LAYERS - 1:
                ends.append(x[rows, at])
            if name != "z" or i != layer:
                return x
            x = x.clone()
            x[rows, at, head] = new[head]
            return x

        def part(name: str, i: int, x: Tensor, layer: int = layer) -> Tensor:
            if name != "z" or i != layer:
                return x
            x = x.unflatten(0, (HEADS, 3)).clone()
            x[torch.arange(HEADS), :, 0, torch.arange(HEADS)] = new
            return x.flatten(0, 1)

        ends: list[Tensor] = []
        with torch.no_grad():
            for head in range(HEADS):
                block_map(model).forward(
                    ids, edit=lambda *of, head=head, whole=whole, ends=ends: whole(*of, head, ends)
                )
        found = prefix.run(layer, edit=part, n=HEADS)
        torch.testing.assert_close(found, torch.stack(ends), **tolerance)
        torch.testing.assert_close(prefix.run(layer)[0], prefix.stream[-1], **tolerance)
        assert (found - prefix.stream[-1]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_padding_on_either_side_is_the_same(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, batch=2)
    pad, ones = torch.ones(2, 2, dtype=torch.long), torch.ones_like(ids)
    plain = cached_prefix(model, ids)
    for both, masks in (([pad, ids], [0 * pad, ones]), ([ids, pad], [ones, 0 * pad])):
        other = cached_prefix(model, torch.cat(both, 1), torch.cat(masks, 1))
        torch.testing.assert_close(other.run(0), plain.run(0), atol=1e-9, rtol=0)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not causal"):
        cached_prefix(tiny_model("bert-mlm"), torch.zeros(1, 3, dtype=torch.long))
