"""The bottleneck against vector-quantize-pytorch and the published layer: one step, forward and backward."""

import pytest
import torch
from official_codebooks import official_models

from broadsheet.nn.quantization import Quantizer, nearest_codes
from broadsheet.nn.seeding import generator

SIZES = [(1024, 64, 1000), (2048, 64, 10_000)]  # tokens, width, codes
HEADS = 8


def inputs(*shape):
    return torch.randn(*shape, generator=generator(0))


def step(module):
    def run(x):
        x = x.detach().requires_grad_()
        out = module(x)
        out.sum().backward()
        return out

    return run


@pytest.fixture
def published(monkeypatch):
    """The official layers."""
    models = official_models(monkeypatch)
    models.BaseSnapFunction.loss = "aeloss"
    return models


@pytest.mark.parametrize(("tokens", "width", "codes"), SIZES, ids=["1000-codes", "10000-codes"])
class TestOneCodebook:
    @pytest.fixture(autouse=True)
    def _group(self, benchmark, tokens, width, codes):
        benchmark.group = f"codebook-features: {tokens} tokens, {codes} codes, forward and backward"

    def test_ours(self, benchmark, tokens, width, codes):
        q = Quantizer(width, codes)
        benchmark.pedantic(step(lambda x: q(x).values), (inputs(tokens, width),), rounds=5, warmup_rounds=1)

    def test_vector_quantize_pytorch(self, benchmark, tokens, width, codes):
        library = pytest.importorskip("vector_quantize_pytorch")
        q = library.VectorQuantize(
            dim=width, codebook_size=codes, use_cosine_sim=True, rotation_trick=False, kmeans_init=False
        )
        benchmark.pedantic(step(lambda x: q(x[None])[0]), (inputs(tokens, width),), rounds=5, warmup_rounds=1)

    def test_published(self, benchmark, published, tokens, width, codes):
        layer = published.CodebookLayer(
            dim=width, num_codes=codes, snap_fn=published.InnerProductSnapFunction, kcodes=1, key="x"
        )
        benchmark.pedantic(step(lambda x: layer(x[None])), (inputs(tokens, width),), rounds=5, warmup_rounds=1)


class TestHeads:
    @pytest.fixture(autouse=True)
    def _group(self, benchmark):
        benchmark.group = f"codebook-features: {HEADS} heads, 1024 tokens, 1000 codes each, k = 8, forward and backward"

    def test_ours(self, benchmark):
        q = Quantizer(32, 1000, 8, groups=HEADS)
        benchmark.pedantic(step(lambda x: q(x).values), (inputs(1024, HEADS, 32),), rounds=5, warmup_rounds=1)

    def test_published(self, benchmark, published):
        layer = published.GroupCodebookLayer(
            dim=HEADS * 32,
            num_codes=1000,
            num_codebooks=HEADS,
            snap_fn=published.InnerProductSnapFunction,
            kcodes=8,
            key="x",
        )
        benchmark.pedantic(
            step(lambda x: layer(x.flatten(1)[None])), (inputs(1024, HEADS, 32),), rounds=5, warmup_rounds=1
        )


class TestMemory:
    """Only finding the codes: the whole table, as the peers make it, would be 150 MiB."""

    @pytest.fixture(autouse=True)
    def _group(self, benchmark):
        benchmark.group = "codebook-features: finding the 8 best of 10000 codes for 4096 tokens"

    def test_ours(self, benchmark):
        x, book = inputs(1, 4096, 64), inputs(1, 10_000, 64)
        benchmark.pedantic(nearest_codes, (x, book, 8), rounds=3, warmup_rounds=1)

    def test_whole_table(self, benchmark):
        x, book = inputs(4096, 64), inputs(10_000, 64)

        def whole():
            return (x @ (book / book.norm(dim=1, keepdim=True)).T).topk(8).indices

        benchmark.pedantic(whole, rounds=3, warmup_rounds=1)
