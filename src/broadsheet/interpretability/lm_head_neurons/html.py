"""A map of neurons as one HTML page: a table to search, sort and filter, with nothing fetched from anywhere."""

import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch

from broadsheet.errors import InvalidInput

if TYPE_CHECKING:
    from broadsheet.interpretability.lm_head_neurons.maps import NeuronMap


def map_page(found: "NeuronMap", title: str, limit: int | None, k: int) -> str:
    """The page; arguments as in :meth:`NeuronMap.to_html`."""
    if k < 1 or (limit is not None and limit < 1):
        raise InvalidInput(f"k={k}, limit={limit}: expected at least 1")
    top = found.probs[..., 0].flatten()
    good = (found.tokens[..., 0].flatten() >= 0).nonzero().flatten()
    order = good[top[good].argsort(descending=True, stable=True)][:limit]
    if not len(order):
        raise InvalidInput("no neuron of the map has finite weights: there is nothing to show")
    row, neuron = order // found.width, order % found.width
    tables = [table[row, neuron, :k] for table in (found.tokens, found.bottom_tokens)]
    used, index = torch.cat([table.flatten() for table in tables]).unique(return_inverse=True)
    first, second = index.split([tables[0].numel(), tables[1].numel()])

    def rounded(values: torch.Tensor, digits: int = 4) -> list[float | None]:
        return [None if v != v else float(f"{v:.{digits}g}") for v in values.double().tolist()]

    shown = (
        f"all {len(order):,}" if len(order) == len(good) else f"the {len(order):,} most specialised of {len(good):,}"
    )
    about = (
        f"{shown} neurons of {found.n_layers} layers, by the words that their {found.weights} weights point at through "
        f"the output head (norm: {found.norm}{', input norm folded' * found.fold_norm}"
        f"{', oriented by the gate' * (found.orient == 'gate')}; temperature {found.temperature:g}; "
        f"{found.vocab_size:,} words)."
    )
    layers = found.by_layer()
    data: dict[str, Any] = {
        "about": about[0].upper() + about[1:],
        "words": [found.word(int(i)) for i in used],
        "layer": torch.tensor(found.layers)[row].tolist(),
        "neuron": neuron.tolist(),
        "prob": rounded(top[order]),
        "entropy": rounded(found.entropy[row, neuron]),
        "agreement": rounded(found.agreement[row, neuron], 3),
        "top": first.view(len(order), -1).tolist(),
        "bottom": second.view(len(order), -1).tolist(),
        "layers": [
            {"layer": int(line.layer), "prob": float(line.prob), "entropy": float(line.entropy)}  # type: ignore[arg-type]
            for line in layers[layers["neurons"] > 0].itertuples()
        ],
    }
    # "</script>" in a word would end the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = files("broadsheet.interpretability.lm_head_neurons").joinpath("page.html").read_text(encoding="utf-8")
    before, after = page.replace("%TITLE%", html.escape(title)).split("%DATA%")
    return before + text + after
