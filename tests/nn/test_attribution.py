"""Direct attribution: shares sum to the model's own logits on every family, and each share is what hooks find."""

import pytest
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.attribution import direct_parts
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.tiny_models import HEADS, LAYERS, VOCAB, tiny_inputs, tiny_model

DECODERS = [
    "gpt2", "gpt2-scaled-by-layer", "neox-parallel", "neox-sequential", "llama", "llama-biases", "mistral-window",
    "qwen2", "qwen2-window", "qwen3", "qwen3-window", "gemma", "gemma2", "gemma3", "opt", "opt-post-norm", "gpt-neo",
]  # fmt: skip
ALL = torch.arange(VOCAB)


def before_cap(model: nn.Module, ids: Tensor, **how: Tensor) -> Tensor:
    """The model's own logits, from its own forward pass, without its soft cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logits = model(ids, **how).logits
    return logits if cap is None else torch.atanh(logits / cap) * cap


@pytest.mark.parametrize("family", DECODERS)
def test_shares_sum_to_the_logits(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, batch=3)
    logits = before_cap(model, ids)
    parts = direct_parts(model, ids, sources=True)
    shares = parts.attribute(ALL, neurons=True)
    # GPT-Neo takes its scores in float32, which the map's own order of sums rounds in another way.
    assert (shares.total - logits[:, -1]).abs().max() < (1e-6 if family == "gpt-neo" else 1e-8)
    # What is left over: nothing, but for RMSNorms, which compute in float32 whatever the model's precision.
    assert shares.rounding.abs().max() < (2e-6 if block_map(model).blocks[0].norm1.kind == "rms" else 1e-10)
    assert shares.heads.shape == (3, LAYERS, HEADS, VOCAB)
    assert shares.heads.abs().amax((0, 3)).min() > 1e-3
    assert shares.sources is not None
    torch.testing.assert_close(shares.sources.sum(3), shares.heads, atol=1e-10, rtol=0)
    # An answer list of each prompt's own, at a position of each prompt's own.
    at = torch.tensor([2, 6, 4])
    answers = torch.tensor([[3, 9], [7, 2], [11, 4]])
    some = direct_parts(model, ids, positions=at).attribute(answers)
    expected = logits[torch.arange(3), at].gather(1, answers)
    torch.testing.assert_close(some.total, expected, atol=1e-6 if family == "gpt-neo" else 1e-8, rtol=0)


@pytest.mark.parametrize("family", DECODERS)
def test_units_make_up_the_mlp_and_vectors_the_stream(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    parts = direct_parts(model, ids)
    shares = parts.attribute(ALL, neurons=True)
    assert shares.neurons is not None
    left = shares.mlps - shares.neurons.sum(2)  # the MLP's bias, the same for all prompts up to the norm's scale
    if all(block.mlp is None or block.mlp.w_out.bias is None for block in block_map(model).blocks):
        assert left.abs().max() < 1e-10
    else:
        assert left.abs().max() > 1e-3
    # A node's vector through the final norm, its scale held, is its share.
    norm = parts.block_map.final_norm
    direction = parts._directions(ALL)[0][0]
    for i, name in enumerate(parts.names):
        x = parts.vector(name)
        if norm is not None:
            x = norm.centre(x) * parts.scale[:, None] * (1 if norm.gain is None else norm.gain)
        torch.testing.assert_close(x @ direction.T, shares.nodes()[:, i], atol=1e-10, rtol=0)
    torch.testing.assert_close(parts.logits(parts.final, ALL), shares.total, atol=1e-6, rtol=0)


def test_a_share_is_what_hooks_and_plain_algebra_give() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2")
    the_map = block_map(model)
    shares = direct_parts(model, ids).attribute(ALL)
    site = the_map.resolve("layers.0.attn.head.2")
    with capture(model, [site, "transformer.h.1"]) as seen, torch.no_grad():
        model(ids)
    final = seen["transformer.h.1"][:, -1]
    wrote = seen[site.label][:, -1] @ model.transformer.h[0].attn.c_proj.weight[12:18]
    gain = model.transformer.ln_f.weight
    deviation = (final.var(-1, correction=0) + model.transformer.ln_f.eps).sqrt()
    expected = ((wrote - wrote.mean(-1, keepdim=True)) * gain / deviation[:, None]) @ model.lm_head.weight.T
    torch.testing.assert_close(shares.heads[:, 0, 2], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
def test_padding_on_either_side_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    plain = direct_parts(model, ids, sources=True).attribute(ALL)
    pad, mask = torch.ones(2, 3, dtype=torch.long), torch.ones_like(ids)
    for left in (True, False):
        order = (pad, ids) if left else (ids, pad)
        holes = (0 * pad, mask) if left else (mask, 0 * pad)
        padded = direct_parts(model, torch.cat(order, 1), torch.cat(holes, 1)).attribute(ALL)
        torch.testing.assert_close(padded.nodes(), plain.nodes(), atol=1e-10, rtol=0)
        torch.testing.assert_close(padded.total, plain.total, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(family: str, dtype: torch.dtype) -> None:
    """What the stream's rounding lost stands apart, so that the rest is exact to float32."""
    model = tiny_model(family, dtype)
    ids = tiny_inputs(family)
    shares = direct_parts(model, ids).attribute(ALL)
    assert shares.heads.dtype == torch.float32
    own = before_cap(model, ids)[:, -1].float()
    size = float(own.abs().max())
    # The sum is the model's own logit, but for four roundings: of the stream, its norm, the gain and that logit ...
    assert float((shares.total - own).abs().max()) < 4 * torch.finfo(dtype).eps * size
    # ... and what the parts do not explain is a few roundings of the residual stream, not a part that was forgotten.
    assert float(shares.rounding.abs().max()) < 4 * torch.finfo(dtype).eps * size


