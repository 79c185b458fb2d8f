"""What heads look at from the final token, and the kinds of heads that this tells apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.skill import decoder_map, warn_at_chance
from broadsheet.nn.attribution import Attribution, parse_node, place_of
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded

KINDS = ("correct_letter", "uniform", "single_letter", "amplification", "other")


@dataclass(frozen=True)
class AttentionTable:
    """Attention of the final token, ``[batch, layer, head, ...]``.

    Attributes:
        rows: to every token, in the columns of the prompts as they came.
        labels: to every item's label.
        content: to every item's text (0 where the spans are unknown).
        last: to the last three tokens together.
        batch: the prompts.
    """

    rows: Float[Tensor, "batch layers heads time"]
    labels: Float[Tensor, "batch layers heads n"]
    content: Float[Tensor, "batch layers heads n"]
    last: Float[Tensor, "batch layers heads"]
    batch: ChoiceBatch

    @property
    def right_label(self) -> Float[Tensor, "layers heads"]:
        """Mean attention to the right answer's label."""
        return self.labels[self.batch.rows, :, :, self.batch.answer].mean(0)

    @property
    def right_content(self) -> Float[Tensor, "layers heads"]:
        """Mean attention to the right answer's text: heads that gather what the label heads then look for."""
        return self.content[self.batch.rows, :, :, self.batch.answer].mean(0)

    def by_answer(self, head: str) -> Float[Tensor, "n n"]:
        """A head's mean attention to every item's label (columns), for every right item (rows; NaN where none is)."""
        layer, index = parse_node(head)
        if index is None:
            raise InvalidInput(f"head={head!r}: an MLP has no attention")
        labels, n = self.labels[:, layer, index], self.batch.n_items
        return torch.stack([labels[self.batch.answer == i].mean(0) for i in range(n)])

    def to_frame(self) -> pd.DataFrame:
        """One row for each head: mean attention to right label, all labels, right text and last tokens."""
        _, layers, heads = self.last.shape
        names = [f"layers.{layer}.attn.head.{head}" for layer in range(layers) for head in range(heads)]
        columns = {
            "right_label": self.right_label, "labels": self.labels.sum(-1).mean(0),
            "right_content": self.right_content, "last": self.last.mean(0),
        }  # fmt: skip
        return pd.DataFrame({"head": names, **{name: x.flatten().cpu().tolist() for name, x in columns.items()}})

    def plot(self, heads: Sequence[str], prompt: int = 0, tokens: Sequence[str] | None = None, ax: Any = None) -> Any:
        """Attention maps: one row for each head, one column for each token of a prompt.

        Args:
            heads: names such as ``"layers.3.attn.head.5"``.
            prompt: which prompt.
            tokens: the prompt's tokens as text; None for their ids.
            ax: matplotlib axes.
        """
        from broadsheet.interpretability.circuit_analysis.figures import attention_maps

        return attention_maps(self, heads, prompt, tokens, ax)


