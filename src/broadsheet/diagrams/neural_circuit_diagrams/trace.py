"""From any torch module to its diagram: ``torch.export`` writes the program down, every operator becomes steps.
A tensor of the program is a value of the diagram and, for each of its dimensions, which wires it consists of: none
(size 1), one, or several that a reshape has merged. Merges and transpositions stay unspoken until a step needs them,
so that they are drawn only where they do something; a linear layer takes or makes several axes at once. Axes that
pointwise operators align become one by union-find, except where an array would then have an axis twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.diagrams.neural_circuit_diagrams.axes import Axis
from broadsheet.diagrams.neural_circuit_diagrams.builder import Builder
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram, Step
from broadsheet.diagrams.neural_circuit_diagrams.generators import Constant, Generator, Index, Letters, Pattern, View
from broadsheet.diagrams.neural_circuit_diagrams.linear import Einsum, Linear
from broadsheet.diagrams.neural_circuit_diagrams.opaque import Opaque
from broadsheet.errors import InvalidInput

DEFAULT_NAMES = {1: "m", 2: "b m", 3: "b x m", 4: "b c y x", 5: "b c z y x"}


LIMIT = 400


class DepthWarning(UserWarning):
    """A module of more steps than anybody reads: it is drawn less deep."""


class TrainModeWarning(UserWarning):
    """A module in train mode: it is drawn as it computes in eval mode."""


@dataclass(frozen=True)
class Held:
    """A tensor of the program.

    Args:
        value: of the builder.
        dims: for each dimension the axes of the value that it consists of.
    """

    value: int
    dims: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fixed:
    """A tensor that depends on no input: a weight, a buffer, or what is computed from them."""

    tensor: Tensor
    name: str
    learned: bool = False


Operand = Held | Fixed


class Tracer:
    """Turns an exported program into a diagram; ``rules`` holds what every operator becomes."""

    def __init__(self) -> None:
        self.build = Builder()
        self.parent: dict[str, str] = {}
        self.opaque: list[str] = []
        self.short: dict[str, str] = {}
        self.alone = False

    # ------------------------------------------------------------------------------------------------------- wires

    def axes(self, t: Held) -> tuple[Axis, ...]:
        """The axes of a tensor's value."""
        return self.build.values[t.value]

    def sizes(self, t: Held) -> list[int]:
        """The shape of a tensor."""
        found = []
        for group in t.dims:
            n = 1
            for i in group:
                n *= self.axes(t)[i].size or 1
            found.append(n)
        return found

    def emit(
        self, op: Generator, ins: Sequence[tuple[int, Letters]], outs: Sequence[Letters], axes: Mapping[str, Axis]
    ) -> list[int]:
        """A step; an axis that an output would have twice is renamed."""
        values = []
        for letters in outs:
            seen, array = set(), []
            for c in letters:
                axis = axes[c]
                if axis.id in seen:
                    axis = self.build.fresh(axis.name, axis.size)
                seen.add(axis.id)
                array.append(axis)
            values.append(self.build.value(tuple(array)))
        at = Pattern(tuple(letters for _, letters in ins), tuple(outs))
        self.build.steps.append(Step(op, at, tuple(v for v, _ in ins), tuple(values)))
        return values

    def letters(self, t: Held, prefix: str = "a") -> tuple[Letters, dict[str, Axis]]:
        """Letters of their own for the axes of a tensor."""
        letters = tuple(f"{prefix}{i}" for i in range(len(self.axes(t))))
        return letters, dict(zip(letters, self.axes(t), strict=True))

    def held(self, t: Operand) -> Held:
        """A tensor as a value; fixed ones become constants."""
        if isinstance(t, Held):
            return t
        shape = [n for n in t.tensor.shape if n != 1]
        name = self.fix(t)
        names = {1: "m", 2: "x m", 3: "h y x"}.get(len(shape), "").split() or [f"a{i}" for i in range(len(shape))]
        axes = {f"a{i}": self.build.fresh(n, s) for i, (n, s) in enumerate(zip(names, shape, strict=True))}
        (value,) = self.emit(Constant(name, t.learned), [], [tuple(axes)], axes)
        dims, i = [], 0
        for n in t.tensor.shape:
            dims.append(() if n == 1 else (i,))
            i += n != 1
        self.build.weights[name] = t.tensor.detach().reshape(shape)
        return Held(value, tuple(dims))

    def fix(self, t: Fixed) -> str:
        """The name under which a fixed tensor is drawn."""
        base = name = self.shortened(t.name)
        number = 1
        while name in self.build.weights and not _equal(self.build.weights[name], t.tensor):
            number += 1
            name = f"{base}.{number}"
        return name

    def shortened(self, name: str) -> str:
        """Numbers and the last word of a dotted name, where no other weight has the same."""
        return self.short.get(name, name)

    def merged(self, t: Held, dim: int) -> Held:
        """The tensor with a dimension of several axes made one."""
        group = t.dims[dim]
        if len(group) < 2:
            return t
        letters, axes = self.letters(t)
        mine = [letters[i] for i in group]
        if list(group) != list(range(group[0], group[0] + len(group))):
            rest = [c for c in letters if c not in mine]
            order = (*rest[: min(group)], *mine, *rest[min(group) :])
            (value,) = self.emit(Einsum(), [(t.value, letters)], [order], axes)
            place = {letters.index(c): i for i, c in enumerate(order)}
            return self.merged(Held(value, tuple(tuple(place[i] for i in g) for g in t.dims)), dim)
        size = 1
        for i in group:
            size *= self.axes(t)[i].size or 1
        axes["new"] = self.build.fresh("m", size)
        out = (*letters[: group[0]], "new", *letters[group[-1] + 1 :])
        (value,) = self.emit(View(tuple(mine), ("new",)), [(t.value, letters)], [out], axes)
        shift = len(group) - 1
        dims = tuple(
            (group[0],) if j == dim else tuple(i - shift if i > group[-1] else i for i in g)
            for j, g in enumerate(t.dims)
        )
        return Held(value, dims)

    def single(self, t: Held, dim: int) -> tuple[Held, int]:
        """The tensor with one axis for a dimension, and that axis's number."""
        t = self.merged(t, dim % len(t.dims))
        group = t.dims[dim % len(t.dims)]
        if not group:
            t = self.grown(t, dim % len(t.dims))
            group = t.dims[dim % len(t.dims)]
        return t, group[0]

    def grown(self, t: Held, dim: int) -> Held:
        """The tensor with an axis of size 1 where it had none."""
        letters, axes = self.letters(t)
        axes["one"] = self.build.fresh("i", 1)
        (value,) = self.emit(Einsum(), [(t.value, letters)], [(*letters, "one")], axes)
        return Held(value, tuple((len(letters),) if j == dim else g for j, g in enumerate(t.dims)))

    def union(self, one: Axis, other: Axis) -> None:
        """Note that two axes are the same."""
        a, b = self.root(one.id), self.root(other.id)
        if a != b:
            self.parent[b] = a

    def root(self, name: str) -> str:
        """The representative of an axis."""
        while name in self.parent:
            name = self.parent[name]
        return name

    def aligned(self, operands: Sequence[Operand]) -> tuple[list[tuple[int, Letters]], Letters, dict[str, Axis], tuple]:
        """Operands of a pointwise operator with letters that agree, as torch broadcasts.

        Returns:
            values with letters, letters of the result, axes, and the result's dimensions.
        """
        ts = [self.held(t) for t in operands]
        rank = max(len(t.dims) for t in ts)
        for d in range(1, rank + 1):
            shapes = {tuple(self.axes(t)[i].size for i in t.dims[-d]) for t in ts if len(t.dims) >= d and t.dims[-d]}
            wide = {s for s in shapes if s != (1,)}
            if len(wide) > 1:
                ts = [self.merged(t, len(t.dims) - d) if len(t.dims) >= d else t for t in ts]
            if wide:
                ts = [self.dropped(t, len(t.dims) - d) if len(t.dims) >= d else t for t in ts]
        names: list[dict[int, str]] = [{} for _ in ts]
        axes: dict[str, Axis] = {}
        groups: list[tuple[str, ...]] = []
        for d in range(rank, 0, -1):
            row: tuple[str, ...] = ()
            for j, t in enumerate(ts):
                if len(t.dims) < d or not t.dims[-d]:
                    continue
                if not row:
                    row = tuple(f"d{d}{'abcdefgh'[k]}" for k in range(len(t.dims[-d])))
                for c, i in zip(row, t.dims[-d], strict=True):
                    names[j][i] = c
                    if c in axes:
                        self.union(axes[c], self.axes(t)[i])
                    axes.setdefault(c, self.axes(t)[i])
            groups.append(row)
        ins = [(t.value, tuple(names[j][i] for i in range(len(self.axes(t))))) for j, t in enumerate(ts)]
        flat = tuple(c for row in groups for c in row)
        out = next((letters for _, letters in ins if len(letters) == len(flat)), flat)
        return ins, out, axes, tuple(tuple(out.index(c) for c in row) for row in groups)

    def dropped(self, t: Held, dim: int) -> Held:
        """The tensor without its axis of size 1 at a dimension that is broadcast."""
        group = t.dims[dim]
        if len(group) != 1 or self.axes(t)[group[0]].size != 1:
            return t
        letters, axes = self.letters(t)
        gone = letters[group[0]]
        out = tuple(c for c in letters if c != gone)
        (value,) = self.emit(Index(gone, 0), [(t.value, letters)], [out], axes)
        dims = tuple(() if j == dim else tuple(i - (i > group[0]) for i in g) for j, g in enumerate(t.dims))
        return Held(value, dims)

    def plain(self, t: Operand) -> Held:
        """The tensor with exactly one axis for each dimension, in order."""
        h = self.held(t)
        for d in range(len(h.dims)):
            h = self.merged(h, d)
        h = self._ordered(h)
        for d in range(len(h.dims)):
            if not h.dims[d]:
                h = self.grown(h, d)
        return self._ordered(h)

    def _ordered(self, t: Held) -> Held:
        order = [i for g in t.dims for i in g]
        if order == sorted(order):
            return t
        letters, axes = self.letters(t)
        out = tuple(letters[i] for i in order)
        (value,) = self.emit(Einsum(), [(t.value, letters)], [out], axes)
        return Held(value, tuple(tuple(order.index(i) for i in g) for g in t.dims))

    # ---------------------------------------------------------------------------------------------------- reshaping

    def reshaped(self, t: Held, shape: Sequence[int], alone: bool) -> Held:
        """Dimensions grouped anew by greedy factor matching: merges are unspoken, splits are steps."""
        shape = list(shape)
        if -1 in shape:
            known, total = 1, 1
            for n in self.sizes(t):
                total *= n
            for n in shape:
                known *= n if n != -1 else 1
            shape[shape.index(-1)] = total // max(known, 1)
        flat = [i for g in t.dims for i in g]
        groups: list[list[int]] = []
        queue = [(i, self.axes(t)[i].size or 1) for i in flat]
        splits: list[tuple[int, list[int]]] = []
        at = 0
        while at < len(shape):
            want, row = shape[at], []
            if want == 1:
                groups.append([])
                at += 1
                if queue and queue[0][1] == 1:
                    groups[-1] = [queue.pop(0)[0]]
                continue
            while want > 1:
                if not queue:
                    return self._whole(t, shape)
                i, n = queue[0]
                if n == 1:
                    queue.pop(0)
                    row.append(i)
                    continue
                if want % n == 0:
                    queue.pop(0)
                    row.append(i)
                    want //= n
                elif n % want == 0 and not row:
                    # Several dimensions out of one axis: as many as it takes.
                    parts, rest = [], n
                    j = at
                    while rest > 1 and j < len(shape) and rest % shape[j] == 0:
                        parts.append(shape[j])
                        rest //= shape[j]
                        j += 1
                    if rest != 1:
                        return self._whole(t, shape)
                    splits.append((i, [p for p in parts if p != 1]))
                    return self.reshaped(self._split(t, i, [p for p in parts if p != 1], alone), shape, alone)
                else:
                    return self._whole(t, shape)
            groups.append(row)
            at += 1
        for i, n in queue:  # axes of size 1 that are left over
            if n != 1:
                return self._whole(t, shape)
            (groups[-1] if groups else groups.append([]) or groups[-1]).append(i)
        return Held(t.value, tuple(tuple(g) for g in groups))

    def _split(self, t: Held, place: int, parts: Sequence[int], alone: bool) -> Held:
        letters, axes = self.letters(t)
        old = self.axes(t)[place]
        names = {2: "h k", 3: "t h k"}.get(len(parts), "").split() or ["s"] * len(parts)
        new = [self.build.fresh(n, s) for n, s in zip(names, parts, strict=True)]
        made = tuple(f"n{i}" for i in range(len(parts)))
        step = next((s for s in reversed(self.build.steps) if t.value in s.outs), None)
        out = (*letters[:place], *made, *letters[place + 1 :])
        axes |= dict(zip(made, new, strict=True))
        if alone and step is not None and isinstance(step.op, Linear):
            mine = step.at.outs[0][place]
            if mine in step.op.after:
                # The layer makes these axes itself.
                k = step.op.after.index(mine)
                after = (*step.op.after[:k], *made, *step.op.after[k + 1 :])
                outs = (*step.at.outs[0][:place], *made, *step.at.outs[0][place + 1 :])
                value = self.build.value(tuple(axes[c] for c in out))
                changed = replace(
                    step, op=replace(step.op, after=after), at=Pattern(step.at.ins, (outs,)), outs=(value,)
                )
                self.build.steps[self.build.steps.index(step)] = changed
                return Held(value, self._widened(t, place, len(parts)))
        (value,) = self.emit(View((letters[place],), made), [(t.value, letters)], [out], axes)
        assert old.size is not None
        return Held(value, self._widened(t, place, len(parts)))

    def _widened(self, t: Held, place: int, n: int) -> tuple[tuple[int, ...], ...]:
        found = []
        for g in t.dims:
            row: list[int] = []
            for i in g:
                row += list(range(place, place + n)) if i == place else [i + n - 1 if i > place else i]
            found.append(tuple(row))
        return tuple(found)

    def _whole(self, t: Held, shape: Sequence[int]) -> Held:
        """A reshape whose factors do not match: one bar over all wires."""
        t = self.plain(t)
        letters, axes = self.letters(t)
        wide = [n for n in shape if n != 1]
        new = {f"n{i}": self.build.fresh("m", n) for i, n in enumerate(wide)}
        (value,) = self.emit(View(letters, tuple(new)), [(t.value, letters)], [tuple(new)], {**axes, **new})
        dims, i = [], 0
        for n in shape:
            dims.append(() if n == 1 else (i,))
            i += n != 1
        return Held(value, tuple(dims))

    # ------------------------------------------------------------------------------------------------------ opaque

    def unknown(self, node: Any, args: tuple, kwargs: dict, result: Any) -> Any:
        """A box for an operator that no rule knows."""
        flat: list[Any] = []

        def gather(x: Any) -> Any:
            if isinstance(x, Held | Fixed):
                flat.append(self.plain(x))
                return ("tensor", len(flat) - 1)
            if isinstance(x, (list, tuple)):
                return type(x)(gather(y) for y in x) if isinstance(x, tuple) else [gather(y) for y in x]
            return x

        spec, options = gather(tuple(args)), {k: gather(v) for k, v in kwargs.items()}
        target = node.target

        def fill(x: Any, xs: Sequence[Tensor]) -> Any:
            if isinstance(x, tuple) and len(x) == 2 and x[0] == "tensor":
                return xs[x[1]]
            if isinstance(x, (list, tuple)):
                return type(x)(fill(y, xs) for y in x)
            return x

        def call(*xs: Tensor) -> Any:
            return target(*fill(spec, xs), **{k: fill(v, xs) for k, v in options.items()})

        name = str(getattr(target, "__name__", target)).split(".")[0]
        self.opaque.append(name)
        results = result if isinstance(result, (tuple, list)) else [result]
        ins, axes = [], {}
        for j, t in enumerate(flat):
            letters, mine = self.letters(t, f"a{j}_")
            ins.append((t.value, letters))
            axes |= mine
        outs = []
        for j, each in enumerate(results):
            like = next((t for t in flat if self.sizes(t) == list(each.shape)), None)
            row = []
            for i, n in enumerate(each.shape):
                axes[f"o{j}_{i}"] = self.axes(like)[i] if like is not None else self.build.fresh("o", n)
                row.append(f"o{j}_{i}")
            outs.append(tuple(row))
        op = Opaque(name, tuple(letters for _, letters in ins), tuple(outs), call, whole=True)
        values = self.emit(op, ins, outs, axes)
        made = [Held(v, tuple((i,) for i in range(len(o)))) for v, o in zip(values, outs, strict=True)]
        return made if isinstance(result, (tuple, list)) else made[0]


