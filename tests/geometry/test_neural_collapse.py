"""Neural collapse: the predicted geometry is a minimiser, descent ends in it, and the metrics measure it."""

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from broadsheet.errors import InvalidInput, TrainingDiverged
from broadsheet.geometry.neural_collapse import (
    CollapseMonitor,
    CollapseWarning,
    NCHead,
    collapse_metrics,
    collapse_report,
    collapse_threshold,
    cross_entropy_figures,
    gof_prediction,
    nc1,
    objective,
    sep_decay_loss,
    solve_ufm,
    survival_bound,
    ufm_optimum,
)
from broadsheet.nn.moments import ClassMoments

COUNTS = [200, 100, 50, 50]
DEPTHS = [1, 2, 3, 6]


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


# --- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("wd", "fd"), [(5e-3, 5e-3), (2e-3, 1e-2)])
def test_the_scalar_problem_is_solved_as_by_search(depth, wd, fd):
    found = gof_prediction(COUNTS, wd, fd, depth)
    total, value = sum(COUNTS), 0.0
    for count, x in zip(COUNTS, found.x.tolist(), strict=True):
        b = depth * total / count * (total * wd**depth * fd) ** (1 / depth)

        def g(x, b=b):
            return 1 / (x**depth + 1) + b * x

        grid = np.linspace(0, 60, 200_001)
        near = grid[g(grid).argmin()]
        best = minimize_scalar(g, bounds=(max(near - 1e-3, 0), near + 1e-3), method="bounded", options={"xatol": 1e-12})
        assert g(x) <= best.fun + 1e-12
        assert x == pytest.approx(best.x if g(best.x) < 1 else 0.0, abs=1e-5)
        value += count / (2 * total) * min(g(x), 1.0)
    assert found.loss == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_a_class_vanishes_exactly_at_the_threshold(depth):
    assert survival_bound(1) == 1
    assert survival_bound(2) == pytest.approx(0.5)
    assert survival_bound(3) == pytest.approx(0.5291, abs=1e-4)
    for factor, lives in ((0.999, True), (1.001, False)):
        # one decay moved so that the class's b is this share of the bound
        counts, total = [60, 40], 100
        b = factor * survival_bound(depth)
        decay = (b * 40 / (depth * total)) ** depth / total
        found = gof_prediction(counts, [decay, *[1.0] * (depth - 1)], 1.0, depth)
        assert bool(found.x[1] > 0) is lives
        x = float(found.x[1])
        assert (1 / (x**depth + 1) + b * x < 1) is lives


def test_the_threshold_in_samples():
    assert collapse_threshold(400, 0.0209, 0.0209) == pytest.approx(69.9, abs=0.05)
    for depth in DEPTHS:
        n = collapse_threshold(400, 0.01, 0.005, depth)
        if 1 < n < 399:
            few, many = math.floor(n), math.ceil(n + 1e-9)
            assert bool(gof_prediction([400 - few, few], 0.01, 0.005, depth).lost[1])
            assert not bool(gof_prediction([400 - many, many], 0.01, 0.005, depth).lost[1])


def test_a_positive_root_that_loses_to_zero_is_not_kept():
    depth, total = 3, 100
    # between the bound and the steepest slope there is a stationary point, and it is worse than nothing
    steepest = max(depth * x ** (depth - 1) / (x**depth + 1) ** 2 for x in np.linspace(0.01, 3, 10_000))
    b = (survival_bound(depth) + steepest) / 2
    assert survival_bound(depth) < b < steepest
    decay = (b * 50 / (depth * total)) ** depth / total
    assert gof_prediction([50, 50], [decay, 1.0, 1.0], 1.0, depth).lost.tolist() == [True, True]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [64, 4, 3, 2])
