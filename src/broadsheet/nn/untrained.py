"""The same network with initial weights: what a trained one is compared with."""

from copy import deepcopy
from typing import Any

from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import seeded


def untrained_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """A network of the same architecture whose weights are drawn anew, in evaluation mode, on the model's device.

    Hugging Face models are made from their configuration; in all others every submodule's ``reset_parameters`` is
    called, so what the model's own constructor set differently is not repeated.

    Args:
        model: left as it is.
        seed: of the weights.

    Raises:
        InvalidInput: a submodule has weights but no ``reset_parameters``.
    """
    first = next(model.parameters(), None)
    with seeded(seed):
        if any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
            made: Any = type(model)
            fresh = made(deepcopy(model.config))
        else:
            fresh = deepcopy(model)
            _reset(fresh)
    if first is not None:
        fresh = fresh.to(device=first.device, dtype=first.dtype)
    return fresh.eval()


def _reset(model: nn.Module) -> None:
    covered: set[str] = set()
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in covered)
        if callable(reset):
            reset()
            covered.add(name)
        elif module._parameters and not inside and any(p is not None for p in module._parameters.values()):
            raise InvalidInput(
                f"{name or type(model).__name__} has weights but no reset_parameters(): hand in untrained networks of "
                "your own"
            )
