"""Output nodes: how few parts that act directly on the answer do the task."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch, check_pair
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.effects import all_nodes
from broadsheet.interpretability.circuit_analysis.skill import decoder_map, metric, parts_of
from broadsheet.nn.attribution import DirectParts
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.progress import SILENT, Progress

SEARCHES = ("ranked", "iterated")


@dataclass(frozen=True)
class OutputNodes:
    """How much of the task is left with only some direct contributions.

    Attributes:
        nodes: all nodes, in the order in which they are taken.
        accuracy: ``[node + 1]``, with the first n contributions from the clean run and all others from the corrupt one.
        loss: ``[node + 1]``, nats over the answers.
        n: how many were asked for, or the fewest that reach the wanted share of the clean accuracy.
        full: the clean accuracy.
    """

    nodes: tuple[str, ...]
    accuracy: Float[Tensor, " counts"]
    loss: Float[Tensor, " counts"]
    n: int
    full: float

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.nodes[: self.n]

    def to_frame(self) -> pd.DataFrame:
        """One row for each number of nodes: the node that came last, accuracy and loss."""
        return pd.DataFrame(
            {
                "n": range(len(self.nodes) + 1),
                "node": ["", *self.nodes],
                "accuracy": self.accuracy.cpu().tolist(),
                "loss": self.loss.cpu().tolist(),
            }
        )

    def plot(self, ax: Any = None, what: str = "accuracy", **line: Any) -> Any:
        """Accuracy (or ``what="loss"``) against the number of nodes that act directly.

        Args:
            ax: matplotlib axes.
            what: ``"accuracy"`` or ``"loss"``.
            **line: handed to ``Axes.plot``.
        """
        from broadsheet.interpretability.circuit_analysis.figures import output_curve

        return output_curve(self, ax, what, **line)


@torch.no_grad()
def output_nodes(
    model: nn.Module | BlockMap,
    clean: ChoiceBatch,
    corrupt: ChoiceBatch,
    recover: float = 0.9,
    *,
    n: int | None = None,
    search: str = "ranked",
    order: list[str] | None = None,
    same_length: bool = True,
    progress: Progress = SILENT,
) -> OutputNodes:
    """Find how few direct contributions answer the questions, all others being those of corrupt prompts.

    Args:
        model: any mapped decoder.
        clean, corrupt, same_length: as in :func:`patch_effects`.
        recover: wanted share of the clean accuracy.
        n: take that many instead.
        search: ``"ranked"`` takes the nodes with the largest mean direct effect; ``"iterated"`` takes, again and again,
            the node that lowers the loss most beside those it has (the final norm's scale moves with every node), and
            at the end drops the nodes that later ones made needless.
        order: nodes in another order, to compare a ranking with; in the place of a search.
        progress: where nodes taken are shown.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    if not 0 < recover <= 1:
        raise InvalidInput(f"recover={recover}: expected a share above 0, at most 1")
    if search not in SEARCHES:
        raise InvalidInput(f"search={search!r}: expected one of {', '.join(SEARCHES)}")
    check_pair(clean, corrupt, same_length)
    the_map = decoder_map(model)
    parts, other = parts_of(the_map, clean), parts_of(the_map, corrupt, warn=False)
    names = list(all_nodes(the_map))
    places = [parts.names.index(name) for name in names]
    if n is not None and not 0 <= n <= len(names):
        raise InvalidInput(f"n={n}: the model has {len(names)} nodes")
    effect = parts.attribute(clean.answers, answer=clean.answer).effects().mean(0)[places]
    ranked = [names[i] for i in effect.argsort(descending=True, stable=True).tolist()]
    full = _right(parts, parts.final, clean)
    if order is not None:
        if set(order) - set(names) or len(set(order)) < len(order):
            raise InvalidInput(f"order={order[:3]}...: expected nodes of the model ({names[0]!r}, ...), each once")
        ranked = [*order, *(name for name in ranked if name not in set(order))]
    elif search == "iterated":
        found = _iterate(parts, other, clean, ranked, recover * full, n, progress)
        ranked = [*found, *(name for name in ranked if name not in set(found))]
    stream, accuracy, loss = other.final, [], []
    for i in range(len(ranked) + 1):
        if i:
            stream = stream + parts.vector(ranked[i - 1]) - other.vector(ranked[i - 1])
        accuracy.append(_right(parts, stream, clean))
        loss.append(metric(parts.logits(stream, clean.answers), clean)[1])
    curve = torch.tensor(accuracy, dtype=torch.float64)
    enough = (curve >= recover * full - 1e-12).nonzero()
    count = n if n is not None else int(enough[0]) if len(enough) else len(ranked)
    return OutputNodes(tuple(ranked), curve, torch.stack(loss), count, full)


def _right(parts: DirectParts, stream: Tensor, batch: ChoiceBatch) -> float:
    return float((parts.logits(stream, batch.answers).argmax(-1) == batch.answer).double().mean())


def _iterate(
    parts: DirectParts, other: DirectParts, clean: ChoiceBatch, names: list[str], wanted: float, n: int | None,
    progress: Progress,
) -> list[str]:  # fmt: skip
    """Nodes taken one by one by the loss that is left, until accuracy (or number) is reached; then the needless go."""
    change = {name: parts.vector(name) - other.vector(name) for name in names}
    stream, chosen = other.final, list[str]()
    with progress.task("output nodes", total=n) as task:
        while len(chosen) < (len(names) if n is None else n):
            if n is None and _right(parts, stream, clean) >= wanted:
                break
            left = [name for name in names if name not in chosen]
            losses = [float(metric(parts.logits(stream + change[name], clean.answers), clean)[1]) for name in left]
            best = left[min(range(len(left)), key=losses.__getitem__)]
            chosen.append(best)
            stream = stream + change[best]
            task.advance(1, loss=min(losses))
    if n is not None:
        return chosen
    for name in list(chosen):
        if _right(parts, stream - change[name], clean) >= wanted:
            chosen.remove(name)
            stream = stream - change[name]
    return chosen
