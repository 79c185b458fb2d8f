"""MILAN's costs: exemplars of a layer, and the sentences of its units, against the plain ways of doing it."""

from typing import Any

import pytest
import torch
from torch import nn

from broadsheet.interpretability.milan import Describer, Vocabulary, top_exemplars
from broadsheet.nn.seeding import seeded

EXEMPLARS = pytest.mark.benchmark(group="milan: exemplars of a layer")
SENTENCES = pytest.mark.benchmark(group="milan: sentences of 64 units")
SIZES = [(200, 32), (400, 64), (800, 128)]  # pictures, units
BEAMS = [1, 10, 50]


def setting(n: int, units: int) -> tuple[nn.Module, list[torch.Tensor]]:
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, units, 3, 2, 1), nn.ReLU()).eval()
        pictures = [torch.randint(256, (3, 32, 32), dtype=torch.uint8) for _ in range(n)]
    return net, pictures


@EXEMPLARS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ours(benchmark: Any, size: tuple[int, int]) -> None:
    net, pictures = setting(*size)
    benchmark.pedantic(lambda: top_exemplars(net, pictures, "3", k=15).masks, rounds=3, warmup_rounds=1)


@EXEMPLARS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_passes_over_everything(benchmark: Any, size: tuple[int, int]) -> None:
    """As it is usually written: all maps kept for the quantile, a second pass over all pictures for the masks."""
    net, pictures = setting(*size)

    def work() -> torch.Tensor:
        with torch.no_grad():
            x = torch.stack(pictures).float() / 255
            maps = torch.cat([net(part) for part in x.split(64)])
            level = maps.transpose(0, 1).flatten(1).sort(1).values[:, int(0.99 * maps[:, 0].numel())]
            best = maps.flatten(2).amax(2).topk(15, dim=0).indices
            again = torch.cat([net(part) for part in x.split(64)])
            chosen = again[best, torch.arange(again.shape[1])].transpose(0, 1)
            wide = nn.functional.interpolate(chosen.flatten(0, 1)[:, None], size=32, mode="bilinear")
            return wide.view(*chosen.shape[:2], 1, 32, 32) > level.view(-1, 1, 1, 1, 1)

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


def trained() -> tuple[Describer, torch.Tensor]:
    words = Vocabulary.of([f"word{i}" for i in range(300)])
    describer = Describer(list(words.words), 160, hidden=128, lm={"hidden": 128})
    return describer, torch.randn(64, 15, 160, generator=torch.Generator().manual_seed(0))


@SENTENCES
@pytest.mark.parametrize("beam", BEAMS)
def test_all_units_in_one_call(benchmark: Any, beam: int) -> None:
    describer, vectors = trained()
    benchmark.pedantic(lambda: describer.describe(vectors, beam_size=beam), rounds=2, warmup_rounds=1)


@SENTENCES
@pytest.mark.parametrize("beam", BEAMS)
def test_unit_by_unit(benchmark: Any, beam: int) -> None:
    describer, vectors = trained()
    benchmark.pedantic(lambda: describer.describe(vectors, beam_size=beam, units_at_once=1), rounds=1, warmup_rounds=1)
