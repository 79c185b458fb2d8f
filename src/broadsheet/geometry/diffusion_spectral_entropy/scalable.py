"""Diffusion spectral entropy of clouds too large for an eigen-decomposition, with an account of the error.

Both methods write the walk's symmetric matrix as K = S G S, G the Gaussian affinities and S a diagonal matrix, whose
top eigenvector is known (eigenvalue 1). Each hands back the value, its standard error, its truncation error and the
half width of a 95 % interval: Student's quantile times the first, plus the second.

*Landmarks* (Nyström; Williams and Seeger 2001). G is replaced by C W^-1 C' + diag(1 - c_i' W^-1 c_i), C the affinities
to m landmarks and W those among them; the second term restores the diagonal. Degrees are corrected by what a few
hundred sampled rows, computed in full, show to be missing. Of what the landmarks leave out of the spectrum, only the
sum and the sum of squares are known (the latter from tr K^2, by the sampled rows). Two spectra are given to it: the
restored diagonal itself, as if it had no structure (by majorisation too much entropy at t = 1), and a gamma
distribution with the two moments that it must have, or equal eigenvalues where that would exceed the first. The value
is the mean of both. The truncation error adds up half their distance, the change from a quarter of the landmarks to
all, and what the remaining error of the degrees may do; four such quarters, each with its own rows, give the standard
error.

*Stochastic Lanczos quadrature* of tr K^t and tr K^t log2 K^t (:mod:`broadsheet.nn.lanczos`), with the products
recomputed tile by tile when K does not fit in memory. tr K and tr K^2 are known exactly and serve as control
variates. The process ends once further steps no longer move the result. What is still missing then is judged by the
change that the last quarter of the steps made: for x^t, whose derivatives are infinite at 0, the error falls with the
steps m as m^-2t at worst.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.special import digamma, gammaln
from scipy.stats import t as student
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.diffusion_spectral_entropy.entropy import spectral_entropy
from broadsheet.nn.lanczos import Quadrature, lanczos_quadrature
from broadsheet.nn.neighbours import distance_blocks, distance_tiles
from broadsheet.nn.progress import Progress
from broadsheet.nn.seeding import generator

Estimate = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # values, standard, truncation and 95 % errors, per t
CUT = 1e-10  # eigenvalues of W below this share of the largest are noise
SAMPLED_ROWS = 512  # of K, to estimate tr K^2
TILE = 1024  # rows and columns of the affinities that are recomputed at once
PARTS = 4  # of the landmarks and of the sampled rows, for the standard error
ENOUGH = 1e-3  # bits, or half the standard error: what is less is not worth another pass over all pairs
FLOAT32_REACH = 400.0  # squared radius / 2 sigma^2 up to which float32 distances leave affinities right to about 1e-4


def by_landmarks(
    points: Tensor,
    sigma: float,
    times: list[float],
    alpha: int | float,
    normalisation: str,
    landmarks: int,
    seed: int,
    progress: Progress,
) -> tuple[Estimate, Tensor]:
    """The estimate, and the (N,) approximate eigenvalues."""
    if landmarks < 2 * PARTS:
        raise InvalidInput(f"landmarks={landmarks}: at least {2 * PARTS}, so that {PARTS} parts can be compared")
    n = len(points)
    m = min(landmarks, n)
    draw = np.random.default_rng(seed)
    chosen = torch.from_numpy(draw.choice(n, m, replace=False)).to(points.device)
    sampled = torch.from_numpy(draw.choice(n, min(SAMPLED_ROWS, n), replace=False)).to(points.device)
    columns = _affinities_to(points, chosen, sigma)
    rows = _affinities_to(points, sampled, sigma).T

    def values(part: slice) -> tuple[np.ndarray, np.ndarray, Tensor]:
        here = sampled[part]
        smooth, own, features, scale, slack = _landmark_spectrum(
            columns[:, part], chosen[part], rows[part], here, alpha, normalisation
        )
        second = _squares_left_out(rows[part], here, features, scale)
        spectrum = torch.cat([smooth, own]).sort(descending=True).values[:n].clamp(max=1.0)
        results = np.empty((2, len(times)))
        for i, t in enumerate(times):
            one, other = _extremes(spectrum, smooth, float(own.sum()), second, t)
            results[:, i] = (one + other) / 2, abs(one - other) / 2 + _moved(spectrum, t, slack)
        return results[0], results[1], spectrum

    with progress.task("all landmarks, then parts of them", total=1 + PARTS) as task:
        value, doubt, spectrum = values(slice(None))
        task.advance()
        if m == n:  # every point is a landmark: nothing is left out
            nothing = np.zeros(len(times))
            return (value, nothing, nothing, nothing), spectrum
        parts = np.empty((PARTS, len(times)))
        for part in range(PARTS):
            parts[part] = values(slice(part, None, PARTS))[0]
            task.advance()
    # A part has a quarter of the landmarks and rows, so the spread of their mean is that of the whole.
    error = parts.std(0, ddof=1) / math.sqrt(PARTS)
    truncation = doubt + np.abs(value - parts.mean(0))
    return (value, error, truncation, _interval(error, truncation, PARTS - 1)), spectrum


def _extremes(spectrum: Tensor, smooth: Tensor, mass: float, second: float, t: int | float) -> tuple[float, float]:
    """Entropies with the two spectra that are given to what the landmarks leave out."""
    head, n = smooth.cpu().numpy(), len(spectrum)
    diagonal, gamma = spectral_entropy(spectrum, t), _with_tail(head, mass, second, n, t)
    if t <= 1 and gamma > diagonal:
        return diagonal, _with_tail(head, mass, second, n, t, equal=True)
    return diagonal, gamma


def _row_squares(x: Tensor) -> Tensor:
    """The squared norm of every row, without a second matrix as large."""
    return torch.linalg.vector_norm(x, dim=1).square()


def _squares_left_out(rows: Tensor, sampled: Tensor, features: Tensor, scale: Tensor) -> float:
    """tr K^2 less that of the landmark part: its diagonal as it is, the rest from sampled rows."""
    rest = (rows * scale[sampled, None] * scale).square_() - (features[sampled] @ features.T).square_()
    rest[torch.arange(len(sampled)), sampled] = 0.0
    diagonal = scale**4 - _row_squares(features).square()
    return float(diagonal.sum() + rest.sum() * len(scale) / len(sampled))


def _moved(spectrum: Tensor, t: int | float, errors: Tensor) -> float:
    """Bits by which relative errors of the eigenvalues move the entropy, to second order."""
    shares = spectrum**t / (spectrum**t).sum()
    surprisal = -shares.clamp(min=1e-300).log2()
    spread = float((shares * (surprisal - (shares * surprisal).sum()).abs()).sum())
    return t * float(errors.abs().mean()) * spread + t**2 * float(errors.square().mean()) / (2 * math.log(2))


def _interval(error: np.ndarray, truncation: np.ndarray, freedom: int) -> np.ndarray:
    """Half width of a 95 % interval from a standard error of that many degrees of freedom and a truncation error."""
    if freedom < 1:
        return np.full_like(error, np.nan)
    return student.ppf(0.975, freedom) * error + truncation


def _affinities_to(points: Tensor, chosen: Tensor, sigma: float) -> Tensor:
    """(N, m) affinities of all points to the chosen ones."""
    columns = torch.empty(len(points), len(chosen), dtype=points.dtype, device=points.device)
    for rows, block in distance_blocks(points, points[chosen], rows=2048):
        columns[rows] = block.div_(-2 * sigma**2).exp_()
    columns[chosen, torch.arange(len(chosen), device=points.device)] = 1.0  # a point is at distance 0 from itself
    return columns


def _landmark_spectrum(
    columns: Tensor, chosen: Tensor, rows: Tensor, sampled: Tensor, alpha: int | float, normalisation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues of the landmark part, the diagonal it leaves out, its features, S with K = S G S, degree errors."""
    within = columns[chosen]
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    kept = values > CUT * values[-1]
    features = columns @ (vectors[:, kept] / values[kept].sqrt())  # F F' = C W^-1 C'
    own = (1 - _row_squares(features)).clamp(min=0)  # what is missing on the diagonal
    own[chosen] = 0.0
    slack = torch.zeros(len(sampled), dtype=own.dtype, device=own.device)

    def product(v: Tensor) -> Tensor:
        """G v: what the approximation misses beside the diagonal goes with what it misses on it."""
        known = features @ (features.T @ v) + own * v
        exact = rows @ v
        spread = torch.stack([torch.ones_like(own), own], 1)
        # Least squares of the relative error, or the densest points would speak for all.
        left, right = spread[sampled] / exact[:, None], 1 - known[sampled] / exact
        known += spread @ torch.linalg.lstsq(left.cpu(), right[:, None].cpu(), driver="gelsd")[0][:, 0].to(v)
        # Affinities are positive, their approximation need not be: at least the point's own affinity.
        known = torch.maximum(known, v)
        slack.add_(known[sampled] / exact - 1)
        return known

    scale = product(torch.ones_like(own)) ** -alpha
    if normalisation == "anisotropic":
        scale = scale * (scale * product(scale)).clamp(min=1e-300).rsqrt()
    features.mul_(scale[:, None])
    smooth = torch.linalg.eigvalsh(features.T @ features).clamp(min=0, max=1)
    return smooth, own * scale**2, features, scale, slack


