"""What can be a source or a target: heads, MLPs and tokens, and how a list of them is checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.batches import device_of
from broadsheet.nn.blocks import BlockMap, block_map


@dataclass(frozen=True, order=True)
class Node:
    """One attention head, at one position or at all of them.

    Args:
        layer: from 0.
        position: from 0; None for all positions.
        head: from 0.
    """

    layer: int
    position: int | None
    head: int

    def __str__(self) -> str:
        place = "" if self.position is None else f"@{self.position}"
        return f"L{self.layer}H{self.head}{place}"


@dataclass(frozen=True, order=True)
class MLPNode:
    """The MLP of one layer, at one position or at all of them."""

    layer: int
    position: int | None = None

    def __str__(self) -> str:
        return f"L{self.layer}MLP" + ("" if self.position is None else f"@{self.position}")


@dataclass(frozen=True)
class Tokens:
    """What a layer reads at some positions: at level 0 the embeddings of tokens.

    Args:
        positions: from 0.
        level: the layer whose input is meant.
    """

    positions: tuple[int, ...]
    level: int = 0

    def __post_init__(self) -> None:
        positions = (self.positions,) if isinstance(self.positions, int) else self.positions
        object.__setattr__(self, "positions", tuple(int(p) for p in positions))

    def __str__(self) -> str:
        place = ",".join(map(str, self.positions))
        return f"tokens {place}" + (f" at L{self.level}" if self.level else "")


Component = Node | MLPNode | Tokens


def all_nodes(model: nn.Module | BlockMap, positions: Iterable[int] | None = None) -> list[Node]:
    """Every head of a model, or every head at every one of some positions.

    Args:
        model: the model or its block map.
        positions: None: heads as a whole.
    """
    blocks = (model if isinstance(model, BlockMap) else block_map(model)).blocks
    places = [None] if positions is None else list(positions)
    return [
        Node(layer, position, head)
        for layer, block in enumerate(blocks)
        if block.attention is not None
        for position in places
        for head in range(block.attention.n_heads)
    ]


def source_sets(sources: Any, the_map: BlockMap, length: int) -> list[frozenset[Component]]:
    """The sources as sets of checked components, one set for each row of a result.

    Args:
        sources: a sequence; each element a component or a set, tuple or list of components (possibly empty).
        the_map: gives the limits.
        length: number of positions.

    Raises:
        InvalidInput: not a component, or out of range.
    """
    if isinstance(sources, Component):
        sources = [sources]
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        raise InvalidInput(
            f"sources is a {type(sources).__name__}: expected a list of Node, MLPNode, Tokens or sets of them"
        )
    rows = []
    for source in sources:
        if isinstance(source, Component):
            members: frozenset[Any] = frozenset([source])
        elif isinstance(source, Iterable) and not isinstance(source, str):
            members = frozenset(source)
        else:
            raise InvalidInput(f"the source {source!r} is no Node, MLPNode or Tokens, nor a set of them")
        for member in members:
            check_component(member, the_map, length)
        rows.append(members)
    if not rows:
        raise InvalidInput("no sources: hand in at least one (an empty set is allowed and gives zero)")
    return rows


def check_component(member: Any, the_map: BlockMap, length: int) -> None:
    """Refuse what is not a component of this model, with the limits."""
    if isinstance(member, Tokens):
        _limit("level", member.level, the_map.n_layers, member)
        if not member.positions:
            raise InvalidInput("Tokens without positions: name at least one")
        for position in member.positions:
            _limit("position", position, length, member)
        return
    if not isinstance(member, Node | MLPNode):
        raise InvalidInput(f"{member!r} is a {type(member).__name__}: expected Node, MLPNode or Tokens")
    _limit("layer", member.layer, the_map.n_layers, member)
    if member.position is not None:
        _limit("position", member.position, length, member)
    block = the_map.blocks[member.layer]
    if isinstance(member, Node):
        if block.attention is None:
            raise InvalidInput(f"{member}: layer {member.layer} has no attention")
        _limit("head", member.head, block.attention.n_heads, member)
    elif block.mlp is None:
        raise InvalidInput(f"{member}: layer {member.layer} has no MLP")


def _limit(what: str, value: int, n: int, member: Any) -> None:
    if not 0 <= value < n:
        raise InvalidInput(f"{what} {value} of {member!r} is out of range: 0 to {n - 1}")


@dataclass(frozen=True)
class Prompts:
    """Checked token ids (or pixel values) with their mask (None: no padding)."""

    input_ids: Tensor
    attention_mask: Tensor | None
    extra: dict[str, Any]
    length: int

    @property
    def batch(self) -> int:
        return len(self.input_ids)

    @property
    def mask(self) -> Tensor:
        """The mask, all ones where there is no padding, ``[batch, time]``."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.batch, self.length, dtype=torch.long, device=self.input_ids.device)

    def times(self, n: int) -> "Prompts":
        """The same prompts ``n`` times, one after the other."""

        def again(x: Tensor) -> Tensor:
            return x.repeat(n, *[1] * (x.ndim - 1))

        mask = None if self.attention_mask is None else again(self.attention_mask)
        extra = {name: again(value) for name, value in self.extra.items()}
        return Prompts(again(self.input_ids), mask, extra, self.length)

    @property
    def aligned(self) -> bool:
        """Whether the tokens of all prompts stand at the same positions."""
        return self.attention_mask is None or bool((self.attention_mask == self.attention_mask[:1]).all())


