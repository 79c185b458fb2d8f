"""Relative latents against latentis, spaces compared against scikit-learn's search, a rotation against scipy's."""

import numpy as np
import pytest
import torch

from broadsheet.geometry.relative_representations import compare_spaces, relative_projection
from broadsheet.nn.alignment import procrustes
from broadsheet.nn.seeding import generator


def space(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed))


@pytest.mark.benchmark(group="relative-representations: cosines, (20000, 300), 300 anchors")
class TestProjection:
    n, d, k = 20_000, 300, 300

    def made(self):
        z = space(self.n, self.d)
        return z, z[: self.k]

    def test_ours(self, benchmark):
        r = benchmark.pedantic(relative_projection, self.made(), rounds=5, warmup_rounds=1)
        assert float(r.abs().max()) <= 1

    def test_latentis(self, benchmark):
        theirs = pytest.importorskip("latentis.transform.projection", exc_type=ImportError)
        z, a = self.made()
        r = benchmark.pedantic(theirs.cosine_proj, (z,), {"anchors": a}, rounds=5, warmup_rounds=1)
        assert torch.allclose(r, relative_projection(z, a), atol=1e-5)


@pytest.mark.benchmark(group="relative-representations: two spaces compared, 5000 samples, 300 anchors, 10 neighbours")
class TestComparison:
    n, d, k = 5_000, 300, 300

    def made(self):
        z = space(self.n, self.d)
        return z, z + 0.5 * space(self.n, self.d, 1), torch.arange(self.k)

    def test_ours(self, benchmark):
        found = benchmark.pedantic(compare_spaces, self.made(), rounds=3, warmup_rounds=1)
        jaccard, mrr = searched(*self.made())
        assert found.jaccard == pytest.approx(jaccard, abs=1e-4)
        assert found.mrr == pytest.approx(mrr, abs=1e-4)

    def test_scikit_learn(self, benchmark):
        benchmark.pedantic(searched, self.made(), rounds=3, warmup_rounds=1)


def searched(z1, z2, anchors, k=10):
    """The same scores through scikit-learn's search and sets."""
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestNeighbors

    r1, r2 = (cosine_similarity(z.numpy(), z[anchors].numpy()) for z in (z1, z2))
    index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(r2)
    theirs, own = (index.kneighbors(r, return_distance=False) for r in (r1, r2))
    jaccard = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(theirs, own, strict=True)]
    found = theirs == np.arange(len(r1))[:, None]
    return np.mean(jaccard), np.mean(np.where(found.any(1), 1 / (found.argmax(1) + 1), 0))


@pytest.mark.benchmark(group="relative-representations: a rotation from 500 anchors, 768 features")
class TestRotation:
    def made(self):
        return space(500, 768), space(500, 768, 1)

    def test_ours(self, benchmark):
        turn = benchmark.pedantic(procrustes, (*self.made(), False), rounds=3, warmup_rounds=1)
        x, y = (z.double() - z.double().mean(0) for z in self.made())
        assert float((x @ turn.rotation - y).norm()) == pytest.approx(float((x @ scipys(x, y) - y).norm()), rel=1e-6)

    def test_scipy(self, benchmark):
        benchmark.pedantic(scipys, self.made(), rounds=3, warmup_rounds=1)


def scipys(x, y):
    from scipy.linalg import orthogonal_procrustes

    x, y = (z.double().numpy() for z in (x, y))
    return torch.from_numpy(orthogonal_procrustes(x - x.mean(0), y - y.mean(0))[0])
