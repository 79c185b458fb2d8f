"""Figures of the results: axes in, axes out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput
from broadsheet.nn.attribution import parse_node
from broadsheet.nn.plotting import COLOURS, CYCLE, new_axes

if TYPE_CHECKING:
    from broadsheet.interpretability.circuit_analysis.attention import AttentionTable, HeadCategories
    from broadsheet.interpretability.circuit_analysis.compression import RankCurve
    from broadsheet.interpretability.circuit_analysis.outputs import OutputNodes
    from broadsheet.interpretability.circuit_analysis.paths import Paths

LABELS = {
    "total": "total effect",
    "direct": "direct effect",
    "indirect": "indirect effect",
    "loss": "rise of the loss (nats)",
}
KIND_COLOURS = {
    "correct_letter": "#b3261e", "uniform": "#2f5d8a", "single_letter": "#d9962b", "amplification": "#3a7d44",
    "other": "#ebe8e1",
}  # fmt: skip


def short(name: str) -> str:
    """``layers.3.attn.head.5`` as ``3.5``, ``layers.3.mlp`` as ``mlp 3``."""
    layer, head = parse_node(name)
    return f"mlp {layer}" if head is None else f"{layer}.{head}"


def attribution_bars(names: Sequence[str], values: Sequence[float], ax: Any = None, k: int = 12) -> Any:
    """The nodes with the largest direct effects, heads and MLPs in two colours.

    Args:
        names: of the nodes.
        values: mean direct effect of each.
        ax: matplotlib axes.
        k: nodes shown.
    """
    order = np.argsort(-np.abs(np.asarray(values, dtype=float)), kind="stable")[:k][::-1]
    ax = new_axes(ax, figsize=(5.4, 0.3 * len(order) + 1.2))
    colours = [COLOURS["baseline"] if names[i].endswith("mlp") else COLOURS["ours"] for i in order]
    ax.barh(range(len(order)), [values[i] for i in order], color=colours, height=0.72)
    ax.set_yticks(range(len(order)), [short(str(names[i])) for i in order])
    ax.axvline(0, color=COLOURS["neutral"], linewidth=0.8)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("direct effect on the right answer's logit")
    return ax


def node_map(values: Mapping[str, float], shape: tuple[int, int], ax: Any = None, what: str = "total") -> Any:
    """Layers by heads, MLPs in the last column; white: not measured.

    Args:
        values: by name.
        shape: layers and heads.
        ax: matplotlib axes.
        what: names the scale.
    """
    layers, heads = shape
    table = np.full((layers, heads + 1), np.nan)
    for name, value in values.items():
        if "neuron" not in name:
            layer, head = parse_node(name)
            table[layer, heads if head is None else head] = value
    ax = new_axes(ax, figsize=(1.6 + 0.55 * (heads + 1), 1.1 + 0.5 * layers))
    size = np.nanmax(np.abs(table)) if np.isfinite(table).any() else 1.0
    image = ax.imshow(table, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    ax.axvline(heads - 0.5, color="white", linewidth=3)
    ax.set_xticks(range(heads + 1), [*map(str, range(heads)), "MLP"])
    ax.set_yticks(range(layers))
    ax.set(xlabel="head", ylabel="layer")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label=LABELS.get(what, what), shrink=0.9)
    return ax


def direct_total(
    nodes: Sequence[str], direct: Sequence[float], total: Sequence[float], ax: Any = None, named: int = 5
) -> Any:
    """Total against direct effect of every node."""
    ax = new_axes(ax, figsize=(4.6, 4.2))
    low, high = min([*direct, *total, 0.0]), max([*direct, *total])
    pad = 0.06 * (high - low or 1.0)
    ax.plot([low - pad, high + pad], [low - pad, high + pad], color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    for kind, colour, label in (("head", COLOURS["ours"], "heads"), ("mlp", COLOURS["baseline"], "MLPs")):
        rows = [i for i, name in enumerate(nodes) if ("attn" in name) == (kind == "head")]
        ax.scatter([direct[i] for i in rows], [total[i] for i in rows], s=28, color=colour, label=label, zorder=3)
    # Names in a column of their own, far enough apart to be read, each tied to its point.
    chosen = set(np.argsort(-np.asarray(direct, dtype=float))[:named].tolist()) | {int(np.argmax(total))}
    left, right = min([*direct, 0.0]), max([*direct, 0.0])
    span, at, column = right - left or 1.0, -np.inf, right + 0.14 * (right - left or 1.0)
    for i in sorted(chosen, key=lambda i: (total[i], direct[i])):
        at = max(total[i], at + 0.06 * (max(total) - min([*total, 0.0]) or 1.0))
        ax.annotate(
            nodes[i] if "neuron" in nodes[i] else short(nodes[i]), (direct[i], total[i]), xytext=(column, at),
            fontsize=8, va="center", arrowprops={"arrowstyle": "-", "color": COLOURS["paper"], "linewidth": 0.6},
        )  # fmt: skip
    ax.set_xlim(left - 0.08 * span, right + 0.32 * span)
    ax.set_ylim(min([*total, 0.0]) - pad, max([*total, at]) + pad)
    ax.axhline(0, color=COLOURS["light"], linewidth=0.8)
    ax.axvline(0, color=COLOURS["light"], linewidth=0.8)
    ax.set(xlabel="direct effect", ylabel="total effect")
    ax.legend(loc="center left")
    return ax


def output_curve(found: "OutputNodes", ax: Any = None, what: str = "accuracy", **line: Any) -> Any:
    """Accuracy or loss against the number of nodes that act directly."""
    if what not in ("accuracy", "loss"):
        raise InvalidInput(f"what={what!r}: expected 'accuracy' or 'loss'")
    ax = new_axes(ax)
    line = {"color": COLOURS["ours"], "marker": "o", "markersize": 3.5} | line
    ax.plot(range(len(found.nodes) + 1), getattr(found, what).tolist(), **line)
    ax.axvline(found.n, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    ax.set(xlabel="nodes that act directly", ylabel="accuracy" if what == "accuracy" else "loss (nats)")
    return ax


def attention_maps(
    table: "AttentionTable", heads: Sequence[str], prompt: int = 0, tokens: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Attention of the final token to every token of a prompt; items' labels framed, the right one in red."""
    if not heads or not 0 <= prompt < len(table.batch):
        raise InvalidInput(
            f"heads={list(heads)}, prompt={prompt}: expected heads, and one of {len(table.batch)} prompts"
        )
    places = [parse_node(name) for name in heads]
    if any(head is None for _, head in places):
        raise InvalidInput(f"heads={list(heads)}: an MLP has no attention")
    rows = torch.stack([table.rows[prompt, layer, head or 0] for layer, head in places]).float().cpu()
    batch, time = table.batch, rows.shape[1]
    keep = list(range(time))
    if batch.attention_mask is not None:
        keep = batch.attention_mask[prompt].nonzero().flatten().tolist()
    words = [str(int(i)) for i in batch.input_ids[prompt]] if tokens is None else list(tokens)
    if len(words) != time:
        raise InvalidInput(f"{len(words)} tokens given: the prompt has {time} columns, padding included")
    ax = new_axes(ax, figsize=(1.4 + 0.42 * len(keep), 1.5 + 0.42 * len(heads)))
    image = ax.imshow(rows[:, keep], cmap="Reds", vmin=0, vmax=1, aspect="auto")
    from matplotlib.patches import Rectangle

    for item, column in enumerate(batch.label_pos[prompt].tolist()):
        right = item == int(batch.answer[prompt])
        edge = COLOURS["ours"] if right else COLOURS["neutral"]
        at = keep.index(column) - 0.5
        ax.add_patch(
            Rectangle((at, -0.5), 1, len(heads), fill=False, edgecolor=edge, linewidth=2 if right else 0.8, zorder=3)
        )
    ax.set_xticks(range(len(keep)), [words[i] for i in keep], rotation=90 if len(keep) > 16 else 0, fontsize=8)
    ax.set_yticks(range(len(heads)), [short(name) for name in heads])
    ax.set(xlabel="token", ylabel="layer.head")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="attention", shrink=0.9)
    return ax


