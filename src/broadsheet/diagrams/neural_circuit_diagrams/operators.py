"""What every operator of torch becomes: rules for the tracer, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from broadsheet.diagrams.neural_circuit_diagrams.axes import Axis
from broadsheet.diagrams.neural_circuit_diagrams.generators import Add, Concat, Index, Window
from broadsheet.diagrams.neural_circuit_diagrams.linear import Conv, Einsum, Embedding, Linear
from broadsheet.diagrams.neural_circuit_diagrams.pointwise import Elementwise, Mask, Norm, Pool, Reduce, Softmax
from broadsheet.diagrams.neural_circuit_diagrams.trace import Fixed, Held, Operand, Tracer

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable:
    """Register what an operator becomes."""

    def note(f: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, f))
        return f

    return note


def constant_rule(tracer: Tracer, node: Any, args: tuple, kwargs: dict) -> Any:
    """An operator without inputs from outside: computed while tracing."""

    def real(x: Any) -> Any:
        return x.tensor if isinstance(x, Fixed) else x

    found = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Fixed)]
    with torch.no_grad():
        made = node.target(*torch.utils._pytree.tree_map(real, args), **torch.utils._pytree.tree_map(real, kwargs))
    name = next((x.name for x in found if x.learned), found[0].name if found else node.name)
    learned = any(x.learned for x in found)

    def wrap(x: Any) -> Any:
        return Fixed(x, name, learned) if isinstance(x, torch.Tensor) else x

    return torch.utils._pytree.tree_map(wrap, made)


def _same(x: Held, value: int) -> Held:
    return Held(value, x.dims)


def _scaled(tracer: Tracer, x: Any, factor: float) -> Held:
    return tracer.held(x) if factor == 1 else _apply(tracer, x, f"× {factor!r}")


def _apply(tracer: Tracer, x: Any, name: str) -> Held:
    letters, axes = tracer.letters(x)
    return _same(x, tracer.emit(Elementwise(name), [(x.value, letters)], [letters], axes)[0])


def _owner(tracer: Tracer, weight: Fixed) -> str:
    return tracer.shortened(weight.name).removesuffix(".weight")


def _weights(tracer: Tracer, name: str, **tensors: Any) -> str:
    while any(
        f"{name}.{k}" in tracer.build.weights and tracer.build.weights[f"{name}.{k}"].data_ptr() != t.tensor.data_ptr()
        for k, t in tensors.items()
        if t is not None
    ):
        name += "_"
    for key, t in tensors.items():
        if t is not None:
            tracer.build.weights[f"{name}.{key}"] = t.tensor.detach()
    return name


# ------------------------------------------------------------------------------------------------------------ pointwise

for _operator, _name in {
    "relu": "ReLU", "silu": "SiLU", "tanh": "tanh", "sigmoid": "σ", "exp": "exp", "log": "log", "sqrt": "√",
    "rsqrt": "1/√", "reciprocal": "1/·", "abs": "|·|", "sin": "sin", "cos": "cos", "erf": "erf", "mish": "mish",
    "softplus": "softplus", "hardswish": "hardswish", "neg": "× -1.0",
}.items():  # fmt: skip

    def _pointwise(tracer: Tracer, x: Held, *rest: Any, name: str = _name) -> Any:
        return NotImplemented if rest else _apply(tracer, x, name)

    RULES[_operator] = _pointwise


@rule("gelu")
def _gelu(tracer: Tracer, x: Held, approximate: str = "none") -> Held:
    return _apply(tracer, x, "GELU" if approximate == "none" else "GELU~")


@rule("elu")
def _elu(tracer: Tracer, x: Held, *rest: float) -> Any:
    return NotImplemented if any(v != 1 for v in rest) else _apply(tracer, x, "ELU")


@rule("leaky_relu")
def _leaky(tracer: Tracer, x: Held, slope: float = 0.01) -> Held:
    return _apply(tracer, x, f"leaky {float(slope)!r}")


@rule("pow")
def _pow(tracer: Tracer, x: Held, power: Any) -> Any:
    return _apply(tracer, x, f"^ {float(power)!r}") if isinstance(power, int | float) else NotImplemented


@rule("square")
def _square(tracer: Tracer, x: Held) -> Held:
    return _apply(tracer, x, "^ 2.0")


@rule("clamp_min")
def _clamp(tracer: Tracer, x: Held, low: float) -> Held:
    return _apply(tracer, x, f"≥ {float(low)!r}")


@rule("dropout", "contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "feature_dropout",
      "_assert_tensor_metadata")  # fmt: skip
def _identity(tracer: Tracer, x: Held, *_: Any, **__: Any) -> Held:
    return x


@rule("to", "_to_copy")
def _cast(tracer: Tracer, x: Held, *args: Any, **kwargs: Any) -> Any:
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    return x if not wanted or all(w.is_floating_point for w in wanted) else NotImplemented


@rule("add", "sub")
def _add(tracer: Tracer, x: Any, y: Any, alpha: float | int = 1, sign: float = 1.0) -> Any:
    if isinstance(y, int | float):
        return _apply(tracer, x, f"+ {float(sign * alpha * y)!r}")
    if isinstance(x, int | float):
        return NotImplemented
    if alpha * sign != 1:
        y = _apply(tracer, tracer.held(y), f"× {float(alpha * sign)!r}")
    ins, out, axes, dims = tracer.aligned([x, y])
    return Held(tracer.emit(Add(2), ins, [out], axes)[0], dims)


def _sub(tracer: Tracer, x: Any, y: Any, alpha: float | int = 1) -> Any:
    return _add(tracer, x, y, alpha, -1.0)


RULES["sub"] = _sub


@rule("mul")
def _mul(tracer: Tracer, x: Any, y: Any) -> Any:
    if isinstance(y, int | float):
        return _scaled(tracer, x, float(y))
    if isinstance(y, Fixed) and y.tensor.numel() == 1 and not y.learned:
        return _scaled(tracer, x, float(y.tensor.detach()))
    if isinstance(x, int | float):
        return _scaled(tracer, y, float(x))
    ins, out, axes, dims = tracer.aligned([x, y])
    return Held(tracer.emit(Einsum(), ins, [out], axes)[0], dims)


@rule("div")
def _div(tracer: Tracer, x: Any, y: Any, **options: Any) -> Any:
    if options:
        return NotImplemented
    if isinstance(y, Fixed) and y.tensor.numel() == 1 and not y.learned:
        y = float(y.tensor.detach())
    if isinstance(y, int | float):
        return _scaled(tracer, x, 1 / float(y))
    if isinstance(x, int | float):
        return _mul(tracer, _apply(tracer, y, "1/·"), float(x))
    return _mul(tracer, x, _apply(tracer, tracer.held(y), "1/·"))


# --------------------------------------------------------------------------------------------------------------- linear


@rule("linear")
def _linear(tracer: Tracer, x: Held, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Fixed) or not isinstance(bias, Fixed | None):
        return NotImplemented
    letters, axes = tracer.letters(x)
    eaten = tuple(letters[i] for i in x.dims[-1])
    if not eaten:
        x, _ = tracer.single(x, -1)
        return _linear(tracer, x, weight, bias)
    size = weight.tensor.shape[0]
    last = tracer.axes(x)[x.dims[-1][-1]]
    axes["new"] = tracer.build.fresh(
        "m" if len(eaten) > 1 or size == last.size else "f" if size > (last.size or 1) else "k", size
    )
    if last.name == "f":
        axes["new"] = tracer.build.fresh("m", size)
    name = _weights(tracer, _owner(tracer, weight), weight=weight, bias=bias)
    row = [c for c in letters if c not in eaten]
    place = min(x.dims[-1])
    out = (*row[:place], "new", *row[place:])
    op = Linear(eaten, ("new",), name, bias is not None)
    (value,) = tracer.emit(op, [(x.value, letters)], [out], axes)
    dims = [tuple(out.index(letters[i]) for i in g) for g in x.dims[:-1]]
    return Held(value, (*dims, (out.index("new"),)))


@rule("addmm")
def _addmm(tracer: Tracer, bias: Any, x: Any, weight: Any) -> Any:
    if not isinstance(weight, Fixed) or not isinstance(bias, Fixed):
        return NotImplemented
    return _linear(tracer, x, Fixed(weight.tensor.T.contiguous(), weight.name, weight.learned), bias)


@rule("matmul", "mm", "bmm")
def _matmul(tracer: Tracer, x: Any, y: Any) -> Any:
    if isinstance(y, Fixed) and y.learned and y.tensor.ndim == 2 and isinstance(x, Held):
        return _linear(tracer, x, Fixed(y.tensor.T, y.name, True))
    x, y = tracer.held(x), tracer.held(y)
    if len(x.dims) < 2 or len(y.dims) < 2:
        return NotImplemented
    return _product(tracer, x, y, -1, -2)


def _product(tracer: Tracer, x: Held, y: Held, of_x: int, of_y: int) -> Any:
    """Contract one dimension of each; other leading dimensions are aligned as torch broadcasts."""
    x, _ = tracer.single(x, of_x)
    y, _ = tracer.single(y, of_y)
    # Leading dimensions have to consist of the same factors.
    for d in range(3, max(len(x.dims), len(y.dims)) + 1):
        if len(x.dims) < d or len(y.dims) < d:
            continue
        shapes = [[tracer.axes(t)[i].size for i in t.dims[-d]] for t in (x, y)]
        if shapes[0] != shapes[1]:
            if [1] in shapes:
                x, y = tracer.dropped(x, len(x.dims) - d), tracer.dropped(y, len(y.dims) - d)
            elif [] not in shapes:
                x, y = tracer.merged(x, len(x.dims) - d), tracer.merged(y, len(y.dims) - d)
    a, axes = tracer.letters(x, "a")
    b, more = tracer.letters(y, "b")
    name = {b[y.dims[of_y][0]]: a[x.dims[of_x][0]]}
    tracer.union(axes[a[x.dims[of_x][0]]], more[b[y.dims[of_y][0]]])
    for d in range(3, min(len(x.dims), len(y.dims)) + 1):
        for i, j in zip(x.dims[-d], y.dims[-d], strict=False):
            name[b[j]] = a[i]
            tracer.union(axes[a[i]], more[b[j]])
    b = tuple(name.get(c, c) for c in b)
    axes = {**{name.get(c, c): ax for c, ax in more.items()}, **axes}
    rank = max(len(x.dims), len(y.dims))
    groups: list[tuple[str, ...]] = []
    for d in range(rank, 2, -1):
        mine = tuple(a[i] for i in x.dims[-d]) if len(x.dims) >= d else ()
        groups.append(mine or (tuple(b[j] for j in y.dims[-d]) if len(y.dims) >= d else ()))
    rest_x, rest_y = (-2 if of_x == -1 else -1), (-1 if of_y == -2 else -2)
    groups += [tuple(a[i] for i in x.dims[rest_x]), tuple(b[j] for j in y.dims[rest_y])]
    # Wires in the order in which they come in: x's, then those of y that x has not.
    kept = {c for g in groups for c in g}
    seen = tuple(dict.fromkeys(c for c in (*a, *b) if c in kept))
    (value,) = tracer.emit(Einsum(), [(x.value, a), (y.value, b)], [seen], axes)
    return Held(value, tuple(tuple(seen.index(c) for c in g) for g in groups))


@rule("scaled_dot_product_attention")
def _attention(
    tracer: Tracer,
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa:
        return NotImplemented
    q, k, v = (tracer.held(t) for t in (q, k, v))
    width = tracer.sizes(q)[-1]
    scores = _product(tracer, q, k, -1, -1)
    scores = _apply(tracer, scores, f"× {float(scale if scale is not None else 1 / math.sqrt(width))!r}")
    if is_causal:
        scores = causal(tracer, scores)
    if attn_mask is not None:
        if isinstance(attn_mask, Fixed) and attn_mask.tensor.dtype == torch.bool:
            seen = attn_mask.tensor
            if seen.shape[-2:].numel() == seen.numel() and torch.equal(
                seen.reshape(seen.shape[-2:]), torch.ones_like(seen.reshape(seen.shape[-2:])).tril()
            ):
                scores, attn_mask = causal(tracer, scores), None
            else:
                floats = torch.zeros(seen.shape, dtype=torch.get_default_dtype())
                attn_mask = Fixed(floats.masked_fill(~seen, float("-inf")), "mask")
        elif isinstance(attn_mask, Held):
            return NotImplemented
        if attn_mask is not None:
            scores = _add(tracer, scores, attn_mask)
    weights = _softmax(tracer, scores, -1)
    return _product(tracer, weights, v, -1, -2)


def causal(tracer: Tracer, x: Held) -> Held:
    """Minus infinity above the diagonal of the last two dimensions."""
    x, i = tracer.single(x, -2)
    x, j = tracer.single(x, -1)
    letters, axes = tracer.letters(x)
    op = Mask(letters[i], letters[j])
    return _same(x, tracer.emit(op, [(x.value, letters)], [letters], axes)[0])


@rule("embedding")
def _embedding(tracer: Tracer, weight: Any, ids: Any, *_: Any) -> Any:
    if not isinstance(weight, Fixed) or not isinstance(ids, Held):
        return NotImplemented
    name = _weights(tracer, _owner(tracer, weight), weight=weight)
    letters, axes = tracer.letters(ids)
    axes["new"] = tracer.build.fresh("m", weight.tensor.shape[1])
    (value,) = tracer.emit(Embedding("new", name), [(ids.value, letters)], [(*letters, "new")], axes)
    return Held(value, (*ids.dims, (len(letters),)))


def _spatial(tracer: Tracer, x: Held, n: int) -> tuple[Held, list[int]]:
    for d in range(-n - 1, 0):
        x, _ = tracer.single(x, d)
    return x, [x.dims[d][0] for d in range(-n - 1, 0)]


def _extent(n: int, k: int, s: int, p: int, d: int) -> int:
    return (n + 2 * p - d * (k - 1) - 1) // s + 1


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(
    tracer: Tracer, x: Any, weight: Any, bias: Any = None, stride: Any = (1,), padding: Any = (0,),
    dilation: Any = (1,),
    groups: Any = 1, *more: Any,
) -> Any:  # fmt: skip
    if not isinstance(weight, Fixed) or not isinstance(bias, Fixed | None) or isinstance(padding, str) or more:
        return NotImplemented
    n = weight.tensor.ndim - 2
    x, places = _spatial(tracer, x, n)
    stride, padding, dilation = (tuple(v) * (n if len(v) == 1 else 1) for v in (stride, padding, dilation))
    kernel = tuple(weight.tensor.shape[2:])
    letters, axes = tracer.letters(x)
    before = tuple(letters[i] for i in places[1:])
    channel = letters[places[0]]
    made = {"chan": tracer.build.fresh("c", weight.tensor.shape[0])}
    for i, c in enumerate(before):
        size = _extent(axes[c].size or 1, kernel[i], stride[i], padding[i], dilation[i])
        made[f"p{i}"] = axes[c] if size == axes[c].size else tracer.build.fresh(axes[c].name, size)
    after = tuple(f"p{i}" for i in range(n))
    name = _weights(tracer, _owner(tracer, weight), weight=weight, bias=bias)
    op = Conv(before, after, (channel, "chan"), name, kernel, stride, padding, dilation, groups, bias is not None)
    swap = {channel: "chan", **dict(zip(before, after, strict=True))}
    out = tuple(swap.get(c, c) for c in letters)
    return _same(x, tracer.emit(op, [(x.value, letters)], [out], {**axes, **made})[0])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    tracer: Tracer, x: Any, weight: Any, bias: Any = None, stride: Any = (1,), padding: Any = (0,),
    output_padding: Any = (0,), groups: int = 1, dilation: Any = (1,),
) -> Any:  # fmt: skip
    if not isinstance(weight, Fixed) or not isinstance(bias, Fixed | None):
        return NotImplemented
    n = weight.tensor.ndim - 2
    x, places = _spatial(tracer, x, n)
    stride, padding, extra, dilation = (
        tuple(v) * (n if len(v) == 1 else 1) for v in (stride, padding, output_padding, dilation)
    )
    kernel = tuple(weight.tensor.shape[2:])
    letters, axes = tracer.letters(x)
    before, channel = tuple(letters[i] for i in places[1:]), letters[places[0]]
    made = {"chan": tracer.build.fresh("c", weight.tensor.shape[1] * groups)}
    for i, c in enumerate(before):
        size = ((axes[c].size or 1) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1
        made[f"p{i}"] = tracer.build.fresh(axes[c].name, size)
    after = tuple(f"p{i}" for i in range(n))
    name = _weights(tracer, _owner(tracer, weight), weight=weight, bias=bias)
    op = Conv(
        before, after, (channel, "chan"), name, kernel, stride, padding, dilation, groups, bias is not None, True, extra
    )
    swap = {channel: "chan", **dict(zip(before, after, strict=True))}
    out = tuple(swap.get(c, c) for c in letters)
    return _same(x, tracer.emit(op, [(x.value, letters)], [out], {**axes, **made})[0])


# ------------------------------------------------------------------------------------------------- norms and reductions


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(tracer: Tracer, x: Held, dim: int, *_: Any, log: bool = False) -> Held:
    x, i = tracer.single(x, dim)
    letters, axes = tracer.letters(x)
    return _same(x, tracer.emit(Softmax(letters[i], log), [(x.value, letters)], [letters], axes)[0])


def _log_softmax(tracer: Tracer, x: Held, dim: int, *_: Any) -> Held:
    return _softmax(tracer, x, dim, log=True)


RULES.update({"log_softmax": _log_softmax, "_log_softmax": _log_softmax})


def _normed(
    tracer: Tracer, x: Held, kind: str, dims: Sequence[int], eps: float, groups: int = 1, **tensors: Any
) -> Any:
    if not all(isinstance(t, Fixed | None) for t in tensors.values()):
        return NotImplemented
    for d in dims:
        x, _ = tracer.single(x, d)
    letters, axes = tracer.letters(x)
    given = {k: t for k, t in tensors.items() if t is not None}
    owner = next((t.name for t in given.values()), "")
    name = tracer.shortened(owner).rpartition(".")[0] if given else ""
    name = _weights(tracer, name, **given) if given else ""
    affine = "".join(k[0] for k in ("weight", "bias") if k in given)
    over = tuple(letters[x.dims[d][0]] for d in dims)
    op = Norm(kind, over, name, affine, float(eps), groups)
    return _same(x, tracer.emit(op, [(x.value, letters)], [letters], axes)[0])


@rule("layer_norm")
def _layer_norm(
    tracer: Tracer, x: Held, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return _normed(tracer, x, "layer", range(-len(shape), 0), eps, weight=weight, bias=bias)


@rule("rms_norm")
def _rms_norm(tracer: Tracer, x: Held, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if eps is None:
        return NotImplemented
    return _normed(tracer, x, "rms", range(-len(shape), 0), eps, weight=weight)


@rule("group_norm")
def _group_norm(
    tracer: Tracer, x: Held, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return _normed(tracer, x, "group", range(1, len(x.dims)), eps, groups, weight=weight, bias=bias)


@rule("batch_norm")
def _batch_norm(
    tracer: Tracer,
    x: Held,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    if training or not all(isinstance(t, Fixed) for t in (mean, var)):
        return NotImplemented
    return _normed(tracer, x, "batch", [1], eps, weight=weight, bias=bias, running_mean=mean, running_var=var)


def _reduced(tracer: Tracer, x: Held, kind: str, dims: Any, keep: bool) -> Any:
    if dims is None:
        dims = range(len(x.dims))
    dims = [d % len(x.dims) for d in ([dims] if isinstance(dims, int) else dims)]
    letters, axes = tracer.letters(x)
    over = tuple(letters[i] for d in dims for i in x.dims[d])
    out = tuple(c for c in letters if c not in over)
    if over:
        (value,) = tracer.emit(Reduce(kind, over), [(x.value, letters)], [out], axes)
    else:
        value = x.value
    kept = [() if d in dims else tuple(out.index(letters[i]) for i in g) for d, g in enumerate(x.dims)]
    return Held(value, tuple(g for d, g in enumerate(kept) if keep or d not in dims))


@rule("mean")
def _mean(tracer: Tracer, x: Held, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _reduced(tracer, x, "mean", dim, keepdim)


@rule("sum")
def _sum(tracer: Tracer, x: Held, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return _reduced(tracer, x, "sum", dim, keepdim)


@rule("amax")
def _amax(tracer: Tracer, x: Held, dim: Any = None, keepdim: bool = False) -> Any:
    return _reduced(tracer, x, "max", dim, keepdim)


@rule("linalg_vector_norm")
def _vector_norm(
    tracer: Tracer, x: Held, order: float | int = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    if order == 2:
        return _apply(tracer, _reduced(tracer, _apply(tracer, x, "^ 2.0"), "sum", dim, keepdim), "√")
    kind = {1: "sum", math.inf: "max"}.get(order)
    return NotImplemented if kind is None else _reduced(tracer, _apply(tracer, x, "|·|"), kind, dim, keepdim)


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d")
def _adaptive(tracer: Tracer, x: Held, shape: Any) -> Any:
    n = len(shape)
    return _reduced(tracer, x, "mean", list(range(-n, 0)), True) if all(s == 1 for s in shape) else NotImplemented


def _pooled(tracer: Tracer, x: Held, kind: str, kernel: Any, stride: Any, padding: Any) -> Held:
    n = len(kernel)
    stride = tuple(stride) or tuple(kernel)
    stride, padding = (tuple(v) * (n if len(v) == 1 else 1) for v in (stride, padding))
    x, places = _spatial(tracer, x, n)
    letters, axes = tracer.letters(x)
    before = tuple(letters[i] for i in places[1:])
    for i, c in enumerate(before):
        axes[f"p{i}"] = tracer.build.fresh(
            axes[c].name, _extent(axes[c].size or 1, kernel[i], stride[i], padding[i], 1)
        )
    after = tuple(f"p{i}" for i in range(n))
    op = Pool(kind, before, after, tuple(kernel), stride, padding)
    swap = dict(zip(before, after, strict=True))
    out = tuple(swap.get(c, c) for c in letters)
    return _same(x, tracer.emit(op, [(x.value, letters)], [out], axes)[0])


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    tracer: Tracer,
    x: Held,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    dilation: Any = (1,),
    ceil: bool = False,
) -> Any:
    return NotImplemented if ceil or set(dilation) != {1} else _pooled(tracer, x, "max", kernel, stride, padding)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    tracer: Tracer,
    x: Held,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil: bool = False,
    count: bool = True,
    divisor: Any = None,
) -> Any:
    return NotImplemented if ceil or not count or divisor else _pooled(tracer, x, "mean", kernel, stride, padding)


# --------------------------------------------------------------------------------------------------------------- wiring


@rule("view", "reshape", "_unsafe_view")
def _view(tracer: Tracer, x: Held, shape: Sequence[int]) -> Held:
    return tracer.reshaped(x, shape, tracer.alone)


@rule("flatten")
def _flatten(tracer: Tracer, x: Held, start: int = 0, end: int = -1) -> Held:
    n = len(x.dims)
    start, end = start % n, end % n
    joined = tuple(i for g in x.dims[start : end + 1] for i in g)
    return Held(x.value, (*x.dims[:start], joined, *x.dims[end + 1 :]))


@rule("unflatten")
def _unflatten(tracer: Tracer, x: Held, dim: int, sizes: Sequence[int]) -> Held:
    shape = tracer.sizes(x)
    dim %= len(shape)
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // math.prod(s for s in sizes if s != -1)
    return tracer.reshaped(x, [*shape[:dim], *sizes, *shape[dim + 1 :]], tracer.alone)


@rule("transpose")
def _transpose(tracer: Tracer, x: Held, a: int, b: int) -> Held:
    dims = list(x.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return Held(x.value, tuple(dims))


@rule("t", "numpy_T")
def _t(tracer: Tracer, x: Held) -> Held:
    return Held(x.value, x.dims[::-1])


@rule("mT")
def _swap_last(tracer: Tracer, x: Held) -> Held:
    return _transpose(tracer, x, -2, -1)


@rule("permute")
def _permute(tracer: Tracer, x: Held, order: Sequence[int]) -> Held:
    return Held(x.value, tuple(x.dims[i] for i in order))


@rule("unsqueeze")
def _unsqueeze(tracer: Tracer, x: Held, dim: int) -> Held:
    dim %= len(x.dims) + 1
    return Held(x.value, (*x.dims[:dim], (), *x.dims[dim:]))


@rule("squeeze")
def _squeeze(tracer: Tracer, x: Held, dim: Any = None) -> Held:
    dims = range(len(x.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(x.dims) for d in dims if tracer.sizes(x)[d] == 1}
    for d in gone:
        x = tracer.dropped(tracer.merged(x, d), d)
    return Held(x.value, tuple(g for d, g in enumerate(x.dims) if d not in gone))


@rule("expand")
def _expand(tracer: Tracer, x: Held, shape: Sequence[int], **_: Any) -> Any:
    dims: list[tuple[int, ...]] = [()] * (len(shape) - len(x.dims)) + list(x.dims)
    x = Held(x.value, tuple(dims))
    sizes = tracer.sizes(x)
    grow = [d for d, n in enumerate(shape) if n not in (-1, sizes[d])]
    for d in grow:
        x = tracer.dropped(x, d)
    if not grow:
        return x
    letters, axes = tracer.letters(x)
    new = {f"n{d}": tracer.build.fresh("x", shape[d]) for d in grow}
    out = (*new, *letters)
    (value,) = tracer.emit(Einsum(), [(x.value, letters)], [out], {**axes, **new})
    found = [
        (out.index(f"n{d}"),) if d in grow else tuple(out.index(letters[i]) for i in g) for d, g in enumerate(x.dims)
    ]
    return Held(value, tuple(found))


@rule("expand_as")
def _expand_as(tracer: Tracer, x: Held, other: Operand) -> Any:
    return _expand(tracer, x, tracer.sizes(tracer.held(other)))


@rule("select")
def _select(tracer: Tracer, x: Held, dim: int, place: int) -> Held:
    dim %= len(x.dims)
    x, i = tracer.single(x, dim)
    letters, axes = tracer.letters(x)
    place %= axes[letters[i]].size or 1
    out = tuple(c for c in letters if c != letters[i])
    (value,) = tracer.emit(Index(letters[i], place), [(x.value, letters)], [out], axes)
    return Held(value, tuple(tuple(k - (k > i) for k in g) for d, g in enumerate(x.dims) if d != dim))


def _window(tracer: Tracer, x: Held, dim: int, start: int, stop: int, step: int = 1) -> Held:
    dim %= len(x.dims)
    size = tracer.sizes(x)[dim]
    start, stop = (min(max(v + size if v < 0 else v, 0), size) for v in (start, stop))
    if (start, stop, step) == (0, size, 1):
        return x
    x, i = tracer.single(x, dim)
    letters, axes = tracer.letters(x)
    axes["new"] = tracer.build.fresh(axes[letters[i]].name, len(range(start, stop, step)))
    op = Window(letters[i], "new", start, step)
    out = tuple("new" if c == letters[i] else c for c in letters)
    return _same(x, tracer.emit(op, [(x.value, letters)], [out], axes)[0])


@rule("slice")
def _slice(tracer: Tracer, x: Held, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Held:
    return _window(tracer, x, dim, start or 0, 2**62 if stop is None else stop, step)


@rule("split", "split_with_sizes", "chunk")
def _split(tracer: Tracer, x: Held, sizes: Any, dim: int = 0) -> Any:
    total = tracer.sizes(x)[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    found, at = [], 0
    for size in sizes:
        found.append(_window(tracer, x, dim, at, at + size))
        at += size
    return found


def _chunk(tracer: Tracer, x: Held, n: int, dim: int = 0) -> Any:
    return _split(tracer, x, -(-tracer.sizes(x)[dim] // n), dim)


RULES["chunk"] = _chunk


@rule("unbind")
def _unbind(tracer: Tracer, x: Held, dim: int = 0) -> list[Held]:
    return [_select(tracer, x, dim, i) for i in range(tracer.sizes(x)[dim])]


@rule("cat", "concat")
def _cat(tracer: Tracer, xs: Sequence[Operand], dim: int = 0) -> Any:
    ts = [tracer.held(x) for x in xs]
    n = len(ts[0].dims)
    dim %= n
    ts = [tracer.single(t, dim)[0] for t in ts]
    for d in range(n):
        shapes = {tuple(tracer.axes(t)[i].size for i in t.dims[d]) for t in ts}
        if d != dim and len(shapes) > 1:
            ts = [tracer.single(t, d)[0] for t in ts]
    axes: dict[str, Axis] = {}
    ins, parts, total = [], [], 0
    for j, t in enumerate(ts):
        names: dict[int, str] = {}
        for d, group in enumerate(t.dims):
            for k, i in enumerate(group):
                c = f"part{j}" if d == dim else f"d{d}_{k}"
                names[i] = c
                if c in axes:
                    tracer.union(axes[c], tracer.axes(t)[i])
                axes.setdefault(c, tracer.axes(t)[i])
        ins.append((t.value, tuple(names[i] for i in range(len(names)))))
        parts.append(f"part{j}")
        total += axes[parts[-1]].size or 1
    axes["whole"] = tracer.build.fresh(axes["part0"].name if axes["part0"].name != "i" else "x", total)
    out = tuple("whole" if c == "part0" else c for c in ins[0][1])
    (value,) = tracer.emit(Concat(tuple(parts), "whole"), ins, [out], axes)
    dims = [
        (out.index("whole"),) if d == dim else tuple(out.index(f"d{d}_{k}") for k in range(len(g)))
        for d, g in enumerate(ts[0].dims)
    ]
    return Held(value, tuple(dims))


@rule("einsum")
def _einsum(tracer: Tracer, equation: str, xs: Sequence[Operand], **_: Any) -> Any:
    left, arrow, right = equation.replace(" ", "").partition("->")
    if "." in equation or not arrow:
        return NotImplemented
    rows = left.split(",")
    ts = []
    for t in (tracer.held(x) for x in xs):
        for d in range(len(t.dims)):
            t, _i = tracer.single(t, d)
        ts.append(t)
    axes: dict[str, Axis] = {}
    ins = []
    for t, row in zip(ts, rows, strict=True):
        letters = [""] * len(tracer.axes(t))
        for d, c in enumerate(row):
            letters[t.dims[d][0]] = c
            axis = tracer.axes(t)[t.dims[d][0]]
            if c in axes:
                tracer.union(axes[c], axis)
            axes.setdefault(c, axis)
        ins.append((t.value, tuple(letters)))
    (value,) = tracer.emit(Einsum(), ins, [tuple(right)], axes)
    return Held(value, tuple((i,) for i in range(len(right))))


RULES.pop("feature_dropout", None)
