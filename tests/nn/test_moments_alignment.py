"""Streaming moments against one pass over everything; alignment against scipy and planted rotations."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.cross_decomposition import CCA

from broadsheet.errors import InvalidInput
from broadsheet.nn.alignment import canonical_correlations, linear_cka, procrustes
from broadsheet.nn.moments import ClassMoments, PairMoments


def made(n=300, p=5, q=4, seed=0, offset=0.0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=random, dtype=torch.float64) + offset
    y = x[:, :q] * 0.5 + torch.randn(n, q, generator=random, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("offset", [0.0, 1e6])  # a mean a million times the spread
@pytest.mark.parametrize("within", [True, False])
def test_batches_give_what_everything_at_once_gives(offset, within):
    x, y = made(offset=offset)
    moments = PairMoments(within)
    for a, b in zip(x.split(37), y.split(37), strict=True):
        moments.update(a, b)
    whole = torch.cov(torch.cat([x, y], 1).T, correction=0)
    torch.testing.assert_close(moments.cov_xy, whole[:5, 5:], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(moments.var_x, x.var(0, correction=0), atol=1e-8, rtol=1e-8)
    found = moments.correlation()
    expected = np.corrcoef(torch.cat([x, y], 1).numpy().T)
    np.testing.assert_allclose(found.xy, expected[:5, 5:], atol=1e-9)
    if within:
        np.testing.assert_allclose(found.x, expected[:5, :5], atol=1e-9)
        np.testing.assert_allclose(found.y, expected[5:, 5:], atol=1e-9)
    else:
        assert found.x is None
        with pytest.raises(InvalidInput, match="not kept"):
            _ = moments.cov_x


def test_streams_can_be_joined_and_single_precision_is_accumulated_in_double():
    x, y = made()
    together = PairMoments().update(x, y)
    halves = PairMoments().update(x[:100], y[:100]).merge(PairMoments().update(x[100:], y[100:]))
    torch.testing.assert_close(halves.cov_x, together.cov_x, atol=1e-12, rtol=0)
    torch.testing.assert_close(halves.mean_y, together.mean_y, atol=1e-12, rtol=0)
    assert PairMoments().update(x.float()).mean_x.dtype == torch.float64


def test_what_is_joined_or_copied_is_left_alone():
    x, y = made()
    first, second = PairMoments().update(x[:100], y[:100]), PairMoments().update(x[100:], y[100:])
    joined = PairMoments().merge(second).merge(first)
    kept = first.copy()
    joined.update(x[:7], y[:7])
    kept.update(x[:7], y[:7])
    torch.testing.assert_close(first.cov_xy, torch.cov(torch.cat([x, y], 1)[:100].T, correction=0)[:5, 5:])
    torch.testing.assert_close(second.var_x, x[100:].var(0, correction=0))
    assert (first.count, second.count, kept.count) == (100, 200, 107)
    with pytest.raises(InvalidInput, match="within=True here and False there"):
        first.merge(PairMoments(False).update(x, y))
    assert PairMoments().copy().count == 0


def test_parts_that_were_kept_apart_make_a_pair():
    x, y = made(offset=50.0)
    whole = PairMoments().update(x, y)
    own = [PairMoments().update(part) for part in (x, y)]
    pair = PairMoments.of_parts(*own, PairMoments(False).update(x, y))
    for name in ("cov_x", "cov_y", "cov_xy", "var_x", "var_y", "mean_x", "mean_y"):
        torch.testing.assert_close(getattr(pair, name), getattr(whole, name), atol=1e-10, rtol=0)
    torch.testing.assert_close(pair.correlation().xy, whole.correlation().xy)
    with pytest.raises(InvalidInput, match="300, 300 and 299 samples"):
        PairMoments.of_parts(*own, PairMoments(False).update(x[1:], y[1:]))


def test_some_units_only():
    x, y = made()
    few, some = torch.tensor([4, 0, 2]), torch.tensor([3, 1])
    part, expected = PairMoments().update(x, y).subset(few, some), PairMoments().update(x[:, few], y[:, some])
    for name in ("cov_x", "cov_y", "cov_xy", "mean_x", "mean_y"):
        torch.testing.assert_close(getattr(part, name), getattr(expected, name), atol=1e-12, rtol=0)
    with pytest.raises(InvalidInput, match="within=True"):
        PairMoments(False).update(x, y).subset(few, some)


def test_two_sets_turned_and_without_their_insides():
    x, y = made()
    whole = PairMoments().update(x, y)
    for moments in (whole, PairMoments(False).update(x, y)):
        turned, between = moments.turned(), moments.between()
        torch.testing.assert_close(turned.cov_xy, whole.cov_xy.T)
        torch.testing.assert_close(turned.var_x, whole.var_y)
        assert turned.within is moments.within and between.within is False
        torch.testing.assert_close(between.var_y, whole.var_y)
        torch.testing.assert_close(between.correlation().xy, whole.correlation().xy)
        assert between.correlation().x is None
    with pytest.raises(InvalidInput, match="no second set"):
        PairMoments().update(x).turned()
    assert PairMoments().update(x).between().correlation().xy is None


def test_a_batch_adds_no_second_matrix():
    """The sums are changed in place: their memory stays the same."""
    x, y = made()
    for within in (True, False):
        moments = PairMoments(within).update(x, y)
        before = [part.data_ptr() for part in (moments._xx, moments._yy, moments._xy)]
        moments.update(x, y).merge(PairMoments(within).update(x, y))
        assert [part.data_ptr() for part in (moments._xx, moments._yy, moments._xy)] == before
        assert moments.count == 900


def test_dead_units_are_said_and_do_not_become_nan():
    x, y = made()
    x[:, 2] = 7.0
    found = PairMoments().update(x, y).correlation()
    assert found.dead_x.tolist() == [False, False, True, False, False]
    assert found.xy.isfinite().all()
    assert bool((found.xy[2] == 0).all())


def test_bad_samples_are_refused():
    x, y = made()
    with pytest.raises(InvalidInput, match="on the other"):
        PairMoments().update(x, y[:10])
    x[3, 1] = torch.nan
    with pytest.raises(InvalidInput, match="row 3"):
        PairMoments().update(x)
    with pytest.raises(InvalidInput, match="had 5 units so far and has 4"):
        PairMoments().update(made()[0]).update(y)
    with pytest.raises(InvalidInput, match="no samples"):
        _ = PairMoments().cov_x
    with pytest.raises(InvalidInput, match="there are 2"):
        ClassMoments(2).update(y, torch.arange(300))
    with pytest.raises(InvalidInput, match="only the trace"):
        _ = ClassMoments(2, scatter=False).update(y, torch.arange(300) % 2).within


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_class_moments_are_those_of_everything(offset):
    x, _ = made(offset=offset)
    labels = torch.tensor([0] * 200 + [1] * 70 + [3] * 30)  # class 2 never comes, class 3 only late
    classes, trace = ClassMoments(4), ClassMoments(4, scatter=False)
    for h, y in zip(x.split(41), labels.split(41), strict=True):
        classes.update(h, y)
        trace.update(h, y)
    assert classes.counts.tolist() == [200, 70, 0, 30]
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for k in (0, 1, 3):
        part = x[labels == k]
        torch.testing.assert_close(classes.means[k], part.mean(0), atol=1e-9, rtol=1e-12)
        expected += (part - part.mean(0)).T @ (part - part.mean(0)) / len(x)
    torch.testing.assert_close(classes.within, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(classes.global_mean, x.mean(0), atol=1e-9, rtol=1e-12)
    assert classes.within_trace == pytest.approx(float(expected.trace()), abs=1e-8)
    assert trace.within_trace == pytest.approx(float(expected.trace()), abs=1e-8)


def test_cka_sees_through_rotation_and_scale_and_matches_the_kernels():
    x, y = made()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(PairMoments().update(x, 3 * x @ rotation)) == pytest.approx(1, abs=1e-12)
    centred = [part - part.mean(0) for part in (x, y)]
    k, m = (part @ part.T for part in centred)
    assert linear_cka(PairMoments().update(x, y)) == pytest.approx(
        float((k * m).sum() / (k.norm() * m.norm())), abs=1e-12
    )


def test_canonical_correlations_match_scikit_learn():
    x, y = made(n=2000)
    model = CCA(n_components=4, max_iter=5000, tol=1e-12).fit(x.numpy(), y.numpy())
    a, b = model.transform(x.numpy(), y.numpy())
    expected = sorted((np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)), reverse=True)
    np.testing.assert_allclose(canonical_correlations(PairMoments().update(x, y)), expected, atol=1e-4)
    mixed = x @ torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        canonical_correlations(PairMoments().update(x, mixed)), torch.ones(5, dtype=torch.float64)
    )


def test_directions_that_hardly_vary_can_be_left_out():
    x, y = made(n=2000)
    x, y = x * torch.tensor([10.0, 9, 8, 1e-3, 1e-3]).double(), y * torch.tensor([10.0, 9, 1e-3, 1e-3]).double()
    moments = PairMoments().update(x, y)
    assert len(canonical_correlations(moments)) == 4
    few = canonical_correlations(moments, variance=0.99)
    principal = [part @ torch.linalg.eigh(torch.cov(part.T))[1][:, -k:] for part, k in ((x, 3), (y, 2))]
    torch.testing.assert_close(few, canonical_correlations(PairMoments().update(*principal)), atol=1e-9, rtol=0)
    with pytest.raises(InvalidInput, match="variance=0"):
        canonical_correlations(moments, variance=0)


def test_procrustes_finds_a_planted_similarity_and_scipys_rotation():
    x, y = made()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    moved = 2.5 * x @ rotation + 4
    found = procrustes(x, moved)
    torch.testing.assert_close(found.rotation, rotation)
    assert found.scale == pytest.approx(2.5)
    assert found.residual == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(found(x), moved)
    expected, _ = orthogonal_procrustes((x - x.mean(0))[:, :4].numpy(), (y - y.mean(0)).numpy())
    noisy = procrustes(x[:, :4], y, scaled=False)
    np.testing.assert_allclose(noisy.rotation, expected, atol=1e-9)
    rest = (noisy(x[:, :4]) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert noisy.residual == pytest.approx(float(rest), abs=1e-12)
    with pytest.raises(InvalidInput, match="all the same"):
        procrustes(torch.ones(5, 3), torch.ones(5, 3))