def kinds_map(kinds: "HeadCategories", ax: Any = None) -> Any:
    """Layers by heads, coloured by kind."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    from broadsheet.interpretability.circuit_analysis.attention import KINDS

    layers, heads = kinds.kind.shape
    ax = new_axes(ax, figsize=(3.0 + 0.6 * heads, 1.1 + 0.5 * layers))
    colours = ListedColormap([KIND_COLOURS[kind] for kind in KINDS])
    ax.imshow(kinds.kind.cpu(), cmap=colours, vmin=-0.5, vmax=len(KINDS) - 0.5, aspect="auto")
    if layers * heads <= 256:
        for layer in range(layers):
            for head in range(heads):
                pale = int(kinds.kind[layer, head]) == KINDS.index("other")
                ax.text(head, layer, f"{float(kinds.excess[layer, head]):.2f}", ha="center", va="center", fontsize=8,
                        color=COLOURS["neutral"] if pale else "white")  # fmt: skip
    ax.set_xticks(range(heads))
    ax.set_yticks(range(layers))
    ax.set(xlabel="head", ylabel="layer")
    ax.grid(visible=False)
    present = sorted(set(kinds.kind.flatten().tolist()))
    ax.legend(
        handles=[Patch(color=KIND_COLOURS[KINDS[i]], label=KINDS[i].replace("_", " ")) for i in present],
        loc="upper left", bbox_to_anchor=(1.01, 1.0),
    )  # fmt: skip
    return ax


def rank_lines(curve: "RankCurve", ax: Any = None, basis: str = "class_means", what: str = "accuracy") -> Any:
    """A score against rank, one line for each kind of prompts."""
    for bases in curve.scores.values():
        if basis not in bases or not hasattr(bases[basis][0], what):
            raise InvalidInput(f"basis={basis!r}, what={what!r}: measured were {', '.join(bases)}")
    ax = new_axes(ax)
    for (kind, bases), colour in zip(curve.scores.items(), CYCLE * len(curve.scores), strict=False):
        values = [getattr(score, what) for score in bases[basis]]
        ax.plot(curve.ranks, values, marker="o", markersize=4, color=colour, label=kind.replace("_", " "))
        ax.axhline(getattr(curve.full[kind], what), color=colour, linewidth=0.8, linestyle=":")
    ax.set_xticks(curve.ranks)
    ax.set(xlabel="dimensions kept of queries and keys", ylabel=what)
    ax.legend(loc="lower right")
    return ax


def scatter(q: Tensor, k: Tensor, batch: ChoiceBatch, ax: Any = None, by: str = "item") -> Any:
    """Queries (crosses) and keys (dots) in three dimensions, coloured by item or by label.

    Args:
        q: ``[batch, rank]``.
        k: ``[batch, item, rank]``.
        batch: the prompts.
        ax: matplotlib axes with ``projection="3d"``.
        by: ``"item"`` or ``"token"``.
    """
    from matplotlib.lines import Line2D

    def three(x: Tensor) -> np.ndarray:
        x = x.float().cpu()
        x = x / x.reshape(-1, x.shape[-1]).norm(dim=-1).mean().clamp_min(
            1e-12
        )  # queries and keys in units of their own
        return torch.nn.functional.pad(x, (0, max(0, 3 - x.shape[-1])))[..., :3].numpy()

    ax = new_axes(ax, figsize=(5.6, 4.8), subplot_kw={"projection": "3d"})
    queries, keys = three(q), three(k)
    items = np.tile(np.arange(batch.n_items), (len(batch), 1))
    if by == "token":
        tokens, items = np.unique(batch.label_tokens.cpu().numpy(), return_inverse=True)
        items = items.reshape(len(batch), batch.n_items)
        names = [f"label {token}" for token in tokens]
    else:
        names = [f"item {i + 1}" for i in range(batch.n_items)]
    right = items[np.arange(len(batch)), batch.answer.cpu().numpy()]
    for i, name in enumerate(names[: len(CYCLE)]):
        colour = CYCLE[i]
        ax.scatter(*keys[items == i].T, color=colour, s=12, alpha=0.55, linewidths=0, label=name)
        ax.scatter(*queries[right == i].T, color=colour, s=24, marker="x", linewidths=1.1)
    for axis, number in zip((ax.xaxis, ax.yaxis, ax.zaxis), (1, 2, 3), strict=True):
        axis.set_pane_color((1, 1, 1, 1))
        axis.set_ticklabels([])
        axis.set_label_text(f"dimension {number}", fontsize=8)
        axis.labelpad = -10
    handles = [Line2D([], [], marker="o", linestyle="", color=CYCLE[i], label=n) for i, n in enumerate(names[:7])]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=COLOURS["neutral"], label="keys"),
        Line2D([], [], marker="x", linestyle="", color=COLOURS["neutral"], label="queries"),
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.12, 1.0), fontsize=8)
    return ax


def path_map(paths: "Paths", ax: Any = None) -> Any:
    """Sources by targets; the last column is the answer itself."""
    table, out = paths.effects.to_heads.cpu(), paths.effects.to_output.cpu()
    layers, heads = out.shape
    full = torch.cat([table.flatten(0, 1).flatten(1), out.flatten()[:, None]], 1).double().numpy()
    full = full[:, heads:]  # nothing comes before the first layer
    ax = new_axes(ax, figsize=(1.8 + 0.34 * full.shape[1], 1.4 + 0.28 * full.shape[0]))
    size = np.abs(full).max() or 1.0
    image = ax.imshow(full, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    ax.set_xticks(range(full.shape[1]), [*names[heads:], "answer"], rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlabel="target", ylabel="source")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="effect of the path", shrink=0.9)
    return ax
