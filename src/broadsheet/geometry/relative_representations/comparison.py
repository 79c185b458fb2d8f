"""Two spaces of the same samples, compared without a task: neighbours, retrieval, and the proxy of quality."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.anchors import select_anchors
from broadsheet.geometry.relative_representations.similarity import relative_projection, unit
from broadsheet.nn.alignment import linear_cka, procrustes
from broadsheet.nn.moments import PairMoments
from broadsheet.nn.plotting import COLOURS, new_axes
from broadsheet.nn.validation import require_finite

Space = Float[Tensor, "_ _"] | Mapping[Hashable, Any]
SCORES = ("jaccard", "mrr", "cosine")


@dataclass(frozen=True)
class SpaceComparison:
    """How far one space can be read with the other's map (section 5.1). All scores are 1 for equal spaces.

    Attributes:
        jaccard: of the ``k_neighbours`` nearest samples in space 2: those of a sample's vector from space 1, and those
            of its own; the mean over samples.
        mrr: mean reciprocal rank of the sample itself among the former, 0 where it is not among them.
        cosine: mean cosine of a sample's two vectors.
        cka: linear centred kernel alignment of the two sets of vectors.
        k_neighbours: of both, the sample itself included.
        n: samples.
    """

    jaccard: float
    mrr: float
    cosine: float
    cka: float
    k_neighbours: int
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row."""
        return pd.DataFrame([asdict(self)])

    def plot(self, ax: Any = None, colour: str = COLOURS["ours"]) -> Any:
        """The scores as bars; returns the axes."""
        ax = new_axes(ax, figsize=(4.0, 2.6))
        names = (*SCORES, "cka")
        ax.barh(names, [getattr(self, name) for name in names], color=colour)
        ax.invert_yaxis()
        ax.set(xlim=(min(0.0, self.cosine), 1), xlabel="likeness of the two spaces")
        return ax


def compare_spaces(
    z1: Space,
    z2: Space,
    anchors: Any = None,
    k_neighbours: int = 10,
    *,
    similarity: str = "cosine",
    frame: str | None = None,
    hold_out_anchors: bool = False,
    rows: int = 1024,
) -> SpaceComparison:
    """Compare two spaces, relative to anchors or as they are.

    The table of neighbours is never whole in memory: ``rows`` samples at a time look among all.

    Args:
        z1, z2: ``[n, d]`` and ``[n, e]`` latents, row i of one sample; or ``{word: vector}``, of which the words that
            both have are compared.
        anchors: ``[k]`` row indices (or words); None compares absolute latents, which must have one width.
        k_neighbours: the paper has 10, the released notebook's function 5.
        similarity, frame: as in :func:`~broadsheet.geometry.relative_representations.relative_projection`.
        hold_out_anchors: leave the anchors out, whose likeness to themselves is known; the paper counts them.
        rows: samples at a time.

    Raises:
        InvalidInput: other numbers of samples, absolute latents of different width, or too few samples.
    """
    z1, z2, chosen = _paired(z1, z2, anchors)
    r1, r2 = z1, z2
    if chosen is not None:
        r1, r2 = (relative_projection(z, z[chosen.to(z.device)], similarity, frame=frame) for z in (z1, z2))
        if hold_out_anchors:
            kept = torch.ones(len(z1), dtype=torch.bool)
            kept[chosen] = False
            r1, r2 = r1[kept.to(r1.device)], r2[kept.to(r2.device)]
    elif z1.shape[1] != z2.shape[1]:
        raise InvalidInput(
            f"absolute latents of {z1.shape[1]} and {z2.shape[1]} features cannot be compared entry by entry: hand in "
            "anchors="
        )
    n = len(r1)
    if not 1 <= k_neighbours <= n:
        raise InvalidInput(f"k_neighbours={k_neighbours}: expected 1 to {n}, the samples there are")
    cka = linear_cka(PairMoments().update(r1, r2.to(r1)))
    sums = torch.zeros(3, dtype=torch.float64)
    u1, u2 = unit(r1), unit(r2.to(r1))
    for start in range(0, n, rows):
        from_first, own = u1[start : start + rows], u2[start : start + rows]
        theirs = (from_first @ u2.T).topk(k_neighbours).indices
        ours = (own @ u2.T).topk(k_neighbours).indices
        both = (theirs[:, :, None] == ours[:, None, :]).any(2).sum(1).double()
        here = torch.arange(start, start + len(own), device=theirs.device)
        at = theirs == here[:, None]
        rank = at.int().argmax(1) + 1
        found = torch.where(at.any(1), 1 / rank.double(), 0.0)
        parts = (both / (2 * k_neighbours - both), found, (from_first * own).sum(1).double())
        sums += torch.stack([part.sum().cpu() for part in parts])
    jaccard, mrr, cosine = (sums / n).tolist()
    return SpaceComparison(jaccard, mrr, cosine, cka, k_neighbours, n)


