"""Queries, keys and values of some heads replaced where the answer is chosen: at the final token and the labels.

What they are replaced by varies (a projection onto a subspace, the mean of their class); where, how it is measured, and
how it is put into the user's own model, does not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.effects import split_node
from broadsheet.interpretability.circuit_analysis.skill import decoder_map, warn_at_chance
from broadsheet.nn.attribution import place_of
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.hooks import replace as hooked
from broadsheet.nn.padding import right_padded
from broadsheet.nn.prefix import layer_rotary, rotate_all, rotate_row, row_of, row_pattern

# From what is there, [batch, d] or [batch, item, d], and the prompts, to what is put in its place.
Rule = Callable[[Tensor, ChoiceBatch], Tensor]
Key = tuple[int, int, str]  # layer, head, "q" | "k" | "v"


@dataclass(frozen=True)
class Score:
    """How well the questions are answered.

    Attributes:
        accuracy: share right, of the answers that there are to choose from.
        loss: over the answers, nats.
        attention: mean over the heads of what they give to the right label.
        explained: share of the variance of queries, keys and values that is left (1 where nothing is replaced).
    """

    accuracy: float
    loss: float
    attention: float
    explained: float = 1.0


@dataclass(frozen=True)
class Substitution:
    """Some heads of a model with other queries (final token), keys or values (labels).

    Attributes:
        block_map: of the model; its modules are left as they are.
        rules: (layer, head, "q", "k" or "v") -> what it is replaced by. Queries and keys are taken after their own norm
            (Qwen3, Gemma 3) and before rotary positions.
    """

    block_map: BlockMap
    rules: dict[Key, Rule]

    @property
    def heads(self) -> list[tuple[int, int]]:
        return sorted({(layer, head) for layer, head, _ in self.rules})

    @property
    def names(self) -> list[str]:
        return [f"layers.{layer}.attn.head.{head}" for layer, head in self.heads]

    @torch.no_grad()
    def evaluate(self, batches: ChoiceBatch | Iterable[ChoiceBatch], compressed: bool = True) -> Score:
        """The model with these heads changed, on prompts of any kind.

        Args:
            batches: prompts; the mean over all of them is given.
            compressed: False gives the model as it is.
        """
        several = [batches] if isinstance(batches, ChoiceBatch) else list(batches)
        if not several:
            raise InvalidInput("batches is empty: hand in at least one ChoiceBatch")
        found = [(len(batch), self._score(batch, compressed)) for batch in several]
        shares = [n / sum(n for n, _ in found) for n, _ in found]

        def mean(name: str) -> float:
            return sum(share * getattr(score, name) for share, (_, score) in zip(shares, found, strict=True))

        return Score(mean("accuracy"), mean("loss"), mean("attention"), mean("explained"))

    def _score(self, batch: ChoiceBatch, compressed: bool) -> Score:
        padded = right_padded(batch.input_ids, batch.attention_mask)
        at, rows = place_of(padded, batch.final_pos), batch.rows
        labels = batch.label_pos - padded.offset[:, None]
        looked: list[Tensor] = []
        spread: list[tuple[float, float]] = []
        seen: dict[str, Tensor] = {}

        def edit(name: str, layer: int, x: Tensor) -> Tensor:
            heads = [head for i, head in self.heads if i == layer]
            if not heads:
                return x
            if name in ("q", "k", "v"):
                seen[name] = x[:, :, heads]
            elif name == "pattern" and not compressed:
                looked.append(x[rows, :, at][:, heads].gather(-1, _right(labels, batch, len(heads))))
            elif name == "z" and compressed:
                pattern, out = self._row(layer, heads, batch, seen, at, labels, padded.attention_mask, spread)
                looked.append(pattern.gather(-1, _right(labels, batch, len(heads))))
                x = x.clone()
                x[rows[:, None], at[:, None], torch.tensor(heads, device=x.device)[None]] = out.to(x)
            return x

        with evaluating(self.block_map.model):
            logits = self.block_map.forward(padded.input_ids, padded.attention_mask, edit=edit)
        chosen = logits[rows, at].gather(1, batch.answers)
        accuracy = (chosen.argmax(-1) == batch.answer).double().mean()
        lost, whole = (sum(pair[i] for pair in spread) for i in (0, 1))
        return Score(
            float(accuracy),
            float(nn.functional.cross_entropy(chosen.float(), batch.answer)),
            float(torch.cat(looked, 1).float().mean()),
            1.0 if not spread or whole == 0 else 1 - lost / whole,
        )

    def _row(
        self, layer: int, heads: list[int], batch: ChoiceBatch, seen: dict[str, Tensor], at: Tensor, labels: Tensor,
        mask: Tensor | None, spread: list[tuple[float, float]] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What these heads see and put out at the final token, ``[batch, head, time]`` and ``[batch, head, d]``.

        Only the final token reads the changed keys and values: to all other tokens the labels stay what they were.
        """
        attention = self.block_map.blocks[layer].attention
        assert attention is not None
        device, rows = at.device, torch.arange(len(at), device=at.device)
        time = seen["k"].shape[1]
        q, k, v = seen["q"][rows, at], seen["k"].clone(), seen["v"].clone()
        for j, head in enumerate(heads):
            for part, x, where in (
                ("q", q, (rows,)),
                ("k", k, (rows[:, None], labels)),
                ("v", v, (rows[:, None], labels)),
            ):
                rule = self.rules.get((layer, head, part))
                if rule is None:
                    continue
                old = x[(*where, j)]
                x[(*where, j)] = new = rule(old, batch).to(x)
                if spread is not None:
                    flat = old.reshape(-1, old.shape[-1]).float()
                    change, size = (old - new).float().square().sum(), (flat - flat.mean(0)).square().sum()
                    spread.append((float(change), float(size)))
        # Scores depend on distances only, so counting positions from the first column is right on either side.
        rotary = layer_rotary(self.block_map, layer, k.new_zeros(len(rows), time, self.block_map.d_model))
        allowed = attention.allowed(time, mask, device)[:, 0].expand(len(rows), -1, -1)[rows, at]
        pattern = row_pattern(attention, rotate_row(q, row_of(rotary, at)), rotate_all(k, rotary), allowed)
        return pattern, torch.einsum("bht,bthd->bhd", pattern, v)

    @contextmanager
    def apply(self, batch: ChoiceBatch) -> Iterator[nn.Module]:
        """The user's own model with these heads changed inside the block, by hooks that are removed afterwards.

        The heads' outputs at the final token are computed anew from the model's own queries, keys and values; nothing
        else is touched, heads that share keys with these neither.

        Args:
            batch: the prompts that the model is run on inside the block: ``model(batch.input_ids, ...)``. It says
                where labels and final tokens stand.

        Yields:
            the model.

        Raises:
            InvalidInput: inside the block, a run on prompts of another shape.
        """
        model, the_map = self.block_map.model, self.block_map
        layers = sorted({layer for layer, _ in self.heads})
        reads = [the_map.resolve(f"layers.{layer}.attn.{part}") for layer in layers for part in "qkv"]
        with ExitStack() as stack:
            seen = stack.enter_context(capture(model, reads, detach=False))
            writes = {the_map.resolve(f"layers.{i}.attn.z"): partial(self._heads, i, batch, seen) for i in layers}
            stack.enter_context(hooked(model, writes))
            yield model

    def _heads(self, layer: int, batch: ChoiceBatch, seen: dict[str, Tensor], z: Tensor) -> Tensor:
        """All heads' outputs ``[batch, time, heads * d]``, those of these heads at the final token made anew."""
        if z.shape[:2] != batch.input_ids.shape:
            raise InvalidInput(
                f"the model was run on prompts of shape {tuple(z.shape[:2])}, the batch has "
                f"{tuple(batch.input_ids.shape)}: run it on batch.input_ids inside the block (without a cache)"
            )
        attention = self.block_map.blocks[layer].attention
        assert attention is not None
        heads = [head for i, head in self.heads if i == layer]
        made: dict[str, Tensor] = {}
        for part in "qkv":
            x, norm = attention.split(seen[f"layers.{layer}.attn.{part}"]), attention.norm_of(part)
            x = x if norm is None else norm(x)
            made[part] = (x if part == "q" else attention.repeated(x))[:, :, heads]
        device, rows = z.device, batch.rows.to(z.device)
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        ends = _ends(batch).to(device)
        _, out = self._row(layer, heads, batch, made, ends, batch.label_pos.to(device), mask)
        changed = z.unflatten(-1, (-1, attention.head_dim)).clone()
        changed[rows[:, None], ends[:, None], torch.tensor(heads, device=device)[None]] = out.to(z.dtype)
        return changed.flatten(2)


