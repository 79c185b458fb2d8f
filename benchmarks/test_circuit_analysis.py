"""Direct attribution and patching of every head: ours on the user's model, TransformerLens on a copy of its weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from broadsheet.data.choices import ChoiceBatch, LabelledLists
from broadsheet.interpretability.circuit_analysis import compress_heads, logit_attribution, patch_effects
from broadsheet.lab.memory import peak
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.hooks import replace as hooked
from broadsheet.nn.seeding import seeded

# Layers, heads, items of a list; 16 prompts.
SIZES = [(2, 4, 4), (4, 8, 8), (8, 8, 16)]
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)
ATTRIBUTION = pytest.mark.benchmark(group="circuit-analysis: direct attribution")
PATCHING = pytest.mark.benchmark(group="circuit-analysis: patching every head")
COMPRESSION = pytest.mark.benchmark(group="circuit-analysis: compressing all heads")
pytestmark = pytest.mark.filterwarnings("ignore")  # random models are at chance


def setting(layers: int, heads: int, items: int) -> tuple[Any, ChoiceBatch, ChoiceBatch]:
    from transformers import GPT2Config, GPT2LMHeadModel

    lists = LabelledLists(n_items=items)
    config = GPT2Config(
        vocab_size=lists.vocab_size, n_embd=16 * heads, n_layer=layers, n_head=heads, n_positions=lists.length,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with seeded(0):
        model = GPT2LMHeadModel(config).eval()
    clean = lists.sample(16 * items // 4, seed=0)
    return model, clean, lists.corrupted(clean, seed=1)


def measure(benchmark: Any, work: Callable[[], Any]) -> None:
    benchmark.extra_info["peak_mib"] = peak(work)[1]
    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


def head_names(layers: int, heads: int) -> list[str]:
    return [f"layers.{layer}.attn.head.{head}" for layer in range(layers) for head in range(heads)]


@ATTRIBUTION
@EVERY
def test_ours(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, clean, _ = setting(*size)
    measure(benchmark, lambda: logit_attribution(model, clean))


@PATCHING
@EVERY
def test_ours_patching(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, clean, corrupt = setting(*size)
    names = head_names(*size[:2])
    measure(benchmark, lambda: patch_effects(model, clean, corrupt, names))


@PATCHING
@EVERY
def test_hooks(benchmark: Any, size: tuple[int, int, int]) -> None:
    """One run of the model for each head, as one writes it with hooks on the Hugging Face model itself."""
    model, clean, corrupt = setting(*size)
    sites = [block_map(model).resolve(name) for name in head_names(*size[:2])]

    def work() -> list[float]:
        effects = []
        with torch.no_grad():
            with capture(model, sites, positions=-1) as seen:
                model(corrupt.input_ids)
            whole = float(model(clean.input_ids).logits[:, -1].gather(1, clean.answers).mean())
            for site in sites:
                with hooked(model, {site: seen[site.label]}, positions=-1):
                    logits = model(clean.input_ids).logits[:, -1].gather(1, clean.answers)
                effects.append(whole - float(logits.mean()))
        return effects

    measure(benchmark, work)


@COMPRESSION
@EVERY
def test_ours_compression(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, clean, _ = setting(*size)
    several = clean.select(clean.answer < clean.n_items)
    if int(torch.bincount(several.answer, minlength=several.n_items).min()) < 2:
        several = LabelledLists(n_items=size[2]).sample(40 * size[2], seed=3)
    measure(benchmark, lambda: compress_heads(model, head_names(*size[:2]), several, rank=3).evaluate(several))


# ------------------------------------------------------------------------------------------------- TransformerLens


def lens_of(model: Any) -> Any:
    """TransformerLens with the same weights, nothing folded or centred."""
    lens = pytest.importorskip("transformer_lens", reason="the peer transformer_lens is not installed")
    try:
        _ = lens.HookedTransformer
    except (AttributeError, ImportError):
        pytest.skip("this transformer_lens has no HookedTransformer: install transformer-lens<3")
    own = model.config
    config = lens.HookedTransformerConfig(
        n_layers=own.n_layer, n_heads=own.n_head, d_model=own.n_embd, d_head=own.n_embd // own.n_head,
        d_vocab=own.vocab_size, n_ctx=own.n_positions, act_fn="gelu_new", d_mlp=4 * own.n_embd,
        normalization_type="LN", eps=own.layer_norm_epsilon,
    )  # fmt: skip
    made = lens.HookedTransformer(config).eval()
    heads, size = own.n_head, own.n_embd // own.n_head
    state = model.state_dict()
    new = {"embed.W_E": state["transformer.wte.weight"], "pos_embed.W_pos": state["transformer.wpe.weight"]}
    for i in range(own.n_layer):
        old, to = f"transformer.h.{i}.", f"blocks.{i}."
        fused, bias = state[old + "attn.c_attn.weight"], state[old + "attn.c_attn.bias"]
        for name, w, b in zip("QKV", fused.chunk(3, 1), bias.chunk(3), strict=True):
            new[f"{to}attn.W_{name}"] = w.unflatten(1, (heads, size)).transpose(0, 1)
            new[f"{to}attn.b_{name}"] = b.unflatten(0, (heads, size))
        new[to + "attn.W_O"] = state[old + "attn.c_proj.weight"].unflatten(0, (heads, size))
        new[to + "attn.b_O"] = state[old + "attn.c_proj.bias"]
        for j, part in (("in", "c_fc"), ("out", "c_proj")):
            new[f"{to}mlp.W_{j}"], new[f"{to}mlp.b_{j}"] = (state[f"{old}mlp.{part}.{x}"] for x in ("weight", "bias"))
        for j in (1, 2):
            new[f"{to}ln{j}.w"], new[f"{to}ln{j}.b"] = (state[f"{old}ln_{j}.{x}"] for x in ("weight", "bias"))
    new["ln_final.w"], new["ln_final.b"] = (state[f"transformer.ln_f.{x}"] for x in ("weight", "bias"))
    new["unembed.W_U"] = state["lm_head.weight"].T
    missing = made.load_state_dict(new, strict=False).missing_keys
    assert all(name.endswith(("mask", "IGNORE", "b_U")) for name in missing), missing
    made.unembed.b_U.data.zero_()
    return made


def lens_shares(made: Any, clean: ChoiceBatch) -> torch.Tensor:
    """``[layer * head, batch, item]``: every head's share of the answers' logits."""
    with torch.no_grad():
        _, cache = made.run_with_cache(clean.input_ids)
        stack = cache.stack_head_results(layer=-1, pos_slice=-1)  # [layer * head, batch, d_model]
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
        gained = scaled * made.ln_final.w if hasattr(made.ln_final, "w") else scaled
        return torch.einsum("nbd,dbm->nbm", gained, made.unembed.W_U[:, clean.answers])


@ATTRIBUTION
@EVERY
def test_transformer_lens(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, clean, _ = setting(*size)
    made = lens_of(model)
    ours = logit_attribution(model, clean).heads.flatten(1, 2).transpose(0, 1)
    torch.testing.assert_close(lens_shares(made, clean), ours, atol=1e-5, rtol=0)  # the same shares
    measure(benchmark, lambda: lens_shares(made, clean))


@PATCHING
@EVERY
def test_transformer_lens_patching(benchmark: Any, size: tuple[int, int, int]) -> None:
    model, clean, corrupt = setting(*size)
    made = lens_of(model)

    def work() -> list[float]:
        effects = []
        with torch.no_grad():
            _, other = made.run_with_cache(corrupt.input_ids, names_filter=lambda name: name.endswith("hook_z"))
            for layer in range(size[0]):
                for head in range(size[1]):

                    def put(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                        z[:, -1, head] = other[hook.name][:, -1, head]
                        return z

                    hooks = [(f"blocks.{layer}.attn.hook_z", put)]
                    logits = made.run_with_hooks(clean.input_ids, fwd_hooks=hooks)[:, -1]
                    chosen = logits.gather(1, clean.answers)
                    effects.append(float((chosen[clean.rows, clean.answer] - chosen.mean(-1)).mean()))
        return effects

    whole = made(clean.input_ids)[:, -1].gather(1, clean.answers)
    whole = float((whole[clean.rows, clean.answer] - whole.mean(-1)).mean())
    ours = patch_effects(model, clean, corrupt, head_names(*size[:2])).total
    torch.testing.assert_close(whole - torch.tensor(work()), ours, atol=1e-5, rtol=0)  # the same effects
    measure(benchmark, work)
