"""Running top-k and running quantiles of many units over a stream of data too large to keep.

    top = RunningTopK(units, k=15)
    levels = RunningQuantile(units)
    for values, ids in batches:              # values [n, units]
        top.add(values, ids)
        levels.add(values)
    top.values, top.ids, levels.quantile(0.99)

The quantiles come from a stack of buffers: a full one is sorted, every other value goes on with twice the weight
(Munro and Paterson, 1980; the random offset is that of Karnin, Lang and Liberty, arXiv:1603.05346). All units see
equally many values, so that one sort serves them all.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator


class RunningTopK:
    """The k largest values of every unit so far, and whose they are.

    Of equal values the one that came first stays.

    Args:
        units: how many.
        k: values kept for each.

    Attributes:
        values: ``[units, k]``, the largest first; fewer columns at the beginning.
        ids: ``[units, k]``, of the items.
        payload: ``[units, k, ...]``, what came with them; None where nothing did.
    """

    def __init__(self, units: int, k: int) -> None:
        for name, value in {"units": units, "k": k}.items():
            if value < 1:
                raise InvalidInput(f"{name}={value}: must be at least 1")
        self.units, self.k = units, k
        self.values: Float[Tensor, "units k"] = torch.empty(units, 0)
        self.ids: Int[Tensor, "units k"] = torch.empty(units, 0, dtype=torch.long)
        self.payload: Tensor | None = None

    def add(self, values: Float[Tensor, "n units"], ids: Int[Tensor, " n"], payload: Tensor | None = None) -> None:
        """Take in one value of every unit for each of ``n`` items.

        Args:
            values: any floating dtype, on the device that the first call sets.
            ids: of the items.
            payload: ``[n, units, ...]``, kept with the values (the maps whose maxima they are); always or never given.

        Raises:
            InvalidInput: another number of units, or NaN.
        """
        if values.shape[1] != self.units:
            raise InvalidInput(f"values have {values.shape[1]} units, expected {self.units}")
        if bool(values.isnan().any()):
            raise InvalidInput("values hold NaN, which have no rank: look for them in the model's activations")
        held = self.values.shape[1]
        new_ids = ids.to(values.device).expand(self.units, len(ids))
        pool = torch.cat([self.values.to(values), values.T], 1)
        pool_ids = torch.cat([self.ids.to(values.device), new_ids], 1)
        # A stable sort keeps the earlier of equal values; topk promises nothing about ties.
        order = pool.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.values, self.ids = pool.gather(1, order), pool_ids.gather(1, order)
        if payload is None:
            return
        unit = torch.arange(self.units, device=values.device)[:, None]
        fresh = order >= held
        kept = payload[(order - held).clamp_min(0), unit]
        if self.payload is not None:
            mine = self.payload[unit, order.clamp_max(held - 1)]
            kept = torch.where(fresh.reshape(*fresh.shape, *[1] * (kept.ndim - 2)), kept, mine)
        self.payload = kept


class UpperTail:
    """An exact high quantile of every unit, where the number of values is known beforehand: only the tail is kept.

    Args:
        units: how many.
        total: values of each unit that will come.
        q: the quantile, from 0 to 1; memory is ``units x (1 - q) x total``.
    """

    def __init__(self, units: int, total: int, q: float) -> None:
        if units < 1 or total < 1 or not 0 <= q <= 1:
            raise InvalidInput(f"units={units}, total={total}, q={q}: expected at least 1 of each, and 0 <= q <= 1")
        self.units, self.total, self.q, self.count = units, total, q, 0
        rank = q * (total - 1)
        self._rest = rank - math.floor(rank)
        self.size = total - math.floor(rank)
        self.low: Tensor | None = None
        self._held: Tensor | None = None

    def add(self, values: Float[Tensor, "n units"]) -> None:
        """Take in ``n`` values of every unit."""
        if values.shape[1] != self.units or self.count + len(values) > self.total:
            raise InvalidInput(
                f"values have shape {tuple(values.shape)} after {self.count}: expected {self.units} units and "
                f"{self.total} values in all"
            )
        self.count += len(values)
        low = values.amin(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        rows = values.T if self._held is None else torch.cat([self._held, values.T], 1)
        self._held = rows.topk(min(self.size, rows.shape[1]), 1).values

    def quantile(self) -> Float[Tensor, " units"]:
        """The quantile, linearly between neighbours.

        Raises:
            InvalidInput: not all values have come.
        """
        if self._held is None or self.count != self.total:
            raise InvalidInput(f"{self.count} of {self.total} values have come: the quantile is not known yet")
        below = self._held[:, -1]
        above = self._held[:, -2] if self.size > 1 else below
        return below + self._rest * (above - below)


class RunningQuantile:
    """Quantiles of every unit's values so far: exact up to ``capacity`` values, then within a small error of rank.

    With ``n`` values the error of a rank is about ``0.7 n / capacity`` (one standard deviation); memory is
    ``units x capacity`` values for each doubling of ``n / capacity``.

    Args:
        units: how many.
        capacity: values in each buffer, even.
        seed: of the offsets.
    """

    def __init__(self, units: int, capacity: int = 4096, seed: int = 0) -> None:
        if units < 1 or capacity < 2 or capacity % 2:
            raise InvalidInput(f"units={units}, capacity={capacity}: expected at least 1, and an even number from 2")
        self.units, self.capacity = units, capacity
        self.count = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._levels: list[Tensor] = []
        self._random = generator(seed)

    def add(self, values: Float[Tensor, "n units"]) -> None:
        """Take in ``n`` values of every unit.

        Raises:
            InvalidInput: another number of units, or NaN.
        """
        if values.shape[1] != self.units:
            raise InvalidInput(f"values have {values.shape[1]} units, expected {self.units}")
        if bool(values.isnan().any()):
            raise InvalidInput("values hold NaN, which have no rank: look for them in the model's activations")
        if not len(values):
            return
        low, high = values.amin(0), values.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.count += len(values)
        rows = values.T
        while rows.shape[1]:
            room = self.capacity - (self._levels[0].shape[1] if self._levels else 0)
            self._push(0, rows[:, :room])
            rows = rows[:, room:]

    def _push(self, level: int, rows: Tensor) -> None:
        if level == len(self._levels):
            self._levels.append(rows[:, :0].clone())
        self._levels[level] = torch.cat([self._levels[level], rows], 1)
        # Full buffers wait until the next value comes: up to `capacity` values nothing is thrown away.
        if self._levels[level].shape[1] >= self.capacity and self._more_will_come(level):
            self._compact(level)

    def _more_will_come(self, level: int) -> bool:
        return level > 0 or self.count > self.capacity

    def _compact(self, level: int) -> None:
        ordered = self._levels[level].sort(1).values
        offset = int(torch.randint(2, (1,), generator=self._random))
        self._levels[level] = ordered[:, :0].clone()
        self._push(level + 1, ordered[:, offset::2])

    def quantile(self, q: float) -> Float[Tensor, " units"]:
        """The value below which a share ``q`` of each unit's values lies, linearly between neighbours.

        Args:
            q: from 0 to 1.

        Raises:
            InvalidInput: ``q`` out of range, or no values yet.
        """
        if not 0 <= q <= 1:
            raise InvalidInput(f"q={q}: a quantile lies between 0 and 1")
        if self.low is None or self.high is None:
            raise InvalidInput("no values yet: add some first")
        held = torch.cat(self._levels, 1)
        weights = torch.cat([torch.full((part.shape[1],), 2.0**i) for i, part in enumerate(self._levels)])
        values, order = held.sort(1)
        weight = weights.to(values.device, torch.float64)[order]
        # Each kept value stands in the middle of the ranks for which it speaks; 0 and n-1 are the extremes.
        centre = weight.cumsum(1) - (weight + 1) / 2
        total = float(weights.sum())
        target = torch.full((self.units, 1), q * (total - 1), dtype=torch.float64, device=values.device)
        centre = torch.cat([torch.zeros_like(target), centre, torch.full_like(target, total - 1)], 1)
        values = torch.cat([self.low[:, None].to(values), values, self.high[:, None].to(values)], 1)
        right = torch.searchsorted(centre, target).clamp(1, centre.shape[1] - 1)
        x0, x1 = centre.gather(1, right - 1), centre.gather(1, right)
        y0, y1 = values.gather(1, right - 1), values.gather(1, right)
        share = torch.where(x1 > x0, (target - x0) / (x1 - x0).clamp_min(1e-300), 1.0)
        return (y0 + share.to(y0) * (y1 - y0))[:, 0]

    @property
    def rank_error(self) -> float:
        """The standard deviation of a rank, as a share of all values: 0 while everything is kept."""
        if len(self._levels) <= 1:
            return 0.0
        return 1 / (math.sqrt(2) * self.capacity)
