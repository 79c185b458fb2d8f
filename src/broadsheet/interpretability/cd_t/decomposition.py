"""Split a transformer's forward pass into what chosen heads, MLPs or tokens cause and the rest.

Implements contextual decomposition for transformers (CD-T; Hsu, Cherapanamjeri, Odisho, Carroll and Yu, arXiv
2407.00886). The activations of the ordinary forward pass, its attention patterns and the scales of its norms are
computed once. All sources then go through the blocks together, along a leading axis of their own, and only their
relevant part is carried: the rest is the activation minus it, so that both always add up to the model's own
activation: see ``engine``. On the same weights, with ``bias_rule="official"`` and the epsilon that their wrapper wires
in, the authors' functions for GPT-2 and for attention-only models give the same parts to 1e-14. Those for words in
a BERT classifier do to 2e-6, and to 2e-14 once their attention pattern, like that for GPT-2, is made from queries and
keys whose biases were shared.

Where the paper, the authors' code and this module differ:

* the share of biases and the norms' epsilon: see ``rules``; ``bias_rule="official"`` carries both parts as their code
  does.
* gated MLPs, RMSNorm, rotary positions, shared key and value heads and parallel residuals are not in the paper, nor are
  norms of queries, keys and outputs (Qwen 3, Gemma 2 and 3) and soft caps (Gemma 2). Every norm takes its scale from
  the total; the sources' own scores are capped as the total's are; a cap of the logits is an activation.
* MLPs may be sources here, read at their output as heads are at theirs.
* a target's keys and values (``at="key"``, ``"value"``) of one head at one position are those that it reads: each is
  weighed by the head's attention from that position. The key at the position itself would say nothing of an induction
  head.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.cd_t.engine import Metric, Options, Pass, Rules, Run, must
from broadsheet.interpretability.cd_t.nodes import Node, Tokens, check_component, source_sets
from broadsheet.interpretability.cd_t.results import Decomposition, TokenImportance
from broadsheet.nn.blocks import BlockMap, Pool
from broadsheet.nn.progress import SILENT, Progress

PLACES = ("z", "query", "key", "value")
_FIELD = {"z": "z", "query": "q", "key": "k", "value": "v"}

# ------------------------------------------------------------------------------------------------ public functions


def decompose(
    model: nn.Module | BlockMap,
    input_ids: Any,
    sources: Any,
    means: Any = None,
    *,
    attention_mask: Any = None,
    targets: Iterable[Any] = (),
    at: str = "z",
    positions: Sequence[int] | int | None = None,
    max_batch: int | None = None,
    progress: Progress = SILENT,
    **rules: Unpack[Rules],
) -> Decomposition:
    """Split the output, and the activations of chosen heads, into each source's share and the rest.

    Args:
        model: a Hugging Face decoder or encoder, or any module with a registered block map; left as it was.
        input_ids: ``[batch, time]`` integers, or a tokenizer's mapping.
        sources: a list; each element a :class:`Node`, :class:`MLPNode` or :class:`Tokens`, or a set of them.
        means: of :func:`head_means`; a source's share is then its deviation from the mean, else its whole output.
        attention_mask: ``[batch, time]``, 1 for tokens, 0 for padding; needed for prompts of unequal length.
        targets: heads whose activations are split too.
        at: where at the targets: ``"z"`` (output), ``"query"``, ``"key"`` (both before rotary positions) or
            ``"value"``.
        positions: output positions to compute (saves time, and memory with a large vocabulary); None for all.
        max_batch: sources times prompts in one pass; None chooses by memory.
        progress: where to report.
        **rules: how parts are propagated:

            - ``attention``: ``"full"`` (the sources' own queries and keys make a pattern of their own) or ``"frozen"``
              (the total's);
            - ``activation``: ``"plain"`` (the rest comes first) or ``"averaged"`` over both orders;
            - ``cleanup``: where both parts have opposite signs after a step of the MLP, the larger takes all (True);
            - ``bias_rule``: ``"remainder"``, or ``"official"`` for the authors', which loses a little of each bias;
            - ``eps``: of the shares of biases; None: 0, or 1e-8 with the official rule.

    Returns:
        a :class:`Decomposition`: one row for each source.

    Raises:
        UnsupportedModel: the blocks of the model are unknown.
        InvalidInput: sources out of range, means of another shape, prompts of unequal length, non-finite weights.
    """
    run = Run(model, input_ids, attention_mask, means, Options(**rules))
    rows = source_sets(sources, run.map, run.length)
    run.check_sources(rows)
    wanted = _targets(targets, run)
    check_place(at)
    chosen = run.positions(positions)
    rel: list[list[Tensor]] = [[] for _ in wanted]
    irrel: list[list[Tensor]] = [[] for _ in wanted]

    def collect(part: Pass, layer: int, _: str, *parts: Any) -> None:
        rel_part, irrel_part = part.spread(*parts)
        for j, node in enumerate(wanted):
            if node.layer == layer:
                place = slice(None) if node.position is None else node.position
                rel[j].append(rel_part[:, :, place, node.head])
                irrel[j].append(irrel_part[:, :, place, node.head])

    outputs, others = [], []
    order: list[int] = []
    places = {(node.layer, at) for node in wanted}
    with run, progress.task("contextual decomposition", total=len(rows)) as task:
        total = run.output(chosen)
        for part in run.chunks(rows, max_batch, total):
            out, rest = Pass(run, [rows[i] for i in part], places, collect).output(chosen)
            outputs.append(out)
            others.append(rest)
            order += part
            task.advance(len(part))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    back = back.to(total.device)
    return Decomposition(
        sources=tuple(rows),
        logits=total,
        rel_logits=torch.cat(outputs)[back],
        irrel_logits=torch.cat(others)[back],
        targets=tuple(wanted),
        at=at,
        rel=tuple(torch.cat(x)[back] for x in rel),
        irrel=tuple(torch.cat(x)[back] for x in irrel),
    )


def decompose_tokens(
    model: nn.Module | BlockMap,
    input_ids: Any,
    spans: Iterable[Any] | None = None,
    level: int = 0,
    *,
    attention_mask: Any = None,
    label: int | Sequence[int] | Tensor | None = None,
    contrast: bool = True,
    position: int | None = None,
    direction: Tensor | None = None,
    metric: Metric | None = None,
    max_batch: int | None = None,
    progress: Progress = SILENT,
    **rules: Unpack[Rules],
) -> TokenImportance:
    """How much words, phrases or n-grams speak for a label; negative means against it.

    Args:
        model: decoder, sequence classifier, or encoder without a head (then ``direction`` or ``metric`` is needed).
        input_ids: ``[batch, time]``; usually one sentence.
        spans: each a position, a pair ``(start, stop)``, a slice or a list of positions; None for every token by
            itself.
        level: the layer whose input counts as the words; 0 for the embeddings.
        attention_mask: ``[batch, time]``.
        label: class or token id (one for all prompts, or one each); None for what the model predicts.
        contrast: measure the label's logit minus that of its closest competitor.
        position: where a decoder predicts the label; None for the last token.
        direction: ``[d]``, in place of a label: the share of the mean of the final hidden states along it (sentence
            embeddings); ``[batch, d]`` for one each.
        metric: in place of a label: from an output ``[batch, ...]`` to a number or ``[batch]``; best if it is linear.
        max_batch, progress, **rules: as in :func:`decompose`, but ``attention`` is ``"frozen"`` unless given, the usual
            choice for words.

    Returns:
        a :class:`TokenImportance` with one score for each span.
    """
    run = Run(model, input_ids, attention_mask, None, Options(**{"attention": "frozen", **rules}))
    places = [(p,) for p in range(run.length)] if spans is None else [_span(span, run.length) for span in spans]
    if run.data.batch > 1 and not run.data.aligned:
        raise InvalidInput(
            "spans name positions, but the prompts have different lengths: decompose one prompt at a time"
        )
    rows = source_sets([Tokens(place, level) for place in places], run.map, run.length)
    with run:
        total = run.output(None)
        read, chosen = _reading(run, total, label, contrast, position, direction, metric)
        scores: list[Tensor] = []
        order: list[int] = []
        with progress.task("token importance", total=len(rows)) as task:
            for part in run.chunks(rows, max_batch, total if chosen is None else total[:, chosen]):
                out, _ = Pass(run, [rows[i] for i in part]).output(chosen)
                scores.append(read(out))
                order += part
                task.advance(len(part))
        whole = read((total if chosen is None else total[:, chosen])[None])[0]
    table = torch.empty(len(rows), run.data.batch, dtype=total.dtype, device=total.device)
    table[torch.tensor(order, device=total.device)] = torch.cat(scores).to(total.dtype)
    return TokenImportance(tuple(places), table.mean(1), table, whole, level)


def contributions_to_targets(
    model: nn.Module | BlockMap,
    input_ids: Any,
    sources: Any,
    targets: Iterable[Any],
    at: str = "z",
    means: Any = None,
    *,
    score: str = "dot",
    attention_mask: Any = None,
    max_batch: int | None = None,
    progress: Progress = SILENT,
    **rules: Unpack[Rules],
) -> Tensor:
    """The matrix of how much every source contributes to every target head.

    Args:
        model, input_ids, sources, means, attention_mask: as in :func:`decompose`.
        targets: heads, at one position or as a whole.
        at: what of the target: ``"z"``, ``"query"``, ``"key"`` or ``"value"``. A head that acts only through a later
            head's key or query is seen only there.
        score: ``"dot"``: the share of the target's deviation from its mean along itself,
            ``<rel, t - mean> / <t - mean, t - mean>`` (1: the source explains all of it); ``"l1"``:
            ``mean|rel| / (mean|rel| + mean|irrel|)``.
        max_batch, progress, **rules: as in :func:`decompose`.

    Returns:
        ``[n_sources, n_targets]``.
    """
    run = Run(model, input_ids, attention_mask, means, Options(**rules))
    return score_targets(run, sources, targets, (at,), score, max_batch, progress)[at]


def score_targets(
    run: Run,
    sources: Any,
    targets: Iterable[Any],
    places: Sequence[str],
    score: str,
    max_batch: int | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """:func:`contributions_to_targets` for several places of the targets in one pass."""
    if score not in ("dot", "l1"):
        raise InvalidInput(f"score={score!r}: expected 'dot' or 'l1'")
    rows = source_sets(sources, run.map, run.length)
    run.check_sources(rows)
    wanted = _targets(targets, run)
    if not wanted:
        raise InvalidInput("no targets: hand in at least one Node")
    for place in places:
        check_place(place)
    matrices: dict[str, Tensor] = {}
    with run, progress.task("contributions to targets", total=len(rows)) as task:
        x = run.totals.final
        matrices = {place: x.new_zeros(len(rows), len(wanted)) for place in places}
        readers = {
            (layer, place): _TargetReader(
                run, layer, place, [(j, n) for j, n in enumerate(wanted) if n.layer == layer], score
            )
            for layer in sorted({node.layer for node in wanted})
            for place in places
        }
        for part in run.chunks(rows, max_batch, None):

            def collect(at: Pass, layer: int, place: str, rel: Tensor, *rest: Any, part: list[int] = part) -> None:
                reader = readers[layer, place]
                started = torch.tensor(
                    part[: len(rel)], dtype=torch.long, device=x.device
                )  # of the others nothing has arrived
                matrices[place][started[:, None], reader.columns] = reader(at, rel, *rest)

            Pass(run, [rows[i] for i in part], set(readers), collect).targets()
            task.advance(len(part))
    return matrices


def contributions_to_output(
    model: nn.Module | BlockMap,
    input_ids: Any,
    sources: Any,
    metric: Metric,
    means: Any = None,
    *,
    attention_mask: Any = None,
    max_batch: int | None = None,
    progress: Progress = SILENT,
    **rules: Unpack[Rules],
) -> Tensor:
    """Every source's share of a metric: ``metric(rel_logits) / |metric(logits)|``.

    Args:
        model, input_ids, sources, means, attention_mask: as in :func:`decompose`.
        metric: from logits ``[batch, time, vocab]`` (or ``[batch, classes]``) to a number; an attribute ``positions``
            says that only these positions are needed, and then only they are handed in. See :class:`LogitDifference`.
        max_batch, progress, **rules: as in :func:`decompose`.

    Returns:
        ``[n_sources]``.
    """
    run = Run(model, input_ids, attention_mask, means, Options(**rules))
    return score_output(run, sources, metric, max_batch, progress)


def score_output(run: Run, sources: Any, metric: Metric, max_batch: int | None, progress: Progress) -> Tensor:
    rows = source_sets(sources, run.map, run.length)
    run.check_sources(rows)
    chosen = run.metric_positions(metric)
    with run, progress.task("contributions to the output", total=len(rows)) as task:
        total = run.output(chosen)
        full = number(metric, total)
        if not full.isfinite() or full == 0:
            raise InvalidInput(f"the metric of the full model is {full.item()}: shares of it are undefined")
        scores = total.new_zeros(len(rows))
        for part in run.chunks(rows, max_batch, total):
            out, _ = Pass(run, [rows[i] for i in part]).output(chosen)
            for i, row in zip(part, out, strict=True):
                scores[i] = number(metric, row)
            task.advance(len(part))
    return scores / full.abs()


# --------------------------------------------------------------------------------------------- reading the results


class _TargetReader:
    """Scores of all sources at the targets of one layer and place."""

    def __init__(self, run: Run, layer: int, place: str, nodes: list[tuple[int, Node]], score: str) -> None:
        t = run.totals.layers[layer]
        x = must(getattr(t, _FIELD[place]))  # [batch, time, heads, d]
        mean = None if run.means is None else run.means.at(place)
        deviation = x if mean is None else x - mean[layer]
        everywhere = run.data.mask.to(x.dtype)
        self.score = score
        self.columns = torch.tensor([j for j, _ in nodes], device=x.device)
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}  # head -> which nodes, and what their shares are weighed with
        for head in sorted({node.head for _, node in nodes}):
            here = [i for i, (_, node) in enumerate(nodes) if node.head == head]
            weights = []
            for i in here:
                position = nodes[i][1].position
                if position is None:
                    weights.append(everywhere)
                elif place in ("key", "value"):
                    weights.append(must(t.pattern)[:, head, position])  # the keys that it reads
                else:
                    weights.append(F.one_hot(torch.tensor(position), run.length).to(x).expand(run.data.batch, -1))
            weight = torch.stack(weights, -1)[:, :, None]  # [batch, time, 1, nodes]
            along = deviation[:, :, head, :, None]
            if score == "dot":
                weight = weight * along / (weight * along.square()).sum((0, 1, 2)).clamp_min(1e-30)
            self.heads[head] = torch.tensor(here, device=x.device), weight.expand(*along.shape[:3], -1)

    def __call__(self, at: Pass, rel: Tensor, irrel: Tensor | None, total: Tensor) -> Tensor:
        """``[started, batch, time, heads, d]`` from position ``at.first`` on to ``[started, targets]``."""
        scores = rel.new_zeros(len(rel), len(self.columns))
        for head, (nodes, weight) in self.heads.items():
            mine = rel[..., head, :]
            late = weight[:, at.first :].flatten(0, 2)
            if self.score == "dot":
                scores[:, nodes] = mine.flatten(1) @ late
                continue
            size = mine.abs().flatten(1) @ late
            before = total[:, : at.first, head].abs().flatten() @ weight[:, : at.first].flatten(0, 2)
            others = at.cut(total)[..., head, :] - mine if irrel is None else irrel[..., head, :]
            scores[:, nodes] = size / (size + others.abs().flatten(1) @ late + before).clamp_min(1e-30)
        return scores


def _targets(targets: Iterable[Any], run: Run) -> list[Node]:
    wanted: list[Any] = [targets] if isinstance(targets, Node) else list(targets)
    for node in wanted:
        if not isinstance(node, Node):
            raise InvalidInput(f"the target {node!r} is no Node: targets are heads, Node(layer, position, head)")
        check_component(node, run.map, run.length)
        if node.position is not None and not run.data.aligned:
            raise InvalidInput(
                "targets name positions, but the prompts have different lengths: align them by a template"
            )
    return wanted


def check_place(at: str) -> None:
    if at not in PLACES:
        raise InvalidInput(f"at={at!r}: expected one of {', '.join(PLACES)}")


def number(metric: Metric, logits: Tensor) -> Tensor:
    value = torch.as_tensor(metric(logits))
    if value.numel() != 1:
        raise InvalidInput(f"the metric gives shape {tuple(value.shape)}: expected one number")
    return value.reshape(()).to(logits.device)


def _span(span: Any, length: int) -> tuple[int, ...]:
    if isinstance(span, slice):
        return tuple(range(length))[span]
    if isinstance(span, tuple) and len(span) == 2:
        return tuple(range(int(span[0]), int(span[1])))
    if isinstance(span, Iterable):
        return tuple(int(p) for p in span)
    return (int(span),)


def _reading(
    run: Run, total: Tensor, label: Any, contrast: bool, position: int | None, direction: Any, metric: Metric | None
) -> tuple[Callable[[Tensor], Tensor], list[int] | None]:
    """A function from outputs ``[rows, batch, ...]`` to scores ``[rows, batch]``, and the positions that it needs."""
    batch, length, mask = run.data.batch, run.length, run.data.attention_mask
    if metric is not None:

        def by_metric(out: Tensor) -> Tensor:
            values = [torch.as_tensor(metric(row)) for row in out]
            for value in values:
                if value.numel() not in (1, batch):
                    raise InvalidInput(
                        f"the metric gives shape {tuple(value.shape)}: expected a number or one for each prompt"
                    )
            return torch.stack([value.reshape(-1).expand(batch) for value in values])

        return by_metric, None
    if direction is not None:
        along = torch.as_tensor(direction, dtype=total.dtype, device=total.device)
        if along.shape not in ((total.shape[-1],), (batch, total.shape[-1])):
            raise InvalidInput(
                f"direction has shape {tuple(along.shape)}: expected ({total.shape[-1]},), the output's size"
            )
        weights = Pool("mean").weights(run.data.mask, mask, total.dtype)

        def by_direction(out: Tensor) -> Tensor:
            pooled = out if out.ndim == 3 else Pool("mean")(out, weights)
            return (pooled * along).sum(-1)

        return by_direction, None
    if not run.map.head:
        raise InvalidInput(
            f"{type(run.map.model).__name__} has no head, so its output has no labels: hand in direction= or metric="
        )
    chosen: list[int] | None = None
    if total.ndim == 3:
        last = length - 1 if mask is None else int((torch.arange(length, device=mask.device) * mask[0]).argmax())
        chosen = run.positions(last if position is None else position)
        total = total[:, chosen]
    logits = total.reshape(batch, -1)
    index = logits.argmax(-1) if label is None else torch.as_tensor(label, device=total.device).long().expand(batch)
    if not bool(((index >= 0) & (index < logits.shape[1])).all()):
        raise InvalidInput(f"label {index.tolist()} is out of range: the output has {logits.shape[1]} classes")
    rival = None
    if contrast:
        if logits.shape[1] < 2:
            raise InvalidInput("the output has one class, so no competitor: use contrast=False")
        rival = logits.scatter(1, index[:, None], float("-inf")).argmax(-1)

    def by_label(out: Tensor) -> Tensor:
        flat = out.reshape(len(out), batch, -1)
        value = flat[:, torch.arange(batch), index]
        return value if rival is None else value - flat[:, torch.arange(batch), rival]

    return by_label, chosen
