"""What a multiplicative and an additive diffusion share: a coordinate y that is noised, a net that sees it, training.

In its coordinate (y = log x, or x itself) either process is dY = drift dt + sigma dW, so that y_t = y_0 + drift t +
sigma sqrt(t) Z, and either net estimates Z. One loop trains both, so that a comparison is of the models alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.generative.multiplicative_diffusion.process import along, statistics
from broadsheet.nn import score_networks
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator as make_generator
from broadsheet.nn.training import ExponentialMovingAverage, TrainingReport, cosine_schedule, fit

_NETS = {"ScoreMLP", "ResidualMLP", "ScoreUNet"}
EARLIEST = 1e-3  # of the whole time: nearer to the data no net is trained, and no sampler goes (the paper's level 1)


class Diffusion(NamedTuple):
    """dY = drift dt + sigma dW up to the time ``end``."""

    sigma: float
    drift: float
    end: float


class DenoisingModel(nn.Module, PyTorchModelHubMixin, ABC):
    """A net trained to estimate the noise Z in y_t; the net sees y_t standardized, and t.

    Args:
        net: ``net(x, t) -> same shape``, or the name and options of one in ``broadsheet.nn.score_networks`` such as
            ``{"name": "ScoreMLP", "dim": 2}``, which is what ``save_pretrained`` needs to rebuild the model.
        mean, std: of y, per feature or channel, where :meth:`fit` is not to measure them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module | dict[str, Any], mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.options = {} if isinstance(net, nn.Module) else dict(net)
        if isinstance(net, dict):
            options = dict(net)
            name = options.pop("name", None)
            if name not in _NETS:
                raise InvalidInput(f"net name {name!r}: expected one of {', '.join(sorted(_NETS))}")
            net = getattr(score_networks, name)(**options)
        self.net: nn.Module = net  # pyright: ignore
        self.register_buffer("mean", torch.tensor(0.0 if mean is None else mean))
        self.register_buffer("std", torch.tensor(1.0 if std is None else std))

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the class is called with, beside the net, to build the same model again; JSON."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Save weights (safetensors) and what rebuilds the model (config.json).

        Raises:
            InvalidInput: the net is a module of your own.
        """
        if not self.options:
            raise InvalidInput("a model around a net of your own cannot be rebuilt from a file: give net as a dict")
        return super().save_pretrained(save_directory, config={"net": self.options, **self.arguments()}, **kwargs)

    @property
    @abstractmethod
    def diffusion(self) -> Diffusion:
        """The process in the coordinate y."""

    def prepare(self, x: Tensor) -> Tensor:
        """The user's data as the process sees them."""
        return x

    @abstractmethod
    def coordinate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y of prepared data, and log |dy/dx| summed over each point's values, (B,)."""

    def set_statistics(self, x0: Tensor) -> None:
        """Take mean and deviation of y from the user's data."""
        mean, std = statistics(self.coordinate(self.prepare(x0))[0])
        self.mean, self.std = mean.to(self.mean.device), std.clamp_min(1e-4).to(self.std.device)

    def noise_estimate(self, y: Tensor, t: object) -> Tensor:
        """E[Z | y_t = y] as the net has it: -sigma sqrt(t) times the score of y."""
        sigma, drift, _ = self.diffusion
        t = along(t, y)
        spread = (self.std.square() + sigma**2 * t).sqrt()
        return self._call((y - self.mean - drift * t) / spread, t)

    def _call(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(x, t.flatten())
        if out.shape != x.shape:
            raise InvalidInput(
                f"the net returned shape {tuple(out.shape)} for input {tuple(x.shape)}: they must be equal"
            )
        return out

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, weighting: str = "official") -> Tensor:
        """Denoising score matching at given times and noise (forward, so that it trains under any wrapper)."""
        std = self.diffusion.sigma * along(t, x0).sqrt()
        y_t = self.coordinate(x0)[0] + self.diffusion.drift * along(t, x0) + std * noise
        gap = noise - self.noise_estimate(y_t, t)
        if weighting not in ("official", "noise"):
            raise InvalidInput(f"weighting={weighting!r}: expected 'official' or 'noise'")
        return (gap * std if weighting == "official" else gap).square().flatten(1).sum(1).mean()

    def fit(
        self,
        loader: Iterable[Any],
        steps: int,
        *,
        lr: float = 1e-3,
        cosine: bool = True,
        ema: float | None = 0.99,
        times: Literal["log", "uniform"] = "log",
        weighting: Literal["noise", "official"] = "noise",
        seed: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
        clip_norm: float | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress = SILENT,
    ) -> TrainingReport:
        """Train the net; afterwards the model holds the averaged weights.

        By default all noise levels get an equal say, those near the data too, on which sharp samples depend. The paper
        trains with ``times="uniform", weighting="official"``: one time in a hundred then lies below T / 100, and
        counts for less still.

        Args:
            loader: batches of data, or tuples that begin with them; a list, a DataLoader, or what else can be gone
                through again.
            steps: optimizer steps (official: 300000 of batch 128).
            lr: for Adam, where no ``optimizer`` is given (official: 1e-4).
            cosine: let the learning rate fall to zero along half a cosine.
            ema: decay of the moving average of the weights, None for none (official: 0.999).
            times: t drawn uniformly in log t or in t, on [T/1000, T].
            weighting: as in ``loss``.
            seed: of times and noise.
            optimizer: over the model's parameters.
            clip_norm: largest gradient norm.
            checkpoint: folder to save to and to resume from.
            progress: where steps and losses are shown.
        """
        seen = [first(batch) for batch in islice(loader, 200)]
        if not seen:
            raise InvalidInput("loader is empty, or an iterator that is used up: give a list or a DataLoader")
        self.set_statistics(torch.cat(seen).to(self.mean.device))
        source = make_generator(seed)

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            x0 = self.prepare(first(batch))
            t, noise = draw(x0, self.diffusion.end, times=times, generator=source)
            return model(x0, t, noise, weighting)

        average = None if ema is None else ExponentialMovingAverage(self, ema)
        optimizer = optimizer or torch.optim.Adam(self.parameters(), lr=lr)
        report = fit(
            self,
            loss_fn,
            loader,
            steps=steps,
            optimizer=optimizer,
            scheduler=cosine_schedule(optimizer, steps) if cosine else None,
            ema=average,
            clip_norm=clip_norm,
            checkpoint=checkpoint,
            generators=[source],
            progress=progress,
            description=type(self).__name__,
        )
        if average is not None:
            average.copy_to(self)
        self.eval()
        return report


def first(batch: Any) -> Tensor:
    """The data of a batch that may bring labels with it."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def draw(
    x0: Tensor,
    end: float,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    times: str = "uniform",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Times on [end/1000, end], uniform in t or in log t, and standard normal noise, from the generator's device."""
    source = x0.device if generator is None else generator.device
    if times not in ("log", "uniform"):
        raise InvalidInput(f"times={times!r}: expected 'log' or 'uniform'")
    if t is None:
        u = torch.rand(len(x0), generator=generator, device=source, dtype=x0.dtype)
        t = (end * (EARLIEST ** (1 - u) if times == "log" else EARLIEST + (1 - EARLIEST) * u)).to(x0.device)
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, device=source, dtype=x0.dtype).to(x0.device)
    return t, noise
