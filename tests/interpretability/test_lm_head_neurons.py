"""Neurons through the output head: exact against a slow reference, the same from memory and files, clamps as by hand."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from broadsheet.data.language import TopicCorpus, word_tokenizer
from broadsheet.errors import CheckpointError, DataMissing, InvalidInput, UnsupportedModel
from broadsheet.interpretability.lm_head_neurons import (
    NeuronMap,
    SeveralTokens,
    clamp,
    clamp_sweep,
    compare,
    concept_vector,
    decode_directions,
    decode_experts,
    decode_neurons,
    largest_values,
    nearest_neurons,
    neuron_activations,
    probability_of,
)
from broadsheet.interpretability.lm_head_neurons import decode as decoding
from broadsheet.lab.memory import freed_at_once, peak
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture, replace
from broadsheet.nn.seeding import seeded
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.nn.tiny_models import FAMILIES, LAYERS, tiny_inputs, tiny_model
from broadsheet.nn.vocabulary import SkippedDirections

NO_HEAD = {
    f for f in FAMILIES if f.endswith(("classifier", "base", "tokens")) or f.startswith(("bert", "roberta", "vit"))
}
DECODERS = [family for family in FAMILIES if family not in NO_HEAD]
GATED = [f for f in DECODERS if f.startswith(("llama", "mistral", "qwen", "gemma"))]
every = pytest.mark.parametrize("family", DECODERS)
COMMON: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMALL = {name: value for name, value in COMMON.items() if name not in ("intermediate_size", "num_key_value_heads")}
# Architectures beyond the block map's: fused, parallel, mixtures of experts, stacked and interleaved weights.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config", COMMON),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**COMMON, "head_dim": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", COMMON),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", SMALL),
    "falcon": ("FalconForCausalLM", "FalconConfig", SMALL),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", COMMON),
    "cohere": ("CohereForCausalLM", "CohereConfig", COMMON),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", COMMON),
    "granite": ("GraniteForCausalLM", "GraniteConfig", COMMON),
}
EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**COMMON, "num_local_experts": 3}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**COMMON, "num_experts": 3}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        **COMMON, "num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
    }),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**COMMON, "num_local_experts": 3, "head_dim": 8}),
}  # fmt: skip


def made(kind: tuple[str, str, dict[str, Any]]) -> Any:
    name, config, entries = kind
    with seeded(0):
        model = getattr(transformers, name)(getattr(transformers, config)(**entries)).double().eval()
        for path, weight in model.named_parameters():
            if "norm" in path or ".ln_" in path:
                weight.data += 0.3 * torch.randn_like(weight)
    return model


def dense(model: Any, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The whole softmax in NumPy, float64: probabilities in order and the tokens' order."""
    head = model.get_output_embeddings()
    project = getattr(getattr(getattr(model, "model", None), "decoder", None), "project_out", None)
    x = rows if project is None else rows @ project.weight.T
    logits = (x @ head.weight.T).detach().double().numpy()
    logits = logits + (0 if head.bias is None else head.bias.detach().double().numpy())
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return probs / probs.sum(1, keepdims=True), np.argsort(-logits, axis=1, kind="stable")


def up_rows(model: Any, layer: int) -> Tensor:
    mlp = block_map(model).blocks[layer].mlp
    assert mlp is not None
    return mlp.w_in.weight.T.detach()


# ----------------------------------------------------------------------------------------------------- decoding


@every
def test_the_stream_is_the_dense_softmax_for_every_size_of_block(family: str) -> None:
    model = tiny_model(family)
    for neurons, words in ((512, 8192), (7, 5), (1, 29)):
        found = decode_neurons(model, topk=6, block_neurons=neurons, block_vocabulary=words)
        for layer in range(LAYERS):
            probs, order = dense(model, up_rows(model, layer))
            assert np.array_equal(found.tokens[layer].numpy(), order[:, :6])
            assert np.array_equal(found.bottom_tokens[layer].numpy(), order[:, ::-1][:, :6])
            assert np.allclose(found.probs[layer].numpy(), np.take_along_axis(probs, order[:, :6], 1), atol=1e-12)
            entropy = -(probs * np.log(probs)).sum(1)
            assert np.allclose(found.entropy[layer].numpy(), entropy, atol=1e-10)


def test_single_precision_agrees_to_a_millionth() -> None:
    model = tiny_model("llama", torch.float32)
    found = decode_neurons(model, topk=4)
    probs, order = dense(model, up_rows(model, 0))
    assert np.array_equal(found.tokens[0].numpy(), order[:, :4])
    assert np.abs(found.probs[0].numpy() - np.take_along_axis(probs, order[:, :4], 1)).max() < 1e-6


@every
@pytest.mark.parametrize(
    "how",
    [{}, {"norm": "final"}, {"norm": "unit"}, {"weights": "down"}, {"fold_norm": True}, {"weights": "gate"}],
    ids=str,
)
def test_files_give_the_map_of_the_model(family: str, how: dict[str, Any], tmp_path: Path) -> None:
    if (how.get("weights") == "gate" and family not in GATED) or (
        family == "opt-post-norm" and len(how) and "norm" in str(how)
    ):
        pytest.skip("this family has no such part")
    model = tiny_model(family)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    here, there = decode_neurons(model, topk=5, **how), decode_neurons(tmp_path, topk=5, **how)
    assert compare(here, there).same_top == 1.0
    for name in ("tokens", "bottom_tokens"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    for name in ("logits", "logsumexp", "entropy", "agreement", "write_logit"):
        assert torch.allclose(getattr(here, name), getattr(there, name), atol=1e-12), name


def norm_module(model: Any) -> Any:
    base = model.base_model
    base = getattr(base, "decoder", base)
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(base, name) for name in names if getattr(base, name, None) is not None)


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "opt-post-norm"] + list(OTHERS))
def test_the_final_norm_is_the_models_own(family: str) -> None:
    model: Any = made(OTHERS[family]) if family in OTHERS else tiny_model(family)
    found = decode_neurons(model, norm="final", topk=4, exclude_padding=False)  # a tied row of padding is zero
    plain = decoding.Layout(decoding.open_weights(model))
    rows = plain.layers[1][None].up.read(plain.weights)
    probs, order = dense(model, norm_module(model)(rows).detach())
    assert np.array_equal(found.tokens[1].numpy(), order[:, :4])
    assert np.allclose(found.probs[1].numpy(), np.take_along_axis(probs, order[:, :4], 1), atol=1e-9)