def _with_tail(smooth: np.ndarray, mass: float, second: float, n: int, t: int | float, equal: bool = False) -> float:
    """Entropy (bits) of the landmark eigenvalues and a tail of known sum and sum of squares.

    The tail is gamma-distributed, or made of as many equal eigenvalues as the sums call for, and zeros.
    """
    powers = smooth[smooth > 0] ** t
    total, logs = powers.sum(), (powers * np.log2(powers)).sum()
    count = n - len(smooth)
    if count > 0 and mass > 1e-9:
        mean = mass / count
        variance = max(second / count - mean**2, 1e-6 * mean**2)
        shape, width = mean**2 / variance, variance / mean
        if equal:
            power, log = mean * (mean + width) ** (t - 1), t * math.log(mean + width)
        else:  # E x^t, and E x^t log x^t over it
            power = math.exp(t * math.log(width) + gammaln(shape + t) - gammaln(shape))
            log = t * (math.log(width) + digamma(shape + t))
        total += count * power
        logs += count * power * log / math.log(2)
    return float(np.log2(total) - logs / total)


def by_lanczos(
    points: Tensor,
    sigma: float,
    times: list[float],
    alpha: int | float,
    normalisation: str,
    probes: int,
    steps: int,
    memory_gib: int | float,
    seed: int,
    progress: Progress,
) -> Estimate:
    """The estimate from random probes."""
    n = len(points)
    affinities = _Affinities(points, sigma, memory_gib, progress)
    ones = torch.ones(n, 1, dtype=torch.float64, device=points.device)
    density = affinities.product(ones)  # q = G 1
    scale = density**-alpha
    top = density.sqrt()
    if normalisation == "anisotropic":
        degree = scale * affinities.product(scale)  # D = diag(K 1)
        scale, top = scale * degree.rsqrt(), degree.sqrt()
    top = top / top.norm()
    trace, square = float((scale**2).sum()), affinities.square_sum(scale)
    known: list[tuple[Callable[[Tensor], Tensor], float]] = [(lambda x: x, trace), (lambda x: x**2, square)]

    def estimate(rule: Quadrature) -> Estimate:
        value, error, truncation = np.array([_entropy_by_quadrature(rule, t, known) for t in times]).T
        return value, error, truncation, _interval(error, truncation, probes - 1)

    with progress.task("Lanczos steps, at most", total=steps) as task:

        def product(v: Tensor) -> Tensor:
            image = scale * affinities.product(scale * v)
            task.advance()
            return image

        def settled(rule: Quadrature) -> bool:
            _, error, truncation, interval = estimate(rule)
            task.advance(0, error=float(interval.max()))
            return bool((truncation < np.fmax(ENOUGH, error / 2)).all())

        rule = lanczos_quadrature(
            product,
            n,
            probes=probes,
            steps=steps,
            generator=generator(seed),
            device=points.device,
            deflate=top,
            deflated=torch.ones(1, dtype=torch.float64),
            enough=settled,
        )
    return estimate(rule)