def diagram(
    module: nn.Module,
    example_inputs: Sequence[Tensor] | Tensor,
    axis_names: Sequence[str] | None = None,
    depth: int | None = None,
    collapse_repeats: bool = True,
) -> Diagram:
    """The diagram of any module.

    Args:
        module: it is drawn as it computes in eval mode.
        example_inputs: tensors of the shapes to draw.
        axis_names: for each input the names of its axes, such as ``["b x m"]``.
        depth: how deep to go into submodules: those below are boxes with their names. None: all the way.
        collapse_repeats: with a ``depth``, draw equal boxes in a row once, with their number.

    Returns:
        A diagram that runs to the module's own output.

    Raises:
        InvalidInput: a module that ``torch.export`` cannot write down, or names that do not fit the inputs.
    """
    from broadsheet.diagrams.neural_circuit_diagrams.grouping import grouped

    made = traced(module, example_inputs, axis_names)
    if depth is None and len(made.steps) > LIMIT:
        warnings.warn(
            f"{len(made.steps)} steps: drawn as boxes of submodules. depth=2, 3, ... goes deeper, and a submodule can"
            " be drawn by itself",
            DepthWarning,
            stacklevel=2,
        )
        depth = 1 if len(grouped(made, 1, collapse_repeats).steps) <= LIMIT else 0
    return made if depth is None else grouped(made, depth, collapse_repeats)


