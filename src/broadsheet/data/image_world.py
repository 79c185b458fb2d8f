"""A made world of small pictures in which everything is known: what stands where, in which colour, shape and texture.

    world = ImageWorld()
    scenes = world.sample(500, seed=0)
    scenes.images                       # uint8 [n, 3, 32, 32]
    scenes.concept("red")               # bool  [n, 32, 32], every pixel of a red thing
    scenes.where(("red", "circle"))     # bool  [n, slots], which objects are red circles
    stamped, mask = stamp(scenes.images, digits)     # a written digit in the corner of every picture

The digits are scikit-learn's (8 x 8, written by hand).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int, UInt8

from broadsheet.errors import InvalidInput

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.89, 0.14, 0.13),
    "green": (0.16, 0.66, 0.25),
    "blue": (0.16, 0.34, 0.88),
    "yellow": (0.96, 0.83, 0.16),
    "purple": (0.58, 0.22, 0.70),
    "cyan": (0.20, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("top", "bottom", "left", "right")
GLYPH = "digit"


@dataclass(frozen=True)
class Scenes:
    """Pictures with the truth about them.

    A slot is a quarter of the picture: top left, top right, bottom left, bottom right.

    Attributes:
        images: values 0 to 255, ``[n, 3, size, size]``.
        kinds: colour, shape and texture of what stands in each slot, ``[n, 4, 3]``; -1 where nothing or a digit does.
        digits: the digit in each slot, ``[n, 4]``; -1 where there is none.
        masks: pixels of what stands in each slot, ``[n, 4, size, size]``.
        vocabulary: names of the colours, shapes and textures.
    """

    images: UInt8[np.ndarray, "n 3 size size"]
    kinds: Int[np.ndarray, "n 4 3"]
    digits: Int[np.ndarray, "n 4"]
    masks: Bool[np.ndarray, "n 4 size size"]
    vocabulary: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "Scenes":
        """Some of the pictures."""
        parts = (self.images, self.kinds, self.digits, self.masks)
        return Scenes(*(part[rows] for part in parts), vocabulary=self.vocabulary)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Every word that :meth:`concept` knows."""
        return (*(name for names in self.vocabulary for name in names), *PLACES, GLYPH)

    def where(self, words: str | Iterable[str]) -> Bool[np.ndarray, "n 4"]:
        """In which slots stands something that all words are true of.

        Args:
            words: of :attr:`concepts`.
        """
        found = (self.kinds[..., 0] >= 0) | (self.digits >= 0)
        for word in [words] if isinstance(words, str) else words:
            found = found & self._word(word)
        return found

    def concept(self, words: str | Iterable[str]) -> Bool[np.ndarray, "n size size"]:
        """The pixels of everything that all words are true of."""
        return np.asarray((self.masks & self.where(words)[..., None, None]).any(1))

    def _word(self, word: str) -> Bool[np.ndarray, "n 4"]:
        if word == GLYPH:
            return self.digits >= 0
        if word in PLACES:
            row, column = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
            inside = {"top": row == 0, "bottom": row == 1, "left": column == 0, "right": column == 1}[word]
            return np.broadcast_to(inside, self.digits.shape)
        for axis, names in enumerate(self.vocabulary):
            if word in names:
                return self.kinds[..., axis] == names.index(word)
        raise InvalidInput(f"{word!r} is no word of this world: {', '.join(self.concepts)}")


