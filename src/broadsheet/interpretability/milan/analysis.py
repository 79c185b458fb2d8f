"""What descriptions are good for: which units matter, which should not be there, and repair by switching those off."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.descriptions import Descriptions
from broadsheet.interpretability.milan.text import grammar, split_words
from broadsheet.nn.ablation import Unit, ablated, ablation_curve
from broadsheet.nn.batches import device_of
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.plotting import COLOURS, new_axes
from broadsheet.nn.progress import SILENT, Progress

Batches = Iterable[tuple[Tensor, Tensor]]
Measure = Callable[[nn.Module], float]
ORDERS = (
    "n_nouns", "n_verbs", "n_adjectives", "n_adpositions", "length", "parse_depth", "max_word_distance", "random",
)  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of pictures whose largest logit is their label's.

    Args:
        model: gives logits ``[batch, classes]``, or an output with ``.logits``.
        batches: pairs of inputs and labels, an iterable that can be gone through again.
    """
    right = total = 0
    device = device_of(model)
    with evaluating(model):
        for inputs, labels in batches:
            output = model(inputs.to(device))
            logits = getattr(output, "logits", output)
            right += int((logits.argmax(1).cpu() == labels.cpu()).sum())
            total += len(labels)
    if not total:
        raise InvalidInput("batches gave nothing: an empty list, or an iterator that has been used up")
    return right / total


def order_by(
    descriptions: Descriptions,
    key: str,
    *,
    nlp: Any = None,
    vectors: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> list[int]:
    """Rows of the described units, those with most of a property of their sentence first; ties by their order.

    Args:
        descriptions: of units of a model.
        key: ``"n_nouns"``, ``"n_verbs"``, ``"n_adjectives"``, ``"n_adpositions"``, ``"length"``, ``"parse_depth"``,
            ``"max_word_distance"`` (the largest squared distance of two words' vectors), ``"similarity_to(word)"``
            (cosine of the mean vector with the word's) or ``"random"``.
        nlp: a spaCy pipeline, for a real parser.
        vectors: of the words, for the two keys that need them; ``describer.word_vectors()`` gives some.
        seed: of ``"random"``.

    Returns:
        rows; units that were not described are left out.
    """
    texts = descriptions.texts
    rows = [i for i, text in enumerate(texts) if text]
    if key == "random":
        return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    if key == "max_word_distance" or key.startswith("similarity_to("):
        if not vectors:
            raise InvalidInput(f"key={key!r} needs vectors=: word -> tensor, such as describer.word_vectors()")
        value: Callable[[str], float] = lambda text: _by_vectors(text, key, vectors)  # noqa: E731
    elif key in ORDERS:
        value = lambda text: float(getattr(grammar(text, nlp), key))  # noqa: E731
    else:
        raise InvalidInput(f"key={key!r}: expected one of {', '.join(ORDERS)} or similarity_to(word)")
    return sorted(rows, key=lambda i: -value(texts[i]))


def _by_vectors(text: str, key: str, vectors: Mapping[str, Tensor]) -> float:
    found = [vectors[word].double() for word in split_words(text) if word in vectors]
    if not found:
        return -1.0
    if key == "max_word_distance":
        return max((float((a - b).square().sum()) for a in found for b in found), default=0.0)
    word = key.removeprefix("similarity_to(").rstrip(")").strip("'\" ").lower()
    if word not in vectors:
        raise InvalidInput(f"{key}: there is no vector of {word!r}")
    return float(torch.cosine_similarity(torch.stack(found).mean(0), vectors[word].double(), dim=0))


@dataclass(frozen=True)
class Importance:
    """Accuracy while more and more units are switched off, in several orders.

    Attributes:
        counts: units off at each point.
        curves: order -> accuracy.
        random: accuracies of random orders, ``[draws, points]``.
    """

    counts: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]
    random: np.ndarray

    def to_frame(self) -> pd.DataFrame:
        """Columns ``order``, ``units`` and ``accuracy``."""
        curves = [*self.curves.items(), *(("random", row.tolist()) for row in self.random)]
        rows = [(key, n, value) for key, curve in curves for n, value in zip(self.counts, curve, strict=True)]
        return pd.DataFrame(rows, columns=["order", "units", "accuracy"])

    def plot(self, ax: Any = None) -> Any:
        """The curves, and the range of the random orders behind them."""
        ax = new_axes(ax)
        ax.fill_between(self.counts, self.random.min(0), self.random.max(0), color=COLOURS["light"], label="random")
        for key, curve in self.curves.items():
            ax.plot(self.counts, curve, label=key.replace("_", " "), marker="o", markersize=3)
        ax.set(xlabel="units switched off", ylabel="accuracy")
        ax.legend()
        return ax


