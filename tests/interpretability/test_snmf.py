"""Sparse semi-NMF: its steps against NumPy, what it recovers, what holds at every step, and its use on models."""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.snmf import (
    ClampedDetection,
    ConceptTree,
    HierarchicalSemiNMF,
    SemiNMF,
    Source,
    alpha_for_kl,
    collect_mlp_activations,
    concept_detection,
    difference_of_means,
    factorise,
    find_concepts,
    judge_prompts,
    judged,
    logit_shift,
    neuron_overlap,
    next_token_kl,
    next_token_logits,
    steered_texts,
    steering_curve,
    updates,
    written_to_residual,
)
from broadsheet.interpretability.snmf import fitting as fitting_module
from broadsheet.interpretability.snmf.initial import initial_coefficients, leading_singular
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import Feature, Projection, site_width
from broadsheet.nn.matching import match_directions
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model
from broadsheet.nn.steering import StrengthOutOfReach
from broadsheet.nn.tiny_models import FAMILIES, HIDDEN, tiny_inputs, tiny_model

F64 = torch.float64
INITS = ("random", "svd", "kmeans")
SOLVERS = ("multiplicative", "projected")
# Models whose output the next token can be read from, and those that read token ids at all.
TEXT = [f for f in FAMILIES if not f.startswith("vit")]
DECODERS = [
    f for f in TEXT if not any(part in f for part in ("bert", "classifier", "base"))
]  # fmt: skip


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64).to(dtype)