def _entropy_by_quadrature(
    rule: Quadrature, t: float, known: list[tuple[Callable[[Tensor], Tensor], float]]
) -> tuple[float, float, float]:
    """Entropy, standard error and truncation error: log2 S - H / S with S = tr K^t and H = tr K^t log2 K^t."""

    def power(x: Tensor) -> Tensor:
        return x.clamp(min=0) ** t

    def with_log(x: Tensor) -> Tensor:
        return -torch.special.entr(power(x)) / math.log(2)

    total, logs = rule.trace(power, known).value, rule.trace(with_log, known).value

    def linear(x: Tensor) -> Tensor:
        # The first-order change of the entropy with S and H, for the errors.
        return (1 / (total * math.log(2)) + logs / total**2) * power(x) - with_log(x) / total

    spread = rule.trace(linear, known)
    # An error of c m^-2t changes by ((4/3)^2t - 1) of itself over the last quarter of the steps; half as much again for
    # the logarithm.
    left = 1.5 / ((4 / 3) ** (2 * t) - 1) * spread.truncation_error
    return math.log2(total) - logs / total, spread.standard_error, left


class _Affinities:
    """Products with the Gaussian affinities, kept in memory where they fit and recomputed tile by tile otherwise."""

    def __init__(self, points: Tensor, sigma: float, memory_gib: int | float, progress: Progress) -> None:
        self.progress = progress
        n, budget = len(points), memory_gib * 2**30
        scaled = (points - points.mean(0)) / (sigma * math.sqrt(2))
        # float32 halves time and memory, and its seven digits do for products whose random error is far larger, unless
        # the cloud is so wide that distances lose theirs to cancellation.
        precise = 8 * n * n <= budget or float(scaled.square().sum(1).max()) > FLOAT32_REACH
        self.points = scaled.to(torch.float64 if precise else torch.float32)
        self.kernel: Tensor | None = None
        if self.points.element_size() * n * n <= budget:
            kernel = self.points.new_empty(n, n)
            for rows, columns, tile in self._tiles():
                kernel[rows, columns], kernel[columns, rows] = tile, tile.T
            self.kernel = kernel

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        parts = math.ceil(len(self.points) / TILE)
        with self.progress.task("tiles of all pairs", total=parts * (parts + 1) // 2) as task:
            for rows, columns, tile in distance_tiles(self.points, TILE):
                yield rows, columns, tile.neg_().exp_()
                task.advance()

    def product(self, v: Tensor) -> Tensor:
        """G v for (N, p) vectors, float64 in and out."""
        low = v.to(self.points.dtype)
        if self.kernel is not None:
            return (self.kernel @ low).to(v.dtype)
        result = torch.zeros_like(v)
        for rows, columns, tile in self._tiles():
            result[rows] += tile @ low[columns]
            if rows != columns:
                result[columns] += tile.T @ low[rows]
        return result

    def square_sum(self, scale: Tensor) -> float:
        """Sum of the squared entries of S G S, S the diagonal matrix of a (N, 1) vector."""
        weights = (scale**2)[:, 0].to(self.points.dtype)
        if self.kernel is not None:
            return float((self.kernel.square() @ weights).double() @ weights.double())
        total = 0.0
        for rows, columns, tile in self._tiles():
            part = float(weights[rows] @ tile.square_() @ weights[columns])
            total += part if rows == columns else 2 * part
        return total