def importance(
    model: nn.Module,
    data: Batches | Measure,
    descriptions: Descriptions,
    order: Sequence[str] = ("n_adjectives", "n_nouns", "length"),
    fractions: Sequence[float] = tuple(i / 100 for i in range(0, 20, 2)),
    *,
    draws: int = 5,
    seed: int = 0,
    progress: Progress = SILENT,
    **how: Any,
) -> Importance:
    """Switch off the units whose sentences have most of a property, and see what that costs (section 4 of the paper).

    Args:
        model: a classifier.
        data: pairs of inputs and labels, or a function from the model to what is measured.
        descriptions: of its units, with layer and number.
        order: keys of :func:`order_by`.
        fractions: of the described units, switched off at each point.
        draws: random orders beside them.
        seed: of these.
        progress: where orders done are shown.
        **how: ``nlp`` and ``vectors`` of :func:`order_by`.
    """
    units = _units(descriptions)
    measure = _measure(data)
    orders = {key: order_by(descriptions, key, **how) for key in order}
    total = len(order_by(descriptions, "random"))
    if total == 0:
        raise InvalidInput("no unit is described: nothing can be put in order")
    counts = tuple(round(share * total) for share in fractions)
    chance = [order_by(descriptions, "random", seed=seed + draw) for draw in range(draws)]
    curves, random = {}, []
    with progress.task("switching units off", total=len(orders) + draws) as task:
        for key, rows in orders.items():
            curves[key] = tuple(ablation_curve(model, measure, [units[i] for i in rows], counts))
            task.advance()
        for rows in chance:
            random.append(ablation_curve(model, measure, [units[i] for i in rows], counts))
            task.advance()
    return Importance(counts, curves, np.array(random).reshape(draws, len(counts)))


@dataclass(frozen=True)
class Audit:
    """Units whose sentence names something.

    Attributes:
        pattern: what was looked for.
        rows: of the descriptions.
        texts: their sentences.
        names: of the units.
        units: layer and number of each; None where the descriptions have none.
        total: units described in all.
    """

    pattern: str
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    names: tuple[str, ...]
    units: tuple[Unit, ...] | None
    total: int

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def share(self) -> float:
        """Of all units described."""
        return self.count / self.total if self.total else 0.0

    def to_frame(self) -> pd.DataFrame:
        """Columns ``unit`` and ``text``."""
        return pd.DataFrame({"unit": self.names, "text": self.texts})


def audit(descriptions: Descriptions, pattern: str) -> Audit:
    """Find the units that a model should not have (faces in a data set with blurred faces; section 5 of the paper).

    Args:
        descriptions: of its units.
        pattern: a regular expression, such as ``"face|head|eye"``.
    """
    rows = descriptions.find(pattern)
    texts = descriptions.texts
    return Audit(
        pattern, tuple(rows), tuple(texts[i] for i in rows), tuple(descriptions.names[i] for i in rows),
        None if descriptions.units is None else tuple(descriptions.units[i] for i in rows),
        sum(bool(text) for text in texts),
    )  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """A repair by switching off units, and what it did.

    Attributes:
        chosen: units switched off, the least harmful first.
        candidates: all units whose sentence names one of the words, in the same order.
        texts: the candidates' sentences.
        alone: validation score with each candidate off alone.
        counts: units off at each point of the curves.
        validation: validation score at each point.
        test: name of a test -> its score at each point.
        all_units: the same with all described units in that order, whatever their words; empty if not asked for.
        random: name of a test -> scores of random units, ``[draws, points]``.
    """

    chosen: tuple[Unit, ...]
    candidates: tuple[Unit, ...]
    texts: tuple[str, ...]
    alone: tuple[float, ...]
    counts: tuple[int, ...]
    validation: tuple[float, ...]
    test: dict[str, tuple[float, ...]]
    random: dict[str, np.ndarray]
    all_units: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> Any:
        """A context manager within which the model is repaired."""
        return ablated(model, list(self.chosen))

    def before(self, test: str) -> float:
        """The score of a test with no unit off."""
        return self.test[test][0]

    def after(self, test: str) -> float:
        """The score of a test with the chosen units off."""
        return self.test[test][self.at]

    @property
    def at(self) -> int:
        """Which point of the curves has just the chosen units off."""
        return self.counts.index(len(self.chosen))

    def to_frame(self) -> pd.DataFrame:
        """One row for each candidate: ``layer``, ``unit``, ``text``, ``alone`` and ``chosen``."""
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in self.candidates],
                "unit": [unit for _, unit in self.candidates],
                "text": self.texts,
                "alone": self.alone,
                "chosen": [i < len(self.chosen) for i in range(len(self.candidates))],
            }
        )

    def plot(self, test: str | None = None, ax: Any = None) -> Any:
        """A test's score over the number of units off, and the band of random units.

        Args:
            test: its name; None for the first.
            ax: matplotlib axes.
        """
        name = test or next(iter(self.test))
        ax = new_axes(ax)
        if len(self.random[name]):
            low, high = np.quantile(self.random[name], [0.025, 0.975], axis=0)
            ax.fill_between(self.counts, low, high, color=COLOURS["light"], label="random units, 95 %")
        if self.all_units:
            ax.plot(self.counts, self.all_units[name], color=COLOURS["baseline"], label="any unit, same order")
        ax.plot(self.counts, self.test[name], color=COLOURS["ours"], label="units named by the words")
        ax.axvline(len(self.chosen), color=COLOURS["neutral"], linestyle=":", linewidth=1)
        ax.set(xlabel="units switched off", ylabel=f"{name} accuracy")
        ax.legend()
        return ax


