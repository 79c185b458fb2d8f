"""Projected gradient descent in the input, and training against it: a robust twin of a classifier."""

from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.hooks import evaluating


def pgd_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    steps: int = 5,
    step: float | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near ``x`` on which the loss is larger: signed gradient steps inside a ball of the largest difference.

    Args:
        model: a classifier; run in evaluation mode, left as it was.
        x: ``[B, ...]``, inside the box.
        y: ``[B]``, labels.
        eps: largest difference of an entry.
        steps: of gradient ascent.
        step: its size; None for ``2.5 eps / steps``.
        box: of valid entries, or None.
        generator: of the random start inside the ball, on the CPU; None starts at ``x``.

    Source: Madry et al., arXiv:1706.06083.
    """
    if not eps > 0 or steps < 1:
        raise InvalidInput(f"eps={eps}, steps={steps}: expected a positive distance and at least one step")
    size = 2.5 * eps / steps if step is None else step
    moved = x.detach().clone()
    if generator is not None:
        moved = moved + (2 * torch.rand(x.shape, generator=generator) - 1).to(x) * eps
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            moved = _inside(moved, x, eps, box).requires_grad_()
            loss = nn.functional.cross_entropy(model(moved), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + size * gradient.sign()
    return _inside(moved, x, eps, box)


def _inside(moved: Tensor, x: Tensor, eps: float, box: tuple[float, float] | None) -> Tensor:
    moved = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return (moved if box is None else moved.clamp(*box)).detach()


class AdversarialLoss:
    """Cross-entropy on attacked images, as the ``loss_fn`` of a training loop.

    Args:
        eps, steps: of :func:`pgd_attack`.
        generator: of its random starts.
    """

    def __init__(self, eps: float, steps: int = 5, generator: torch.Generator | None = None) -> None:
        self.eps, self.steps, self.generator = eps, steps, generator

    def __call__(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(
            model(pgd_attack(model, x, y, self.eps, self.steps, None, (0.0, 1.0), self.generator)), y
        )
