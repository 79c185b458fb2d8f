"""Which tensor is what: the MLPs, norms and head of a causal language model, by the names that its weights have.

One reading serves a model in memory and its files, plain and gated MLPs, fused ones (Phi-3), GPT-2's transposed
matrices and mixtures of experts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability.lm_head_neurons.weights import ModelWeights, Weights
from broadsheet.nn.blocks import Norm

Expert = int | str | None

# (up, gate, down) under a layer. An "up" twice as wide as "down" holds the gate too, in its first half.
DENSE = (
    ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"),
    ("mlp.gate_up_proj", None, "mlp.down_proj"),
    ("mlp.w1", "mlp.w2", "mlp.c_proj"),
    ("mlp.c_fc", None, "mlp.c_proj"),
    ("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
    ("mlp.fc1", None, "mlp.fc2"),
    ("mlp.fc_in", None, "mlp.fc_out"),
    ("fc1", None, "fc2"),
    ("ffn.up_proj", "ffn.gate_proj", "ffn.down_proj"),
    ("feed_forward.up_proj", "feed_forward.gate_proj", "feed_forward.down_proj"),
    ("feed_forward.w3", "feed_forward.w1", "feed_forward.w2"),
    ("intermediate.dense", None, "output.dense"),
)
SHARED = tuple(
    (f"{where}.up_proj", f"{where}.gate_proj", f"{where}.down_proj")
    for where in ("mlp.shared_expert", "mlp.shared_experts", "feed_forward.shared_expert")
)
EXPERTS = (
    (r"mlp.experts.{expert}.up_proj", "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.down_proj"),
    *((f"{where}.w3", f"{where}.w1", f"{where}.w2") for where in ("block_sparse_moe.experts.{expert}",)),
)
STACKED = (("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
           ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"))  # fmt: skip
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # they store [in, out]
STACKED_TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
INTERLEAVED = ("gpt_oss",)  # gate and up take turns
UNIT_OFFSET = ("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "qwen3_next", "nemotron")  # 1 + weight
OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
MLP_NORMS = (
    "pre_feedforward_layernorm", "ln_2", "post_attention_layernorm", "final_layer_norm", "ffn_norm", "norm_2", "ln_mlp",
    "layernorm_after", "input_layernorm", "ln_1",
)  # fmt: skip
POST_NORM = ("bert", "roberta", "olmo2", "olmo3")  # nothing is normalized right before their MLP
TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output", "unembed", "head")


@dataclass(frozen=True)
class Matrix:
    """A matrix of an MLP, in whatever way it is stored.

    Attributes:
        name: of the tensor.
        columns: whether neurons are its columns.
        part: of the neurons' axis; None for all of it.
        expert: which entry of a stack of experts.
    """

    name: str
    columns: bool
    part: slice | None = None
    expert: int | None = None

    def read(self, weights: Weights) -> Tensor:
        """One row for each neuron, ``[F, D]``; nothing but what is needed is read."""
        if self.expert is not None:
            matrix = weights.read(self.name, slice(self.expert, self.expert + 1))[0]
        elif self.columns or self.part is None or (self.part.step or 1) != 1:
            matrix = weights.read(self.name)
        else:
            return weights.read(self.name, self.part)
        matrix = matrix.T if self.columns else matrix
        return matrix if self.part is None else matrix[self.part]


@dataclass(frozen=True)
class MLPMatrices:
    """The matrices of one MLP and its number of neurons; a plain MLP has no gate."""

    width: int
    up: Matrix
    down: Matrix | None = None
    gate: Matrix | None = None

    def matrix(self, which: str, where: str) -> Matrix:
        """``"up"``, ``"gate"`` or ``"down"``."""
        found = {"up": self.up, "gate": self.gate, "down": self.down}.get(which)
        if found is None:
            have = ", ".join(repr(name) for name in ("up", "gate", "down") if getattr(self, name) is not None)
            raise InvalidInput(f"weights={which!r}: the MLP of {where} has {have}")
        return found


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: ``softcap(W project(x) + bias)``."""

    name: str
    bias: str | None = None
    project: Matrix | None = None
    softcap: float | None = None


