"""Level set traversal: what theory says exactly of linear models, and that nothing but the method moves a result."""

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.evaluation.level_set_traversal import (
    SkippedSources,
    blind_spot_grid,
    blind_spot_report,
    image_distances,
    level_set_traversal,
    path_confidence,
    path_width,
    project,
    star_score,
    structural_similarity,
    triangle_confidence,
)

FREE = {"box": None, "init_noise": 0.0}


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


def images(n=6, seed=0, dtype=torch.float64):
    return torch.rand(n, 1, 6, 6, generator=random(seed), dtype=torch.float64).to(dtype)


class Smooth(nn.Module):
    """A small classifier with bends, float64."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, classes)).double()
        self.net[-1].weight.data *= 3

    def forward(self, x):
        return self.net(x)


def linear(d=5, seed=0):
    """Two classes; the level set of the confidence is a hyperplane."""
    model = nn.Linear(d, 2, bias=True).double()
    model.weight.data, model.bias.data = randn(2, d, seed=seed), randn(2, seed=seed + 1)
    return model.eval()


@pytest.fixture
def pairs():
    model = Smooth().eval()
    x = images(60)
    y = model(x).argmax(1)
    source, target = x[:8], torch.stack([x[(y != y[i]).nonzero()[i % 5, 0]] for i in range(8)])
    return model, source, target


# --- the step ----------------------------------------------------------------------------------------------------------


def test_a_projected_direction_is_orthogonal_to_the_gradient():
    d, g = randn(7, 3, 4), randn(7, 3, 4, seed=1)
    rest = project(d, g)
    products = (rest * g).flatten(1).sum(1)
    assert float((products.abs() / (d.flatten(1).norm(dim=1) * g.flatten(1).norm(dim=1))).max()) < 1e-10
    torch.testing.assert_close(project(rest, g), rest)
    torch.testing.assert_close(project(d, torch.zeros_like(g)), d)
    assert project(d.float(), g.float() * 1e-9).isfinite().all()


def test_without_correction_the_distance_falls_by_the_known_share(pairs):
    model, source, target = pairs
    step = 0.05
    found = level_set_traversal(model, source, target, None, step, 0.0, math.inf, 12, record_every=1, **FREE)
    assert found.path is not None
    before = source
    for i in range(12):
        leaf = before.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), found.labels, reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf)
        rest = project(target - before, g).flatten(1).square().sum(1)
        here, there = (target - p for p in (before, found.path[:, i]))
        fall = here.flatten(1).square().sum(1) - there.flatten(1).square().sum(1)
        torch.testing.assert_close(fall, (2 * step - step**2) * rest, atol=1e-10, rtol=1e-10)
        before = found.path[:, i]
    assert bool((found.distance.diff(dim=1) <= 0).all())


def test_a_linear_model_is_walked_to_the_projection_on_its_hyperplane():
    model, d = linear(), 5
    source, target = randn(4, d, seed=3), randn(4, d, seed=4)
    w = model.weight[0] - model.weight[1]
    limit = target - ((target - source) @ w / (w @ w))[:, None] * w
    step, steps = 0.1, 40
    found = level_set_traversal(model, source, target, None, step, 0.0, 0.5, steps, **FREE)
    start = (limit - source).norm(dim=1)
    torch.testing.assert_close((limit - found.images).norm(dim=1), start * (1 - step) ** steps, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found.confidence, found.start_confidence, atol=1e-9, rtol=0)


def slow_reference(model, source, target, label, step, parallel, threshold, iterations, mode, box):
    """The algorithm for one pair, written plainly."""

    def confidence(x):
        return float(model(x[None]).double().softmax(1)[0, label])

    x, v, accepted = source.clone(), torch.zeros_like(source), 0
    start = confidence(source)
    for _ in range(iterations):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(-model(leaf[None]).log_softmax(1)[0, label], leaf)
        aim = target - x
        aim = aim - float((g * aim).sum() / (g * g).sum()) * g
        v = (v - parallel * g).clamp(-parallel, parallel)
        fresh = x + step * aim + v
        fresh = fresh if box is None else fresh.clamp(*box)
        if start - confidence(fresh) > threshold:
            if mode == "stop":
                break
            continue
        x, accepted = fresh, accepted + 1
    return x, accepted


@pytest.mark.parametrize("mode", ["retry", "stop"])
@pytest.mark.parametrize("parallel", [0.0, 1e-3])
def test_every_row_is_what_the_plain_algorithm_gives_for_it_alone(pairs, mode, parallel):
    model, source, target = pairs
    found = level_set_traversal(model, source, target, None, 0.4, parallel, 1e-3, 40, 0.0, mode)
    taken = []
    for i in range(len(source)):
        x, accepted = slow_reference(
            model, source[i], target[i], int(found.labels[i]), 0.4, parallel, 1e-3, 40, mode, (0, 1)
        )
        torch.testing.assert_close(found.images[i], x, atol=1e-8, rtol=0)
        assert int(found.accepted[i]) == accepted
        taken.append(accepted)
    assert min(taken) < 40  # some step was refused, so that the two modes are told apart


def test_no_accepted_point_loses_more_than_the_threshold(pairs):
    model, source, target = pairs
    for adaptive in (False, True):
        found = level_set_traversal(
            model, source, target, None, 0.2, "auto", 0.05, 60, 0.0, record_every=1, adaptive=adaptive
        )
        assert found.path is not None
        path = found.path.flatten(0, 1)
        p = model(path).softmax(1).gather(1, found.labels.repeat_interleave(60)[:, None]).view(-1, 60)
        assert bool((found.start_confidence[:, None] - p <= 0.05 + 1e-12).all())
        assert float(found.path.min()) >= 0 and float(found.path.max()) <= 1
        torch.testing.assert_close(found.confidence, p[:, -1])


def test_an_adaptive_step_comes_nearer_in_as_many_iterations(pairs):
    model, source, target = pairs
    plain, adaptive = (
        level_set_traversal(model, source, target, iterations=60, threshold=0.05, init_noise=0.0, adaptive=a)
        for a in (False, True)
    )
    assert float(adaptive.remaining.mean()) < float(plain.remaining.mean())


def test_what_the_model_does_not_see_is_copied_from_the_target():
    model = linear(6)
    model.weight.data[:, 3:] = 0
    found = level_set_traversal(model, randn(3, 6), randn(3, 6, seed=9), None, 0.5, 0.0, 0.3, 60, **FREE)
    torch.testing.assert_close(found.images[:, 3:], found.target[:, 3:], atol=1e-9, rtol=0)


def test_the_target_itself_as_source_stays(pairs):
    model, source, _ = pairs
    found = level_set_traversal(model, source, source, iterations=5, init_noise=0.0)
    torch.testing.assert_close(found.images, source, atol=1e-3, rtol=0)  # but for the correction, which lowers the loss
    exact = level_set_traversal(model, source, source, parallel=0.0, iterations=5, init_noise=0.0)
    assert torch.equal(exact.images, source)
    assert exact.same_class.all()
    assert exact.remaining.tolist() == [0] * len(source)


def test_confidence_near_one_in_single_precision_still_gives_a_direction():
    model = linear(6).float()
    model.weight.data *= 200
    source = randn(4, 6).float()
    found = level_set_traversal(model, source, randn(4, 6, seed=2).float(), None, 0.1, 0.0, 0.2, 30, **FREE)
    assert found.images.dtype == torch.float32
    assert found.images.isfinite().all()
    assert float(found.remaining.max()) < 1


def test_noise_is_bounded_seeded_and_never_costs_the_confidence(pairs):
    model, source, target = pairs

    def walk(seed, noise=0.1):
        return level_set_traversal(model, source, target, init_noise=noise, iterations=1, seed=seed, threshold=0.01)

    assert torch.equal(walk(1).images, walk(1).images)
    assert not torch.equal(walk(1).images, walk(2).images)
    assert bool((walk(1, 2.0).start_confidence - walk(1, 2.0).confidence <= 0.01 + 1e-12).all())


def test_baselines(pairs):
    model, source, target = pairs
    straight = level_set_traversal(model, source, target, mode="stop", method="straight", init_noise=0.0)
    on_line = straight.images - source
    along = (on_line * (target - source)).flatten(1).sum(1) / (target - source).flatten(1).square().sum(1)
    torch.testing.assert_close(on_line, along.view(-1, 1, 1, 1) * (target - source))
    walk = level_set_traversal(model, source, target, method="random", iterations=50, init_noise=0.0)
    ours = level_set_traversal(model, source, target, iterations=50, init_noise=0.0)
    assert float(ours.remaining.mean()) < float(walk.remaining.mean())


def test_the_model_is_left_as_it_was(pairs):
    model, source, target = pairs
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.net[1].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="training mode"):
        level_set_traversal(model, source, target, iterations=2)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_single_logit_and_outputs_of_hugging_face():
    weight = randn(5)
    source, target = randn(4, 5, seed=1), randn(4, 5, seed=2)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    both = torch.stack([torch.zeros(5, dtype=torch.float64), weight])
    expected = level_set_traversal(lambda x: x @ both.T, source, target, iterations=9, **FREE)
    for model in (lambda x: x @ weight, lambda x: (x @ weight)[:, None], lambda x: Output(x @ both.T)):
        torch.testing.assert_close(
            level_set_traversal(model, source, target, iterations=9, **FREE).images, expected.images
        )


def test_normalisation_is_part_of_the_model(pairs):
    model, source, target = pairs
    inside = level_set_traversal(
        model, source, target, iterations=5, normalise=lambda x: (x - 0.3) / 0.2, init_noise=0.0
    )
    outside = level_set_traversal(lambda x: model((x - 0.3) / 0.2), source, target, iterations=5, init_noise=0.0)
    torch.testing.assert_close(inside.images, outside.images)


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_wrong_sources_are_left_out_and_said(pairs):
    model, source, target = pairs
    labels = model(source).argmax(1)
    wrong = labels.clone()
    wrong[2] = (wrong[2] + 1) % 3
    with pytest.warns(SkippedSources, match="1 of 8 sources"):
        found = level_set_traversal(model, source, target, wrong, iterations=2)
    assert found.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    with pytest.raises(InvalidInput, match="none of the sources"), pytest.warns(SkippedSources):
        level_set_traversal(model, source[:1], target[:1], (labels[:1] + 1) % 3)


def test_a_step_that_is_too_long_from_the_first_is_said():
    model = linear(3)
    model.weight.data *= 500
    source, target = randn(1, 3), -randn(1, 3)
    with pytest.warns(SkippedSources, match="no step was taken"):
        found = level_set_traversal(model, source, target, None, 1.0, 0.0, 1e-6, 5, method="straight", **FREE)
    assert torch.equal(found.images, source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step": 0.0}, "step=0.0"),
        ({"step": 1.5}, "step=1.5"),
        ({"parallel": -1e-3}, "parallel=-0.001"),
        ({"parallel": "some"}, "parallel='some'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"init_noise": -1.0}, "init_noise=-1.0"),
        ({"mode": "go"}, "mode='go'"),
        ({"method": "fly"}, "method='fly'"),
        ({"record_every": 0}, "record_every=0"),
        ({"box": (0, 0.5)}, "outside box"),
        ({"labels": torch.zeros(3)}, "expected integers"),
    ],
)
def test_bad_settings(pairs, settings, words):
    model, source, target = pairs
    with pytest.raises(InvalidInput, match=words):
        level_set_traversal(model, source, target, **settings)


def test_bad_images_and_models(pairs):
    model, source, target = pairs
    with pytest.raises(InvalidInput, match="they have to match"):
        level_set_traversal(model, source, target[:3])
    with pytest.raises(InvalidInput, match="images / 255"):
        level_set_traversal(model, (source * 255).to(torch.uint8), (target * 255).to(torch.uint8))
    with pytest.raises(InvalidInput, match="NaN"):
        level_set_traversal(model, torch.full_like(source, torch.nan), target)
    with pytest.raises(InvalidInput, match="probabilities"):
        level_set_traversal(lambda x: model(x).softmax(1), source, target)
    with pytest.raises(InvalidInput, match="no gradient"):
        level_set_traversal(lambda x: model(x).detach(), source, target)
    with pytest.raises(InvalidInput, match=r"expected \[B, K\]"):
        level_set_traversal(lambda x: x, source, target)


# --- probes ------------------------------------------------------------------------------------------------------------


def test_paths_and_triangles_are_direct_evaluations(pairs):
    model, source, target = pairs
    label = model(source).argmax(1)
    path = path_confidence(model, source, target, 5)
    p = model(source + 0.25 * (target - source)).softmax(1).gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(path[:, 1], p)
    mean, least = star_score(path)
    torch.testing.assert_close(mean, path.mean(1))
    torch.testing.assert_close(least, path.min(1).values)
    other = target.flip(0)
    triangle = triangle_confidence(model, source, target, other)
    assert triangle.weights.shape == (66, 3)
    torch.testing.assert_close(triangle.weights.sum(1), torch.ones(66, dtype=torch.float64))
    for corner, x in enumerate((source, target, other)):
        at = int(triangle.weights[:, corner].argmax())
        expected = model(x).softmax(1).gather(1, label[:, None])[:, 0]
        torch.testing.assert_close(triangle.confidence[:, at], expected)
    assert triangle.edges.shape == (8, 21)
    torch.testing.assert_close(triangle.edge_drop, triangle.source_confidence - triangle.edges.min(1).values)
    assert bool((triangle.above(1.0) == 1).all())
    assert bool((triangle.above(0.1) <= triangle.above(0.3)).all())
    assert len(triangle.to_frame()) == 8
    triangle.plot()
    plt.close("all")
    with pytest.raises(InvalidInput, match="one shape"):
        triangle_confidence(model, source, target, other[:2])
    with pytest.raises(InvalidInput, match="n=1"):
        path_confidence(model, source, target, 1)


def test_width_is_the_confidence_itself_at_distance_zero_and_orthogonal_elsewhere():
    model = linear(6)
    x, direction = randn(3, 6), (model.weight[0] - model.weight[1]).detach().expand(3, 6)
    found = path_width(model, x, direction, None, (0.0, 2.0), 40)
    p = model(x).softmax(1).max(1).values
    torch.testing.assert_close(found.confidence[:, 0], p[:, None].expand(-1, 40))
    torch.testing.assert_close(
        found.confidence[:, 1], p[:, None].expand(-1, 40)
    )  # orthogonal to the only way that counts
    across = path_width(model, x, randn(3, 6, seed=5), None, (0.0, 2.0), 40)
    low, high = across.quantiles()[:, 1].unbind(1)
    assert bool((high - low > 1e-3).all())
    with pytest.raises(InvalidInput, match="n_dirs=0"):
        path_width(model, x, direction, n_dirs=0)


def test_distances():
    x = images(4)
    table = image_distances(x, x)
    assert table.columns.tolist() == ["rmse", "linf", "ssim"]
    assert table["ssim"].tolist() == pytest.approx([1] * 4)
    moved = image_distances(x, (x + 0.5).clamp(0, 1), perceptual=lambda a, b: (a - b).flatten(1).abs().sum(1))
    gap = (x - (x + 0.5).clamp(0, 1)).flatten(1)
    assert moved["rmse"].tolist() == pytest.approx(gap.square().mean(1).sqrt().tolist())
    assert moved["linf"].tolist() == pytest.approx([0.5] * 4, abs=1e-12)
    assert moved["perceptual"].tolist() == pytest.approx(gap.abs().sum(1).tolist())
    assert image_distances(x.flatten(1), x.flatten(1)).columns.tolist() == ["rmse", "linf"]
    with pytest.raises(InvalidInput, match="one shape"):
        image_distances(x, x[:2])


def test_structural_similarity_is_the_formula_window_by_window():
    x, y = images(1, 1), images(1, 2)
    at = np.arange(5) - 2
    row = np.exp(-(at**2) / (2 * 1.5**2))
    weight = np.outer(row, row) / row.sum() ** 2
    values = []
    for i in range(2):
        for j in range(2):
            a, b = (z[0, 0, i : i + 5, j : j + 5].numpy() for z in (x, y))
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert float(structural_similarity(x, y)) == pytest.approx(np.mean(values), abs=1e-12)


# --- many pairs --------------------------------------------------------------------------------------------------------


def test_a_grid_of_all_pairs(pairs):
    model = pairs[0]
    x = images(60)
    y = model(x).argmax(1)
    chosen = torch.stack([(y == k).nonzero()[0, 0] for k in y.unique().tolist()])
    grid = blind_spot_grid(model, x[chosen], iterations=5, init_noise=0.0, parallel=0.0)
    k = len(chosen)
    assert grid.ends.shape == (k, k, 1, 6, 6)
    torch.testing.assert_close(grid.ends[range(k), range(k)], x[chosen])
    assert grid.plot(names=["a", "b", "c"][:k]).shape == (k, k)
    plt.close("all")
    with pytest.raises(InvalidInput, match="is classified as"):
        blind_spot_grid(model, x[chosen], (y[chosen] + 1) % 3)
    with pytest.raises(InvalidInput, match="at least two"):
        blind_spot_grid(model, x[:1])


def test_a_report_compares_methods_and_models(pairs):
    model = pairs[0]
    x = images(40)
    y = model(x).argmax(1)
    loader = list(zip(x.split(7), y.split(7), strict=True))
    both = {"model": model, "other": lambda z: 2 * model(z)}
    report = blind_spot_report(both, loader, 10, confidence=0.34, iterations=8, batch_size=4)
    assert set(report.table["model"]) == {"model", "other"}
    assert len(report.table) == 2 * 3 * 10
    summary = report.summary()
    assert summary.loc[("model", "level set"), "remaining"] < summary.loc[("model", "random"), "remaining"]
    assert report.walks["model", "level set"].rows.tolist() == list(range(10))
    walk = report.walks["model", "level set"]
    assert not bool((y[: len(walk.labels)] != y[: len(walk.labels)]).any())
    assert not walk.same_class.any()
    again = blind_spot_report(both, loader, 10, confidence=0.34, iterations=8, batch_size=10)
    np.testing.assert_allclose(again.table["remaining"], report.table["remaining"], atol=0.05)
    with pytest.raises(InvalidInput, match="rightly sure"):
        blind_spot_report(model, loader, 10, confidence=0.9999)
    with pytest.raises(InvalidInput, match="no labels"):
        blind_spot_report(model, [x])


def test_a_film_strip(pairs):
    model, source, target = pairs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = level_set_traversal(model, source, target, iterations=20, record_every=5)
    assert found.path_steps == (5, 10, 15, 20)
    axes = found.plot(1, frames=3)
    assert [ax.get_title() for ax in axes] == ["source", "step 5", "step 10", "step 20", "end", "target"] or len(
        axes
    ) == 6
    assert found.plot_distance(label="ours").get_ylim()[0] == 0
    assert len(found.to_frame()) == 8
    with pytest.raises(InvalidInput, match="row=99"):
        found.plot(99)
    plt.close("all")
