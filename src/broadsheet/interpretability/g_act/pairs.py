"""What a model holds in mind at the end of two versions of a prompt, layer by layer, and how the two differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability.g_act.sites import Blocks, places, read_places
from broadsheet.nn.blocks import block_map
from broadsheet.nn.padding import right_padded
from broadsheet.nn.plotting import COLOURS, new_axes
from broadsheet.nn.progress import SILENT, Progress

ROLES = ("plus", "minus", "prompt")
Pair = Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class PairActivations:
    """States of paired prompts.

    Attributes:
        h_plus: ``[n, layers, d]``, float32: the version that asks for what is wanted.
        h_minus: ``[n, layers, d]``: the other version.
        h_prompt: ``[n, layers, d]``: the neutral prompt; None where pairs have none.
        layers: numbers of the blocks.
        site: where the states stand, one of :data:`~broadsheet.interpretability.g_act.sites.SITES`.
        n_heads: of ``head_out``, whose states are all heads' outputs side by side; 1 elsewhere.
        blocks: how to find the blocks of a model without a block map.
    """

    h_plus: Float[Tensor, "n layers d"]
    h_minus: Float[Tensor, "n layers d"]
    h_prompt: Float[Tensor, "n layers d"] | None = None
    layers: tuple[int, ...] = ()
    site: str = "resid_post"
    n_heads: int = 1
    blocks: Blocks = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(self.h_plus.shape[1])))
        shapes = {tuple(h.shape) for h in (self.h_plus, self.h_minus, self.h_prompt) if h is not None}
        if len(shapes) > 1 or len(self.layers) != self.h_plus.shape[1]:
            raise InvalidInput(
                f"states of shapes {sorted(shapes)} for {len(self.layers)} layers: both versions of every prompt need "
                "one state in every layer"
            )
        for h in (self.h_plus, self.h_minus, self.h_prompt):
            if h is not None and not bool(h.isfinite().all()):
                layer = self.layers[int((~h.isfinite()).any(-1).any(0).nonzero()[0])]
                raise InvalidInput(f"layer {layer}: the states hold NaN or infinite values: leave out what made them")

    def __len__(self) -> int:
        return len(self.h_plus)

    @property
    def differences(self) -> Float[Tensor, "n layers d"]:
        return self.h_plus - self.h_minus

    @property
    def states(self) -> dict[str, Tensor]:
        """All states that a steered model may begin from, by role."""
        found = {"minus": self.h_minus, "plus": self.h_plus}
        return found if self.h_prompt is None else {"prompt": self.h_prompt, **found}

    def subset(self, rows: Sequence[int] | Tensor) -> "PairActivations":
        """Some of the prompts."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        prompt = None if self.h_prompt is None else self.h_prompt[rows]
        return changed(self, h_plus=self.h_plus[rows], h_minus=self.h_minus[rows], h_prompt=prompt)

    def plot(self, labels: Sequence[Any] | None = None, ax: Any = None) -> Any:
        """The differences on their first two principal components, all layers together.

        Args:
            labels: ``[n]``, one for each prompt, told apart by colour.
            ax: matplotlib axes or None.
        """
        points = flattened(self.differences).double().numpy()
        centred = points - points.mean(0)
        _, size, rows = np.linalg.svd(centred, full_matrices=False)
        at = centred @ rows[:2].T
        ax = new_axes(ax)
        names = np.asarray(["" for _ in at] if labels is None else [str(x) for x in labels])
        colours = ["ours", "baseline", "accent", "good", "neutral", "paper"]
        for i, name in enumerate(dict.fromkeys(sorted(names))):
            chosen = at[names == name]
            ax.scatter(*chosen.T, s=16, alpha=0.75, color=COLOURS[colours[i % 6]], label=name or None, linewidths=0)
        share = size**2 / (size**2).sum()
        ax.set_xlabel(f"first component ({share[0]:.0%})")
        ax.set_ylabel(f"second component ({share[1]:.0%})")
        if labels is not None:
            ax.legend()
        return ax


def flattened(differences: Float[Tensor, "n layers d"]) -> Float[Tensor, "n layers_d"]:
    """Differences of all layers side by side, each layer scaled to unit mean norm: deep layers have longer vectors."""
    size = differences.norm(dim=-1, keepdim=True).mean(0, keepdim=True)
    return (differences / size.clamp_min(1e-30)).flatten(1)