def traced(
    module: nn.Module, example_inputs: Sequence[Tensor] | Tensor, axis_names: Sequence[str] | None = None
) -> Diagram:
    """The diagram of a module all the way down, however many steps it has; arguments as of ``diagram``."""
    from broadsheet.diagrams.neural_circuit_diagrams.operators import RULES, constant_rule

    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if axis_names is not None and len(axis_names) != len(inputs):
        raise InvalidInput(f"axis_names has {len(axis_names)} entries for {len(inputs)} inputs")
    program = _exported(module, inputs)
    tracer = Tracer()
    tracer.short = _short_names([*program.state_dict, *program.constants])
    env: dict[Any, Any] = {}
    signature = program.graph_signature
    fixed = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    fixed |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
    given = iter(enumerate(inputs))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in fixed:
                name = fixed[node.name]
                tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
                env[node] = Fixed(tensor, name, isinstance(tensor, nn.Parameter))
            else:
                env[node] = _input(tracer, *next(given), axis_names)
        elif node.op == "output":
            results = [x for x in node.args[0] if x is not None]
            values = [tracer.plain(env[x]).value for x in results]
            break
        elif node.op == "call_function":
            args = torch.fx.node.map_arg(node.args, lambda n: env[n])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
            before = len(tracer.build.steps)
            env[node] = _call(tracer, node, args, kwargs, RULES, constant_rule)
            name = str(node.target).split(".")[-2] if "." in str(node.target) else str(node.target)
            if (
                name.endswith("_")
                and not name.startswith("_")
                and node.args
                and isinstance(node.args[0], torch.fx.Node)
            ):
                env[node.args[0]] = env[node]  # what is changed in place is what later steps see
            path = _path(node)
            tracer.build.steps[before:] = [replace(s, path=path) for s in tracer.build.steps[before:]]
    _unify(tracer)
    made = tracer.build.finish(values)
    needed = {name for s in made.steps for name in s.op.names}
    return replace(made, weights={n: w for n, w in made.weights.items() if n in needed})


