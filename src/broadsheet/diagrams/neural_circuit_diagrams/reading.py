"""From a glyph and what is written in it to the step that it stands for: the inverse of ``glyphs``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from broadsheet.diagrams.neural_circuit_diagrams.generators import (
    Add,
    Concat,
    Constant,
    Copy,
    Discard,
    Fill,
    Generator,
    Index,
    Pattern,
    Scatter,
    View,
    Window,
)
from broadsheet.diagrams.neural_circuit_diagrams.linear import Conv, Embedding, Linear
from broadsheet.diagrams.neural_circuit_diagrams.opaque import Opaque
from broadsheet.diagrams.neural_circuit_diagrams.pointwise import Elementwise, Mask, Norm, Pool, Reduce, Softmax
from broadsheet.errors import InvalidInput

KINDS = {word: kind for kind, word in Reduce.NAMES.items()}


def generator(
    glyph: Any,
    at: Pattern,
    eaten: Sequence[str],
    emitted: Sequence[str],
    weights: Mapping[str, Tensor],
    functions: Mapping[str, Callable],
) -> tuple[Generator, Pattern]:
    """The step of a glyph.

    Args:
        glyph: class, shapes and text.
        at: letters of the arrays around it.
        eaten, emitted: letters that end and begin at it, from the top.
        weights: to tell learned arrays from numbers.
        functions: the user's own.

    Returns:
        The step, and its pattern with letters that go through the glyph made one.

    Raises:
        InvalidInput: a glyph or text that means nothing.
    """
    kind, eaten, emitted = glyph.kind[0], tuple(eaten), tuple(emitted)
    text = ["".join(part for part, _ in line) for line in glyph.texts]
    styles = [{style: part for part, style in line} for line in glyph.texts]
    if kind in ("softmax", "norm", "mask"):
        through = dict(zip(emitted, eaten, strict=True))
        at = Pattern(at.ins, tuple(tuple(through.get(c, c) for c in row) for row in at.outs))
        emitted = eaten
    if kind == "copy":
        return Copy(len(at.outs)), at
    if kind == "add":
        return Add(len(at.ins)), at
    if kind == "discard":
        return Discard(), at
    if kind == "view":
        return View(eaten, emitted), at
    if kind == "concat":
        return Concat(eaten, emitted[0]), at
    if kind == "softmax":
        return Softmax(eaten[0], text[:1] == ["log"]), at
    if kind == "mask":
        return Mask(*_marked_first(glyph, eaten)), at
    if kind == "elementwise":
        return Elementwise(_label(text[0]), functions.get(text[0])), at
    if kind == "reduce":
        return Reduce(KINDS[text[0]], eaten), at
    if kind == "index":
        return Index(eaten[0], int(text[0])), at
    if kind == "scatter":
        return Scatter(emitted[0], int(text[0])), at
    if kind == "window":
        start, _, step = text[0].partition(":")
        return Window(eaten[0], emitted[0], int(start), int(step.strip(":") or 1)), at
    if kind == "constant":
        if text[0] in weights:
            return Constant(text[0], "b" in styles[0]), at
        return Fill(float(text[0])), at
    if kind == "learned":
        letter, name, bias = styles[0]["b"], styles[0].get("sup", ""), "sub" in styles[0]
        if letter == "E":
            return Embedding(emitted[0], name), at
        return Linear(eaten, emitted, name, bias, letter.endswith("ᵀ")), at
    if kind == "conv":
        return _conv(glyph, eaten, emitted, text, styles), at
    if kind == "pool":
        return _pool(text[0], eaten, emitted), at
    if kind == "norm":
        return _norm(glyph.kind[1], eaten, glyph.texts), at
    if kind == "box":
        name = text[0]
        before = tuple(tuple(c for c in row if c in eaten) for row in at.ins)
        after = tuple(tuple(c for c in row if c in emitted) for row in at.outs)
        if name not in functions:
            raise InvalidInput(f"the box {name!r} has no inside in the drawing: give functions={{{name!r}: f}}")
        return Opaque(name, before, after, functions[name], whole=True), at
    raise InvalidInput(f"glyph {kind!r}: none that this version draws, or one without an inside")


def _marked_first(glyph: Any, letters: tuple[str, ...]) -> tuple[str, ...]:
    """Letters with the one whose wire ends in a square at the front."""
    shape = next(box for kind, box in glyph.boxes if kind == "shape")
    port = next(box for kind, box in glyph.boxes if kind == "port" and abs((box[0] + box[2]) / 2 - shape[0]) < 1)
    y = (port[1] + port[3]) / 2
    first = min(range(len(letters)), key=lambda i: abs(glyph.left[i] - y))
    return (letters[first], *letters[:first], *letters[first + 1 :])


def _label(text: str) -> str:
    mark, _, number = text.partition(" ")
    if number and mark in ("×", "+", "^", "≥", "≤", "leaky"):
        prime = "′" if number.endswith("′") else ""
        plain = number.rstrip("′")
        value = 1 / math.sqrt(int(plain[3:])) if plain.startswith("1/√") else float(plain)
        return f"{mark} {value!r}{prime}"
    return text


def _numbers(text: str, n: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split("×"))
    return values * n if len(values) == 1 else values


def _conv(glyph: Any, eaten: tuple, emitted: tuple, text: list[str], styles: list[dict[str, str]]) -> Conv:
    sides = []
    shape = next(box for kind, box in glyph.boxes if kind == "shape")
    for letters, x, heights in ((eaten, shape[0], glyph.left), (emitted, shape[2], glyph.right)):
        port = next(b for k, b in glyph.boxes if k == "port" and abs((b[0] + b[2]) / 2 - x) < 1)
        y = (port[1] + port[3]) / 2
        channel = min(range(len(letters)), key=lambda i: abs(heights[i] - y))
        sides.append((letters[channel], tuple(c for i, c in enumerate(letters) if i != channel)))
    (c, before), (d, after) = sides
    n = len(before)
    marks = text[0].split()
    found = {"★": (1,) * n, "/": (1,) * n, "p": (0,) * n, "d": (1,) * n, "o": (0,) * n, "g": (1,)}
    for mark in marks:
        if mark != "T":
            found[mark[0]] = _numbers(mark[1:], n if mark[0] != "g" else 1)
    transposed = "T" in marks
    return Conv(
        before, after, (c, d), styles[1].get("sup", ""), found["★"], found["/"], found["p"], found["d"],
        found["g"][0], "sub" in styles[1], transposed, found["o"] if transposed else (),
    )  # fmt: skip


def _pool(text: str, eaten: tuple, emitted: tuple) -> Pool:
    parsed = re.fullmatch(r"(\D+)★(\S+) /(\S+)(?: p(\S+))?", text)
    if parsed is None:
        raise InvalidInput(f"pooling {text!r}: expected a kind, a star, sizes and a stride")
    n = len(eaten)
    kind, kernel, stride, padding = parsed.groups()
    return Pool(KINDS[kind], eaten, emitted, _numbers(kernel, n), _numbers(stride, n), _numbers(padding or "0", n))


def _norm(kind: str, over: tuple, texts: list[list[tuple[str, str]]]) -> Norm:
    runs = texts[0] if texts else []
    name = next((t for t, style in runs if style == "sup"), "")
    marks = next((t for t, style in runs if style == "small"), "").split()
    bare, bias = (any(t == mark and style == "sub" for t, style in runs) for mark in ("∘", "+"))
    affine = "" if not name or bare else "wb" if bias else "w"
    made = Norm(kind, over, name, affine)
    for mark in marks:
        made = replace(made, eps=float(mark[1:])) if mark[0] == "ε" else replace(made, groups=int(mark[1:]))
    return made
