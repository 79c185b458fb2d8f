"""Add something to a running model's states, at the tokens that are to be steered and at no others.

Past tokens cannot be steered once their keys and values are cached, so that with a cache the steered tokens are the
last one of the prompt and every generated one. Without a cache each pass holds the whole text again: the same tokens
are then steered in every pass, and the texts come out the same. Which columns these are is counted on the host; nothing
in a hook waits for the device.
"""

import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.g_act.sites import Place
from broadsheet.nn.hooks import Site, replace

Positions = str | int | Tensor
Rule = Callable[[int, Tensor], Tensor]  # (which place, states [batch, time, d]) -> what is added, same shape
Recorder = Callable[[int, Tensor, Tensor | None], None]

Strength = float | int | Tensor


def strength(alpha: Strength) -> tuple[bool, Callable[[Tensor], Tensor]]:
    """Whether a strength changes anything, and what multiplies vectors ``[batch, time, d]`` by it.

    Args:
        alpha: a number, or one for each row ``[batch]``: many strengths in one pass.

    Raises:
        InvalidInput: not finite, or of another shape.
    """
    if isinstance(alpha, Tensor) and alpha.ndim == 1:
        if not bool(alpha.isfinite().all()):
            raise InvalidInput("alpha holds NaN or infinite values: expected finite numbers")
        return True, lambda x: x * alpha.to(x)[:, None, None]
    number = float(alpha)
    if not math.isfinite(number):
        raise InvalidInput(f"alpha={number}: expected a finite number")
    return number != 0, lambda x: x * number


_STEERED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class QuantizedBlocks(UserWarning):
    """Blocks whose weights are quantized or elsewhere: steering works on what they put out, in its own precision."""


@contextmanager
def injecting(
    model: nn.Module,
    where: Sequence[Place],
    rule: Rule,
    positions: Positions = "last",
    *,
    record: Recorder | None = None,
    allow_nested: bool = False,
) -> Iterator[nn.Module]:
    """Add ``rule(i, states)`` at place ``i`` in every pass inside the block; the model is whole again afterwards.

    Args:
        model: a Hugging Face model, or any module that takes ``[batch, time]`` ids (and ``attention_mask``).
        where: places; none: nothing is hooked.
        rule: gives what is added; taken in float32, added in the state's own precision.
        positions: ``"last"``: the last token of the prompt and all generated ones; ``"prompt"``: only the former;
            ``"all"``: every token; a number ``k``: from each text's token ``k`` on; or a boolean mask
            ``[batch, time]`` for plain passes.
        record: called with the place, the states that the rule saw ``[batch, time, d]``, and which of them are steered
            (None: all).
        allow_nested: add to what an outer block already adds.

    Raises:
        InvalidInput: the model is already steered, or unknown positions.

    Warns:
        QuantizedBlocks: a steered block has weights that are not floating-point numbers, or none at hand.
    """
    if isinstance(positions, str) and positions not in ("last", "prompt", "all"):
        raise InvalidInput(f"positions={positions!r}: expected 'last', 'prompt', 'all', a number or a mask")
    if not where:
        yield model
        return
    nested = model in _STEERED
    if nested and not allow_nested:
        raise InvalidInput("this model is already steered: leave the outer block first, or hand in allow_nested=True")
    _warn_if_quantized(model, where)
    columns = _Columns(model, positions)
    edits: dict[Any, Callable[[Tensor], Tensor]] = {}
    carried: dict[int, Tensor] = {}

    def keeper(i: int) -> Callable[[Tensor], Tensor]:
        def keep(x: Tensor) -> Tensor:
            carried[i] = x
            return x

        return keep

    def editor(i: int) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            begin, steered = columns.begin, columns.steered
            if begin >= x.shape[1]:
                return x
            part = x[:, begin:] if begin else x
            states = part if i not in carried else part + carried[i][:, begin:]
            if steered is not None and steered.device != x.device:
                steered = steered.to(x.device)
            if record is not None:
                record(i, states.detach(), steered)
            added = rule(i, states).to(x.dtype)
            if steered is not None:
                added = torch.where(steered[..., None], added, 0)
            return part + added if not begin else torch.cat([x[:, :begin], part + added], 1)

        return edit

    for i, place in enumerate(where):
        if place.carried is not None:
            edits[_own(place.carried, f"{i} carried")] = keeper(i)
        edits[_own(place.site, f"{i}")] = editor(i)
    with ExitStack() as stack:
        stack.enter_context(columns.following())
        stack.enter_context(replace(model, edits))
        if not nested:
            _STEERED.add(model)
            stack.callback(_STEERED.discard, model)
        yield model