def _right(labels: Tensor, batch: ChoiceBatch, heads: int) -> Tensor:
    """The column of each prompt's right label, ``[batch, head, 1]``."""
    return labels[batch.rows, batch.answer][:, None, None].expand(-1, heads, 1)


def _ends(batch: ChoiceBatch) -> Tensor:
    """The columns from which answers are read, in the prompts as they came."""
    time = batch.input_ids.shape[1]
    if batch.final_pos is not None:
        return torch.where(batch.final_pos < 0, batch.final_pos + time, batch.final_pos)
    if batch.attention_mask is None:
        return torch.full_like(batch.rows, time - 1)
    return time - 1 - batch.attention_mask.flip(1).int().argmax(1)


@dataclass(frozen=True)
class Samples:
    """Queries at the final token, keys and values at the labels, of some heads.

    Attributes:
        q: (layer, head) -> ``[batch, d]``.
        k, v: (layer, head) -> ``[batch, item, d]``.
        batch: the prompts.
    """

    q: dict[tuple[int, int], Tensor]
    k: dict[tuple[int, int], Tensor]
    v: dict[tuple[int, int], Tensor]
    batch: ChoiceBatch


@torch.no_grad()
def collect(model: nn.Module | BlockMap, heads: Sequence[str], batch: ChoiceBatch, warn: bool = True) -> Samples:
    """Queries, keys and values of some heads, in float32 at least.

    Args:
        model: any mapped decoder.
        heads: names such as ``"layers.3.attn.head.5"``.
        batch: the prompts.
        warn: of a model at chance.
    """
    the_map = decoder_map(model)
    wanted = named_heads(the_map, heads)
    padded = right_padded(batch.input_ids, batch.attention_mask)
    at, rows = place_of(padded, batch.final_pos), batch.rows
    labels = batch.label_pos - padded.offset[:, None]
    found: dict[str, dict[tuple[int, int], Tensor]] = {"q": {}, "k": {}, "v": {}}

    def keep(name: str, layer: int, x: Tensor) -> Tensor:
        if name in found:
            part = x[rows, at] if name == "q" else x[rows[:, None], labels]
            part = part.to(torch.promote_types(x.dtype, torch.float32))
            for i, head in wanted:
                if i == layer:
                    found[name][i, head] = part[..., head, :]
        return x

    with evaluating(the_map.model):
        logits = the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    if warn:
        warn_at_chance(logits[rows, at].gather(1, batch.answers), batch)
    return Samples(found["q"], found["k"], found["v"], batch)


def named_heads(the_map: BlockMap, heads: Sequence[str]) -> list[tuple[int, int]]:
    """Layer and head of every name.

    Raises:
        InvalidInput: no heads, a name that is none, or one that the model does not have.
    """
    if isinstance(heads, str) or not heads:
        raise InvalidInput(f"heads={heads!r}: expected a list of names such as 'layers.0.attn.head.1'")
    found: list[tuple[int, int]] = []
    for name in heads:
        layer, kind, head = split_node(the_map, name)
        if kind != "z" or head is None:
            raise InvalidInput(f"heads={list(heads)}: only heads have queries and keys")
        found.append((layer, head))
    return found


def at_least_two(batch: ChoiceBatch) -> None:
    """Whether every item is right in two prompts or more.

    Raises:
        InvalidInput: one that is not.
    """
    counts = torch.bincount(batch.answer, minlength=batch.n_items)
    if int(counts.min()) < 2:
        raise InvalidInput(
            f"item {int(counts.argmin())} is right in {int(counts.min())} prompts: at least 2 are needed"
        )