def opaque_share(made: Diagram) -> float:
    """The share of a diagram's steps that are boxes without an inside."""
    work = [s for s in made.steps if s.op.glyph not in ("copy", "discard")]
    return sum(isinstance(s.op, Opaque) and s.op.whole for s in work) / max(1, len(work))


def _exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    training = module.training
    if training and any(True for m in module.modules() if isinstance(m, nn.Dropout | nn.modules.batchnorm._BatchNorm)):
        warnings.warn("the module is in train mode: it is drawn as in eval mode", TrainModeWarning, stacklevel=3)
    was = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        where = next((line.strip() for line in lines if "File " in line or ".py:" in line), "")
        raise InvalidInput(
            f"{type(module).__name__} cannot be written down as one program ({lines[0] if lines else error!r}"
            f"{'; at ' + where if where else ''}): control flow that depends on data has no single diagram. Draw the"
            " branches apart, or write them in the language (einsum, linear, >>)"
        ) from error
    finally:
        for m, mode in was.items():
            m.training = mode


def _input(tracer: Tracer, number: int, x: Tensor, axis_names: Sequence[str] | None) -> Held:
    floating = x.is_floating_point()
    default = DEFAULT_NAMES.get(x.ndim, "") if floating or x.ndim > 2 else {1: "x", 2: "b x"}.get(x.ndim, "")
    names = (axis_names[number] if axis_names is not None else default).split()
    if not names:
        names = [f"a{'bcdefgh'[i]}" for i in range(x.ndim)]
    if len(names) != x.ndim:
        raise InvalidInput(
            f"axis_names[{number}] = {' '.join(names)!r} has {len(names)} names for shape {list(x.shape)}"
        )
    axes = tuple(
        Axis(f"{n}", n, s) if axis_names is not None else tracer.build.fresh(n, s)
        for n, s in zip(names, x.shape, strict=True)
    )
    if not x.ndim:
        axes = ()
    return Held(tracer.build.input(axes), tuple((i,) for i in range(x.ndim)))


