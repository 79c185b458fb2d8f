"""Quantiser: forward and gradients against a slow reference, blocks, ties, usage, k-means, replacement, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from broadsheet.errors import InvalidInput
from broadsheet.nn.quantization import CodeUsage, Quantizer, nearest_codes, similar_rows, straight_through
from broadsheet.nn.seeding import generator


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def reference(a, codebook, gain, shift, k, similarity, reduce, loss, beta):
    """One vector at a time, one codebook: values in the detach formulation, ids, loss; autograd does the rest."""
    values, ids, losses = [], [], []
    for vector in a:
        centred = vector - vector.mean()
        x = centred / torch.sqrt(centred.square().mean() + 1e-5) * gain + shift
        scores = []
        for c in codebook.detach():
            if similarity == "cosine":
                scores.append(float(x.detach() @ c / c.norm()))
            else:
                scores.append(-float((x.detach() - c).norm()))
        chosen = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]
        y = sum(codebook[j] for j in chosen)
        y = y / k if reduce == "mean" else y
        live = y.detach() if loss == "vqvae" else y
        values.append(live + x - x.detach())
        ids.append(chosen)
        step = (y - x.detach()).square().sum() if loss != "none" else 0 * y.sum()
        if loss in ("full", "vqvae"):
            step = step + beta * (y.detach() - x).square().sum()
        losses.append(step)
    return torch.stack(values), torch.tensor(ids), torch.stack(losses).mean()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize(("reduce", "k"), [("mean", 1), ("mean", 3), ("sum", 3)])
@pytest.mark.parametrize("loss", ["none", "reconstruction", "full", "vqvae"])
def test_forward_and_gradients_are_those_of_the_slow_reference(similarity, reduce, k, loss):
    groups, dim, n = 2, 5, 7
    q = Quantizer(dim, n, k, groups=groups, similarity=similarity, reduce=reduce, loss=loss, beta=0.3, seed=1).double()
    with torch.no_grad():
        q.gain += 0.2 * normal(groups, dim, seed=2)
        q.shift += 0.2 * normal(groups, dim, seed=3)
    a = normal(3, 2, groups, dim).requires_grad_()
    out = q(a)
    towards = normal(3, 2, groups, dim, seed=4)
    (out.values.tanh() * towards).sum().add(1.7 * out.loss).backward()
    got = [a.grad, q.codebook.grad, q.gain.grad, q.shift.grad]

    a2 = a.detach().clone().requires_grad_()
    c2, g2, s2 = (p.detach().clone().requires_grad_() for p in (q.codebook, q.gain, q.shift))
    values, ids, losses = zip(
        *(
            reference(a2[:, :, g].flatten(0, 1), c2[g], g2[g], s2[g], k, similarity, reduce, loss, 0.3)
            for g in range(groups)
        ),
        strict=True,
    )
    values = torch.stack(values, 1).view(3, 2, groups, dim)
    torch.testing.assert_close(out.values, values, atol=1e-10, rtol=1e-8)
    assert torch.equal(out.codes, torch.stack(ids, 1).view(3, 2, groups, k))
    torch.testing.assert_close(out.loss, sum(losses))
    (values.tanh() * towards).sum().add(1.7 * sum(losses)).backward()
    for mine, theirs in zip(got, [a2.grad, c2.grad, g2.grad, s2.grad], strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if mine is None else mine, theirs, atol=1e-9, rtol=1e-7)


def test_one_codebook_is_a_group_of_one():
    one, many = Quantizer(4, 9, 2, seed=3), Quantizer(4, 9, 2, groups=1, seed=3)
    a = normal(2, 3, 4, dtype=torch.float32)
    x, y = one(a), many(a[:, :, None])
    torch.testing.assert_close(x.values, y.values[:, :, 0])
    assert torch.equal(x.codes, y.codes[:, :, 0])
    assert float(x.loss.detach()) == pytest.approx(float(y.loss.detach()))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from(["cosine", "euclidean"]),
    st.integers(0, 99),
)
def test_invariants(tokens, dim, n, similarity, seed):
    k = 1 + seed % n
    q = Quantizer(dim, n, k, similarity=similarity, normalise=dim > 1, seed=seed).double()
    out = q(normal(tokens, dim, seed=seed))
    rows = q.codebook[0][out.codes]
    torch.testing.assert_close(out.values, rows.mean(-2))
    assert all(len(set(ids)) == k for ids in out.codes.tolist())
    assert 0 <= int(out.codes.min()) <= int(out.codes.max()) < n


def test_codes_do_not_depend_on_scales():
    x, book = normal(1, 40, 6), normal(1, 20, 6, seed=1)
    ids = nearest_codes(x, book, 3)
    assert torch.equal(ids, nearest_codes(7 * x, book, 3))
    lengths = torch.rand(20, 1, generator=generator(2), dtype=torch.float64) + 0.1
    assert torch.equal(ids, nearest_codes(x, book * lengths, 3))
    assert not torch.equal(
        nearest_codes(x, book, 3, "euclidean"), nearest_codes(x, book * lengths, 3, "euclidean")
    )  # there lengths matter


def test_a_normalised_code_is_its_own():
    q = Quantizer(8, 30, seed=5)
    with torch.no_grad():
        q.codebook.copy_(torch.nn.functional.layer_norm(q.codebook, (8,)))
    assert torch.equal(q(q.codebook[0].detach() * 3 + 1).codes[:, 0], torch.arange(30))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_blocks_give_what_the_whole_table_gives(similarity, k, block):
    x, book = normal(3, 11, 4), normal(3, 23, 4, seed=1)
    blocked = torch.rand(3, 23, generator=generator(3)) < 0.3
    book[:, 5] = book[:, 3]  # ties, which go to the lower id
    if similarity == "cosine":
        table = x @ (book / book.norm(dim=-1, keepdim=True)).mT
    else:
        table = -torch.cdist(x, book)
    table = table.masked_fill(blocked[:, None], -torch.inf)
    expected = table.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(nearest_codes(x, book, k, similarity, blocked, block), expected)


@pytest.mark.parametrize("k", [1, 3])
def test_of_equal_codes_the_lowest_ids_come_in(k):
    book = torch.ones(1, 50, 3)
    x = normal(1, 8, 3, dtype=torch.float32).abs()
    for block in (10, 2**20):
        ids = nearest_codes(x, book, k, block=block)
        assert torch.equal(ids, torch.arange(k).expand(1, 8, k))


def test_the_whole_table_never_exists():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple | list) else [out]:
                if isinstance(made, torch.Tensor):
                    largest = max(largest, made.numel())
            return out

    x, book = normal(2, 300, 4), normal(2, 500, 4, seed=1)
    with Watch():
        nearest_codes(x, book, 4, block=2000)
    assert largest <= max(2000, 2 * 500 * 4)  # the table would have 300,000 entries


def test_half_precision_is_compared_in_float32():
    x, book = normal(1, 200, 16, dtype=torch.float32), normal(1, 3000, 16, seed=1, dtype=torch.float32)
    x, book = x.bfloat16(), book.bfloat16()
    exact = nearest_codes(x.double(), book.double())
    assert torch.equal(nearest_codes(x, book), exact)
    half = (x @ (book / book.norm(dim=-1, keepdim=True)).mT).argmax(-1)
    assert not torch.equal(half, exact[..., 0])  # what would come of it otherwise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(x, book), exact)
    out = Quantizer(16, 40, 2).bfloat16()(x[0])
    assert out.values.dtype == torch.bfloat16


def test_a_code_without_length_is_harmless():
    book = normal(1, 5, 4)
    book[0, 2] = 0
    ids = nearest_codes(normal(1, 30, 4, seed=1), book)
    assert ids.shape == (1, 30, 1)
    assert len(ids.unique()) > 2


def test_unused_codes_get_no_gradient_at_all():
    q = Quantizer(6, 50, 2)
    out = q(normal(4, 6, dtype=torch.float32))
    (out.values.square().sum() + out.loss).backward()
    unused = torch.ones(50, dtype=torch.bool)
    unused[out.codes.flatten()] = False
    assert bool((q.codebook.grad[0, unused] == 0).all())
    assert bool((q.codebook.grad[0, ~unused] != 0).any(-1).all())


def test_masked_vectors_do_not_count_for_the_loss():
    q = Quantizer(6, 9)
    a = normal(2, 5, 6, dtype=torch.float32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    masked, left_out = q(a, mask=mask).loss.detach(), q(a[mask.bool()]).loss.detach()
    assert float(masked) == pytest.approx(float(left_out), rel=1e-5)
    assert float(q(a).loss.detach()) != pytest.approx(float(masked), rel=1e-3)


def test_straight_through():
    y, x = normal(3, seed=1).requires_grad_(), normal(3).requires_grad_()
    out = straight_through(y, x)
    assert torch.equal(out, y)
    (out**2).sum().backward()
    assert torch.equal(x.grad, 2 * y.detach())
    assert torch.equal(y.grad, 2 * y.detach())


def test_blocked_codes_are_passed_over():
    q = Quantizer(6, 9, 2)
    a = normal(30, 6, dtype=torch.float32)
    blocked = torch.zeros(9, dtype=torch.bool)
    blocked[[1, 4]] = True
    ids = q(a, blocked).codes
    fewer = Quantizer(6, 7, 2)
    with torch.no_grad():
        fewer.codebook.copy_(q.codebook[:, ~blocked])
    left = (~blocked).nonzero().flatten()
    assert torch.equal(ids, left[fewer(a).codes])
    with pytest.raises(InvalidInput, match="1 codes that are not blocked"):
        q(a, torch.arange(9) > 0)


def test_usage():
    counts = torch.tensor([[4, 4, 0, 0], [8, 0, 0, 0]])
    use = CodeUsage(counts)
    assert use.active.tolist() == [2, 1]
    assert use.dead_fraction.tolist() == [0.5, 0.75]
    np.testing.assert_allclose(use.entropy, [np.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(use.perplexity, [2, 1], atol=1e-6)
    q = Quantizer(4, 6, groups=2)
    ids = torch.tensor([[[0], [5]], [[0], [-1]]])
    assert q.count(ids).tolist() == [[2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert q.count(ids, torch.tensor([1, 0])).tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    q.observe(ids)
    q.observe(ids[:1])
    assert q.idle[0].tolist() == [0, 2, 2, 2, 2, 2]
    assert q.idle[1].tolist() == [2, 2, 2, 2, 2, 0]


def test_dead_codes_become_inputs():
    q = Quantizer(6, 10)
    before = q.codebook.detach().clone()
    a = normal(40, 6, dtype=torch.float32)
    optimizer = torch.optim.Adam(q.parameters(), 1e-3)
    q(a).loss.backward()
    optimizer.step()
    kept = q.codebook.detach().clone()
    dead = torch.zeros(1, 10, dtype=torch.bool)
    dead[0, [2, 7]] = True
    assert q.replace(dead, a, noise=0.0, generator=generator(0), optimizer=optimizer) == 2
    x = q.normalised(a).detach()
    distance = (q.codebook[0, [2, 7]].detach()[:, None] - x).norm(dim=-1).amin(1)
    assert float(distance.max()) < 1e-5
    assert torch.equal(q.codebook[0, [0, 1, 3]], kept[0, [0, 1, 3]])
    assert float(optimizer.state[q.codebook]["exp_avg"][0, 2].abs().max()) == 0
    assert not torch.equal(before, q.codebook)
    noisy = Quantizer(6, 10)
    noisy.replace(dead, a, noise=0.5, generator=generator(0))
    off = (noisy.codebook[0, 2] - q.codebook[0, 2]).norm() / q.codebook[0, 2].norm()
    assert 0.1 < float(off) < 1.5


def test_kmeans_finds_planted_centres():
    centres = torch.nn.functional.layer_norm(normal(12, 8, dtype=torch.float32), (8,))
    which = torch.randint(12, (900,), generator=generator(1))
    a = centres[which] + 0.02 * normal(900, 8, seed=2, dtype=torch.float32)
    q = Quantizer(8, 12)
    q.init_kmeans(a, seed=0)
    assert float(q(a).loss) < float(Quantizer(8, 12)(a).loss) / 10
    again = Quantizer(8, 12)
    again.init_kmeans(a, seed=0)
    assert torch.equal(q.codebook, again.codebook)
    few = Quantizer(8, 50)
    few.init_kmeans(a[:20])
    assert float(few(a[:20]).loss) < 1e-3  # every input is a code
    with pytest.raises(InvalidInput, match="NaN"):
        q.init_kmeans(a * torch.nan)


def test_saved_and_loaded(tmp_path):
    q = Quantizer(6, 9, 2, groups=3, similarity="euclidean", reduce="sum", loss="full", beta=0.5, seed=4)
    q.observe(torch.zeros(1, 3, 2, dtype=torch.long))
    q.save_pretrained(tmp_path)
    back = Quantizer.from_pretrained(tmp_path)
    a = normal(5, 3, 6, dtype=torch.float32)
    assert torch.equal(q(a).codes, back(a).codes)
    assert torch.equal(q(a).values, back(a).values)
    assert back.config == q.config
    assert torch.equal(back.idle, q.idle)


def test_near_codes():
    book = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [-1, 0]])
    ids, cosine = similar_rows(book, 0, 2)
    assert ids.tolist() == [1, 2]
    assert float(cosine[0]) == pytest.approx(2 / np.hypot(2, 0.1))
    with pytest.raises(InvalidInput, match="code 4: the codebook has 4"):
        similar_rows(book, 4)
    with pytest.raises(InvalidInput, match="n=4"):
        similar_rows(book, 0, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 10}, "k=10: a codebook has 9 codes"),
        ({"k": 0}, "k=0"),
        ({"dim": 0}, "dim=0"),
        ({"groups": -1}, "groups=-1"),
        ({"similarity": "dot"}, "similarity='dot': expected one of cosine, euclidean"),
        ({"reduce": "max"}, "reduce='max'"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"beta": -1.0}, r"beta=-1\.0"),
    ],
)
def test_bad_settings_say_what_is_expected(wrong, message):
    with pytest.raises(InvalidInput, match=message):
        Quantizer(**{"dim": 4, "num_codes": 9, **wrong})


def test_bad_inputs_say_what_is_expected():
    q = Quantizer(4, 9, groups=2)
    with pytest.raises(InvalidInput, match=r"shape \(3, 4\), this quantizer takes \[\.\.\., 2, 4\]"):
        q(torch.ones(3, 4))
    with pytest.raises(InvalidInput, match="code 9: the codebook has 9"):
        q.decode(torch.full((1, 2, 1), 9))
    with pytest.raises(InvalidInput, match="k=3"):
        nearest_codes(torch.ones(1, 2, 4), torch.ones(1, 2, 4), 3)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_parity_with_vector_quantize_pytorch(beta):
    """Euclidean, one code, learned codebook: the same ids, output, and gradient of the input."""
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.VectorQuantize(
        dim=6, codebook_size=17, decay=1.0, commitment_weight=beta, rotation_trick=False, kmeans_init=False
    ).eval()
    ours = Quantizer(6, 17, similarity="euclidean", normalise=False, loss="vqvae", beta=beta)
    with torch.no_grad():
        ours.codebook.copy_(theirs._codebook.embed)
    theirs.train()
    theirs._codebook.eval()
    a = normal(2, 9, 6, dtype=torch.float32).requires_grad_()
    b = a.detach().clone().requires_grad_()
    mine = ours(a)
    value, ids, loss = theirs(b)
    assert torch.equal(mine.codes[..., 0], ids)
    torch.testing.assert_close(mine.values, value)
    mine.values.sin().sum().backward()
    value.sin().sum().backward(retain_graph=True)
    torch.testing.assert_close(a.grad, b.grad)
    # Its loss is the commitment alone, averaged over features too.
    commitment = beta * (ours.decode(mine.codes) - a).square().sum(-1).mean()
    torch.testing.assert_close(loss.squeeze() * 6, commitment.detach())
