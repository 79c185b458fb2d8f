"""What a catalogue file may hold. One TOML file per paper is validated against :class:`Paper`."""

import re
from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

FIELDS = (
    "interpretability",
    "evaluation",
    "geometry",
    "generative",
    "fields",
    "dynamics",
    "recordings",
    "learning",
    "architectures",
    "diagrams",
)

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
# Prose is wrapped in the files where its editor pleases: the line breaks are not part of it.
Prose = Annotated[Text, AfterValidator(lambda text: " ".join(text.split()))]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


def _field_name(value: str) -> str:
    # A third-party package may bring a field of its own; ours are fixed so that a typing slip is caught.
    if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
        raise ValueError(f"{value!r} is no field name: lower-case letters, digits and underscores, as in {FIELDS[0]!r}")
    return value


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reported(_Entry):
    """One figure that the paper itself reports: never ours.

    ``source`` says where it was read, where that is not plain. ``checked = false`` marks a figure that has been carried
    over from elsewhere and not yet been compared with the paper, its abstract or its authors' repository.
    """

    metric: Text
    value: Text
    dataset: str = ""
    baseline: str = ""
    baseline_value: str = ""
    note: str = ""
    source: str = ""
    checked: bool = True

    @property
    def remark(self) -> str:
        """What a reader should see beside the figure: note, source and whether it still has to be checked."""
        parts = [self.note, self.source and f"from {self.source}", "" if self.checked else "not yet checked"]
        return "; ".join(part for part in parts if part)


class Claim(_Entry):
    """A sentence that a measurement can bear out or contradict.

    A claim compares *ours* with a *baseline* measured in the same run and seed, or with the fixed ``threshold``.
    ``effect`` says how the two are compared and ``margin`` what must be exceeded, in the direction of ``better``:

    * ``effect = "difference"``: ours - baseline must exceed ``margin`` (``better = "higher"``), or baseline - ours must
      (``better = "lower"``); the margin defaults to 0 and has the metric's unit.
    * ``effect = "ratio"``: ours / baseline must lie above ``margin`` (higher) or below it (lower); defaults to 1.
    """

    id: Slug
    sentence: Prose
    metric: Text
    unit: str = ""
    better: Literal["higher", "lower"]
    effect: Literal["difference", "ratio"] = "difference"
    margin: float | None = None
    baseline: Text | None = None
    threshold: float | None = None
    measured: Prose
    paper: str = ""
    paper_baseline: str = ""
    presets: tuple[Literal["small", "full"], ...] = ("small", "full")

    @model_validator(mode="after")
    def _one_comparison(self) -> "Claim":
        if (self.baseline is None) == (self.threshold is None):
            raise ValueError(
                "give either 'baseline' (the name of what is measured beside ours) or 'threshold' (a number)"
            )
        if self.effect == "ratio":
            if self.margin is not None and self.margin <= 0:
                raise ValueError(f"margin={self.margin}: a ratio's margin must be positive")
            if self.threshold is not None and self.threshold <= 0:
                raise ValueError(f"threshold={self.threshold}: a ratio needs a positive threshold")
        return self

    @property
    def bar(self) -> float:
        """The margin, with its default (0 for a difference, 1 for a ratio) filled in."""
        return self.margin if self.margin is not None else (1.0 if self.effect == "ratio" else 0.0)


class Caveat(_Entry):
    """What a sceptic should know before trusting the paper or its code, with the claim of ours that measures it."""

    id: Slug
    text: Prose
    shown_by: Slug | None = Field(default=None, description="id of the claim whose measurement shows the caveat")


def _identifier(value: str) -> str:
    if not re.fullmatch(r"\d{4}\.\d{4,5}", value):
        raise ValueError(f"{value!r} is no arXiv id without version, such as '2407.00886'")
    return value


def _drawing(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", value):
        raise ValueError(f"{value!r} names no figure of a published result: 'slug/figure' is expected")
    return value


class Paper(_Entry):
    """One catalogue entry: the facts, our summary, the paper's figures and, where the method is built, its claims.

    ``drawings`` names figures in other papers' published results (``"slug/figure"``) that show this paper's
    architecture: they stand at the end of its own.
    """

    slug: Slug
    title: Text
    authors: Annotated[tuple[Text, ...], Field(min_length=1)]
    published: date
    arxiv: Annotated[str, AfterValidator(_identifier)]
    venue: str = ""
    code: str = ""
    licence: str = ""
    field: Annotated[str, AfterValidator(_field_name)]
    tagline: Prose
    summary: Prose
    topics: tuple[Text, ...] = ()
    reported: tuple[Reported, ...] = ()
    module: str = ""
    experiment: str = ""
    snippet: str = ""
    claims: tuple[Claim, ...] = ()
    caveats: tuple[Caveat, ...] = ()
    drawings: tuple[Annotated[str, AfterValidator(_drawing)], ...] = ()

    @property
    def built(self) -> bool:
        """Whether the method is in the library (``module`` names where)."""
        return bool(self.module)

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    def claim(self, claim_id: str) -> Claim:
        """The claim of that id; KeyError with the known ids otherwise."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise KeyError(f"{self.slug} has no claim {claim_id!r}; its claims: {', '.join(c.id for c in self.claims)}")

    @model_validator(mode="after")
    def _whole(self) -> "Paper":
        ids = [claim.id for claim in self.claims]
        if repeated := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"claims: the ids {sorted(repeated)} stand more than once")
        for caveat in self.caveats:
            if caveat.shown_by is not None and caveat.shown_by not in ids:
                raise ValueError(
                    f"caveats: {caveat.id!r} is shown_by {caveat.shown_by!r}, which is no claim of this paper"
                )
        if self.built and not (self.claims and self.experiment and self.snippet):
            raise ValueError("module: a built paper needs claims, an experiment and a snippet too")
        if self.built and not self.caveats:
            raise ValueError("module: a built paper needs its caveats (at least one)")
        return self