def _call(tracer: Tracer, node: Any, args: tuple, kwargs: dict, rules: Mapping[str, Callable], fixed: Callable) -> Any:
    result = node.meta.get("val")
    target = str(node.target)
    if "getitem" in target:
        return args[0][args[1]]
    operands = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Held | Fixed)]
    if not any(isinstance(x, Held) for x in operands):
        return fixed(tracer, node, args, kwargs)
    name = target.removeprefix("aten.").split(".")[0].removesuffix("_") if target.startswith("aten.") else target
    rule = rules.get(name)
    tracer.alone = bool(node.args) and isinstance(node.args[0], torch.fx.Node) and len(node.args[0].users) == 1
    if rule is not None:
        before, steps = dict(tracer.build.values), list(tracer.build.steps)
        made = rule(tracer, *args, **kwargs)
        if made is not NotImplemented:
            return made
        tracer.build.values, tracer.build.steps = before, steps
    if result is None:
        return None
    return tracer.unknown(node, args, kwargs, result)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two fixed tensors hold the same numbers, whatever axes of size 1 they have."""
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.detach().reshape(-1))


def _path(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Every dotted name by its numbers and its last word before ``weight``, where that is not taken."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for owner in owners:
        parts = owner.split(".")
        for keep in range(1, len(parts) + 1):
            digits = [p for p in parts[: len(parts) - keep] if p.isdigit()]
            brief = ".".join([*digits, *parts[len(parts) - keep :]])
            if brief not in taken:
                break
        else:
            brief = owner
        taken[brief] = owner
        found[owner] = brief
    full = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        full[name] = f"{found[owner]}.{last}" if owner else name
        full.setdefault(owner, found.get(owner, owner))
    return full


def _unify(tracer: Tracer) -> None:
    """Give axes that are the same one id, class by class, wherever no array would have it twice."""
    build = tracer.build
    first: dict[str, Axis] = {}
    for array in build.values.values():
        for a in array:
            first.setdefault(a.id, a)
    classes: dict[str, set[str]] = {}
    for name in first:
        classes.setdefault(tracer.root(name), set()).add(name)
    for members in classes.values():
        if len(members) < 2:
            continue
        order = [n for n in first if n in members]
        for other in order[1:]:
            clash = any(sum(a.id in (order[0], other) for a in array) > 1 for array in build.values.values())
            if clash or first[other].size != first[order[0]].size:
                continue
            for v, array in build.values.items():
                build.values[v] = tuple(first[order[0]] if a.id == other else a for a in array)
