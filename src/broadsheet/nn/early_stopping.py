"""Stop a training when a score on held-out data no longer rises, and give back the weights that were best.

    keeper = BestWeights(score, every=len(loader), patience=4)
    keeper.fit(model, loss, loader, steps=100 * len(loader), optimizer=optimizer, checkpoint=folder)

The weights are copied when they are best. (A plain ``state_dict()`` holds references, so that what one "restores" from
it are the last weights.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.training import TrainingReport, fit


class _Enough(Exception):
    """The score has not risen for too long."""


class BestWeights:
    """Keeps the best weights of a training and ends it when there have been no better ones for a while.

    Args:
        score: of the model in evaluation mode; higher is better.
        every: optimizer steps between two looks at it.
        patience: looks without a better score before the training ends.

    Attributes:
        history: score at each look, by step.
        best_step: the step of the best score; 0 before the first look.
    """

    def __init__(self, score: Callable[[nn.Module], float], every: int, patience: int = 4) -> None:
        if every < 1 or patience < 1:
            raise InvalidInput(f"every={every}, patience={patience}: must be at least 1")
        self.score, self.every, self.patience = score, every, patience
        self.history: dict[int, float] = {}
        self.best: dict[str, torch.Tensor] = {}
        self._folder: Path | None = None

    @property
    def best_step(self) -> int:
        return max(self.history, key=lambda step: (self.history[step], -step), default=0)

    @property
    def exhausted(self) -> bool:
        """Whether the last ``patience`` looks brought nothing better."""
        return sum(step > self.best_step for step in self.history) >= self.patience

    def __call__(self, step: int, model: nn.Module) -> None:
        """The callback of :func:`broadsheet.nn.training.fit`."""
        if step % self.every or step in self.history:
            return
        with evaluating(model), torch.no_grad():
            value = float(self.score(model))
        self.history[step] = value
        if self.best_step == step:
            self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if self._folder is not None:
            save_tree(self._folder, {"history": self.history, "best": self.best})
        if self.exhausted:
            raise _Enough

    def fit(self, model: nn.Module, loss_fn: Any, batches: Any, *, restore: bool = True, **how: Any) -> TrainingReport:
        """Train with :func:`broadsheet.nn.training.fit` until the score stops rising or the steps are done.

        Args:
            model, loss_fn, batches: as there.
            restore: leave the best weights in the model; False leaves the last ones.
            **how: the other arguments of ``fit``; with ``checkpoint`` the best weights are kept there as well.
        """
        losses: list[torch.Tensor] = []  # on their device: reading each one would make a GPU wait
        checkpoint = how.get("checkpoint")
        if checkpoint is not None:
            self._folder = Path(checkpoint) / "best"
            if self._folder.exists():
                kept = load_tree(self._folder)[0]
                device = next(model.parameters()).device
                self.history = dict(kept["history"])
                self.best = {name: tensor.to(device) for name, tensor in kept["best"].items()}
            how.setdefault("checkpoint_every", self.every)
        report = TrainingReport([], 0)

        def noted(wrapped: Any, batch: Any) -> torch.Tensor:
            loss = loss_fn(wrapped, batch)
            losses.append(loss.detach())
            return loss

        if not self.exhausted:
            try:
                report = fit(model, noted, batches, callback=self, **how)
            except _Enough:
                report = TrainingReport([float(loss) for loss in losses], 0)
        model.eval()
        if restore and self.best:
            model.load_state_dict(self.best)
        return report
