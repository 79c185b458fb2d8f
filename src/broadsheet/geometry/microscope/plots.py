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
    if axes is None:
        with style():
            _, axes = new_figure(
                3.2 * len(names), 2.3 * len(panels), len(names), len(panels), squeeze=False, sharex=True, sharey="row"
            )
    for number, (row, (title, keys)) in enumerate(zip(axes, panels.items(), strict=True)):
        for ax, name in zip(row, names, strict=True):
            part = table[table["layer"] == name]
            for key, colour in zip(keys, CYCLE, strict=False):
                if bool(part[key].notna().to_numpy().any()):
                    ax.plot(part["at"], part[key], color=colour, marker="o", markersize=3, label=NAMES[key])
            if title.startswith("collapse"):
                ax.set_yscale("log")
            if number == 0:
                ax.set_title(name)
        row[0].set_ylabel(title)
        row[-1].legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return axes
