"""Read and change what flows through any ``nn.Module``: capture, replace and patch activations by name and position.

Every function here is a context manager that removes its hooks on every way out, errors and Ctrl-C included, so that
the model is afterwards exactly what it was before.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput

Positions = int | slice | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Site:
    """A place in a model: a submodule, its input or output, and which features of it.

    Args:
        module: the submodule's name, as in ``model.named_modules()``; wildcards allowed (``*`` also matches dots).
        at: ``"output"`` or ``"input"`` (the first tensor that the submodule is called with).
        index: features of the last dimension (range, tuple, or slice with a stop); None for all.
        label: the key under which :func:`capture` returns it; None for the submodule's name.
        tokens_of: a submodule around this one whose input is ``[batch, position, ...]``; needed only where this
            submodule sees batch and position flattened into one dimension (as OPT's MLP does).
    """

    module: str
    at: str = "output"
    index: range | slice | tuple[int, ...] | None = None
    label: str | None = None
    tokens_of: str | None = None

    def __post_init__(self) -> None:
        if self.at not in ("input", "output"):
            raise InvalidInput(f"at={self.at!r}: expected 'input' or 'output'")
        if isinstance(self.index, slice):  # slices cannot be hashed before Python 3.12
            if self.index.stop is None or self.index.stop < 0:
                raise InvalidInput(f"index={self.index}: hand in a slice with a stop, or a range")
            index = range(self.index.start or 0, self.index.stop, self.index.step or 1)
            object.__setattr__(self, "index", index)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Switch a model to evaluation inside the block and give every submodule its own training flag back afterwards.

    Args:
        model: any module; submodules may be in different modes.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield model
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def capture(
    model: nn.Module,
    names: str | Site | Iterable[str | Site],
    positions: Positions = None,
    at: str = "output",
    detach: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Keep activations of the forward passes that run inside the block.

    Args:
        model: any module.
        names: submodule names, wildcards, or :class:`Site` objects.
        positions: positions to keep, along dimension 1 (``[batch, position, ...]``); None keeps all, an int keeps the
            dimension with length 1.
        at: ``"output"`` or ``"input"`` of the submodules that are given by name.
        detach: False keeps the graph, so that gradients flow through what is returned.

    Yields:
        a dict from name (or a site's label) to the tensor of the latest forward pass, filled as the model runs.

    Raises:
        InvalidInput: no submodule of that name; the message holds the nearest names.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> with capture(model, "0") as seen:
        ...     _ = model(torch.ones(1, 2))
        >>> seen["0"].shape
        torch.Size([1, 3])
    """
    wanted = [names] if isinstance(names, str | Site) else list(names)
    found: dict[str, Tensor] = {}

    def reader(key: str, site: Site) -> Callable[[Tensor, torch.Size | None], Tensor | None]:
        def read(activation: Tensor, shape: torch.Size | None) -> None:
            activation = _unflatten(activation, shape)
            kept = _select(activation, positions, site.index, key)
            # A view of a buffer that the model changes in place later would change with it.
            found[key] = kept.detach().clone() if detach else kept

        return read

    with ExitStack() as stack:
        for name in wanted:
            for key, site in expand(model, name, at):
                _attach(stack, model, site, reader(key, site))
        yield found


@contextmanager
def replace(
    model: nn.Module,
    values: Mapping[Any, Tensor | float | Callable[[Tensor], Any]],
    positions: Positions = None,
    at: str = "output",
) -> Iterator[nn.Module]:
    """Put other values in the place of activations in the forward passes that run inside the block.

    Args:
        model: any module.
        values: submodule name, wildcard or :class:`Site` -> a tensor or number that broadcasts to the activation (at
            the chosen positions and features), or a function from that part of the activation to its replacement.
        positions: positions to replace, along dimension 1; None replaces all.
        at: ``"output"`` or ``"input"`` of the submodules that are given by name.

    Raises:
        InvalidInput: an unknown name, or a value whose shape does not fit.
    """

    def writer(key: str, site: Site, value: Any) -> Callable[[Tensor, torch.Size | None], Tensor]:
        def write(activation: Tensor, shape: torch.Size | None) -> Tensor:
            whole = _unflatten(activation, shape)
            part = _select(whole, positions, site.index, key)
            new = value(part) if callable(value) else value
            new = torch.as_tensor(new, dtype=part.dtype, device=part.device)
            try:
                new = new.expand(part.shape)
            except RuntimeError:
                raise InvalidInput(
                    f"the value for {key!r} has shape {tuple(new.shape)}, which does not broadcast to the activation's "
                    f"{tuple(part.shape)}: hand in a tensor of that shape"
                ) from None
            if positions is None and site.index is None:
                return new.reshape(activation.shape)
            return _insert(whole, new, positions, site.index).reshape(activation.shape)

        return write

    with ExitStack() as stack:
        for name, value in values.items():
            for key, site in expand(model, name, at):
                _attach(stack, model, site, writer(key, site, value))
        yield model


@contextmanager
def patch(
    model: nn.Module,
    sources: Mapping[Any, Tensor],
    positions: Positions = None,
    at: str = "output",
) -> Iterator[nn.Module]:
    """Copy activations of another run into the forward passes inside the block (activation patching).

    Args:
        model: any module.
        sources: submodule name or :class:`Site` -> the whole activation of the other run, ``[batch, position, ...]``.
        positions: positions to copy, the same in both runs; None copies all.
        at: ``"output"`` or ``"input"`` of the submodules that are given by name.

    Raises:
        InvalidInput: an unknown name, or a source whose shape does not fit.
    """
    chosen = {name: _select(source, positions, None, str(name)) for name, source in sources.items()}
    with replace(model, chosen, positions=positions, at=at):
        yield model


def expand(model: nn.Module, name: str | Site, at: str = "output") -> list[tuple[str, Site]]:
    """The sites that a name or wildcard stands for, each with its key.

    Args:
        model: any module.
        name: a submodule's name, wildcards allowed, or a :class:`Site`.
        at: ``"output"`` or ``"input"``, for a plain name.

    Raises:
        InvalidInput: no submodule of that name, with the nearest ones.
    """
    site = name if isinstance(name, Site) else Site(name, at)
    known = dict(model.named_modules())
    if site.module in known:
        return [(site.label or site.module, site)]
    matches = fnmatch.filter(known, site.module) if any(c in site.module for c in "*?[") else []
    if not matches:
        near = get_close_matches(site.module, [name for name in known if name], n=5, cutoff=0.4)
        hint = f"nearest names: {', '.join(near)}" if near else "see model.named_modules()"
        raise InvalidInput(f"{type(model).__name__} has no submodule {site.module!r}; {hint}")
    return [(match, Site(match, site.at, site.index, None, site.tokens_of)) for match in matches]


def _attach(
    stack: ExitStack, model: nn.Module, site: Site, act: Callable[[Tensor, torch.Size | None], Tensor | None]
) -> None:
    """Hook one site; ``act`` gets the activation and gives None (leave it) or another tensor."""
    module = model.get_submodule(site.module)
    outer: dict[str, torch.Size] = {}

    if site.tokens_of is not None:

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outer["shape"] = _first_tensor(args, kwargs)[2].shape[:2]

        around = model.get_submodule(site.tokens_of)
        stack.callback(around.register_forward_pre_hook(note, with_kwargs=True).remove)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, key, tensor = _first_tensor(args, kwargs)
        new = act(tensor, outer.get("shape"))
        if new is None:
            return None
        if where == "args":
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: new}

    def on_output(_: nn.Module, args: Any, output: Any) -> Any:
        new = act(_tensor_of(output, site.module), outer.get("shape"))
        return None if new is None else _with_tensor(output, new)

    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if site.at == "input"
        else module.register_forward_hook(on_output)
    )
    stack.callback(handle.remove)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, Tensor]:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return "args", i, value
    for name in ("hidden_states", "input", "x", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return "kwargs", name, kwargs[name]
    raise InvalidInput("this submodule is called without any tensor: capture its output, or a submodule inside it")


def main_tensor(output: Any) -> Tensor | None:
    """The main tensor of what a module gives: itself, a tuple's first, or a ModelOutput's first; None without any."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def _tensor_of(output: Any, name: str) -> Tensor:
    found = main_tensor(output)
    if found is None:
        raise InvalidInput(f"{name!r} gives a {type(output).__name__} without a tensor: choose a submodule inside it")
    return found


def _with_tensor(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(key for key, item in output.items() if isinstance(item, Tensor))
        changed = dict(output)
        changed[key] = new
        return type(output)(**changed)
    i = next(i for i, item in enumerate(output) if isinstance(item, Tensor))
    items = [*output[:i], new, *output[i + 1 :]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _unflatten(activation: Tensor, shape: torch.Size | None) -> Tensor:
    """Batch and position apart again, where the submodule sees them as one dimension."""
    if shape is None or activation.shape[:2] == shape:
        return activation
    return activation.reshape(*shape, *activation.shape[1:])


def _positions(positions: Positions, length: int, name: str) -> slice | list[int]:
    if positions is None:
        return slice(None)
    if isinstance(positions, slice):
        return positions
    chosen = [positions] if isinstance(positions, int) else [int(p) for p in positions]
    bad = [p for p in chosen if not -length <= p < length]
    if bad:
        raise InvalidInput(f"position {bad[0]} of {name!r}: the activation has {length} positions (0 to {length - 1})")
    return [p % length for p in chosen]


def _features(index: range | slice | tuple[int, ...] | None) -> slice | list[int]:
    if index is None or isinstance(index, slice):
        return index or slice(None)
    return slice(index.start, index.stop, index.step) if isinstance(index, range) else list(index)


def _select(activation: Tensor, positions: Positions, index: Any, name: str) -> Tensor:
    if positions is not None:
        if activation.ndim < 2:
            raise InvalidInput(f"{name!r} has shape {tuple(activation.shape)}: positions need [batch, position, ...]")
        activation = activation[:, _positions(positions, activation.shape[1], name)]
    return activation if index is None else activation[..., _features(index)]


def _insert(activation: Tensor, new: Tensor, positions: Positions, index: Any) -> Tensor:
    changed = activation.clone()
    if positions is None:
        changed[..., _features(index)] = new
        return changed
    chosen = _positions(positions, activation.shape[1], "activation")
    part = changed[:, chosen].clone()
    part[..., _features(index)] = new
    changed[:, chosen] = part
    return changed
