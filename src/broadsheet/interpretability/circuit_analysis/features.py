"""Which feature do letter heads go by: the label's token, or its place in the list?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.skill import decoder_map
from broadsheet.interpretability.circuit_analysis.substitution import (
    Score,
    Substitution,
    at_least_two,
    collect,
    named_heads,
)
from broadsheet.nn.blocks import BlockMap

FEATURES = ("nth_item", "token")


@dataclass(frozen=True)
class Centroids:
    """The mean of all queries, keys or values that share a feature.

    Attributes:
        feature: ``"nth_item"`` or ``"token"``.
        part: ``"q"``, ``"k"`` or ``"v"``.
        values: ``[class, d]``.
        classes: ``[class]``, item numbers or token ids.
        mean: ``[d]``, over the classes; stands for a class that was not seen.
    """

    feature: str
    part: str
    values: Float[Tensor, "classes d"]
    classes: Int[Tensor, " classes"]
    mean: Float[Tensor, " d"]

    def __call__(self, x: Tensor, batch: ChoiceBatch) -> Tensor:
        """The centroids of the prompts' classes, in the place of ``x``."""
        wanted = _classes(self.feature, self.part, batch).to(self.classes.device)
        same = wanted[..., None] == self.classes  # [batch, class] or [batch, item, class]
        known = same.any(-1, keepdim=True)
        return torch.where(known, self.values[same.int().argmax(-1)], self.mean).to(x)

    def cosine(self, other: "Centroids") -> Float[Tensor, " classes"]:
        """How alike the centroids of classes that both hold are, each less its own mean.

        Args:
            other: of the same head and part, from other prompts.
        """
        common = (self.classes[:, None] == other.classes).nonzero()
        if not len(common):
            raise InvalidInput("the centroids share no class: compare prompts whose labels or items are the same")
        a, b = self.values[common[:, 0]] - self.mean, other.values[common[:, 1]] - other.mean
        return nn.functional.cosine_similarity(a, b, dim=-1)


@dataclass(frozen=True)
class FeatureTest:
    """How far one feature explains what letter heads do.

    Attributes:
        feature: ``"nth_item"`` or ``"token"``.
        full: the model as it is.
        replaced: queries and keys replaced by the centroids of their class.
        none: all replaced by one mean, so that the heads know nothing.
    """

    feature: str
    full: Score
    replaced: Score
    none: Score

    @property
    def recovered(self) -> float:
        """Share of the loss that knowing nothing costs which the centroids win back; NaN where it costs nothing."""
        cost = self.none.loss - self.full.loss
        return (self.none.loss - self.replaced.loss) / cost if cost > 1e-3 else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """One row for each: full, replaced, none."""
        rows = [(name, s.accuracy, s.loss, s.attention) for name, s in vars(self).items() if isinstance(s, Score)]
        return pd.DataFrame(rows, columns=["run", "accuracy", "loss", "attention"])


def _classes(feature: str, part: str, batch: ChoiceBatch) -> Tensor:
    """The class of every query ``[batch]``, or of every key ``[batch, item]``."""
    if feature == "nth_item":
        return batch.answer if part == "q" else torch.arange(batch.n_items).expand(len(batch), -1)
    tokens = batch.label_tokens
    return tokens[batch.rows, batch.answer] if part == "q" else tokens


@torch.no_grad()
def centroids(
    model: nn.Module | BlockMap, heads: Sequence[str], batch: ChoiceBatch, feature: str, parts: str = "qk"
) -> dict[tuple[int, int, str], Centroids]:
    """Mean queries and keys of every class.

    Args:
        model: any mapped decoder.
        heads: names such as ``"layers.3.attn.head.5"``.
        batch: the prompts that they are taken from.
        feature: ``"nth_item"`` (first, second, ... label of the list; queries: the right one) or ``"token"`` (which
            label it is).
        parts: some of ``q``, ``k``, ``v``.
    """
    if feature not in FEATURES or not parts or set(parts) - set("qkv"):
        raise InvalidInput(f"feature={feature!r}, parts={parts!r}: expected one of {FEATURES}, and some of 'qkv'")
    samples, found = collect(model, heads, batch), {}
    for layer, head in samples.q:
        for part in dict.fromkeys(parts):
            x = getattr(samples, part)[layer, head]
            of = _classes(feature, part, batch).to(x.device).expand(x.shape[:-1])
            classes, index = of.unique(return_inverse=True)
            sums = x.new_zeros(len(classes), x.shape[-1]).index_add_(0, index.flatten(), x.flatten(0, -2))
            values = sums / torch.bincount(index.flatten(), minlength=len(classes))[:, None]
            found[layer, head, part] = Centroids(feature, part, values, classes, values.mean(0))
    return found


@torch.no_grad()
def feature_test(
    model: nn.Module | BlockMap,
    heads: Sequence[str],
    feature: str,
    batch: ChoiceBatch,
    fit: ChoiceBatch | None = None,
    parts: str = "qk",
) -> FeatureTest:
    """Replace queries and keys by the centroids of one feature and see how much of the skill is left.

    Ordinary prompts cannot tell the two features apart: the second item is always B. Shuffled labels can, and so can
    random ones.

    Args:
        model: any mapped decoder.
        heads: all letter heads together; one alone is masked by the others.
        feature: ``"nth_item"`` or ``"token"``.
        batch: the prompts to test on.
        fit: prompts that the centroids are taken from, at least two for every right item; None for ``batch`` itself. A
            label that is not among them gets the mean of all.
        parts: some of ``q``, ``k``, ``v``.
    """
    the_map = decoder_map(model)
    named_heads(the_map, heads)
    source = batch if fit is None else fit
    at_least_two(source)
    found = centroids(the_map, heads, source, feature, parts)
    test = Substitution(the_map, dict(found))
    nothing = {key: _Mean(c.mean) for key, c in found.items()}
    return FeatureTest(
        feature,
        test.evaluate(batch, compressed=False),
        test.evaluate(batch),
        Substitution(the_map, nothing).evaluate(batch),
    )


@dataclass(frozen=True)
class _Mean:
    value: Tensor

    def __call__(self, x: Tensor, batch: ChoiceBatch) -> Tensor:
        return self.value.to(x).expand_as(x)


def compare_features(
    model: nn.Module | BlockMap,
    heads: Sequence[str],
    tests: Mapping[str, ChoiceBatch],
    fits: Mapping[str, ChoiceBatch] | None = None,
    parts: str = "qk",
) -> pd.DataFrame:
    """Both features on prompts of several kinds.

    Args:
        model, heads, parts: as in :func:`feature_test`.
        tests: name -> prompts.
        fits: name -> prompts that centroids are taken from; None for the tests' own.

    Returns:
        columns ``prompts``, ``feature``, ``accuracy``, ``loss``, ``recovered`` and ``full`` (accuracy of the model).
    """
    rows: list[tuple[Any, ...]] = []
    for kind, batch in tests.items():
        for feature in FEATURES:
            found = feature_test(model, heads, feature, batch, None if fits is None else fits[kind], parts)
            rows.append(
                (kind, feature, found.replaced.accuracy, found.replaced.loss, found.recovered, found.full.accuracy)
            )
    return pd.DataFrame(rows, columns=["prompts", "feature", "accuracy", "loss", "recovered", "full"])
