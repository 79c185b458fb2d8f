"""The way back: from a word to the neurons nearest to it, and from a neuron to the texts in which it fires."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.lm_head_neurons.layout import Expert, Layout
from broadsheet.interpretability.lm_head_neurons.weights import open_weights
from broadsheet.interpretability.lm_head_neurons.words import target_ids, vocabulary_words, word_ids
from broadsheet.nn.activations import token_batches
from broadsheet.nn.features import Examples, Feature, neuron
from broadsheet.nn.progress import SILENT, Progress

ROWS = 4096


def concept_vector(
    model: Any, word: str | int | Sequence[str | int], tokenizer: Any = None, pieces: str = "all"
) -> Float[Tensor, " D"]:
    """The direction of a word in the residual stream: the mean of the head's rows for its tokens.

    Args:
        model: a causal language model, or the folder of one.
        word: a word (all its forms count), several, or token ids.
        tokenizer: needed for words.
        pieces: of a word that is no single token: its first piece, or the mean of all.

    Warns:
        SeveralTokens: the word is no single token; the message shows how it is split.
    """
    source = open_weights(model)
    head = Layout(source).head()
    size = source.shape(head.name)[0]
    if isinstance(word, str):
        if tokenizer is None:
            raise InvalidInput(f"{word!r} is a word: hand in tokenizer=, or token ids")
        ids = word_ids(word, vocabulary_words(tokenizer, size), tokenizer=tokenizer, pieces=pieces)
    else:
        ids = target_ids(word, tokenizer, size)
    rows = torch.cat([source.read(head.name, slice(i, i + 1)) for i in ids])
    vector = rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(0)
    return vector if head.project is None else vector @ head.project.read(source).to(vector)


def nearest_neurons(
    model: Any,
    vector: Float[Tensor, " D"] | Feature,
    topk: int = 20,
    *,
    layers: Iterable[int] | None = None,
    weights: str = "up",
    expert: Expert = None,
    mlp_map: Mapping[str, str] | None = None,
    adapter: str | Path | None = None,
    progress: Progress = SILENT,
) -> pd.DataFrame:
    """The neurons whose weights point the same way as a vector, by cosine; layers are read one at a time.

    Args:
        model: a causal language model, or the folder of one.
        vector: ``[D]`` in the residual stream, such as :func:`concept_vector` gives, or a feature that another method
            found (needs the model in memory).
        topk: how many.
        layers, weights, expert, mlp_map, adapter: as in :func:`decode_neurons`.
        progress: where layers done are shown.

    Returns:
        columns ``layer``, ``neuron``, ``cosine``, ``name``, the nearest first.
    """
    if isinstance(vector, Feature):
        vector = vector.in_residual(model).detach()
    if topk < 1:
        raise InvalidInput(f"topk={topk}: expected at least 1")
    source = open_weights(model, adapter)
    layout = Layout(source, mlp_map)
    if vector.shape != (layout.d_model,) or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise InvalidInput(
            f"vector of shape {tuple(vector.shape)}: expected {layout.d_model} finite values, not all zero"
        )
    best: Any = pd.DataFrame()
    mlps = layout.chosen(layers, expert)
    with progress.task("neurons", len(mlps)) as task:
        for layer, mlp in mlps.items():
            rows = mlp.matrix(weights, f"layer {layer}").read(source)
            target = vector.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
            value = torch.cat(
                [
                    torch.cosine_similarity(rows[i : i + ROWS].to(target), target[None], dim=1)
                    for i in range(0, len(rows), ROWS)
                ]
            )
            value = value.nan_to_num(nan=-torch.inf)
            top = value.topk(min(topk, len(value)))
            found = pd.DataFrame({"layer": layer, "neuron": top.indices.tolist(), "cosine": top.values.tolist()})
            best = pd.concat([best, found]).sort_values("cosine", ascending=False, kind="stable").head(topk)
            task.advance()
    best = best[best["cosine"] > -float("inf")].reset_index(drop=True)
    best["name"] = [f"layers.{a}.mlp.neuron.{b}" for a, b in zip(best["layer"], best["neuron"], strict=True)]
    return best


@dataclass(frozen=True)
class NeuronActivations:
    """What a neuron does on texts.

    Attributes:
        feature: the neuron.
        examples: the texts in which it is most active.
        values: ``[n]``, its value at every token of all texts; padding is left out.
        token_ids: ``[n]``, those tokens.
        words: the text of every token id; None without a tokenizer.
    """

    feature: Feature
    examples: Examples
    values: Float[Tensor, " n"]
    token_ids: Int[Tensor, " n"]
    words: tuple[str, ...] | None = None

    def by_token(self) -> pd.DataFrame:
        """One row for each token that occurs: how often, mean and largest value; the highest mean first."""
        table = pd.DataFrame({"token_id": self.token_ids.tolist(), "value": self.values.tolist()})
        table = table.groupby("token_id")["value"].agg(["count", "mean", "max"]).reset_index()
        if self.words is not None:
            table.insert(1, "word", [self.words[i] for i in table["token_id"]])
        return table.sort_values("mean", ascending=False, ignore_index=True, kind="stable")

    def fires_on(self, words: str | int | Iterable[str | int], tokenizer: Any = None) -> float:
        """How well the neuron's value tells some words from all others: area under the ROC curve, 0.5 for not at all.

        Args:
            words: words (all their forms count) or token ids.
            tokenizer: needed for words that are no single token.
        """
        from sklearn.metrics import roc_auc_score

        if isinstance(words, str) and self.words is not None:
            ids = word_ids(words, self.words, tokenizer=tokenizer)
        else:
            ids = target_ids(words, tokenizer, int(self.token_ids.max()) + 1 if self.words is None else len(self.words))
        hit = torch.isin(self.token_ids, torch.tensor(ids))
        if not bool(hit.any()) or bool(hit.all()):
            raise InvalidInput(f"{words!r}: {'no' if not hit.any() else 'every'} token of the texts is that word")
        return float(roc_auc_score(hit.numpy(), self.values.double().numpy()))


def neuron_activations(
    model: nn.Module,
    texts: Iterable[str] | Iterable[Sequence[int]],
    layer: int,
    neuron_index: int,
    *,
    tokenizer: Any = None,
    k: int = 10,
    window: int = 15,
    batch_size: int = 16,
    max_length: int = 128,
) -> NeuronActivations:
    """Where a neuron fires: the check of a label that was read from weights alone.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        texts: texts, or token ids.
        layer, neuron_index: which neuron.
        tokenizer: needed for texts; names the words.
        k, window: texts kept, and tokens shown on either side of the most active one.
        batch_size, max_length: texts at a time, and tokens of each at most.
    """
    feature = neuron(model, f"layers.{layer}.mlp.neuron.{neuron_index}")
    batches = list(token_batches(texts, tokenizer, batch_size=batch_size, max_length=max_length))
    examples = feature.top_examples(model, batches, k, window)
    values, tokens = [], []
    for ids, mask in batches:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        values.append(feature.activations(model, ids, mask)[real].cpu())
        tokens.append(ids[real].cpu())
    ids = torch.cat(tokens)
    names = None if tokenizer is None else vocabulary_words(tokenizer, max(len(tokenizer), int(ids.max()) + 1))
    return NeuronActivations(feature, examples, torch.cat(values), ids, names)
