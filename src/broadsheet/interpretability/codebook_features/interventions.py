"""Switch codes on and off while a model runs: in a forward pass, or during ``generate`` with its key-value cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.codebook_features.model import Clock, CodebookModel
from broadsheet.nn.hooks import Positions

MODES = ("replace", "append", "disable", "ablate")


@contextmanager
def intervene(
    cb: CodebookModel,
    codes: Mapping[tuple[str, int], Positions],
    mode: str = "replace",
    slot: int | None = None,
) -> Iterator[CodebookModel]:
    """Change which codes are chosen, inside the block.

    Args:
        cb: of ``wrap_codebooks``.
        codes: (codebook, code) -> positions: None for every one, those that ``generate`` adds included; a number,
            slice or list of columns of the text (below 0: from the end of the prompt inside ``cb.generate``, of the
            text otherwise); or a boolean tensor ``[batch, time]``. Columns count from the text's first, whether it is
            in the key-value cache by now or not.
        mode: ``"replace"``: the codes fill all ``k`` slots (several codes of one codebook in turn), or only ``slot``;
            ``"append"``: one code more than ``k``; ``"disable"``: the code cannot be chosen, the next best is;
            ``"ablate"``: where it is chosen, its share is left out and nothing takes its place.
        slot: for ``"replace"``: which slot, 0 the most similar code's.

    Raises:
        InvalidInput: an unknown codebook or mode, a code or slot out of range, more codes than slots, ``disable`` that
            leaves fewer than ``k`` codes.

    Example::

        with intervene(cb, {("layers.0.mlp", 17): None}):
            cb.generate(prompt, max_new_tokens=20)
    """
    if mode not in MODES:
        raise InvalidInput(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if slot is not None and mode != "replace":
        raise InvalidInput(f"slot={slot} is for mode='replace', not {mode!r}")
    if not codes:
        raise InvalidInput("no code is named: hand in {(codebook, code): positions}")
    wanted: dict[str, list[tuple[int, int, Any]]] = {}
    for (site, code), positions in codes.items():
        place, group = cb.where(site, code)
        wanted.setdefault(place.name, []).append((group, code, positions))
    for place in wanted:
        quantizer = cb.quantizer(place)
        if slot is not None and not 0 <= slot < quantizer.k:
            raise InvalidInput(f"slot={slot}: {place!r} has {quantizer.k} (0 to {quantizer.k - 1})")
        for group in {entry[0] for entry in wanted[place]}:
            n = sum(entry[0] == group for entry in wanted[place])
            if mode == "replace" and n > (1 if slot is not None else quantizer.k):
                raise InvalidInput(f"{n} codes for {1 if slot is not None else quantizer.k} slots of {place!r}")
            if mode == "disable" and quantizer.num_codes - n < quantizer.k:
                raise InvalidInput(
                    f"{place!r}: with {n} codes disabled, {quantizer.num_codes - n} are left for k={quantizer.k}"
                )

    def edit(place: str, x: Tensor, ids: Tensor, weights: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        if place not in wanted:
            return ids, weights
        quantizer = cb.quantizer(place)
        grouped = quantizer.groups is not None
        if not grouped:
            x, ids, weights = x[..., None, :], ids[..., None, :], weights[..., None, :]
        where = [(g, code, _columns(at, clock, ids)) for g, code, at in wanted[place]]
        act = {"replace": _replace, "append": _append, "disable": _disable, "ablate": _ablate}[mode]
        ids, weights = act(quantizer, x, ids, weights, where, slot)
        return (ids, weights) if grouped else (ids[..., 0, :], weights[..., 0, :])

    with cb.edited(edit):
        yield cb


@contextmanager
def patch_codes(
    cb: CodebookModel, codes: Mapping[str, Int[Tensor, "batch time k"]], positions: Positions = None
) -> Iterator[CodebookModel]:
    """Put the codes of another run in place, inside the block.

    Args:
        cb: of ``wrap_codebooks``.
        codes: codebook -> ids of a run over texts of the same shape, such as :func:`codes` gives; a batch of one is
            taken for all. Entries below 0 (padding) change nothing.
        positions: which columns; as in :func:`intervene`.

    Raises:
        InvalidInput: an unknown codebook, or ids that do not fit.
    """
    if not codes:
        raise InvalidInput("no codes are given: hand in {codebook: ids [batch, time, k]}")
    wanted: dict[str, list[tuple[int, Tensor]]] = {}
    for site, ids in codes.items():
        place, group = cb.where(site)
        quantizer = cb.quantizer(place.name)
        if ids.ndim != 3 or ids.shape[-1] != quantizer.k:
            raise InvalidInput(
                f"the codes of {site!r} have shape {tuple(ids.shape)}: [batch, time, {quantizer.k}] needed"
            )
        if int(ids.max()) >= quantizer.num_codes:
            raise InvalidInput(f"code {int(ids.max())} of {site!r}: the codebook has {quantizer.num_codes}")
        wanted.setdefault(place.name, []).append((group, ids.long()))

    def edit(place: str, x: Tensor, ids: Tensor, weights: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        if place not in wanted:
            return ids, weights
        grouped = cb.quantizer(place).groups is not None
        ids = ids.clone() if grouped else ids[..., None, :].clone()
        columns = _columns(positions, clock, ids)
        k, first, length = cb.quantizer(place).k, clock.offset, ids.shape[1]
        for group, new in wanted[place]:
            new = new.to(ids.device)
            if new.shape[0] not in (1, ids.shape[0]):
                raise InvalidInput(
                    f"the codes of {place!r} are of {new.shape[0]} texts, the model reads {ids.shape[0]}"
                )
            new = new[:, first : first + length].expand(ids.shape[0], -1, -1)
            if new.shape[1] < length:  # columns that generation has added
                new = torch.cat([new, new.new_full((ids.shape[0], length - new.shape[1], k), -1)], 1)
            mine = ids[:, :, group, :k]
            ids[:, :, group, :k] = torch.where(columns[..., None] & (new >= 0), new, mine)
        return (ids, weights) if grouped else (ids[..., 0, :], weights)

    with cb.edited(edit):
        yield cb


def _columns(positions: Any, clock: Clock, ids: Tensor) -> Tensor:
    """Which of the columns that are computed now are meant, ``[batch, time]``."""
    batch, length = ids.shape[:2]
    columns = torch.arange(clock.offset, clock.offset + length, device=ids.device)
    if positions is None:
        return torch.ones(batch, length, dtype=torch.bool, device=ids.device)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        mask = positions.to(ids.device)
        if mask.ndim != 2 or batch % len(mask):
            raise InvalidInput(f"positions have shape {tuple(mask.shape)}: [batch, time] is needed, for {batch} texts")
        mask = mask.repeat_interleave(batch // len(mask), 0)  # generate repeats texts for beams and samples
        inside = columns < mask.shape[1]
        return mask[:, columns.clamp_max(mask.shape[1] - 1)] & inside
    whole = clock.prompt if clock.prompt is not None else clock.offset + length
    if isinstance(positions, slice):
        step = positions.step or 1
        start = _absolute(positions.start, whole, 0)
        stop = None if positions.stop is None else _absolute(positions.stop, whole, 0)
        chosen = (columns >= start) & ((columns - start) % step == 0)
        chosen = chosen if stop is None else chosen & (columns < stop)
    else:
        numbers = [positions] if isinstance(positions, int) else [int(p) for p in positions]
        bad = [p for p in numbers if p < -whole]
        if bad:
            raise InvalidInput(f"position {bad[0]}: the text has {whole} columns (0 to {whole - 1})")
        at = torch.tensor([_absolute(p, whole, 0) for p in numbers], device=ids.device)
        chosen = torch.isin(columns, at)
    return chosen.expand(batch, -1)


def _absolute(position: int | None, whole: int, default: int) -> int:
    if position is None:
        return default
    return position + whole if position < 0 else position


Where = list[tuple[int, int, Tensor]]


def _replace(q: Any, x: Tensor, ids: Tensor, weights: Tensor, where: Where, slot: int | None) -> tuple[Tensor, Tensor]:
    ids = ids.clone()
    by_group: dict[int, list[tuple[int, Tensor]]] = {}
    for group, code, at in where:
        by_group.setdefault(group, []).append((code, at))
    for group, entries in by_group.items():
        mine = ids[:, :, group, : q.k]
        if slot is not None:
            code, at = entries[0]
            mine[..., slot] = torch.where(at, code, mine[..., slot])
            continue
        # The codes that are wanted at a position take the slots in turn: one takes all of them.
        wanted = torch.stack([at for _, at in entries], -1)
        values = torch.tensor([code for code, _ in entries], device=ids.device)
        order = torch.argsort((~wanted).int(), dim=-1, stable=True)  # wanted ones first
        count = wanted.sum(-1, keepdim=True)
        turn = torch.arange(q.k, device=ids.device) % count.clamp_min(1)
        ids[:, :, group, : q.k] = torch.where(count > 0, values[order.gather(-1, turn)], mine)
    return ids, weights


def _append(q: Any, x: Tensor, ids: Tensor, weights: Tensor, where: Where, slot: int | None) -> tuple[Tensor, Tensor]:
    for group, code, at in where:
        ids = torch.cat([ids, ids.new_full((*ids.shape[:-1], 1), code)], -1)
        extra = weights.new_zeros((*weights.shape[:-1], 1))
        extra[:, :, group, 0] = at.to(weights)
        if q.reduce == "mean":  # of all that are there now
            filled = (weights[:, :, group] > 0).sum(-1)
            scale = torch.where(at, filled / (filled + 1), 1.0).to(weights)
            weights = weights.clone()
            weights[:, :, group] *= scale[..., None]
            extra[:, :, group, 0] *= (1 / (filled + 1)).to(weights)
        weights = torch.cat([weights, extra], -1)
    return ids, weights


def _disable(q: Any, x: Tensor, ids: Tensor, weights: Tensor, where: Where, slot: int | None) -> tuple[Tensor, Tensor]:
    # Positions differ from code to code: each set of codes that is out somewhere is one search.
    blocked = torch.zeros(*ids.shape[:3], len(where), dtype=torch.bool, device=ids.device)
    for i, (group, _, at) in enumerate(where):
        blocked[:, :, group, i] = at
    ids = ids.clone()
    patterns = blocked.any(2).flatten(0, 1).unique(dim=0)
    for pattern in patterns[patterns.any(1)]:
        out = torch.zeros(ids.shape[2], q.num_codes, dtype=torch.bool, device=ids.device)
        for i in pattern.nonzero().flatten().tolist():
            out[where[i][0], where[i][1]] = True
        here = (blocked.any(2) == pattern).all(-1)
        part = x[here]
        new = q.assign(part if q.groups is not None else part[:, 0], out)
        ids[here] = new if q.groups is not None else new[:, None]
    return ids, weights


def _ablate(q: Any, x: Tensor, ids: Tensor, weights: Tensor, where: Where, slot: int | None) -> tuple[Tensor, Tensor]:
    weights = weights.clone()
    for group, code, at in where:
        weights[:, :, group] = weights[:, :, group].masked_fill((ids[:, :, group] == code) & at[..., None], 0)
    return ids.clone(), weights
