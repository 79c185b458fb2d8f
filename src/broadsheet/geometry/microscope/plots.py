"""Measures over training, drawn: a row of panels for each kind of measure, a column for each layer."""

from typing import Any

import pandas as pd

from broadsheet.nn.plotting import CYCLE, new_figure, style

PANELS = {
    "entropy, bits": ("dse", "dsmi_labels", "dsmi_inputs"),
    "collapse (0 is collapsed)": ("nc1", "nc2_h", "nc2_w", "nc3_wh", "nc3_duality"),
    "agreement": ("matched_correlation", "cka", "ncc_agreement", "accuracy"),
}
NAMES = {
    "dse": "DSE(Z)",
    "dsmi_labels": "DSMI(Z; Y)",
    "dsmi_inputs": "DSMI(Z; X)",
    "nc1": "NC1",
    "nc2_h": "NC2, means",
    "nc2_w": "NC2, weights",
    "nc3_wh": "NC3, logits",
    "nc3_duality": "NC3, duality",
    "matched_correlation": "matched units",
    "cka": "CKA",
    "ncc_agreement": "NC4",
    "accuracy": "accuracy",
}


def plot_looks(table: pd.DataFrame, axes: Any = None) -> Any:
    """A row for entropy, collapse and agreement each, a column for each layer.

    Args:
        table: as :meth:`TrainingMicroscope.to_frame` gives it.
        axes: ``[rows, layers]`` matplotlib axes, or None for new ones.

    Returns:
        the axes.
    """
    names = list(dict.fromkeys(table["layer"]))
    table = table.sort_values("at", kind="stable")
    panels = {
        title: [key for key in keys if key in table and bool(table[key].notna().to_numpy().any())]
        for title, keys in PANELS.items()
    }
    panels = {title: keys for title, keys in panels.items() if keys}
    with style():
        if axes is None:
            width, height = 2.6 * len(names) + 1.6, 2.2 * len(panels)
            _, axes = new_figure(width, height, len(names), len(panels), squeeze=False, sharex=True, sharey="row")
        for row, (title, keys) in zip(axes, panels.items(), strict=True):
            lines = {}
            for ax, name in zip(row, names, strict=True):
                part = table[table["layer"] == name]
                for key, colour in zip(keys, CYCLE, strict=False):
                    if bool(part[key].notna().to_numpy().any()):
                        (lines[key],) = ax.plot(part["at"], part[key], color=colour, marker="o", markersize=3, lw=1.5)
                if title.startswith("collapse"):
                    ax.set_yscale("log")
            row[0].set_ylabel(title)
            shown = [key for key in keys if key in lines]
            row[-1].legend(
                [lines[key] for key in shown], [NAMES[key] for key in shown], loc="center left", bbox_to_anchor=(1, 0.5)
            )
        for ax, name in zip(axes[0], names, strict=True):
            ax.set_title(name, loc="left")
        for ax in axes[-1]:
            ax.set_xlabel("step")
    return axes
