"""The walk against two forward passes a step, as the published loop takes them: in batches, and one pair at a time."""

import pytest
import torch

from broadsheet.data.digits import load_digits_split
from broadsheet.evaluation.level_set_traversal import level_set_traversal
from broadsheet.nn.small_classifiers import small_cnn, train_classifier

STEP, PARALLEL, THRESHOLD = 1e-2, 2e-3, 0.2


def made(pairs):
    """A trained classifier, and pairs of images of different classes."""
    data = load_digits_split(0)
    model = small_cnn(seed=0)
    train_classifier(model, data.x, data.y, epochs=4, seed=0)
    with torch.no_grad():
        right = (model(data.x_test).argmax(1) == data.y_test).nonzero().flatten()
    source, target = right[:pairs], right.roll(17)[:pairs]
    return model, data.x_test[source], data.x_test[target], data.y_test[source]


def ours(model, source, target, labels, iterations):
    how = {"step": STEP, "parallel": PARALLEL, "threshold": THRESHOLD, "init_noise": 0, "iterations": iterations}
    return level_set_traversal(model, source, target, labels, **how).images


def two_forwards(model, source, target, labels, iterations):
    """The same walk: a pass for the gradient, then one more that checks the step."""

    def sure(x):
        return model(x).softmax(1).gather(1, labels[:, None]).flatten()

    def rows(values):
        return values.view(-1, 1, 1, 1)

    x, correction = source.clone(), torch.zeros_like(source)
    with torch.no_grad():
        start = sure(source)
    for _ in range(iterations):
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(at), labels, reduction="sum"), at)
        away = (target - x).flatten(1).double()
        g = gradient.flatten(1).double()
        share = (away * g).sum(1) / (g * g).sum(1).clamp_min(1e-24)
        along = (away - share[:, None] * g).view_as(x).to(x.dtype)
        correction = (correction - PARALLEL * gradient).clamp(-PARALLEL, PARALLEL)
        new = (x + STEP * along + correction).clamp(0, 1)
        with torch.no_grad():
            taken = start - sure(new) <= THRESHOLD
        x = torch.where(rows(taken), new, x)
    return x


def pair_by_pair(model, source, target, labels, iterations):
    walks = zip(source.split(1), target.split(1), labels.split(1), strict=True)
    return torch.cat([two_forwards(model, a, b, y, iterations) for a, b, y in walks])


class Contenders:
    """All on the same pairs, and all at the same ends."""

    pairs = iterations = 0

    def test_ours(self, benchmark):
        case = (*made(self.pairs), self.iterations)
        found = benchmark.pedantic(ours, case, rounds=3, warmup_rounds=1)
        other = two_forwards(*case)
        assert (found - other).abs().mean() < 1e-3
        assert (found - case[1]).flatten(1).norm(dim=1).min() > 0.1

    def test_two_forward_passes_a_step(self, benchmark):
        benchmark.pedantic(two_forwards, (*made(self.pairs), self.iterations), rounds=3, warmup_rounds=1)

    def test_the_published_loop_pair_by_pair(self, benchmark):
        benchmark.pedantic(pair_by_pair, (*made(self.pairs), self.iterations), rounds=1)


@pytest.mark.benchmark(group="level-set-traversal: 100 steps on a CNN, 16 pairs")
class TestSmall(Contenders):
    pairs, iterations = 16, 100


@pytest.mark.benchmark(group="level-set-traversal: 100 steps on a CNN, 64 pairs")
class TestLarge(Contenders):
    pairs, iterations = 64, 100