def _own(site: Site, label: str) -> Site:
    """The same place under a label of its own: two places of one plan may be the same submodule."""
    return Site(site.module, site.at, site.index, label, site.tokens_of)


def _warn_if_quantized(model: nn.Module, where: Sequence[Place]) -> None:
    for place in where:
        weights = list(model.get_submodule(place.site.module).parameters())
        kinds = {
            "on no device" if w.is_meta else str(w.dtype) for w in weights if w.is_meta or not w.is_floating_point()
        }
        if kinds:
            warnings.warn(
                f"layer {place.layer}: weights are {', '.join(sorted(kinds))}; vectors are added to what the block "
                "puts out, in its own precision",
                QuantizedBlocks,
                stacklevel=4,
            )
            return


class _Columns:
    """Which columns of the pass that is running are steered: ``begin`` on, and of those ``steered`` (None: all)."""

    def __init__(self, model: nn.Module, positions: Positions) -> None:
        self.model, self.positions = model, positions
        self.names = list(inspect.signature(model.forward).parameters)
        self.begin: int = 0
        self.steered: Tensor | None = None
        self.generating = False
        self.prompt: int | None = None  # columns of the prompt that is being continued
        self.first: Tensor | None = None  # [batch], its last real column, where rows differ
        self.seen = 0
        self.device: torch.device | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep the columns up to date while the model runs, alone or inside ``generate``."""
        model: Any = self.model
        handle = model.register_forward_pre_hook(self._before, with_kwargs=True)
        own, had = getattr(model, "generate", None), "generate" in model.__dict__
        if own is not None:

            def generate(*args: Any, **kwargs: Any) -> Any:
                self.generating, self.prompt, self.seen = True, None, 0
                try:
                    return own(*args, **kwargs)
                finally:
                    self.generating = False

            model.__dict__["generate"] = generate
        try:
            yield
        finally:
            handle.remove()
            if had:
                model.__dict__["generate"] = own
            elif own is not None:
                model.__dict__.pop("generate", None)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        first = (given.get("input_ids"), given.get("inputs_embeds"), *given.values())
        main: Tensor = next(x for x in first if _is(x))
        time = main.shape[1]
        mask = given.get("attention_mask")
        mask = mask if _is(mask) and mask.ndim == 2 else None
        past = given.get("past_key_values")
        offset = 0 if past is None else self._length(past)
        if self.generating and self.prompt is None:
            self.prompt, self.first = time, None
            if mask is not None and isinstance(self.positions, str) and self.positions != "all":
                # Once for each text: where a prompt ends before the last column (padding on the right).
                last = time - 1 - mask[:, :time].flip(1).int().argmax(1)
                self.first = None if bool((last == time - 1).all()) else last
        self.seen = offset + time
        self.device = main.device
        self.begin, self.steered = self._chosen(len(main), time, offset, mask)

    def _length(self, past: Any) -> int:
        length = past.get_seq_length() if hasattr(past, "get_seq_length") else self.seen
        return length if isinstance(length, int) else self.seen

    def _chosen(self, batch: int, time: int, offset: int, mask: Tensor | None) -> tuple[int, Tensor | None]:
        positions = self.positions
        if isinstance(positions, Tensor):
            if tuple(positions.shape) != (batch, time):
                raise InvalidInput(f"the mask of positions is {tuple(positions.shape)}, the tokens are {(batch, time)}")
            return 0, positions.bool()
        if positions == "all":
            return 0, None if mask is None else mask[:, -time:].bool()
        if isinstance(positions, int):
            if mask is None:
                return min(max(0, positions - offset), time), None
            numbers = mask.cumsum(1) - 1
            return 0, ((numbers >= positions) & mask.bool())[:, -time:]
        only = positions == "prompt"
        if self.generating and self.prompt is not None:
            if only and offset >= self.prompt:
                return time, None
            if self.first is None and not only:
                return min(time, max(0, self.prompt - 1 - offset)), None
            if self.first is None:  # a cache or none: the prompt's last column is there, or everything is past
                at = self.prompt - 1 - offset
                if at == time - 1:
                    return at, None
                steered = torch.arange(time, device=self.device) == at
                return 0, steered.expand(batch, time)
            first = self.first.repeat_interleave(batch // len(self.first))  # beams
            columns = torch.arange(offset, offset + time, device=first.device)
            steered = columns == first[:, None] if only else columns >= first[:, None]
            return 0, steered if mask is None else steered & mask[:, -time:].bool()
        if only and offset:
            return time, None
        if mask is None or (offset and time == 1):
            return time - 1, None
        now = mask[:, -time:].int()
        last = time - 1 - now.flip(1).argmax(1)
        return 0, torch.arange(time, device=last.device) == last[:, None]


def _is(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor)
