"""The geometry that a deep linear head ends in, from class counts and decays alone.

The objective, over free features ``H`` and ``M`` linear layers without bias (arXiv:2301.00437, equation 2):

    1/(2N) ||W_M ... W_1 H - Y||_F^2 + sum_j w_j/2 ||W_j||_F^2 + f/2 ||H||_F^2

Every class is a problem of its own: with ``b_k = (M N / n_k) (N w_1 ... w_M f)^(1/M)`` minimise
``g(x) = 1 / (x^M + 1) + b_k x`` over ``x >= 0``. The squared singular value of the product of the weights is then
``N f x_k^M``, and a class whose best ``x`` is 0 vanishes. The stationary points have two positive roots; the larger one
is the local minimum, and it is the global one only where ``g(x) < 1``: the published scripts keep it in any case, and
fail where there is none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from broadsheet.errors import InvalidInput

Decay = float | Sequence[float]


@dataclass(frozen=True)
class LayerPrediction:
    """What a head's layer ends in, float64.

    Attributes:
        weights: ``[K]``, squared length of each class's row of the product ``A`` of this layer and all later ones;
            rows of different classes are orthogonal.
        features: ``[K]``, squared length of each class's mean at the layer's input.
        outputs: ``[K]``, what ``A`` gives for the class's mean at the class's own output (1 is the target).
        ratio: ``[K]``, length of a row of ``A`` over that of the mean; 0 for a class that vanishes.
    """

    weights: Float[Tensor, " K"]
    features: Float[Tensor, " K"]
    outputs: Float[Tensor, " K"]

    @property
    def ratio(self) -> Float[Tensor, " K"]:
        return torch.where(self.features > 0, (self.weights / self.features.clamp_min(1e-300)).sqrt(), 0.0)


@dataclass(frozen=True)
class FramePrediction:
    """The general orthogonal frame (GOF) of a bias-free head under squared error.

    Attributes:
        counts: ``[K]``, samples of each class.
        x: ``[K]``, solution of each class's problem; 0 where it vanishes.
        sigma2: ``[K]``, squared singular value of the product of all layers' weights.
        lost: ``[K]``, classes that vanish.
        tied: ``[K]``, classes whose share in the last place of a head too narrow for all is not determined.
        loss: optimal value of the objective.
        weight_decay: of each layer.
        feature_decay: of the features.
    """

    counts: Int[Tensor, " K"]
    x: Float[Tensor, " K"]
    sigma2: Float[Tensor, " K"]
    lost: Bool[Tensor, " K"]
    tied: Bool[Tensor, " K"]
    loss: float
    weight_decay: tuple[float, ...]
    feature_decay: float

    @property
    def depth(self) -> int:
        return len(self.weight_decay)

    @property
    def balance(self) -> Float[Tensor, " K"]:
        """Decay times squared singular value, the same in every layer and in the features, for each class."""
        return (self.sigma2 * math.prod(self.weight_decay)) ** (1 / self.depth)

    def layer(self, number: int = 1) -> LayerPrediction:
        """The geometry at one layer of the head.

        Args:
            number: 1 for the layer that reads the features, ``depth`` for the one that gives the logits.
        """
        if not 1 <= number <= self.depth:
            raise InvalidInput(f"layer {number}: the head has {self.depth}")
        total = int(self.counts.sum())
        c = self.balance
        later = math.prod(self.weight_decay[number - 1 :])
        earlier = math.prod(self.weight_decay[: number - 1])
        weights = c ** (self.depth - number + 1) / later
        shift = self.sigma2 + total * self.feature_decay
        features = c ** (number - 1) / earlier * self.sigma2 / shift**2
        return LayerPrediction(weights, features, self.sigma2 / shift)

    def to_frame(self) -> pd.DataFrame:
        """One row for each class: ``count``, ``weight_length``, ``feature_length``, ``output``, ``lost``."""
        layer = self.layer()
        return pd.DataFrame(
            {
                "count": self.counts.tolist(),
                "weight_length": layer.weights.sqrt().tolist(),
                "feature_length": layer.features.sqrt().tolist(),
                "output": layer.outputs.tolist(),
                "lost": self.lost.tolist(),
            }
        )


def survival_bound(depth: int) -> float:
    """The ``b`` from which on a class vanishes: ``(M - 1)^((M - 1) / M) / M``."""
    _depth(depth)
    return (depth - 1) ** ((depth - 1) / depth) / depth if depth > 1 else 1.0


def gof_prediction(
    counts: Sequence[int] | Tensor,
    weight_decay: Decay,
    feature_decay: float,
    depth: int = 1,
    width: int | None = None,
) -> FramePrediction:
    """The frame that global minimisers of the bias-free objective form (arXiv:2301.00437, theorem 4.1).

    The objective sums over outputs and averages over samples, halved. A head trained with ``torch.nn.MSELoss`` divides
    by the number of classes too and does not halve: multiply both decays by K / 2 before comparing.

    Args:
        counts: samples of each class, ``[K]``.
        weight_decay: of every layer, or one for each; the penalty is half of it times the squared weights.
        feature_decay: likewise for the features of all samples together.
        depth: linear layers.
        width: the narrowest of the features and hidden layers; None for wide enough. A head narrower than K keeps the
            largest classes.

    Raises:
        InvalidInput: a count or decay that is not positive.
    """
    n = _counts(counts)
    decays = _decays(weight_decay, feature_decay, depth)
    total = int(n.sum())
    root = (total * math.prod(decays) * feature_decay) ** (1 / depth)
    x = torch.tensor([_best_x(depth * total / int(c) * root, depth) for c in n], dtype=torch.float64)
    tied = torch.zeros(len(n), dtype=torch.bool)
    if width is not None and width < len(n):
        if width < 1:
            raise InvalidInput(f"width={width}: at least 1 is needed")
        order = n.argsort(descending=True, stable=True)
        x[order[width:]] = 0
        if n[order[width - 1]] == n[order[width]]:
            tied = n == n[order[width]]
    sigma2 = total * feature_decay * x**depth
    share = n.double() / total
    value = torch.where(x > 0, 1 / (x**depth + 1) + depth / share * root * x, 1.0)
    loss = float((share / 2 * value).sum())
    return FramePrediction(n, x, sigma2, x == 0, tied, loss, decays, feature_decay)


def collapse_threshold(total: int, weight_decay: Decay, feature_decay: float, depth: int = 1) -> float:
    """How many samples a class needs at least, so that it does not vanish from a bias-free head.

    Args:
        total: samples of all classes together.
        weight_decay, feature_decay, depth: as in :func:`gof_prediction`.

    Returns:
        a class with more samples than this survives.
    """
    if total < 1:
        raise InvalidInput(f"total={total}: at least 1 is needed")
    decays = _decays(weight_decay, feature_decay, depth)
    root = (total * math.prod(decays) * feature_decay) ** (1 / depth)
    return depth * total * root / survival_bound(depth)


def _best_x(b: float, depth: int) -> float:
    """The global minimiser of ``1 / (x^M + 1) + b x`` over ``x >= 0``."""
    if b >= survival_bound(depth):
        return 0.0
    if depth == 1:
        return 1 / math.sqrt(b) - 1
    start = ((depth - 1) / (depth + 1)) ** (1 / depth)  # the slope of the first term is steepest here

    def slope(log_x: float) -> float:
        power = math.exp(depth * log_x)
        return math.log(depth) + (depth - 1) * log_x - 2 * math.log1p(power) - math.log(b)

    # Far out the first term falls like x^-M: its slope is below b once M x^-(M + 1) is.
    end = math.log(depth / b) / (depth + 1) + 1
    x = math.exp(brentq(slope, math.log(start), max(end, math.log(start) + 1), xtol=1e-15, rtol=1e-15))  # type: ignore[reportArgumentType]
    return _polished(x, b, depth)


def _polished(x: float, b: float, depth: int) -> float:
    """Two steps of Newton's method: the bracketing leaves an error of some rounding units."""
    for _ in range(2):
        power = x**depth
        first = depth * x ** (depth - 1) / (power + 1) ** 2 - b
        second = first + b
        slope = second * ((depth - 1) / x - 2 * depth * x ** (depth - 1) / (power + 1))
        x -= first / slope
    return x


