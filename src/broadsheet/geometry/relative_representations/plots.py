"""Spaces side by side, and what stitched decoders draw."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.plotting import CYCLE, GRID, new_axes, new_figure

PALETTE = (*CYCLE, "#c97b84", "#4d4d4d", "#b5c689")


def plane(first: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "d 2"]]:
    """Mean and the two main directions of a space, signs fixed."""
    rest = first.double() - first.double().mean(0)
    directions = torch.linalg.svd(rest, full_matrices=False).Vh[:2].T
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return first.double().mean(0), directions * signs


def latent_plot(
    spaces: Mapping[str, Float[Tensor, "n d"]],
    labels: Any = None,
    axes: Any = None,
    size: int | float = 5.0,
    named: bool = False,
) -> Any:
    """Spaces with the same samples in them, side by side, all seen in the plane of the first one.

    Spaces that agree look alike; spaces that are turned look turned, since no other gets a plane of its own.

    Args:
        spaces: title -> ``[n, d]`` latents, all of one width.
        labels: ``[n]`` small integers for the colours.
        axes: one for each; None makes a figure.
        size: of the dots, points squared.
        named: write every label at the mean of its samples.

    Returns:
        the axes.
    """
    widths = {z.shape[1] for z in spaces.values()}
    if len(widths) != 1:
        raise InvalidInput(f"spaces of {sorted(widths)} features: one plane for all needs one width")
    from matplotlib.patheffects import withStroke

    if axes is None:
        _, grid = new_figure(2.4 * len(spaces), 2.6, len(spaces), squeeze=False)
        axes = grid[0]
    first = next(iter(spaces.values()))
    mean, directions = plane(first) if first.shape[1] > 2 else (0.0, torch.eye(first.shape[1], 2).double())
    halo = [withStroke(linewidth=2.5, foreground="white")]
    colours = CYCLE[0] if labels is None else [PALETTE[int(i) % len(PALETTE)] for i in labels]
    for ax, (title, z) in zip(axes, spaces.items(), strict=True):
        points = ((z.detach().cpu().double() - mean) @ directions).numpy()
        ax.scatter(points[:, 0], points[:, 1], s=size, c=colours, linewidths=0, alpha=0.8)
        for label in np.unique(np.asarray(labels)) if named and labels is not None else ():
            at = points[np.asarray(labels) == label].mean(0)
            ax.text(*at, str(label), ha="center", va="center", fontsize=9, weight="bold", path_effects=halo)
        ax.set(title=title, xticks=[], yticks=[])
        ax.set_aspect("equal", "datalim")
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_color(GRID)
            spine.set_visible(True)
    return axes


def reconstruction_plot(rows: Mapping[str, Float[Tensor, "n h w"]], ax: Any = None) -> Any:
    """Images under each other, a row for each decoder; returns the axes.

    Args:
        rows: title -> ``[n, height, width]`` images, drawn from 0 (white) to 1 (black).
        ax: matplotlib axes.
    """
    n, height, width = next(iter(rows.values())).shape
    ax = new_axes(ax, figsize=(0.55 * n + 1.6, 0.55 * len(rows)))
    gap = 1
    sheet = np.zeros((len(rows) * (height + gap) - gap, n * (width + gap) - gap))
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images.detach().cpu().clamp(0, 1).numpy()):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = image
    ax.imshow(sheet, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    middles = [i * (height + gap) + (height - 1) / 2 for i in range(len(rows))]
    ax.set_yticks(middles, list(rows))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax
