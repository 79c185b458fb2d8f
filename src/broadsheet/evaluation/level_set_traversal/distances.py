"""How far two images are apart, for an eye and for a ruler."""

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from broadsheet.errors import InvalidInput

Perceptual = Callable[[Tensor, Tensor], Tensor]


def structural_similarity(
    x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"], data_range: float | int = 1, window: int = 11
) -> Float[Tensor, " B"]:
    """SSIM with a Gaussian window of standard deviation 1.5, mean over places and channels (Wang et al., 2004).

    Args:
        x, y: ``[B, C, H, W]``.
        data_range: largest possible value less the smallest.
        window: odd side of the window; a smaller one is taken for smaller images.
    """
    side = min(window, x.shape[-2], x.shape[-1])
    side -= 1 - side % 2
    at = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    row = torch.exp(-at.square() / (2 * 1.5**2))
    kernel = torch.outer(row, row) / row.sum().square()
    channels = x.shape[1]
    kernel = kernel.expand(channels, 1, side, side)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=channels)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)


def image_distances(
    x: Tensor, y: Tensor, perceptual: Perceptual | None = None, data_range: float | int = 1
) -> pd.DataFrame:
    """Root mean squared and largest difference, structural similarity and, if handed in, a perceptual distance.

    Args:
        x, y: ``[B, C, H, W]``, or ``[B, ...]`` without the similarity.
        perceptual: ``(x, y) -> [B]``, such as ``lpips.LPIPS(net="alex")`` of the package lpips, whose weights have to
            be on the machine; mind the range of values that it wants.
        data_range: largest possible value less the smallest.

    Returns:
        one row for each pair: ``rmse``, ``linf``, ``ssim`` and ``perceptual``.
    """
    if x.shape != y.shape or x.ndim < 2:
        raise InvalidInput(f"images of shape {tuple(x.shape)} and {tuple(y.shape)}: expected one shape, [B, ...]")
    gap = (x - y).flatten(1).double()
    table = {"rmse": gap.square().mean(1).sqrt(), "linf": gap.abs().max(1).values}
    if x.ndim == 4:
        table["ssim"] = structural_similarity(x, y, data_range)
    if perceptual is not None:
        with torch.no_grad():
            table["perceptual"] = perceptual(x, y).flatten()
    return pd.DataFrame({name: values.detach().cpu().tolist() for name, values in table.items()})