# ------------------------------------------------------------------------------------------------------ cross entropy


@dataclass(frozen=True)
class CrossEntropyFigure:
    """A stationary arrangement of a balanced head under cross entropy.

    Attributes:
        name: ``"simplex"`` (an equiangular tight frame), ``"polygon"`` (all classes on a circle) or ``"zero"``.
        logits: ``[K, K]``, of every class's mean.
        loss: value of the objective.
    """

    name: str
    logits: Float[Tensor, "K K"]
    loss: float


def cross_entropy_figures(
    n_classes: int, per_class: int, weight_decay: Decay, feature_decay: float, depth: int = 1
) -> tuple[CrossEntropyFigure, ...]:
    """Arrangements of a balanced deep linear head under cross entropy, each at its best scale, the best one first.

    The least that ``M + 1`` factors can cost for a given product is a sum of powers ``2 / (M + 1)`` of its singular
    values, so a product of low rank is cheap when the head is deep. For one layer the simplex is the global minimum;
    for three layers and more the regular polygon lies below it (and a better arrangement still may), so the statement
    that deep heads under cross entropy end in a simplex at their global minimum does not hold in general
    (see also arXiv:2410.23169 and arXiv:2405.14468).

    Args:
        n_classes: K.
        per_class: samples of each.
        weight_decay, feature_decay, depth: as in :func:`gof_prediction`.
    """
    if n_classes < 2 or per_class < 1:
        raise InvalidInput(f"n_classes={n_classes}, per_class={per_class}: expected at least 2 and 1")
    decays = _decays(weight_decay, feature_decay, depth)
    eye = torch.eye(n_classes, dtype=torch.float64)
    angle = 2 * math.pi / n_classes * torch.arange(n_classes, dtype=torch.float64)
    shapes = {
        "simplex": eye - 1 / n_classes,
        "polygon": torch.cos(angle[:, None] - angle),
        "zero": torch.zeros(n_classes, n_classes, dtype=torch.float64),
    }
    price = (depth + 1) / 2 * (math.prod(decays) * feature_decay) ** (1 / (depth + 1))
    found = []
    for name, shape in shapes.items():
        singular = torch.linalg.svdvals(shape) * math.sqrt(per_class)
        singular = singular[singular > 1e-9]
        power = 2 / (depth + 1)

        def value(scale: float, shape: Tensor = shape, singular: Tensor = singular, power: float = power) -> float:
            logits = scale * shape
            fit = float((logits.logsumexp(0) - logits.diagonal()).mean())
            return fit + price * float((scale * singular).pow(power).sum()) if scale > 0 else math.log(n_classes)

        best = minimize_scalar(
            lambda log: value(math.exp(log)), bounds=(-12, 6), method="bounded", options={"xatol": 1e-12}
        )
        scale = (
            math.exp(float(best.x)) if name != "zero" and value(math.exp(float(best.x))) < math.log(n_classes) else 0.0
        )
        found.append(CrossEntropyFigure(name, scale * shape, value(scale)))
    return tuple(sorted(found, key=lambda figure: figure.loss))


# -------------------------------------------------------------------------------------------------------------- checks


def _depth(depth: int) -> None:
    if depth < 1:
        raise InvalidInput(f"depth={depth}: a head has at least one linear layer")


def _decays(weight_decay: Decay, feature_decay: float, depth: int) -> tuple[float, ...]:
    _depth(depth)
    decays = tuple(weight_decay) if isinstance(weight_decay, Sequence) else (float(weight_decay),) * depth
    if len(decays) != depth:
        raise InvalidInput(f"weight_decay has {len(decays)} entries: the head has {depth} layers")
    for name, value in [*(("weight_decay", d) for d in decays), ("feature_decay", feature_decay)]:
        if not (value > 0 and math.isfinite(value)):
            raise InvalidInput(
                f"{name}={value}: without decay the objective has no minimum (weights grow for ever); expected a "
                "positive number"
            )
    return decays


def _counts(counts: Sequence[int] | Tensor) -> Tensor:
    n = torch.as_tensor(counts)
    if n.ndim != 1 or len(n) < 2 or n.is_floating_point() or int(n.min()) < 1:
        raise InvalidInput(
            f"counts={n.tolist()}: expected a whole number of at least 1 for each of two or more classes"
        )
    return n.long().cpu()
