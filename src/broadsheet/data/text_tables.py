"""Texts in tables of two columns: pairs that mean the same, and texts with their labels."""

import csv
from pathlib import Path

from broadsheet.errors import DataMissing, InvalidInput


def load_pairs(path: str | Path) -> tuple[list[str], list[str]]:
    """Two columns, tab-separated, without a heading: line i of one means the same as line i of the other.

    Args:
        path: the file, UTF-8; empty lines are skipped.

    Returns:
        the left and the right column.

    Raises:
        DataMissing: no such file.
        InvalidInput: a line without exactly two filled columns, or a file without lines.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissing(f"{path} is not there: expected two tab-separated columns, a pair that means the same a line")
    pairs = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in (reader := csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != 2 or not all(cell.strip() for cell in row):
                raise InvalidInput(f"{path}, line {reader.line_num}: two filled columns are expected, got {row}")
            pairs.append((row[0].strip(), row[1].strip()))
    if not pairs:
        raise InvalidInput(f"{path} holds no pair")
    return [a for a, _ in pairs], [b for _, b in pairs]


def load_labelled_texts(path: str | Path, labels: dict[str, int] | None = None) -> tuple[list[str], list[int], dict]:
    """Label and text, tab-separated, a line each.

    Args:
        path: as for :func:`load_pairs`.
        labels: label -> number, such as those of the training file; None numbers the labels in alphabetical order.

    Returns:
        texts, the numbers of their labels, and label -> number.

    Raises:
        DataMissing, InvalidInput: as for :func:`load_pairs`, or a label that ``labels`` does not have.
    """
    names, texts = load_pairs(path)
    numbers = {name: i for i, name in enumerate(sorted(set(names)))} if labels is None else labels
    unknown = sorted(set(names) - set(numbers))
    if unknown:
        raise InvalidInput(f"{path}: label {unknown[0]!r} is not among {', '.join(sorted(numbers))}")
    return texts, [numbers[name] for name in names], numbers