@torch.no_grad()
def attention_table(model: nn.Module | BlockMap, batch: ChoiceBatch) -> AttentionTable:
    """Attention from the final token, recomputed from queries and keys: any attention kernel will do.

    Args:
        model: any mapped decoder.
        batch: the prompts.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    the_map = decoder_map(model)
    padded = right_padded(batch.input_ids, batch.attention_mask)
    at, n = place_of(padded, batch.final_pos), len(batch)
    time = padded.input_ids.shape[1]
    found: dict[int, Tensor] = {}

    def keep(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "pattern":
            found[layer] = x[batch.rows, :, at]
        return x

    with evaluating(the_map.model):
        logits = the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    warn_at_chance(logits[batch.rows, at].gather(1, batch.answers), batch)
    first = next(iter(found.values()))
    rows = first.new_zeros(n, the_map.n_layers, the_map.n_heads, time)
    for layer, x in found.items():
        rows[:, layer, : x.shape[1]] = x
    rows = padded.restore(rows.movedim(-1, 1)).movedim(1, -1)
    where = batch.label_pos[:, None, None].expand(-1, *rows.shape[1:3], -1)
    labels = rows.gather(-1, where)
    column = torch.arange(time, device=rows.device)
    content = torch.zeros_like(labels)
    if batch.content_span is not None:
        low, high = batch.content_span.unbind(-1)
        inside = ((column >= low[..., None]) & (column < high[..., None])).to(rows)
        content = torch.einsum("blht,bnt->blhn", rows, inside)
    end = at + padded.offset
    near = ((column <= end[:, None]) & (column > end[:, None] - 3)).to(rows)
    return AttentionTable(rows, labels, content, torch.einsum("blht,bt->blh", rows, near), batch)


@dataclass(frozen=True)
class HeadCategories:
    """The kind of every head and the scores that it rests on, ``[layer, head]``.

    Attributes:
        kind: index into :data:`KINDS`.
        excess: attention to the right label above the mean over the labels.
        mass: attention to all labels.
        entropy: of the attention among labels, over its largest possible value.
        single: largest share of the label mass that one item gets over all prompts.
        conditional: share of the label mass that its favourite item gets when it is right, less the most that another
            one gets when that is right ("looks at B where B is right").
        last: attention to the last three tokens.
        content: attention to the right item's text above the mean over the items.
    """

    kind: Int[Tensor, "layers heads"]
    excess: Float[Tensor, "layers heads"]
    mass: Float[Tensor, "layers heads"]
    entropy: Float[Tensor, "layers heads"]
    single: Float[Tensor, "layers heads"]
    conditional: Float[Tensor, "layers heads"]
    last: Float[Tensor, "layers heads"]
    content: Float[Tensor, "layers heads"]

    def named(self, kind: str) -> list[str]:
        """Names of the heads of one kind."""
        if kind not in KINDS:
            raise InvalidInput(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
        found = (self.kind == KINDS.index(kind)).nonzero().tolist()
        return [f"layers.{layer}.attn.head.{head}" for layer, head in found]

    def to_frame(self) -> pd.DataFrame:
        """One row for each head, with its kind and scores."""
        layers, heads = self.kind.shape
        names = [f"layers.{layer}.attn.head.{head}" for layer in range(layers) for head in range(heads)]
        scores = ("excess", "mass", "entropy", "single", "conditional", "last", "content")
        return pd.DataFrame(
            {
                "head": names,
                "kind": [KINDS[i] for i in self.kind.flatten().tolist()],
                **{name: getattr(self, name).flatten().cpu().tolist() for name in scores},
            }
        )

    def plot(self, ax: Any = None) -> Any:
        """Layers by heads, coloured by kind, with the excess attention to the right label written in."""
        from broadsheet.interpretability.circuit_analysis.figures import kinds_map

        return kinds_map(self, ax)


def categorise_heads(table: AttentionTable, shares: Attribution | None = None) -> HeadCategories:
    """Sort heads by what their final token looks at; the first kind that fits. The thresholds are ours.

    Correct letter: at least 0.3 more on the right label than on labels on average. Uniform: half of the attention on
    labels, with normalized entropy 0.9. Single letter: one item has 0.6 of the label mass, always or only where it is
    right. Amplification: 0.6 on the last three tokens, and a positive direct effect.

    Args:
        table: of the prompts.
        shares: of the same prompts; amplification heads need a positive direct effect. None: it is not asked for.
    """
    labels, answer = table.labels, table.batch.answer
    n = labels.shape[-1]
    mass = labels.sum(-1)
    among = labels / mass.clamp_min(1e-12)[..., None]
    entropy = (torch.special.entr(among).sum(-1) / math.log(n)).mean(0)
    excess = table.right_label - labels.mean((0, -1))
    pooled = labels.mean(0)
    single = (pooled / pooled.sum(-1, keepdim=True).clamp_min(1e-12)).amax(-1)
    # "Looks at B where B is right": one item's attention when it is the right one, none of the others' when they are.
    share_right = among[table.batch.rows, :, :, answer]  # [batch, layer, head]
    when = torch.stack(
        [share_right[answer == i].mean(0) if bool((answer == i).any()) else 0 * single for i in range(n)]
    )
    best = when.topk(2, 0).values
    conditional = (best[0] >= 0.6) & (best[1] < 0.6)
    helps = torch.ones_like(single, dtype=torch.bool) if shares is None else shares.direct_effect > 0
    average = mass.mean(0)
    kind = torch.full_like(single, KINDS.index("other"), dtype=torch.long)
    kind[(table.last.mean(0) >= 0.6) & helps] = KINDS.index("amplification")
    kind[((single >= 0.6) | conditional) & (average >= 0.3)] = KINDS.index("single_letter")
    kind[(average >= 0.5) & (entropy >= 0.9)] = KINDS.index("uniform")
    kind[(excess >= 0.3) & ~((single >= 0.6) | conditional)] = KINDS.index("correct_letter")
    content = table.right_content - table.content.mean((0, -1))
    return HeadCategories(kind, excess, average, entropy, single, best[0] - best[1], table.last.mean(0), content)
