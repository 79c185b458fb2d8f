"""Queries and keys of letter heads squeezed to a few dimensions: what do they need to find the right label?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.skill import decoder_map
from broadsheet.interpretability.circuit_analysis.substitution import (
    Samples,
    Score,
    Substitution,
    at_least_two,
    collect,
    named_heads,
)
from broadsheet.nn.attribution import parse_node
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.features import Feature, Projection
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator

BASES = ("class_means", "svd", "random")


@dataclass(frozen=True)
class Subspace:
    """``x`` is replaced by ``mean + (x - mean) basis basis^T``.

    Attributes:
        mean: ``[d]``.
        basis: ``[d, rank]``, orthonormal.
        explained: share of the variance, on the prompts it was fitted to, that the subspace holds.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d rank"]
    explained: float

    def __call__(self, x: Tensor, batch: ChoiceBatch | None = None) -> Tensor:
        mean, basis = self.mean.to(x), self.basis.to(x)
        return mean + (x - mean) @ basis @ basis.T

    def coordinates(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch rank"]:
        """Where ``x`` stands in the subspace."""
        return (x - self.mean.to(x)) @ self.basis.to(x)


@dataclass(frozen=True)
class Compression(Substitution):
    """Some heads of a model, each with its queries (final token) and keys or values (labels) confined to a subspace.

    ``compression.evaluate(batch)`` measures it; ``with compression.apply(batch): model(batch.input_ids)`` puts it into
    the user's own model; ``compression.feature(...)`` hands a direction to other methods.
    """

    @property
    def spaces(self) -> dict[tuple[int, int, str], Subspace]:
        """(layer, head, part) -> subspace."""
        return {key: rule for key, rule in self.rules.items() if isinstance(rule, Subspace)}

    def to_frame(self) -> pd.DataFrame:
        """One row for each head and part: rank and share of the variance."""
        rows = [
            (f"layers.{layer}.attn.head.{head}", part, space.basis.shape[1], space.explained)
            for (layer, head, part), space in self.spaces.items()
        ]
        return pd.DataFrame(rows, columns=["head", "part", "rank", "explained"])

    def feature(self, head: str, part: str = "q", index: int = 0) -> Feature:
        """One direction of a head's subspace, in the form that every other method takes.

        Args:
            head: such as ``"layers.3.attn.head.5"``.
            part: ``"q"``, ``"k"``, or ``"v"`` (then as what the head puts out, at ``attn.z``).
            index: which direction, the one with the largest singular value first.

        Raises:
            InvalidInput: not part of this compression, or a model that norms its queries and keys, where a direction
                after the norm is none before it.
        """
        layer, number = parse_node(head)
        space = self.spaces.get((layer, -1 if number is None else number, part))
        if space is None or number is None or not 0 <= index < space.basis.shape[1]:
            raise InvalidInput(
                f"head={head!r}, part={part!r}, index={index}: compressed are "
                f"{', '.join(self.names)}, parts {sorted({key[2] for key in self.rules})}"
            )
        attention = self.block_map.blocks[layer].attention
        assert attention is not None
        if attention.norm_of(part) is not None:
            raise InvalidInput(f"{head}: this model norms its {part}: a direction after the norm is none before it")
        at = number // attention.groups if part == "k" else number
        width = attention.k.weight.shape[1] if part == "k" else attention.o.weight.shape[0]
        write, centre = space.basis.new_zeros(2, width)
        place = slice(at * attention.head_dim, (at + 1) * attention.head_dim)
        write[place], centre[place] = space.basis[:, index], space.mean
        site = f"layers.{layer}.attn.{'z' if part == 'v' else part}"
        return Feature(site, write, Projection(write, centre=centre), f"{head} {part} {index}")

    def plot(self, batch: ChoiceBatch, head: str | None = None, ax: Any = None, by: str = "item") -> Any:
        """Queries and keys of one head in the first three dimensions of its subspace, coloured by item.

        Args:
            batch: the prompts.
            head: which; None for the first.
            ax: matplotlib axes with ``projection="3d"``.
            by: colours tell the ``"item"`` (queries: the right one) or the ``"token"`` of the label.
        """
        from broadsheet.interpretability.circuit_analysis.figures import scatter

        name = self.names[0] if head is None else head
        layer, number = parse_node(name)
        spaces = {part: self.spaces.get((layer, number or 0, part)) for part in "qk"}
        if spaces["q"] is None or spaces["k"] is None or by not in ("item", "token"):
            raise InvalidInput(f"head={name!r}, by={by!r}: queries and keys of {', '.join(self.names)} are compressed")
        found = collect(self.block_map, [name], batch, warn=False)
        points = {
            "q": spaces["q"].coordinates(found.q[layer, number or 0]),
            "k": spaces["k"].coordinates(found.k[layer, number or 0]),
        }
        return scatter(points["q"], points["k"], batch, ax, by)


@torch.no_grad()
def compress_heads(
    model: nn.Module | BlockMap,
    heads: Sequence[str],
    batch: ChoiceBatch,
    rank: int = 3,
    parts: str = "qk",
    basis: str = "class_means",
    *,
    shared: bool = True,
    seed: int = 0,
) -> Compression:
    """Fit the subspaces on some prompts. Compress all letter heads together: one alone is masked by the others.

    Args:
        model: any mapped decoder.
        heads: names such as ``"layers.3.attn.head.5"``.
        batch: ordinary prompts, at least two for every right item.
        rank: dimensions kept; 0 leaves the mean only.
        parts: some of ``q``, ``k``, ``v``.
        basis: ``"class_means"`` (of mean queries by right item and mean keys or values by item), ``"svd"`` (of all
            samples), or ``"random"`` (the control).
        shared: queries and keys in one subspace. Rank ``n - 1`` then holds the means of both only where they lie in the
            same subspace (together they span up to ``2 (n - 1)`` dimensions); with False each part has a subspace of
            its own, and rank ``n - 1`` holds its ``n`` class means exactly.
        seed: of the random basis.

    Raises:
        InvalidInput: unknown heads, a rank beyond the head's width, or fewer than two prompts of an item.

    Warns:
        ModelAtChance: the model does not have the skill.
    """
    the_map = decoder_map(model)
    _check(the_map, heads, batch, rank, parts, basis)
    return _fitted(the_map, collect(the_map, heads, batch), rank, parts, basis, shared, seed)


@dataclass(frozen=True)
class RankCurve:
    """What is left of the skill for each number of dimensions, on prompts of several kinds.

    Attributes:
        ranks: dimensions.
        scores: kind of prompts -> basis -> a score for each rank.
        full: kind of prompts -> score of the model as it is.
    """

    ranks: tuple[int, ...]
    scores: dict[str, dict[str, tuple[Score, ...]]]
    full: dict[str, Score]

    def to_frame(self) -> pd.DataFrame:
        """One row for each kind of prompts, basis and rank."""
        rows = [
            (kind, basis, rank, score.accuracy, score.loss, score.attention, score.explained)
            for kind, bases in self.scores.items()
            for basis, scores in bases.items()
            for rank, score in zip(self.ranks, scores, strict=True)
        ]
        return pd.DataFrame(rows, columns=["prompts", "basis", "rank", "accuracy", "loss", "attention", "explained"])

    def plot(self, ax: Any = None, basis: str = "class_means", what: str = "accuracy") -> Any:
        """Against rank, one line for each kind of prompts; dashed: the model as it is.

        Args:
            ax: matplotlib axes.
            basis: which.
            what: a field of :class:`Score`.
        """
        from broadsheet.interpretability.circuit_analysis.figures import rank_lines

        return rank_lines(self, ax, basis, what)


@torch.no_grad()
def rank_curve(
    model: nn.Module | BlockMap,
    heads: Sequence[str],
    batch: ChoiceBatch,
    tests: Mapping[str, ChoiceBatch],
    ranks: Sequence[int] = range(7),
    *,
    parts: str = "qk",
    bases: Sequence[str] = ("class_means", "random"),
    shared: bool = True,
    seed: int = 0,
    progress: Progress = SILENT,
) -> RankCurve:
    """Compress to every rank and measure on every kind of prompts.

    Args:
        model, heads, batch, parts, shared, seed: as in :func:`compress_heads`; the subspaces are fitted on ``batch``.
        tests: name -> prompts, such as mutations of ordinary ones.
        ranks: dimensions to try.
        bases: which to try.
        progress: where runs done are shown.
    """
    if not tests or not ranks:
        raise InvalidInput("tests and ranks: at least one kind of prompts and one rank are needed")
    the_map = decoder_map(model)
    for basis in bases:
        for rank in ranks:
            _check(the_map, heads, batch, rank, parts, basis)
    samples = collect(the_map, heads, batch)
    scores: dict[str, dict[str, list[Score]]] = {kind: {basis: [] for basis in bases} for kind in tests}
    full: dict[str, Score] = {}
    with progress.task("ranks", len(bases) * len(ranks)) as task:
        for basis in bases:
            for rank in ranks:
                found = _fitted(the_map, samples, rank, parts, basis, shared, seed)
                for kind, prompts in tests.items():
                    scores[kind][basis].append(found.evaluate(prompts))
                    if kind not in full:
                        full[kind] = found.evaluate(prompts, compressed=False)
                task.advance()
    kept = {kind: {basis: tuple(row) for basis, row in bases_.items()} for kind, bases_ in scores.items()}
    return RankCurve(tuple(ranks), kept, full)


def _check(the_map: BlockMap, heads: Sequence[str], batch: ChoiceBatch, rank: int, parts: str, basis: str) -> None:
    if not parts or set(parts) - set("qkv") or basis not in BASES:
        raise InvalidInput(f"parts={parts!r}, basis={basis!r}: expected some of 'qkv', and one of {BASES}")
    for layer, _ in named_heads(the_map, heads):
        attention = the_map.blocks[layer].attention
        if attention is not None and not 0 <= rank <= attention.head_dim:
            raise InvalidInput(f"rank={rank}: a head of layer {layer} has {attention.head_dim} dimensions")
    at_least_two(batch)


def _fitted(
    the_map: BlockMap, samples: Samples, rank: int, parts: str, basis: str, shared: bool, seed: int
) -> Compression:
    batch, random = samples.batch, generator(seed)
    spaces: dict[tuple[int, int, str], Subspace] = {}
    for layer, head in samples.q:
        q, k, v = samples.q[layer, head], samples.k[layer, head], samples.v[layer, head]
        means = {
            "q": torch.stack([q[batch.answer == i].mean(0) for i in range(batch.n_items)]), "k": k.mean(0),
            "v": v.mean(0),
        }  # fmt: skip
        each = {"q": q, "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
        size = q.shape[1]
        made = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]
        source = means if basis == "class_means" else each
        centred = {part: source[part] - means[part].mean(0) for part in "qkv"}
        together = [part for part in "qk" if part in parts] if shared else []
        for part in dict.fromkeys(parts):
            group = together if part in together else [part]
            if basis == "random":
                vectors = made.to(q)[:, :rank]
            else:
                vectors = torch.linalg.svd(torch.cat([centred[other] for other in group]), full_matrices=True)[2]
                vectors = vectors[:rank].T
            centre = means[part].mean(0)
            x = each[part] - centre
            share = float((x @ vectors).square().sum() / x.square().sum().clamp_min(1e-30))
            spaces[layer, head, part] = Subspace(centre, vectors, share)
    return Compression(the_map, dict(spaces))
