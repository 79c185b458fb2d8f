"""The additive counterpart, in x or in log x: variance-exploding denoising score matching (Song et al. 2021).

It is what the multiplicative model is compared with: same nets, same loss, same training, same grid of times.
"""

from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.generative.multiplicative_diffusion.denoising import DenoisingModel, Diffusion
from broadsheet.generative.multiplicative_diffusion.process import require_positive
from broadsheet.nn.seeding import generator as make_generator


class AdditiveScoreModel(DenoisingModel):
    """A variance-exploding diffusion, x_t = x_0 + sigma sqrt(t) Z, whose net estimates Z from standardized x_t.

    Args:
        net: ``net(x, t) -> same shape``, or the name and options of one in ``broadsheet.nn.score_networks``, which is
            what ``save_pretrained`` needs to rebuild the model.
        sigma: noise per square root of time, T = 1.
        log: diffuse log x instead: then the model equals Dale-Langevin diffusion with mu = sigma^2 / 2.
        mean, std: of x (or log x), per feature or channel, where :meth:`fit` is not to measure them.
    """

    def __init__(
        self, net: nn.Module | dict[str, Any], sigma: float, *, log: bool = False, mean: Any = None, std: Any = None
    ) -> None:
        super().__init__(net, mean, std)
        if not sigma > 0:
            raise InvalidInput(f"sigma={sigma}: must be positive")
        self.sigma, self.log = sigma, log

    def arguments(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "log": self.log, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @property
    def diffusion(self) -> Diffusion:
        return Diffusion(self.sigma, 0.0, 1.0)

    def coordinate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.log:
            return x, x.new_zeros(len(x))
        require_positive("x", x)
        return x.log(), -x.log().flatten(1).sum(1)

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], steps: int = 1000, seed: int = 0) -> Tensor:
        """Reverse diffusion by Euler-Maruyama on a uniform grid; the last step adds no noise."""
        source = make_generator(seed, self.mean.device)
        start = torch.randn(shape, generator=source, device=self.mean.device)
        y = self.mean + (self.std.square() + self.sigma**2).sqrt() * start
        d = 1 / steps
        for k in range(steps, 0, -1):
            noise = torch.randn(shape, generator=source, device=y.device) if k > 1 else torch.zeros_like(y)
            y = additive_step(y, -self.noise_estimate(y, k * d) / (self.sigma * (k * d) ** 0.5), d, self.sigma, noise)
        return y.exp() if self.log else y


def additive_step(y: Tensor, score: Tensor, d: float, sigma: float, noise: Tensor, drift: float = 0.0) -> Tensor:
    """One reverse Euler-Maruyama step of dY = drift dt + sigma dW: y + d (sigma^2 score - drift) + sqrt(d) sigma Z."""
    return y + d * (sigma**2 * score - drift) + d**0.5 * sigma * noise
