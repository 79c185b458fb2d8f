"""The bottleneck against vector-quantize-pytorch and the published layer: one step, forward and backward."""

import sys
import types
from importlib import util

import pytest
import torch

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


def published():
    """The official layers, whose imports of other libraries are not needed here."""
    if util.find_spec("codebook_features") is None:
        pytest.skip("codebook-features is not installed")
    for name in ("transformer_lens", "transformer_lens.loading_from_pretrained", "transformer_lens.hook_points"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["transformer_lens.hook_points"].HookPoint = torch.nn.Identity
    sys.modules["transformer_lens"].loading_from_pretrained = sys.modules["transformer_lens.loading_from_pretrained"]
    for name in ("mod_model_classes", "tl_mods", "utils"):
        sys.modules.setdefault(f"codebook_features.{name}", types.ModuleType(name))
    try:
        import codebook_features.models as models
    except Exception as error:
        pytest.skip(f"codebook_features.models does not import here: {error}")
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

    def test_published(self, benchmark, tokens, width, codes):
        models = published()
        layer = models.CodebookLayer(dim=width, num_codes=codes, snap_fn=models.InnerProductSnapFunction, kcodes=1)
        benchmark.pedantic(step(lambda x: layer(x[None])), (inputs(tokens, width),), rounds=5, warmup_rounds=1)


class TestHeads:
    @pytest.fixture(autouse=True)
    def _group(self, benchmark):
        benchmark.group = f"codebook-features: {HEADS} heads, 1024 tokens, 1000 codes each, k = 8, forward and backward"

    def test_ours(self, benchmark):
        q = Quantizer(32, 1000, 8, groups=HEADS)
        benchmark.pedantic(step(lambda x: q(x).values), (inputs(1024, HEADS, 32),), rounds=5, warmup_rounds=1)

    def test_published(self, benchmark):
        models = published()
        layer = models.GroupCodebookLayer(
            dim=HEADS * 32, num_codes=1000, num_codebooks=HEADS, snap_fn=models.InnerProductSnapFunction, kcodes=8
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