def performance_proxy(
    z_model: Float[Tensor, "n d"],
    z_reference: Float[Tensor, "n e"],
    anchors: Any = None,
    *,
    similarity: str = "cosine",
    frame: str | None = None,
) -> float:
    """How far a model's space is from a good model's, no label needed: mean distance of the anchors' relative latents.

    Args:
        z_model, z_reference: latents of the same samples by both, absolute; widths may differ.
        anchors: ``[k]`` row indices; None takes all rows for anchors.
        similarity, frame: as in :func:`~broadsheet.geometry.relative_representations.relative_projection`.

    Returns:
        mean L2 distance over anchors (section 5.2): 0 for the reference, or a rotated copy of it.
    """
    z1, z2, chosen = _paired(z_model, z_reference, anchors)
    a, b = (z if chosen is None else z[chosen.to(z.device)] for z in (z1, z2))
    left, right = (relative_projection(z, z, similarity, frame=frame) for z in (a, b))
    return float((left.double().cpu() - right.double().cpu()).norm(dim=1).mean())


@dataclass(frozen=True)
class ProxyStudy:
    """Distance from a reference against a known score, over many models.

    Attributes:
        names: of the models.
        distances: ``[m]``, :func:`performance_proxy` of each.
        scores: ``[m]``, what is to be foreseen (a test loss, an accuracy).
        spearman: rank correlation of the two, the reference left out where it is one of the models.
        reference: which of the models; None where it is another.
    """

    names: tuple[str, ...]
    distances: Float[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    spearman: float
    reference: int | None

    def to_frame(self) -> pd.DataFrame:
        """One row for each model."""
        where = [i == self.reference for i in range(len(self.names))]
        return pd.DataFrame({"model": self.names, "distance": self.distances, "score": self.scores, "reference": where})

    def plot(self, ax: Any = None, label: str = "score", colour: str = COLOURS["ours"]) -> Any:
        """Score over distance, a dot for each model; returns the axes."""
        ax = new_axes(ax, figsize=(4.2, 3.2))
        others = [i for i in range(len(self.names)) if i != self.reference]
        ax.plot(self.distances[others], self.scores[others], "o", color=colour, markersize=5, alpha=0.85)
        if self.reference is not None:
            at = self.distances[self.reference], self.scores[self.reference]
            ax.plot(*at, "*", color=COLOURS["neutral"], markersize=12, label="reference")
            ax.legend()
        ax.set(xlabel="distance from the reference", ylabel=label, title=f"Spearman {self.spearman:.2f}")
        return ax


def proxy_study(
    latents: Sequence[Float[Tensor, "n _"]],
    scores: Sequence[float],
    reference: int | Float[Tensor, "n e"],
    anchors: Any = None,
    *,
    names: Sequence[str] | None = None,
    similarity: str = "cosine",
    frame: str | None = None,
) -> ProxyStudy:
    """The proxy over many models of known quality: does distance from one reference foresee it?

    Args:
        latents: of the same samples by every model.
        scores: of the models.
        reference: which model is the reference, or latents of another.
        anchors, similarity, frame: as in :func:`performance_proxy`.
        names: of the models.

    Raises:
        InvalidInput: fewer than three models beside the reference, or another number of scores.
    """
    if len(latents) != len(scores):
        raise InvalidInput(f"{len(latents)} models and {len(scores)} scores: one for each is expected")
    inside = reference if isinstance(reference, int) else None
    goal = latents[reference] if isinstance(reference, int) else reference
    others = [i for i in range(len(latents)) if i != inside]
    if len(others) < 3:
        raise InvalidInput(f"{len(others)} models beside the reference: a rank correlation needs at least three")
    how: dict[str, Any] = {"similarity": similarity, "frame": frame}
    distances = np.array([performance_proxy(z, goal, anchors, **how) for z in latents])
    values = np.asarray(scores, dtype=float)
    correlation = float(spearmanr(distances[others], values[others]).statistic)
    named = tuple(map(str, names if names is not None else range(len(latents))))
    return ProxyStudy(named, distances, values, correlation, inside)


@dataclass(frozen=True)
class AnchorCurve:
    """Scores against the number of anchors, for relative latents and rivals.

    Attributes:
        counts: anchors.
        scores: kind (``"relative"``, ``"procrustes"``, ``"absolute"``) -> one comparison for each count and draw.
    """

    counts: tuple[int, ...]
    scores: dict[str, list[list[SpaceComparison]]]

    def mean(self, kind: str, score: str = "jaccard") -> list[float]:
        """One value for each count, the mean over draws of anchors."""
        return [float(np.mean([getattr(c, score) for c in draws])) for draws in self.scores[kind]]

    def to_frame(self) -> pd.DataFrame:
        """One row for each kind, count and draw."""
        rows = [
            {"kind": kind, "anchors": k, "draw": i, **asdict(found)}
            for kind, by_count in self.scores.items()
            for k, draws in zip(self.counts, by_count, strict=True)
            for i, found in enumerate(draws)
        ]
        return pd.DataFrame(rows)

    def plot(self, score: str = "jaccard", ax: Any = None) -> Any:
        """A line for each kind; returns the axes."""
        ax = new_axes(ax, figsize=(4.6, 3.2))
        for kind in self.scores:
            ax.plot(self.counts, self.mean(kind, score), "o-", color=KIND_COLOURS[kind], label=kind, markersize=4)
        ax.set(xscale="log", xlabel="anchors", ylabel=score, xticks=self.counts, ylim=(-0.02, 1.02))
        ax.set_xticklabels([str(k) for k in self.counts])
        ax.minorticks_off()
        ax.legend()
        return ax


KIND_COLOURS = {"relative": COLOURS["ours"], "procrustes": COLOURS["accent"], "absolute": COLOURS["baseline"]}


def anchor_curve(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n e"],
    counts: Sequence[int],
    *,
    draws: int = 1,
    method: str = "uniform",
    k_neighbours: int = 10,
    similarity: str = "cosine",
    frame: str | None = None,
    seed: int = 0,
) -> AnchorCurve:
    """Scores of relative latents over the number of anchors, beside a rotation fitted on the same anchors.

    Args:
        z1, z2: latents of the same samples; absolute scores are left out where widths differ.
        counts: numbers of anchors; two at least, or no rotation can be fitted.
        draws: lists of anchors of each length.
        method: of :func:`~broadsheet.geometry.relative_representations.select_anchors`, on the first space.
        k_neighbours, similarity, frame: as in :func:`compare_spaces`.
        seed: of the first draw; the next has the next one.
    """
    relative, rotated = [], []
    for k in counts:
        lists = [select_anchors(z1, k, method, seed=seed + i) for i in range(draws)]
        how: dict[str, Any] = {"k_neighbours": k_neighbours, "similarity": similarity, "frame": frame}
        relative.append([compare_spaces(z1, z2, chosen, **how) for chosen in lists])
        turns = [procrustes(z1[chosen], z2[chosen]) for chosen in lists]
        rotated.append([compare_spaces(turn(z1), z2, k_neighbours=k_neighbours) for turn in turns])
    scores = {"relative": relative, "procrustes": rotated}
    if z1.shape[1] == z2.shape[1]:
        plain = compare_spaces(z1, z2, k_neighbours=k_neighbours)
        scores["absolute"] = [[plain] for _ in counts]
    return AnchorCurve(tuple(counts), scores)


def _paired(z1: Space, z2: Space, anchors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both spaces as tensors of the same samples, and the anchors' rows."""
    if isinstance(z1, Mapping) != isinstance(z2, Mapping):
        raise InvalidInput("one space is {word: vector}, the other a tensor: hand in two of one kind")
    if isinstance(z1, Mapping) and isinstance(z2, Mapping):
        words = [word for word in z1 if word in z2]
        if not words:
            raise InvalidInput("the two spaces have no word in common")
        places = {word: i for i, word in enumerate(words)}
        if anchors is not None:
            unknown = [word for word in anchors if word not in places]
            if unknown:
                raise InvalidInput(f"anchor {unknown[0]!r} is not in both spaces")
            anchors = [places[word] for word in anchors]
        z1, z2 = (torch.stack([torch.as_tensor(np.asarray(z[word])) for word in words]) for z in (z1, z2))
    assert isinstance(z1, Tensor)
    assert isinstance(z2, Tensor)
    if len(z1) != len(z2) or len(z1) == 0:
        raise InvalidInput(f"{len(z1)} and {len(z2)} samples: the same ones are expected, row by row")
    require_finite("z1", z1)
    require_finite("z2", z2)
    if anchors is None:
        return z1, z2, None
    chosen = torch.as_tensor(anchors).cpu().long()
    if chosen.ndim != 1 or not len(chosen) or not bool(((chosen >= 0) & (chosen < len(z1))).all()):
        raise InvalidInput(f"anchors: expected a list of indices from 0 to {len(z1) - 1}, at least one")
    return z1, z2, chosen
