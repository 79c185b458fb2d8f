"""A diagram as a module of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram


class DiagramModule(nn.Module):
    """Runs a diagram with its floating weights as parameters; names keep their dots as double underscores."""

    def __init__(self, diagram: Diagram) -> None:
        super().__init__()
        self.diagram = diagram
        self.held = {name: name.replace(".", "__") for name in diagram.weights}
        for name, weight in diagram.weights.items():
            if weight.is_floating_point() and "running_" not in name:
                self.register_parameter(self.held[name], nn.Parameter(weight.detach().clone()))
            else:
                self.register_buffer(self.held[name], weight.detach().clone())

    def forward(self, *tensors: Tensor) -> Any:
        return self.diagram.run(*tensors, weights={name: getattr(self, key) for name, key in self.held.items()})
