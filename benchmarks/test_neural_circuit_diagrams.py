"""From a module to a drawing: tracing and layout against drawers of operator graphs, by depth."""

from typing import Any

import pytest
import torch
from torch import nn

from broadsheet.diagrams.neural_circuit_diagrams import diagram, read_svg
from broadsheet.diagrams.neural_circuit_diagrams.trace import traced
from broadsheet.diagrams.neural_circuit_diagrams.zoo import EncoderLayer
from broadsheet.nn.seeding import seeded

DEPTHS = pytest.mark.parametrize("depth", [1, 4, 16])
GROUP = pytest.mark.benchmark(group="neural-circuit-diagrams: module to drawing")


def setting(depth: int) -> tuple[nn.Module, torch.Tensor]:
    with seeded(0):
        return nn.Sequential(*(EncoderLayer() for _ in range(depth))).eval(), torch.randn(2, 5, 16)


@GROUP
@DEPTHS
def test_ours(benchmark: Any, depth: int) -> None:
    model, x = setting(depth)
    benchmark.pedantic(lambda: traced(model, x).svg(), rounds=2, warmup_rounds=1)


@GROUP
@DEPTHS
def test_ours_with_boxes(benchmark: Any, depth: int) -> None:
    model, x = setting(depth)
    benchmark.pedantic(lambda: diagram(model, x, depth=1).svg(), rounds=2, warmup_rounds=1)


@GROUP
@DEPTHS
def test_torchview(benchmark: Any, depth: int) -> None:
    torchview = pytest.importorskip("torchview", reason="the peer torchview is not installed")
    model, x = setting(depth)
    benchmark.pedantic(
        lambda: torchview.draw_graph(model, input_data=x, depth=10).visual_graph.source, rounds=2, warmup_rounds=1
    )


@GROUP
@DEPTHS
def test_torchlens(benchmark: Any, depth: int) -> None:
    torchlens = pytest.importorskip("torchlens", reason="the peer torchlens is not installed")
    model, x = setting(depth)
    benchmark.pedantic(lambda: torchlens.trace(model, x), rounds=2, warmup_rounds=1)


@pytest.mark.benchmark(group="neural-circuit-diagrams: drawing to program")
@DEPTHS
def test_ours_reading_back(benchmark: Any, depth: int) -> None:
    model, x = setting(depth)
    made = traced(model, x)
    svg = made.svg()
    benchmark.pedantic(lambda: read_svg(svg, made.weights), rounds=2, warmup_rounds=1)