def test_the_minimiser_is_stationary_balanced_and_has_the_predicted_loss(depth, bias, width):
    counts = [100] * 4 if bias else COUNTS
    decays = [5e-3 * (1 + 0.3 * i) for i in range(depth)]
    found = ufm_optimum(counts, width, depth, decays, 4e-3, bias, seed=depth)
    leaves = [x.requires_grad_() for x in (*found.weights, found.features, *([found.bias] if bias else []))]
    value = found.objective()
    gradients = torch.autograd.grad(value, leaves)
    assert max(float(g.norm()) for g in gradients) < 1e-10
    assert found.imbalance() < 1e-8
    if not bias:
        prediction = gof_prediction(counts, decays, 4e-3, depth, width)
        assert float(value.detach()) == pytest.approx(prediction.loss, abs=1e-12)
        if width >= 4:
            metrics = found.metrics("gof").numbers()
            agreement = metrics.pop("ncc_agreement")
            assert agreement == 1
            assert max(metrics.values()) < 1e-8
        product = found.product
        torch.testing.assert_close((product @ product.T).diagonal(), prediction.sigma2, atol=1e-9, rtol=1e-9)
    elif width >= 3:
        assert max(value for name, value in found.metrics("etf").numbers().items() if name != "ncc_agreement") < 1e-8


@pytest.mark.parametrize("depth", [2, 4])
def test_every_layer_of_the_head_has_its_predicted_lengths(depth):
    decays = [3e-3, 5e-3, 4e-3, 6e-3][:depth]
    found = ufm_optimum(COUNTS, 16, depth, decays, 4e-3)
    prediction = gof_prediction(COUNTS, decays, 4e-3, depth)
    h = found.features
    for number in range(1, depth + 1):
        product = found.weights[number - 1]
        for weight in found.weights[number:]:
            product = weight @ product
        metrics = collapse_metrics(h, found.labels, product, None, "gof", None, decays, 4e-3, depth, number)
        assert max(value for name, value in metrics.numbers().items() if name != "ncc_agreement") < 1e-8
        at = prediction.layer(number)
        torch.testing.assert_close(product.square().sum(1), at.weights)
        torch.testing.assert_close(metrics.class_means.square().sum(1), at.features)
        torch.testing.assert_close((product * metrics.class_means).sum(1), at.outputs)
        h = h @ found.weights[number - 1].T


def test_no_nearby_point_is_better_than_the_minimiser():
    found = ufm_optimum(COUNTS, 8, 2, 5e-3, 5e-3)
    best = float(found.objective())
    for seed in range(20):
        weights = [w + 0.05 * randn(*w.shape, seed=seed + i) for i, w in enumerate(found.weights)]
        h = found.features + 0.05 * randn(*found.features.shape, seed=seed + 9)
        assert float(objective(weights, None, h, found.labels, "mse", [5e-3] * 2, 5e-3)) > best


def test_equal_counts_give_equal_lengths_and_a_bigger_class_shorter_means():
    equal = gof_prediction([50] * 4, 5e-3, 5e-3, 3)
    assert float(equal.sigma2.std()) < 1e-12
    layer = gof_prediction([400, 100, 50], 1e-4, 1e-4).layer()
    assert layer.weights[0] > layer.weights[1] > layer.weights[2]
    assert layer.features[0] < layer.features[1] < layer.features[2]


def test_a_narrow_head_keeps_the_largest_classes_and_says_which_place_is_tied():
    found = gof_prediction([20, 200, 100, 100], 1e-3, 1e-3, 2, width=2)
    assert found.lost.tolist() == [True, False, False, True]
    assert found.tied.tolist() == [False, False, True, True]
    assert not gof_prediction([20, 200, 100, 100], 1e-3, 1e-3, 2, width=3).tied.any()


def test_with_decays_so_large_every_class_vanishes():
    found = gof_prediction([50, 20], 0.5, 0.5)
    assert found.lost.all()
    assert found.loss == pytest.approx(0.5)
    assert found.layer().ratio.tolist() == [0, 0]
    assert found.to_frame()["lost"].all()


