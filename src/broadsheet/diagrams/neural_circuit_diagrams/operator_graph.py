"""What an ordinary graph of operators holds, and the best attempt to run it: the rival of a circuit diagram.
Drawers of graphs (torchview, torchlens, netron) show operators with edges, shapes of tensors, and whose weights are
used. What else an operator was told, which axis, which stride, which number, is not in the picture. ``rebuild`` fills
it in by the usual choice, or by the first choice that gives the shapes in the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Operator:
    """A node: its operator's name, the nodes and weights that it takes, and the shape that comes out."""

    name: str
    ins: tuple[int | Tensor, ...]
    shape: tuple[int, ...]


def recorded(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[Operator], int]:
    """The operator graph of a module, with the number of the node that comes out."""
    program = torch.export.export(module, tuple(inputs), strict=False)
    signature = program.graph_signature
    fixed = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes: list[Operator] = []
    place: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in fixed:
            name = fixed[node.name]
            place[node] = program.state_dict[name] if name in program.state_dict else program.constants[name]
        elif node.op == "placeholder":
            place[node] = len(nodes)
            nodes.append(Operator("input", (), tuple(node.meta["val"].shape)))
        elif node.op == "output":
            return nodes, place[node.args[0][0]]
        elif node.op == "call_function":
            val = node.meta.get("val")
            if not isinstance(val, Tensor):
                place[node] = None
                if "split" in str(node.target) or "chunk" in str(node.target):
                    place[node] = place[node.args[0]]
                continue
            ins = tuple(place[n] for n in node.all_input_nodes if place.get(n) is not None)
            place[node] = len(nodes)
            nodes.append(
                Operator(
                    str(node.target).split(".")[1] if "." in str(node.target) else "getitem", ins, tuple(val.shape)
                )
            )
    raise AssertionError("a program without an output")


def rebuild(graph: tuple[list[Operator], int], inputs: Sequence[Tensor]) -> Tensor | None:
    """Run an operator graph, guessing what it does not say; None where no guess fits the shapes."""
    nodes, last = graph
    given, values = iter(inputs), []
    for node in nodes:
        if node.name == "input":
            values.append(next(given))
            continue
        args = [values[a] if isinstance(a, int) else a for a in node.ins]
        made = _guessed(node, args)
        if made is None:
            return None
        values.append(made)
    return values[last]


def _guessed(node: Operator, args: list[Any]) -> Tensor | None:
    for attempt in _choices(node.name, args, node.shape):
        try:
            made = attempt()
        except (RuntimeError, TypeError, IndexError, ValueError):
            continue
        if tuple(made.shape) == node.shape:
            return made
    return None


def _choices(name: str, args: list[Any], shape: tuple[int, ...]) -> list[Callable[[], Any]]:
    """What an operator may have been told, the likeliest first."""
    x: Any = args[0] if args else None
    rank = x.ndim if isinstance(x, Tensor) else 0
    if name in ("view", "reshape", "flatten", "_unsafe_view", "squeeze", "unsqueeze", "unflatten"):
        return [lambda: x.reshape(shape)]
    if name in ("transpose", "t"):
        pairs = [(-2, -1), *itertools.combinations(range(rank), 2)]
        return [lambda p=p: x.transpose(*p) for p in pairs]
    if name == "permute":
        return [lambda p=p: x.permute(p) for p in itertools.permutations(range(rank))]
    if name == "expand":
        return [lambda: x.expand(shape)]
    if name in ("softmax", "log_softmax"):
        return [lambda: getattr(F, name)(x, dim=-1)]
    if name in ("add", "mul", "sub", "div"):
        f = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}[name]
        return [lambda: f(x, args[1])] if len(args) > 1 else [lambda: x]  # a number is not in the picture
    if name == "linear":
        return [lambda: F.linear(*args)]
    if name == "addmm":
        return [lambda: torch.addmm(*args)]
    if name in ("matmul", "mm", "bmm"):
        return [lambda: torch.matmul(*args)]
    if name in ("conv1d", "conv2d", "conv_transpose2d"):
        f = getattr(F, name)
        bias = args[2] if len(args) > 2 else None
        # Zero padding without dilation first, as layers have it by default; then what fits the shape.
        return [
            lambda s=s, p=p, d=d: f(x, args[1], bias, stride=s, padding=p, dilation=d)
            for d, s, p in itertools.product((1, 2), (1, 2), (0, 1, 2))
        ]
    if name == "max_pool2d":
        return [lambda k=k: F.max_pool2d(x, k) for k in (2, 3)]
    if name == "layer_norm":
        return [lambda: F.layer_norm(x, args[1].shape, *args[1:])]
    if name == "batch_norm":
        return [lambda: F.batch_norm(x, args[3], args[4], args[1], args[2])]
    if name == "cat":
        return [lambda d=d: torch.cat(args, d) for d in (1, -1, *range(rank))]
    if name == "embedding":
        return [lambda: F.embedding(args[1], args[0])]
    if name == "scaled_dot_product_attention":
        return [lambda: F.scaled_dot_product_attention(*args[:3])]
    if name in ("dropout", "contiguous", "clone", "to", "alias", "detach", "slice") and isinstance(x, Tensor):
        return [lambda: x, lambda: x[tuple(slice(0, n) for n in shape)]]
    plain = getattr(torch, name, None) or getattr(F, name, None)
    return [lambda: plain(*args)] if plain is not None else []