def test_directions_stand_in_for_answers() -> None:
    model = tiny_model("llama")
    ids = tiny_inputs("llama")
    parts = direct_parts(model, ids)
    by_token = parts.attribute(torch.tensor([4, 8]))
    by_direction = parts.attribute(model.lm_head.weight[[4, 8]].detach())
    torch.testing.assert_close(by_direction.heads, by_token.heads, atol=1e-12, rtol=0)
    base = direct_parts(tiny_model("llama-base"), ids)
    with pytest.raises(UnsupportedModel, match="no head"):
        base.attribute(torch.tensor([1]))
    assert base.attribute(torch.eye(24, dtype=torch.float64)).total.shape == (2, 24)


def test_effects_are_centred_and_frozen_scales_are_another_run_s() -> None:
    model = tiny_model("llama")
    ids, other = tiny_inputs("llama"), tiny_inputs("llama", seed=5)
    answers, right = torch.tensor([3, 7, 9]), torch.tensor([2, 0])
    parts, corrupt = direct_parts(model, ids), direct_parts(model, other)
    shares = parts.attribute(answers, answer=right)
    nodes = shares.nodes()
    expected = nodes[torch.arange(2), :, right] - nodes.mean(-1)
    torch.testing.assert_close(shares.effects(), expected)
    assert shares.direct_effect.shape == (LAYERS, HEADS)
    assert list(shares.to_frame().columns) == ["node", "direct_effect"]
    held = corrupt.attribute(answers, frozen=parts)
    own = corrupt.attribute(answers)
    ratio = (parts.scale / corrupt.scale)[:, None, None]
    torch.testing.assert_close(held.nodes(), own.nodes() * ratio, atol=1e-12, rtol=0)


def test_bad_input() -> None:
    model = tiny_model("gpt2")
    ids = tiny_inputs("gpt2")
    parts = direct_parts(model, ids)
    with pytest.raises(InvalidInput, match="between 0 and 28"):
        parts.attribute(torch.tensor([29]))
    with pytest.raises(InvalidInput, match=r"expected \[answer\]"):
        parts.attribute(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(InvalidInput, match="no token"):
        direct_parts(model, ids, positions=7)
    with pytest.raises(InvalidInput, match="expected a head"):
        parts.vector("layers.0.attn")
    with pytest.raises(InvalidInput, match="right answers"):
        parts.attribute(torch.tensor([1])).effects()
    with pytest.raises(UnsupportedModel, match="not linear"):
        direct_parts(tiny_model("bert-mlm"), ids).attribute(torch.tensor([1]))
