"""Induction heads by the length of the prefix that they need: one token before, or several.

An induction head at the second "A B" looks back to what came after the first. A short-prefix head needs one token to
match; a long-prefix head attends only where two or more do. Source: arXiv:2406.17759, section 4.2 and appendix.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.activations import Batch
from broadsheet.nn.attribution import direct_parts, readable_head
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.features import mapped
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator as seeded_generator

RIVALS = 16  # other tokens whose mean share is taken away from the right one's


@dataclass(frozen=True)
class PrefixScores:
    """How every head takes part in induction, by the length of the matching prefix.

    Attributes:
        lengths: matching tokens.
        attention: ``[layer, head, length]``, mean attention from the last matching token to what followed the
            first run.
        logits: ``[layer, head, length]``, what the head gives directly to the right token's logit, less its mean over
            other tokens; None for a model without a linear head.
    """

    lengths: tuple[int, ...]
    attention: Float[Tensor, "layers heads lengths"]
    logits: Float[Tensor, "layers heads lengths"] | None

    def long_prefix(self, low: float = 0.3, high: float = 0.6) -> list[str]:
        """Heads that attend less than ``low`` after one matching token and more than ``high`` after the most."""
        mask = (self.attention[..., 0] < low) & (self.attention[..., -1] > high)
        return [f"layers.{layer}.attn.head.{head}" for layer, head in mask.nonzero().tolist()]

    def to_frame(self) -> pd.DataFrame:
        """One row for each head and length: ``head``, ``length``, ``attention``, ``logit``."""
        layers, heads, _ = self.attention.shape
        rows = [
            (
                f"layers.{layer}.attn.head.{head}", length, float(self.attention[layer, head, i]),
                math.nan if self.logits is None else float(self.logits[layer, head, i]),
            )
            for layer in range(layers)
            for head in range(heads)
            for i, length in enumerate(self.lengths)
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["head", "length", "attention", "logit"])

    def plot(self, k: int = 6, ax: Any = None) -> Any:
        """Attention over prefix length of the heads that attend most; the others in grey.

        Args:
            k: heads that are named.
            ax: matplotlib axes.
        """
        from broadsheet.nn.plotting import COLOURS, new_axes

        ax = new_axes(ax)
        table = self.attention.flatten(0, 1).cpu()
        heads = self.attention.shape[1]
        order = table.amax(1).argsort(descending=True).tolist()
        for place, i in reversed(list(enumerate(order))):
            named = place < k
            ax.plot(
                self.lengths, table[i], marker="o" if named else None, ms=3.5, lw=1.8 if named else 0.7,
                label=f"{i // heads}.{i % heads}" if named else None, zorder=3 if named else 1,
                **({} if named else {"color": COLOURS["light"]}),
            )  # fmt: skip
        ax.set_xlabel("tokens that match before")
        ax.set_ylabel("attention to the token after the first run")
        ax.set_ylim(-0.02, 1.02)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], title="head")
        return ax


@torch.no_grad()
def prefix_induction_scores(
    model: nn.Module | BlockMap,
    lengths: Sequence[int] = tuple(range(1, 10)),
    *,
    samples: int = 400,
    length: int = 128,
    tokens: Sequence[int] | Tensor | None = None,
    bos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    batch: int = 50,
    progress: Progress = SILENT,
) -> PrefixScores:
    """Repeat a run of ``p`` tokens in a text of random, otherwise distinct ones, and see which heads look back.

    Args:
        model: a causal Hugging Face model, or any module with a registered block map.
        lengths: of the run.
        samples: texts for each length.
        length: tokens of a text, BOS not counted.
        tokens: ids that texts are drawn from; None for the whole vocabulary but ``bos_token_id``.
        bos_token_id: put before every text; None for nothing.
        generator: of the texts, on the CPU.
        batch: texts in a run.
        progress: where texts are shown.

    Raises:
        InvalidInput: fewer tokens than a text needs, or a run that does not fit in twice.
    """
    the_map = mapped(model)
    lengths = tuple(int(p) for p in lengths)
    for name, value in {"samples": samples, "batch": batch}.items():
        if value < 1:
            raise InvalidInput(f"{name}={value}: must be at least 1")
    if not lengths or min(lengths) < 1 or 2 * max(lengths) + 2 > length:
        raise InvalidInput(f"lengths={lengths}: a run has to fit twice into length={length}, with a token between")
    if tokens is None:
        vocabulary = _vocabulary(the_map)
        pool = torch.tensor([i for i in range(vocabulary) if i != bos_token_id])
    else:
        pool = torch.as_tensor(tokens, dtype=torch.long).cpu()
    if len(pool) < length:
        raise InvalidInput(f"{len(pool)} tokens to draw from: a text of length={length} needs as many distinct ones")
    try:
        readable_head(the_map)
        readable = True
    except UnsupportedModel:
        readable = False
    random = generator or seeded_generator(0)
    device = next(the_map.model.parameters()).device
    shape = (the_map.n_layers, the_map.n_heads, len(lengths))
    attention = torch.zeros(shape, dtype=torch.float64)
    logits = torch.zeros(shape, dtype=torch.float64) if readable else None
    first = 0 if bos_token_id is None else 1
    with progress.task("prefix induction", total=samples * len(lengths)) as task:
        for i, p in enumerate(lengths):
            for start in range(0, samples, batch):
                n = min(batch, samples - start)
                ids, query, target = _texts(n, p, length, pool, random)
                if bos_token_id is not None:
                    ids = torch.cat([torch.full((n, 1), bos_token_id), ids], 1)
                query, target, rows = query + first, target + first, torch.arange(n)
                parts = direct_parts(the_map, ids.to(device), positions=query.to(device), sources=True)
                for layer, part in enumerate(parts.layers):
                    if part.pattern is not None:
                        seen = part.pattern[rows, :, target].double().cpu()
                        attention[layer, : seen.shape[1], i] += seen.sum(0)
                if logits is not None:
                    right = ids[rows, target][:, None]
                    columns = torch.rand(n, length, generator=random).topk(min(RIVALS, length), 1).indices + first
                    shares = parts.attribute(torch.cat([right, ids.gather(1, columns)], 1).to(device)).heads.double()
                    given = shares[..., 0] - shares[..., 1:].mean(-1)
                    logits[..., i] += given.sum(0).cpu()
                task.advance(n)
    return PrefixScores(lengths, attention / samples, None if logits is None else logits / samples)


def _vocabulary(the_map: BlockMap) -> int:
    size = getattr(getattr(the_map.model, "config", None), "vocab_size", None)
    if size is None:
        raise InvalidInput(f"{type(the_map.model).__name__} does not say how many tokens it knows: hand in tokens=")
    return int(size)


def _texts(
    n: int, p: int, length: int, pool: Tensor, random: torch.Generator
) -> tuple[Int[Tensor, "n length"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Texts with a run of ``p`` tokens twice; the last token of the second run, and the one after the first run."""
    order = torch.rand(n, len(pool), generator=random).argsort(1)[:, :length]
    ids = pool[order]
    room = length - 2 * p - 1  # where the first run may begin: one token has to stand between the runs
    a = (torch.rand(n, generator=random) * (room + 1)).long()
    b = a + p + 1 + (torch.rand(n, generator=random) * (room + 1 - a)).long()
    steps = torch.arange(p)
    rows = torch.arange(n)[:, None]
    ids[rows, b[:, None] + steps] = ids[rows, a[:, None] + steps]
    return ids, b + p - 1, a + p


