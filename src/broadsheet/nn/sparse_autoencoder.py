"""Sparse autoencoders: a dictionary of directions in which activations are sparse.

    f = relu((x - b_dec) W_enc + b_enc),   x_hat = f W_dec + b_dec,   rows of W_dec of length 1
    loss = mean |x - x_hat|^2 + l1 * mean sum f

References: Bricken et al., "Towards Monosemanticity" (2023); Kissane et al. (arXiv:2406.17759), whose training this
is: the decoder's gradient is made orthogonal to its rows, dead features are resampled from badly reconstructed inputs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn

from broadsheet.errors import CheckpointError, InvalidInput, TrainingDiverged
from broadsheet.nn.features import Feature, Projection
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import TrainingReport, fit

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
DEAD = 1e-6  # a feature that fires less often than this is dead


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin):
    """Encoder, decoder and their training.

    Inputs are multiplied by ``scale`` before everything else and reconstructions divided by it, so that ``l1`` means
    the same at every layer of every model; :meth:`fit` sets it such that inputs have the mean norm ``sqrt(d)``.
    Activations and directions are given in the model's own units.

    Args:
        d_in: width of the activations.
        n_features: entries of the dictionary.
        scale: of the inputs; None leaves it to :meth:`fit`, 1 takes them as they are.
        site: the component whose activations these are, such as ``"layers.5.attn.z"``.
        seed: of the initial weights.
    """

    def __init__(
        self, d_in: int, n_features: int, scale: float | int | None = None, site: str = "", seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in {"d_in": d_in, "n_features": n_features}.items():
            if value < 1:
                raise InvalidInput(f"{name}={value}: must be at least 1")
        if scale is not None and not (scale > 0 and math.isfinite(scale)):
            raise InvalidInput(f"scale={scale}: expected a positive number, or None")
        self.site = site
        with seeded(seed):
            rows = nn.init.kaiming_uniform_(torch.empty(n_features, d_in), a=math.sqrt(5))
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone().contiguous())  # tied at the start: small dictionaries need it
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(math.nan if scale is None else float(scale)))

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def _scale(self) -> Tensor:
        return torch.nan_to_num(self.scale, nan=1.0)

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch features"]:
        """How active every feature is, at least 0."""
        self._check(x)
        x = x.to(self.W_enc.dtype)
        if self.training:
            # The same, without the gradient of every input (a whole product of matrices, of which b_dec needs the sum
            # only) and without a pass over all features for the scale.
            return torch.relu(x @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc) / self._scale)
        return self._encode(x * self._scale) / self._scale

    def decode(self, f: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch d"]:
        """The reconstruction of given activations."""
        return f @ self.W_dec + self.b_dec / self._scale

    def forward(self, x: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor]:
        """Reconstruction ``[..., d]`` and features ``[..., features]``."""
        f = self.encode(x)
        return self.decode(f), f

    def _encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def feature(self, index: int, site: str | None = None) -> Feature:
        """One feature for every other method: what it reads, and what it writes at the site.

        Args:
            index: of the feature.
            site: the component's name; None for the one that the autoencoder was made for.
        """
        if not 0 <= index < self.n_features:
            raise InvalidInput(f"feature {index}: the dictionary has {self.n_features} (0 to {self.n_features - 1})")
        where = site or self.site
        if not where:
            raise InvalidInput("this autoencoder does not know its place in a model: hand in site='layers.0.attn.z'")
        reader, scale = self.W_enc[:, index].detach(), float(self._scale)
        bias = float((self.b_enc[index] - self.b_dec @ self.W_enc[:, index]).detach()) / scale
        return Feature(where, self.W_dec[index].detach(), Projection(reader, bias, rectified=True), f"latent {index}")

    def fit(
        self,
        batches: Iterable[Tensor],
        *,
        steps: int,
        l1: float = 1.0,
        lr: float = 1.2e-3,
        betas: tuple[float, float] = (0.0, 0.9999),
        warmup: int = 1000,
        resample_every: int | None = None,
        resamplings: int = 4,
        seed: int = 0,
        progress: Progress = SILENT,
        **how: Any,
    ) -> TrainingReport:
        """Train on batches of activations.

        Args:
            batches: tensors ``[batch, d]``, such as an :class:`~broadsheet.nn.activations.ActivationBuffer`; gone
                through again when they end.
            steps: optimizer steps.
            l1: weight of the sum of activations.
            lr: Adam's; it rises by half a cosine from a tenth over ``warmup`` steps, and again after resampling.
            betas: Adam's.
            warmup: steps.
            resample_every: steps between resamplings of dead features; None for never.
            resamplings: how many at most.
            seed: of the resampling.
            progress: where steps are shown.
            **how: handed to :func:`broadsheet.nn.training.fit` (``checkpoint``, ``mixed_precision``, ...).

        Raises:
            InvalidInput: a number out of range, inputs of another width, all zero or not finite.
            TrainingDiverged: the loss is not finite, or at the end every feature is dead.
        """
        for name, value in {"l1": l1, "lr": lr}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidInput(f"{name}={value}: expected a finite number, at least 0")
        first = next(iter(batches), None)
        if first is None:
            raise InvalidInput("batches is empty: hand in tensors [batch, d]")
        self._check(first)
        if not first.isfinite().all():
            raise InvalidInput("the activations hold NaN or infinite values: read the model in bfloat16 or float32")
        size = first.float().norm(dim=-1).mean()
        if size == 0:
            raise InvalidInput("the activations are all zero: is it the right place, and are they padding?")
        if bool(self.scale.isnan()):
            self.scale.copy_(math.sqrt(self.d_in) / size)
        optimizer = torch.optim.Adam(self.parameters(), lr, betas=betas)
        began = 0  # of the present rise

        def rise(step: int) -> float:
            since = max(0, step - began)
            return 1.0 if since >= warmup else 0.1 + 0.9 * (1 - math.cos(math.pi * since / warmup)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rise)
        random = generator(seed)
        fired = torch.zeros(self.n_features, device=self.W_dec.device)
        seen, done = 0, 0
        stream = _again(batches)

        def loss_fn(model: Any, x: Tensor) -> Tensor:
            nonlocal seen
            rebuilt, f = model(x)
            fired.add_(f.detach().sign().sum(0))
            seen += len(x)
            off = (x.to(rebuilt) - rebuilt) * self._scale
            return off.square().sum(-1).mean() + l1 * self._scale * f.sum(-1).mean()

        def after(step: int, _: nn.Module) -> None:
            nonlocal began, seen, done
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            if resample_every is None or step % resample_every or done == resamplings or step == steps:
                return
            dead = fired <= DEAD * seen
            if bool(dead.any()):
                sample = torch.cat([next(stream).to(self.W_dec) for _ in range(8)])
                self.resample(dead, sample, random, optimizer)
                began, done = step, done + 1
            fired.zero_()
            seen = 0

        handle = self.W_dec.register_hook(self._across)
        try:
            report = fit(
                self, loss_fn, batches, steps=steps, optimizer=optimizer, scheduler=scheduler, callback=after,
                generators=[random], progress=progress, description="sparse autoencoder", **how,
            )  # fmt: skip
        finally:
            handle.remove()
        self.eval()
        if not bool((self.encode(first.to(self.W_enc.device)) > 0).any()):
            raise TrainingDiverged(f"every feature is dead: l1={l1} is too large for these activations, try a tenth")
        return report

    @torch.no_grad()
    def resample(
        self,
        dead: Bool[Tensor, " features"],
        x: Float[Tensor, "batch d"],
        generator: torch.Generator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Give dead features the directions of inputs that are badly reconstructed.

        Inputs are drawn with probabilities proportional to the square of their loss; the decoder's row points to the
        input, the encoder's column likewise with a fifth of the living ones' mean norm, the bias is zero.

        Args:
            dead: which features.
            x: inputs, in the model's units.
            generator: of the draw, on the CPU.
            optimizer: Adam, whose moments of these entries are set to zero.
        """
        n = int(dead.sum())
        if n == 0:
            return
        x = x.to(self.W_dec) * self._scale
        loss = (x - self._encode(x) @ self.W_dec - self.b_dec).square().sum(-1)
        chances = loss.square().double().cpu()
        if float(chances.sum()) == 0:
            return  # all is reconstructed perfectly: nothing is left to learn
        chosen = torch.multinomial(chances, n, replacement=n > int((chances > 0).sum()), generator=generator)
        rows = x[chosen.to(x.device)] - self.b_dec
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        alive = self.W_enc[:, ~dead].norm(dim=0)
        size = 0.2 * (alive.mean() if len(alive) else torch.ones((), device=x.device))
        self.W_dec[dead] = rows
        self.W_enc[:, dead] = (rows * size).T
        self.b_enc[dead] = 0
        for parameter, index in ((self.W_dec, (dead,)), (self.W_enc, (slice(None), dead)), (self.b_enc, (dead,))):
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment][index] = 0

    def _across(self, gradient: Tensor) -> Tensor:
        """The decoder's gradient without its part along the rows: their length is not learned."""
        rows = self.W_dec.detach()
        return gradient - (gradient * rows).sum(1, keepdim=True) * rows

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise InvalidInput(f"activations have {x.shape[-1]} features, this autoencoder takes {self.d_in}")

    @torch.no_grad()
    def statistics(self, batches: Iterable[Tensor]) -> dict[str, Any]:
        """Sparsity and reconstruction over batches ``[batch, d]``.

        Returns:
            ``l0`` (mean number of active features), ``fve`` (fraction of variance explained), ``dead_fraction``, and
            ``density`` ``[features]``, the share of inputs on which each is active.
        """
        fired = torch.zeros(self.n_features, dtype=torch.float64, device=self.W_dec.device)
        n, error, total, square = 0, 0.0, torch.zeros(self.d_in, dtype=torch.float64, device=self.W_dec.device), 0.0
        for x in batches:
            x = x.to(self.W_dec)
            rebuilt, f = self(x)
            fired += (f > 0).sum(0)
            error += float((x - rebuilt).double().square().sum())
            total += x.double().sum(0)
            square += float(x.double().square().sum())
            n += len(x)
        if n == 0:
            raise InvalidInput("batches is empty: hand in tensors [batch, d]")
        variance = square - float(total.square().sum()) / n
        density = fired / n
        return {
            "l0": float(density.sum()),
            "fve": 1 - error / variance if variance > 0 else math.nan,
            "dead_fraction": float((density <= DEAD).double().mean()),
            "density": density,
        }

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Weights (safetensors) and what rebuilds the autoencoder (config.json)."""
        config = {"d_in": self.d_in, "n_features": self.n_features, "site": self.site}
        return super().save_pretrained(save_directory, config=config, **kwargs)

    def save_saelens(self, folder: str | Path, *, reshape: str = "none", **about: Any) -> None:
        """Write the files that SAELens reads: ``cfg.json`` and ``sae_weights.safetensors``.

        Args:
            folder: made if it is not there.
            reshape: ``"hook_z"`` makes SAELens take and give activations with heads and features of a head apart.
            **about: further entries of ``cfg.json``'s metadata, such as ``model_name`` and ``hook_name``.
        """
        import json

        from safetensors.torch import save_file

        target, scale = Path(folder), self._scale
        target.mkdir(parents=True, exist_ok=True)
        weights = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc / scale, "b_dec": self.b_dec / scale}
        save_file(
            {name: x.detach().cpu().contiguous() for name, x in weights.items()}, target / "sae_weights.safetensors"
        )
        config = {
            "architecture": "standard", "d_in": self.d_in, "d_sae": self.n_features, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": reshape, "metadata": about,
        }  # fmt: skip
        (target / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_saelens(cls, folder: str | Path, site: str = "") -> "SparseAutoencoder":
        """Read what SAELens wrote, of its standard architecture.

        Args:
            folder: with ``cfg.json`` and ``sae_weights.safetensors``.
            site: the component's name here.

        Raises:
            CheckpointError: a file is missing or belongs to another architecture.
        """
        _, weights = read_saelens(folder)
        sae = cls(weights["W_dec"].shape[1], weights["W_dec"].shape[0], scale=1.0, site=site)
        sae.fill(weights)
        return sae

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Copy ``W_enc``, ``W_dec``, ``b_enc`` and ``b_dec`` from elsewhere."""
        for name in NAMES:
            own, value = getattr(self, name), weights[name]
            if own.shape != value.shape:
                raise CheckpointError(f"{name} has shape {tuple(value.shape)}: {tuple(own.shape)} is expected here")
            own.copy_(value)
        self.eval()


def read_saelens(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and weights that SAELens wrote for an autoencoder of its standard architecture.

    Args:
        folder: with ``cfg.json`` and ``sae_weights.safetensors``.

    Returns:
        the configuration as it stands, and ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec`` such that the decoder's bias is
        taken away from the input.

    Raises:
        CheckpointError: a file is missing or belongs to another architecture.
    """
    import json

    from safetensors.torch import load_file

    source = Path(folder)
    try:
        config = json.loads((source / "cfg.json").read_text())
        weights = load_file(source / "sae_weights.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: expected cfg.json and sae_weights.safetensors of SAELens ({error})"
        ) from error
    if config.get("architecture", "standard") != "standard" or set(NAMES) - set(weights):
        raise CheckpointError(
            f"{source}: architecture {config.get('architecture')!r} with {', '.join(sorted(weights))}: only the "
            "standard one (W_enc, W_dec, b_enc, b_dec) is read"
        )
    if config.get("normalize_activations", "none") not in (None, "none"):
        raise CheckpointError(f"{source}: normalize_activations={config['normalize_activations']!r} is not read")
    if config.get("apply_b_dec_to_input", True) is False:  # ours always takes it away first
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    return config, {name: weights[name] for name in NAMES}


def _again(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from batches
