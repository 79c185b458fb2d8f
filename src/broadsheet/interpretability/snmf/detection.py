"""Does a feature tell a concept from neutral text? And the direction that labels alone give: a difference of means."""

import warnings
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.snmf.concepts import Texts, as_batches
from broadsheet.nn.activations import stream_activations
from broadsheet.nn.features import Feature

LEAST = 1e-6  # means are held above this: below 0 there is no logarithm


class ClampedDetection(UserWarning):
    """A mean cosine is not above 0, so that the logarithm of the ratio is that of a bound."""


@dataclass(frozen=True)
class Detection:
    """How much more a feature shows in texts about its concept than in neutral ones.

    Attributes:
        activating, neutral: for each text, the largest cosine between the activation at a token and the feature.
    """

    activating: Float[Tensor, " a"]
    neutral: Float[Tensor, " b"]

    @property
    def clamped(self) -> bool:
        """Whether a mean was not above 0."""
        return bool(min(float(self.activating.mean()), float(self.neutral.mean())) < LEAST)

    @property
    def score(self) -> float:
        """Logarithm of the ratio of the means, the paper's; of little use where :attr:`clamped`."""
        means = [x.double().mean().clamp_min(LEAST) for x in (self.activating, self.neutral)]
        return float((means[0] / means[1]).log())

    @property
    def auc(self) -> float:
        """Share of pairs of an activating and a neutral text in which the first has the larger cosine."""
        difference = self.activating[:, None] - self.neutral
        return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)

    def to_frame(self) -> pd.DataFrame:
        """One row for each text: which kind it is, and its cosine."""
        kinds = ["activating"] * len(self.activating) + ["neutral"] * len(self.neutral)
        return pd.DataFrame({"kind": kinds, "cosine": torch.cat([self.activating, self.neutral]).tolist()})


def concept_detection(
    model: nn.Module,
    feature: Feature,
    activating: Texts,
    neutral: Texts,
    tokenizer: Any = None,
    *,
    skip_first: bool = True,
) -> Detection:
    """Score a feature on texts about a concept and on neutral ones (arXiv:2506.10920, section 4).

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        feature: from whatever method, at whatever place.
        activating, neutral: at least two texts each: strings, lists of ids, or batches.
        tokenizer: for strings.
        skip_first: leave out each text's first token.

    Raises:
        InvalidInput: fewer than two texts on a side, or a text without any token that counts.

    Warns:
        ClampedDetection: a mean cosine is not above 0.
    """
    sides = []
    for name, texts in {"activating": activating, "neutral": neutral}.items():
        best: list[Tensor] = []
        begun = 0
        for ids, mask in as_batches(texts, tokenizer):
            part = next(iter(stream_activations(model, feature.site, [(ids, mask)], skip_first=skip_first)))
            unit = feature.unit.to(part.values)
            cosine = part.values @ unit / part.values.norm(dim=-1).clamp_min(torch.finfo(unit.dtype).tiny)
            top = torch.full((len(ids),), -torch.inf, dtype=cosine.dtype, device=cosine.device)
            top = top.scatter_reduce(0, part.text, cosine, "amax")
            if not bool(top.isfinite().all()):
                empty = begun + int((~top.isfinite()).nonzero()[0])
                raise InvalidInput(f"{name} text {empty} holds no token that counts: it is BOS or padding only")
            best.append(top.float().cpu())
            begun += len(ids)
        if begun < 2:
            raise InvalidInput(f"{begun} {name} text: at least two are needed on either side")
        sides.append(torch.cat(best))
    found = Detection(*sides)
    if found.clamped:
        warnings.warn(
            f"{feature.name or feature.site}: a mean cosine is not above 0 (activating "
            f"{float(found.activating.mean()):.3g}, neutral {float(found.neutral.mean()):.3g}); {LEAST:g} is taken",
            ClampedDetection,
            stacklevel=2,
        )
    return found


def difference_of_means(
    model: nn.Module,
    site: str,
    activating: Texts,
    neutral: Texts,
    tokenizer: Any = None,
    *,
    skip_first: bool = True,
) -> Feature:
    """The direction from neutral tokens' mean activation to that of tokens about a concept: needs labels, no training.

    Args:
        model, activating, neutral, tokenizer, skip_first: as in :func:`concept_detection`.
        site: the component's name.
    """
    means = []
    for texts in (activating, neutral):
        total, n = torch.zeros(1, dtype=torch.float64), 0
        for part in stream_activations(model, site, as_batches(texts, tokenizer), skip_first=skip_first):
            total, n = total + part.values.double().sum(0).cpu(), n + len(part)
        if n == 0:
            raise InvalidInput("no token counts: texts are BOS or padding only")
        means.append(total / n)
    difference = means[0] - means[1]
    weight = next(model.parameters())
    return Feature(site, (difference / difference.norm()).to(weight), name="difference of means")
