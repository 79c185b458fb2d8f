"""Every head's contribution to every later one, and to the output: CD-T against patching and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from broadsheet.interpretability.cd_t import (
    all_nodes,
    contributions_to_output,
    contributions_to_targets,
    head_means,
)
from broadsheet.lab.memory import peak
from broadsheet.nn.patching import activation_patching, edge_attribution_patching, path_patching
from broadsheet.nn.seeding import seeded

# Layers, heads, length; heads of 8 features and 8 prompts, except in the last: half of GPT-2 small, one prompt.
SIZES = [(2, 4, 16), (4, 4, 16), (4, 8, 16), (4, 4, 48), (8, 4, 16), (6, 12, 32)]
WIDE = (6, 12, 32)
MATRIX = pytest.mark.benchmark(group="cd-t: head-to-head matrix")
SINGLE = pytest.mark.benchmark(group="cd-t: single heads")
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)


class Last:
    """A logit difference at the last position."""

    positions = (-1,)

    def __call__(self, logits: Tensor) -> Tensor:
        return (logits[:, -1, 1] - logits[:, -1, 2]).mean()


metric = Last()


def setting(layers: int, heads: int, length: int) -> tuple[Any, Tensor, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    wide = (layers, heads, length) == WIDE
    config = GPT2Config(
        vocab_size=64, n_embd=(64 if wide else 8) * heads, n_layer=layers, n_head=heads, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with seeded(0):
        model = GPT2LMHeadModel(config).eval()
        ids = torch.randint(64, (1 if wide else 8, length))
        reference = torch.randint(64, (8, length))
    return model, ids, head_means(model, reference)


def measure(benchmark: Any, work: Callable[[], Any], size: tuple[int, int, int]) -> None:
    benchmark.extra_info["peak_mib"] = peak(work)[1]
    benchmark.pedantic(work, rounds=1 if size == WIDE else 3, warmup_rounds=0 if size == WIDE else 1)


@MATRIX
@EVERY
def test_ours(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    nodes = all_nodes(model)
    later = [node for node in nodes if node.layer > 0]
    measure(benchmark, lambda: contributions_to_targets(model, ids, nodes, later, "z", means), size)


@MATRIX
@pytest.mark.parametrize("size", SIZES[:-1], ids=str)  # 2,232 runs of the wide model take too long
def test_path_patching(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    measure(benchmark, lambda: path_patching(model, ids, metric, means.z[:, None]), size)


@MATRIX
@EVERY
def test_path_patching_first_stage(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    measure(benchmark, lambda: path_patching(model, ids, metric, means.z[:, None], pairs=False), size)


@MATRIX
@EVERY
def test_edge_attribution(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    measure(benchmark, lambda: edge_attribution_patching(model, ids, metric, means.z[:, None]), size)


@SINGLE
@EVERY
def test_ours_single_heads(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    nodes = all_nodes(model)
    measure(benchmark, lambda: contributions_to_output(model, ids, nodes, metric, means), size)


@SINGLE
@EVERY
def test_activation_patching(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, ids, means = setting(*size)
    measure(benchmark, lambda: activation_patching(model, ids, metric, means.z[:, None]), size)


def hooked_transformer() -> Any:
    """TransformerLens, up to the release that still has its own models."""
    lens = pytest.importorskip("transformer_lens", reason="the peer transformer_lens is not installed")
    try:
        _ = lens.HookedTransformer
    except (AttributeError, ImportError):
        pytest.skip("this transformer_lens has no HookedTransformer: install transformer-lens<3")
    return lens


@MATRIX
@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_transformer_lens(benchmark: Any, size: tuple[int, int, int]) -> None:
    """Path patching as users of hooks write it: for each source and target head one hooked run."""
    lens = hooked_transformer()
    layers, heads, length = size
    config = lens.HookedTransformerConfig(
        n_layers=layers, n_heads=heads, d_model=8 * heads, d_head=8, d_vocab=64, n_ctx=64, act_fn="gelu_new"
    )
    with seeded(0):
        model = lens.HookedTransformer(config).eval()
        ids = torch.randint(64, (8, length))
    _, clean = model.run_with_cache(ids)
    means = {layer: clean["z", layer].mean(0, keepdim=True) for layer in range(layers)}

    def work() -> None:
        with torch.no_grad():
            for layer in range(layers):
                for head in range(heads):
                    seen: dict[int, Tensor] = {}

                    def hold(z: Tensor, hook: Any, layer: int = layer, head: int = head, seen: Any = seen) -> Tensor:
                        at = hook.layer()
                        seen[at] = z.clone()
                        new = clean["z", at].clone()
                        if at == layer:
                            new[:, :, head] = means[at][:, :, head]
                        return new

                    names = [f"blocks.{at}.attn.hook_z" for at in range(layer, layers)]
                    model.run_with_hooks(ids, fwd_hooks=[(name, hold) for name in names])
                    for target in range(layer + 1, layers):
                        for h in range(heads):

                            def put(z: Tensor, hook: Any, target: int = target, h: int = h, seen: Any = seen) -> Tensor:
                                z[:, :, h] = seen[target][:, :, h]
                                return z

                            metric(model.run_with_hooks(ids, fwd_hooks=[(f"blocks.{target}.attn.hook_z", put)]))

    measure(benchmark, work, size)
