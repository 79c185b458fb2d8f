"""Generation of steered models: G-ACT, one fixed vector, ACT, and the control vectors of other libraries."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from broadsheet.interpretability.g_act import ACT, GACT, PairActivations, mean_difference
from broadsheet.nn.seeding import seeded

# layers, width, prompts
SIZES = [(4, 64, 8), (8, 256, 8), (8, 512, 8), (8, 1024, 8)]
NEW = 24
TOKENS = pytest.mark.benchmark(group="g-act: 24 tokens for each of 8 prompts, every layer steered")
FIT = pytest.mark.benchmark(group="g-act: fit to 200 pairs")
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)


@cache
def setting(size: tuple[int, int, int]) -> tuple[Any, Tensor, PairActivations, PairActivations]:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, prompts = size
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    with seeded(0):
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(2, 1000, (prompts, 16))
        groups = torch.randn(3, layers, width)
        minus = torch.randn(200, layers, width) + groups[torch.arange(200) % 3]
        plus = minus + 0.5 * groups[torch.arange(200) % 3] + 0.1 * torch.randn_like(minus)
    return model, ids, PairActivations(plus, minus), PairActivations(plus, minus, site="head_out", n_heads=8)


def generate(benchmark: Any, size: tuple[int, int, int], context: Callable[[Any], Any]) -> None:
    model, ids, _, _ = setting(size)
    mask = torch.ones_like(ids)

    def work() -> None:
        with torch.no_grad(), context(model):
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=1,
                eos_token_id=None,
            )  # fmt: skip

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


@TOKENS
@EVERY
def test_unsteered(benchmark: Any, size: tuple[int, int, int]) -> None:
    generate(benchmark, size, lambda model: nullcontext())


@TOKENS
@EVERY
def test_ours(benchmark: Any, size: tuple[int, int, int]) -> None:
    pairs = setting(size)[2]
    steering = GACT(layers=list(pairs.layers), epochs=5).fit(pairs)
    generate(benchmark, size, lambda model: steering(model, 0.1))


@TOKENS
@EVERY
def test_ours_one_vector(benchmark: Any, size: tuple[int, int, int]) -> None:
    steering = mean_difference(setting(size)[2])
    generate(benchmark, size, lambda model: steering(model, 0.1))


@TOKENS
@EVERY
def test_ours_act(benchmark: Any, size: tuple[int, int, int]) -> None:
    act = ACT(n_heads=24, n_init=1).fit(setting(size)[3])
    generate(benchmark, size, lambda model: act.steered(model, 1.0))


@TOKENS
@EVERY
def test_act_with_scikit_learn(benchmark: Any, size: tuple[int, int, int]) -> None:
    """ACT as it is usually run: each head's probe is scikit-learn's, on the CPU, for every token."""
    from contextlib import ExitStack

    from sklearn.linear_model import LogisticRegression

    act = ACT(n_heads=24, n_init=1).fit(setting(size)[3])
    model = setting(size)[0]
    width = act.head_dim
    probes: dict[int, list[tuple[int, Any, Tensor]]] = {}
    for i, (row, head, _) in enumerate(act.chosen.tolist()):
        probe = LogisticRegression()
        probe.coef_, probe.intercept_ = act.coef[i : i + 1].numpy(), act.intercept[i : i + 1].numpy()
        probe.classes_ = torch.tensor([0, 1]).numpy()
        step = act.sigma[i] * act.coef[i] / act.coef[i].norm()
        probes.setdefault(row, []).append((head, probe, step))

    def context(_: Any) -> Any:
        stack = ExitStack()
        for row, mine in probes.items():

            def add(module: Any, args: Any, mine: Any = mine) -> Any:
                x = args[0].clone()
                for head, probe, step in mine:
                    part = slice(head * width, (head + 1) * width)
                    p = torch.from_numpy(probe.predict_proba(x[:, -1, part].float().numpy())[:, 1]).to(x)
                    x[:, -1, part] += (1 - p)[:, None] * step
                return (x,)

            stack.callback(model.model.layers[row].self_attn.o_proj.register_forward_pre_hook(add).remove)
        return stack

    generate(benchmark, size, context)


@TOKENS
@EVERY
def test_steering_vectors(benchmark: Any, size: tuple[int, int, int]) -> None:
    peer = pytest.importorskip("steering_vectors", reason="the peer steering_vectors is not installed")
    pairs = setting(size)[2]
    vectors = {layer: pairs.differences.mean(0)[i] for i, layer in enumerate(pairs.layers)}
    vector = peer.SteeringVector(layer_activations=vectors, layer_type="decoder_block")
    generate(benchmark, size, lambda model: vector.apply(model, multiplier=0.1))


@FIT
@EVERY
def test_ours_fit(benchmark: Any, size: tuple[int, int, int]) -> None:
    pairs = setting(size)[2]
    benchmark.pedantic(lambda: GACT().fit(pairs), rounds=2, warmup_rounds=1)


@FIT
@EVERY
def test_ours_act_fit(benchmark: Any, size: tuple[int, int, int]) -> None:
    heads = setting(size)[3]
    benchmark.pedantic(lambda: ACT().fit(heads), rounds=1, warmup_rounds=0)