def edit(
    model: nn.Module,
    descriptions: Descriptions,
    words: Sequence[str],
    val: Batches | Measure,
    test: Batches | Measure | Mapping[str, Any],
    max_units: int = 50,
    *,
    tolerance: float = 0.02,
    draws: int = 5,
    all_units: bool = False,
    points: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Edit:
    """Switch off units that name something spurious (text pasted into pictures; section 6 of the paper).

    Each candidate is switched off alone; then they go together, the one first whose loss alone leaves the highest
    validation score. As many are chosen as leave the validation score within ``tolerance`` of what it was: the test
    decides nothing.

    Args:
        model: a classifier; its weights are not touched.
        descriptions: of its units, with layer and number.
        words: a unit is a candidate if its sentence holds one of them, or a word that begins with it.
        val: pairs of inputs and labels, or a function from the model to a score; pictures as they should be judged.
        test: the same, or several by name.
        max_units: switched off at most.
        tolerance: validation score that may be lost.
        draws: random sets of units beside them.
        all_units: put all described units in order by the same rule, too: one run of ``val`` for each.
        points: at about how many numbers of units the tests are run; None for every number.
        seed: of the random units.
        progress: where units tried are shown.

    Raises:
        InvalidInput: no unit's sentence holds any of the words, or descriptions without layer and number.
    """
    units = _units(descriptions)
    if isinstance(words, str) or not words:
        raise InvalidInput(f"words={words!r}: expected a list such as ['text', 'letter']")
    pattern = r"\b(?:" + "|".join(word.replace(" ", r"\s+") for word in words) + ")"
    rows = descriptions.find(pattern)
    if not rows:
        common = pd.Series([w for text in descriptions.texts for w in split_words(text)], dtype=str).value_counts()
        raise InvalidInput(
            f"no unit's description holds any of {', '.join(words)}: nothing to switch off. Frequent words here: "
            f"{', '.join(map(str, common.index[:8])) or 'none (no unit is described)'}"
        )
    measure = _measure(val)
    given: dict[str, Any] = dict(test) if isinstance(test, Mapping) else {"test": test}  # type: ignore[arg-type]
    tests = {name: _measure(each) for name, each in given.items()}
    described = [i for i, text in enumerate(descriptions.texts) if text]

    def ranked(these: Sequence[int]) -> list[tuple[float, int]]:
        scores = []
        with progress.task("switching units off alone", total=len(these)) as task:
            for i in these:
                with ablated(model, [units[i]]):
                    scores.append((measure(model), i))
                task.advance()
        return sorted(scores, key=lambda pair: (-pair[0], pair[1]))

    alone = ranked(described if all_units else rows)
    named = set(rows)
    mine = [(score, i) for score, i in alone if i in named]
    most = min(max_units, len(mine))
    order = [units[i] for _, i in mine]
    every = ablation_curve(model, measure, order, range(most + 1))
    allowed = next((n - 1 for n in range(most + 1) if every[n] < every[0] - tolerance), most)
    shown = range(most + 1) if points is None else np.linspace(0, most, max(2, points)).round().astype(int).tolist()
    counts = sorted({*shown, allowed})
    validation = [every[n] for n in counts]
    draw = np.random.default_rng(seed)
    chance = [[units[i] for i in draw.permutation(described)[:most]] for _ in range(draws)]
    everything = [units[i] for _, i in alone]
    asked = tests if all_units else {}
    return Edit(
        tuple(order[:allowed]), tuple(order), tuple(descriptions.texts[i] for _, i in mine),
        tuple(score for score, _ in mine), tuple(counts), tuple(validation),
        {name: tuple(ablation_curve(model, each, order, counts)) for name, each in tests.items()},
        {name: np.array([ablation_curve(model, each, row, counts) for row in chance]).reshape(draws, len(counts))
         for name, each in tests.items()},
        {name: tuple(ablation_curve(model, each, everything, counts)) for name, each in asked.items()},
    )  # fmt: skip


def _units(descriptions: Descriptions) -> tuple[Unit, ...]:
    if descriptions.units is None:
        raise InvalidInput("these descriptions are of vectors: units with layer and number are needed here")
    return descriptions.units


def _measure(data: Any) -> Measure:
    if callable(data):
        return lambda model: float(data(model))  # type: ignore[arg-type]  # a Measure
    return lambda model: accuracy(model, data)