def collect_pairs(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    position: str = "last",
    *,
    blocks: Blocks = None,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> PairActivations:
    """States of both versions of every prompt.

    Args:
        model: a Hugging Face model, or any module with a list of blocks, on its own device.
        tokenizer: from text to ids; a Hugging Face tokenizer, or a function that gives a list of ids.
        pairs: ``(plus, minus)`` or ``(prompt, plus, minus)``, or dictionaries with these keys; ``prompt`` is neutral.
        layers: which; None for all.
        site: ``"attn_out"``, ``"mlp_out"``, ``"resid_mid"``, ``"resid_post"`` or ``"head_out"``.
        position: ``"last"`` token, or ``"answer"``: the mean over the tokens that follow what both versions begin with.
        blocks: of a (causal) model without a block map, as in :func:`~broadsheet.interpretability.g_act.sites.places`.
        batch_size: prompts in a forward pass.
        progress: where prompts read are shown.

    Raises:
        InvalidInput: no pairs, an entry that is no pair, an empty prompt, an unknown site or layer, states not finite.
    """
    if position not in ("last", "answer"):
        raise InvalidInput(f"position={position!r}: expected 'last' or 'answer'")
    where = places(model, site, layers, blocks)
    texts = _columns(pairs)
    encode = token_ids_of(tokenizer)
    ids = {role: [encode(text) for text in column] for role, column in texts.items()}
    for role, rows in ids.items():
        empty = [i for i, row in enumerate(rows) if not row]
        if empty:
            raise InvalidInput(f"{role} of pair {empty[0]} is empty: a text of at least one token is expected")
    starts = [_common(plus, minus) for plus, minus in zip(ids["plus"], ids["minus"], strict=True)]
    if position == "answer":
        ids.pop("prompt", None)  # it has no answer
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}
    with progress.task("states of pairs", total=sum(map(len, ids.values()))) as task:
        for role, rows in ids.items():
            parts = []
            for begin in range(0, len(rows), batch_size):
                some = rows[begin : begin + batch_size]
                first = None if position == "last" else starts[begin : begin + batch_size]
                parts.append(_states(model, where, some, first, device))
                task.advance(len(some))
            found[role] = torch.cat(parts)
    heads = 1
    if site == "head_out":
        heads = block_map(model).n_heads
    numbers = tuple(place.layer for place in where)
    return PairActivations(found["plus"], found["minus"], found.get("prompt"), numbers, site, heads, blocks)


def token_ids_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to ids, with the tokenizer's special tokens."""

    def encode(text: str) -> list[int]:
        coded = tokenizer(text)
        return [int(i) for i in (coded["input_ids"] if isinstance(coded, Mapping) else coded)]

    return encode


def _columns(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    if not len(pairs):
        raise InvalidInput("pairs is empty: hand in (plus, minus) or (prompt, plus, minus) texts")
    rows: list[dict[str, str]] = []
    row: dict[str, str]
    for i, pair in enumerate(pairs):
        if isinstance(pair, Mapping):
            row = {role: pair[role] for role in ROLES if role in pair}
        elif isinstance(pair, str) or len(pair) not in (2, 3):
            what = "one text" if isinstance(pair, str) else f"{len(pair)} texts"
            raise InvalidInput(f"pair {i} holds {what}: expected (plus, minus) or (prompt, plus, minus)")
        else:
            names: tuple[str, ...] = ("plus", "minus") if len(pair) == 2 else ("prompt", "plus", "minus")
            row = dict(zip(names, pair, strict=True))
        missing = [role for role in ("plus", "minus") if role not in row]
        if missing:
            raise InvalidInput(f"pair {i} has no {missing[0]!r}: both versions of every prompt are needed")
        rows.append(row)
    roles = [role for role in ROLES if all(role in row for row in rows)]
    return {role: [row[role] for row in rows] for role in roles}


def _common(a: list[int], b: list[int]) -> int:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(n, len(a) - 1, len(b) - 1)


def _causal(model: nn.Module) -> bool:
    try:
        return block_map(model).causal
    except UnsupportedModel:
        return True


def _states(
    model: nn.Module, where: Any, rows: list[list[int]], first: list[int] | None, device: torch.device
) -> Tensor:
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    # A causal model's tokens never see the padding behind them, and a row that sees nothing else ends in NaN in some.
    padded = right_padded(ids.to(device), None if _causal(model) else mask.to(device))
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    begin = last if first is None else torch.tensor(first, device=device)
    columns = torch.arange(length, device=device)
    counted = ((columns >= begin[:, None]) & (columns <= last[:, None])).float()
    weights = counted / counted.sum(1, keepdim=True)
    values = read_places(model, where, padded)
    # Where one token counts, the mean is that token's state exactly.
    return torch.stack([torch.einsum("bt,btd->bd", weights.to(x.device), x.float()).cpu() for x in values], 1)
