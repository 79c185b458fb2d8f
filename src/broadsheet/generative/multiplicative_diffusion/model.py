"""The score model: multiplicative denoising score matching, its explicit and implicit forms."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.generative.multiplicative_diffusion.denoising import DenoisingModel, Diffusion, draw
from broadsheet.generative.multiplicative_diffusion.process import GBMProcess, LogNormalLaw, require_positive


class MultiplicativeScoreModel(DenoisingModel):
    """A network trained as the score of geometric Brownian motion started from positive data.

    The network sees standardized log x_t, not raw x_t: raw values are heavy-tailed once sigma sqrt(t) is beyond 1.

    Args:
        net: ``net(x, t) -> same shape``, or the name and options of one in ``broadsheet.nn.score_networks`` such as
            ``{"name": "ScoreMLP", "dim": 2}``, which is what ``save_pretrained`` needs to rebuild the model.
        process: the forward process, or its options as a dict.
        predicts: ``"noise"``: the net estimates Z and h = -Z / (sigma sqrt t) - 1; ``"score"``: it is the Stein score
            of raw x_t, as in the official code.
        shift: added to the data (official: 1 for images in [0, 1]) and taken off the samples.
        floor: data below it are raised to it (after the shift); None refuses zeros instead.
        bounds: samples are clamped to it, in the data's own scale (official: (0, 1) for images).
        log_mean, log_std: of log x, per feature or channel, where :meth:`fit` is not to measure them.
    """

    def __init__(
        self,
        net: nn.Module | dict[str, Any],
        process: GBMProcess | dict[str, Any] | None = None,
        *,
        predicts: Literal["noise", "score"] = "noise",
        shift: float = 0.0,
        floor: float | None = None,
        bounds: tuple[float, float] | list[float] | None = None,
        log_mean: list | None = None,
        log_std: list | None = None,
    ) -> None:
        super().__init__(net, log_mean, log_std)
        if predicts not in ("noise", "score"):
            raise InvalidInput(f"predicts={predicts!r}: expected 'noise' or 'score'")
        self.process = GBMProcess(**process) if isinstance(process, dict) else process or GBMProcess()
        self.predicts, self.shift, self.floor = predicts, shift, floor
        self.bounds = None if bounds is None else (bounds[0], bounds[1])

    def arguments(self) -> dict[str, Any]:
        p = self.process
        return {
            "process": {"mu": p.drift, "sigma": p.sigma, "T": p.T},
            "predicts": self.predicts,
            "shift": self.shift,
            "floor": self.floor,
            "bounds": None if self.bounds is None else list(self.bounds),
            "log_mean": self.mean.tolist(),
            "log_std": self.std.tolist(),
        }

    # --- data -----------------------------------------------------------------------------------------------------

    def prepare(self, x: Tensor) -> Tensor:
        """The user's data as the process sees them: shifted, then raised to the floor."""
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise InvalidInput(f"x has dtype {x.dtype}: convert integer images with x.float() / 255 and give shift=1")
        x = x + self.shift
        return x if self.floor is None else x.clamp_min(self.floor)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`prepare` (a floor cannot be undone) and clamp to the bounds."""
        x = x - self.shift
        return x if self.bounds is None else x.clamp(*self.bounds)

    @property
    def diffusion(self) -> Diffusion:
        return Diffusion(self.process.sigma, self.process.log_drift, self.process.T)

    def coordinate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        require_positive("x", x)
        y = x.log()
        return y, -y.flatten(1).sum(1)

    def set_statistics(self, x0: Tensor) -> None:
        """Take mean and deviation of log x0 from the user's data; warns when sigma does not suit them."""
        super().set_statistics(x0)
        spread, reach = float(self.std.square().mean().sqrt()), self.process.sigma * self.process.T**0.5
        if reach < 0.5 * spread:
            warnings.warn(
                f"std of log x is {spread:.3g} but the process adds only sigma sqrt(T) = {reach:.3g}: the start of "
                f"sampling will not look Gaussian in log x; use sigma of about {spread / self.process.T**0.5:.2g}",
                stacklevel=2,
            )

    def terminal(self) -> LogNormalLaw:
        """Where sampling starts: the log-normal law of the data diffused to T."""
        return self.process.law(self.mean, self.std, self.process.T)

    # --- scores ---------------------------------------------------------------------------------------------------

    def noise_estimate(self, y: Tensor, t: object) -> Tensor:
        t = self.process.positive_time(t, y)
        if self.predicts == "score":
            x = y.exp()
            return -self.process.sigma * t.sqrt() * (x * self._call(x, t) + 1)
        return super().noise_estimate(y, t.flatten())

    def hyvarinen_score(self, x: Tensor, t: object) -> Tensor:
        """h = x grad log p_t(x), elementwise, of positive x (B, ...) at times t > 0."""
        t = self.process.positive_time(t, x)
        return -self.noise_estimate(x.log(), t.flatten()) / (self.process.sigma * t.sqrt()) - 1

    def stein_score(self, x: Tensor, t: object) -> Tensor:
        """grad log p_t(x) = h / x."""
        return self.hyvarinen_score(x, t) / x

    # --- losses ---------------------------------------------------------------------------------------------------

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, weighting: str = "official") -> Tensor:
        """The M-DSM loss at given times and noise, of prepared data.

        sigma^2 t x_t s + log x_t - log x_0 - mu t + 1.5 sigma^2 t, the official residual, equals sigma sqrt(t) times
        the gap between the noise and its estimate.
        """
        self.process.positive_time(t, x0)
        return super().forward(x0, t, noise, weighting)

    def loss(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        weighting: Literal["official", "noise"] = "official",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """M-DSM: the squared gap to the conditional score, summed over values, averaged over the batch.

        Args:
            x0: the user's data (B, ...), before shift and floor.
            t: times in (0, T]; drawn uniformly on [T/1000, T] if None. One time serves noising and target alike (the
                official loop noises at k/N but puts (k+1)/N in the target, an error of order 1/k).
            noise: Z; drawn if None.
            weighting: ``"official"``: (sigma^2 t)^2 on h; ``"noise"``: sigma^2 t, an equal weight on Z at all times.
        """
        x0 = self.prepare(x0)
        t, noise = draw(x0, self.process.T, t, noise, generator=generator)
        return self(x0, t, noise, weighting)

    def esm_loss(self, x: Tensor, t: object, true_score: Tensor) -> Tensor:
        """M-ESM: E |x s_theta - x grad log p_t|^2 where the true Stein score of x (already shifted) is known."""
        return (self.hyvarinen_score(x, t) - x * true_score).square().flatten(1).sum(1).mean()

    def implicit_loss(self, x: Tensor, t: object) -> Tensor:
        """Hyvarinen's loss for non-negative data, E sum 2 x s + x^2 ds/dx + (x s)^2 / 2.

        Exact: one backward pass per value. With y = log x it reads h + dh/dy + h^2 / 2; half of M-ESM up to a constant.
        """
        y = x.log().detach().requires_grad_()
        h = self.hyvarinen_score(y.exp(), t)
        flat = h.flatten(1)
        slope = torch.stack(
            [
                torch.autograd.grad(flat[:, i].sum(), y, create_graph=True)[0].flatten(1)[:, i]
                for i in range(flat.shape[1])
            ],
            dim=1,
        )
        return (flat + slope + 0.5 * flat.square()).sum(1).mean()
