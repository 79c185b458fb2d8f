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
        mean_x, mean_y = x.mean(0), None if y is None else y.mean(0)
        share, dx, dy = self._joined(len(x), mean_x, mean_y)
        x = x - mean_x
        # Products are added in place: beside what is kept, no second matrix of its size is made.
        _shift(_products(self._xx, x, x), dx, dx, share)
        if y is not None and mean_y is not None and dy is not None:
            y = y - mean_y
            _shift(_products(self._yy, y, y), dy, dy, share)
            _shift(_products(self._xy, x, y), dx, dy, share)
        return self

    def merge(self, other: "PairMoments") -> "PairMoments":
        """Add what another stream has seen (other samples of the same units); the same object comes back."""
        if other.within != self.within:
            raise InvalidInput(f"within={self.within} here and {other.within} there: the same is expected")
        if other.count == 0:
            return self
        share, dx, dy = self._joined(other.count, other.mean_x, other.mean_y)
        _shift(self._xx.add_(other._xx), dx, dx, share)
        if dy is not None:
            _shift(self._yy.add_(other._yy), dy, dy, share)
            _shift(self._xy.add_(other._xy), dx, dy, share)
        return self

    def copy(self) -> "PairMoments":
        """The same sums in memory of their own."""
        return PairMoments(self.within).merge(self)

    @classmethod
    def of_parts(cls, x: "PairMoments", y: "PairMoments", across: "PairMoments") -> "PairMoments":
        """A pair out of streams that were kept apart: of several sets, each set's own covariance is kept only once.

        Args:
            x, y: of one set each, ``within=True``.
            across: of both, ``within=False``, over the same samples.

        Returns:
            a pair with everything; it shares memory with the parts, so copy it before they go on.
        """
        if not (x.within and y.within) or not x.count == y.count == across.count:
            raise InvalidInput(
                f"{x.count}, {y.count} and {across.count} samples: streams of the same samples are expected, those of "
                "one set with within=True"
            )
        pair = cls()
        pair.count, pair.mean_x, pair.mean_y = across.count, across.mean_x, across.mean_y
        pair._xx, pair._yy, pair._xy = x._xx, y._xx, across._xy
        return pair

    def between(self) -> "PairMoments":
        """Without the covariances inside each set; it shares memory."""
        if not self.within:
            return self
        part = PairMoments(False)
        part.count, part.mean_x, part.mean_y, part._xy = self.count, self.mean_x, self.mean_y, self._xy
        part._xx = self._xx.diagonal() if self.count else self._xx
        part._yy = None if self._yy is None else self._yy.diagonal()
        return part

    def turned(self) -> "PairMoments":
        """The second set as the first; it shares memory."""
        if self.mean_y is None:
            raise InvalidInput("there is no second set: call update(x, y)")
        part = PairMoments(self.within)
        part.count, part.mean_x, part.mean_y = self.count, self.mean_y, self.mean_x
        part._xx, part._yy, part._xy = self._yy, self._xx, self._xy.T
        return part

    def subset(self, x: Tensor, y: Tensor) -> "PairMoments":
        """The moments of some of the units only: a copy.

        Args:
            x, y: numbers of units of either set, ``[m]`` and ``[n]`` integers.
        """
        if not self.within or self.mean_y is None:
            raise InvalidInput("a subset needs two sets and covariances inside them: PairMoments(within=True)")
        part = PairMoments()
        part.count, part.mean_x, part.mean_y = self.count, self.mean_x[x], self.mean_y[y]
        part._xx, part._yy, part._xy = self._xx[x][:, x], self._yy[y][:, y], self._xy[x][:, y]
        return part

    def _joined(self, m: int, mean_x: Tensor, mean_y: Tensor | None) -> tuple[float, Tensor, Tensor | None]:
        """Take in ``m`` samples' means: the weight of what they lie apart from those so far, and how far that is."""
        if self.count == 0:
            p, q = len(mean_x), 0 if mean_y is None else len(mean_y)
            self.mean_x = torch.zeros_like(mean_x)
            self._xx = mean_x.new_zeros((p, p) if self.within else p)
            if mean_y is not None:
                self.mean_y = torch.zeros_like(mean_y)
                self._yy, self._xy = mean_x.new_zeros((q, q) if self.within else q), mean_x.new_zeros(p, q)
        for side, new in (("mean_x", mean_x), ("mean_y", mean_y)):
            mine = getattr(self, side)
            if (None if mine is None else mine.shape) != (None if new is None else new.shape):
                sizes = ["none" if mean is None else len(mean) for mean in (mine, new)]
                raise InvalidInput(f"{side[-1]} had {sizes[0]} units so far and has {sizes[1]} now")
        n, self.count = self.count, self.count + m
        dx, dy = mean_x - self.mean_x, None
        self.mean_x = self.mean_x + dx * (m / self.count)
        if mean_y is not None and self.mean_y is not None:
            dy = mean_y - self.mean_y
            self.mean_y = self.mean_y + dy * (m / self.count)
        return n * m / self.count, dx, dy

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
    """In place: ``cov`` was made for this."""
    return cov.mul_(sx[:, None]).mul_(sy).clamp_(-1, 1)


def _products(sums: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add the products of two sets' values ``[n, p]``, ``[n, q]``, or the squares of one, in place."""
    return sums.addmm_(x.T, y) if sums.ndim == 2 else sums.add_((x * y).sum(0))


def _shift(sums: Tensor, dx: Tensor, dy: Tensor, share: float) -> Tensor:
    """Add what the means of two samples lie apart, in place."""
    return sums.addr_(dx, dy, alpha=share) if sums.ndim == 2 else sums.add_(dx * dy, alpha=share)


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
