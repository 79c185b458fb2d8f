"""On a CUDA device every method gives what it gives on the CPU. Skipped where there is none."""

import numpy as np
import pytest
import torch

from broadsheet.nn.features import Feature, site_width
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.tiny_models import tiny_inputs, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = "cuda"


def close(on_cuda, on_cpu, atol=1e-9):
    assert on_cuda.device.type == CUDA
    torch.testing.assert_close(on_cuda.detach().cpu(), on_cpu.detach(), atol=atol, rtol=0)


FAMILIES = ["gpt2", "neox-parallel", "llama", "mistral-window", "qwen3", "gemma3", "opt", "bert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_contextual_decomposition(family):
    from broadsheet.interpretability import Node, decompose

    heads = [Node(layer=0, position=None, head=h) for h in range(4)]
    ids = tiny_inputs(family)
    here = decompose(tiny_model(family), ids, heads)
    there = decompose(tiny_model(family).to(CUDA), ids.to(CUDA), heads)
    close(there.rel_logits, here.rel_logits)
    close(there.irrel_logits, here.irrel_logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching(family):
    from broadsheet.nn.patching import activation_patching, attribution_patching, replacement

    ids = tiny_inputs(family)

    def metric(out):
        return out[:, -1, 0].mean()

    model = tiny_model(family)
    zero = replacement(model, "zero", like=ids)
    here = activation_patching(model, ids, metric, zero)
    model.to(CUDA)
    close(activation_patching(model, ids.to(CUDA), metric, zero.to(CUDA)), here)
    attribution_patching(model, ids.to(CUDA), metric, zero.to(CUDA))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_streams(family):
    from broadsheet.nn.activations import collect_activations

    ids, site = tiny_inputs(family), "layers.1.mlp.act"
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model = tiny_model(family)
    write = torch.randn(site_width(model, site), generator=generator(0), dtype=torch.float64)
    feature = Feature(site, write)
    values = feature.activations(model, ids, mask)
    made = feature.attribution(model, ids, mask)
    rows = collect_activations(model, site, [(ids, mask)], dtype=torch.float64)
    model.to(CUDA)
    close(feature.activations(model, ids.to(CUDA), mask.to(CUDA)), values)
    close(feature.attribution(model, ids.to(CUDA), mask.to(CUDA)).heads, made.heads)
    close(collect_activations(model, site, [(ids, mask)], dtype=torch.float64).values, rows.values)
    with feature.ablated(model):
        zero = feature.activations(model, ids.to(CUDA))
    assert zero.abs().max() < 1e-9


@pytest.mark.parametrize("method", ["exact", "nystroem", "slq"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_diffusion_spectral_entropy(method):
    from broadsheet.geometry.diffusion_spectral_entropy import diffusion_spectral_entropy

    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.normal(size=(800, 20)) + 4 * np.eye(20)[draw.integers(0, 5, 800)])
    exact = diffusion_spectral_entropy(x, 4.0, t=[1, 2])
    there = diffusion_spectral_entropy(x.to(CUDA), 4.0, t=[1, 2], method=method)
    if method == "exact":
        np.testing.assert_allclose(there.value, exact.value, atol=1e-9)
    else:
        assert (np.abs(there.value - exact.value) <= there.error + 1e-6).all()


def test_entropy_as_a_loss():
    from broadsheet.geometry import DiffusionEntropyLoss

    x = torch.randn(40, 6, generator=generator(0), dtype=torch.float64)
    here, there = x.clone().requires_grad_(), x.to(CUDA).requires_grad_()
    loss = DiffusionEntropyLoss(sigma=3.0)
    loss(here).backward()
    loss(there).backward()
    close(there.grad, here.grad)


def test_multiplicative_diffusion():
    from broadsheet.generative import MultiplicativeScoreModel

    x = torch.exp(0.3 * torch.randn(512, 2, generator=generator(0)))
    with seeded(0):
        model = MultiplicativeScoreModel({"name": "ScoreMLP", "dim": 2}).to(CUDA)
    report = model.fit([x], steps=200)
    assert np.mean(report.losses[-20:]) < np.mean(report.losses[:20])
    drawn = model.sample((64, 2), steps=50) if hasattr(model, "sample") else None
    if drawn is None:
        from broadsheet.generative import sample

        drawn = sample(model, (64, 2), steps=50)
    assert drawn.device.type == CUDA
    assert (drawn > 0).all()
    assert drawn.isfinite().all()


def test_rbtransformer():
    from broadsheet.recordings import RBTransformer

    with seeded(0):
        model = RBTransformer(n_chans=8, n_bands=4, n_outputs=3).double().eval()
    x = torch.randn(4, 8, 4, generator=generator(0), dtype=torch.float64)
    here = model(x)
    close(model.to(CUDA)(x.to(CUDA)), here)


def test_training_in_bfloat16_resumes(tmp_path):
    from broadsheet.nn.small_lm import small_language_model, train_language_model

    def sample(n, draw):
        return torch.randint(12, (n, 8), generator=draw).sort(1).values

    model = small_language_model(12, width=32, layers=1, length=8).to(CUDA)
    report = train_language_model(
        model,
        sample,
        steps=60,
        batch=32,
        warmup=10,
        mixed_precision="bf16",
        checkpoint=tmp_path / "c",
        checkpoint_every=20,
    )
    assert np.mean(report.losses[-10:]) < np.mean(report.losses[:10]) - 0.3
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("solver", ["multiplicative", "projected"])
@pytest.mark.parametrize("init", ["random", "svd", "kmeans"])
@pytest.mark.parametrize("sparsity", [0.1, 1.0])
def test_semi_nmf(sparsity, init, solver):
    from broadsheet.interpretability import SemiNMF

    data = torch.rand(80, 4, generator=generator(0)).double() @ torch.randn(4, 30, generator=generator(1)).double()
    for batch_size in (None, 32):
        how = {"init": init, "solver": solver, "max_iter": 8, "batch_size": batch_size}
        here, there = (SemiNMF(4, sparsity, **how).fit(x) for x in (data, data.to(CUDA)))
        close(there.features_, here.features_, atol=1e-6)
        close(there.coefficients_, here.coefficients_, atol=1e-6)
        close(there.transform(data.to(CUDA)), here.transform(data), atol=1e-4)


@pytest.mark.parametrize("frame", [None, "centred", "whitened"])
def test_relative_representations(frame):
    from broadsheet.geometry import (
        RelativeLayer,
        RelativeModel,
        bootstrap_anchors,
        compare_spaces,
        relative_projection,
        select_anchors,
        stitch,
    )

    z, rows = torch.randn(60, 8, generator=generator(0), dtype=torch.float64), torch.arange(0, 60, 5)
    close(relative_projection(z.to(CUDA), z[rows].to(CUDA), frame=frame), relative_projection(z, z[rows], frame=frame))
    here, there = (compare_spaces(x, x.flip(1), rows, frame=frame) for x in (z, z.to(CUDA)))
    assert there.cosine == pytest.approx(here.cosine, abs=1e-9)
    for method in ("fps", "kmeans"):
        assert select_anchors(z.to(CUDA), 9, method).equal(select_anchors(z, 9, method))
    here, there = (bootstrap_anchors(x, x.flip(1), rows[:6], rows[:6], 20, frame=frame) for x in (z, z.to(CUDA)))
    assert here.left.equal(there.left)
    with seeded(0):
        encoder, head = torch.nn.Linear(8, 6).double(), torch.nn.Linear(12, 3).double()
        model = RelativeModel(encoder, head, z[rows], RelativeLayer(12, frame=frame).double()).eval()
    here = stitch(model, model)(z)
    close(stitch(model.to(CUDA), model)(z.to(CUDA)), here)


def test_convergent_learning():
    from broadsheet.geometry import (
        convergence_report,
        hierarchical_unit_clusters,
        sparse_path,
        spectral_unit_clusters,
        subspace_overlap,
        unit_mutual_information,
    )
    from broadsheet.nn.small_classifiers import small_cnn

    images = torch.rand(120, 1, 8, 8, generator=generator(0), dtype=torch.float64)
    here, there = (
        convergence_report(
            [small_cnn((6, 8), 12, seed=i).double().to(device) for i in range(3)], ["conv2", "fc"],
            list(images.to(device).split(40)), null=("shuffled",), exemplars=3,
        )
        for device in ("cpu", CUDA)
    )  # fmt: skip
    for a, b in zip(here, there, strict=True):
        for mode in ("bipartite", "semi"):
            close(b.match(0, 2, mode).score.nan_to_num(), a.match(0, 2, mode).score.nan_to_num())
        close(b.chosen.stacked().correlation, a.chosen.stacked().correlation)
        close(b.match(null="shuffled").score.nan_to_num(), a.match(null="shuffled").score.nan_to_num())
        assert [top.ids.tolist() for top in b.top] == [top.ids.tolist() for top in a.top]
    a, b = here["conv2"].chosen, there["conv2"].chosen
    for one, other in zip(sparse_path(a, points=4).maps, sparse_path(b, points=4).maps, strict=True):
        close(other.weight, one.weight, atol=1e-7)
    assert subspace_overlap(b).mean == pytest.approx(subspace_overlap(a).mean, abs=1e-8)
    assert spectral_unit_clusters(b, 4).labels.device.type == CUDA
    assert len(hierarchical_unit_clusters(b, 4).order) == len(hierarchical_unit_clusters(a, 4).order)
    x, y = images.flatten(1)[:, :9], images.flatten(1)[:, 9:15]
    close(unit_mutual_information(x.to(CUDA), y.to(CUDA)), unit_mutual_information(x, y))