def planted(
    n: int = 400, d: int = 60, k: int = 6, few: int = 4, noisy: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[n, d]`` made of ``k`` features of ``few`` neurons, each active at a quarter of the tokens."""
    random = generator(seed)
    features = torch.zeros(k, d, dtype=F64)
    for row in features:
        row[torch.randperm(d, generator=random)[:few]] = torch.randn(few, generator=random, dtype=F64)
    codes = torch.rand(n, k, generator=random, dtype=F64) * (torch.rand(n, k, generator=random) < 0.25)
    data = codes @ features
    return data + noisy * data.std() * torch.randn(n, d, generator=random, dtype=F64), features, codes


# ------------------------------------------------------------------------------------------------------- the steps


def one_iteration(
    data: np.ndarray, codes: np.ndarray, share: float, reg: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """The published iteration in the order and shapes of the paper, ``data [d, n]``, ``codes [n, K]``; by loops."""
    d, k = len(data), codes.shape[1]
    features = data @ codes @ np.linalg.inv(codes.T @ codes + reg * np.eye(k))
    for j in range(k):
        smallest = np.argsort(-np.abs(features[:, j]), kind="stable")[math.ceil(share * d) :]
        features[smallest, j] = 0
        length = np.sqrt((codes[:, j] ** 2).sum())
        codes[:, j] /= length
        features[:, j] *= length
    p, q = data.T @ features, features.T @ features
    new = np.empty_like(codes)
    for i in range(len(codes)):
        for j in range(k):
            rise, fall = max(p[i, j], 0.0), max(-p[i, j], 0.0)
            for m in range(k):
                rise += codes[i, m] * max(-q[m, j], 0.0)
                fall += codes[i, m] * max(q[m, j], 0.0)
            new[i, j] = codes[i, j] * np.sqrt(rise / fall)
    return features, new


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_iterations_agree_with_numpy(share: float, iterations: int) -> None:
    data = noise(30, 17, seed=1).numpy()
    start = np.random.default_rng(0).random((30, 4)) + 0.05
    expected_codes = start.copy()
    for _ in range(iterations):
        expected, expected_codes = one_iteration(data.T, expected_codes.copy(), share)
    found = SemiNMF(4, share, init=start, max_iter=iterations).fit(data)
    if found.best_iter_ == iterations - 1:  # with winner-take-all the last one need not be the best
        np.testing.assert_allclose(found.features_.T, expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found.coefficients_, expected_codes, rtol=1e-9, atol=1e-10)
    loss = ((data - expected_codes @ expected.T) ** 2).sum()
    assert found.loss_curve_[-1] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("share", [0.07, 1.0])
def test_what_holds_at_every_iteration(share: float, init: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(80, 41, seed=2)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = updates.UPDATES[solver]

    def watched(codes: Tensor, towards: Tensor, gram: Tensor) -> Tensor:
        new = step(codes, towards, gram)
        seen.append((codes, gram, new))
        return new

    monkeypatch.setitem(updates.UPDATES, solver, watched)
    found = SemiNMF(5, share, init=init, solver=solver, max_iter=60, tol=0.0).fit(data)
    assert len(seen) == 60
    for before, _, after in seen:
        assert bool((after >= 0).all())
        assert bool(after.isfinite().all())
        torch.testing.assert_close(before.norm(dim=1), torch.ones(5, dtype=F64))  # rescaled before the update
    assert int((found.features_ != 0).sum(1).max()) <= math.ceil(share * 41)
    assert found.best_iter_ == int(np.argmin(found.loss_curve_))
    pair = float((data - found.coefficients_ @ found.features_).square().sum())
    assert pair == pytest.approx(float(found.loss_curve_.min()), rel=1e-9)
    assert found.explained_ == pytest.approx(1 - pair / float(data.square().sum()))
    if share == 1.0:  # without winner-take-all, neither update ever makes it worse
        assert np.all(np.diff(found.loss_curve_) <= 1e-6 * found.loss_curve_[:-1])


def test_rescaling_changes_no_product() -> None:
    codes, features = torch.rand(5, 30, generator=generator(0), dtype=torch.float32), noise(12, 5, dtype=torch.float32)
    size = codes.norm(dim=1)
    torch.testing.assert_close((features * size) @ (codes / size[:, None]), features @ codes, rtol=1e-5, atol=1e-5)


def test_winner_take_all_keeps_no_more_where_entries_are_equal() -> None:
    tied = torch.ones(10, 3)
    assert (updates.keep_largest(tied, 4) != 0).sum(0).tolist() == [4, 4, 4]
    ordered = torch.tensor([[3.0], [-5.0], [4.0], [0.5]])
    assert updates.keep_largest(ordered, 2).flatten().tolist() == [0.0, -5.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("d", "share", "count"),
    [(100, 0.07, 7), (100, 0.01, 1), (14336, 0.01, 144), (3, 0.01, 1), (7, 1.0, 7), (128, 0.05, 7)],
)
def test_entries_kept(d: int, share: float, count: int) -> None:
    assert updates.entries_kept(d, share) == count


@given(st.integers(1, 6), st.integers(8, 40), st.floats(0.05, 1.0))
@settings(max_examples=25, deadline=None)
def test_gathered_product_is_the_dense_one(k: int, d: int, share: float) -> None:
    count = updates.entries_kept(d, share)
    features = updates.keep_largest(noise(d, k, seed=d), count)
    block = noise(d, 9, seed=k)
    torch.testing.assert_close(updates.FeatureProduct(features, count)(block), features.T @ block)


def test_least_squares_survives_parallel_columns() -> None:
    codes = torch.ones(3, 20, dtype=F64)  # three features with the same coefficients
    data = noise(20, 8)
    solved = updates.solve_features(data.T @ codes.T, codes @ codes.T)
    assert bool(solved.isfinite().all())
    torch.testing.assert_close(solved.sum(1), data.mean(0), rtol=1e-4, atol=1e-6)


def test_multiplicative_update_has_no_nan_where_the_official_code_divides_zero_by_zero() -> None:
    codes, towards, gram = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 2)
    assert bool(updates.multiplicative_update(codes, towards, gram).isfinite().all())
    zero = torch.zeros(2, 3)
    assert bool(updates.multiplicative_update(zero, zero + 1, torch.eye(2)).eq(0).all())


@pytest.mark.parametrize("overlap", [0.0, 0.9])
def test_codes_are_those_of_nonnegative_least_squares(overlap: float) -> None:
    features = noise(5, 20) + overlap * 3
    data = noise(12, 20, seed=1)
    fitted = SemiNMF(5, 1.0)
    fitted.features_, fitted.n_features_in_ = features.numpy(), 20
    expected = np.stack([nnls(features.T.numpy(), row)[0] for row in data.numpy()])
    np.testing.assert_allclose(fitted.transform(data.numpy()), expected, atol=2e-5)
    np.testing.assert_allclose(fitted.inverse_transform(expected), expected @ features.numpy())


# --------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("solver", SOLVERS)
def test_disjoint_features_are_recovered(solver: str) -> None:
    features = torch.zeros(5, 50, dtype=F64)
    for k in range(5):
        features[k, 10 * k : 10 * k + 5] = noise(5, seed=k)
    codes = torch.rand(300, 5, generator=generator(1), dtype=F64) * (torch.rand(300, 5, generator=generator(2)) < 0.3)
    found = SemiNMF(5, 0.1, init="svd", solver=solver, max_iter=300, tol=0.0).fit(codes @ features)
    assert float(match_directions(features, found.features_).cosine.min()) > 0.999


@pytest.mark.parametrize("noisy", [0.0, 0.1])
def test_planted_features_are_recovered_and_not_without_winner_take_all(noisy: float) -> None:
    data, features, _ = planted(noisy=noisy, n=800)
    sparse = SemiNMF(6, 4 / 60, init="svd", max_iter=200).fit(data)
    dense = SemiNMF(6, 1.0, init="svd", max_iter=200).fit(data)
    assert match_directions(features, sparse.features_).mean > 0.97
    assert match_directions(features, dense.features_).mean < match_directions(features, sparse.features_).mean - 0.05


@pytest.mark.parametrize("init", ["random", "svd"])
def test_scaling_the_data_scales_the_features(init: str) -> None:
    data, _, _ = planted(noisy=0.1)
    data = data.float()
    one, other = (SemiNMF(6, 0.1, init=init, max_iter=30).fit(c * data) for c in (1.0, 1e-3))
    torch.testing.assert_close(other.features_ * 1e3, one.features_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.coefficients_, one.coefficients_, rtol=1e-3, atol=1e-4)


def test_permuting_tokens_permutes_coefficients_only() -> None:
    data, _, _ = planted(noisy=0.1)
    start = torch.rand(len(data), 6, generator=generator(0), dtype=F64) + 0.01
    order = torch.randperm(len(data), generator=generator(1))
    one = SemiNMF(6, 0.1, init=start, max_iter=25).fit(data)
    other = SemiNMF(6, 0.1, init=start[order], max_iter=25).fit(data[order])
    torch.testing.assert_close(other.features_, one.features_, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other.coefficients_, one.coefficients_[order], rtol=1e-6, atol=1e-8)


def test_a_feature_that_dies_is_begun_anew() -> None:
    data, features, _ = planted(k=4, n=300)
    start = torch.rand(300, 4, generator=generator(0), dtype=F64) + 0.01
    start[:, 2] = 0
    found = SemiNMF(4, 4 / 60, init=start, max_iter=120).fit(data)
    assert found.reseeded_ >= 1 and bool((found.features_.norm(dim=1) > 0).all())
    codes = torch.rand(4, 300, generator=generator(0), dtype=F64) + 0.01
    codes[2] = 0
    dead = factorise(Source(data), codes, sparsity=4 / 60, max_iter=120)
    assert dead.reseeded >= 1
    assert bool((dead.features.norm(dim=1) > 0).all())
    assert match_directions(features, dead.features).mean > 0.9
    assert bool((codes[2] == 0).all())  # the caller's own stay


def test_seeds_say_what_comes_out_and_nothing_global_moves() -> None:
    data, _, _ = planted(noisy=0.1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for init in ("random", "kmeans"):
        one, same, other = (SemiNMF(5, 0.1, init=init, max_iter=5, random_state=s).fit(data) for s in (1, 1, 2))
        assert torch.equal(one.features_, same.features_)
        assert not torch.equal(one.features_, other.features_)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_the_best_of_several_starts_is_kept() -> None:
    data, _, _ = planted(noisy=0.1)
    settings_: dict[str, Any] = {"n_components": 6, "sparsity": 4 / 60, "init": "kmeans", "max_iter": 20}
    one, many = (SemiNMF(**settings_, n_init=n, random_state=3).fit(data) for n in (1, 5))
    assert many.loss_curve_.min() < one.loss_curve_.min()
    with pytest.raises(InvalidInput, match="n_init=0"):
        SemiNMF(**settings_, n_init=0).fit(data)


def test_clusters_start_apart() -> None:
    """Twelve groups of tokens, twelve centres: drawn evenly, some group would be missed nearly always."""
    centres = 10 * noise(12, 30)
    data = centres.repeat_interleave(20, 0) + 0.1 * noise(240, 30, seed=1)
    for seed in range(4):
        codes = initial_coefficients(Source(data), 12, "kmeans", generator(seed))
        labels = codes.argmax(0).view(12, 20)
        assert bool((labels == labels[:, :1]).all()) and len(labels[:, 0].unique()) == 12


def test_patience_stops() -> None:
    data, _, _ = planted(noisy=0.1)
    found = SemiNMF(6, 0.1, init="svd", max_iter=500, patience=7, tol=1e-3).fit(data)
    assert found.n_iter_ < 100
    improved = [i for i in range(found.n_iter_) if found.loss_curve_[i] < found.loss_curve_[:i].min(initial=np.inf)]
    assert improved[-1] <= found.n_iter_ - 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_projected_updates_bring_zeros_back(solver: str) -> None:
    data, _, _ = planted(k=3)
    start = torch.rand(400, 3, generator=generator(0), dtype=F64)
    codes = torch.rand(3, 400, generator=generator(0), dtype=F64)
    codes[:, :50] = 0  # tokens that the start explains with nothing
    found = factorise(Source(data), codes, sparsity=1.0, solver=solver, max_iter=30)
    revived = bool((found.coefficients[:50] > 0).any())
    assert revived == (solver == "projected")
    assert start.shape == (400, 3)


# ------------------------------------------------------------------------------------------------ data of all kinds


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_change_nothing(init: str, solver: str) -> None:
    data, _, _ = planted(n=203, noisy=0.1)
    whole = SemiNMF(6, 0.1, init=init, solver=solver, max_iter=15).fit(data)
    blocks = SemiNMF(6, 0.1, init=init, solver=solver, max_iter=15, batch_size=50).fit(data)
    if init == "svd":  # subspace iteration instead of an exact decomposition
        assert match_directions(whole.features_, blocks.features_).mean > 0.9999
    else:
        torch.testing.assert_close(blocks.features_, whole.features_, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(blocks.coefficients_, whole.coefficients_, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(blocks.transform(data), whole.transform(data), rtol=1e-3, atol=1e-3)


def test_subspace_iteration_finds_the_singular_vectors() -> None:
    data = noise(150, 40) @ torch.diag(torch.linspace(1, 0.01, 40, dtype=F64))
    values, vectors = leading_singular(Source(data, batch_size=32), 5, generator(0))
    _, expected, right = torch.linalg.svd(data.T, full_matrices=False)
    torch.testing.assert_close(values, expected[:5], rtol=1e-3, atol=1e-3)
    assert match_directions(right[:5], vectors, signed=False).mean > 0.99


def test_a_file_larger_than_memory_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = planted(n=500, noisy=0.1)[0].float().numpy()
    np.save(tmp_path / "acts.npy", data)
    mapped = np.load(tmp_path / "acts.npy", mmap_mode="r")
    sizes: list[int] = []
    block = Source._block

    def watched(self: Source, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return block(self, start, stop)

    monkeypatch.setattr(Source, "_block", watched)
    settings_: dict[str, Any] = {"n_components": 6, "sparsity": 0.1, "max_iter": 10}
    on_disk = SemiNMF(**settings_, batch_size=64).fit(mapped)
    assert max(sizes) == 64
    codes = on_disk.transform(mapped)
    assert max(sizes) == 64
    in_memory = SemiNMF(**settings_).fit(data)
    np.testing.assert_allclose(on_disk.features_, in_memory.features_, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(codes, in_memory.transform(data), rtol=1e-3, atol=1e-4)
    as_tensor = SemiNMF(**settings_, batch_size=64).fit(torch.from_numpy(np.load(tmp_path / "acts.npy", mmap_mode="c")))
    np.testing.assert_allclose(as_tensor.features_.numpy(), on_disk.features_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype_and_kind_follow_the_input(dtype: torch.dtype) -> None:
    data = planted(noisy=0.1)[0].to(dtype)
    found = SemiNMF(6, 0.1, max_iter=10).fit(data)
    computed = F64 if dtype == F64 else torch.float32
    assert found.features_.dtype == found.coefficients_.dtype == computed
    assert found.transform(data).dtype == computed
    exact = SemiNMF(6, 0.1, max_iter=10).fit(data.to(computed))
    assert torch.equal(exact.features_, found.features_)
    if dtype == F64:
        array = SemiNMF(6, 0.1, max_iter=10).fit(data.numpy())
        assert isinstance(array.features_, np.ndarray)
        np.testing.assert_array_equal(array.features_, found.features_.numpy())


def test_batches_find_what_all_at_once_finds() -> None:
    data, features, _ = planted(n=2000, noisy=0.05, seed=1)
    online = SemiNMF(6, 4 / 60, init="random")
    recovered = []
    for _ in range(3):
        recovered += [match_directions(features, online.partial_fit(x).features_).mean for x in data.split(200)]
    assert recovered[-1] > 0.99 > recovered[0]
    assert online.n_samples_seen_ == 6000 and online.n_iter_ == 30
    assert int((online.features_ != 0).sum(1).max()) <= 4
    # after a whole fit, batches go on from it
    whole = SemiNMF(6, 4 / 60, init="svd", max_iter=100).fit(data)
    before = whole.features_.clone()
    whole.partial_fit(data[:300])
    assert match_directions(before, whole.features_).mean > 0.99


def test_batches_before_count_with_their_weight() -> None:
    """Least squares over both batches, each with the coefficients that it got, the older one at half the weight."""
    one, two = noise(40, 12), noise(40, 12, seed=1)
    online = SemiNMF(3, 1.0, forgetting=0.5).partial_fit(one)
    first = online.coefficients_
    second = online.partial_fit(two).coefficients_
    cross = 0.5 * one.T @ first + two.T @ second
    expected = torch.linalg.solve(0.5 * first.T @ first + second.T @ second, cross.T)
    torch.testing.assert_close(online.features_, expected, rtol=1e-3, atol=1e-4)


@parametrize_with_checks(
    [
        SemiNMF(n_components=2, sparsity=1.0, max_iter=10),
        SemiNMF(n_components=1, sparsity=0.5, max_iter=10, init="svd", solver="projected"),
        HierarchicalSemiNMF(ranks=(2, 1), sparsity=1.0, max_iter=5),
    ]
)
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_files_keep_the_features(tmp_path: Path) -> None:
    data, _, _ = planted(noisy=0.1)
    for x in (data.float(), data.numpy()):
        fitted = SemiNMF(6, 0.1, max_iter=10, solver="projected").fit(x)
        fitted.save_pretrained(tmp_path / "snmf")
        loaded = SemiNMF.from_pretrained(tmp_path / "snmf")
        assert loaded.get_params() == fitted.get_params()
        assert type(loaded.features_) is type(fitted.features_)
        np.testing.assert_array_equal(np.asarray(loaded.transform(x)), np.asarray(fitted.transform(x)))
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(np.asarray(again.features_), np.asarray(fitted.features_))
    (tmp_path / "snmf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SemiNMF.from_pretrained(tmp_path / "snmf")


def test_an_interrupted_fit_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _, _ = planted(noisy=0.1)
    settings_: dict[str, Any] = {"n_components": 6, "sparsity": 0.1, "max_iter": 30}
    whole = SemiNMF(**settings_).fit(data)
    step, calls = updates.multiplicative_update, []

    def interrupted(*given: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setitem(updates.UPDATES, "multiplicative", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SemiNMF(**settings_).fit(data, checkpoint=tmp_path / "fit")
    resumed = SemiNMF(**settings_).fit(data, checkpoint=tmp_path / "fit")
    assert len(calls) == 13 + 18  # 12 whole iterations were kept
    # sums over the data are taken anew where the fit goes on: equal but for their last digits
    torch.testing.assert_close(resumed.features_, whole.features_, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(resumed.loss_curve_, whole.loss_curve_, rtol=1e-9)
    with pytest.raises(CheckpointError, match="other data or settings"):
        SemiNMF(**{**settings_, "sparsity": 0.5}).fit(data, checkpoint=tmp_path / "fit")


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given_", "change", "message"),
    [
        ({}, lambda x: x.fill_(3.0), "rows of the activations are the same"),
        ({}, lambda x: x.fill_(0.0), "rows of the activations are the same"),
        ({}, lambda x: x.index_fill_(0, torch.tensor([5]), math.nan), "first in row 5"),
        ({}, lambda x: x.index_fill_(0, torch.tensor([7]), math.inf), "first in row 7"),
        ({}, lambda x: x.long(), "are they token ids"),
        ({}, lambda x: x[:, 0], "expected a matrix"),
        ({"n_components": 41}, None, "n_components=41 features from n_samples=40"),
        ({"n_components": 13, "init": "svd"}, None, "12 singular vectors"),
        ({"n_components": 0}, None, "n_components=0"),
        ({"sparsity": 0.0}, None, "sparsity=0.0"),
        ({"sparsity": 1.5}, None, "sparsity=1.5"),
        ({"init": "knn"}, None, "init='knn'"),
        ({"init": torch.ones(40, 2)}, None, "expected coefficients"),
        ({"init": -torch.ones(40, 3)}, None, "negative or missing"),
        ({"solver": "adam"}, None, "solver='adam'"),
        ({"max_iter": 0}, None, "max_iter=0"),
        ({"tol": -1.0}, None, "tol=-1.0"),
        ({"batch_size": 0}, None, "batch_size=0"),
    ],
)
def test_bad_input_is_refused(given_: dict[str, Any], change: Any, message: str) -> None:
    data = noise(40, 12)
    data = data if change is None else change(data)
    with pytest.raises(InvalidInput, match=message):
        SemiNMF(**{"n_components": 3, "sparsity": 0.5, "max_iter": 3, **given_}).fit(data)


def test_more_bad_input() -> None:
    fitted = SemiNMF(3, 0.5, max_iter=3).fit(noise(40, 12))
    with pytest.raises(InvalidInput, match="fitted on 12"):
        fitted.transform(noise(4, 11))
    with pytest.raises(InvalidInput, match="NaN"):
        fitted.transform(noise(4, 12).fill_(math.nan))
    with pytest.raises(InvalidInput, match="feature 3"):
        fitted.feature(3, "layers.0.mlp.act")
    with pytest.raises(InvalidInput, match="forgetting=0"):
        clone(fitted).set_params(forgetting=0).partial_fit(noise(40, 12))
    with pytest.raises(InvalidInput, match="fall from level"):
        HierarchicalSemiNMF(ranks=(3, 3)).fit(noise(40, 12))


# ------------------------------------------------------------------------------------------------------- hierarchy


def families(n: int = 900, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two families of three features: each has six neurons of its family and two of its own. Tokens are about one."""
    random = generator(seed)
    features = torch.zeros(6, 80, dtype=F64)
    for k in range(6):
        first = k // 3 * 30
        features[k, first : first + 6] = 1.0
        features[k, first + 10 + 2 * (k % 3) : first + 12 + 2 * (k % 3)] = 2.0
    codes = torch.zeros(n, 6, dtype=F64)
    codes[torch.arange(n), torch.randint(6, (n,), generator=random)] = 0.5 + torch.rand(n, generator=random, dtype=F64)
    return codes @ features, features


def test_the_tree_puts_siblings_together() -> None:
    data, features = families()
    deep = HierarchicalSemiNMF(ranks=(6, 2), sparsity=0.1, init="kmeans", max_iter=300, random_state=1).fit(data)
    match = match_directions(features, deep.features(0))
    assert match.mean > 0.97
    parents = deep.parents(1)[match.index]
    assert len(set(parents[:3].tolist())) == len(set(parents[3:].tolist())) == 1
    assert parents[0] != parents[3]
    tree = deep.concept_tree(1, int(parents[0]))
    assert {child.index for child in tree.children} == set(match.index[:3].tolist())
    assert tree.to_frame()["parent"].tolist() == [-1, *[tree.index] * 3]
    assert [leaf.level for leaf in tree.leaves] == [0, 0, 0]
    assert tree.plot() is not None
    torch.testing.assert_close(deep.coefficients(1), deep.levels_[0].coefficients_ @ deep.levels_[1].coefficients_)
    torch.testing.assert_close(deep.transform(data), deep.levels_[0].transform(data) @ deep.links(1))
    found = neuron_overlap(deep.features(0)[match.index[:3]])
    assert set(found.core.tolist()) == set(range(6))
    assert [len(found.exclusive(k)) for k in range(3)] == [2, 2, 2]
    assert found.to_frame()["core"].tolist() == [6, 6, 6]
    assert found.neurons[:6].sort().values.tolist() == list(range(6))  # the core stands on the left
    assert float(found.jaccard[0, 1]) == pytest.approx(6 / 10)
    assert found.plot() is not None


def test_tree_limits() -> None:
    deep = HierarchicalSemiNMF(ranks=(6, 3, 1), sparsity=0.3, max_iter=30).fit(noise(60, 20))
    tree = deep.concept_tree(2, 0, top_children=2, threshold=0.0)
    assert len(tree.children) <= 2
    assert len(deep.concept_tree(2, 0, threshold=1.0).children) == 1
    assert all(len(node.children) <= 2 for node, _ in tree.walk())
    for wrong in ({"level": 3, "k": 0}, {"level": 1, "k": 9}, {"level": 1, "k": 0, "threshold": 2.0}):
        with pytest.raises(InvalidInput):
            deep.concept_tree(**wrong)
    with pytest.raises(InvalidInput, match="level=0"):
        deep.links(0)
    with pytest.raises(InvalidInput, match="at least two"):
        neuron_overlap(torch.ones(1, 4))
    assert isinstance(deep.concept_tree(0, 2), ConceptTree)


def test_tuning_lowers_the_error_and_keeps_signs_and_neurons() -> None:
    data, _ = families(300)
    deep = HierarchicalSemiNMF(ranks=(6, 2), sparsity=0.1, max_iter=60).fit(data)
    tuned = deep.fine_tune(data, steps=80, lr=1e-2)
    assert tuned.losses[-1] < tuned.losses[0]
    assert tuned.negative_share == 0
    assert bool((tuned.features[deep.features(-1) == 0] == 0).all())
    loose = deep.fine_tune(data, steps=80, lr=1e-2, nonnegative=False)
    assert loose.negative_share > 0.01
    first = deep.coefficients(1) @ deep.features(1)
    assert tuned.losses[0] == pytest.approx(float((first - data).square().mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- models


def reader(family: str, k: int = 4, seed: int = 0) -> tuple[Any, SemiNMF]:
    model = tiny_model(family)
    _, totals = block_map(model).forward(tiny_inputs(family, 24, seed=1), cache=True)
    acts = totals.layers[0].act.detach().flatten(0, 1)
    return model, SemiNMF(k, 0.2, init="svd", max_iter=30, random_state=seed).fit(acts)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_go_to_every_family_as_features(family: str) -> None:
    model, snmf = reader(family)
    feature = snmf.feature(1, "layers.0.mlp.act")
    data = tiny_inputs(family)
    _, totals = block_map(model).forward(data, cache=True)
    acts = totals.layers[0].act
    if family.startswith("vit"):  # images have no token ids to hang activations on: the reading alone
        codes = feature.read(acts.flatten(2))
    else:
        codes = feature.activations(model, data)
    expected = snmf.transform(acts.flatten(0, 1))[:, 1].reshape(acts.shape[:2])
    torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain = model(data)[0]
        with feature.steered(model, 0.0):
            assert torch.equal(model(data)[0], plain)  # bitwise
        with feature.steered(model, 3.0):
            moved = model(data)[0]

        def add(name: str, layer: int, x: Tensor) -> Tensor:
            return x + 3 * feature.unit if (name, layer) == ("act", 0) else x

        edited = block_map(model).forward(data, edit=add)
        assert torch.equal(model(data)[0], plain)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    torch.testing.assert_close(moved, edited, rtol=1e-5, atol=1e-6)
    assert float((moved - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("family", TEXT)
def test_activations_are_those_before_the_output_matrix(family: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, 3)
    rows, texts = collect_mlp_activations(model, [ids], 1)
    _, totals = block_map(model).forward(ids, cache=True)
    torch.testing.assert_close(rows.values.double(), totals.layers[1].act[:, 1:].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert rows.values.dtype == torch.float32 and rows.values.shape[1] == HIDDEN
    assert all(torch.equal(text, row) for text, row in zip(texts, ids, strict=True))
    for row in range(len(rows)):
        assert int(rows.token_ids[row]) == int(texts[int(rows.text[row])][int(rows.position[row])])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert-mlm"])
def test_padding_on_either_side_counts_for_nothing(family: str, side: str) -> None:
    model = tiny_model(family)
    ids = tiny_inputs(family, 3)
    pad = torch.ones(3, 2, dtype=torch.long)
    mask = torch.ones(3, 9, dtype=torch.long)
    if side == "left":
        padded, mask[:, :2] = torch.cat([pad, ids], 1), 0
    else:
        padded, mask[:, 7:] = torch.cat([ids, pad], 1), 0
    plain, texts = collect_mlp_activations(model, [ids], 0)
    other, same = collect_mlp_activations(model, [(padded, mask)], 0)
    torch.testing.assert_close(other.values, plain.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(other.position, plain.position)
    assert all(torch.equal(a, b) for a, b in zip(texts, same, strict=True))
    feature = Feature("layers.0.mlp.act", noise(HIDDEN))
    one = concept_detection(model, feature, [ids], [ids.flip(1)])
    two = concept_detection(model, feature, [(padded, mask)], [ids.flip(1)])
    torch.testing.assert_close(one.activating, two.activating, rtol=1e-5, atol=1e-6)
    if family != "bert-mlm":
        torch.testing.assert_close(
            next_token_logits(model, padded, mask), next_token_logits(model, ids), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_gradients_flow_through_the_reading(family: str) -> None:
    model, snmf = reader(family)
    data = tiny_inputs(family)
    feature = snmf.feature(0, "layers.0.mlp.act")
    found = feature.attribution(model, data)
    assert float(found.activation.abs().max()) > 0
    assert float(found.heads.abs().max()) > 0
    x = noise(5, HIDDEN, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(feature.read(x).sum(), x)
    step = 1e-6 * noise(5, HIDDEN, seed=4)
    with torch.no_grad():
        change = (feature.read(x + step) - feature.read(x - step)).sum() / 2
    assert float((gradient * step).sum()) == pytest.approx(float(change), rel=2e-2, abs=1e-9)


def test_ablation_takes_the_factor_out() -> None:
    model, snmf = reader("gpt2")
    feature, data = snmf.feature(2, "layers.0.mlp.act"), tiny_inputs("gpt2")
    assert float(feature.activations(model, data).max()) > 1e-3
    with feature.ablated(model):
        left = feature.activations(model, data)
    # activations() hooks after the edit: what is read is what remains
    assert float(left.abs().max()) < 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(("gemma", "gpt2", "llama", "neox", "opt"))])
def test_written_to_the_residual_stream(family: str) -> None:
    model, snmf = reader(family)
    feature = snmf.feature(0, "layers.0.mlp.act")
    block = block_map(model).blocks[0]
    if block.scheme == "post":
        with pytest.raises(InvalidInput, match="normalises the residual"):
            written_to_residual(model, feature)
        return
    there = written_to_residual(model, feature)
    assert there.site == "layers.0.resid_post" and len(there.write) == 24
    if block.out_norm2 is None:
        torch.testing.assert_close(there.write, feature.in_residual(model))
    else:
        torch.testing.assert_close(there.write, block.out_norm2(block.mlp.w_out(feature.write)).detach())
    with torch.no_grad(), there.steered(model, 2.0):
        assert bool(model(tiny_inputs(family))[0].isfinite().all())
    with pytest.raises(InvalidInput, match="MLP activations"):
        written_to_residual(model, there)


# ------------------------------------------------------------------------------------------- texts, words, steering


@pytest.fixture(scope="module")
def language() -> tuple[TopicCorpus, Any, Any]:
    corpus = TopicCorpus(n_topics=4, words_per_topic=4, n_common=8)
    model = small_language_model(corpus.vocab_size, kind="gpt2", width=16, layers=2, heads=2, hidden=32, length=16)
    with torch.no_grad():  # random weights of GPT-2's size barely say anything
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim == 2 else 1.0)
    return corpus, model, corpus.tokenizer()


def test_concepts_from_texts_to_words(language: Any) -> None:
    corpus, model, tokenizer = language
    ids, _ = corpus.sample(24, 9, generator(0))
    texts = [corpus.text(row[1:]) for row in ids]  # the tokenizer puts BOS in front itself
    found = find_concepts(model, texts, 1, tokenizer, snmf=SemiNMF(5, 0.2, max_iter=30), batch_size=7)
    assert found.site == "layers.1.mlp.act" and len(found) == 5 and len(found.texts) == 24
    assert len(found.activations) == 24 * 8 and not bool((found.activations.token_ids == 0).any())
    assert torch.equal(torch.stack(found.texts), ids)
    examples = found.top_contexts(2, n=6, window=2)
    column = found.coefficients[:, 2]
    torch.testing.assert_close(examples.activation, column.topk(6).values)
    for i in range(6):
        at = examples.token_ids[i][examples.place[i]]
        value = examples.values[i][examples.place[i]]
        assert value == pytest.approx(float(examples.activation[i]))
        rows = (found.activations.text == examples.text[i]) & (found.activations.token_ids == at)
        assert float((column[rows] - value).abs().min()) < 1e-7
        row = int(column.topk(6).indices[i])
        place = int(found.activations.position[row])
        assert list(examples.token_ids[i]) == ids[examples.text[i], max(0, place - 2) : place + 3].tolist()
        assert examples.place[i] == min(place, 2)
    assert "excerpt" in examples.to_frame(tokenizer)
    up, down = (found.vocab_projection(model, 1, 5, sign, tokenizer) for sign in (1, -1))
    effect = found.feature(1).logit_effect(model)
    assert up["token_id"].tolist() == effect.topk(5).indices.tolist()
    assert down["token_id"].tolist() == (-effect).topk(5).indices.tolist()
    assert up["token"][0] == tokenizer.decode([up["token_id"][0]])
    ragged = find_concepts(
        model, [text[: 20 + 3 * i] for i, text in enumerate(texts)], 1, tokenizer, snmf=SemiNMF(5, 0.2)
    )
    assert len({len(text) for text in ragged.texts}) > 1
    assert len(ragged.activations) == sum(len(text) - 1 for text in ragged.texts)
    # a batch of ids with a mask, and activations that were collected before
    again = find_concepts(model, [(ids, None)], 1, snmf=SemiNMF(5, 0.2, max_iter=30))
    torch.testing.assert_close(again.coefficients, found.coefficients, rtol=1e-3, atol=1e-4)
    kept = find_concepts(model, found.activations, 1, snmf=SemiNMF(5, 0.2, max_iter=30))
    assert torch.equal(kept.coefficients, found.coefficients)
    assert kept.texts[0][1:].tolist() == ids[0, 1:].tolist()
    matrix = find_concepts(model, found.activations.values, 1, snmf=SemiNMF(5, 0.2, max_iter=30))
    assert torch.equal(matrix.coefficients, found.coefficients)


def test_concepts_refuse(language: Any) -> None:
    corpus, model, tokenizer = language
    ids, _ = corpus.sample(6, 6, generator(0))
    few = SemiNMF(3, 0.2, max_iter=3)
    with pytest.raises(InvalidInput, match="looks transposed"):
        find_concepts(model, torch.rand(32, 50), 0, snmf=few)
    with pytest.raises(InvalidInput, match=r"32 wide$"):
        find_concepts(model, torch.rand(50, 31), 0, snmf=few)
    with pytest.raises(InvalidInput, match="2 layers"):
        find_concepts(model, [ids], 2, snmf=few)
    with pytest.raises(InvalidInput, match="layer=-1"):
        find_concepts(model, [ids], -1, snmf=few)
    with pytest.raises(InvalidInput, match="no token is left"):
        find_concepts(model, [torch.zeros(4, 1, dtype=torch.long)], 0, snmf=few)  # BOS only
    with pytest.raises(InvalidInput, match="every token BOS"):
        find_concepts(model, [torch.zeros(4, 1, dtype=torch.long)], 0, snmf=few, skip_first=False)
    with pytest.raises(InvalidInput, match="one string"):
        find_concepts(model, "the dog", 0, tokenizer, snmf=few)
    with pytest.raises(InvalidInput, match="texts is empty"):
        find_concepts(model, [], 0, tokenizer, snmf=few)
    with pytest.raises(InvalidInput, match="at least two are needed"):
        concept_detection(model, Feature("layers.0.mlp.act", torch.ones(32)), ["the dog"], ["a cat", "the"], tokenizer)
    with pytest.raises(InvalidInput, match="holds no token"):
        concept_detection(
            model, Feature("layers.0.mlp.act", torch.ones(32)), [ids[:2]], [torch.zeros(2, 1, dtype=torch.long)]
        )
    narrow = Feature("layers.0.mlp.act", torch.ones(31))
    with pytest.raises(InvalidInput, match="31 entries"):
        alpha_for_kl(model, narrow, ids, 0.1)
    found = find_concepts(model, [ids], 0, snmf=few)
    for wrong in ({"k": 3}, {"k": 0, "n": 0}, {"k": 0, "window": -1}):
        with pytest.raises(InvalidInput):
            found.top_contexts(**wrong)
    with pytest.raises(InvalidInput, match="sign=2"):
        found.vocab_projection(model, 0, sign=2)


def test_detection_score_by_hand(language: Any) -> None:
    _, model, tokenizer = language
    activating, neutral = ["dog cat the", "horse a dog of"], ["the of a", "is in to", "a"]
    feature = Feature("layers.0.mlp.act", noise(32, dtype=torch.float32).abs() + 1)
    found = concept_detection(model, feature, activating, neutral, tokenizer)

    def by_hand(texts: list[str]) -> list[float]:
        best = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            act = block_map(model).forward(ids, cache=True)[1].layers[0].act[0, 1:]
            best.append(float(nn.functional.cosine_similarity(act, feature.write[None], dim=-1).max()))
        return best

    one, two = by_hand(activating), by_hand(neutral)
    torch.testing.assert_close(found.activating, torch.tensor(one), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.neutral, torch.tensor(two), rtol=1e-5, atol=1e-6)
    if min(np.mean(one), np.mean(two)) > 0:
        assert found.score == pytest.approx(math.log(np.mean(one) / np.mean(two)), rel=1e-4)
    assert found.to_frame()["kind"].tolist() == ["activating"] * 2 + ["neutral"] * 3
    negative = Feature("layers.0.mlp.act", -torch.ones(32))
    means = block_map(model).forward(torch.tensor([tokenizer("the of a")["input_ids"]]), cache=True)[1].layers[0].act
    assert means.isfinite().all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flagged = concept_detection(model, negative, activating, neutral, tokenizer)
    assert flagged.clamped == any(issubclass(w.category, ClampedDetection) for w in caught)
    assert math.isfinite(flagged.score)


def test_a_detection_that_cannot_be_a_ratio_is_flagged() -> None:
    from broadsheet.interpretability.snmf import Detection

    found = Detection(torch.tensor([0.5, 0.4]), torch.tensor([-0.2, -0.1]))
    assert found.clamped and found.score == pytest.approx(math.log(0.45 / 1e-6), rel=1e-4)
    assert not Detection(torch.tensor([0.5, 0.4]), torch.tensor([0.2, 0.1])).clamped


def test_difference_of_means_is_that_of_the_activations(language: Any) -> None:
    corpus, model, _ = language
    ids, topics = corpus.sample(20, 8, generator(3))
    about = topics == topics[0]
    direction = difference_of_means(model, "layers.0.mlp.act", [ids[about]], [ids[~about]])
    acts = block_map(model).forward(ids, cache=True)[1].layers[0].act[:, 1:]
    expected = acts[about].flatten(0, 1).mean(0) - acts[~about].flatten(0, 1).mean(0)
    torch.testing.assert_close(direction.write, (expected / expected.norm()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", [0.01, 0.1])
def test_strength_at_a_divergence(language: Any, sign: int, target: float) -> None:
    corpus, model, _ = language
    prompt = torch.tensor([[0, 4, 5]])
    feature = Feature("layers.0.mlp.act", noise(32, seed=1, dtype=torch.float32))
    alpha = alpha_for_kl(model, feature, prompt, target, sign=sign)
    assert math.copysign(1, alpha) == sign
    assert next_token_kl(model, feature, alpha, prompt) == pytest.approx(target, rel=0.05)
    base = model(prompt).logits[:, -1].log_softmax(-1)
    with feature.steered(model, alpha):
        after = model(prompt).logits[:, -1].log_softmax(-1)
    assert float((base.exp() * (base - after)).sum()) == pytest.approx(target, rel=0.051)
    tokens = corpus.topic_tokens[1]
    curve = steering_curve(model, feature, prompt, tokens, targets=(target,), sign=sign)
    assert curve.alpha == (alpha,) and curve.mass[0] == pytest.approx(
        float(after.exp()[0, tokens].sum().detach()), rel=1e-5
    )
    assert curve.base_mass == pytest.approx(float(base.exp()[0, tokens].sum().detach()), rel=1e-5)
    assert curve.to_frame()["target"].tolist() == [target] and curve.plot() is not None
    shift = logit_shift(model, feature, alpha, prompt, top=3)
    raw = model(prompt).logits[0, -1]
    with feature.steered(model, alpha):
        moved = model(prompt).logits[0, -1] - raw
    assert shift["token_id"].tolist() == moved.topk(3).indices.tolist()
    by_size = logit_shift(model, feature, alpha, prompt, top=3, by_size=True)
    assert by_size["token_id"].tolist() == moved.abs().topk(3).indices.tolist()


def test_a_divergence_out_of_reach_is_nan_and_said(language: Any) -> None:
    _, model, _ = language
    feature = Feature("layers.0.mlp.act", noise(32, seed=1, dtype=torch.float32))
    with pytest.warns(StrengthOutOfReach):
        assert math.isnan(alpha_for_kl(model, feature, torch.tensor([[0, 4, 5]]), 1e4))
    with pytest.warns(StrengthOutOfReach):
        curve = steering_curve(model, feature, torch.tensor([[0, 4, 5]]), [7], targets=(0.05, 1e4))
    assert math.isnan(curve.mass[1]) and not math.isnan(curve.mass[0])
    with pytest.raises(InvalidInput, match="sign=0"):
        alpha_for_kl(model, feature, torch.tensor([[0, 4, 5]]), 0.1, sign=0)


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_is_steered_to_a_divergence(family: str) -> None:
    model, snmf = reader(family)
    prompt = tiny_inputs(family, 2)
    feature = snmf.feature(0, "layers.0.mlp.act")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StrengthOutOfReach)
        alpha = alpha_for_kl(model, feature, prompt, 0.05)
    if not math.isnan(alpha):
        assert next_token_kl(model, feature, alpha, prompt) <= 0.05 * 1.05
    assert site_width(model, feature.site) == HIDDEN


def test_generation_is_steered_everywhere_and_repeats(language: Any) -> None:
    _, model, _ = language
    prompt = torch.tensor([[0, 4, 5]])
    feature = Feature("layers.0.mlp.act", noise(32, seed=1, dtype=torch.float32))
    state = torch.get_rng_state()
    texts = steered_texts(model, feature, 5.0, prompt, samples=3, new_tokens=6, seed=1)
    assert texts.shape == (3, 9) and torch.equal(texts[:, :3], prompt.repeat(3, 1))
    assert torch.equal(texts, steered_texts(model, feature, 5.0, prompt, samples=3, new_tokens=6, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidInput, match="one prompt"):
        steered_texts(model, feature, 1.0, prompt.repeat(2, 1))


def test_marks_of_a_judge() -> None:
    assert judged([2, 2, 0, 1], [2, 0, 2, 2]) == pytest.approx((2 + 0 + 0 + 4 / 3) / 4)
    with pytest.raises(InvalidInput, match="marks"):
        judged([3], [1])
    prompts = judge_prompts("weekdays", ["on Monday", "a b"])
    assert len(prompts) == 2 and "weekdays" in prompts[0] and "on Monday" in prompts[0]


def test_the_loss_from_traces_is_exact_where_it_nearly_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a difference of nearly equal sums would be noise: then the residual itself is summed."""
    data, _, _ = planted(k=3, n=200)
    data = data.float()
    calls = []
    exact = fitting_module.residual
    monkeypatch.setattr(fitting_module, "residual", lambda *a: calls.append(1) or exact(*a))
    found = SemiNMF(3, 4 / 60, init="svd", max_iter=300, tol=0.0).fit(data)
    assert calls
    truth = float((data.double() - found.coefficients_.double() @ found.features_.double()).square().sum())
    assert float(found.loss_curve_.min()) == pytest.approx(truth, rel=1e-3)


def test_readings_agree_with_projection_for_one_feature() -> None:
    """With a single factor, non-negative least squares is a cut projection."""
    fitted = SemiNMF(1, 1.0, max_iter=3).fit(noise(30, 8))
    feature = fitted.feature(0, "layers.0.mlp.act")
    x = noise(2, 5, 8, seed=4)
    expected = Projection(feature.write / feature.write.square().sum(), rectified=True)(x)
    torch.testing.assert_close(feature.read(x), expected)


def test_initial_coefficients_are_positive_and_of_length_one() -> None:
    source = Source(noise(50, 20))
    for init in INITS:
        codes = initial_coefficients(source, 4, init, generator(0))
        assert codes.shape == (4, 50) and bool((codes > 0).all())
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(4, dtype=F64))
