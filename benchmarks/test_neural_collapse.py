"""Neural collapse metrics against class-by-class scatter and a dense pseudo-inverse, on the same features."""

import pytest
import torch

from broadsheet.geometry.neural_collapse import metrics_of
from broadsheet.nn.moments import ClassMoments


def made(n, d, k):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % k
    h = torch.randn(n, d, generator=random) + 2 * torch.randn(k, d, generator=random)[labels]
    return h, labels, torch.randn(k, d, generator=random)


def streamed(h, labels, weight):
    moments = ClassMoments(len(weight))
    for x, y in zip(h.split(1024), labels.split(1024), strict=True):
        moments.update(x, y)
    return metrics_of(moments, weight, "etf").numbers()


def class_by_class(h, labels, weight):
    """As the published scripts do it: means, then centred scatter of every class, then a pseudo-inverse of d x d."""
    k = len(weight)
    means = torch.stack([h[labels == c].double().mean(0) for c in range(k)])
    centre = h.double().mean(0)
    within = torch.zeros(h.shape[1], h.shape[1], dtype=torch.float64)
    for c in range(k):
        rest = h[labels == c].double() - means[c]
        within += rest.T @ rest
    within /= len(h)
    between = (means - centre).T @ (means - centre) / k
    nc1 = float((within @ torch.linalg.pinv(between)).trace() / k)
    frame = torch.eye(k, dtype=torch.float64) - 1 / k
    gram = weight.double() @ weight.double().T
    return nc1, float((gram / gram.norm() - frame / frame.norm()).norm())


class Contenders:
    """Both on the same features, and both with the same answer."""

    n = d = k = 0

    def test_ours(self, benchmark):
        h, labels, weight = made(self.n, self.d, self.k)
        found = benchmark.pedantic(streamed, (h, labels, weight), rounds=3, warmup_rounds=1)
        nc1, nc2 = class_by_class(h, labels, weight)
        assert found["nc1"] == pytest.approx(nc1, rel=1e-6)
        assert found["nc2_w"] == pytest.approx(nc2, abs=1e-9)

    def test_class_by_class(self, benchmark):
        benchmark.pedantic(class_by_class, made(self.n, self.d, self.k), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="neural-collapse: NC1 to NC3, (5000, 256, 10)")
class TestSmall(Contenders):
    n, d, k = 5_000, 256, 10


@pytest.mark.benchmark(group="neural-collapse: NC1 to NC3, (20000, 512, 100)")
class TestLarge(Contenders):
    n, d, k = 20_000, 512, 100
