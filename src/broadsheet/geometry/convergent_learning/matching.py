"""Units of one network with units of another: one to one, or each with its best.

One to one is the assignment with the largest sum of scores (arXiv:1511.07543, section 3.1); in the semi-matching each
unit takes its best partner, which others may take too. Where the two differ, a feature is held by one unit in one
network and by several in the other.
"""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.matching import best_pairs
from broadsheet.nn.moments import Correlation, PairMoments
from broadsheet.nn.plotting import COLOURS, new_axes

MODES = ("bipartite", "semi")
ROWS = 1024  # whose ranks are counted at a time: no second table is made


@dataclass(frozen=True)
class UnitMatching:
    """Each unit of the first network with one of the second.

    Attributes:
        partner: ``[p]``, unit of the second network; -1 for dead units and where partners ran out.
        score: ``[p]``, of each pair; NaN where there is none.
        rank: ``[p]``, how many units of the second network score at least as well with this one (1: its very best);
            0 where there is no partner.
        mode: ``"bipartite"`` or ``"semi"``.
        unmatched: live units of the second network that nobody has as a partner.
        dead_first, dead_second: units that do not vary, which were left out.
        minimise: small scores are good ones.
    """

    partner: Int[Tensor, " p"]
    score: Float[Tensor, " p"]
    rank: Int[Tensor, " p"]
    mode: str
    unmatched: tuple[int, ...]
    dead_first: tuple[int, ...]
    dead_second: tuple[int, ...]
    minimise: bool = False

    @property
    def matched(self) -> Int[Tensor, " pairs"]:
        """Units of the first network that have a partner."""
        return (self.partner >= 0).nonzero().flatten()

    @property
    def without(self) -> tuple[int, ...]:
        """Live units of the first network that have none, because the second has fewer."""
        return tuple(i for i in (self.partner < 0).nonzero().flatten().tolist() if i not in set(self.dead_first))

    @property
    def mean(self) -> float:
        """Mean score over pairs; NaN where there are none."""
        return float(self.score[self.matched].mean())

    @property
    def mean_rank(self) -> float:
        """1 where every unit has its very best partner: how much one-to-one matching had to give way."""
        return float(self.rank[self.matched].double().mean())

    @property
    def repeats(self) -> int:
        """Pairs whose partner stands in an earlier pair already; 0 in a bipartite matching."""
        return len(self.matched) - len(self.partner[self.matched].unique())

    def share(self, above: float | None = None, below: float | None = None) -> float:
        """Share of the first network's live units whose score lies above (or below) a value; no partner counts as 0."""
        bound = above if below is None else below
        if bound is None or (above is not None and below is not None):
            raise InvalidInput("hand in above= or below=, one of them")
        alive = torch.ones(len(self.score), dtype=torch.bool)
        alive[list(self.dead_first)] = False
        score = self.score.cpu()[alive].nan_to_num(0.0)
        chosen = score < bound if above is None else score > bound
        return float(chosen.double().mean())

    @property
    def order(self) -> Int[Tensor, " pairs"]:
        """Units of the first network with a partner, the best pair first."""
        at = self.matched
        return at[self.score[at].argsort(descending=not self.minimise, stable=True)]

    @property
    def cycles(self) -> tuple[int, ...]:
        """Lengths of the loops in which following partners ends, longest first (one to one, widths alike)."""
        partner = self.partner.tolist()
        if sorted(partner) != list(range(len(partner))):
            raise InvalidInput("loops need a partner for every unit and every unit as a partner")
        seen: set[int] = set()
        lengths = []
        for start in range(len(partner)):
            length, at = 0, start
            while at not in seen:
                seen.add(at)
                at, length = partner[at], length + 1
            if length:
                lengths.append(length)
        return tuple(sorted(lengths, reverse=True))

    def permuted(self, table: Float[Tensor, "p q"]) -> Float[Tensor, "pairs columns"]:
        """A table with its rows sorted by score and its columns so that the pairs stand on the diagonal.

        Args:
            table: such as a correlation, ``[p, q]``; columns nobody has as a partner come last.
        """
        rows = self.order
        if self.mode == "semi":
            return table[rows][:, self.partner[rows]]
        rest = torch.tensor(self.unmatched, dtype=torch.long, device=rows.device)
        return table[rows][:, torch.cat([self.partner[rows], rest])]

    def scored(self, table: Float[Tensor, "p q"] | Correlation | PairMoments) -> "UnitMatching":
        """The same pairs with scores from other samples, on which they were not chosen."""
        values, _, _ = _table(table)
        if len(values) != len(self.partner):
            raise InvalidInput(f"a table of {len(values)} rows for {len(self.partner)} units")
        score = torch.full_like(self.score, torch.nan)
        at = self.matched
        score[at] = values[at, self.partner[at]].to(score)
        return replace(self, score=score)

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair, the best first: ``unit``, ``partner``, ``score``, ``rank``."""
        at = self.order
        columns = {"unit": at, "partner": self.partner[at], "score": self.score[at], "rank": self.rank[at]}
        return pd.DataFrame({name: column.tolist() for name, column in columns.items()})

    def plot(self, ax: Any = None, colour: str | None = None, label: str | None = None) -> Any:
        """Scores of the pairs, the best first; returns the axes."""
        ax = new_axes(ax)
        score = self.score[self.order].cpu().numpy()
        ax.plot(range(1, len(score) + 1), score, color=colour or COLOURS["ours"], label=label or self.mode)
        ax.set(xlabel="unit, the best matched first", ylabel="correlation of the pair")
        ax.legend()
        return ax


def match_units(
    table: Float[Tensor, "p q"] | Correlation | PairMoments,
    mode: str = "bipartite",
    minimise: bool = False,
    signed: bool = True,
) -> UnitMatching:
    """Pair the units of two networks.

    Args:
        table: what each pair scores, such as :func:`unit_correlation` or :func:`unit_mutual_information` give; rows and
            columns of nothing but NaN are dead units. Or the correlations or moments themselves.
        mode: ``"bipartite"`` (one to one; min(p, q) pairs) or ``"semi"`` (each row its best column).
        minimise: small scores are good ones, as with distances.
        signed: False pairs by the size of a score, which keeps its sign; for layers without a nonlinearity, where the
            sign of a unit is arbitrary.

    Raises:
        InvalidInput: another mode, no units, or single NaN entries.
    """
    if mode not in MODES:
        raise InvalidInput(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    values, dead_rows, dead_columns = _table(table)
    if values.ndim != 2 or 0 in values.shape:
        raise InvalidInput(f"a table of shape {tuple(values.shape)}: expected [units, units], at least one of each")
    rows, columns = (~dead_rows).nonzero().flatten(), (~dead_columns).nonzero().flatten()
    live = values if len(rows) == len(values) and len(columns) == values.shape[1] else values[rows][:, columns]
    if not bool(live.isfinite().all()):
        at = (~live.isfinite()).nonzero()[0]
        raise InvalidInput(
            f"the score of unit {int(rows[at[0]])} and {int(columns[at[1]])} is not finite: only whole rows or columns "
            "of dead units may be"
        )
    worth = live if signed else live.abs()
    p = len(values)
    partner = torch.full((p,), -1, dtype=torch.long, device=values.device)
    score = torch.full((p,), torch.nan, dtype=values.dtype, device=values.device)
    rank = torch.zeros(p, dtype=torch.long, device=values.device)
    if live.numel():
        if mode == "bipartite":
            chosen = best_pairs(worth, minimise)
        else:
            chosen = worth.argmin(1) if minimise else worth.argmax(1)
        there = (chosen >= 0).nonzero().flatten()
        at, to = rows[there], chosen[there]
        partner[at], score[at] = columns[to], live[there, to]
        for part in torch.arange(len(there), device=there.device).split(ROWS):
            others, mine = worth[there[part]], worth[there[part], to[part]][:, None]
            rank[at[part]] = (others <= mine if minimise else others >= mine).sum(1)
    taken = set(partner.tolist())
    unmatched = tuple(i for i in columns.tolist() if i not in taken)
    gone = [tuple(dead.nonzero().flatten().tolist()) for dead in (dead_rows, dead_columns)]
    return UnitMatching(partner, score, rank, mode, unmatched, gone[0], gone[1], minimise)


def _table(table: Tensor | Correlation | PairMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[p, q]`` and which units of either side are dead."""
    if isinstance(table, PairMoments):
        table = table.between().correlation()  # those inside a network are not needed
    if isinstance(table, Correlation):
        if table.xy is None or table.dead_y is None:
            raise InvalidInput("these correlations are of one network only")
        return table.xy, table.dead_x, table.dead_y
    if table.ndim != 2:
        raise InvalidInput(f"a table of shape {tuple(table.shape)}: expected [units, units]")
    return table, table.isnan().all(1), table.isnan().all(0)
