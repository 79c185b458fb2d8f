"""Queries and keys of letter heads squeezed to a few dimensions: what do they need to find the right label?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.circuit_analysis.batch import ChoiceBatch
from broadsheet.interpretability.circuit_analysis.effects import decoder_map
from broadsheet.nn.attribution import parse_node, place_of
from broadsheet.nn.blocks import BlockMap
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded

BASES = ("class_means", "svd", "random")


@dataclass(frozen=True)
class Subspace:
    """``x`` is replaced by ``mean + (x - mean) basis basis^T``.

    Attributes:
        mean: ``[d]``.
        basis: ``[d, rank]``, orthonormal.
        explained: share of the variance that the subspace holds.
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d rank"]
    explained: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.mean + (x - self.mean) @ self.basis @ self.basis.T


@dataclass(frozen=True)
class Score:
    """How well the questions are answered: share right, loss over the answers (nats), attention on the right label."""

    accuracy: float
    loss: float
    attention: float


@dataclass(frozen=True)
class Compression:
    """Some heads of a model, each with its queries (final token) and keys or values (labels) confined to a subspace.

    Attributes:
        block_map: of the model; its modules are left as they are.
        spaces: (layer, head, "q", "k" or "v") -> subspace. Queries and keys are taken after their own norm (Qwen3,
            Gemma 3) and before rotary positions.
    """

    block_map: BlockMap
    spaces: dict[tuple[int, int, str], Subspace]

    @property
    def heads(self) -> list[tuple[int, int]]:
        return sorted({(layer, head) for layer, head, _ in self.spaces})

    @torch.no_grad()
    def evaluate(self, batch: ChoiceBatch, compressed: bool = True) -> Score:
        """The model with these heads compressed, on prompts of any kind.

        Args:
            batch: the prompts.
            compressed: False gives the model as it is.
        """
        padded = right_padded(batch.input_ids, batch.attention_mask)
        at, rows = place_of(padded, batch.final_pos), batch.rows
        labels = batch.label_pos - padded.offset[:, None]
        looked: list[Tensor] = []

        def edit(name: str, layer: int, x: Tensor) -> Tensor:
            if name == "pattern":
                on = x[rows[:, None], :, at[:, None], labels]  # [batch, item, head]
                looked.extend(on[rows, batch.answer, head] for i, head in self.heads if i == layer)
            if name not in ("q", "k", "v") or not compressed:
                return x
            places = (rows, at) if name == "q" else (rows[:, None], labels)
            for (i, head, part), space in self.spaces.items():
                if i == layer and part == name:
                    x = x.clone()
                    x[(*places, head)] = space(x[(*places, head)])
            return x

        with evaluating(self.block_map.model):
            logits = self.block_map.forward(padded.input_ids, padded.attention_mask, edit=edit)
        chosen = logits[rows, at].gather(1, batch.answers)
        accuracy = (chosen.argmax(-1) == batch.answer).double().mean()
        return Score(
            float(accuracy), float(nn.functional.cross_entropy(chosen, batch.answer)), float(torch.stack(looked).mean())
        )


@torch.no_grad()
def compress_heads(
    model: nn.Module | BlockMap,
    heads: Sequence[str],
    batch: ChoiceBatch,
    rank: int = 3,
    parts: str = "qk",
    basis: str = "class_means",
    seed: int = 0,
) -> Compression:
    """Fit the subspaces on some prompts. Compress all letter heads together: one alone is masked by the others.

    Args:
        model: any mapped decoder.
        heads: names such as ``"layers.3.attn.head.5"``.
        batch: ordinary prompts, at least two for every right item.
        rank: dimensions kept; 0 leaves the mean only.
        parts: some of ``q``, ``k``, ``v``.
        basis: ``"class_means"`` (of mean queries by right item and mean keys by item; rank n - 1 spans them all),
            ``"svd"`` (of all samples), or ``"random"`` (the control).
        seed: of the random basis.
    """
    the_map = decoder_map(model)
    n = batch.answers.shape[1]
    if not heads or not parts or set(parts) - set("qkv") or basis not in BASES:
        raise InvalidInput(f"heads={list(heads)}, parts={parts!r}, basis={basis!r}: expected heads, of qkv, of {BASES}")
    if not 0 <= rank <= the_map.head_dim:
        raise InvalidInput(f"rank={rank}: a head has {the_map.head_dim} dimensions")
    counts = torch.bincount(batch.answer, minlength=n)
    if int(counts.min()) < 2:
        raise InvalidInput(
            f"item {int(counts.argmin())} is right in {int(counts.min())} prompts: at least 2 are needed"
        )
    wanted = [parse_node(name) for name in heads]
    if any(head is None for _, head in wanted):
        raise InvalidInput(f"heads={list(heads)}: only heads have queries and keys")
    padded = right_padded(batch.input_ids, batch.attention_mask)
    at, rows = place_of(padded, batch.final_pos), batch.rows
    labels = batch.label_pos - padded.offset[:, None]
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, layer: int, x: Tensor) -> Tensor:
        if name == "q":
            seen[name, layer] = x[rows, at]  # [batch, head, d]
        elif name in ("k", "v"):
            seen[name, layer] = x[rows[:, None], labels]  # [batch, item, head, d]
        return x

    with evaluating(the_map.model):
        the_map.forward(padded.input_ids, padded.attention_mask, edit=keep)
    random = torch.Generator().manual_seed(seed)
    spaces = {}
    for layer, head in wanted:
        assert head is not None
        q = seen["q", layer][:, head]
        means = {"q": torch.stack([q[batch.answer == i].mean(0) for i in range(n)])}
        samples = {"q": q}
        for part in "kv":
            x = seen[part, layer][:, :, head]
            means[part], samples[part] = x.mean(0), x.flatten(0, 1)
        for group in ("qk", "v"):
            source = means if basis == "class_means" else samples
            stacked = torch.cat([source[part] - means[part].mean(0) for part in group])
            if basis == "random":
                made = torch.linalg.qr(torch.randn(q.shape[1], q.shape[1], generator=random, dtype=torch.float64))[0]
                vectors = made.to(q)[:, :rank]
            else:
                vectors = torch.linalg.svd(stacked)[2][:rank].T
            for part in set(group) & set(parts):
                centre = means[part].mean(0)
                x = samples[part] - centre
                share = float((x @ vectors).square().sum() / x.square().sum().clamp_min(1e-30))
                spaces[layer, head, part] = Subspace(centre, vectors, share)
    return Compression(the_map, spaces)
