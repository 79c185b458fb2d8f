"""Precision and recall of codes: for a pattern in the text, and for a label of every token."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.cards import token_texts
from broadsheet.nn.plotting import COLOURS, new_axes, style


@dataclass(frozen=True)
class CodeMatches:
    """Codes that are chosen where a pattern stands.

    Attributes:
        table: columns ``site``, ``code``, ``precision`` (share of the code's uses in the pattern), ``recall`` (share of
            the pattern's tokens with the code), ``f1``, ``count`` (its uses); the best F1 first.
        matches: tokens of the pattern.
        tokens: tokens in all.
    """

    table: pd.DataFrame
    matches: int
    tokens: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def best(self) -> tuple[str, int]:
        """Codebook and code with the highest F1.

        Raises:
            InvalidInput: no code came through.
        """
        if not len(self.table):
            raise InvalidInput(
                f"no code is precise enough for this pattern ({self.matches} of {self.tokens} tokens): lower "
                "min_precision"
            )
        row = self.table.iloc[0]
        return str(row["site"]), int(row["code"])

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def plot(self, ax: Any = None) -> Any:
        """Precision against recall, one dot for each code, its area the number of uses."""
        with style():
            ax = new_axes(ax, figsize=(4.6, 4.0))
            size = 8 + 60 * (self.table["count"] / max(1, self.matches)).clip(upper=4)
            ax.scatter(self.table["recall"], self.table["precision"], s=size, color=COLOURS["ours"], alpha=0.6, lw=0)
            ax.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="recall", ylabel="precision")
        return ax


@dataclass(frozen=True)
class LabelScores:
    """For every label the one unit (code or neuron) that finds its tokens best.

    Attributes:
        f1, precision, recall: site -> ``[labels]``, of the unit with the best F1.
        unit: site -> ``[labels]``: its number.
    """

    f1: dict[str, Float[Tensor, " labels"]]
    precision: dict[str, Float[Tensor, " labels"]]
    recall: dict[str, Float[Tensor, " labels"]]
    unit: dict[str, Int[Tensor, " labels"]]

    def mean(self, site: str) -> float:
        """Mean best F1 over labels at one site."""
        return float(self.f1[site].mean())

    @property
    def best(self) -> Float[Tensor, " labels"]:
        """The best F1 of any site, for every label."""
        return torch.stack(list(self.f1.values())).amax(0)

    def to_frame(self) -> pd.DataFrame:
        """One row for each site and label."""
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "site": site,
                        "label": range(len(self.f1[site])),
                        "unit": self.unit[site].tolist(),
                        "precision": self.precision[site].tolist(),
                        "recall": self.recall[site].tolist(),
                        "f1": self.f1[site].tolist(),
                    }
                )
                for site in self.f1
            ],
            ignore_index=True,
        )


def pattern_mask(token_ids: Tensor, text: Tensor, pattern: Any, tokenizer: Any, where: str = "overlap") -> Tensor:
    """The tokens that a pattern means.

    Args:
        token_ids, text: ``[tokens]``: what each is, and in which text; texts stand one after the other.
        pattern: a regular expression, token ids, or a boolean tensor ``[tokens]``.
        tokenizer: turns ids into text; for a regular expression.
        where: ``"overlap"`` or ``"end"``.

    Raises:
        InvalidInput: nothing matches, or the pattern cannot be applied.
    """
    if where not in ("overlap", "end"):
        raise InvalidInput(f"where={where!r}: expected 'overlap' or 'end'")
    if isinstance(pattern, str | re.Pattern):
        if tokenizer is None:
            raise InvalidInput(
                f"pattern {str(pattern)!r} is a regular expression: the index needs a tokenizer to apply it"
            )
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InvalidInput(f"pattern {pattern!r} is no regular expression: {error}") from None
        mask = torch.zeros(len(token_ids), dtype=torch.bool)
        starts = torch.cat([torch.tensor([True]), text[1:] != text[:-1]]).nonzero().flatten().tolist()
        for first, last in zip(starts, [*starts[1:], len(text)], strict=True):
            mask[first:last] = _spans(token_ids[first:last].tolist(), compiled, tokenizer, where)
        shown = compiled.pattern
    elif isinstance(pattern, Tensor):
        if pattern.dtype != torch.bool or pattern.shape != token_ids.shape:
            raise InvalidInput(
                f"the token mask is {pattern.dtype} of shape {tuple(pattern.shape)}: a boolean one of "
                f"{tuple(token_ids.shape)} is needed"
            )
        mask, shown = pattern.cpu(), "the token mask"
    else:
        wanted = [int(token) for token in pattern]
        mask, shown = torch.isin(token_ids, torch.tensor(wanted, dtype=token_ids.dtype)), f"the {len(wanted)} token ids"
    if not bool(mask.any()):
        raise InvalidInput(f"{shown!r} matches none of {len(token_ids)} tokens: check the pattern, or read more texts")
    return mask


def _spans(ids: list[int], pattern: re.Pattern[str], tokenizer: Any, where: str) -> Tensor:
    pieces = token_texts(ids, tokenizer)
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    begins = ends - torch.tensor([len(piece) for piece in pieces])
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for match in pattern.finditer("".join(pieces)):
        if match.end() == match.start():
            continue
        first = match.end() - 1 if where == "end" else match.start()
        mask |= (begins < match.end()) & (ends > first)
    return mask


def find_codes(
    codes: Mapping[str, Tensor],
    num_codes: Mapping[str, int],
    mask: Tensor,
    min_precision: float | int,
    min_recall: float | int,
) -> CodeMatches:
    """Precision and recall of every code of some codebooks for a set of tokens; arguments as in ``search_codes``."""
    for name, value in {"min_precision": min_precision, "min_recall": min_recall}.items():
        if not 0 <= value <= 1:
            raise InvalidInput(f"{name}={value}: expected 0 to 1")
    tables = []
    total = int(mask.sum())
    for site, ids in codes.items():
        n = num_codes[site]
        count = ids.flatten().bincount(minlength=n)
        hits = ids[mask].flatten().bincount(minlength=n)
        precision = hits / count.clamp_min(1)
        recall = hits / total
        kept = ((precision >= min_precision) & (recall > min_recall) & (hits > 0)).nonzero().flatten()
        tables.append(
            pd.DataFrame(
                {
                    "site": site,
                    "code": kept.tolist(),
                    "precision": precision[kept].tolist(),
                    "recall": recall[kept].tolist(),
                    "f1": (2 * hits / (count + total))[kept].tolist(),
                    "count": count[kept].tolist(),
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    order = ["f1", "precision", "site", "code"]
    table = table.sort_values(order, ascending=[False, False, True, True], ignore_index=True)
    return CodeMatches(table, total, len(mask))


def code_label_scores(codes: Mapping[str, Tensor], num_codes: Mapping[str, int], labels: Tensor) -> LabelScores:
    """For every label the code with the best F1; arguments as in ``CodeIndex.label_scores``."""
    n_labels = check_labels(labels)
    total = labels[labels >= 0].bincount(minlength=n_labels)
    out: dict[str, tuple[Tensor, ...]] = {}
    for site, ids in codes.items():
        n, k = num_codes[site], ids.shape[1]
        count = ids.flatten().bincount(minlength=n)
        kept = labels >= 0
        pair = ids[kept].flatten() * n_labels + labels[kept].repeat_interleave(k)
        hits = pair.bincount(minlength=n * n_labels).view(n, n_labels)
        f1 = 2 * hits / (count[:, None] + total).clamp_min(1)
        best, unit = f1.max(0)
        mine = hits.gather(0, unit[None])[0]
        out[site] = (best, mine / count[unit].clamp_min(1), mine / total.clamp_min(1), unit)
    return LabelScores(*({site: values[i] for site, values in out.items()} for i in range(4)))


def check_labels(labels: Tensor) -> int:
    """The number of labels."""
    if labels.is_floating_point() or labels.ndim != 1 or not bool((labels >= 0).any()):
        raise InvalidInput(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: whole numbers [tokens], some of them at least "
            "0, are expected"
        )
    return int(labels.max()) + 1