@dataclass(frozen=True)
class NaturalPrefixes:
    """Where heads do induction in a text, and what is left of it when the token before the matching one is another.

    Attributes:
        count: ``[layer, head]``, places where a head attends strongly to what followed the same token before.
        prefix: ``[layer, head]``, mean number of matching tokens there; NaN where there was no such place.
        attention: ``[layer, head]``, mean attention at places where at least two tokens match.
        corrupted: ``[layer, head]``, the same with the second of them exchanged.
        compared: ``[layer, head]``, how many places that is.
    """

    count: Int[Tensor, "layers heads"]
    prefix: Float[Tensor, "layers heads"]
    attention: Float[Tensor, "layers heads"]
    corrupted: Float[Tensor, "layers heads"]
    compared: Int[Tensor, "layers heads"]

    @property
    def kept(self) -> Float[Tensor, "layers heads"]:
        """Share of the attention that is left: small for long-prefix heads, near 1 for short-prefix ones."""
        return self.corrupted / self.attention

    def to_frame(self) -> pd.DataFrame:
        """One row for each head that was found at work, the most active first."""
        numbers = ("prefix", "attention", "corrupted", "kept")
        rows = [
            {
                "head": f"layers.{layer}.attn.head.{head}", "count": int(self.count[layer, head]),
                **{name: float(getattr(self, name)[layer, head]) for name in numbers},
            }
            for layer, head in self.count.nonzero().tolist()
        ]  # fmt: skip
        columns = ["head", "count", *numbers]
        return pd.DataFrame(rows, columns=columns).sort_values("count", ascending=False, ignore_index=True)


