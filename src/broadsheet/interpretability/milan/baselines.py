"""What to hold MILAN against: labels from lists of concepts, one sentence for all units, the nearest annotated unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.encoders import VectorExemplars
from broadsheet.interpretability.milan.metrics import bleu


@dataclass(frozen=True)
class Label:
    """A formula over concepts and how well it covers where a unit is active.

    Attributes:
        formula: such as ``"((red and circle) and not striped)"``.
        iou: intersection over union of the unit's active places and the formula's.
        concepts: those that stand in it without a *not*.
        without: those that stand behind a *not*.
    """

    formula: str
    iou: float
    concepts: tuple[str, ...]
    without: tuple[str, ...] = ()


def intersection_over_union(
    active: Bool[Tensor, "units *places"], concepts: Bool[Tensor, "concepts *places"]
) -> Float[Tensor, "units concepts"]:
    """Of every unit's active places with every concept's.

    Args:
        active: where each unit is above its level, over all pictures, on any grid.
        concepts: where each concept is, on the same grid.

    Raises:
        InvalidInput: other grids.
    """
    if active.shape[1:] != concepts.shape[1:]:
        raise InvalidInput(
            f"units on {tuple(active.shape[1:])} places, concepts on {tuple(concepts.shape[1:])}: the same are needed"
        )
    a, c = active.flatten(1).float(), concepts.flatten(1).float()
    both = a @ c.T
    union = a.sum(1)[:, None] + c.sum(1) - both
    return both / union.clamp_min(1)


def net_dissect(active: Bool[Tensor, "units *places"], concepts: Mapping[str, Bool[Tensor, "..."]]) -> list[Label]:
    """The single concept that covers each unit best (network dissection, Bau et al., 2017).

    Args:
        active: where each unit is above its level: on all pictures (as that method does), or on its exemplars.
        concepts: name -> where it is, on the same places.
    """
    names, table = _stacked(concepts)
    iou = intersection_over_union(active, table)
    best = iou.max(1)
    return [
        Label(names[int(i)], float(value), (names[int(i)],)) for value, i in zip(best.values, best.indices, strict=True)
    ]


def compositional(
    active: Bool[Tensor, "units *places"],
    concepts: Mapping[str, Bool[Tensor, "..."]],
    *,
    length: int = 3,
    beam: int = 5,
) -> list[Label]:
    """The formula of *and*, *or* and *and not* that covers each unit best (Mu and Andreas, 2020).

    A beam search: from the best single concepts, one concept is joined on at each step.

    Args:
        active, concepts: as in :func:`net_dissect`.
        length: concepts in a formula at most.
        beam: formulas kept at each step.
    """
    if length < 1 or beam < 1:
        raise InvalidInput(f"length={length}, beam={beam}: must be at least 1")
    names, table = _stacked(concepts)
    _ = intersection_over_union(active[:1], table)  # refuses other grids
    c = table.flatten(1).float()
    sizes = c.sum(1)
    labels = []
    for unit in active.flatten(1).float():
        own, with_unit = float(unit.sum()), c @ unit
        iou = with_unit / (own + sizes - with_unit).clamp_min(1)
        first = iou.topk(min(beam, len(names))).indices.tolist()
        kept = [(float(iou[i]), names[i], (names[i],), (), c[i]) for i in first]
        found = list(kept)
        for _ in range(length - 1):
            masks = torch.stack([entry[4] for entry in kept])
            size, hit = masks.sum(1)[:, None], (masks @ unit)[:, None]
            both, both_hit = masks @ c.T, (masks * unit) @ c.T
            options = {
                "and": (both_hit, both),
                "or": (hit + with_unit - both_hit, size + sizes - both),
                "and not": (hit - both_hit, size - both),
            }
            values = torch.stack([inside / (own + total - inside).clamp_min(1) for inside, total in options.values()])
            best = values.flatten().topk(min(beam, values.numel()))
            grown = []
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                which, rest = divmod(place, len(kept) * len(names))
                row, column = divmod(rest, len(names))
                _, formula, inside, without, mask = kept[row]
                word, name = list(options)[which], names[column]
                joined = {"and": mask * c[column], "or": torch.maximum(mask, c[column])}
                grown.append((
                    value, f"({formula} {word} {name})",
                    inside if word == "and not" else (*inside, name),
                    (*without, name) if word == "and not" else without,
                    joined.get(word, mask * (1 - c[column])),
                ))  # fmt: skip
            kept = grown
            found += grown
        value, formula, inside, without, _ = max(found, key=lambda entry: (entry[0], -len(entry[1])))
        labels.append(Label(formula, value, tuple(dict.fromkeys(inside)), tuple(dict.fromkeys(without))))
    return labels


def constant_description(descriptions: Sequence[Sequence[str]]) -> str:
    """The one sentence that agrees best with all annotations: what any score has to beat.

    Args:
        descriptions: of the annotated units.

    Returns:
        the sentence of the annotations with the highest BLEU when said of every unit; rarer ones than the 20 most
        frequent are not tried.
    """
    every = [text for texts in descriptions for text in texts]
    if not every:
        raise InvalidInput("descriptions is empty")
    counts: dict[str, int] = {}
    for text in every:
        counts[text] = counts.get(text, 0) + 1
    tried = sorted(counts, key=lambda text: (-counts[text], text))[:20]
    wanted = [list(texts) for texts in descriptions if len(texts)]
    return max(tried, key=lambda text: bleu([text] * len(wanted), wanted))


def nearest_description(
    train: VectorExemplars, descriptions: Sequence[Sequence[str]], others: VectorExemplars
) -> list[str]:
    """The longest sentence of the annotated unit whose exemplars are most alike (cosine of mean vectors).

    Args:
        train: annotated units.
        descriptions: their sentences.
        others: units to describe.
    """
    if len(train) != len(descriptions):
        raise InvalidInput(f"descriptions of {len(descriptions)} units for {len(train)}")
    known, new = train.vectors.mean(1), others.vectors.mean(1)
    centre, spread = known.mean(0), known.std(0, correction=0).clamp_min(1e-12)
    a, b = (functional.normalize((x - centre) / spread, dim=1) for x in (new, known))
    nearest = (a @ b.T).argmax(1).tolist()
    return [str(max(descriptions[i], key=lambda text: (len(text.split()), text))) for i in nearest]


def _stacked(concepts: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    if not concepts:
        raise InvalidInput("concepts is empty: hand in at least one, name -> mask")
    return list(concepts), torch.stack([torch.as_tensor(np.asarray(mask)) for mask in concepts.values()])
