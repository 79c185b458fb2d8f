"""One network's units turned into another's by a linear map: the layer that stitches two networks together.

layer = sparse_map(stats, l1=0.01).layer()
with capture(first, "conv2") as seen:
    first(x)
with replace(second, {"conv2": layer(seen["conv2"])}):
    second(x)                             # the second network's head on the first one's features
"""

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.convergent_learning.matching import UnitMatching
from broadsheet.geometry.convergent_learning.statistics import Pair, pair_of


class MappingLayer(nn.Module, PyTorchModelHubMixin, library_name="broadsheet"):
    """A linear map between units at every position: a 1x1 convolution on maps, a dense layer elsewhere.

    Args:
        units_in, units_out: of the first and the second network.

    Attributes:
        weight: ``[units_out, units_in]``.
        bias: ``[units_out]``.
    """

    def __init__(self, units_in: int, units_out: int) -> None:
        super().__init__()
        if units_in < 1 or units_out < 1:
            raise InvalidInput(f"units_in={units_in}, units_out={units_out}: at least one each is needed")
        self.weight = nn.Parameter(torch.zeros(units_out, units_in))
        self.bias = nn.Parameter(torch.zeros(units_out))

    @classmethod
    def of(cls, weight: Float[Tensor, "q p"], bias: Float[Tensor, " q"]) -> "MappingLayer":
        """A layer with these values, in their dtype and on their device."""
        layer = cls(weight.shape[1], weight.shape[0]).to(weight)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the first network as those of the second.

        Args:
            x: features ``[n, units_in]``, tokens ``[n, time, units_in]`` or maps ``[n, units_in, height, width]``.
        """
        at = 1 if x.ndim > 3 else -1
        if x.ndim < 2 or x.shape[at] != self.weight.shape[1]:
            raise InvalidInput(f"activations of shape {tuple(x.shape)}: {self.weight.shape[1]} units are expected")
        weight, bias = self.weight.to(x), self.bias.to(x)
        return (x.movedim(at, -1) @ weight.T + bias).movedim(-1, at)


def matched_layer(matching: UnitMatching, a: Pair, b: Tensor | None = None) -> MappingLayer:
    """Each unit of the second network from its one partner in the first, by the best slope and offset.

    Args:
        matching: one to one; units of the second network that nobody has as a partner get their mean.
        a, b: the samples, as in :func:`broadsheet.geometry.convergent_learning.sparse_map`.
    """
    pair = pair_of(a, b, within=False)
    assert pair.mean_y is not None
    rows = matching.matched
    columns = matching.partner[rows]
    if len(columns.unique()) < len(columns):
        raise InvalidInput("two units have the same partner: a bipartite matching is expected")
    weight = torch.zeros_like(pair.cov_xy.T)
    weight[columns, rows] = pair.cov_xy[rows, columns] / pair.var_x[rows].clamp_min(1e-300)
    return MappingLayer.of(weight, pair.mean_y - weight @ pair.mean_x)
