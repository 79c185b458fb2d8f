"""A layer's output as maps, one for each unit: channels of a convolution, or features of a transformer's patches."""

import math

from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput


def as_maps(
    output: Float[Tensor, "..."], layer: str = "the layer", grid: tuple[int, int] | None = None
) -> Float[Tensor, "batch units rows columns"]:
    """Maps ``[batch, units, rows, columns]`` of what a layer gives.

    Args:
        output: ``[batch, units, rows, columns]``, or tokens ``[batch, tokens, units]`` of which the last ones are the
            patches; class and register tokens before them are left out.
        layer: its name, for messages.
        grid: rows and columns of the patches; None for a square, with one class token or none.

    Raises:
        InvalidInput: another shape, or patches that make no square.
    """
    if output.ndim == 4:
        return output
    if output.ndim != 3:
        raise InvalidInput(
            f"{layer!r} gives a tensor of shape {tuple(output.shape)}: expected [batch, units, rows, columns] or "
            "[batch, tokens, units]. Choose a layer before the pooling, or wrap the model so that it gives maps"
        )
    tokens = output.shape[1]
    if grid is not None:
        rows, columns = grid
        if not 0 < rows * columns <= tokens:
            raise InvalidInput(f"grid={grid}: {layer!r} gives {tokens} tokens, fewer than {rows * columns} patches")
    else:
        patches = next((n for n in (tokens - 1, tokens) if n > 0 and math.isqrt(n) ** 2 == n), None)
        if patches is None:
            raise InvalidInput(
                f"{layer!r} gives {tokens} tokens, and neither {tokens} nor {tokens - 1} is a square: hand in "
                "grid=(rows, columns)"
            )
        rows = columns = math.isqrt(patches)
    patches = output[:, tokens - rows * columns :]
    return patches.movedim(1, 2).unflatten(2, (rows, columns))