@dataclass(frozen=True)
class ImageWorld:
    """Things of a colour, a shape and a texture on a grey ground, one to each quarter of the picture at most.

    Args:
        size: of the square pictures, pixels, a multiple of 2 from 24 on.
        colours, shapes, textures: those that occur, of :data:`COLOURS`, :data:`SHAPES` and :data:`TEXTURES`.
        filled: probability that a quarter holds something.
        digits: probability that it is a digit instead of a thing.
        noise: standard deviation of the pixels' noise, as a share of white.
    """

    size: int = 32
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    textures: tuple[str, ...] = TEXTURES
    filled: float = 0.65
    digits: float = 0.12
    noise: float = 0.04

    def __post_init__(self) -> None:
        if self.size < 24 or self.size % 2:
            raise InvalidInput(f"size={self.size}: expected an even number of pixels from 24 on")
        for name, known in {"colours": COLOURS, "shapes": SHAPES, "textures": TEXTURES}.items():
            chosen = getattr(self, name)
            if not chosen or (unknown := [word for word in chosen if word not in known]):
                wrong = unknown[0] if chosen else "nothing"
                raise InvalidInput(f"{name}: {wrong!r} is not among {', '.join(known)}")
        for name in ("filled", "digits"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name}={getattr(self, name)}: a probability is expected")

    def sample(self, n: int, seed: int = 0) -> Scenes:
        """Draw pictures.

        Args:
            n: pictures.
            seed: of everything in them.
        """
        draw = np.random.default_rng(seed)
        choices = (self.colours, self.shapes, self.textures)
        kinds = np.stack([draw.integers(len(names), size=(n, 4)) for names in choices], -1)
        digits = np.where(draw.random((n, 4)) < self.digits, draw.integers(10, size=(n, 4)), -1)
        filled = draw.random((n, 4)) < self.filled
        filled[np.arange(n), draw.integers(4, size=n)] = True  # no picture is empty
        digits = np.where(filled, digits, -1)
        kinds[(digits >= 0) | ~filled] = -1
        return self.paint(kinds, digits, draw)

    def paint(
        self, kinds: Int[np.ndarray, "n 4 3"], digits: Int[np.ndarray, "n 4"], draw: np.random.Generator
    ) -> Scenes:
        """Pictures of chosen things; places, sizes and noise are drawn.

        Args:
            kinds, digits: as in :class:`Scenes`, numbers of this world's own words.
            draw: the randomness.
        """
        n, size, half = len(kinds), self.size, self.size // 2
        ground = draw.uniform(0.25, 0.5, (n, 1, 1, 1))
        picture = np.broadcast_to(ground, (n, 3, size, size)).astype(np.float32).copy()
        masks = np.zeros((n, 4, size, size), bool)
        y, x = np.mgrid[:half, :half].astype(np.float32)
        palette = np.array([COLOURS[name] for name in self.colours], np.float32)
        shades = np.stack([_shade(name, y, x) for name in self.textures]).astype(np.float32)
        for slot in range(4):
            top, left = slot // 2 * half, slot % 2 * half
            rows, columns = slice(top, top + half), slice(left, left + half)
            radius = draw.uniform(0.3, 0.42, (n, 1, 1)).astype(np.float32) * half
            centre = half / 2 - 0.5 + draw.uniform(-0.09, 0.09, (2, n, 1, 1)).astype(np.float32) * half
            outlines = _outlines((x - centre[1]) / radius, (y - centre[0]) / radius)
            colour, shape, texture = (kinds[:, slot, axis] for axis in range(3))
            inside = np.zeros((n, half, half), bool)
            for number, name in enumerate(self.shapes):
                chosen = shape == number
                inside[chosen] = outlines[name][chosen]
            paint = palette[colour][:, :, None, None] * shades[texture][:, None]
            picture[:, :, rows, columns] = np.where(inside[:, None], paint, picture[:, :, rows, columns])
            masks[:, slot, rows, columns] = inside
            written = np.flatnonzero(digits[:, slot] >= 0)
            if len(written):
                ink = _ink(digits[written, slot], draw)
                room = half - ink.shape[1]
                down, across = top + draw.integers(1, room, len(written)), left + draw.integers(1, room, len(written))
                masks[written, slot] = _write(picture, written, ink, down, across)
        picture += self.noise * draw.standard_normal(picture.shape, np.float32)
        images = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        return Scenes(images, kinds, digits, masks, (self.colours, self.shapes, self.textures))


def stamp(
    images: UInt8[np.ndarray, "n 3 size size"], digits: Int[np.ndarray, " n"], seed: int = 0
) -> tuple[UInt8[np.ndarray, "n 3 size size"], Bool[np.ndarray, "n size size"]]:
    """Write a digit into the lower right corner of pictures.

    Args:
        images: values 0 to 255; they are not changed.
        digits: 0 to 9, or -1 to leave a picture as it is.
        seed: which of the handwritten digits is taken.

    Returns:
        the new pictures, and the pixels of the digits.
    """
    if len(digits) != len(images) or bool(((digits < -1) | (digits > 9)).any()):
        raise InvalidInput(f"digits: expected {len(images)} numbers from -1 to 9")
    draw = np.random.default_rng(seed)
    picture = images.astype(np.float32) / 255
    mask = np.zeros((len(images), *images.shape[2:]), bool)
    written = np.flatnonzero(digits >= 0)
    if len(written):
        ink = _ink(digits[written], draw)
        top = np.full(len(written), images.shape[2] - ink.shape[1] - 1)
        left = np.full(len(written), images.shape[3] - ink.shape[1] - 1)
        mask[written] = _write(picture, written, ink, top, left)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8), mask


def _outlines(u: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """Which pixels lie inside each shape, in coordinates with the shape's radius as 1."""
    far, across, down = u**2 + v**2, np.abs(u), np.abs(v)
    return {
        "circle": far <= 1,
        "square": np.maximum(across, down) <= 0.87,
        "triangle": (v <= 0.8) & (across <= (v + 1) * 0.62),
        "cross": (np.minimum(across, down) <= 0.34) & (np.maximum(across, down) <= 1),
        "ring": (far <= 1.1) & (far >= 0.36),
    }


def _shade(texture: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    if texture == "striped":
        return np.where(y % 4 < 2, 1.0, 0.35)
    if texture == "dotted":
        return np.where((y % 3 == 0) & (x % 3 == 0), 0.1, 1.0)
    return np.ones(y.shape)


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    return np.asarray(pictures).reshape(-1, 8, 8) / 16, np.asarray(labels)


def _ink(digits: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A written example of each digit, ``[n, 8, 8]``, 0 to 1."""
    pictures, labels = _handwriting()
    chosen = [draw.choice(np.flatnonzero(labels == digit)) for digit in digits]
    return pictures[chosen].astype(np.float32)


def _write(picture: np.ndarray, rows: np.ndarray, ink: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Blend white ink into the pictures of some rows, in place; what comes back are its pixels, for those rows."""
    mask = np.zeros((len(rows), *picture.shape[2:]), bool)
    side = np.arange(ink.shape[1])
    at = np.arange(len(rows))[:, None, None]
    down, across = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
    old = picture[rows[:, None, None], :, down, across]  # [rows, side, side, 3]
    picture[rows[:, None, None], :, down, across] = old + (1 - old) * ink[..., None]
    mask[at, down, across] = ink > 0.3
    return mask
