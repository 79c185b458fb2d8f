"""Sparse maps from covariances: the conditions of optimality, scikit-learn on the samples, and the two ends."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso as SamplesLasso

from broadsheet.errors import InvalidInput
from broadsheet.nn.lasso import LassoWarning, largest_eigenvalue, lasso, with_pattern


def made(n=400, p=12, q=5, seed=0, alike=0.7):
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=random, dtype=torch.float64)
    x = alike * common @ torch.randn(3, p, generator=random, dtype=torch.float64)
    x = x + torch.randn(n, p, generator=random, dtype=torch.float64)
    y = x[:, :q] - 0.5 * x[:, 3 : q + 3] + 0.3 * torch.randn(n, q, generator=random, dtype=torch.float64)
    x, y = ((part - part.mean(0)) / part.std(0, correction=0) for part in (x, y))
    return x, y, x.T @ x / n, x.T @ y / n


@pytest.mark.parametrize("l1", [1e-4, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("alike", [0.0, 0.7, 5.0])  # up to inputs that are nearly collinear
def test_the_conditions_of_optimality_hold_and_scikit_learn_agrees(l1, alike):
    x, y, gram, cross = made(alike=alike)
    found = lasso(gram, cross, l1)
    gradient = found.weight @ gram - cross.T
    assert float(gradient.abs().max()) <= l1 + 1e-8
    on = found.weight != 0
    np.testing.assert_allclose(gradient[on], -l1 * found.weight[on].sign(), atol=1e-8)
    assert found.violation <= 1e-9
    for unit in range(y.shape[1]):
        other = SamplesLasso(alpha=l1, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y[:, unit])
        np.testing.assert_allclose(found.weight[unit], other.coef_, atol=1e-6)
        assert int(found.active[unit]) == int((np.abs(other.coef_) > 1e-9).sum())


def test_no_penalty_is_least_squares_also_with_collinear_units():
    x, y, gram, cross = made()
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(lasso(gram, cross, 0).weight, expected, atol=1e-10)
    twice = torch.cat([x, x[:, :2]], 1)
    found = lasso(twice.T @ twice / len(x), twice.T @ y / len(x), 0.0).weight
    np.testing.assert_allclose(found, np.linalg.lstsq(twice.numpy(), y.numpy(), rcond=None)[0].T, atol=1e-8)
    torch.testing.assert_close(found[:, :2], found[:, 12:])  # of minimal length: shared evenly


def test_a_penalty_above_every_correlation_leaves_nothing_and_just_below_one_weight():
    _, _, gram, cross = made()
    top = float(cross.abs().max())
    assert not lasso(gram, cross, top).weight.any()
    assert int(lasso(gram, cross, 0.999 * top).active.sum()) == 1


def test_a_path_from_warm_starts_ends_where_cold_starts_do():
    _, _, gram, cross = made()
    top, start = largest_eigenvalue(gram), None
    assert top == pytest.approx(float(torch.linalg.matrix_norm(gram, 2)))
    for l1 in (0.3, 0.1, 0.03, 0.01):
        warm = lasso(gram, cross, l1, start, largest=top)
        start = warm.weight
    torch.testing.assert_close(warm.weight, lasso(gram, cross, 0.01).weight, atol=1e-8, rtol=0)
    again = lasso(gram, cross, 0.01, warm.weight)
    assert again.steps <= warm.steps
    assert torch.equal(again.weight != 0, warm.weight != 0)


def test_a_row_without_its_shrinkage_is_least_squares_on_its_units():
    x, y, gram, cross = made()
    row = lasso(gram, cross, 0.1).weight[2]
    on = row.numpy() != 0
    assert 0 < on.sum() < 12
    full = with_pattern(row, gram, cross[:, 2])
    np.testing.assert_allclose(full[on], np.linalg.lstsq(x.numpy()[:, on], y[:, 2], rcond=None)[0], atol=1e-9)
    assert not full[~on].any()


def test_the_start_is_not_changed_and_steps_that_run_out_are_said():
    _, _, gram, cross = made(alike=5.0)
    start = torch.ones_like(cross.T)
    with pytest.warns(LassoWarning, match="rows miss the conditions"):
        found = lasso(gram, cross, 1e-5, start, max_steps=5)
    assert found.steps == 5
    assert found.violation > 1e-9
    assert torch.equal(start, torch.ones_like(start))


def test_nothing_varies():
    assert not lasso(torch.zeros(3, 3), torch.zeros(3, 2), 0.1).weight.any()
    assert lasso(torch.zeros(0, 0), torch.zeros(0, 2), 0.1).weight.shape == (2, 0)


def test_bad_input():
    _, _, gram, cross = made()
    for bad in (-0.1, float("nan")):
        with pytest.raises(InvalidInput, match="0 or more"):
            lasso(gram, cross, bad)
    with pytest.raises(InvalidInput, match="start has shape"):
        lasso(gram, cross, 0.1, start=cross)
    cross[1, 0] = torch.nan
    with pytest.raises(InvalidInput, match="target holds 1 NaN"):
        lasso(gram, cross, 0.1)
