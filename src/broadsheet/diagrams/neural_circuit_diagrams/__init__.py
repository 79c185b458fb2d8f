"""Neural circuit diagrams: architectures drawn so exactly that shapes, cost and gradients are read off the drawing.
Source: Vincent Abbott, *Neural Circuit Diagrams: Robust Diagrams for the Communication, Implementation, and Analysis
of Deep Learning Architectures*, TMLR 2024, arXiv:2402.05424.
"""

from broadsheet.diagrams.neural_circuit_diagrams.axes import Axis, axes
from broadsheet.diagrams.neural_circuit_diagrams.costs import Cost
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, identity
from broadsheet.diagrams.neural_circuit_diagrams.gradients import BackwardPair
from broadsheet.diagrams.neural_circuit_diagrams.language import (
    add,
    cap,
    causal,
    concat,
    conv,
    copy,
    discard,
    einsum,
    elementwise,
    embedding,
    index,
    lift,
    linear,
    norm,
    op,
    permute,
    reduce,
    scale,
    softmax,
    view,
    wires,
)
from broadsheet.diagrams.neural_circuit_diagrams.laws import IllegalRewrite
from broadsheet.diagrams.neural_circuit_diagrams.read import read_svg
from broadsheet.diagrams.neural_circuit_diagrams.trace import DepthWarning, TrainModeWarning, diagram, opaque_share

__all__ = [
    "Axis",
    "BackwardPair",
    "Cost",
    "DepthWarning",
    "Diagram",
    "IllegalRewrite",
    "TrainModeWarning",
    "add",
    "axes",
    "cap",
    "causal",
    "concat",
    "conv",
    "copy",
    "diagram",
    "discard",
    "einsum",
    "elementwise",
    "embedding",
    "identity",
    "index",
    "lift",
    "linear",
    "norm",
    "op",
    "opaque_share",
    "permute",
    "read_svg",
    "reduce",
    "scale",
    "softmax",
    "view",
    "wires",
]
