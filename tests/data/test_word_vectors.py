"""Word vectors and two-column tables are read as they are given out, and damage is named."""

import gzip

import numpy as np
import pytest

from broadsheet.data.text_tables import load_labelled_texts, load_pairs
from broadsheet.data.word_spaces import made_word_spaces
from broadsheet.data.word_vectors import load_word_vectors
from broadsheet.errors import DataMissing, InvalidInput

WORDS = ["the", "café", "new\u00a0york", "x"]
VECTORS = np.array([[1, 2.5], [-3, 0], [4, 1e-3], [0, 0]], np.float32)


def text(header=True):
    lines = [f"{w} {a:g} {b:g} " for w, (a, b) in zip(WORDS, VECTORS, strict=True)]  # fastText ends lines with a space
    return ("4 2\n" if header else "") + "\n".join(lines) + "\n"


def binary(newline=b"\n"):
    rows = [w.encode() + b" " + v.astype("<f4").tobytes() + newline for w, v in zip(WORDS, VECTORS, strict=True)]
    return b"4 2\n" + b"".join(rows)


@pytest.mark.parametrize("kind", ["vec", "glove", "bin", "bin-tight", "zipped", "zipped-bin"])
@pytest.mark.parametrize("limit", [None, 2, 99])
def test_every_format(tmp_path, kind, limit):
    name, raw = {
        "vec": ("a.vec", text().encode()),
        "glove": ("a.txt", text(False).encode()),
        "bin": ("a.bin", binary()),
        "bin-tight": ("a.bin", binary(b"")),
        "zipped": ("a.vec.gz", gzip.compress(text().encode())),
        "zipped-bin": ("a.bin.gz", gzip.compress(binary())),
    }[kind]
    (tmp_path / name).write_bytes(raw)
    found = load_word_vectors(tmp_path / name, limit)
    n = min(limit or 4, 4)
    assert list(found) == WORDS[:n]
    assert np.array_equal(np.stack(list(found.values())), VECTORS[:n])
    assert next(iter(found.values())).dtype == np.float32


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.vec", text().encode()[:-9], "cut short|entry 4"),
        ("a.vec", b"9 2\n" + text(False).encode(), "announces 9 words and holds 4"),
        ("a.vec", b"2 3\nthe 1 2\n", "entry 1 has 2 numbers, 3"),
        ("a.vec", b"1 2\nthe one two\n", "not a word and 2 numbers"),
        ("a.txt", b"the\n", "numbers"),
        ("a.bin", binary()[:-3], "cut short"),
        ("a.bin", b"5 2\n" + binary()[4:], "the 4 it holds"),
        ("a.bin", (793712314).to_bytes(4, "little") + b"\0" * 20, "fastText model"),
        ("a.vec", b"0 2\n", "0 words"),
    ],
)
def test_damage_is_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InvalidInput, match=message):
        load_word_vectors(tmp_path / name)


def test_a_missing_file():
    with pytest.raises(DataMissing, match="fastText"):
        load_word_vectors("nowhere.vec")
    with pytest.raises(DataMissing, match="two tab-separated"):
        load_pairs("nowhere.tsv")


def test_a_word_that_comes_twice_keeps_its_first_vector(tmp_path):
    (tmp_path / "a.vec").write_text("3 1\na 1\na 2\nb 3\n")
    assert {w: float(v[0]) for w, v in load_word_vectors(tmp_path / "a.vec").items()} == {"a": 1, "b": 3}


def test_tables(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text('\ufeffone "quoted\tun\n\n two\tdeux \n', encoding="utf-8")
    assert load_pairs(file) == (['one "quoted', "two"], ["un", "deux"])
    file.write_text("b\ttext 1\na\ttext 2\n")
    assert load_labelled_texts(file) == (["text 1", "text 2"], [1, 0], {"a": 0, "b": 1})
    with pytest.raises(InvalidInput, match="label 'a' is not among b"):
        load_labelled_texts(file, {"b": 0})
    for content, message in (
        ("one\n", "line 1"),
        ("a\tb\nc\t\n", "line 2"),
        ("a\tb\tc\n", "two filled"),
        ("\n", "no pair"),
    ):
        file.write_text(content)
        with pytest.raises(InvalidInput, match=message):
            load_pairs(file)


def test_made_spaces_hold_the_same_meaning_in_other_axes():
    made = made_word_spaces(300, 20, contexts=200, seed=3)
    again = made_word_spaces(300, 20, contexts=200, seed=3)
    assert made.left.equal(again.left) and made.right.equal(again.right)
    assert not made.left.equal(made_word_spaces(300, 20, contexts=200, seed=4).left)

    def likeness(a, b):  # correlation of the two tables of inner products
        a, b = (z - z.mean(0) for z in (a, b))
        return float(np.corrcoef((a @ a.T).flatten(), (b @ b.T).flatten())[0, 1])

    assert likeness(made.left, made.right) > 0.7
    assert likeness(made.left, made.meaning) > 0.7
    assert likeness(made.left, made.right[made.right[:, 0].argsort()]) < 0.3
    with pytest.raises(InvalidInput, match="d=300"):
        made_word_spaces(300, 300, contexts=200)
