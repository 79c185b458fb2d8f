"""Switch units of any layers off: channels of a convolution, features of tokens.

    with ablated(model, {"layer4": [3, 17]}):
        accuracy(model)

The weights are not touched, and nothing is left in the model afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import replace

Unit = tuple[str, int]


def by_layer(units: Mapping[str, Sequence[int]] | Iterable[Unit]) -> dict[str, list[int]]:
    """Units as lists for each layer.

    Args:
        units: layer's name -> unit numbers, or pairs of layer and unit.
    """
    found: dict[str, list[int]] = {}
    if isinstance(units, Mapping):
        for layer, chosen in units.items():
            found[str(layer)] = [int(unit) for unit in chosen]  # type: ignore[union-attr]  # a sequence of numbers
        return found
    for layer, unit in units:
        found.setdefault(layer, []).append(int(unit))
    return found


@contextmanager
def ablated(
    model: nn.Module,
    units: Mapping[str, Sequence[int]] | Iterable[Unit],
    value: float | Mapping[str, Tensor] = 0.0,
) -> Iterator[nn.Module]:
    """Hold units at a value inside the block.

    Args:
        model: any module.
        units: submodule's name -> unit numbers, or pairs of name and unit. A unit is a channel where the submodule
            gives ``[batch, channel, height, width]``, a feature of every token where it gives ``[batch, token,
            feature]`` or ``[batch, feature]``.
        value: what the units are held at: a number, or for each layer ``[all its units]`` (their means, say).

    Raises:
        InvalidInput: an unknown submodule, or a unit that it does not have (when the model runs).
    """

    def switch(layer: str, chosen: list[int]) -> Callable[[Tensor], Tensor]:
        held = value[layer] if isinstance(value, Mapping) else value

        def off(activation: Tensor) -> Tensor:
            axis = 1 if activation.ndim == 4 else activation.ndim - 1
            width = activation.shape[axis]
            if wrong := [unit for unit in chosen if not 0 <= unit < width]:
                raise InvalidInput(f"unit {wrong[0]} of {layer!r}: the layer has {width} units (0 to {width - 1})")
            changed = activation.clone().movedim(axis, -1)
            index = torch.tensor(chosen, device=activation.device)
            changed[..., index] = held.to(changed)[index] if isinstance(held, Tensor) else held
            return changed.movedim(-1, axis)

        return off

    values: dict[Any, Any] = {layer: switch(layer, chosen) for layer, chosen in by_layer(units).items() if chosen}
    with replace(model, values):
        yield model


def ablation_curve(
    model: nn.Module,
    measure: Callable[[nn.Module], float],
    order: Sequence[Unit],
    counts: Sequence[int],
) -> list[float]:
    """A measure of the model with more and more units switched off.

    Args:
        model: any module.
        measure: of the model, such as its accuracy on held-out data.
        order: units, the first to go first.
        counts: how many are off at each point of the curve.

    Raises:
        InvalidInput: a count below 0 or above the number of units.
    """
    if wrong := [count for count in counts if not 0 <= count <= len(order)]:
        raise InvalidInput(f"count {wrong[0]}: there are {len(order)} units to switch off")
    curve = []
    for count in counts:
        with ablated(model, list(order[:count])):
            curve.append(float(measure(model)))
    return curve
