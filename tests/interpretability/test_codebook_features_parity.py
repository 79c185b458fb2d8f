"""Parity with the official package where it is installed: bottlenecks with gradients, divergence, precision and recall."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from official_codebooks import official_models

from broadsheet.interpretability.codebook_features.search import find_codes
from broadsheet.nn.divergence import js_divergence
from broadsheet.nn.quantization import Quantizer
from broadsheet.nn.seeding import generator

official = pytest.importorskip("codebook_features")


@pytest.fixture
def models(monkeypatch):
    return official_models(monkeypatch)


def function(file, name):
    """One function out of a file whose imports are not needed."""
    source = (Path(inspect.getfile(official)).parent / file).read_text()
    names = {"torch": torch, "F": torch.nn.functional, "np": np}
    exec(f"def {name}" + source.split(f"def {name}")[1].split("\n\n\ndef ")[0], names)
    return names[name]


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("base", "none"), ("aeloss", "reconstruction"), ("fullaeloss-0.3", "full"), ("vqvae-0.3", "vqvae")],
)
def test_values_and_gradients(models, similarity, k, theirs, ours):
    snap = models.InnerProductSnapFunction if similarity == "cosine" else models.EuclideanSnapFunction
    models.BaseSnapFunction.loss = theirs
    hooks = {
        "disable_topk": 0, "disable_codes": [], "disable_for_tkns": "all", "keep_k_codes": True,
        "disable_sim_idx": [], "cosine": False,
    }  # fmt: skip
    random = generator(0)
    x, book, towards = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((2, 7, 6), (19, 6), (2, 7, 6)))
    a, c = x.clone().requires_grad_(), book.clone().requires_grad_()
    y, ids = snap.apply(a, c, k, hooks)
    (y * towards).sum().backward()
    q = Quantizer(6, 19, k, similarity=similarity, normalise=False, loss=ours, beta=0.3).double()
    with torch.no_grad():
        q.codebook.copy_(book[None])
    b = x.clone().requires_grad_()
    out = q(b)
    assert torch.equal(out.codes, ids)
    torch.testing.assert_close(out.values, y)
    loss = (out.values * towards).sum() + out.loss
    if ours in ("full", "vqvae"):  # theirs pulls every input in full, ours is a mean over the 14
        loss = loss + 13 * 0.3 * (out.values.detach() - b).square().sum(-1).mean()
    loss.backward()
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(q.codebook.grad[0], c.grad)


def test_a_codebook_for_each_head(models):
    models.BaseSnapFunction.loss = "aeloss"
    theirs = models.GroupCodebookLayer(
        dim=12, num_codes=15, num_codebooks=3, snap_fn=models.InnerProductSnapFunction, kcodes=2, key="x"
    )
    ours = Quantizer(4, 15, 2, groups=3)
    with torch.no_grad():
        for group, layer in enumerate(theirs.codebook):
            ours.codebook[group] = layer.codebook.weight
    x = torch.randn(2, 5, 12, generator=generator(1))
    torch.testing.assert_close(theirs(x), ours(x.unflatten(-1, (3, 4))).values.flatten(-2))


def test_divergence():
    p, q = torch.randn(5, 9, generator=generator(0)), torch.randn(5, 9, generator=generator(1))
    torch.testing.assert_close(function("utils.py", "JSD")(p, q), js_divergence(p, q).mean())


def test_precision_and_recall():
    random = generator(0)
    ids = torch.randint(12, (30, 8, 2), generator=random)
    ids[..., 1] = (ids[..., 0] + 1 + ids[..., 1] % 11) % 12  # two different codes for every token
    mask = torch.rand(30, 8, generator=random) < 0.2
    theirs = function("code_search_utils.py", "get_code_precision_and_recall")
    counts = np.bincount(ids.flatten(), minlength=12)
    codes, precision, recall, uses = theirs(mask.nonzero().tolist(), ids.numpy(), counts)
    ours = find_codes({"x": ids.flatten(0, 1)}, {"x": 12}, mask.flatten(), 0.0, 0.01).table.set_index("code")
    ours = ours.loc[codes]
    np.testing.assert_allclose(ours["precision"], precision, rtol=1e-6)
    np.testing.assert_allclose(ours["recall"], recall, rtol=1e-6)
    np.testing.assert_array_equal(ours["count"], uses)
    assert len(ours) == len(codes) > 5