# --- cross entropy ---------------------------------------------------------------------------------------------------


def test_the_simplex_is_best_for_one_layer_and_the_polygon_below_it_for_four():
    assert cross_entropy_figures(8, 100, 1e-3, 1e-3, 1)[0].name == "simplex"
    figures = cross_entropy_figures(8, 100, 1e-3, 1e-3, 4)
    losses = {figure.name: figure.loss for figure in figures}
    assert figures[0].name == "polygon"
    assert losses["polygon"] == pytest.approx(0.0781, abs=5e-5)
    assert losses["simplex"] == pytest.approx(0.1020, abs=5e-5)
    assert losses["zero"] == pytest.approx(math.log(8))


@pytest.mark.parametrize("name", ["simplex", "polygon"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_figures_loss_is_that_of_weights_and_features_that_realise_it(name, depth):
    figure = next(f for f in cross_entropy_figures(5, 20, 1e-3, 1e-3, depth) if f.name == name)
    u, s, vt = torch.linalg.svd(figure.logits)
    s = torch.where(s > 1e-9, s, 0.0)  # roots of rounding errors are not small
    root = (s * math.sqrt(20)) ** (1 / (depth + 1))  # each factor takes its root of the product with the features
    middle = [torch.diag(root)] * (depth - 1)
    weights = [*middle, u * root] if depth > 1 else [u * root]
    h = ((root[:, None] * vt) / math.sqrt(20)).T[torch.arange(5).repeat_interleave(20)]
    labels = torch.arange(5).repeat_interleave(20)
    torch.testing.assert_close(
        torch.linalg.multi_dot([*weights[::-1], h.T]) if depth else None, figure.logits[:, labels]
    )
    made = objective(weights, None, h, labels, "ce", [1e-3] * depth, 1e-3)
    assert float(made) == pytest.approx(figure.loss, abs=1e-9)


def test_descent_under_cross_entropy_finds_the_simplex():
    found = solve_ufm([20] * 4, 8, 1, 5e-3, 5e-3, "ce", True, steps=1500)
    assert found.metrics().target == "etf"
    assert max(v for n, v in found.metrics().numbers().items() if n not in ("ncc_agreement", "nc1")) < 1e-4
    best = cross_entropy_figures(4, 20, 5e-3, 5e-3, 1)[0].loss
    assert float(found.losses[-1]) == pytest.approx(best, abs=1e-6)


# --- descent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_descent_ends_in_the_predicted_frame(depth):
    # Small initial values would leave the smallest class at zero, which for two layers and more is a local minimum.
    found = solve_ufm([40, 20, 10], 12, depth, 1e-2, 1e-2, steps=2000, record=8, init_std=0.3)
    prediction = gof_prediction([40, 20, 10], 1e-2, 1e-2, depth)
    torch.testing.assert_close((found.product @ found.product.T).diagonal(), prediction.sigma2, atol=1e-6, rtol=1e-6)
    assert found.metrics("gof").nc2_w < 1e-6
    assert found.metrics("etf").nc2_w > 0.05
    assert found.metrics("orthogonal").nc2_w > 0.05
    assert found.imbalance() < 1e-8
    assert found.to_frame()["nc1"].iloc[-1] < 1e-12 < found.to_frame()["nc1"].iloc[0]
    assert found.plot().get_yscale() == "log"
    plt.close("all")


def test_zero_holds_small_classes_of_a_deep_head_though_they_could_live():
    found = solve_ufm([40, 20, 10], 12, 2, 1e-2, 1e-2, steps=1500, init_std=0.1)
    prediction = gof_prediction([40, 20, 10], 1e-2, 1e-2, 2)
    assert not prediction.lost.any()
    assert float(found.product[2].norm()) < 1e-6
    assert float(found.losses[-1]) > prediction.loss


def test_small_classes_vanish_where_predicted():
    found = solve_ufm([40, 20, 8], 8, 1, 0.06, 0.06, steps=2500)
    lost = gof_prediction([40, 20, 8], 0.06, 0.06).lost
    assert lost.tolist() == [False, False, True]
    lengths = found.product.norm(dim=1)
    assert float(lengths[2]) < 1e-6
    assert float(lengths[:2].min()) > 0.1


def test_a_bias_gives_the_simplex_and_its_value():
    found = solve_ufm([15] * 4, 8, 2, 1e-2, 1e-2, bias=True, steps=3000)
    assert found.metrics().target == "etf"
    assert found.metrics().nc2_w < 1e-5
    assert found.bias is not None
    torch.testing.assert_close(found.bias, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-6, rtol=0)


def test_seeds_and_what_cannot_be_solved():
    first, second, third = (solve_ufm([9, 6], 4, 1, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.features, third.features)
    with pytest.raises(TrainingDiverged, match="smaller lr"):
        solve_ufm([9, 6], 4, 3, lr=1e3, steps=100)
    for settings in ({"loss": "hinge"}, {"steps": 0}, {"widths": [3]}, {"lr": 0.0}):
        with pytest.raises(InvalidInput):
            solve_ufm([9, 6], 4, 1, **settings)
    with pytest.raises(InvalidInput, match="nothing was recorded"):
        first.plot()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_distance_between_the_frames_is_known():
    for k in (3, 4, 10):
        eye = torch.eye(k, dtype=torch.float64)
        labels = torch.arange(k).repeat(2)
        metrics = collapse_metrics(eye[labels], labels, eye, target="etf")
        assert metrics.nc2_w == pytest.approx(math.sqrt(2 - 2 * math.sqrt((k - 1) / k)), abs=1e-12)
        assert metrics.nc2_h < 1e-12  # means lose their mean
        assert collapse_metrics(eye[labels], labels, eye, target="orthogonal").nc2_w < 1e-12


def test_metrics_see_neither_rotation_nor_scale():
    h, labels, weight = randn(60, 7), torch.arange(60) % 3, randn(3, 7, seed=1)
    q = rotation(7)
    plain = collapse_metrics(h, labels, weight).numbers()
    for other in (collapse_metrics(h @ q, labels, weight @ q), collapse_metrics(h, labels, 5 * weight)):
        for name, value in other.numbers().items():
            assert value == pytest.approx(plain[name], abs=1e-10)


def test_nc1_is_the_pseudo_inverse_and_stays_finite_when_classes_are_points():
    h = randn(90, 6) + 3 * randn(3, 6, seed=4)[torch.arange(90) % 3]
    labels = torch.arange(90) % 3
    moments = ClassMoments(3).update(h, labels)
    means = torch.stack([h[labels == k].mean(0) for k in range(3)])
    rest = h - means[labels]
    within = rest.T @ rest / 90
    between = (means - h.mean(0)).T @ (means - h.mean(0)) / 3
    u, s, vt = torch.linalg.svd(between)
    inverse = (vt[:2].T / s[:2]) @ u[:, :2].T
    assert nc1(moments) == pytest.approx(float((within @ inverse).trace() / 3), rel=1e-9)
    points = means[labels] + 1e-9 * randn(90, 6, seed=5)
    assert 0 < nc1(ClassMoments(3).update(points, labels)) < 1e-15


def test_targets_choose_themselves():
    h, labels, w = randn(40, 5), torch.arange(40) % 4, randn(4, 5, seed=1)
    assert collapse_metrics(h, labels, w, torch.zeros(4)).target == "etf"
    assert collapse_metrics(h, labels, w).target == "orthogonal"
    few = torch.cat([labels[:10], torch.zeros(30, dtype=torch.long)])
    assert collapse_metrics(h, few, w, wd=1e-2, fd=1e-2).target == "gof"
    assert collapse_metrics(h, few, w).target == "orthogonal"


def test_one_hot_rows_are_labels_and_agreement_is_counted():
    h, labels, w, b = randn(50, 4), torch.arange(50) % 3, randn(3, 4, seed=1), randn(3, seed=2)
    metrics = collapse_metrics(h, labels, w, b)
    assert collapse_metrics(h, nn.functional.one_hot(labels), w, b).numbers() == metrics.numbers()
    means = torch.stack([h[labels == k].mean(0) for k in range(3)])
    slow = [int((h[i] @ w.T + b).argmax()) == int((means - h[i]).norm(dim=1).argmin()) for i in range(50)]
    assert metrics.ncc_agreement == pytest.approx(np.mean(slow))


def test_bad_features_labels_and_targets():
    h, labels, w = randn(40, 5), torch.arange(40) % 4, randn(4, 5, seed=1)
    with pytest.raises(InvalidInput, match="class 2 has no samples"):
        collapse_metrics(h, torch.where(labels == 2, 0, labels), w)
    with pytest.warns(CollapseWarning, match="class 4 has a single sample"):
        collapse_metrics(h, torch.where(torch.arange(40) == 0, 4, labels))
    with pytest.warns(CollapseWarning, match="does not fit"):
        collapse_metrics(h[:, :2], labels, w[:, :2])
    with pytest.raises(InvalidInput, match="row 3"):
        collapse_metrics(torch.where(torch.arange(40)[:, None] == 3, torch.nan, h), labels, w)
    with pytest.raises(InvalidInput, match="without bias"):
        collapse_metrics(h, labels, w, torch.zeros(4), "gof", wd=1e-2, fd=1e-2)
    with pytest.raises(InvalidInput, match="depend on the decays"):
        collapse_metrics(h, labels, w, target="gof")
    with pytest.raises(InvalidInput, match="target='square'"):
        collapse_metrics(h, labels, w, target="square")
    with pytest.raises(InvalidInput, match="integers"):
        collapse_metrics(h, labels.double(), w)
    with pytest.raises(InvalidInput, match="no one-hot rows"):
        collapse_metrics(h, randn(40, 4), w)
    with pytest.raises(InvalidInput, match="weight has shape"):
        collapse_metrics(h, labels, w[:, :4])
    for wrong in ({"weight_decay": 0.0, "feature_decay": 1e-2}, {"weight_decay": 1e-2, "feature_decay": -1.0}):
        with pytest.raises(InvalidInput, match="no minimum"):
            gof_prediction([3, 4], **wrong)
    with pytest.raises(InvalidInput, match="counts="):
        gof_prediction([3, 0], 1e-2, 1e-2)
    with pytest.raises(InvalidInput, match="has 2 entries"):
        gof_prediction([3, 4], [1e-2, 1e-2], 1e-2, 3)
    with pytest.raises(InvalidInput, match="same size only"):
        ufm_optimum([3, 4], 5, bias=True)


def test_a_figure_of_what_was_found_and_predicted():
    metrics = ufm_optimum(COUNTS, 8).metrics("gof")
    axes = metrics.plot("logits")
    assert [ax.get_title() for ax in axes] == ["found", "predicted"]
    with pytest.raises(InvalidInput, match="which="):
        metrics.plot("biases")
    with pytest.raises(InvalidInput, match="no weights"):
        collapse_metrics(randn(20, 3), torch.arange(20) % 2).plot()
    plt.close("all")


# --- networks of one's own -------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, depth=2, bias=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5))
        self.head = NCHead(12, 3, depth, bias)

    def forward(self, x):
        return self.head(self.body(x))


def loader(n=90, batch=20):
    x, y = randn(n, 6).float(), torch.arange(n) % 3
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, n, batch)]


def test_a_report_is_what_the_metrics_say_of_each_layer():
    torch.manual_seed(0)
    model = Net().train()
    report = collapse_report(model, loader(), "head", target="gof", wd=1e-3, fd=1e-3)
    assert model.training
    assert report.layers == ("head.0", "head.1")
    x, y = (torch.cat(part) for part in zip(*loader(), strict=True))
    with torch.no_grad():
        h = model.eval().body(x)
        for number, product in enumerate((model.head.product, model.head[1].weight), 1):
            expected = collapse_metrics(h, y, product, None, "gof", None, 1e-3, 1e-3, 2, number).numbers()
            for name, value in report.metrics[number - 1].numbers().items():
                assert value == pytest.approx(expected[name], abs=1e-6)
            h = model.head[0](h)
    assert collapse_report(model, loader()).layers == ("head.1",)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_monitor_follows_training():
    torch.manual_seed(0)
    model = Net(1)
    monitor = CollapseMonitor(model, loader(), target="orthogonal")
    measure = monitor.callback(every=2)
    for step in range(1, 5):
        measure(step, model)
    assert [report.epoch for report in monitor.history] == [1, 2]
    assert len(monitor.to_frame()) == 2
    assert monitor.plot().get_yscale() == "log"
    plt.close("all")
    with pytest.raises(InvalidInput, match="metric="):
        monitor.plot("nc9")


def test_heads_that_are_none():
    with pytest.raises(InvalidInput, match=r"no nn\.Linear"):
        collapse_report(nn.Conv1d(1, 1, 1), loader())
    with pytest.raises(InvalidInput, match="no submodule"):
        collapse_report(Net(), loader(), "tail")
    with pytest.raises(InvalidInput, match="no labels"):
        collapse_report(Net(), [torch.zeros(2, 6)])
    with pytest.raises(InvalidInput, match="no batches"):
        collapse_report(Net(), [])
    biased = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with pytest.raises(InvalidInput, match="has a bias"):
        collapse_report(biased, loader(), ["0", "1"], target="orthogonal")
    assert math.isfinite(collapse_report(biased, loader(), ["0", "1"]).metrics[0].nc1)
    broken = [(torch.full((4, 6), torch.nan), torch.arange(4) % 3)]
    with pytest.raises(InvalidInput, match="batch 0"):
        collapse_report(Net(), broken)


def test_the_loss_is_the_theorys_objective(tmp_path):
    torch.manual_seed(0)
    head = NCHead(6, 3, 2).double()
    h, y = randn(30, 6), torch.arange(30) % 3
    made = sep_decay_loss(head(h), h, head, y, 1e-2, 2e-2)
    expected = objective([layer.weight for layer in head], None, h, y, "mse", [1e-2] * 2, 2e-2)
    assert float(made) == pytest.approx(float(expected))
    halves = [
        sep_decay_loss(head(p), p, head, q, 1e-2, 2e-2, n_samples=30)
        for p, q in zip(h.split(15), y.split(15), strict=True)
    ]
    assert float(sum(halves)) / 2 == pytest.approx(float(expected))
    ce = sep_decay_loss(head(h), h, head, nn.functional.one_hot(y), [1e-2, 0.5], 2e-2, loss="ce")
    assert float(ce) == pytest.approx(float(objective([l.weight for l in head], None, h, y, "ce", [1e-2, 0.5], 2e-2)))  # noqa: E741
    torch.testing.assert_close(head(h), h @ head.product.T)
    identity = head[0].weight @ head[0].weight.T
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    head.float().save_pretrained(tmp_path)
    again = NCHead.from_pretrained(tmp_path)
    assert torch.equal(again.product, head.product)
    with pytest.raises(InvalidInput, match="30 logits"):
        sep_decay_loss(head(h.float()), h[:3], head, y, 1e-2, 1e-2)
    with pytest.raises(InvalidInput, match="depth=0"):
        NCHead(3, 2, 0)


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse_metrics(randn(40, 5), torch.arange(40) % 4, randn(4, 5, seed=1))
