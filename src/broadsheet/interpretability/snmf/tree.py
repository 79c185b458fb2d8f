"""What a hierarchy of features looks like: trees of concepts, and the neurons that features share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.plotting import COLOURS, INK, new_axes


@dataclass(frozen=True)
class ConceptTree:
    """A feature and the narrower ones that it is made of.

    Attributes:
        level: 0 for the narrowest.
        index: of the feature within its level.
        weight: its coefficient in its parent; 1 at the root.
        children: the largest first.
    """

    level: int
    index: int
    weight: float = 1.0
    children: tuple["ConceptTree", ...] = ()

    def walk(self, parent: "ConceptTree | None" = None) -> Iterator[tuple["ConceptTree", "ConceptTree | None"]]:
        """Every node with its parent, from the top."""
        yield self, parent
        for child in self.children:
            yield from child.walk(self)

    @property
    def leaves(self) -> tuple["ConceptTree", ...]:
        """The nodes without children, from left to right."""
        return tuple(node for node, _ in self.walk() if not node.children)

    def to_frame(self) -> pd.DataFrame:
        """One row for each node: ``level``, ``index``, ``parent`` (index one level up; -1 at the root), ``weight``."""
        rows = [(n.level, n.index, -1 if p is None else p.index, n.weight) for n, p in self.walk()]
        return pd.DataFrame(rows, columns=["level", "index", "parent", "weight"])

    def plot(self, ax: Any = None, label: Callable[[int, int], str] | None = None) -> Any:
        """Draw the tree from the left, broad, to the right, narrow.

        Args:
            ax: matplotlib axes; None for new ones.
            label: ``(level, index) -> text`` of a node.
        """
        ax = new_axes(ax, figsize=(7.0, 0.6 + 0.42 * len(self.leaves)))
        place = {id(leaf): float(-i) for i, leaf in enumerate(self.leaves)}

        def middle(node: ConceptTree) -> float:
            if id(node) not in place:
                place[id(node)] = float(np.mean([middle(child) for child in node.children]))
            return place[id(node)]

        for node, parent in self.walk():
            x, y = self.level - node.level, middle(node)
            if parent is not None:
                x0, y0 = self.level - parent.level, middle(parent)
                bend = np.linspace(0, 1, 30)
                ease = bend**2 * (3 - 2 * bend)
                strength = node.weight / max(child.weight for child in parent.children)
                ax.plot(
                    x0 + bend * (x - x0), y0 + ease * (y - y0), color=COLOURS["light"], linewidth=0.8 + 3 * strength,
                    solid_capstyle="round", zorder=1,
                )  # fmt: skip
        for node, _ in self.walk():
            text = f"{node.level}.{node.index}" if label is None else label(node.level, node.index)
            colour = COLOURS["ours"] if node.children else COLOURS["baseline"]
            x, y = self.level - node.level, middle(node)
            ax.plot(x, y, "o", color=colour, markersize=6, zorder=3)
            style = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            ax.annotate(
                text,
                (x, y),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
                bbox=style,
                zorder=2,
            )
        ax.set_xlim(-0.1, self.level + 1.0)
        ax.set_ylim(min(place.values()) - 0.6, max(place.values()) + 0.6)
        ax.set_axis_off()
        return ax


@dataclass(frozen=True)
class NeuronOverlap:
    """Which neurons several features are made of.

    Attributes:
        neurons: ``[m]``, those of at least one feature; shared ones first.
        member: ``[K, m]``, whether a feature has the neuron.
        core: ``[c]``, neurons of at least ``share`` of the features.
        names: of the features.
        jaccard: ``[K, K]``, shared neurons of two features over all that either has.
    """

    neurons: Int[Tensor, " m"]
    member: Bool[Tensor, "K m"]
    core: Int[Tensor, " c"]
    names: tuple[str, ...]
    jaccard: Float[Tensor, "K K"]

    def exclusive(self, k: int) -> Int[Tensor, " e"]:
        """The neurons that only feature ``k`` has."""
        return self.neurons[self.member[k] & (self.member.sum(0) == 1)]

    def to_frame(self) -> pd.DataFrame:
        """One row for each feature: its neurons, how many are in the core, and how many are its own."""
        core = torch.isin(self.neurons, self.core)
        rows = [
            (name, int(has.sum()), int((has & core).sum()), len(self.exclusive(k)))
            for k, (name, has) in enumerate(zip(self.names, self.member, strict=True))
        ]
        return pd.DataFrame(rows, columns=["feature", "neurons", "core", "exclusive"])

    def plot(self, ax: Any = None) -> Any:
        """Features against neurons; the core stands on the left.

        Args:
            ax: matplotlib axes; None for new ones.
        """
        from matplotlib.colors import ListedColormap

        ax = new_axes(ax, figsize=(8.0, 0.9 + 0.26 * len(self.names)))
        shade = self.member.int() * (1 + torch.isin(self.neurons, self.core).int())
        ax.imshow(
            shade.cpu().numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=2,
            cmap=ListedColormap(["#f5f3ee", COLOURS["baseline"], COLOURS["ours"]]),
        )  # fmt: skip
        ax.set_yticks(range(len(self.names)), list(self.names))
        ax.set_xticks([])
        ax.set_xlabel(f"{len(self.neurons)} neurons, {len(self.core)} of them shared (red)")
        ax.grid(False)
        return ax


def neuron_overlap(
    features: Float[Tensor, "K d"], names: Sequence[str] | None = None, share: float = 0.5
) -> NeuronOverlap:
    """Which neurons related features share, and which are one feature's own.

    Args:
        features: rows with few nonzeros.
        names: of the features.
        share: a neuron of this share of the features, at least two of them, belongs to the core.

    Raises:
        InvalidInput: fewer than two features, a share outside (0, 1], or as many names as there are not features.
    """
    k = len(features)
    names = tuple(names) if names is not None else tuple(f"factor {i}" for i in range(k))
    if k < 2 or not 0 < share <= 1 or len(names) != k:
        raise InvalidInput(
            f"{k} features, {len(names)} names, share={share}: expected at least two features, a name for each, and a "
            "share in (0, 1]"
        )
    has = features != 0
    counts = has.sum(0)
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[counts[order] > 0]
    # among neurons of one feature: feature after feature, so that blocks are seen
    own = torch.where(counts[order] == 1, has[:, order].int().argmax(0), -1)
    order = order[torch.argsort(own + (counts.max() - counts[order]) * k, stable=True)]
    core = order[counts[order] >= max(2, share * k)]
    both = has.double() @ has.double().T
    either = has.sum(1)[:, None] + has.sum(1)[None] - both
    return NeuronOverlap(order, has[:, order], core, names, (both / either.clamp_min(1)).to(features.dtype))
