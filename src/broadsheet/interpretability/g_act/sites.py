"""Where a model is read and steered: places of every block by one name, in any model with a list of blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.blocks import BlockMap, block_map
from broadsheet.nn.hooks import Site, capture, evaluating
from broadsheet.nn.padding import RightPadded

SITES = ("attn_out", "mlp_out", "resid_mid", "resid_post", "head_out")
NAMES = {"attn_out": "attn", "mlp_out": "mlp", "resid_post": "resid_post", "head_out": "attn.z"}
Blocks = str | Callable[[nn.Module], Any] | None


@dataclass(frozen=True)
class Place:
    """One place of one block.

    Attributes:
        layer: number of the block.
        site: what is read, and what a vector is added to.
        carried: a second place whose value belongs to what is read: the stream between attention and MLP exists in no
            submodule, it is the attention's output plus what the block was given.
    """

    layer: int
    site: Site
    carried: Site | None = None


def places(
    model: nn.Module, site: str = "resid_post", layers: Sequence[int] | None = None, blocks: Blocks = None
) -> list[Place]:
    """The places of some layers.

    Args:
        model: a Hugging Face model, any module with a registered block map, or any module with a list of blocks.
        site: one of :data:`SITES`; for a model that is known only by its list of blocks ``"resid_post"``.
        layers: which; None for all. Negative ones count from the end.
        blocks: the list of blocks where the model has no block map: a submodule's name (``"model.layers"``) or a
            function from the model to the list.

    Raises:
        InvalidInput: an unknown site or a layer out of range; the message lists what there is.
        UnsupportedModel: no block map and no ``blocks``.
    """
    if site not in SITES:
        raise InvalidInput(f"site={site!r}: expected one of {', '.join(SITES)}")
    if blocks is not None:
        names = _listed(model, blocks)
        if site != "resid_post":
            raise InvalidInput(f"site={site!r}: of a plain list of blocks only 'resid_post' is known")
        return [Place(layer, Site(names[layer])) for layer in checked_layers(layers, len(names))]
    try:
        the_map = block_map(model)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; or hand in blocks='name.of.the.list'") from error
    return [_place(the_map, site, layer) for layer in checked_layers(layers, the_map.n_layers)]


def checked_layers(layers: Sequence[int] | None, n: int) -> list[int]:
    """Layer numbers, negative ones counted from the end; a number out of range is an error with the limits."""
    if layers is None:
        return list(range(n))
    bad = [layer for layer in layers if not -n <= layer < n]
    if bad:
        raise InvalidInput(f"layer {bad[0]}: the model has {n} layers (0 to {n - 1})")
    return sorted({layer % n for layer in layers})


def _listed(model: nn.Module, blocks: str | Callable[[nn.Module], Any]) -> list[str]:
    if isinstance(blocks, str):
        found: Any = dict(model.named_modules()).get(blocks)
        if found is None:
            lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
            raise InvalidInput(f"blocks={blocks!r}: no such submodule; lists of modules: {', '.join(lists) or 'none'}")
    else:
        found = blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = list(found)
    if not found or any(id(block) not in names for block in found):
        raise InvalidInput("blocks: expected a non-empty list of the model's own submodules")
    return [names[id(block)] for block in found]


def _place(the_map: BlockMap, site: str, layer: int) -> Place:
    prefix = f"layers.{layer}."
    if site != "resid_mid":
        return Place(layer, the_map.resolve(prefix + NAMES[site]))
    block = the_map.blocks[layer]
    names = {id(module): name for name, module in the_map.model.named_modules()}
    if block.attention is None or block.scheme == "parallel":
        known = ", ".join(name for name in SITES if name != site)
        raise InvalidInput(
            f"site='resid_mid': attention and MLP of layer {layer} read the same stream, there is none between them; "
            f"sites: {known}"
        )
    if block.scheme == "post":  # the stream between them is what the first norm gives
        module = None if block.norm1 is None else block.norm1.module
        return Place(layer, Site(names[id(module)], tokens_of=the_map.resolve(prefix + "resid_post").module))
    after = None if block.out_norm1 is None else block.out_norm1.module
    written = the_map.resolve(prefix + "attn") if after is None else Site(names[id(after)])
    return Place(layer, written, the_map.resolve(prefix + "resid_pre"))


def read_places(model: nn.Module, where: Sequence[Place], padded: RightPadded) -> list[Tensor]:
    """What stands at each place, ``[batch, time, d]``, padding on the right.

    Args:
        model: run once, in evaluation mode, without gradients.
        where: of :func:`places`.
        padded: the prompts.

    Raises:
        InvalidInput: values that are not finite, with the layer.
    """
    wanted = []
    for i, place in enumerate(where):
        wanted.append(_labelled(place.site, f"{i}"))
        if place.carried is not None:
            wanted.append(_labelled(place.carried, f"{i}+"))
    ids, mask = padded.input_ids, padded.attention_mask
    with torch.no_grad(), evaluating(model), capture(model, wanted) as seen:
        model(ids) if mask is None else model(ids, attention_mask=mask)
    values = []
    for i, place in enumerate(where):
        x = seen[f"{i}"]
        if place.carried is not None:
            x = x + seen[f"{i}+"]
        real = x if mask is None else x[mask.bool()]
        if not bool(real.isfinite().all()):
            raise InvalidInput(
                f"layer {place.layer}: states are not finite in {x.dtype}: load the model in bfloat16 or float32"
            )
        values.append(x)
    return values


def _labelled(site: Site, label: str) -> Site:
    return Site(site.module, site.at, site.index, label, site.tokens_of)


def width_of(model: nn.Module, where: Place, ids: Tensor) -> int:
    """Features at a place, found by running the model on a few tokens."""
    return read_places(model, [where], RightPadded(ids, None, torch.zeros(len(ids), dtype=torch.long)))[0].shape[-1]
