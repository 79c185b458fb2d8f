"""Factorising activations: sparse semi-NMF against the published loop, and against scikit-learn's NMF."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import NMF
from torch import Tensor

from broadsheet.interpretability.snmf import SemiNMF
from broadsheet.nn.seeding import generator

# Tokens, neurons, features; 20 iterations of each, from the same coefficients.
SIZES = [(1000, 512, 50), (2000, 2048, 100), (4000, 3072, 100), (2000, 8192, 100)]
ITERATIONS = 20
SPARSITY = 0.01
SIGNED = pytest.mark.benchmark(group="snmf: 20 iterations, 1 % of the neurons")
DENSE = pytest.mark.benchmark(group="snmf: 20 iterations, non-negative data, all neurons")
DISK = pytest.mark.benchmark(group="snmf: 20 iterations, activations in a file")
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)


def setting(n: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    random = generator(0)
    codes = torch.rand(n, k, generator=random) * (torch.rand(n, k, generator=random) < 0.1)
    data = codes @ torch.randn(k, d, generator=random) + 0.1 * torch.randn(n, d, generator=random)
    return data, torch.rand(n, k, generator=random) + 1e-3


def ours(data: Any, start: Any, sparsity: float, **how: Any) -> SemiNMF:
    settings = {"max_iter": ITERATIONS, "patience": ITERATIONS, "tol": 0.0}
    return SemiNMF(start.shape[1], sparsity, init=start, **settings, **how).fit(data)


def published(data: np.ndarray, codes: np.ndarray, count: int, iterations: int = ITERATIONS) -> tuple[Any, Any, float]:
    """The published iteration in NumPy, data ``[d, n]``: an inverse, dense products, the residual formed each time."""
    loss = 0.0
    for _ in range(iterations):
        features = data @ codes @ np.linalg.inv(codes.T @ codes + 1e-6 * np.eye(codes.shape[1], dtype=codes.dtype))
        if count < len(features):
            cut = -np.partition(-np.abs(features), count - 1, axis=0)[count - 1]
            features *= np.abs(features) >= cut
        size = np.linalg.norm(codes, axis=0)
        codes, features = codes / size, features * size
        towards, inner = data.T @ features, features.T @ features
        rise = np.maximum(towards, 0) + codes @ np.maximum(-inner, 0)
        fall = np.maximum(-towards, 0) + codes @ np.maximum(inner, 0)
        codes = codes * np.sqrt(rise / (fall + 1e-12))
        loss = float(np.square(data - features @ codes.T).sum())
    return features, codes, loss


@SIGNED
@EVERY
def test_ours(benchmark: Any, size: tuple[int, int, int]) -> None:
    data, start = setting(*size)
    benchmark.pedantic(lambda: ours(data, start, SPARSITY), rounds=3, warmup_rounds=1)


@SIGNED
@EVERY
def test_ours_projected(benchmark: Any, size: tuple[int, int, int]) -> None:
    data, start = setting(*size)
    benchmark.pedantic(lambda: ours(data, start, SPARSITY, solver="projected"), rounds=3, warmup_rounds=1)


@SIGNED
@EVERY
def test_published_loop_in_numpy(benchmark: Any, size: tuple[int, int, int]) -> None:
    data, start = setting(*size)
    turned, codes = np.ascontiguousarray(data.numpy().T), start.numpy()
    count = int(np.ceil(SPARSITY * size[1]))
    benchmark.pedantic(lambda: published(turned, codes, count), rounds=3, warmup_rounds=1)


@DENSE
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_ours_on_non_negative_data(benchmark: Any, size: tuple[int, int, int]) -> None:
    data, start = setting(*size)
    positive = data.clamp_min(0)
    benchmark.pedantic(lambda: ours(positive, start, 1.0), rounds=3, warmup_rounds=1)


@DENSE
@pytest.mark.parametrize("solver", ["cd", "mu"])
@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_scikit_learn_nmf(benchmark: Any, size: tuple[int, int, int], solver: str) -> None:
    """Both factors non-negative: the nearest that scikit-learn has."""
    data, start = setting(*size)
    positive, codes = data.clamp_min(0).numpy(), start.numpy()
    features = np.random.default_rng(0).random((size[2], size[1])).astype(np.float32)

    def work() -> Any:
        model = NMF(size[2], init="custom", solver=solver, max_iter=ITERATIONS, tol=0.0)
        return model.fit_transform(positive, W=codes.copy(), H=features.copy())

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


@DISK
@pytest.mark.parametrize("size", SIZES[2:], ids=str)
def test_ours_from_a_file(benchmark: Any, size: tuple[int, int, int], tmp_path: Path) -> None:
    data, start = setting(*size)
    np.save(tmp_path / "activations.npy", data.numpy())
    mapped, codes = np.load(tmp_path / "activations.npy", mmap_mode="r"), start.numpy()
    del data
    benchmark.pedantic(lambda: ours(mapped, codes, SPARSITY, batch_size=500), rounds=1, warmup_rounds=1)


def test_the_published_loop_and_ours_agree() -> None:
    """What is timed gives the same factors."""
    data, start = setting(200, 64, 5)
    found = ours(data.double(), start.double(), 0.1)
    turned = np.ascontiguousarray(data.double().numpy().T)
    features, _, loss = published(turned, start.double().numpy(), 7)
    assert found.loss_curve_[-1] == pytest.approx(loss, rel=1e-6)
    if found.best_iter_ == ITERATIONS - 1:
        np.testing.assert_allclose(found.features_.numpy().T, features, rtol=1e-5, atol=1e-6)