class Layout:
    """What the tensors of a causal language model are.

    Args:
        weights: of the model.
        mlp_map: names of the matrices where they are not known, with ``{layer}`` in the place of the layer's number:
            ``{"up": "blocks.{layer}.ff.w1", "down": "blocks.{layer}.ff.w2", "gate": ...}``.

    Attributes:
        layers: layer -> expert (None for a plain MLP, a number, or ``"shared"``) -> its matrices.
        prefix: what stands before a layer's number in its names, such as ``"model.layers."``.
        d_model: features of the residual stream.
    """

    def __init__(self, weights: Weights, mlp_map: Mapping[str, str] | None = None) -> None:
        self.weights = weights
        self.d_model = self._width()
        found = self._find(mlp_map)
        if not found:
            raise UnsupportedModel(self._unknown())
        prefixes = sorted({prefix for prefix, _, _ in found})
        spoken = [p for p in prefixes if not OTHER_SENSES.search(p)] or prefixes
        if len(spoken) > 1:
            raise UnsupportedModel(
                f"{weights.about}: MLPs under {', '.join(map(repr, spoken))}: say which are meant with mlp_map="
                f'{{"up": "{spoken[0]}{{layer}}....", "down": ...}}'
            )
        self.prefix = spoken[0]
        self.layers: dict[int, dict[Expert, MLPMatrices]] = {}
        for (prefix, layer, expert), names in found.items():
            if prefix == self.prefix:
                self.layers.setdefault(layer, {})[expert] = self._matrices(*names, expert)
        self.layers = {layer: self._unstacked(self.layers[layer]) for layer in sorted(self.layers)}

    # ------------------------------------------------------------------------------------------------ which neurons

    def chosen(self, layers: Any, expert: Expert) -> dict[int, MLPMatrices]:
        """The MLPs of some layers (None for all that have that expert)."""
        count = max(self.layers) + 1
        wanted = list(self.layers) if layers is None else [int(layer) for layer in layers]
        bad = [layer for layer in wanted if layer not in self.layers]
        if bad or not wanted:
            raise InvalidInput(f"layers={wanted}: the model has {count} layers with MLPs (0 to {count - 1})")
        out = {layer: self.layers[layer][expert] for layer in wanted if expert in self.layers[layer]}
        missing = [layer for layer in wanted if layer not in out]
        if missing and (layers is not None or not out):
            kinds = self.layers[missing[0]]
            numbers = [kind for kind in kinds if isinstance(kind, int)]
            have = ["None (a plain MLP)"] * (None in kinds) + ([f"0 to {max(numbers)}"] if numbers else [])
            have += ["'shared'"] * ("shared" in kinds)
            hint = "; decode_experts gives one map for each" if numbers else ""
            raise InvalidInput(f"expert={expert!r}: layer {missing[0]} has {', '.join(have)}{hint}")
        widths = {mlp.width for mlp in out.values()}
        if len(widths) > 1:
            shown = ", ".join(f"layer {layer}: {mlp.width}" for layer, mlp in out.items())
            raise InvalidInput(f"the layers have different numbers of neurons ({shown}): name layers of one width")
        return out

    # ------------------------------------------------------------------------------------------------ norms and head

    def final_norm(self) -> Norm:
        """The norm before the head."""
        base = re.sub(r"[^.]+\.$", "", self.prefix)
        return self._norm([base + name for name in FINAL_NORMS], "no final norm found; take norm='none' or 'unit'")

    def mlp_norm(self, layer: int) -> Norm:
        """The norm whose output the MLP of a layer reads."""
        kind = self.weights.model_type
        if kind in POST_NORM or self.weights.config.get("do_layer_norm_before") is False:
            raise InvalidInput(f"fold_norm=True: the MLPs of {kind} read the residual stream itself, without a norm")
        names = [f"{self.prefix}{layer}.{name}" for name in MLP_NORMS]
        return self._norm(names, f"no norm found before the MLP of layer {layer}; leave fold_norm=False")

    def _norm(self, names: list[str], otherwise: str) -> Norm:
        name = next((name for name in names if f"{name}.weight" in self.weights), None)
        if name is None:
            raise UnsupportedModel(f"{self.weights.about}: {otherwise}")
        config = self.weights.config
        gain = self.weights.read(f"{name}.weight")
        gain = 1 + gain if self.weights.model_type in UNIT_OFFSET else gain
        bias = self.weights.read(f"{name}.bias") if f"{name}.bias" in self.weights else None
        rms = "rms_norm_eps" in config or (bias is None and not any("layer_norm" in key for key in config))
        kind = "rms" if rms and self.weights.model_type != "nemotron" else "layer"
        keys = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        eps = next((config[key] for key in keys if config.get(key) is not None), 1e-5)
        return Norm(kind, gain, bias, float(eps))

    def head(self, head: str | None = None) -> Head:
        """The output head.

        Args:
            head: name of its matrix ``[V, D]`` where it is not known.
        """
        weights, config = self.weights, self.weights.config
        kinds = [str(kind) for kind in config.get("architectures") or ()]
        kinds += [type(weights.model).__name__] if isinstance(weights, ModelWeights) else []
        masked = any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in kinds)
        causal = any(kind.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for kind in kinds)
        if head is not None:
            name = head if head in weights else f"{head}.weight"
            if name not in weights:
                raise InvalidInput(f"head={head!r}: no tensor of that name; pass one, or a matrix [V, {self.d_model}]")
            return self._headed(name)
        if masked:
            raise UnsupportedModel(
                f"{weights.about}: its head is more than one matrix; no unembedding found; pass head= (a matrix "
                f"[V, {self.d_model}], or the name of one)"
            )
        base = self.prefix.split(".")[0]
        names = [f"{where}{name}.weight" for name in HEADS for where in ("", f"{base}.")]
        tables = [name for name in weights.names if name.endswith(tuple(f"{table}.weight" for table in TABLES))]
        tables = [name for name in tables if not OTHER_SENSES.search(name)]
        tied = (causal or not kinds) and config.get("tie_word_embeddings", causal)
        name = weights.head() or next((name for name in names if name in weights), None)
        name = name or (tables[0] if tied and tables else None)
        if name is None:
            raise UnsupportedModel(
                f"{weights.about}: no unembedding found; pass head= (a matrix [V, {self.d_model}], or the name of one) "
                "or load the model with its language modelling head"
            )
        return self._headed(name)

    def _headed(self, name: str) -> Head:
        weights = self.weights
        bias = name.removesuffix("weight") + "bias"
        project = None
        width = weights.shape(name)[1]
        if width != self.d_model:  # small OPT models come down to a narrower embedding first
            names = [n for n in weights.names if n.endswith("project_out.weight")]
            if not names or weights.shape(names[0]) != (width, self.d_model):
                raise UnsupportedModel(
                    f"{weights.about}: {name} reads {width} features, the layers write {self.d_model}"
                )
            project = Matrix(names[0], columns=False)
        cap = weights.config.get("final_logit_softcapping")
        return Head(name, bias if bias in weights else None, project, None if cap is None else float(cap))

    # ------------------------------------------------------------------------------------------------ finding

    def _width(self) -> int:
        config = self.weights.config
        for key in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(config.get(key), int):
                return config[key]
        name = self.weights.head() or next(
            (f"{name}.weight" for name in HEADS if f"{name}.weight" in self.weights), None
        )
        if name is None:
            names = [n for n in self.weights.names if n.endswith(tuple(f"{table}.weight" for table in TABLES))]
            name = names[0] if names else None
        if name is None:
            raise UnsupportedModel(
                f"{self.weights.about}: how wide its residual stream is cannot be told: it has no configuration with "
                "hidden_size, and neither lm_head nor embed_tokens. Give the model a config, or name its parts so"
            )
        return self.weights.shape(name)[1]

    def _find(self, mlp_map: Mapping[str, str] | None) -> dict[tuple[str, int, Expert], tuple[str, str | None, str]]:
        patterns: list[Any] = []
        if mlp_map is not None:
            if not {"up", "down"} <= set(mlp_map) <= {"up", "down", "gate"} or "{layer}" not in mlp_map["up"]:
                raise InvalidInput(
                    f"mlp_map={dict(mlp_map)}: expected names for 'up' and 'down', and 'gate' where there is one, such "
                    'as {"up": "blocks.{layer}.ff.w1", "down": "blocks.{layer}.ff.w2"}'
                )
            patterns = [(mlp_map["up"], mlp_map.get("gate"), mlp_map["down"], None)]
        else:
            patterns += [(*names, None) for names in DENSE]
            patterns += [(*names, "shared") for names in SHARED]
            patterns += [(*names, None) for names in EXPERTS]
            patterns += [(up, None, down, "stack") for up, down in STACKED]
        found: dict[tuple[str, int, Expert], tuple[str, str | None, str]] = {}
        for up, gate, down, kind in patterns:
            expression = (
                re.escape(up).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
            )
            before = "(?P<prefix>)" if "{layer}" in up else r"(?P<prefix>(?:.*?\.)?)(?P<layer>\d+)\."
            match_name = re.compile(f"{before}{expression}(?P<end>\\.weight|)").fullmatch
            for name in self.weights.names:
                match = match_name(name)
                if match is None or len(self.weights.shape(name)) not in (2, 3):
                    continue
                layer, expert = match["layer"], match["expert"] if "{expert}" in up else None
                begin = "" if "{layer}" in up else f"{match['prefix']}{layer}."
                prefix = up.partition("{layer}")[0] if "{layer}" in up else match["prefix"]

                def full(
                    part: str, begin: str = begin, layer: str = layer, expert: Any = expert, end: str = match["end"]
                ):
                    return begin + part.replace("{layer}", layer).replace("{expert}", str(expert)) + end

                gate_name = None if gate is None or full(gate) not in self.weights else full(gate)
                if full(down) not in self.weights:
                    if mlp_map is not None:
                        raise InvalidInput(f"mlp_map: no tensor {full(down)!r}")
                    continue
                key: Expert = int(expert) if expert is not None else kind
                found.setdefault((prefix, int(layer), key), (name, gate_name, full(down)))
        return found

    def _matrices(self, up: str, gate: str | None, down: str, expert: Expert) -> MLPMatrices:
        columns_in = self._reads_columns(up)
        columns_out = not self._reads_columns(down, out=True)
        axis = -1 if columns_in else -2
        rows, width = self.weights.shape(up)[axis], self.weights.shape(down)[-1 if columns_out else -2]
        stack = 0 if expert == "stack" else None
        below = Matrix(down, columns_out, expert=stack)
        if gate is not None or rows == width:
            gated = None if gate is None else Matrix(gate, self._reads_columns(gate), expert=stack)
            return MLPMatrices(width, Matrix(up, columns_in, expert=stack), below, gated)
        if rows != 2 * width:
            raise UnsupportedModel(f"{self.weights.about}: {up} has {rows} rows for {width} neurons")
        first, second = slice(0, width), slice(width, 2 * width)
        if self.weights.model_type in INTERLEAVED:
            first, second = slice(0, None, 2), slice(1, None, 2)
        return MLPMatrices(
            width, Matrix(up, columns_in, second, stack), below, Matrix(up, columns_in, first, stack)
        )  # fmt: skip

    def _reads_columns(self, name: str, out: bool = False) -> bool:
        """Whether a matrix stands as ``[in, out]`` (else ``[out, in]``, as ``torch.nn.Linear`` has it)."""
        known = self.weights.transposed(name)
        if known is not None:
            return known
        shape = self.weights.shape(name)
        outer, inner = (shape[-1], shape[-2]) if out else (shape[-2], shape[-1])
        if outer == inner:  # square: only the architecture can tell
            return self.weights.model_type in (STACKED_TRANSPOSED if len(shape) == 3 else CONV1D)
        if self.d_model not in shape[-2:]:
            raise UnsupportedModel(f"{self.weights.about}: {name} is {list(shape)}, the residual stream {self.d_model}")
        return outer == self.d_model

    def _unstacked(self, experts: dict[Expert, MLPMatrices]) -> dict[Expert, MLPMatrices]:
        stack = experts.pop("stack", None)
        if stack is None:
            return experts
        count = self.weights.shape(stack.up.name)[0]

        def entry(matrix: Matrix | None, i: int) -> Matrix | None:
            return None if matrix is None else Matrix(matrix.name, matrix.columns, matrix.part, i)

        for i in range(count):
            up = entry(stack.up, i)
            assert up is not None
            experts[i] = MLPMatrices(stack.width, up, entry(stack.down, i), entry(stack.gate, i))
        return experts

    def _unknown(self) -> str:
        names = self.weights.names
        packed = [n for n in names if n.endswith(("qweight", "_blocks", "weight_packed"))]
        if packed:
            return (
                f"{self.weights.about}: its MLPs are quantized ({packed[0]}): dequantize the model first and hand in "
                "the result"
            )
        linear = [n.removesuffix(".weight") for n in names if n.endswith(".weight") and len(self.weights.shape(n)) == 2]
        shown = ", ".join(linear[:12]) or "none"
        return (
            f"{self.weights.about}: no MLP found by name. Its linear modules: {shown}{', ...' * (len(linear) > 12)}. "
            'Say which are which: mlp_map={"up": "....{layer}....", "down": "....{layer}....", "gate": ...}'
        )
