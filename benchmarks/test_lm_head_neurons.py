"""Every neuron through the output head: in blocks, one by one, as one matrix, and with transformer-lens' unembed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from broadsheet.experiments.lm_head_neurons import naive_map
from broadsheet.interpretability.lm_head_neurons import decode_neurons
from broadsheet.nn.seeding import seeded

# Features, neurons of a layer, layers, words. Above about twice as many neurons the loop alone would take minutes.
SIZES = [(128, 512, 2, 4096), (256, 1024, 2, 16384), (512, 1024, 2, 32768)]
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)
MAP = pytest.mark.benchmark(group="lm-head-neurons: map of all neurons")
DISK = pytest.mark.benchmark(group="lm-head-neurons: map from files")
Size = tuple[int, int, int, int]


def setting(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, neurons, layers, words = size
    config = LlamaConfig(
        hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=4, vocab_size=words
    )
    with seeded(0):
        return LlamaForCausalLM(config).eval()


def matrices(model: Any) -> tuple[list[Tensor], Tensor]:
    return [layer.mlp.up_proj.weight.detach() for layer in model.model.layers], model.lm_head.weight.detach()


def measure(benchmark: Any, work: Callable[[], Any]) -> None:
    benchmark.pedantic(work, rounds=2, warmup_rounds=1)


@MAP
@EVERY
def test_ours(benchmark: Any, size: Size) -> None:
    model = setting(size)
    measure(benchmark, lambda: decode_neurons(model))


@MAP
@EVERY
def test_naive_loop(benchmark: Any, size: Size) -> None:
    layers, head = matrices(setting(size))
    measure(benchmark, lambda: [naive_map(rows, head) for rows in layers])


@MAP
@EVERY
def test_one_matrix(benchmark: Any, size: Size) -> None:
    """All logits of a layer at once: quick where they fit in memory."""
    layers, head = matrices(setting(size))

    def work() -> None:
        for rows in layers:
            logits = (rows @ head.T).log_softmax(-1)
            logits.topk(10), logits.topk(10, largest=False), -(logits.exp() * logits).sum(-1)

    measure(benchmark, work)


@MAP
@EVERY
def test_transformer_lens(benchmark: Any, size: Size) -> None:
    """Its unembed on the neurons of each layer, and the same words and sums from the logits."""
    lens = pytest.importorskip("transformer_lens", reason="the peer transformer_lens is not installed")
    try:
        _ = lens.HookedTransformer
    except (AttributeError, ImportError):
        pytest.skip("this transformer_lens has no HookedTransformer: install transformer-lens<3")
    width, neurons, layers, words = size
    config = lens.HookedTransformerConfig(
        n_layers=layers, n_heads=4, d_model=width, d_head=width // 4, d_mlp=neurons, d_vocab=words, n_ctx=8,
        act_fn="silu", gated_mlp=True,
    )  # fmt: skip
    ours = setting(size)
    model = lens.HookedTransformer(config).eval()
    rows, head = matrices(ours)
    with torch.no_grad():
        model.unembed.W_U.data = head.T.contiguous()
        for block, weight in zip(model.blocks, rows, strict=True):
            block.mlp.W_in.data = weight.T.contiguous()
        model.unembed.b_U.data.zero_()
        found = decode_neurons(ours, topk=3)
        logits = model.unembed(model.blocks[1].mlp.W_in.T[None])[0]
        assert torch.equal(logits.topk(3).indices, found.tokens[1])  # the same logit lens

    @torch.no_grad()
    def work() -> None:
        for block in model.blocks:
            logits = model.unembed(block.mlp.W_in.T[None])[0].log_softmax(-1)
            logits.topk(10), logits.topk(10, largest=False), -(logits.exp() * logits).sum(-1)

    measure(benchmark, work)


@DISK
@pytest.mark.parametrize("how", ["layer by layer", "whole model"])
def test_from_files(benchmark: Any, how: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    setting((512, 2048, 8, 1024)).save_pretrained(tmp_path, max_shard_size="20MB")
    if how == "whole model":
        measure(benchmark, lambda: decode_neurons(AutoModelForCausalLM.from_pretrained(tmp_path)))
    else:
        measure(benchmark, lambda: decode_neurons(tmp_path))