@torch.no_grad()
def natural_prefixes(
    model: nn.Module | BlockMap,
    batches: Iterable[Batch],
    *,
    tokenizer: Any = None,
    threshold: float | int = 0.3,
    generator: torch.Generator | None = None,
    progress: Progress = SILENT,
) -> NaturalPrefixes:
    """Prefix lengths of induction in ordinary text.

    A place is a token ``t`` from which a head attends, with more than ``threshold``, to a token that is not the text's
    first and whose predecessor is the same as ``t``.

    Args:
        model: a causal Hugging Face model, or any module with a registered block map.
        batches: ids ``[batch, time]``, or pairs of them and attention masks; padding on either side.
        tokenizer: tokens that differ only in case and space then count as the same.
        threshold: of the attention.
        generator: of the tokens put in.
        progress: where texts read are shown.
    """
    the_map = mapped(model)
    device = next(the_map.model.parameters()).device
    same = _classes(the_map, tokenizer).to(device)
    random = generator or seeded_generator(0)
    shape = (the_map.n_layers, the_map.n_heads)
    count, total, compared = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    before, after = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    with progress.task("natural prefixes") as task:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
            ids, mask = padded.input_ids, padded.attention_mask
            kind = same[ids]
            matching = _matching(kind, mask)  # [batch, t, s]: tokens that match before t and before s
            patterns = _patterns(the_map, ids, mask)
            at_work = [p is not None and (p > threshold) & (matching > 0)[:, None] for p in patterns]
            wanted: set[tuple[int, int]] = set()
            for layer, found in enumerate(at_work):
                if isinstance(found, bool):
                    continue
                heads = found.shape[1]
                count[layer, :heads] += found.sum((0, 2, 3)).cpu()
                total[layer, :heads] += (found * matching[:, None]).sum((0, 2, 3)).cpu()
                wanted |= {(b, t) for b, _, t, _ in (found & (matching > 1)[:, None]).nonzero().tolist()}
            places = sorted(wanted)
            for start in range(0, len(places), 64):
                rows, at = (torch.tensor(x, device=device) for x in zip(*places[start : start + 64], strict=True))
                changed = ids[rows].clone()
                each = torch.arange(len(rows), device=device)
                changed[each, at - 1] = _others(changed, same, random)
                new = _patterns(the_map, changed, None if mask is None else mask[rows])
                for layer, (old, now, found) in enumerate(zip(patterns, new, at_work, strict=True)):
                    if old is None or now is None or isinstance(found, bool):
                        continue
                    use = (found & (matching > 1)[:, None])[rows, :, at]  # [place, head, s]
                    heads = use.shape[1]
                    before[layer, :heads] += (old[rows, :, at] * use).sum((0, 2)).double().cpu()
                    after[layer, :heads] += (now[each, :, at] * use).sum((0, 2)).double().cpu()
                    compared[layer, :heads] += use.sum((0, 2)).cpu()
            task.advance(len(ids))
    return NaturalPrefixes(count, total / count, before / compared, after / compared, compared)


def _patterns(the_map: BlockMap, ids: Tensor, mask: Tensor | None) -> list[Tensor | None]:
    with evaluating(the_map.model):
        totals = the_map.forward(ids, mask, cache=True)[1]
    return [layer.pattern for layer in totals.layers]


def _classes(the_map: BlockMap, tokenizer: Any) -> Int[Tensor, " vocab"]:
    """A number for every token; equal for those that count as the same."""
    size = _vocabulary(the_map)
    if tokenizer is None:
        return torch.arange(size)
    names: dict[str, int] = {}
    found = []
    for i in range(size):
        word = tokenizer.decode([i]).strip().casefold()
        found.append(names.setdefault(word, i) if word else i)
    return torch.tensor(found)


def _matching(kind: Tensor, mask: Tensor | None, most: int = 20) -> Int[Tensor, "batch time time"]:
    """How many tokens up to ``t`` are those up to ``s - 1``; 0 where ``s`` is beyond ``t`` or among the first two."""
    n, time = kind.shape
    equal = kind[:, :, None] == kind[:, None, :]
    run = torch.zeros(n, time, time, dtype=torch.long, device=kind.device)
    here = equal.clone()  # here[b, t, u]: the last k + 1 tokens up to t and up to u agree
    for _ in range(most):
        run += here
        if not bool(here.any()):
            break
        shifted = torch.zeros_like(here)
        shifted[:, 1:, 1:] = here[:, :-1, :-1]
        here = here & shifted
    later = torch.ones(time, time, dtype=torch.bool, device=kind.device).tril(-1)  # u < t
    run = run * later
    result = torch.zeros_like(run)
    result[:, :, 1:] = run[:, :, :-1]  # s = u + 1
    result[:, :, 1] = 0  # what follows the first token says little: it often is a fixed one
    result = result * later.logical_or(torch.eye(time, dtype=torch.bool, device=kind.device))
    if mask is not None:
        result = result * mask.bool()[:, :, None] * mask.bool()[:, None, :]
    return result


def _others(ids: Tensor, same: Tensor, random: torch.Generator) -> Tensor:
    """For every text a token that stands nowhere in it, under no spelling."""
    out = []
    for row in ids:
        used = torch.zeros(len(same), dtype=torch.bool, device=ids.device)
        used[same[row]] = True
        free = (~used[same]).nonzero().flatten()
        if not len(free):
            raise InvalidInput("a text holds every token of the vocabulary: none is left to exchange one for")
        out.append(free[int(torch.randint(len(free), (1,), generator=random))])
    return torch.stack(out)
