"""Means and covariances of activations, batch by batch: nothing but the sums is kept, in double precision.

Every batch is centred by its own mean and joined to what came before by the formula for the union of two samples
(Chan, Golub and LeVeque, 1983). Adding up raw products instead loses all digits where a mean is far larger than the
spread about it, as it is for units behind a ReLU.

    both = PairMoments()
    for x, y in batches: both.update(x, y)
    both.correlation().xy          # [p, q]

    classes = ClassMoments(10)
    for h, labels in batches: classes.update(h, labels)
    classes.means, classes.within
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput

DEAD = 1e-8  # a unit whose standard deviation is below this, or below this share of its own mean, is constant


@dataclass(frozen=True)
class Correlation:
    """Pearson correlations of units; rows and columns of dead units are 0.

    Attributes:
        x: ``[p, p]`` within the first set, None where that was not kept.
        y: ``[q, q]`` within the second.
        xy: ``[p, q]`` between them; None with one set only.
        dead_x, dead_y: which units did not vary.
    """

    x: Float[Tensor, "p p"] | None
    y: Float[Tensor, "q q"] | None
    xy: Float[Tensor, "p q"] | None
    dead_x: Bool[Tensor, " p"]
    dead_y: Bool[Tensor, " q"] | None


class PairMoments:
    """Streaming means and covariances of one or two sets of units on the same samples.

    Args:
        within: keep the covariances inside each set too; False keeps variances only (a third of the memory for two
            sets of ten thousand units each: 0.8 GB).

    Attributes:
        count: samples so far.
        mean_x, mean_y: ``[p]``, ``[q]``, float64.
        var_x, var_y: ``[p]``, ``[q]``, of the whole population (divided by ``count``).
    """

    def __init__(self, within: bool = True) -> None:
        self.within = within
        self.count = 0
        self.mean_x: Tensor = torch.empty(0)
        self.mean_y: Tensor | None = None
        self._xx: Tensor = torch.empty(0)  # sums of squares [p], or of products [p, p]
        self._yy: Any = None
        self._xy: Any = None

    def update(self, x: Tensor, y: Tensor | None = None) -> "PairMoments":
        """Add samples; the same object comes back.

        Args:
            x: ``[n, p]``, floating.
            y: ``[n, q]``, the other set's units on the same samples.

        Raises:
            InvalidInput: other widths than before, another number of samples on the other side, or values that are
                not finite.
        """
        x = _checked("x", x)
        if y is not None:
            y = _checked("y", y).to(x.device)
            if len(x) != len(y):
                raise InvalidInput(f"{len(x)} samples on one side, {len(y)} on the other: the same ones are expected")
        if len(x) == 0:
            return self
        batch = PairMoments(self.within)
        batch.count = len(x)
        batch.mean_x = x.mean(0)
        x = x - batch.mean_x
        batch._xx = x.T @ x if self.within else x.square().sum(0)
        if y is not None:
            batch.mean_y = y.mean(0)
            y = y - batch.mean_y
            batch._yy = y.T @ y if self.within else y.square().sum(0)
            batch._xy = x.T @ y
        return self.merge(batch)

    def merge(self, other: "PairMoments") -> "PairMoments":
        """Add what another stream has seen (other samples of the same units); the same object comes back."""
        if other.count == 0:
            return self
        if self.count == 0:
            for name in ("count", "mean_x", "mean_y", "_xx", "_yy", "_xy"):
                setattr(self, name, getattr(other, name))
            return self
        for side in ("mean_x", "mean_y"):
            mine, new = getattr(self, side), getattr(other, side)
            if (mine is None) != (new is None) or (mine is not None and mine.shape != new.shape):
                sizes = ["none" if mean is None else len(mean) for mean in (mine, new)]
                raise InvalidInput(f"{side[-1]} had {sizes[0]} units so far and has {sizes[1]} now")
        n, m = self.count, other.count
        share = n * m / (n + m)
        dx = other.mean_x - self.mean_x
        self._xx = self._xx + other._xx + share * (torch.outer(dx, dx) if self.within else dx.square())
        if self.mean_y is not None and other.mean_y is not None:
            dy = other.mean_y - self.mean_y
            self._yy = self._yy + other._yy + share * (torch.outer(dy, dy) if self.within else dy.square())
            self._xy = self._xy + other._xy + share * torch.outer(dx, dy)
            self.mean_y = self.mean_y + dy * (m / (n + m))
        self.mean_x = self.mean_x + dx * (m / (n + m))
        self.count = n + m
        return self

    def _any(self) -> None:
        if self.count == 0:
            raise InvalidInput("no samples yet: call update() first")

    @property
    def cov_x(self) -> Float[Tensor, "p p"]:
        """Covariance inside the first set, divided by ``count``."""
        self._any()
        if not self.within:
            raise InvalidInput("within=False: covariances inside a set were not kept")
        return self._xx / self.count

    @property
    def cov_y(self) -> Float[Tensor, "q q"]:
        """Covariance inside the second set."""
        self._any()
        if not self.within or self._yy is None:
            raise InvalidInput("covariances inside a second set were not kept")
        return self._yy / self.count

    @property
    def cov_xy(self) -> Float[Tensor, "p q"]:
        """Covariance between the sets."""
        self._any()
        if self._xy is None:
            raise InvalidInput("there is no second set: call update(x, y)")
        return self._xy / self.count

    @property
    def var_x(self) -> Float[Tensor, " p"]:
        self._any()
        return (self._xx.diagonal() if self.within else self._xx) / self.count

    @property
    def var_y(self) -> Float[Tensor, " q"]:
        self._any()
        if self._yy is None:
            raise InvalidInput("there is no second set: call update(x, y)")
        return (self._yy.diagonal() if self.within else self._yy) / self.count

    def correlation(self) -> Correlation:
        """All correlations that were kept."""
        sx, dead_x = _spread(self.var_x, self.mean_x)
        sy = dead_y = None
        if self.mean_y is not None:
            sy, dead_y = _spread(self.var_y, self.mean_y)
        return Correlation(
            _scaled(self.cov_x, sx, sx) if self.within else None,
            _scaled(self.cov_y, sy, sy) if self.within and sy is not None else None,
            None if sy is None else _scaled(self.cov_xy, sx, sy),
            dead_x,
            dead_y,
        )


def _spread(variance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """One over each standard deviation, 0 for units that do not vary; and which those are."""
    std = variance.clamp_min(0).sqrt()
    dead = std <= DEAD * torch.maximum(mean.abs(), torch.ones_like(mean))
    return torch.where(dead, 0.0, 1 / std.clamp_min(1e-300)), dead


def _scaled(cov: Tensor, sx: Tensor, sy: Tensor) -> Tensor:
    return (cov * sx[:, None] * sy).clamp(-1, 1)


def _checked(name: str, x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise InvalidInput(f"{name} has shape {tuple(x.shape)}: expected [samples, units]")
    x = x.detach().double()
    bad = (~x.isfinite()).any(1).nonzero()
    if len(bad):
        raise InvalidInput(f"{name} holds NaN or infinite values, first in row {int(bad[0])} of this batch")
    return x


class ClassMoments:
    """Streaming class means and the covariance within classes.

    Args:
        n_classes: labels are 0 to ``n_classes`` - 1.
        scatter: keep the covariance within classes ``[d, d]``; False keeps its trace alone.

    Attributes:
        counts: ``[n_classes]``, samples so far.
        means: ``[n_classes, d]``, float64; zero for classes without samples.
    """

    def __init__(self, n_classes: int, scatter: bool = True) -> None:
        if n_classes < 1:
            raise InvalidInput(f"n_classes={n_classes}: at least 1 is needed")
        self.n_classes, self.scatter = n_classes, scatter
        self.counts: Int[Tensor, " classes"] = torch.zeros(n_classes, dtype=torch.long)
        self.means: Tensor = torch.empty(n_classes, 0, dtype=torch.float64)
        self._within: Tensor = torch.empty(0)

    def update(self, h: Tensor, labels: Tensor) -> "ClassMoments":
        """Add samples; the same object comes back.

        Args:
            h: ``[n, d]``, floating.
            labels: ``[n]``, integers.

        Raises:
            InvalidInput: another width than before, a label out of range, or values that are not finite.
        """
        h, labels = _checked("h", h), labels.to(h.device)
        if labels.shape != (len(h),):
            raise InvalidInput(f"{len(h)} samples and labels of shape {tuple(labels.shape)}: one each is expected")
        if len(h) == 0:
            return self
        if int(labels.min()) < 0 or int(labels.max()) >= self.n_classes:
            raise InvalidInput(f"labels from {int(labels.min())} to {int(labels.max())}: there are {self.n_classes}")
        if self._within.numel() == 0:
            d = h.shape[1]
            self.means = h.new_zeros(self.n_classes, d)
            self._within = h.new_zeros(d, d) if self.scatter else h.new_zeros(())
            self.counts = self.counts.to(h.device)
        if h.shape[1] != self.means.shape[1]:
            raise InvalidInput(f"{h.shape[1]} features, {self.means.shape[1]} so far: the same layer is expected")
        fresh = torch.bincount(labels, minlength=self.n_classes)
        mean = torch.zeros_like(self.means).index_add_(0, labels, h) / fresh.clamp_min(1)[:, None]
        rest = h - mean[labels]
        share = (self.counts * fresh).double() / (self.counts + fresh).clamp_min(1)
        apart = torch.where((self.counts > 0)[:, None], mean - self.means, 0.0) * (fresh > 0)[:, None]
        if self.scatter:
            self._within += rest.T @ rest + (apart * share[:, None]).T @ apart
        else:
            self._within += rest.square().sum() + (apart.square().sum(1) * share).sum()
        step = (fresh.double() / (self.counts + fresh).clamp_min(1))[:, None]
        self.means = self.means + step * (mean - self.means) * (fresh > 0)[:, None]
        self.counts = self.counts + fresh
        return self

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def within(self) -> Float[Tensor, "d d"]:
        """Covariance within classes: the mean over samples of ``(h - mean)(h - mean)^T``."""
        if not self.scatter:
            raise InvalidInput("scatter=False: only the trace of the covariance within classes was kept")
        return self._within / max(self.count, 1)

    @property
    def within_trace(self) -> float:
        """Its trace: the mean squared distance of a sample from its class's mean."""
        total = self._within.trace() if self.scatter else self._within
        return float(total) / max(self.count, 1)

    @property
    def global_mean(self) -> Float[Tensor, " d"]:
        """Mean of all samples: class means weighted by their counts."""
        return (self.means * self.counts[:, None]).sum(0) / max(self.count, 1)