def prompts(the_map: BlockMap, data: Any, attention_mask: Any = None) -> Prompts:
    """Token ids of equal length on the model's device, or a refusal.

    Args:
        the_map: of the model, which says device and padding token.
        data: ids ``[batch, time]`` (tensor, array or lists), or a mapping with ``input_ids`` and perhaps
            ``attention_mask`` and ``token_type_ids``, such as a tokenizer gives; for a model of images pixel values
            ``[batch, channels, height, width]`` or a mapping with ``pixel_values``.
        attention_mask: ``[batch, time]``, 1 for tokens, 0 for padding.
    """
    model = the_map.model
    device = device_of(model)
    if the_map.patches is not None:
        return _images(the_map, data, device)
    extra: dict[str, Any] = {}
    if isinstance(data, Mapping) or hasattr(data, "input_ids"):
        items = dict(data) if isinstance(data, Mapping) or hasattr(data, "keys") else vars(data)
        attention_mask = items.get("attention_mask") if attention_mask is None else attention_mask
        if items.get("token_type_ids") is not None:
            extra["token_type_ids"] = items["token_type_ids"]
        data = items["input_ids"]
    if isinstance(data, Sequence) and data and isinstance(data[0], Sequence | Tensor):
        lengths = sorted({len(row) for row in data})
        if len(lengths) > 1:
            raise InvalidInput(
                f"prompts of unequal length ({lengths[0]} to {lengths[-1]} tokens): pad them and hand in attention_mask"
            )
        data = [row.tolist() if isinstance(row, Tensor) else list(row) for row in data]
    try:
        ids = torch.as_tensor(data, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"input_ids cannot be read as integers [batch, time]: {error}") from error
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInput(
            f"input_ids has shape {tuple(ids.shape)} and type {ids.dtype}: expected integers [batch, time]"
        )
    ids = ids.long()
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if attention_mask is None:
        if isinstance(pad, int):
            ends = [(ids == pad).long().cummin(1).values.sum(1), (ids == pad).flip(1).long().cummin(1).values.sum(1)]
            if any(int(n.max()) > int(n.min()) for n in ends):
                raise InvalidInput(
                    f"prompts of unequal length (padding token {pad} at an end of some) without attention_mask: "
                    "hand it in"
                )
        mask = None
    else:
        mask = torch.as_tensor(attention_mask, device=device)
        if mask.shape != ids.shape:
            raise InvalidInput(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: must be equal"
            )
        if not bool(mask.bool().any(1).all()):
            raise InvalidInput("attention_mask hides a whole prompt: every row needs at least one token")
        mask = None if bool(mask.bool().all()) else mask.long()
    extra = {name: torch.as_tensor(value, device=device) for name, value in extra.items()}
    return Prompts(ids, mask, extra, ids.shape[1])


def _images(the_map: BlockMap, data: Any, device: torch.device) -> Prompts:
    assert the_map.patches is not None
    pixels = data["pixel_values"] if isinstance(data, Mapping) else data
    pixels = torch.as_tensor(pixels, device=device)
    if pixels.ndim != 4 or 0 in pixels.shape or not pixels.is_floating_point():
        raise InvalidInput(
            f"pixel_values has shape {tuple(pixels.shape)} and type {pixels.dtype}: expected floating-point numbers "
            "[batch, channels, height, width]"
        )
    return Prompts(pixels, None, {}, the_map.patches(pixels))
