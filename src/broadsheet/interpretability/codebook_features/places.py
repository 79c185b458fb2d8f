"""Where bottlenecks go: the paper's kinds of places in every block, or submodules by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.blocks import BlockMap, block_map
from broadsheet.nn.features import site_width
from broadsheet.nn.hooks import Site, capture, evaluating, expand

# kind -> places of a block
KINDS: dict[str, tuple[str, ...]] = {
    "attn_heads": ("attn.z",),
    "attn": ("attn",),
    "mlp": ("mlp",),
    "mlp_mid": ("mlp.act",),
    "block": ("resid_post",),
    "qkv": ("attn.q", "attn.k", "attn.v"),
}


@dataclass(frozen=True)
class Place:
    """Where one bottleneck stands.

    Attributes:
        name: a component's name, such as ``"layers.0.attn.z"``, or the submodule's.
        site: what is replaced.
        width: of one codebook's vectors.
        groups: codebooks side by side; None for one.
        codebooks: the name of each codebook: the place's own, or ``"layers.0.attn.head.2"``.
        mapped: whether the name is one that every other method knows.
    """

    name: str
    site: Site
    width: int
    groups: int | None
    codebooks: tuple[str, ...]
    mapped: bool


def find_places(
    model: nn.Module, at: Sequence[str], layers: str | Iterable[int], groups: int | None, example: Any
) -> list[Place]:
    """The places that ``at`` names, in the order of the model; arguments as in ``wrap_codebooks``.

    Raises:
        InvalidInput: an unknown name, a layer out of range, a width that cannot be told or divided.
    """
    if not at:
        raise InvalidInput(f"at is empty: name at least one place, such as {', '.join(KINDS)}")
    kinds, names = [name for name in at if name in KINDS], [name for name in at if name not in KINDS]
    places: list[Place] = []
    if kinds:
        try:
            the_map = block_map(model)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"{error}. Or name submodules of the model in place of {', '.join(kinds)}: at=('{_some(model)}',)"
            ) from None
        for layer in chosen_layers(layers, the_map.n_layers):
            for kind in KINDS:  # in the order in which they are computed, near enough for a table
                if kind in kinds:
                    places += [_mapped(the_map, layer, part, kind) for part in KINDS[kind]]
    for name in names:
        places += _submodules(model, name, groups, example)
    seen: set[str] = set()
    for place in places:
        if place.name in seen:
            raise InvalidInput(f"at={tuple(at)}: {place.name!r} is named twice")
        seen.add(place.name)
    return places


def chosen_layers(layers: str | Iterable[int], n: int) -> list[int]:
    """``"all"`` or numbers, negative ones from the end."""
    if isinstance(layers, str):
        if layers != "all":
            raise InvalidInput(f"layers={layers!r}: expected 'all' or numbers from 0 to {n - 1}")
        return list(range(n))
    chosen = list(layers)
    bad = [layer for layer in chosen if not -n <= layer < n]
    if bad or not chosen:
        what = f"layer {bad[0]}" if bad else "no layer is chosen"
        raise InvalidInput(f"{what}: the model has {n} layers (0 to {n - 1})")
    return sorted({layer % n for layer in chosen})


def _mapped(the_map: BlockMap, layer: int, part: str, kind: str) -> Place:
    name = f"layers.{layer}.{part}"
    site, width = the_map.resolve(name), site_width(the_map, name)
    if kind != "attn_heads":
        return Place(name, site, width, None, (name,), True)
    attention = the_map.blocks[layer].attention
    assert attention is not None
    heads = attention.n_heads
    if width % heads:
        raise InvalidInput(f"{name!r}: a width of {width} does not divide into {heads} heads")
    return Place(
        name, site, width // heads, heads, tuple(f"layers.{layer}.attn.head.{head}" for head in range(heads)), True
    )


def _submodules(model: nn.Module, name: str, groups: int | None, example: Any) -> list[Place]:
    try:
        found = expand(model, name)
    except InvalidInput as error:
        raise InvalidInput(f"{error}; or one of the kinds {', '.join(KINDS)}") from None
    places = []
    for key, site in found:
        width = _width(model, site, example)
        if groups is not None and width % groups:
            raise InvalidInput(f"{key!r}: a width of {width} does not divide into groups={groups}")
        names = (key,) if groups is None else tuple(f"{key}.group.{group}" for group in range(groups))
        places.append(Place(key, replace(site, label=key), width // (groups or 1), groups, names, False))
    return places


def _width(model: nn.Module, site: Site, example: Any) -> int:
    module: Any = model.get_submodule(site.module)
    if example is not None:
        args = example if isinstance(example, tuple) else (example,)
        with evaluating(model), capture(model, replace(site, label="x")) as seen:
            model(**example) if isinstance(example, dict) else model(*args)
        if "x" not in seen:
            raise InvalidInput(f"{site.module!r} is not called when the model runs on the example")
        return seen["x"].shape[-1]
    for attribute in ("out_features", "nf", "embedding_dim", "d_model"):
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    raise InvalidInput(
        f"{site.module!r} is a {type(module).__name__}, whose width cannot be told: hand in example=, an input of the "
        "model"
    )


def _some(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[0] if names else "name"
