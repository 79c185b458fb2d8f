"""What a describer says: a sentence for each unit, and all the others that it weighed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.plotting import COLOURS, new_axes

NONE = ""  # what is said of a unit that cannot be described


@dataclass(frozen=True)
class Description:
    """One unit's sentence.

    Attributes:
        name: of the unit.
        text: empty for a unit that cannot be described.
        score: ``log p(d|E) - temperature * log p(d)``, nats; NaN without a sentence.
        log_likelihood, log_prior: its two terms.
        beam: all sentences weighed, as a table.
        attention: ``[words, k]``, how much each word looked at each exemplar.
    """

    name: str
    text: str
    score: float
    log_likelihood: float
    log_prior: float
    beam: pd.DataFrame
    attention: Float[Tensor, "words k"]


@dataclass(frozen=True)
class Descriptions:
    """Sentences for units, with everything that led to them.

    Attributes:
        names: of the units, for people.
        units: layer and number of each, where they are units of a layer; else None.
        alive: ``[units]``, False for those that cannot be described.
        beam: sentences weighed for each unit.
        log_likelihood: ``[units, beam]``, log p(d|E), nats; minus infinity where there was no further sentence.
        log_prior: ``[units, beam]``, log p(d), nats.
        finished: ``[units, beam]``, whether the sentence came to its end within the length allowed.
        temperature: weight of the prior.
        chosen: ``[units]``, which sentence of the beam.
        attention: for each unit ``[words, k]``, of the sentence chosen by the search.
    """

    names: tuple[str, ...]
    units: tuple[tuple[str, int], ...] | None
    alive: Bool[Tensor, " units"]
    beam: tuple[tuple[str, ...], ...]
    log_likelihood: Float[Tensor, "units beam"]
    log_prior: Float[Tensor, "units beam"]
    finished: Bool[Tensor, "units beam"]
    temperature: float
    chosen: Int[Tensor, " units"]
    attention: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def texts(self) -> tuple[str, ...]:
        """The sentences; an empty one for a unit that cannot be described."""
        return tuple(
            beam[int(best)] if alive else NONE
            for beam, best, alive in zip(self.beam, self.chosen, self.alive, strict=True)
        )

    @property
    def score(self) -> Float[Tensor, " units"]:
        """``log p(d|E) - temperature * log p(d)`` of each chosen sentence, nats; NaN where there is none."""
        rows = torch.arange(len(self))
        total = self.log_likelihood[rows, self.chosen] - self.temperature * self.log_prior[rows, self.chosen]
        return torch.where(self.alive, total, torch.nan)

    def __iter__(self) -> Iterator[Description]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Description:
        best = int(self.chosen[i])
        table = pd.DataFrame(
            {
                "text": self.beam[i],
                "log_likelihood": self.log_likelihood[i].tolist(),
                "log_prior": self.log_prior[i].tolist(),
                "score": (self.log_likelihood[i] - self.temperature * self.log_prior[i]).tolist(),
                "finished": self.finished[i].tolist(),
            }
        )
        table = table.loc[np.isfinite(table["log_likelihood"])].sort_values(
            by="score", ascending=False, ignore_index=True
        )
        return Description(
            self.names[i], self.texts[i], float(self.score[i]), float(self.log_likelihood[i, best]),
            float(self.log_prior[i, best]), table, self.attention[i],
        )  # fmt: skip

    def reranked(self, temperature: float | int) -> "Descriptions":
        """The same beams weighed anew: ``log p(d|E) - temperature * log p(d)``; no model is needed.

        Args:
            temperature: weight of the prior (lambda in the paper); 0 takes the likeliest sentence.
        """
        return replace(
            self,
            temperature=float(temperature),
            chosen=best_of(self.log_likelihood, self.log_prior, self.finished, temperature),
        )

    def find(self, pattern: str) -> list[int]:
        """Rows of the units whose sentence matches a regular expression, upper and lower case alike."""
        import re

        found = re.compile(pattern, re.IGNORECASE)
        return [i for i, text in enumerate(self.texts) if text and found.search(text)]

    def to_frame(self) -> pd.DataFrame:
        """One row for each unit: ``unit``, ``text``, ``score``, ``log_likelihood``, ``log_prior``, ``alive``."""
        rows = torch.arange(len(self))
        return pd.DataFrame(
            {
                "unit": self.names,
                "text": self.texts,
                "score": self.score.tolist(),
                "log_likelihood": self.log_likelihood[rows, self.chosen].tolist(),
                "log_prior": self.log_prior[rows, self.chosen].tolist(),
                "alive": self.alive.tolist(),
            }
        )

    @classmethod
    def join(cls, parts: Sequence["Descriptions"]) -> "Descriptions":
        """Descriptions of several layers as one.

        Args:
            parts: made with the same beam width and temperature.
        """
        if not parts:
            raise InvalidInput("parts is empty: hand in the descriptions of at least one layer")
        first = parts[0]
        if any(p.log_prior.shape[1] != first.log_prior.shape[1] or p.temperature != first.temperature for p in parts):
            raise InvalidInput("the parts were made with different beam widths or temperatures")
        units = None if any(part.units is None for part in parts) else tuple(u for p in parts for u in (p.units or ()))
        return cls(
            tuple(name for part in parts for name in part.names), units, torch.cat([p.alive for p in parts]),
            tuple(beam for part in parts for beam in part.beam), torch.cat([p.log_likelihood for p in parts]),
            torch.cat([p.log_prior for p in parts]), torch.cat([p.finished for p in parts]), first.temperature,
            torch.cat([p.chosen for p in parts]), tuple(a for part in parts for a in part.attention),
        )  # fmt: skip

    def plot(self, row: int = 0, n: int = 8, ax: Any = None) -> Any:
        """The best sentences of one unit's beam: what the likelihood gives them, and what the prior takes or adds.

        Args:
            row: which unit.
            n: sentences.
            ax: matplotlib axes.
        """
        table = self[row].beam.head(n)
        ax = new_axes(ax, figsize=(7.2, 0.34 * len(table) + 1.0))
        y = np.arange(len(table))[::-1]
        gain = -self.temperature * table["log_prior"]
        ax.barh(y + 0.18, table["log_likelihood"], 0.34, color=COLOURS["baseline"], label="log p(d|E)")
        ax.barh(y - 0.18, table["score"], 0.34, color=COLOURS["ours"], label="after the prior")
        for at, value, more in zip(y, table["score"], gain, strict=True):
            ax.text(min(float(value), 0) - 0.05, at - 0.18, f"+{more:.1f}", ha="right", va="center", fontsize=7.5)
        ax.set_yticks(y, table["text"])
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("nats")
        ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.3), ncols=2)
        return ax


def best_of(
    log_likelihood: Float[Tensor, "units beam"],
    log_prior: Float[Tensor, "units beam"],
    finished: Bool[Tensor, "units beam"],
    temperature: float | int,
) -> Int[Tensor, " units"]:
    """Which sentence of each beam has the largest ``log p(d|E) - temperature * log p(d)`` (equation 3).

    Sentences that did not come to their end count only where none did: the prior of half a sentence is that of
    something else.

    Raises:
        InvalidInput: a negative temperature.
    """
    if not temperature >= 0:
        raise InvalidInput(f"temperature={temperature}: expected at least 0")
    score = log_likelihood - temperature * log_prior
    score = torch.where(log_likelihood.isfinite(), score, -torch.inf)
    ended = torch.where(finished, score, -torch.inf)
    return torch.where(ended.isfinite().any(1, keepdim=True), ended, score).argmax(1)
