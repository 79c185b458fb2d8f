"""How good an autoencoder of head outputs is: sparse, faithful, alive; and how well a feature follows a rule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE
from broadsheet.nn.activations import Batch
from broadsheet.nn.hooks import evaluating, replace
from broadsheet.nn.padding import RightPadded, right_padded
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.sparse_autoencoder import DEAD


@dataclass(frozen=True)
class SAEEvaluation:
    """Sparsity and faithfulness over a text.

    Attributes:
        l0: mean number of active features.
        fve: fraction of the variance explained.
        dead_fraction: share of features that were active on less than one token in a million.
        ce_clean, ce_sae, ce_zero: nats for each next token: of the model, with the layer's head outputs rebuilt, and
            with zeros in their place.
        density: ``[features]``, share of tokens on which each is active.
        tokens: how many were encoded.
    """

    l0: float
    fve: float
    dead_fraction: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    density: Float[Tensor, " features"]
    tokens: int

    @property
    def loss_recovered(self) -> float:
        """1 where rebuilding costs nothing, 0 where it costs as much as zeros; NaN where zeros cost nothing."""
        gap = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_sae) / gap if gap != 0 else math.nan

    def to_frame(self) -> pd.DataFrame:
        """All numbers but the densities, one row."""
        names = ("l0", "loss_recovered", "fve", "dead_fraction", "ce_clean", "ce_sae", "ce_zero", "tokens")
        return pd.DataFrame([{name: getattr(self, name) for name in names}])

    def plot(self, ax: Any = None) -> Any:
        """Histogram of densities on a log scale; dead features are counted in the title."""
        from broadsheet.nn.plotting import COLOURS, new_axes

        ax = new_axes(ax)
        alive = self.density[self.density > 0].log10().cpu().numpy()
        ax.hist(alive, bins=40, color=COLOURS["ours"])
        ax.set_xlabel("share of tokens on which a feature is active, log10")
        ax.set_ylabel("features")
        ax.set_title(f"L0 {self.l0:.1f}, loss recovered {self.loss_recovered:.3f}, dead {self.dead_fraction:.1%}")
        return ax


@torch.no_grad()
def evaluate_sae(
    model: nn.Module,
    sae: AttentionSAE,
    batches: Iterable[Batch],
    *,
    skip_first: bool = True,
    progress: Progress = SILENT,
) -> SAEEvaluation:
    """Run a language model three times on each batch: as it is, with its head outputs rebuilt, with zeros.

    Args:
        model: a causal Hugging Face language model (or a registered module that gives logits).
        sae: of one of its layers.
        batches: ids ``[batch, time]``, or pairs of them and attention masks; padding on either side.
        skip_first: leave each text's first token as it is, as in training: its activations are far larger than others'.
        progress: where texts read are shown.

    Raises:
        InvalidInput: an autoencoder of another model, texts without the BOS it expects, or nothing to predict.
    """
    site = sae.check_model(model).resolve(sae.site)
    device = next(model.parameters()).device
    fired = torch.zeros(sae.n_features, dtype=torch.float64, device=device)
    total, square, error, n = torch.zeros(sae.d_in, dtype=torch.float64, device=device), 0.0, 0.0, 0
    losses, predicted = [0.0, 0.0, 0.0], 0
    kept: Tensor | None = None

    def rebuild(x: Tensor) -> Tensor:
        nonlocal total, square, error, n, fired
        assert kept is not None
        f = sae.encode(x)
        rebuilt = sae.decode(f)
        rows = x[kept].double()
        fired += (f[kept] > 0).sum(0)
        total += rows.sum(0)
        square += float(rows.square().sum())
        error += float((rows - rebuilt[kept].double()).square().sum())
        n += len(rows)
        return torch.where(kept[..., None], rebuilt.to(x.dtype), x)

    def zero(x: Tensor) -> Tensor:
        assert kept is not None
        return x.masked_fill(kept[..., None], 0)

    with evaluating(model), progress.task("evaluating the autoencoder") as task:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
            sae.check_texts(padded.input_ids)
            kept = torch.ones_like(padded.input_ids, dtype=torch.bool)
            if padded.attention_mask is not None:
                kept &= padded.attention_mask.bool()
            if skip_first:
                kept[:, 0] = False
            for i, edit in enumerate((None, rebuild, zero)):
                loss, count = _cross_entropy(model, padded, None if edit is None else {site: edit})
                losses[i] += loss
            predicted += count
            task.advance(len(ids))
    if n == 0 or predicted == 0:
        raise InvalidInput("nothing to evaluate: batches is empty, or holds no text of two tokens")
    variance = square - float(total.square().sum()) / n
    density = fired / n
    clean, rebuilt, zeroed = (loss / predicted for loss in losses)
    return SAEEvaluation(
        float(density.sum()), 1 - error / variance if variance > 0 else math.nan,
        float((density <= DEAD).double().mean()), clean, rebuilt, zeroed, density, n,
    )  # fmt: skip


def _cross_entropy(model: nn.Module, padded: RightPadded, edits: dict | None) -> tuple[float, int]:
    """Sum over next tokens, and their number."""
    ids, mask = padded.input_ids, padded.attention_mask
    with replace(model, edits or {}):
        out = model(ids) if mask is None else model(ids, attention_mask=mask)
    logits = getattr(out, "logits", out)
    if logits.ndim != 3:
        raise InvalidInput(f"{type(model).__name__} gives shape {tuple(logits.shape)}: a language model is needed")
    each = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    if mask is not None:
        each = each[mask[:, 1:].flatten().bool()]
    return float(each.double().sum()), len(each)


@dataclass(frozen=True)
class ProxyAgreement:
    """How well "the feature is active" and a rule for tokens agree.

    Attributes:
        sensitivity: share of the rule's tokens on which the feature is active.
        specificity: share of the other tokens on which it is not.
        precision: share of the feature's tokens that the rule names.
        weighted_precision: the same with every token weighted by its activation.
        auc: probability that a token of the rule has the larger activation than another one; ties count half.
        by_decile: ``[10]``, precision within tenths of the active tokens, the weakest first; NaN for empty ones.
    """

    sensitivity: float
    specificity: float
    precision: float
    weighted_precision: float
    auc: float
    by_decile: Float[Tensor, " ten"]

    def to_frame(self) -> pd.DataFrame:
        """All numbers but those by decile, one row."""
        names = ("sensitivity", "specificity", "precision", "weighted_precision", "auc")
        return pd.DataFrame([{name: getattr(self, name) for name in names}])

    def plot(self, ax: Any = None) -> Any:
        """Precision from the weakest tenth of activations to the strongest."""
        from broadsheet.nn.plotting import COLOURS, new_axes

        ax = new_axes(ax)
        ax.bar(range(1, 11), self.by_decile.nan_to_num().tolist(), color=COLOURS["ours"], width=0.8)
        ax.set_xlabel("tenth of the active tokens, the weakest first")
        ax.set_ylabel("share that follows the rule")
        ax.set_ylim(0, 1.05)
        ax.set_title(f"sensitivity {self.sensitivity:.2f}, specificity {self.specificity:.3f}")
        return ax


def specificity_sensitivity(
    activations: Float[Tensor, "*tokens"], proxy_mask: Bool[Tensor, "*rule"], threshold: float | int = 0.0
) -> ProxyAgreement:
    """Compare a feature with a rule that says on which tokens it ought to be active.

    Args:
        activations: of the feature, such as ``sae.feature(17).activations(model, ids)``.
        proxy_mask: of the same shape, True where the rule holds.
        threshold: above it a feature counts as active.

    Raises:
        InvalidInput: other shapes, or a rule that holds everywhere or nowhere.
    """
    if activations.shape != proxy_mask.shape:
        raise InvalidInput(
            f"activations have shape {tuple(activations.shape)}, proxy_mask {tuple(proxy_mask.shape)}: one for each "
            "token is expected"
        )
    value, rule = activations.flatten().double(), proxy_mask.flatten().to(activations.device)
    n = int(rule.sum())
    if n in (0, len(rule)):
        raise InvalidInput(f"proxy_mask is True on {n} of {len(rule)} tokens: both kinds of tokens are needed")
    on = value > threshold
    count = int(on.sum())
    strength = value.clamp_min(0) * on
    deciles = torch.full((10,), math.nan, dtype=torch.float64)
    order = value[on].argsort()
    hits = rule[on][order].double()
    for i in range(10):
        part = hits[count * i // 10 : count * (i + 1) // 10]
        if len(part):
            deciles[i] = float(part.mean())
    _, place, size = value.unique(return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    rank = (last - (size.double() - 1) / 2)[place]  # mean rank among equals
    auc = (float(rank[rule].sum()) - n * (n + 1) / 2) / (n * (len(rule) - n))
    return ProxyAgreement(
        float(on[rule].double().mean()), float((~on[~rule]).double().mean()),
        float(rule[on].double().mean()) if count else math.nan,
        float(strength[rule].sum() / strength.sum()) if float(strength.sum()) > 0 else math.nan, auc, deciles,
    )  # fmt: skip
