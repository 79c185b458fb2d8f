"""More parallel anchors than are known: from a few seed pairs, the rest found in the two spaces themselves.

The question is that of Cannistraci et al., *Bootstrapping Parallel Anchors for Relative Representations*
(arXiv:2303.00721), who optimise the anchors' positions through a Sinkhorn plan. Here pairs are samples on both sides,
found by turns as bilingual dictionaries are induced: pairs that are each other's nearest in relative latents become
anchors, and better anchors find better pairs. Nothing is trained and nothing has to be tuned.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.similarity import relative_projection, unit
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.validation import require_finite


@dataclass(frozen=True)
class BootstrappedAnchors:
    """Pairs of rows that stand for the same thing, as far as can be told; the seeds come first.

    Attributes:
        left, right: ``[k]`` rows of either side.
        confidence: ``[k]``, by how much the pair is nearer than both sides' usual neighbours; infinite for seeds.
        n_seeds: how many were known.
    """

    left: Int[Tensor, " k"]
    right: Int[Tensor, " k"]
    confidence: Float[Tensor, " k"]
    n_seeds: int

    def __len__(self) -> int:
        return len(self.left)

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair."""
        known = [i < self.n_seeds for i in range(len(self))]
        columns = {"left": self.left, "right": self.right, "confidence": self.confidence}
        return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()} | {"seed": known})


def bootstrap_anchors(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "m e"],
    seeds_left: Int[Tensor, " s"],
    seeds_right: Int[Tensor, " t"],
    k: int,
    *,
    rounds: int = 10,
    similarity: str = "cosine",
    frame: str | None = None,
    neighbourhood: int = 10,
    progress: Progress = SILENT,
) -> BootstrappedAnchors:
    """Parallel anchors from a few known pairs.

    In every round all samples are described by the pairs of the last one, those that are each other's nearest are
    ranked, and the surest become the next round's anchors, more of them each time. Similarities are corrected for hubs:
    a sample near everything is near nothing in particular.

    Args:
        left, right: latents of the candidates of either side; sides may have different samples and sizes. A table of n
            times m similarities is held: leave out rare words.
        seeds_left, seeds_right: rows of the known pairs.
        k: pairs wanted, seeds included.
        rounds: turns; the number of anchors grows evenly from the seeds to ``k``.
        similarity, frame: as in :func:`~broadsheet.geometry.relative_representations.relative_projection`.
        neighbourhood: neighbours that count as usual.
        progress: shows the rounds.

    Returns:
        ``k`` pairs, or fewer where fewer are each other's nearest.

    Raises:
        InvalidInput: no seeds, seeds of different number or out of range, or k below their number.
    """
    require_finite("left", left)
    require_finite("right", right)
    known = torch.stack([seeds_left.cpu().long(), seeds_right.cpu().long()]) if len(seeds_left) == len(
        seeds_right
    ) else None  # fmt: skip
    if known is None or known.shape[1] == 0:
        raise InvalidInput(f"{len(seeds_left)} and {len(seeds_right)} seeds: pairs are expected, at least one")
    s = known.shape[1]
    limits = torch.tensor([[len(left)], [len(right)]])
    if bool((known < 0).any()) or bool((known >= limits).any()):
        raise InvalidInput(f"a seed is not among the {len(left)} rows on the left or the {len(right)} on the right")
    if k < s or rounds < 1:
        raise InvalidInput(f"k={k}, rounds={rounds}: at least the {s} seeds and one round are expected")
    pairs, confidence = known, torch.full((s,), torch.inf)
    with progress.task("finding anchors", rounds) as task:
        for turn in range(1, rounds + 1):
            wanted = s + round((k - s) * turn / rounds)
            found, surety = _mutual(left, right, pairs, similarity, frame, neighbourhood)
            new = ~(torch.isin(found[0], known[0]) | torch.isin(found[1], known[1]))
            found, surety = found[:, new], surety[new]
            best = surety.argsort(descending=True, stable=True)[: wanted - s]
            pairs = torch.cat([known, found[:, best]], 1)
            confidence = torch.cat([torch.full((s,), torch.inf), surety[best]])
            task.advance()
    return BootstrappedAnchors(pairs[0], pairs[1], confidence, s)


def _mutual(
    left: Tensor, right: Tensor, pairs: Tensor, similarity: str, frame: str | None, neighbourhood: int
) -> tuple[Tensor, Tensor]:
    """Pairs that are each other's nearest, ``[2, p]``, and how much nearer than usual."""
    sides = [
        unit(relative_projection(z, z[rows.to(z.device)], similarity, frame=frame, check=False))
        for z, rows in ((left, pairs[0]), (right, pairs[1]))
    ]
    table = sides[0] @ sides[1].to(sides[0]).T
    usual = [table.topk(min(neighbourhood, table.shape[axis]), axis).values.mean(axis) for axis in (1, 0)]
    table = 2 * table - usual[0][:, None] - usual[1]
    partner = table.argmax(1)
    rows = torch.arange(len(left), device=table.device)
    mutual = table.argmax(0)[partner] == rows
    rows, partner = rows[mutual], partner[mutual]
    return torch.stack([rows, partner]).cpu(), table[rows, partner].float().cpu()
