"""The rival of codes: single neurons with a threshold, at the outputs of attention and MLPs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.codebook_features.index import CodeIndex
from broadsheet.interpretability.codebook_features.model import CodebookModel
from broadsheet.interpretability.codebook_features.search import LabelScores, check_labels
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.plotting import COLOURS, new_axes, style
from broadsheet.nn.progress import SILENT, Progress

CHUNK = 2**22  # numbers that stand side by side while thresholds are tried


@dataclass(frozen=True)
class NeuronComparison:
    """Codes against the best neuron for the same pattern, at the same recall.

    Attributes:
        table: one row for each pattern: ``pattern``, ``site``, ``code``, ``recall``, ``precision`` (the code's),
            ``neuron_site``, ``neuron``, ``neuron_precision``.
    """

    table: pd.DataFrame

    @property
    def code_precision(self) -> float:
        """Mean over patterns."""
        return float(self.table["precision"].to_numpy().mean())

    @property
    def neuron_precision(self) -> float:
        """Mean over patterns."""
        return float(self.table["neuron_precision"].to_numpy().mean())

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def plot(self, ax: Any = None) -> Any:
        """Precision against recall: each code, and below or above it the best neuron at the same recall."""
        with style():
            ax = new_axes(ax, figsize=(4.8, 4.0))
            t = self.table
            ax.vlines(t["recall"], t["neuron_precision"], t["precision"], color=COLOURS["light"], lw=1, zorder=1)
            ax.scatter(t["recall"], t["precision"], s=26, color=COLOURS["ours"], label="best code", lw=0)
            ax.scatter(t["recall"], t["neuron_precision"], s=20, color=COLOURS["baseline"], label="best neuron", lw=0)
            ax.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), xlabel="recall", ylabel="precision")
            ax.legend(loc="lower left")
        return ax


@torch.no_grad()
def neuron_outputs(
    model: nn.Module, batches: Iterable[Any], sites: Sequence[str] | None = None, progress: Progress = SILENT
) -> dict[str, Float[Tensor, "tokens width"]]:
    """What stands at some places for every token; padding left out, in the order of ``index_codes``.

    Args:
        model: any model with a block map, or a ``CodebookModel``: where it has a bottleneck, its input is given.
        batches: ids ``[batch, time]``, or pairs of them and attention masks.
        sites: components' names; None for the outputs of attention and MLP in every layer.
        progress: where texts read are shown.

    Raises:
        InvalidInput: no token at all, or an unknown place.
    """
    inner = model.model if isinstance(model, CodebookModel) else model
    the_map = block_map(inner)
    if sites is None:
        sites = [
            f"layers.{i}.{part}"
            for i, block in enumerate(the_map.blocks)
            for part, there in (("attn", block.attention), ("mlp", block.mlp))
            if there is not None
        ]
    snapped = {p.name: p for p in model.places} if isinstance(model, CodebookModel) and model.snap else {}
    device = next(inner.parameters()).device
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}
    found = [the_map.resolve(site) for site in sites]

    def read() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
            with evaluating(inner), capture(inner, found) as seen:
                if padded.attention_mask is None:
                    inner(padded.input_ids)
                else:
                    inner(padded.input_ids, attention_mask=padded.attention_mask)
            values = dict(seen)
            for name in snapped.keys() & values.keys():
                raw: Any = model.latest[name].inputs  # type: ignore[union-attr]
                values[name] = raw.reshape(values[name].shape)
            real = torch.ones_like(padded.input_ids) if padded.attention_mask is None else padded.attention_mask
            yield values, real.bool()

    def all_of_it() -> None:
        with progress.task("neurons of texts") as task:
            for values, real in read():
                for site in kept:
                    kept[site].append(values[site][real].float())
                task.advance(len(real))

    if isinstance(model, CodebookModel) and snapped:
        with model.keeping_inputs():
            all_of_it()
    else:
        all_of_it()
    if not all(kept.values()):
        raise InvalidInput("batches is empty: hand in token ids [batch, time]")
    return {site: torch.cat(parts) for site, parts in kept.items()}


def neuron_scores(values: dict[str, Float[Tensor, "tokens width"]], labels: Int[Tensor, " tokens"]) -> LabelScores:
    """For every label the neuron, sign and threshold that find its tokens best (F1).

    Args:
        values: site -> activations, such as :func:`neuron_outputs` gives.
        labels: of every token; below 0 for none.
    """
    n_labels = check_labels(labels)
    wanted = torch.nn.functional.one_hot(labels.clamp_min(0), n_labels).bool() & (labels >= 0)[:, None]
    out: dict[str, list[Tensor]] = {}
    for site, x in values.items():
        rows = torch.tensor(_best(x, wanted, lambda tp, n, total: 2 * tp / (n + total))).T
        out[site] = [rows[0], rows[1], rows[2], rows[3].long()]
    return LabelScores(*({site: values[i] for site, values in out.items()} for i in range(4)))


def best_neuron(
    values: dict[str, Float[Tensor, "tokens width"]], wanted: Bool[Tensor, " tokens"], recall: float
) -> tuple[str, int, float]:
    """The neuron with the highest precision for some tokens among thresholds that reach a recall.

    Either sign of a neuron counts, and every threshold from the wanted recall up: what suits the neuron best.

    Returns:
        site, neuron and precision.
    """
    enough = recall * int(wanted.sum()) - 1e-6

    def precise(tp: Tensor, n: Tensor, total: int) -> Tensor:
        return torch.where(tp >= enough, tp / n, -1.0)

    best = ("", -1, -1.0)
    for site, x in values.items():
        score, _, _, unit = _best(x, wanted[:, None], precise)[0]
        if score > best[2]:
            best = (site, int(unit), float(score))
    return best


def compare_with_neurons(
    index: CodeIndex,
    patterns: dict[str, Any] | Sequence[str],
    values: dict[str, Float[Tensor, "tokens width"]],
    **search: Any,
) -> NeuronComparison:
    """For each pattern the code with the best F1, and the neuron most precise at that code's recall.

    Args:
        index: of ``index_codes``.
        patterns: regular expressions, or name -> anything that ``search_codes`` takes.
        values: neurons on the same texts, of :func:`neuron_outputs`: this model's, or a plain one's.
        **search: handed to ``search_codes``.

    Raises:
        InvalidInput: neurons of other texts, or no code for any pattern.
    """
    named = patterns if isinstance(patterns, dict) else {pattern: pattern for pattern in patterns}
    wrong = [site for site, x in values.items() if len(x) != len(index)]
    if wrong:
        raise InvalidInput(f"{wrong[0]!r} has {len(values[wrong[0]])} tokens, the index {len(index)}: other texts?")
    rows = []
    for name, pattern in named.items():
        mask = index.matches(pattern, search.get("where", "overlap"))
        found = index.search_codes(mask, **search).table
        if not len(found):
            continue
        code = found.iloc[0]
        site, neuron, precision = best_neuron(values, mask, float(code["recall"]))
        rows.append(
            (name, code["site"], int(code["code"]), code["recall"], code["precision"], site, neuron, precision)
        )  # fmt: skip
    if not rows:
        raise InvalidInput(f"no code is precise enough for any of {len(named)} patterns: lower min_precision")
    columns = ["pattern", "site", "code", "recall", "precision", "neuron_site", "neuron", "neuron_precision"]
    return NeuronComparison(pd.DataFrame(rows, columns=columns))


def _best(x: Tensor, wanted: Tensor, score: Any) -> list[tuple[float, float, float, int]]:
    """For each set of tokens, a column of ``wanted``, the best of all neurons, signs and thresholds.

    Returns:
        score, precision, recall and neuron of each.
    """
    wanted = wanted.to(x.device)
    totals = wanted.sum(0).tolist()
    best = [(-1.0, 0.0, 0.0, 0)] * len(totals)
    step = max(1, CHUNK // len(x))
    n = torch.arange(1, len(x) + 1, device=x.device, dtype=torch.float32)[:, None]
    for first in range(0, x.shape[1], step):
        part = x[:, first : first + step]
        for sign in (1.0, -1.0):  # a neuron may mean something by being low
            value, order = (sign * part).sort(dim=0, descending=True)
            # Equal values are above a threshold together or not at all.
            between = torch.zeros_like(value, dtype=torch.bool)
            between[:-1] = value[:-1] == value[1:]
            for label, total in enumerate(totals):
                if total == 0:
                    continue
                tp = wanted[:, label][order].cumsum(0).float()
                table = score(tp, n, total).masked_fill_(between, -1)
                row, column = divmod(int(table.argmax()), table.shape[1])
                if float(table[row, column]) > best[label][0]:
                    hits = float(tp[row, column])
                    best[label] = (float(table[row, column]), hits / (row + 1), hits / total, first + column)
    return best
