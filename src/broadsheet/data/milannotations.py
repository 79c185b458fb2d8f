"""MILANNOTATIONS: exemplars of units of real networks with sentences of people, from the folders as published.

A source (``alexnet-imagenet``, ``resnet152-places365``, ...) is a folder with one folder for each layer, in which
``images.npy`` (``[units, k, 3, h, w]``, 0 to 255) and ``masks.npy`` (``[units, k, 1, h, w]``) stand, and a file
``annotations.csv`` with the columns ``layer``, ``unit`` and ``summary``, one row for each sentence.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from broadsheet.errors import DataMissing, InvalidInput

SOURCE = "https://github.com/evandez/neuron-descriptions (milannotations.zip, unpacked)"


@dataclass(frozen=True)
class AnnotatedLayer:
    """One layer's annotated units; the arrays stay on disk until they are used.

    Attributes:
        source, layer: where the units come from.
        units: numbers of the annotated units, ``[n]``.
        images: ``[units, k, 3, h, w]``, of all units of the layer.
        masks: ``[units, k, 1, h, w]``.
        sentences: of each annotated unit.
    """

    source: str
    layer: str
    units: tuple[int, ...]
    images: np.ndarray
    masks: np.ndarray
    sentences: tuple[tuple[str, ...], ...]


def load_milannotations(root: str | Path, source: str) -> list[AnnotatedLayer]:
    """The layers of one source.

    Args:
        root: the unpacked folder.
        source: a folder in it, such as ``"alexnet-imagenet"``.

    Raises:
        DataMissing: the source, its table, or a layer's arrays are not there; the message names them.
        InvalidInput: a table without the columns, or arrays that do not fit each other.
    """
    folder = Path(root) / source
    table = folder / "annotations.csv"
    if not table.is_file():
        raise DataMissing(f"{table} is not there. It comes from {SOURCE}")
    rows = pd.read_csv(table, dtype={"layer": str})
    if lacking := {"layer", "unit", "summary"} - set(rows.columns):
        raise InvalidInput(f"{table} lacks the columns {', '.join(sorted(lacking))}")
    rows = rows.dropna(subset=["summary"])
    found = []
    for layer, part in rows.groupby("layer", sort=True):
        arrays = []
        for name in ("images", "masks"):
            file = folder / str(layer) / f"{name}.npy"
            if not file.is_file():
                raise DataMissing(f"{file} is not there. It comes from {SOURCE}")
            arrays.append(np.load(file, mmap_mode="r"))
        images, masks = arrays
        if images.ndim != 5 or masks.shape != (*images.shape[:2], 1, *images.shape[3:]):
            raise InvalidInput(f"{folder / str(layer)}: images {images.shape} and masks {masks.shape} do not fit")
        grouped = {int(str(unit)): tuple(map(str, texts)) for unit, texts in part.groupby("unit")["summary"]}
        if wrong := [unit for unit in grouped if not 0 <= unit < len(images)]:
            raise InvalidInput(f"{table}: unit {wrong[0]} of layer {layer}, which has {len(images)} units")
        found.append(AnnotatedLayer(source, str(layer), tuple(grouped), images, masks, tuple(grouped.values())))
    return found
