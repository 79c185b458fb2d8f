"""Reads whether a code is chosen, from what stands at its place: an activation, or what the bottleneck made of it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from broadsheet.interpretability.codebook_features.places import Place

if TYPE_CHECKING:
    from broadsheet.interpretability.codebook_features.model import CodebookModel


class CodeReader:
    """``[..., d] -> [...]``: 1 where the code is chosen, 0 elsewhere.

    Behind a bottleneck stands a mean of codes, from which they cannot be told in general: a vector that is what the
    latest forward pass put there has the codes of that pass. Any other vector is taken as an activation and assigned.

    Args:
        cb: the model.
        place, group, code: which.
    """

    def __init__(self, cb: "CodebookModel", place: Place, group: int, code: int) -> None:
        self.cb, self.place, self.group, self.code = cb, place, group, code

    def __call__(self, x: Tensor) -> Tensor:
        quantizer = self.cb.quantizer(self.place.name)
        split = x if self.place.groups is None else x.unflatten(-1, (self.place.groups, self.place.width))
        mine = split[..., self.group, :] if self.place.groups is not None else split
        with torch.no_grad():
            normed = quantizer.normalised(split)
            codes = quantizer.assign(normed)
            codes = codes if self.place.groups is None else codes[..., self.group, :]
            snap = self.cb.latest.get(self.place.name)
            if snap is not None and snap.codes.shape[: x.ndim - 1] == x.shape[:-1]:
                made = quantizer.decode(snap.codes).to(x.dtype)
                known = snap.codes
                if self.place.groups is not None:
                    made, known = made[..., self.group, :], known[..., self.group, :]
                if known.shape == codes.shape:
                    codes = torch.where((made == mine).all(-1, keepdim=True), known, codes)
            chosen = (codes == self.code).any(-1).to(mine.dtype)
        if not x.requires_grad:
            return chosen
        whole = quantizer.normalised(split)
        normed = whole if self.place.groups is None else whole[..., self.group, :]
        row = quantizer.codebook[self.group, self.code].detach()
        cosine = torch.nn.functional.cosine_similarity(normed, row.to(normed), dim=-1)
        return chosen + (cosine - cosine.detach()).to(mine.dtype)
