"""Diffusion spectral entropy: the kernel, its eigenvalues, and their entropy by three methods."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.lib.mixins import NDArrayOperatorsMixin
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.neighbours import gaussian_kernel, median_distance
from broadsheet.nn.plotting import COLOURS, CYCLE, new_axes
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.validation import require_finite

Bandwidth = Any  # a positive number, "sqrt_dim" or "median"; checked by `bandwidth`
Times = Any  # a positive number or a list of them; checked by `diffusion_times`
NORMALISATIONS = ("walk", "anisotropic")
METHODS = ("exact", "nystroem", "slq")
FAR, NEAR = 5.0, 0.05  # median distance / sigma beyond which the entropy only tells the bandwidth


class BandwidthWarning(UserWarning):
    """The bandwidth is so far from the data's scale that the entropy is pinned at one of its ends."""


class NumberLike(NDArrayOperatorsMixin):
    """A result whose ``value`` (a number, or an array for several ``t``) stands for it in arithmetic."""

    value: Any

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [item.value if isinstance(item, NumberLike) else item for item in inputs]
        return getattr(ufunc, method)(*plain, **options)


@dataclass(frozen=True, eq=False)
class SpectralEntropy(NumberLike):
    """An entropy in bits; works as a number (or an array, for several ``t``) in arithmetic.

    Attributes:
        value: the entropy, or one per ``t``.
        standard_error: of the random parts of the method (0 when exact).
        truncation_error: how far what the approximation leaves out may move the value (0 when exact).
        error: half width of a 95 % interval from both (0 when exact): Student's quantile times the standard error, plus
            the truncation error.
        method: ``"exact"``, ``"nystroem"`` or ``"slq"``.
        sigma: bandwidth used, in the unit of the activations: the value has no meaning without it.
        t: diffusion time(s).
        n_samples: points handed in.
        n_used: points the value was computed from (fewer when they were subsampled).
        normalisation: which walk.
        eigenvalues: (n_used,) descending, or None for ``"slq"``, which never forms them.
    """

    value: float | np.ndarray
    standard_error: float | np.ndarray
    truncation_error: float | np.ndarray
    error: float | np.ndarray
    method: str
    sigma: float
    t: float | tuple[float, ...]
    n_samples: int
    n_used: int
    normalisation: str
    eigenvalues: Tensor | None = field(default=None, repr=False)

    @property
    def largest(self) -> float:
        """The largest value that ``n_used`` points can reach, log2 of their number."""
        return math.log2(self.n_used)

    def to_frame(self) -> Any:
        """A pandas table with one row per ``t``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "t": np.atleast_1d(self.t),
                "bits": np.atleast_1d(self.value),
                "standard_error": np.atleast_1d(self.standard_error),
                "truncation_error": np.atleast_1d(self.truncation_error),
                "error": np.atleast_1d(self.error),
                "sigma": self.sigma,
                "n_used": self.n_used,
                "method": self.method,
            }
        )

    def plot(self, ax: Any = None) -> Any:
        """Eigenvalues (raised to each ``t``) against their rank; returns the axes.

        Raises:
            InvalidInput: the method did not form eigenvalues.
        """
        if self.eigenvalues is None:
            raise InvalidInput(f"method={self.method!r} forms no eigenvalues: use 'exact' or 'nystroem' to plot them")
        ax = new_axes(ax)
        rank = np.arange(1, self.n_used + 1)
        values = self.eigenvalues.cpu().numpy()
        for t, bits, colour in zip(np.atleast_1d(self.t), np.atleast_1d(self.value), CYCLE, strict=False):
            ax.plot(rank, np.maximum(values**t, 1e-12), color=colour, label=f"t = {t:g}: {bits:.2f} bits")
        ax.axhline(0.01, color=COLOURS["light"], linewidth=1)
        ax.set(xscale="log", yscale="log", ylim=(1e-8, 2), xlabel="rank", ylabel="eigenvalue$^{\\,t}$")
        ax.legend()
        return ax


def diffusion_matrix(
    X: Any,
    sigma: Bandwidth = 10.0,
    alpha: int | float = 0.5,
    normalisation: str = "walk",
) -> Float[Tensor, "n n"]:
    """The symmetric matrix that is similar to the random walk on the points, and so has its eigenvalues.

    Args:
        X: (N, D) activations, numpy or torch; computed in float64 on their device.
        sigma: bandwidth of the Gaussian, in the unit of X; ``"sqrt_dim"`` for sqrt(D), ``"median"`` for the median
            distance.
        alpha: power of the density that is divided out, in [0, 1].
        normalisation: ``"walk"``, Q^-1/2 G Q^-1/2, as the official code (alpha must be 1/2); ``"anisotropic"``,
            D^-1/2 K D^-1/2 with K = Q^-alpha G Q^-alpha, as the paper defines it.

    Returns:
        (N, N) symmetric, largest eigenvalue 1.

    Raises:
        InvalidInput: bad activations, bandwidth or normalisation.

    Source: equations of section III of the paper; see the package's docstring for the two normalisations.
    """
    points = as_points(X)
    return _walk(points, bandwidth(points, sigma), alpha, normalisation)


def diffusion_eigenvalues(
    X: Any,
    sigma: Bandwidth = 10.0,
    alpha: int | float = 0.5,
    normalisation: str = "walk",
) -> Float[Tensor, " n"]:
    """Eigenvalues of the random walk on the points, descending, in [0, 1].

    Args:
        X: (N, D) activations.
        sigma: bandwidth, see :func:`diffusion_matrix`.
        alpha: power of the density that is divided out.
        normalisation: ``"walk"`` or ``"anisotropic"``.
    """
    return _eigenvalues(diffusion_matrix(X, sigma, alpha, normalisation))


def diffusion_spectral_entropy(
    X: Any,
    sigma: Bandwidth = 10.0,
    t: Times = 1,
    max_samples: int = 10_000,
    seed: int = 0,
    method: str = "exact",
    alpha: int | float = 0.5,
    normalisation: str = "walk",
    landmarks: int = 2000,
    probes: int = 16,
    steps: int = 40,
    memory_gib: int | float = 2.0,
    progress: Progress = SILENT,
) -> SpectralEntropy:
    """Entropy (bits) of the eigenvalues of the random walk on a cloud of activations.

    It reads like the logarithm of the number of distinct clusters and branches. Only X / sigma matters, so report
    sigma.

    Args:
        X: (N, D) activations, numpy or torch, not rescaled; computed in float64 on their device.
        sigma: bandwidth, in the unit of X; ``"sqrt_dim"`` for sqrt(D), ``"median"`` for the median distance.
        t: diffusion time; a list gives an array from one decomposition.
        max_samples: ``"exact"`` takes that many points at random from a larger cloud (``n_used`` in the result).
        seed: of the subsample, the landmarks and the probes.
        method: ``"exact"``, O(N^3) time and O(N^2) memory; ``"nystroem"``, O(N landmarks^2), with eigenvalues from
            landmark points, quick but rough at small t, where the many eigenvalues that landmarks cannot see count;
            ``"slq"``, O(N^2 D steps), or O(N^2 steps) while the kernel fits in memory, with an unbiased trace estimate,
            good to a few thousandths of a bit. The last two use all points and report their errors. 100,000 points of
            1000 features took one core a minute and 6 GiB with ``"nystroem"`` (9.1 bits, give or take 1.0, at t = 1;
            3.80, give or take 0.09, at t = 2), and 55 minutes and 3 GiB with ``"slq"`` (give or take 0.013 and 0.007:
            41 passes of 10^13 operations; with ``steps=12`` a third of them, give or take 0.085 and 0.007).
        alpha: power of the density that is divided out, see :func:`diffusion_matrix`.
        normalisation: ``"walk"`` (official code) or ``"anisotropic"`` (paper).
        landmarks: points that ``"nystroem"`` represents the cloud by.
        probes: random vectors of ``"slq"``.
        steps: Lanczos steps of ``"slq"`` at most; it ends earlier where further steps do not move the result.
        memory_gib: ``"slq"`` keeps the kernel if it fits in this much memory and recomputes blocks of it otherwise.
        progress: where ``"nystroem"`` and ``"slq"`` say how far they are; Ctrl-C stops them between two blocks.

    Returns:
        the entropy with its errors; ``float(result)`` or ``result.value`` is the number.

    Raises:
        InvalidInput: bad activations, bandwidth, t, method or normalisation.

    Example:
        >>> clusters = torch.eye(4).repeat_interleave(25, 0) * 1000  # four tight clusters far apart
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # they are so far apart that the bandwidth is questioned
        ...     round(float(diffusion_spectral_entropy(clusters, sigma=1.0)), 6)
        2.0
    """
    points = as_points(X)
    times = diffusion_times(t)
    check_normalisation(normalisation, alpha)
    if method not in METHODS:
        raise InvalidInput(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}")
    n_samples = len(points)
    if method == "exact":
        points = points[subsample(n_samples, max_samples, seed).to(points.device)]
    width = bandwidth(points, sigma)
    warn_about_bandwidth(points, width)
    eigenvalues = None
    if method == "exact":
        eigenvalues = _eigenvalues(_walk(points, width, alpha, normalisation))
        estimate = (np.array([spectral_entropy(eigenvalues, s) for s in times]), *np.zeros((3, len(times))))
    else:
        from broadsheet.geometry.diffusion_spectral_entropy import scalable

        kernel = (points, width, times, alpha, normalisation)
        if method == "nystroem":
            estimate, eigenvalues = scalable.by_landmarks(*kernel, landmarks, seed, progress)
        else:
            estimate = scalable.by_lanczos(*kernel, probes, steps, memory_gib, seed, progress)
    several = not isinstance(t, int | float)
    value, error, truncation, interval = (one if several else float(one[0]) for one in estimate)
    return SpectralEntropy(
        value,
        error,
        truncation,
        interval,
        method,
        width,
        tuple(times) if several else times[0],
        n_samples,
        len(points),
        normalisation,
        eigenvalues,
    )


def spectral_entropy(eigenvalues: Tensor, t: int | float = 1) -> float:
    """Entropy (bits) of ``|lambda_i|^t / sum_j |lambda_j|^t``, with 0 log 0 = 0.

    Args:
        eigenvalues: of any shape, not all zero.
        t: power, positive.
    """
    return float(entropy_of_spectrum(eigenvalues.abs(), t))


def entropy_of_spectrum(magnitudes: Tensor, t: int | float) -> Tensor:
    """The same as a tensor, over the last dimension; differentiable."""
    powers = magnitudes if t == 1 else magnitudes**t
    shares = powers / powers.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / math.log(2)


def _walk(points: Tensor, sigma: float, alpha: int | float, normalisation: str) -> Tensor:
    check_normalisation(normalisation, alpha)
    return normalise(gaussian_kernel(points, sigma=sigma), alpha, normalisation)


def normalise(kernel: Tensor, alpha: int | float, normalisation: str) -> Tensor:
    """Affinities (..., N, N) to the symmetric matrix of the walk."""
    scale = kernel.sum(-1) ** -alpha  # q_i^-alpha
    kernel = kernel * scale[..., :, None] * scale[..., None, :]
    if normalisation == "anisotropic":
        scale = kernel.sum(-1).rsqrt()
        kernel = kernel * scale[..., :, None] * scale[..., None, :]
    return kernel


def _eigenvalues(matrix: Tensor) -> Tensor:
    # Rounding gives tiny negative values and a top one just above 1.
    return torch.linalg.eigvalsh(matrix).abs().clamp(max=1.0).sort(descending=True).values


def as_points(X: Any, name: str = "X") -> Tensor:
    """(N, D) activations as a float64 tensor on their device, or a clear error."""
    if isinstance(X, Tensor):
        points = X.detach()
    else:
        try:
            array = np.asarray(X)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{name}: expected (samples, features) numbers, got {type(X).__name__}") from error
        if array.dtype.kind not in "fiub":
            raise InvalidInput(f"{name} has dtype {array.dtype}: expected real numbers")
        # A copy where torch could not share the memory (read-only or reversed arrays).
        points = torch.from_numpy(np.array(array, dtype=np.float64))
    if points.is_complex():
        raise InvalidInput(f"{name} has dtype {points.dtype}: expected real numbers")
    if points.ndim > 2:
        raise InvalidInput(
            f"{name} has shape {tuple(points.shape)}: expected (samples, features). Flatten convolutional activations "
            f"({name}.flatten(1)) or average over space ({name}.mean((2, 3)))"
        )
    if points.ndim != 2:
        raise InvalidInput(
            f"{name} has shape {tuple(points.shape)}: expected (samples, features), {name}.reshape(-1, 1) for one"
        )
    if len(points) < 2:
        raise InvalidInput(f"{name} has {len(points)} sample(s): an entropy needs at least 2")
    if points.shape[1] == 0:
        raise InvalidInput(f"{name} has no features (shape {tuple(points.shape)})")
    points = points.double()
    require_finite(name, points)
    return points


def bandwidth(points: Tensor, sigma: Bandwidth) -> float:
    """The number that a ``sigma`` argument stands for."""
    if sigma == "sqrt_dim":
        return math.sqrt(points.shape[1])
    if sigma == "median":
        width = median_distance(points)
        if width == 0:
            raise InvalidInput("sigma='median': the median distance is 0 (most points coincide); give a number")
        return width
    if isinstance(sigma, str) or not isinstance(sigma, int | float | np.number):
        raise InvalidInput(f"sigma={sigma!r}: expected a positive number, 'sqrt_dim' or 'median'")
    if not (float(sigma) > 0 and math.isfinite(float(sigma))):
        raise InvalidInput(f"sigma={sigma}: the bandwidth must be a positive finite number")
    return float(sigma)


def diffusion_times(t: Any) -> list[float]:
    """The numbers that a ``t`` argument stands for."""
    try:
        times = [float(value) for value in np.atleast_1d(np.asarray(t, dtype=float)).ravel()]
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"t={t!r}: expected a positive number or a list of them") from error
    if not times or not all(value > 0 and math.isfinite(value) for value in times):
        raise InvalidInput(f"t={t}: diffusion times must be positive finite numbers")
    return times


def check_normalisation(normalisation: str, alpha: int | float) -> None:
    """Refuse unknown normalisations and powers."""
    if normalisation not in NORMALISATIONS:
        raise InvalidInput(f"normalisation={normalisation!r}: expected 'walk' or 'anisotropic'")
    if not 0 <= alpha <= 1:
        raise InvalidInput(f"alpha={alpha}: the power of the density lies in [0, 1]")
    if normalisation == "walk" and alpha != 0.5:
        raise InvalidInput(
            f"alpha={alpha} with normalisation='walk': Q^-alpha G Q^-alpha is similar to a random walk only for "
            "alpha=0.5; use normalisation='anisotropic' for other powers (alpha=0 there is the same as 'walk')"
        )


def subsample(n: int, max_samples: int, seed: int) -> Tensor:
    """Indices of at most ``max_samples`` of ``n`` points, in order."""
    if max_samples < 2:
        raise InvalidInput(f"max_samples={max_samples}: an entropy needs at least 2")
    if n <= max_samples:
        return torch.arange(n)
    chosen = np.random.default_rng(seed).choice(n, max_samples, replace=False)
    return torch.from_numpy(np.sort(chosen))


def warn_about_bandwidth(points: Tensor, sigma: float) -> None:
    """Warn where sigma is far off the scale of the data and propose the median distance."""
    ratio = (median := median_distance(points)) / sigma
    if NEAR <= ratio <= FAR:
        return
    end = "log2 of the number of samples (or of tight clusters)" if ratio > FAR else "0"
    advice = f"the median distance is {median:.3g}" if median else "most points coincide"
    warnings.warn(
        f"sigma={sigma:.3g} is {'small' if ratio > FAR else 'large'} for this data ({advice}): the entropy is pinned "
        f"near {end}. sigma='median' follows the data's scale",
        BandwidthWarning,
        stacklevel=3,
    )
