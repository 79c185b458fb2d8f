"""The static baseline: find the hidden unit whose weights point at a token, and turn it up.

The score reads weights only: ``W_eff = W_up * sigmoid(W_gate)``, elementwise, each unit's row put through the output
matrix. The model itself never computes this (its gate acts on activations, ``silu(x W_gate) * x W_up``); the score is
kept as described.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.pairs import token_ids_of
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import unembedding
from broadsheet.nn.hooks import replace


@dataclass(frozen=True)
class NeuronScores:
    """How much more than others a hidden unit's weights point at a token.

    Attributes:
        target: ``[layers, units]``, probability of the target tokens, P_t.
        score: ``[layers, units]``, P_t over the mean of the ``k`` largest probabilities, A_N; minus infinity where a
            layer has fewer units.
        token_ids: the target tokens.
        gated: False: the MLPs have no gate, and units are judged by what they write.
    """

    target: Float[Tensor, "layers units"]
    score: Float[Tensor, "layers units"]
    token_ids: tuple[int, ...]
    gated: bool

    def top(self, n: int = 10) -> list[tuple[int, int]]:
        """(layer, unit), the highest score first."""
        order = self.score.flatten().topk(min(n, int(self.score.isfinite().sum()))).indices
        return [divmod(int(i), self.score.shape[1]) for i in order]

    def to_frame(self, n: int = 20) -> pd.DataFrame:
        """Columns ``layer``, ``neuron``, ``P_t``, ``A_N``, the highest score first."""
        rows = [
            (layer, unit, float(self.target[layer, unit]), float(self.score[layer, unit]))
            for layer, unit in self.top(n)
        ]
        return pd.DataFrame(rows, columns=["layer", "neuron", "P_t", "A_N"])


@torch.no_grad()
def neuron_attribution(
    model: nn.Module,
    tokenizer: Any,
    target_tokens: Sequence[str] | Sequence[int],
    k: int = 10,
    *,
    norm: bool = False,
    chunk: int = 256,
) -> NeuronScores:
    """Score every hidden unit by how its weights point at the target tokens.

    Args:
        model: a causal language model of a supported family.
        tokenizer: from text to ids; None where ids are given.
        target_tokens: the wanted word, as text (with and without a space before it; probabilities are summed) or ids.
        k: how many of the largest probabilities are averaged.
        norm: put the rows through the final norm first.
        chunk: units at once.

    Raises:
        InvalidInput: a text that is no single token, with its tokenisations; a ``k`` larger than the vocabulary.
        UnsupportedModel: no head of one matrix.
    """
    the_map = block_map(model)
    head = unembedding(the_map)
    vocab = head.weight.shape[1]
    ids = single_tokens(tokenizer, target_tokens, vocab)
    if not 1 <= k <= vocab:
        raise InvalidInput(f"k={k}: the vocabulary has {vocab} tokens")
    targets, scores, gated = [], [], True
    for block in the_map.blocks:
        if block.mlp is None:
            targets.append(head.weight.new_zeros(0, dtype=torch.float32))
            scores.append(targets[-1])
            continue
        if block.mlp.w_gate is None:
            rows, gated = block.mlp.w_out.weight, False
        else:
            rows = (block.mlp.w_in.weight * torch.sigmoid(block.mlp.w_gate.weight)).T
        if rows.shape[1] != head.weight.shape[0]:
            raise InvalidInput(f"units of {rows.shape[1]} weights, an output matrix of {head.weight.shape[0]}")
        found = [_probabilities(part, the_map, head, norm, ids, k) for part in rows.split(chunk)]
        targets.append(torch.cat([p for p, _ in found]))
        scores.append(torch.cat([p / average for p, average in found]))
    units = max(map(len, scores))
    padded = [
        torch.stack([nn.functional.pad(row, (0, units - len(row)), value=empty) for row in table])
        for table, empty in ((targets, 0.0), (scores, -torch.inf))
    ]
    return NeuronScores(padded[0], padded[1], tuple(ids), gated)


def _probabilities(rows: Tensor, the_map: Any, head: Any, norm: bool, ids: list[int], k: int) -> tuple[Tensor, Tensor]:
    x = the_map.final_norm(rows) if norm and the_map.final_norm is not None else rows
    p = head(x).float().softmax(-1)
    return p[:, ids].sum(-1).cpu(), p.topk(k).values.mean(-1).cpu()


def single_tokens(tokenizer: Any, targets: Sequence[str] | Sequence[int], vocab: int) -> list[int]:
    """Ids of words that are one token each, with and without a space before them.

    Args:
        tokenizer: from text to ids; its special tokens do not count.
        targets: texts or ids.
        vocab: size of the vocabulary.
    """
    if isinstance(targets, str) or not len(targets):
        raise InvalidInput(f"target_tokens={targets!r}: expected a non-empty list of texts or ids")
    found: list[int] = []
    for target in targets:
        if not isinstance(target, str):
            if not 0 <= int(target) < vocab:
                raise InvalidInput(f"token {target}: the vocabulary has {vocab} tokens (0 to {vocab - 1})")
            found.append(int(target))
            continue
        if tokenizer is None:
            raise InvalidInput(f"target_tokens holds the text {target!r}: hand in the model's tokenizer")
        tried = {}
        for text in (target, f" {target}"):
            tried[text] = _bare(tokenizer, text)
        single = [ids[0] for ids in tried.values() if len(ids) == 1]
        if not single:
            shown = "; ".join(f"{text!r} -> {ids}" for text, ids in tried.items())
            raise InvalidInput(
                f"{target!r} is no single token: {shown}. Hand in the id of the part that tells it apart"
            )
        found += single
    return list(dict.fromkeys(found))


def _bare(tokenizer: Any, text: str) -> list[int]:
    if hasattr(tokenizer, "encode"):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return token_ids_of(tokenizer)(text)


@contextmanager
def scale_neuron(model: nn.Module, layer: int, unit: int, factor: float | Tensor) -> Iterator[nn.Module]:
    """A hidden unit's activation times a factor, inside the block.

    The activation is linear in the unit's row of ``W_up``, and what it writes in its row of the output matrix: scaling
    it is scaling either. Quantized weights are left as they are.

    Args:
        model: of a supported family.
        layer, unit: which.
        factor: 1 changes nothing; ``[batch]`` for one of each row.
    """
    site = block_map(model).resolve(f"layers.{layer}.mlp.neuron.{unit}")
    if not isinstance(factor, Tensor) and factor == 1:
        yield model
        return
    scale = factor.reshape(-1, 1, 1) if isinstance(factor, Tensor) else factor
    with replace(model, {site: lambda x: x * (scale.to(x) if isinstance(scale, Tensor) else scale)}):
        yield model
