"""Change features and leave everything else as it is: what the autoencoder does not rebuild is kept beside it.

    x_new = x_hat(edited features) + (x - x_hat(features))

The second part, the error, is a constant for gradients, so that they go through the features. Source: arXiv:2406.17759,
section 4.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE, as_tensor
from broadsheet.nn.attribution import place_of
from broadsheet.nn.hooks import Positions, evaluating, replace
from broadsheet.nn.padding import right_padded

Edit = Callable[[Tensor], Tensor]


@contextmanager
def edit_features(
    model: nn.Module,
    sae: AttentionSAE,
    edit: Edit | None = None,
    positions: Positions = None,
    *,
    error: bool = True,
) -> Iterator[nn.Module]:
    """Features changed inside the block.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        sae: of one of its layers.
        edit: from features ``[batch, time, features]`` to others; None leaves them as they are.
        positions: along time; None for all.
        error: keep what the autoencoder does not rebuild; False runs the model on the reconstruction alone.
    """
    site = sae.check_model(model).resolve(sae.site)

    def change(x: Tensor) -> Tensor:
        f = sae.encode(x)
        new = sae.decode(f if edit is None else edit(f))
        if error:
            new = new + (x.to(new) - sae.decode(f)).detach()
        return new.to(x.dtype)

    with replace(model, {site: change}, positions=positions):
        yield model


def ablate_features(
    model: nn.Module,
    sae: AttentionSAE,
    features: int | Sequence[int] | Tensor,
    positions: Positions = None,
    *,
    error: bool = True,
) -> Any:
    """Features held at 0 inside the block; arguments as in :func:`edit_features`.

    Args:
        model, sae, positions, error: as there.
        features: one index or several.
    """
    index = as_tensor(features, sae)
    return edit_features(model, sae, lambda f: f.index_fill(-1, index, 0), positions, error=error)


@dataclass(frozen=True)
class FeatureEffects:
    """What each live feature does to a metric: the metric without it less the metric.

    Attributes:
        features: ``[n]``, active in at least one text at its position, in order.
        effects: ``[n, batch]``.
        activations: ``[n, batch]``.
        error: ``[batch]``, the effect of leaving out what the autoencoder does not rebuild; NaN where gradients were
            taken.
        metric: ``[batch]``, of the whole model.
    """

    features: Int[Tensor, " n"]
    effects: Float[Tensor, "n batch"]
    activations: Float[Tensor, "n batch"]
    error: Float[Tensor, " batch"]
    metric: Float[Tensor, " batch"]

    def to_frame(self) -> pd.DataFrame:
        """Columns ``feature``, ``effect`` and ``activation`` (means over texts), the largest effect by size first."""
        table = pd.DataFrame(
            {
                "feature": self.features.tolist(),
                "effect": self.effects.mean(1).tolist(),
                "activation": self.activations.mean(1).tolist(),
            }
        )
        return table.sort_values("effect", key=lambda x: -x.abs(), ignore_index=True)

    def plot(self, k: int = 12, ax: Any = None) -> Any:
        """The largest mean effects as bars, with their standard error over texts, and that of the error term.

        Args:
            k: features shown.
            ax: matplotlib axes.
        """
        from broadsheet.nn.plotting import COLOURS, new_axes

        ax = new_axes(ax, figsize=(6.0, 0.8 + 0.28 * (k + 1)))
        mean = self.effects.mean(1)
        order = mean.abs().argsort(descending=True)[:k].tolist()
        rows = [(f"{int(self.features[i])}", self.effects[i]) for i in order]
        if bool(self.error.isfinite().all()):
            rows.append(("error", self.error))
        n = max(1, self.effects.shape[1])
        for place, (name, values) in enumerate(rows):
            spread = float(values.std()) / math.sqrt(n) if n > 1 else 0.0
            colour = COLOURS["neutral" if name == "error" else "ours"]
            ax.barh(place, float(values.mean()), xerr=spread, color=colour, height=0.7, error_kw={"lw": 0.8})
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x")
        ax.axvline(0, color="#1f2328", lw=0.8)
        ax.set_ylabel("feature left out")
        ax.set_xlabel("change of the metric")
        return ax


def feature_effects(
    model: nn.Module,
    sae: AttentionSAE,
    input_ids: Int[Tensor, "batch time"],
    metric: Callable[[Tensor], Tensor],
    position: int | Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    how: str = "ablation",
    max_features: int | None = None,
    batch: int = 64,
) -> FeatureEffects:
    """The effect of every feature that is active, and that of the error term.

    Args:
        model, sae: as in :func:`edit_features`.
        input_ids: ``[batch, time]``.
        metric: from logits ``[batch, time, vocab]`` (in the columns of ``input_ids``) to ``[batch]``.
        position: where features are left out, one column or ``[batch]``; None for everywhere.
        attention_mask: ``[batch, time]``; padding on either side.
        how: ``"ablation"``: one run for each feature; ``"gradient"``: activation times gradient, one run for all.
        max_features: the most active ones only.
        batch: prompts in a run.

    Raises:
        InvalidInput: an unknown way, a metric that does not give one number for each text, or no active feature.
    """
    if how not in ("ablation", "gradient"):
        raise InvalidInput(f"how={how!r}: expected 'ablation' or 'gradient'")
    site = sae.check_model(model).resolve(sae.site)
    padded = right_padded(input_ids, attention_mask)
    n, time = padded.input_ids.shape
    chosen = torch.ones(n, time, dtype=torch.bool, device=input_ids.device)
    if position is not None:
        chosen = torch.zeros_like(chosen)
        chosen[torch.arange(n, device=chosen.device), place_of(padded, position)] = True
    if padded.attention_mask is not None:
        chosen &= padded.attention_mask.bool()
    held: dict[str, Tensor] = {}

    def watch(x: Tensor) -> Tensor:
        f = sae.encode(x).detach()
        if how == "gradient":
            f.requires_grad_()
        held["f"] = f
        rebuilt = sae.decode(f)
        held["error"] = (x - rebuilt).detach()
        return (rebuilt + held["error"]).to(x.dtype)

    def run(times: int) -> Tensor:
        """Logits of the texts, run several times side by side."""
        ids, mask = padded.input_ids.repeat(times, 1), padded.attention_mask
        out = model(ids) if mask is None else model(ids, attention_mask=mask.repeat(times, 1))
        return getattr(out, "logits", out)

    def scored(logits: Tensor) -> Tensor:
        """The metric of the texts; it may know them by their number, so each repetition is scored by itself."""
        value = metric(padded.restore(logits))
        if value.shape != (n,):
            raise InvalidInput(f"the metric gave shape {tuple(value.shape)}: one number for each text is expected")
        return value

    with evaluating(model), replace(model, {site: watch}), torch.set_grad_enabled(how == "gradient"):
        clean = scored(run(1))
    f = held["f"]
    active = torch.where(chosen[..., None], f.detach(), 0)
    strength = active.amax((0, 1))
    alive = (strength > 0).nonzero().flatten()
    if max_features is not None and len(alive) > max_features:
        alive = strength.topk(max_features).indices.sort().values
    if not len(alive):
        raise InvalidInput("no feature is active there: nothing can be left out")
    activations = active[..., alive].sum(1).T
    if how == "gradient":
        (slope,) = torch.autograd.grad(clean.sum(), f)
        effects = -(active * slope)[..., alive].sum(1).T
        return FeatureEffects(
            alive, effects.detach(), activations, torch.full_like(clean, math.nan).detach(), clean.detach()
        )
    effects = clean.new_empty(len(alive), n)
    per_run = max(1, batch // n)
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(alive), per_run):
            some = alive[start : start + per_run]
            kept = chosen.repeat(len(some), 1)
            which = some.repeat_interleave(n)

            def without(x: Tensor, kept: Tensor = kept, which: Tensor = which) -> Tensor:
                read = sae.encode(x).gather(-1, which[:, None, None].expand(-1, time, 1))
                gone = torch.where(kept[..., None], read * sae.W_dec[which][:, None], 0)
                return (x - gone).to(x.dtype)

            with replace(model, {site: without}):
                logits = run(len(some))
            for i, part in enumerate(logits.split(n)):
                effects[start + i] = scored(part) - clean

        def rebuilt(x: Tensor) -> Tensor:
            return torch.where(chosen[..., None], sae(x)[0].to(x.dtype), x)

        with replace(model, {site: rebuilt}):
            error = scored(run(1)) - clean
    return FeatureEffects(alive, effects, activations, error, clean)
