"""What codes have in common: near codes, and predictions of inputs that share one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.codebook_features.index import codes
from broadsheet.interpretability.codebook_features.model import CodebookModel
from broadsheet.nn.divergence import js_divergence
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.plotting import COLOURS, new_axes, style
from broadsheet.nn.quantization import similar_rows
from broadsheet.nn.seeding import generator


def similar_codes(cb: CodebookModel, site: str, code: int, n: int = 10) -> pd.DataFrame:
    """The codes whose vectors are nearest to one code's.

    Args:
        cb: of ``wrap_codebooks``.
        site, code: which.
        n: how many.

    Returns:
        columns ``code`` and ``cosine``.
    """
    cb.where(site, code)
    ids, cosine = similar_rows(cb.codebook(site), code, n)
    return pd.DataFrame({"code": ids.tolist(), "cosine": cosine.tolist()})


@dataclass(frozen=True)
class MergedInputs:
    """Do inputs that share a code at one place lead to the same prediction?

    Attributes:
        site: the codebook.
        within: Jensen-Shannon divergence (nats) of pairs of different inputs that share a code.
        random: of random pairs of different inputs.
        shared: share of the inputs that share their code with another.
    """

    site: str
    within: Float[Tensor, " pairs"]
    random: Float[Tensor, " random_pairs"]
    shared: float

    @property
    def ratio(self) -> float:
        """Mean divergence of pairs that share a code over that of random pairs."""
        return float(self.within.mean() / self.random.mean())

    def to_frame(self) -> pd.DataFrame:
        """One row for each pair."""
        kinds = ["within a code"] * len(self.within) + ["random"] * len(self.random)
        return pd.DataFrame({"pair": kinds, "jsd": torch.cat([self.within, self.random]).tolist()})

    def plot(self, ax: Any = None) -> Any:
        """Both distributions as histograms."""
        with style():
            ax = new_axes(ax)
            top = float(torch.cat([self.within, self.random]).max())
            bins = torch.linspace(0, top * 1.02 + 1e-9, 40).tolist()
            for values, colour, label in (
                (self.random, COLOURS["baseline"], "random pairs"),
                (self.within, COLOURS["ours"], "pairs that share a code"),
            ):
                weights = torch.full_like(values, 1 / max(1, len(values)))
                ax.hist(values.tolist(), bins, weights=weights.tolist(), color=colour, alpha=0.65, label=label)
            ax.set(xlabel="Jensen-Shannon divergence of the next token, nats", ylabel="share of pairs")
            ax.legend()
        return ax


@torch.no_grad()
def merged_inputs(
    cb: CodebookModel,
    input_ids: Int[Tensor, "inputs time"],
    sites: Iterable[str] | None = None,
    *,
    position: int = -1,
    max_pairs: int = 2000,
    seed: int = 0,
) -> dict[str, MergedInputs]:
    """Next-token predictions of inputs that share a code, against those of random pairs.

    Args:
        cb: of ``wrap_codebooks``.
        input_ids: different inputs of one length.
        sites: codebooks; None for all.
        position: the column at which codes and predictions are read.
        max_pairs: pairs of either kind at most.
        seed: of the random pairs.

    Returns:
        codebook -> distances; codebooks in which no two inputs share a code are left out.

    Raises:
        InvalidInput: fewer than two inputs.
    """
    if len(input_ids) < 2:
        raise InvalidInput(f"{len(input_ids)} inputs: at least two are needed to compare predictions")
    with evaluating(cb):
        logits = cb.run(input_ids).logits[:, position].float()
    found = codes(cb, input_ids)
    random = generator(seed)
    a = torch.randint(len(input_ids), (max_pairs,), generator=random)
    b = (a + torch.randint(1, len(input_ids), (max_pairs,), generator=random)) % len(input_ids)
    apart = js_divergence(logits[a], logits[b]).cpu()
    out = {}
    for site in cb.sites if sites is None else sites:
        cb.where(site)
        chosen = found[site][:, position].long()
        members = torch.nn.functional.one_hot(chosen, cb.codebook(site).shape[0]).amax(1).float()
        together = ((members @ members.T) > 0).triu(1)
        pairs = together.nonzero().cpu()
        if not len(pairs):
            continue
        pairs = pairs[torch.randperm(len(pairs), generator=random)[:max_pairs]]
        within = js_divergence(logits[pairs[:, 0]], logits[pairs[:, 1]]).cpu()
        shared = float((together | together.T).any(1).double().mean())
        out[site] = MergedInputs(site, within, apart, shared)
    return out
