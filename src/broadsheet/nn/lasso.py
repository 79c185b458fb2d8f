"""Sparse linear maps from covariances alone: least squares with an l1 penalty, solved to exact zeros.

    found = lasso(cov_x, cov_xy, l1=0.05)
    found.weight, found.violation

The problem is convex and its size does not depend on the number of samples. Proximal gradient steps with momentum
(FISTA, Beck and Teboulle 2009), restarted wherever the momentum points uphill (O'Donoghue and Candes 2015), find which
weights are zero; once those no longer change, the others are solved for directly.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.validation import require_finite

CHECK = 25  # steps between two looks at the conditions of optimality


class LassoWarning(UserWarning):
    """The steps ran out before the tolerance was reached."""


@dataclass(frozen=True)
class Lasso:
    """A sparse map, one row of weights for each output.

    Attributes:
        weight: ``[q, p]``; zeros are exact.
        l1: the penalty.
        violation: how far the conditions of optimality are missed at most (Karush, Kuhn and Tucker), in the units of
            the covariance.
        steps: proximal steps taken.
    """

    weight: Float[Tensor, "q p"]
    l1: float
    violation: float
    steps: int

    @property
    def active(self) -> Int[Tensor, " q"]:
        """Weights of each row that are not zero."""
        return (self.weight != 0).sum(1)


def lasso(
    gram: Float[Tensor, "p p"],
    target: Float[Tensor, "p q"],
    l1: float | int,
    start: Tensor | None = None,
    tol: float = 1e-9,
    max_steps: int = 20_000,
    largest: float | None = None,
) -> Lasso:
    """Minimise ``1/2 tr(W G W^T) - tr(W C) + l1 |W|_1``.

    With ``G`` and ``C`` covariances this is half the mean squared error, less a constant, and the penalty. Rows are
    problems of their own and stop on their own. Cost of a step: ``p^2`` multiply-adds for each row that is not done.

    Args:
        gram: ``G``, symmetric and positive semidefinite.
        target: ``C``.
        l1: not negative; 0 gives least squares (of minimal length where units are collinear), solved directly.
        start: ``[q, p]``, where to begin, such as the solution for the next larger penalty.
        tol: conditions of optimality are met to this, in the units of ``target``.
        max_steps: at most; a row that needs more is left where it is, with a warning.
        largest: eigenvalue of ``gram``, where it is known already; computed otherwise.

    Raises:
        InvalidInput: a negative penalty, other sizes, or values that are not finite.
    """
    l1 = float(l1)
    if not l1 >= 0:
        raise InvalidInput(f"l1={l1}: a penalty is 0 or more")
    if start is not None and start.shape != target.T.shape:
        raise InvalidInput(f"start has shape {tuple(start.shape)}: expected {tuple(target.T.shape)}")
    require_finite("gram", gram)
    require_finite("target", target)
    c = target.T  # [q, p]
    if l1 == 0:
        weight = c @ torch.linalg.pinv(gram, hermitian=True)
        return Lasso(weight, l1, float(_violation(weight, gram, c, l1).max()) if c.numel() else 0.0, 0)
    weight = torch.zeros_like(c) if start is None else start.clone().to(c)
    top = largest_eigenvalue(gram) if largest is None else largest
    if top <= 0:
        return Lasso(torch.zeros_like(c), l1, 0.0, 0)
    left = torch.arange(len(c), device=c.device)  # rows that are not done
    w, before, zeros, step = weight.clone(), weight.clone(), None, 0
    t = torch.ones(len(c), 1, dtype=c.dtype, device=c.device)
    while len(left) and step < max_steps:
        for _ in range(min(CHECK, max_steps - step)):
            t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
            ahead = w + (t - 1) / t_next * (w - before)
            new = _shrink(ahead - (ahead @ gram - c[left]) / top, l1 / top)
            uphill = ((ahead - new) * (new - w)).sum(1, keepdim=True) > 0
            t, before, w = torch.where(uphill, 1.0, t_next), torch.where(uphill, new, w), new
            step += 1
        done = _violation(w, gram, c[left], l1) <= tol
        pattern = w != 0
        if zeros is not None:
            for row in (~done & (pattern == zeros).all(1)).nonzero().flatten().tolist():
                exact = with_pattern(w[row], gram, c[left[row]], l1)
                if float(_violation(exact[None], gram, c[left[row]][None], l1)) <= tol:
                    w[row], done[row] = exact, True
        weight[left] = w
        left, w, before, t, zeros = left[~done], w[~done], before[~done], t[~done], pattern[~done]
    violation = float(_violation(weight, gram, c, l1).max()) if c.numel() else 0.0
    if len(left):
        warnings.warn(
            f"{len(left)} of {len(c)} rows miss the conditions of optimality by up to {violation:.1e} after {step} "
            f"steps (tol={tol:g}): give more max_steps, or a larger l1 than {l1:g}",
            LassoWarning,
            stacklevel=2,
        )
    return Lasso(weight, l1, violation, step)


def largest_eigenvalue(gram: Float[Tensor, "p p"]) -> float:
    """What bounds the step; 0 for no units."""
    return float(torch.linalg.eigvalsh(gram)[-1]) if len(gram) else 0.0


def _shrink(x: Tensor, by: float) -> Tensor:
    return x.sign() * (x.abs() - by).clamp_min(0)


def _violation(w: Tensor, gram: Tensor, c: Tensor, l1: float) -> Tensor:
    """``[rows]``: how far the subgradient of each row's objective is from holding zero."""
    gradient = w @ gram - c
    at_zero = (gradient.abs() - l1).clamp_min(0)
    return torch.where(w == 0, at_zero, (gradient + l1 * w.sign()).abs()).amax(1)


def with_pattern(
    w: Float[Tensor, " p"], gram: Float[Tensor, "p p"], c: Float[Tensor, " p"], l1: float | int = 0.0
) -> Float[Tensor, " p"]:
    """One row's minimiser among weights with the zeros and the signs of ``w``, if there is one: a linear system.

    Without a penalty it is least squares on the chosen units: a sparse row without its shrinkage.

    Args:
        w: the row.
        gram: as in :func:`lasso`.
        c: the row's column of ``target``.
        l1: the penalty.
    """
    on = w != 0
    exact = torch.zeros_like(w)
    inverse = torch.linalg.pinv(gram[on][:, on], hermitian=True)
    exact[on] = inverse @ (c[on] - l1 * w[on].sign())
    return exact
