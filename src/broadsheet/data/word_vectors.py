"""Read word vectors from the files they are given out in: word2vec (text and binary), fastText's ``.vec``, GloVe."""

import gzip
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from broadsheet.errors import DataMissing, InvalidInput

FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")


def load_word_vectors(path: str | Path, limit: int | None = None) -> dict[str, np.ndarray]:
    """Words and their vectors, in the file's order: the most frequent first, as all of these tools write them.

    Args:
        path: ``.vec`` or ``.txt`` (one word a line, with or without the line of sizes on top), or word2vec's ``.bin``;
            plain or gzipped.
        limit: so many words from the top; None for all.

    Returns:
        word -> ``[d]`` float32.

    Raises:
        DataMissing: no such file.
        InvalidInput: another format, such as fastText's own model ``.bin``, or a file that is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissing(
            f"{path} is not there: expected word vectors such as fastText's .vec (https://fasttext.cc), word2vec's "
            ".bin or GloVe's .txt"
        )
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if zipped else path.open("rb") as file:
        start = file.read(4)
        if start == FASTTEXT_MAGIC:
            raise InvalidInput(f"{path} is a fastText model, with subword tables: take the .vec file beside it")
        file.seek(0)
        head = file.readline().split()
        sized = len(head) == 2 and all(part.isdigit() for part in head)
        if not sized:
            file.seek(0)
            return _text(path, file, None, limit, None)
        n, d = int(head[0]), int(head[1])
        if n < 1 or d < 1:
            raise InvalidInput(f"{path}: {n} words of {d} features are announced")
        count = n if limit is None else min(n, limit)
        if ".bin" in path.suffixes:
            return _binary(path, file, count, d)
        return _text(path, file, d, count, n)


def _text(
    path: Path, lines: BufferedIOBase, d: int | None, limit: int | None, announced: int | None
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    seen = 0
    for number, line in enumerate(lines, 1):
        if limit is not None and seen >= limit:
            break
        # Only the plain space ends a word: some hold other kinds of space.
        parts = line.rstrip(b" \r\n").split(b" ")
        d = d or len(parts) - 1
        if len(parts) <= d or d < 1:
            raise InvalidInput(f"{path}: entry {number} has {len(parts) - 1} numbers, {d} are expected")
        try:
            vector = np.array(parts[-d:], dtype=np.float32)
        except ValueError as error:
            raise InvalidInput(f"{path}: entry {number} is not a word and {d} numbers ({error})") from error
        found.setdefault(_word(b" ".join(parts[:-d])), vector)  # a word that stands there twice keeps its first vector
        seen += 1
    if announced is not None and limit is not None and seen < limit:
        raise InvalidInput(f"{path} announces {announced} words and holds {seen}: it is cut short")
    return found


def _binary(path: Path, file: BufferedIOBase, count: int, d: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for number in range(1, count + 1):
        word = bytearray()
        while (letter := file.read(1)) != b" ":
            if not letter:
                raise InvalidInput(f"{path} announces more words than the {number - 1} it holds: it is cut short")
            if letter != b"\n":
                word += letter
        raw = file.read(4 * d)
        if len(raw) < 4 * d:
            raise InvalidInput(f"{path} ends inside the vector of word {number}: it is cut short")
        found.setdefault(_word(bytes(word)), np.frombuffer(raw, "<f4").copy())
    return found


def _word(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
