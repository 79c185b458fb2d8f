"""Feed every neuron's weights through the model's own output head, a layer at a time.

A neuron's input weights ``u`` are a direction in the residual stream; ``softmax(W u)`` says which words it points at
(arXiv:2501.02688, the method's section). Nothing is stored but the best words and sums over the vocabulary
(:func:`broadsheet.nn.vocabulary.rank_vocabulary`), and of a folder of files only one layer and the head are in memory.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.lm_head_neurons.layout import Expert, Layout, MLPMatrices
from broadsheet.interpretability.lm_head_neurons.maps import TENSORS, NeuronMap, stacked
from broadsheet.interpretability.lm_head_neurons.weights import Weights, open_weights
from broadsheet.interpretability.lm_head_neurons.words import vocabulary_words
from broadsheet.nn.blocks import Norm, softcap
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.features import Feature, mapped
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.vocabulary import VocabularyRanking, rank_vocabulary

ROWS = 512


def decode_neurons(
    model: Any,
    layers: Iterable[int] | None = None,
    weights: str = "up",
    norm: str = "none",
    *,
    tokenizer: Any = None,
    temperature: float = 1.0,
    topk: int = 10,
    expert: Expert = None,
    fold_norm: bool = False,
    orient: str = "none",
    exclude: Sequence[int] | Int[Tensor, " e"] = (),
    exclude_padding: bool = True,
    head: Any = None,
    mlp_map: Mapping[str, str] | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    block_neurons: int = 512,
    block_vocabulary: int = 8192,
    checkpoint: str | Path | None = None,
    progress: Progress = SILENT,
) -> NeuronMap:
    """The words that every MLP neuron points at, from weights alone.

    Args:
        model: a causal language model, or the folder of one (safetensors and ``config.json``): the folder is read layer
            by layer, so that the model need not fit in memory.
        layers: which ones; None for all.
        weights: ``"up"`` and ``"gate"`` for what a neuron reads, ``"down"`` for what it writes. A plain MLP has no
            gate.
        norm: ``"none"`` hands the weights to the head as they are; ``"final"`` applies the model's final norm first,
            gain included; ``"unit"`` gives them the length of a normalized hidden state, ``sqrt(D)``. Without a norm
            the logits are small and probabilities close to uniform; the order of words is the same as with ``"unit"``.
        tokenizer: names the words; ids that it does not know are left out as padding.
        temperature: divides the logits in the softmax; never changes an order.
        topk: words to keep of either direction.
        expert: of a mixture of experts: a number, or ``"shared"``. :func:`decode_experts` gives all.
        fold_norm: multiply by the gain of the norm before the MLP: what the neuron multiplies with the residual stream
            itself.
        orient: ``"gate"`` turns a neuron's up and down weights so that what opens its gate raises its up-projection. In
            a gated MLP the sign of (up, down) together is arbitrary, and so are raw labels; turned ones do not depend
            on it.
        exclude: token ids that do not count, such as ``tokenizer.all_special_ids``.
        exclude_padding: leave out rows of the head that are zero.
        head: another output matrix ``[V, D]``, a linear layer, or the name of a tensor of the model.
        mlp_map: names of the MLPs' matrices where they are not known; see :class:`~.layout.Layout`.
        adapter: of a folder: a LoRA folder of ``peft``'s, added to the weights as they are read.
        dtype: in which blocks are multiplied; None for float32 (float64 if the weights are). Sums are float32 at least.
        device: where the work is done; None for that of the model, the CPU for a folder.
        block_neurons, block_vocabulary: size of a block; they change time and memory, never the result beyond rounding.
        checkpoint: a folder in which layers that are done are kept; with the same call it is taken up from there.
        progress: where neurons done are shown.

    Returns:
        the map, on the CPU.

    Raises:
        UnsupportedModel: no MLP or no unembedding found, or quantized weights; the message says what to hand in.
        InvalidInput: a layer, expert or option that is not there, or weights without values.
        CheckpointError: ``checkpoint`` belongs to another call.

    Warns:
        SkippedDirections: neurons whose weights hold NaN or infinite values.

    Example:
        >>> from broadsheet.nn.tiny_models import tiny_model
        >>> found = decode_neurons(tiny_model("llama"), topk=3)
        >>> found.tokens.shape
        torch.Size([2, 40, 3])
    """
    _check_options(weights, norm, orient, topk)
    source = open_weights(model, adapter, device)
    layout = Layout(source, mlp_map)
    mlps = layout.chosen(layers, expert)
    for layer, mlp in mlps.items():
        mlp.matrix(weights, f"layer {layer}")
        if orient == "gate" and mlp.gate is None:
            raise InvalidInput(
                f"orient='gate': the MLP of layer {layer} has no gate, so the sign of its neurons is no choice"
            )
    place = source.device if device is None else torch.device(device)
    unembed = Unembedding.of(layout, head, place)
    left_out = _left_out(unembed.matrix, exclude, exclude_padding, tokenizer)
    final = layout.final_norm() if norm == "final" else None
    settings: dict[str, Any] = {
        "weights": weights, "norm": norm, "fold_norm": fold_norm, "orient": orient, "expert": expert,
        "temperature": float(temperature),
    }  # fmt: skip
    kept = None if checkpoint is None else _Kept(Path(checkpoint), source, unembed, left_out, topk, settings)
    parts: list[dict[str, Tensor]] = []
    for layer, mlp in mlps.items():
        part = None if kept is None else kept.load(layer, mlp)
        if part is None:
            gain = layout.mlp_norm(layer) if fold_norm else None
            part = _decode_layer(
                source, mlp, weights, orient == "gate", unembed, _Directions(norm, final, gain, place),
                k=topk, temperature=temperature, exclude=left_out, dtype=dtype, block_directions=block_neurons,
                block_vocabulary=block_vocabulary, progress=_Named(progress, f"layer {layer}"),
            )  # fmt: skip
            if kept is not None:
                kept.save(layer, mlp, part)
        parts.append(part)
    size = len(unembed.matrix)
    words = None if tokenizer is None else vocabulary_words(tokenizer, size)
    return stacked(parts, layers=tuple(mlps), vocab_size=size, words=words, **settings)


def decode_experts(model: Any, **how: Any) -> dict[int | str, NeuronMap]:
    """One map for each expert of a mixture of experts.

    Args:
        model: as in :func:`decode_neurons`.
        **how: its other arguments, without ``expert``.

    Returns:
        expert (a number, or ``"shared"``) -> its map, over the layers that have it.
    """
    source = open_weights(model, how.pop("adapter", None), how.get("device"))
    layout = Layout(source, how.get("mlp_map"))
    experts = {expert for kinds in layout.layers.values() for expert in kinds if expert is not None}
    if not experts:
        raise InvalidInput(f"{source.about} has no experts: decode_neurons gives its map")
    order = sorted(experts, key=lambda expert: (isinstance(expert, str), expert))
    kept = how.pop("checkpoint", None)
    return {
        expert: decode_neurons(
            source, expert=expert, checkpoint=None if kept is None else Path(kept) / f"expert-{expert}", **how
        )
        for expert in order
    }


def decode_directions(
    model: Any,
    directions: Float[Tensor, "n d"] | Feature | Sequence[Feature],
    norm: str = "none",
    *,
    topk: int = 10,
    temperature: float = 1.0,
    exclude: Sequence[int] | Int[Tensor, " e"] = (),
    exclude_padding: bool = True,
    head: Any = None,
    dtype: torch.dtype | None = None,
) -> VocabularyRanking:
    """The words of any directions of the residual stream: an SAE's latents, factors, codes, steering vectors.

    Args:
        model: as in :func:`decode_neurons`; features need the model itself.
        directions: ``[n, D]``, or features that other methods found; what a feature writes to the residual stream is
            decoded.
        norm, topk, temperature, exclude, exclude_padding, head, dtype: as in :func:`decode_neurons`.
    """
    _check_options("up", norm, "none", topk)
    if not isinstance(directions, Tensor):
        features = [directions] if isinstance(directions, Feature) else list(directions)
        the_map = mapped(model)
        directions = torch.stack([feature.in_residual(the_map).detach() for feature in features])
    source = open_weights(model)
    layout = Layout(source)
    unembed = Unembedding.of(layout, head, directions.device)
    final = layout.final_norm() if norm == "final" else None
    ready = _Directions(norm, final, None, directions.device)(directions)
    return unembed.rank(
        ready, k=topk, temperature=temperature, dtype=dtype,
        exclude=_left_out(unembed.matrix, exclude, exclude_padding, None),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ one layer


@dataclass(frozen=True)
class Unembedding:
    """The head, with its values: ``softcap(matrix project(x) + bias)``.

    Attributes:
        matrix: ``[V, D]``.
        bias: ``[V]``.
        project: ``[D, d_model]`` where the head is narrower than the residual stream.
        cap: of the logits.
    """

    matrix: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    project: Float[Tensor, "D d_model"] | None = None
    cap: float | None = None

    @classmethod
    def of(cls, layout: Layout, head: Any, device: torch.device) -> "Unembedding":
        """The model's own, or what the user handed in."""
        if head is not None and not isinstance(head, str):
            matrix = head if isinstance(head, Tensor) else getattr(head, "weight", None)
            if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[1] != layout.d_model:
                shown = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(head).__name__
                raise InvalidInput(f"head={shown}: expected a matrix [V, {layout.d_model}] or a linear layer")
            bias = getattr(head, "bias", None) if not isinstance(head, Tensor) else None
            return cls(matrix.detach().to(device), None if bias is None else bias.detach().to(device))
        found, weights = layout.head(head), layout.weights
        bias = None if found.bias is None else weights.read(found.bias).to(device)
        project = None if found.project is None else found.project.read(weights).to(device)
        return cls(weights.read(found.name).to(device), bias, project, found.softcap)

    def rank(self, directions: Float[Tensor, "n d"], **how: Any) -> VocabularyRanking:
        """The words of directions of the residual stream."""
        if self.project is not None:
            directions = directions.to(torch.promote_types(directions.dtype, self.project.dtype))
            directions = directions @ self.project.to(directions).T
        transform = None if self.cap is None else partial(softcap, cap=self.cap)
        return rank_vocabulary(directions, self.matrix, bias=self.bias, transform=transform, **how)

    def logit(self, directions: Float[Tensor, "n d"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """One word's logit of each direction, without bias and cap; NaN where the token is -1."""
        x = directions
        if self.project is not None:
            x = x @ self.project.to(x).T
        value = (x * self.matrix[tokens.clamp_min(0)].to(x)).sum(-1)
        return torch.where(tokens < 0, torch.nan, value)


@dataclass(frozen=True)
class _Directions:
    """From a matrix of weights to the directions that are decoded."""

    norm: str
    final: Norm | None
    before: Norm | None
    device: torch.device

    def __call__(self, rows: Tensor, turned: Tensor | None = None) -> Tensor:
        rows = rows.to(self.device)
        if self.norm == "none" and self.before is None and turned is None:
            return rows
        x = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if turned is not None:
            x = torch.where(turned[:, None], -x, x)
        if self.before is not None:  # the norm's own centring belongs to what the neuron reads
            gain = self.before.gain
            x = self.before.centre(x if gain is None else x * gain.to(x))
        if self.norm == "unit":
            x = x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
        elif self.final is not None:
            final = Norm(
                self.final.kind, _like(self.final.gain, x), _like(self.final.bias, x), self.final.eps
            )  # fmt: skip
            x = final(x)
        return x


def _like(part: Tensor | None, x: Tensor) -> Tensor | None:
    return None if part is None else part.to(x)


def _decode_layer(
    source: Weights, mlp: MLPMatrices, which: str, orient: bool, unembed: Unembedding, prepare: _Directions, **how: Any
) -> dict[str, Tensor]:
    rows = mlp.matrix(which, "").read(source).to(prepare.device)
    other = mlp.up if which == "down" else mlp.down
    partner = None if other is None else other.read(source).to(prepare.device)
    agreement = rows.new_full((len(rows),), torch.nan, dtype=torch.promote_types(rows.dtype, torch.float32))
    if partner is not None:
        agreement = _cosines(rows, partner)
    turned = None
    if orient and which != "gate" and mlp.gate is not None:
        up = rows if which == "up" else partner
        assert up is not None
        turned = _cosines(up, mlp.gate.read(source).to(prepare.device)) < 0
    ranking = unembed.rank(prepare(rows, turned), **how)
    writes = rows if which == "down" else partner
    write_logit = torch.full_like(agreement, torch.nan)
    if writes is not None:
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            write_logit[part] = unembed.logit(writes[part].to(agreement), ranking.tokens[part, 0])
    found = {"agreement": agreement, "write_logit": write_logit}
    return {
        name: (found[name] if name in found else getattr(ranking, name)).detach().cpu() for name in TENSORS
    }  # fmt: skip


def _cosines(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Of each pair of rows, in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return torch.cat([torch.cosine_similarity(x.to(dtype), y.to(dtype), dim=1) for x, y in parts])


def _check_options(weights: str, norm: str, orient: str, topk: int) -> None:
    for name, value, known in (
        ("weights", weights, ("up", "gate", "down")),
        ("norm", norm, ("none", "final", "unit")),
        ("orient", orient, ("none", "gate")),
    ):
        if value not in known:
            raise InvalidInput(f"{name}={value!r}: expected {', '.join(map(repr, known))}")
    if topk < 1:
        raise InvalidInput(f"topk={topk}: at least 1 word is kept")


def _left_out(matrix: Tensor, exclude: Sequence[int] | Tensor, padding: bool, tokenizer: Any) -> Int[Tensor, " e"]:
    out = torch.as_tensor(exclude, dtype=torch.long).flatten().cpu()
    if padding:
        zero = padding_rows(matrix)
        if tokenizer is not None:
            zero[len(tokenizer) :] = True
        out = torch.cat([out, zero.nonzero().flatten()])
    return out.unique()


def padding_rows(matrix: Float[Tensor, "V D"]) -> Bool[Tensor, " V"]:
    """Which rows of an output head hold nothing but zeros: they pad the vocabulary."""
    if matrix.is_meta:
        return torch.zeros(len(matrix), dtype=torch.bool)
    return torch.cat([~matrix[i : i + ROWS].bool().any(1) for i in range(0, len(matrix), ROWS)]).cpu()


class _Named(Progress):
    """Another progress, under the layer's name."""

    def __init__(self, inner: Progress, name: str) -> None:
        self.inner, self.name = inner, name

    def task(self, description: str, total: int | None = None) -> Any:
        return self.inner.task(f"{self.name}: {description}", total)


class _Kept:
    """Layers that are done, on disk."""

    def __init__(
        self, folder: Path, source: Weights, unembed: Unembedding, left_out: Tensor, topk: int, settings: dict[str, Any]
    ) -> None:
        self.folder, self.source = folder, source
        self.said = [source.model_type, list(unembed.matrix.shape), left_out.tolist(), topk, settings]
        self.said.append(_sample(unembed.matrix))

    def key(self, mlp: MLPMatrices) -> str:
        """Of which call and which weights a layer is."""
        first = self.source.read(mlp.up.name, slice(mlp.up.expert or 0, (mlp.up.expert or 0) + 1))
        return hashlib.sha256(json.dumps([*self.said, _sample(first)]).encode()).hexdigest()

    def load(self, layer: int, mlp: MLPMatrices) -> dict[str, Tensor] | None:
        place = self.folder / f"layer-{layer}"
        if not place.exists():
            return None
        tree, about = load_tree(place)
        if about.get("key") != self.key(mlp):
            raise CheckpointError(
                f"{place} was made by another call (model, weights=, norm=, topk=, ...): hand in another folder"
            )
        return tree

    def save(self, layer: int, mlp: MLPMatrices, part: dict[str, Tensor]) -> None:
        save_tree(self.folder / f"layer-{layer}", part, key=self.key(mlp))


def _sample(matrix: Tensor) -> str:
    """Some of a tensor's values, as a fingerprint."""
    rows = matrix.flatten(1)[:: max(1, len(matrix) // 64), :1024]
    return hashlib.sha256(rows.float().cpu().numpy().tobytes()).hexdigest()