@pytest.mark.parametrize("family", [f for f in DECODERS if f != "opt-post-norm"])
def test_the_folded_norm_is_what_multiplies_the_residual_stream(family: str) -> None:
    """Up to the norm's scale and bias, the up-projection is the folded direction times what the norm reads."""
    model = tiny_model(family)
    block = block_map(model).blocks[1]
    assert block.mlp is not None and block.norm2 is not None
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = decoding.Layout(decoding.open_weights(model))
    fold = decoding._Directions("none", None, layout.mlp_norm(1), torch.device("cpu"))
    folded = fold(layout.layers[1][None].up.read(layout.weights))
    scale = block.norm2.scale(x) if block.norm2.gain is None else block.norm2.scale(x) / block.norm2.gain
    bias = 0 if block.norm2.bias is None else block.norm2.bias @ block.mlp.w_in.weight
    offset = 0 if block.mlp.w_in.bias is None else block.mlp.w_in.bias
    expected = block.mlp.w_in(block.norm2(x)).detach()
    assert torch.allclose((x @ folded.T) * scale[:, :1] + bias + offset, expected, atol=1e-5)  # RMSNorm in float32


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_read_from_memory_and_files(kind: str, tmp_path: Path) -> None:
    model = made(OTHERS[kind])
    model.save_pretrained(tmp_path)
    layer = model.base_model.layers[0] if hasattr(model.base_model, "layers") else model.base_model.h[0]
    linears = {name: m for name, m in layer.mlp.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2}
    fused = linears.get("gate_up_proj")
    name = next(n for n in ("gate_up_proj", "up_proj", "fc1", "fc_in", "dense_h_to_4h", "c_fc") if n in linears)
    rows = linears[name].weight.detach()
    rows = rows[len(rows) // 2 :] if fused is not None else rows  # the gate comes first
    _, order = dense(model, rows)
    for source in (model, tmp_path):
        assert np.array_equal(decode_neurons(source, topk=3, exclude_padding=False).tokens[0].numpy(), order[:, :3])


def test_the_halves_of_a_fused_matrix_are_told_apart_by_what_they_do() -> None:
    """Phi-3: what we call up and gate gives the layer's own output, with the gate through the activation."""
    model = made(OTHERS["phi3"])
    layout = decoding.Layout(decoding.open_weights(model))
    mlp = layout.layers[0][None]
    assert mlp.gate is not None and mlp.down is not None
    up, gate, down = (matrix.read(layout.weights) for matrix in (mlp.up, mlp.gate, mlp.down))
    x = torch.randn(3, 24, dtype=torch.float64)
    ours = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down
    assert torch.allclose(ours, model.model.layers[0].mlp(x), atol=1e-10)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_get_a_map_each(kind: str, tmp_path: Path) -> None:
    model = made(EXPERTS[kind])
    model.save_pretrained(tmp_path)
    here, there = decode_experts(model, topk=4), decode_experts(tmp_path, topk=4)
    assert list(here) == list(there) == [0, 1, 2, *(["shared"] if kind == "qwen2_moe" else [])]
    experts = model.model.layers[1].mlp.experts
    for expert, found in here.items():
        assert torch.equal(found.tokens, there[expert].tokens) and found.expert == expert
        if expert == "shared":
            rows = model.model.layers[1].mlp.shared_expert.up_proj.weight
        elif kind == "gpt_oss":
            rows = experts.gate_up_proj[expert].T[1::2]
        else:
            rows = experts.gate_up_proj[expert].chunk(2)[1]
        assert np.array_equal(found.tokens[1].numpy(), dense(model, rows.detach())[1][:, :4])
    with pytest.raises(InvalidInput, match=r"layer 0 has 0 to 2.*decode_experts"):
        decode_neurons(model)
    with pytest.raises(UnsupportedModel, match="mixture of experts"), clamp(model, {(0, 1): 1.0}):
        pass
    with pytest.raises(InvalidInput, match="no experts"):
        decode_experts(tiny_model("llama"))


def test_a_planted_neuron_decodes_to_its_word_with_the_analytic_probability() -> None:
    model: Any = tiny_model("llama")
    q, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    model.lm_head.weight.data = torch.cat([q, torch.zeros(5, 24, dtype=torch.float64)])  # five rows pad
    model.model.layers[1].mlp.up_proj.weight.data[7] = 3.0 * q[11]
    found = decode_neurons(model, topk=2)
    assert int(found.tokens[1, 7, 0]) == 11
    expected = math.exp(3.0) / (math.exp(3.0) + 23)
    assert float(found.probs[1, 7, 0]) == pytest.approx(expected, abs=1e-12)
    assert float(decode_neurons(model, exclude_padding=False).probs[1, 7, 0]) == pytest.approx(
        math.exp(3.0) / (math.exp(3.0) + 28), abs=1e-12
    )
    unit = decode_neurons(model, norm="unit")
    size = math.exp(math.sqrt(24))
    assert float(unit.probs[1, 7, 0]) == pytest.approx(size / (size + 23), abs=1e-12)
    without = decode_neurons(model, exclude=[11])
    assert not (without.tokens == 11).any() and not (found.tokens >= 24).any()


@settings(max_examples=12, deadline=None)
@given(
    temperature=st.floats(0.05, 20), scale=st.floats(1e-3, 1e3), norm=st.sampled_from(["none", "unit"]),
    family=st.sampled_from(["llama", "gpt2", "gemma", "neox-parallel"]),
)  # fmt: skip
def test_labels_do_not_depend_on_temperature_or_length(
    temperature: float, scale: float, norm: Any, family: str
) -> None:
    model: Any = tiny_model(family)
    if model.get_output_embeddings().bias is None:
        before = decode_neurons(model, norm=norm).labels
        layout = decoding.Layout(decoding.open_weights(model))
        name = layout.layers[1][None].up.name
        dict(model.named_parameters())[name].data.mul_(scale)
        assert torch.equal(before[1], decode_neurons(model, norm=norm, temperature=temperature).labels[1])


@pytest.mark.parametrize("family", GATED)
def test_turning_up_and_down_round_leaves_model_and_oriented_labels(family: str) -> None:
    model, twin = tiny_model(family), tiny_model(family)
    flip = torch.arange(40) % 3 == 0
    for layer in range(LAYERS):
        for name, dim in (("up_proj", 0), ("down_proj", 1)):
            part: Any = twin.get_submodule(f"model.layers.{layer}.mlp.{name}")
            part.weight.data = torch.where(
                flip[:, None] if dim == 0 else flip[None], -part.weight.data, part.weight.data
            )
            if dim == 0 and part.bias is not None:
                part.bias.data = torch.where(flip, -part.bias.data, part.bias.data)
    ids = tiny_inputs(family)
    assert torch.allclose(model(ids).logits, twin(ids).logits, atol=1e-10)
    raw = compare(decode_neurons(model), decode_neurons(twin))
    assert not raw.same[:, flip].all() and raw.same[:, ~flip].all()
    for weights in ("up", "down", "gate"):
        a, b = (decode_neurons(m, weights=weights, orient="gate") for m in (model, twin))
        assert compare(a, b).same_top == 1.0
        assert weights == "gate" or torch.allclose(a.agreement, b.agreement)
    assert torch.equal(decode_neurons(model).bottom_tokens[:, flip], decode_neurons(twin).tokens[:, flip])


def test_clamp_sign_says_which_way_the_first_word_rises() -> None:
    model: Any = tiny_model("llama")
    found = decode_neurons(model)
    head = model.lm_head.weight.detach()
    for layer in range(LAYERS):
        down = model.model.layers[layer].mlp.down_proj.weight.detach()
        direct = (head[found.labels[layer]] * down.T).sum(1)
        assert torch.allclose(direct, found.write_logit[layer])
        assert torch.equal(direct.sign(), found.clamp_sign[layer].double())
        cosine = torch.cosine_similarity(model.model.layers[layer].mlp.up_proj.weight, down.T)
        assert torch.allclose(cosine, found.agreement[layer])


def test_neurons_without_finite_weights_are_reported_and_skipped(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.warns(SkippedDirections, match="1 of 40"):
        found = decode_neurons(model, tokenizer=None)
    assert (found.tokens[0, 3] == -1).all() and found.probs[0, 3].isnan().all()
    assert found.by_layer()["neurons"].tolist() == [39, 40]
    assert len(found.specialised()) == 79 and len(found.to_frame()) == 80
    assert compare(found, found).same_top == 1.0 and int(compare(found, found).counted.sum()) == 79
    assert "no finite weights" in found.words_of(0, 3)[0]
    found.to_html()
    found.save(tmp_path / "map.npz")
    assert torch.equal(NeuronMap.load(tmp_path / "map.npz").tokens, found.tokens)


def test_interrupted_work_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = decode_neurons(model)
    calls: list[int] = []
    decode_layer = decoding._decode_layer

    def stops(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_layer(*args, **how)

    monkeypatch.setattr(decoding, "_decode_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        decode_neurons(model, checkpoint=tmp_path / "kept")
    found = decode_neurons(model, checkpoint=tmp_path / "kept")
    assert len(calls) == 3 and torch.equal(found.tokens, whole.tokens) and torch.equal(found.entropy, whole.entropy)
    for other, how in ((model, {"norm": "unit"}), (tiny_model("llama", seed=1), {})):
        with pytest.raises(CheckpointError, match="another call"):
            decode_neurons(other, checkpoint=tmp_path / "kept", **how)


def test_half_precision_sums_in_single() -> None:
    model = tiny_model("llama", torch.bfloat16)
    found, exact = decode_neurons(model), decode_neurons(tiny_model("llama"))
    assert found.logits.dtype == torch.float32
    assert compare(found, exact).same_top > 0.9
    assert decode_neurons(model, dtype=torch.bfloat16).logsumexp.dtype == torch.float32


def test_any_direction_or_feature_can_be_decoded() -> None:
    model = tiny_model("llama")
    found = decode_neurons(model, weights="down", topk=4)
    features = [found.feature(model, 1, n) for n in (3, 17)]
    assert torch.equal(decode_directions(model, features, topk=4).tokens, found.tokens[1, [3, 17]])
    with seeded(0):
        sae = SparseAutoencoder(24, 30, site="layers.1.resid_post").double()
    words = decode_directions(model, sae.feature(5), topk=3, norm="unit")
    assert words.tokens.shape == (1, 3)
    rows = up_rows(model, 0)
    assert torch.equal(decode_directions(model, rows, topk=5).tokens, decode_neurons(model, topk=5).tokens[0])


def test_the_cost_of_memory_is_one_layer_and_the_head(tmp_path: Path) -> None:
    """A Llama of 130 MiB in several files: at no time more than a layer's MLP, the head and some working space."""
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=600
    )
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in transformers.LlamaForCausalLM(config).named_parameters()}
    random = torch.Generator().manual_seed(0)
    index, total = {}, 0
    for layer in [*range(config.num_hidden_layers), None]:  # a file for each layer, as in a published checkpoint
        names = [n for n in shapes if (f"layers.{layer}." in n if layer is not None else ".layers." not in n)]
        tensors = {name: torch.randn(shapes[name], generator=random) for name in names}
        save_file(tensors, tmp_path / f"model-{layer}.safetensors")
        index |= dict.fromkeys(names, f"model-{layer}.safetensors")
        total += sum(tensor.numel() * 4 for tensor in tensors.values())
    del tensors
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    layer_mib = 3 * 512 * 2048 * 4 / 2**20
    head_mib = 600 * 512 * 4 / 2**20
    assert total / 2**20 > 120
    decode_neurons(tmp_path, layers=[0], topk=3)  # what a first call loads does not count
    with freed_at_once():
        _, one = peak(lambda: decode_neurons(tmp_path, layers=[4], topk=3))
        found, all_layers = peak(lambda: decode_neurons(tmp_path, topk=3))
    assert found.tokens.shape == (8, 2048, 3)
    assert all_layers < 2 * layer_mib + head_mib + 20 < total / 2**20 / 2
    assert all_layers < one + 1.25 * layer_mib  # eight layers, not eight times the memory


# ----------------------------------------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A linear layer with a LoRA, with the names that ``peft`` gives its parts."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a.double()}), nn.ModuleDict({"default": b.double()})
        self.scaling = {"default": 2.0}
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_added_in_memory_and_from_files(tmp_path: Path) -> None:
    model, merged = (tiny_model("llama") for _ in range(2))
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    saved = {}
    with seeded(3):
        for layer in range(LAYERS):
            mlp: Any = model.get_submodule(f"model.layers.{layer}.mlp")
            mlp.up_proj = Adapted(mlp.up_proj)
            a, b = (part["default"].weight.detach() for part in (mlp.up_proj.lora_A, mlp.up_proj.lora_B))
            merged.get_submodule(f"model.layers.{layer}.mlp.up_proj").weight.data += 2.0 * b @ a  # type: ignore[operator, union-attr]
            start = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
            saved |= {f"{start}A.weight": a.contiguous(), f"{start}B.weight": b.contiguous()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(saved, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    expected = decode_neurons(merged)
    assert compare(expected, decode_neurons(tiny_model("llama"))).same_top < 1
    for found in (decode_neurons(model), decode_neurons(tmp_path / "base", adapter=adapter)):
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.allclose(found.logits, expected.logits)
    ids = tiny_inputs("llama")
    with clamp(model, {(1, 5): 9.0}, "up"):  # the adapted layer's output, not its base's
        adapted = model(ids).logits
    with clamp(merged, {(1, 5): 9.0}, "up"):
        assert torch.allclose(adapted, merged(ids).logits, atol=1e-10)
    with pytest.raises(InvalidInput, match=r"is an adapter.*base model"):
        decode_neurons(adapter)
    with pytest.raises(InvalidInput, match="goes with a folder"):
        decode_neurons(model, adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(UnsupportedModel, match=r"use_dora=True.*merge"):
        decode_neurons(tmp_path / "base", adapter=adapter)
    save_file({k.replace("layers.0", "layers.7"): v for k, v in saved.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidInput, match=r"layers\.7.*another model"):
        decode_neurons(tmp_path / "base", adapter=adapter)


def test_peft_itself_gives_the_merged_map(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with seeded(1):
        model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    here, there = decode_neurons(model), decode_neurons(tmp_path / "base", adapter=tmp_path / "adapter")
    merged = decode_neurons(model.merge_and_unload())
    assert compare(here, merged).same_top == compare(there, merged).same_top == 1.0


# ----------------------------------------------------------------------------------------------------- clamping


def hand_edited(model: Any, layer: int, n: int, value: float, site: str, ids: Tensor) -> Tensor:
    """The clamp by other means: the block map's own forward pass, edited."""
    the_map = block_map(model)
    mlp = the_map.blocks[layer].mlp
    assert mlp is not None

    def edit(name: str, at: int, x: Tensor) -> Tensor:
        if at != layer:
            return x
        if name == "act" and site == "post":
            x = x.clone()
            x[..., n] = value
        elif name == "resid_post" and site == "add":
            x = x + value * mlp.w_out.weight[n]
        elif name == "act" and site in ("up", "gate"):
            inner = seen["x"]
            up, gate = mlp.w_in(inner), None if mlp.w_gate is None else mlp.w_gate(inner)
            part = up if site == "up" else gate
            assert part is not None
            part[..., n] = value
            x = mlp.activation(up) if gate is None else mlp.activation(gate) * up
        elif name == "mlp_in":
            seen["x"] = x
        return x

    seen: dict[str, Tensor] = {}
    return the_map.forward(ids, edit=edit)


@every
@pytest.mark.parametrize("site", ["post", "up", "gate", "add"])
def test_a_clamp_is_the_edit_by_hand(family: str, site: Any) -> None:
    model = tiny_model(family)
    if site == "gate" and family not in GATED:
        with pytest.raises(InvalidInput, match="no gate"), clamp(model, {(1, 7): 3.0}, site):
            pass
        return
    if site == "add" and family == "opt-post-norm":
        pytest.skip("the stream is normalized after each block: the block map adds before that norm")
    ids = tiny_inputs(family)
    before = model(ids).logits
    with torch.no_grad(), clamp(model, {(1, 7): 3.0}, site):
        clamped = model(ids).logits
    assert torch.allclose(clamped, hand_edited(model, 1, 7, 3.0, site, ids), atol=1e-9)
    assert float((clamped - before).abs().max()) > 1e-3
    assert torch.equal(model(ids).logits, before)  # nothing is left behind


@pytest.mark.parametrize("site", ["post", "up", "gate", "add"])
def test_fused_matrices_are_clamped_at_the_right_column(site: Any) -> None:
    model = made(OTHERS["phi3"])
    ids = tiny_inputs("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad(), clamp(model, {(1, 7): 3.0, (1, 2): -1.0}, site):
        clamped = model(ids).logits

    def forward(x: Tensor) -> Tensor:
        gate, up = mlp.gate_up_proj(x).chunk(2, -1)
        for n, value in ((7, 3.0), (2, -1.0)):
            if site in ("gate", "up"):
                (gate if site == "gate" else up)[..., n] = value
        post = up * mlp.activation_fn(gate)
        for n, value in ((7, 3.0), (2, -1.0)):
            if site == "post":
                post[..., n] = value
        out = mlp.down_proj(post)
        if site == "add":
            out = out + 3.0 * mlp.down_proj.weight[:, 7] - mlp.down_proj.weight[:, 2]
        return out

    with torch.no_grad(), capture(model, "model.layers.1.mlp", at="input") as seen:
        model(ids)
    with torch.no_grad(), replace(model, {"model.layers.1.mlp": forward(seen["model.layers.1.mlp"])}):
        assert torch.allclose(model(ids).logits, clamped, atol=1e-10)


@every
def test_clamping_to_a_neurons_own_values_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family)
    site = block_map(model).resolve("layers.0.mlp.act")
    with torch.no_grad(), capture(model, site) as seen:
        before = model(ids).logits
    own = seen["layers.0.mlp.act"][..., 4]
    with torch.no_grad(), clamp(model, {(0, 4): own}):
        assert torch.allclose(model(ids).logits, before, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "neox-parallel"])
@pytest.mark.parametrize(
    "positions", ["all", slice(2, None), slice(-1, None), slice(0, 3), slice(4, 6), slice(0, None, 2)]
)
def test_generation_with_a_cache_is_generation_without(family: str, positions: Any) -> None:
    model: Any = tiny_model(family)
    ids = tiny_inputs(family, batch=1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with clamp(model, {(0, 3): 4.0, (1, 7): -6.0}, positions=positions):
        cached = model.generate(ids, use_cache=True, **how)
        plain = model.generate(ids, use_cache=False, **how)
    if positions != slice(-1, None):  # without a cache its end moves with the text
        assert torch.equal(cached, plain)
    # by hand: the clamp at the same columns of the growing text
    start, stop, step = positions.indices(99) if isinstance(positions, slice) else (0, 99, 1)
    if isinstance(positions, slice) and positions.start == -1:
        start = ids.shape[1] - 1
    the_map, text = block_map(model), ids
    for _ in range(5):
        columns = torch.tensor([start <= c < stop and (c - start) % step == 0 for c in range(text.shape[1])])

        def edit(name: str, layer: int, x: Tensor, columns: Tensor = columns) -> Tensor:
            if name == "act":
                x = x.clone()
                x[:, columns, 3 if layer == 0 else 7] = 4.0 if layer == 0 else -6.0
            return x

        with torch.no_grad():
            text = torch.cat([text, the_map.forward(text, edit=edit)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, text)


@every
def test_probabilities_do_not_depend_on_where_padding_stands(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, batch=2)
    short = ids[:1, :4]
    alone = probability_of(model, [5, 9], short)
    with torch.no_grad():
        expected = model(short).logits[:, -1].softmax(-1)[:, [5, 9]].sum(-1)
    assert torch.allclose(alone, expected)
    pad = torch.ones(1, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with clamp(model, {(1, 7): 3.0}):
        clamped = probability_of(model, [5, 9], short)
        right = probability_of(model, [5, 9], torch.cat([short, pad], 1), attention_mask=mask)
        left = probability_of(model, [5, 9], torch.cat([pad, short], 1), attention_mask=mask.flip(1))
    assert torch.allclose(right, clamped) and torch.allclose(left, clamped)
    assert not torch.allclose(clamped, alone)
    scale = largest_values(model, [(1, 7), (0, 2)], torch.cat([pad, short], 1), attention_mask=mask.flip(1))
    assert torch.allclose(scale, largest_values(model, [(1, 7), (0, 2)], short))


def test_nothing_is_left_behind_after_an_error() -> None:
    model = tiny_model("llama")
    model.train()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mine"), clamp(model, {(0, 1): 5.0}, positions=slice(0, 2)):
        raise RuntimeError("mine")
    probability_of(model, [3], torch.tensor([[2, 3]]))
    decode_neurons(model)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_bad_clamps_are_refused() -> None:
    model = tiny_model("llama")
    for neurons, site, text in (
        ({(2, 0): 1.0}, "post", r"layer=2: the model has 2 layers"), ({(0, 40): 1.0}, "post", "has 40 neurons"),
        ({(0, 0): math.inf}, "post", "inf: expected a finite"), ({(0, 0): 1.0}, "mid", "site='mid': expected 'post'"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=text), clamp(model, neurons, site):  # type: ignore[arg-type]
            pass
    with pytest.raises(InvalidInput, match="'all' or a slice"), clamp(model, {(0, 0): 1.0}, positions=[1]):
        pass
    with pytest.raises(UnsupportedModel, match="compiled"), clamp(torch.compile(model), {(0, 0): 1.0}):  # type: ignore[arg-type]
        pass
    with pytest.raises(InvalidInput, match="values for 3 positions"), clamp(model, {(0, 0): torch.ones(3)}):
        model(torch.tensor([[2, 3, 4, 5]]))


def test_a_forward_pass_around_the_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: x @ mlp.up_proj.weight.T @ mlp.down_proj.weight.T)  # a fused kernel
    with pytest.raises(UnsupportedModel, match=r"down_proj.*never called"), clamp(model, {(1, 0): 1.0}):
        model(torch.tensor([[2, 3]]))


def test_a_sweep_knows_its_units_and_its_controls() -> None:
    model, ids = tiny_model("llama"), tiny_inputs("llama")
    sweep = clamp_sweep(model, (1, 7), [-2.0, 0.0, 2.0], [5], ids, controls=[(1, 3), (0, 2)])
    scale = float(largest_values(model, [(1, 7)], ids)[0])
    assert sweep.scale == pytest.approx(scale) and sweep.controls.shape == (2, 3)
    with clamp(model, {(1, 7): 2.0 * scale}):
        expected = float(probability_of(model, [5], ids).log().mean())
    assert float(sweep.log_prob[2]) == pytest.approx(expected)
    assert sweep.unclamped == pytest.approx(float(probability_of(model, [5], ids).log().mean()))
    assert list(sweep.to_frame()) == ["value", "effect", "control_mean", "control_min", "control_max"]
    absolute = clamp_sweep(model, (1, 7), [2.0 * scale], [5], ids, relative=False)
    assert float(absolute.log_prob[0]) == pytest.approx(expected)
    assert sweep.plot().get_legend() is not None


# ----------------------------------------------------------------------------------------------------- maps

WORDS = ("<bos>", "<pad>", "<unk>", "dog", " dog", "Dog", "dogs", "cat", "city", "cities", "Hot", "hotdog",
         *(f"w{i}" for i in range(17)))  # fmt: skip


@pytest.fixture(scope="module")
def found() -> NeuronMap:
    from dataclasses import replace as changed

    return changed(decode_neurons(tiny_model("llama"), topk=5), words=WORDS)


def test_find_ranks_the_neurons_of_a_word(found: NeuronMap) -> None:
    ids = {3, 4, 5, 6}
    table = found.find("dog")
    expected = sum(bool(ids & set(found.tokens[layer, n].tolist())) for layer in range(2) for n in range(40))
    assert len(table) == expected > 0
    assert table["prob"].is_monotonic_decreasing and set(table["token_id"]) <= ids
    line = table.iloc[0]
    assert int(found.tokens[line["layer"], line["neuron"], line["rank"] - 1]) == line["token_id"]
    assert line["name"] == f"layers.{line['layer']}.mlp.neuron.{line['neuron']}"
    assert set(found.find("dog", variants=False)["token_id"]) <= {3, 5}
    assert set(found.find("dog", variants=False, case=True)["token_id"]) <= {3}
    assert set(found.find("city")["token_id"]) <= {8, 9}
    assert set(found.find(7)["token_id"]) <= {7}


def test_a_word_of_several_tokens_is_split_and_said(found: NeuronMap) -> None:
    with pytest.warns(SeveralTokens, match=r"'dogcat' is no single token but 'dog' \+ 'cat'.*first"):
        assert set(found.find("dogcat")["token_id"]) <= {3}
    with pytest.raises(InvalidInput, match="no token of the vocabulary"):
        found.find("zzz")
    with pytest.raises(InvalidInput, match="expected a word"):
        found.find(" ")
    with pytest.raises(InvalidInput, match="holds no words"):
        decode_neurons(tiny_model("llama")).find("dog")
    with pytest.raises(InvalidInput, match="29 tokens"):
        found.find(29)


def test_specialised_neurons_and_layers(found: NeuronMap) -> None:
    sharp = found.specialised(min_prob=float(found.probs[..., 0].median()))
    assert 0 < len(sharp) <= 41 and sharp["prob"].is_monotonic_decreasing
    assert (found.specialised(max_entropy=2.0)["entropy"] <= 2.0).all()
    layers = found.by_layer(min_prob=0.3)
    assert layers["specialised"].tolist() == (found.probs[..., 0] >= 0.3).sum(1).tolist()
    frame = found.to_frame(k=2)
    assert len(frame) == 80 and frame["words"][41] == [WORDS[i] for i in found.tokens[1, 1, :2]]
    assert found.plot().get_xlabel() == "layer"


def test_maps_are_kept_whole(found: NeuronMap, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "map.npz"
    found.save(path)
    again = NeuronMap.load(path)
    for name in ("tokens", "logits", "bottom_tokens", "entropy", "agreement"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.words == WORDS and again.settings == found.settings and again.layers == found.layers
    assert [p.name for p in path.parent.iterdir()] == ["map.npz"]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"map\.npz: no map"):
        NeuronMap.load(path)
    with pytest.raises(CheckpointError, match="no map"):
        NeuronMap.load(tmp_path / "none.npz")


def test_maps_of_a_model_and_its_reload_are_identical(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    a, b = decode_neurons(model), decode_neurons(again)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logits, b.logits)


def test_a_neuron_is_a_feature_of_every_other_method(found: NeuronMap) -> None:
    model, ids = tiny_model("llama"), tiny_inputs("llama")
    feature = found.feature(model, 1, 7)
    assert repr(WORDS[int(found.labels[1, 7])].strip()) in feature.name
    with feature.clamped(model, 3.0), torch.no_grad():
        by_feature = model(ids).logits
    with clamp(model, {(1, 7): 3.0}), torch.no_grad():
        assert torch.allclose(model(ids).logits, by_feature, atol=1e-10)
    assert len(feature.promoted(model, 3)) == 6
    assert float(feature.attribution(model, ids).activation.abs().max()) > 0


def test_comparison_counts_what_is_shared(found: NeuronMap) -> None:
    same = compare(found, found)
    assert same.same_top == same.jaccard_topk == 1.0 and len(same.moved) == 0
    other = decode_neurons(tiny_model("llama", seed=1), topk=5)
    compared = compare(found, other)
    a, b = found.tokens.numpy(), other.tokens.numpy()
    sets = [
        [len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(p, q, strict=True)]
        for p, q in zip(a, b, strict=True)
    ]
    assert compared.same_top == pytest.approx((a[..., 0] == b[..., 0]).mean())
    assert compared.jaccard_topk == pytest.approx(np.mean(sets))
    assert compared.per_layer.tolist() == pytest.approx((a[..., 0] == b[..., 0]).mean(1).tolist())
    assert len(compared.moved) == int((a[..., 0] != b[..., 0]).sum())
    assert compared.moved["prob_before"].is_monotonic_decreasing
    assert len(compared.to_frame()) == 2 and len(compared.plot().patches) == 2


def test_maps_that_cannot_be_compared_are_named(found: NeuronMap) -> None:
    from dataclasses import replace as changed

    for other, what in (
        (decode_neurons(tiny_model("llama"), layers=[0]), "depth"),
        (decode_neurons(tiny_model("llama"), norm="unit"), "norm"),
        (decode_neurons(tiny_model("llama"), weights="gate"), "weights"),
        (changed(found, vocab_size=30), "vocabulary"),
        (changed(found, words=(*WORDS[:-1], "other")), "words: token 28"),
    ):
        with pytest.raises(InvalidInput, match=f"differ in (their )?{what}"):
            compare(found, other)
    narrow = NeuronMap(**{**{n: getattr(found, n)[:, :8] for n in ("tokens", "logits", "bottom_tokens", "bottom_logits",
                       "logsumexp", "entropy", "agreement", "write_logit")}, "layers": (0, 1), "vocab_size": 29})  # fmt: skip
    with pytest.raises(InvalidInput, match="differ in width: 40 and 8"):
        compare(found, narrow)
    with pytest.raises(InvalidInput, match="hold 5 words"):
        compare(found, found, topk=6)


def test_the_page_holds_the_data_and_asks_for_nothing(found: NeuronMap) -> None:
    from dataclasses import replace as changed

    nasty = (*WORDS[:-1], "</script><b>\u2028&")
    page = changed(found, words=nasty).to_html("Neurons of <mine>", limit=30)
    assert "Neurons of &lt;mine&gt;" in page and "default-src 'none'" in page
    assert "http://" not in page and "https://" not in page and page.count("</script>") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["layer"]) == 30 and data["prob"] == sorted(data["prob"], reverse=True)
    first = [data["words"][i] for i in data["top"][0]]
    assert first == [nasty[int(t)] for t in found.tokens[data["layer"][0], data["neuron"][0]]]
    with pytest.raises(InvalidInput, match="at least 1"):
        found.to_html(limit=0)


# ----------------------------------------------------------------------------------------------------- the way back


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-post-norm", "gemma"])
def test_a_planted_neuron_is_the_nearest_to_its_word(family: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    vector = concept_vector(model, 11)
    layout = decoding.Layout(decoding.open_weights(model))
    matrix = layout.layers[1][None].up
    weight = dict(model.named_parameters())[matrix.name].data
    (weight[:, 5] if matrix.columns else weight[5]).copy_(0.3 * vector)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        table = nearest_neurons(source, concept_vector(source, 11), topk=3)
        assert table["name"][0] == "layers.1.mlp.neuron.5" and table["cosine"][0] == pytest.approx(1.0)
        assert len(table) == 3 and table["cosine"].is_monotonic_decreasing
    with pytest.raises(InvalidInput, match="expected 24 finite"):
        nearest_neurons(model, torch.zeros(24, dtype=torch.float64))


def test_words_become_vectors_and_firing_is_measured() -> None:
    corpus = TopicCorpus(n_topics=4, words_per_topic=4, n_common=6)
    tokenizer = corpus.tokenizer()
    from broadsheet.nn.small_lm import small_language_model

    model: Any = small_language_model(corpus.vocab_size, width=16, heads=2, hidden=20)
    vector = concept_vector(model, "dog", tokenizer)
    assert torch.allclose(vector, model.lm_head.weight[corpus.words.index("dog")])
    with pytest.raises(InvalidInput, match="hand in tokenizer"):
        concept_vector(model, "dog")
    texts = [corpus.text(ids[1:]) for ids in corpus.sample(12, 9, torch.Generator().manual_seed(0))[0]]
    seen = neuron_activations(model, texts, 1, 3, tokenizer=tokenizer, k=4, window=3, batch_size=5)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len(seen.values) == sum(map(len, ids)) and len(seen.examples.activation) == 4
    assert float(seen.examples.activation[0]) == pytest.approx(float(seen.values.max()))
    table = seen.by_token()
    line = table.iloc[0]
    mine = seen.values[seen.token_ids == int(line["token_id"])]
    assert line["mean"] == pytest.approx(float(mine.mean()), rel=1e-5) and line["count"] == len(mine)
    assert line["word"] == corpus.words[int(line["token_id"])]
    word = corpus.words[int(line["token_id"])]
    values, hit = seen.values.double(), seen.token_ids == int(line["token_id"])
    pairs = (values[hit][:, None] > values[~hit]).double() + 0.5 * (values[hit][:, None] == values[~hit])
    assert seen.fires_on(word) == pytest.approx(float(pairs.mean()))
    assert probability_of(model, "dog", texts[:3], tokenizer).shape == (3,)
    with pytest.raises(InvalidInput, match="prompt 0 is empty"):
        probability_of(model, "dog", [], tokenizer)
    with pytest.raises(InvalidInput, match=r"no token of the texts"):
        seen.fires_on(1)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("family", sorted(NO_HEAD))
def test_a_model_without_a_head_says_so(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    for source in (model, tmp_path):
        with pytest.raises(UnsupportedModel, match="no unembedding found; pass head="):
            decode_neurons(source)
        found = decode_neurons(source, head=torch.eye(24, dtype=torch.float64), topk=2)
        assert found.tokens.shape == (2, 40, 2)


class Own(nn.Module):
    """Somebody's own model, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(6, 9), "w2": nn.Linear(9, 6)}) for _ in range(2))
        self.unembed = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["w2"](torch.relu(block["w1"](x)))  # type: ignore[index]
        return self.unembed(x)


def test_unknown_names_are_listed_and_can_be_told() -> None:
    with seeded(0):
        model = Own()
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.w1.*mlp_map="):
        decode_neurons(model)
    names = {"up": "blocks.{layer}.w1", "down": "blocks.{layer}.w2"}
    found = decode_neurons(model, mlp_map=names, topk=3)
    logits = model.unembed(model.blocks[1]["w1"].weight)  # type: ignore[index]
    assert torch.equal(found.tokens[1], logits.topk(3).indices)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), clamp(model, {(0, 4): 5.0}, "up", mlp_map=names):
        clamped = model(ids)
    x = model.embed(ids)
    for layer, block in enumerate(model.blocks):
        inner = block["w1"](x)  # type: ignore[index]
        if layer == 0:
            inner = torch.cat([inner[..., :4], torch.full_like(inner[..., :1], 5.0), inner[..., 5:]], -1)
        x = x + block["w2"](torch.relu(inner))  # type: ignore[index]
    assert torch.allclose(model.unembed(x), clamped, atol=1e-6)
    for wrong in ({"up": "blocks.0.w1", "down": "blocks.{layer}.w2"}, {"up": "blocks.{layer}.w1"}):
        with pytest.raises(InvalidInput, match="mlp_map="):
            decode_neurons(model, mlp_map=wrong)
    with pytest.raises(InvalidInput, match=r"no tensor 'blocks\.0\.w3"):
        decode_neurons(model, mlp_map={**names, "down": "blocks.{layer}.w3"})


def test_bad_options_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for how, text in (
        ({"layers": [2]}, r"layers=\[2\]: the model has 2 layers"), ({"layers": []}, r"layers=\[\]"),
        ({"weights": "sideways"}, "weights='sideways'"), ({"norm": "big"}, "norm='big'"), ({"topk": 0}, "topk=0"),
        ({"topk": 30}, "k=30"), ({"temperature": 0.0}, "temperature=0"), ({"expert": 1}, "expert=1: layer 0 has None"),
        ({"head": torch.ones(3, 5)}, r"head=\(3, 5\): expected a matrix \[V, 24\]"), ({"head": "lm"}, "no tensor of that name"),
        ({"exclude": [29]}, "exclude holds 29"), ({"orient": "write"}, "orient='write'"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=text):
            decode_neurons(model, **how)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="weights='gate': the MLP of layer 0 has 'up', 'down'"):
        decode_neurons(tiny_model("gpt2"), weights="gate")
    with pytest.raises(InvalidInput, match="sign of its neurons is no choice"):
        decode_neurons(tiny_model("gpt2"), orient="gate")
    with pytest.raises(DataMissing, match="no such folder"):
        decode_neurons(tmp_path / "none")
    with pytest.raises(DataMissing, match="safetensors"):
        decode_neurons(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataMissing, match=r"config\.json is missing"):
        decode_neurons(tmp_path)
    with pytest.raises(InvalidInput, match="int: expected a model"):
        decode_neurons(3)


def test_weights_without_values_or_quantized_ones_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    with pytest.raises(InvalidInput, match=r"meta device, or offloaded.*folder"):
        decode_neurons(empty)
    model: Any = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"float8_e4m3fn, so it is quantized\. Dequantize"):
        decode_neurons(tmp_path)
    packed = {n.replace(".weight", ".qweight") if ".mlp." in n else n: t for n, t in tensors.items()}
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"quantized \(.*qweight"):
        decode_neurons(tmp_path)


def test_ids_that_the_tokenizer_does_not_know_are_padding() -> None:
    model = tiny_model("llama")
    tokenizer = word_tokenizer(["<bos>", "<pad>", "<unk>", *(f"w{i}" for i in range(20))])
    found = decode_neurons(model, tokenizer=tokenizer, topk=3)
    assert int(found.tokens.max()) < 23 and found.words is not None and len(found.words) == 29
    assert found.words[3] == "w0" and found.words[28] == ""
    assert int(decode_neurons(model, tokenizer=tokenizer, exclude_padding=False).tokens.max()) >= 23
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.find("w3", tokenizer=tokenizer)
