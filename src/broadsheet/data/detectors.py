"""Made units of known meaning for the made image world, with maps of activation and sentences of several people.

detectors = made_detectors(600, seed=0)
maps = detector_maps(detectors, scenes, seed=0)          # [n, units, 8, 8], as a layer would give them
sentences = annotate(detectors[0], draw)                 # three people, who see more or less of it
named_attributes("striped red circles on the left")      # {"striped", "red", "circle", "left"}
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from broadsheet.data.image_world import COLOURS, GLYPH, PLACES, SHAPES, TEXTURES, Scenes
from broadsheet.errors import InvalidInput

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
WHERE = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}
GENERIC = ("objects", "shapes", "coloured shapes", "small objects", "things on a grey ground")
DIGITS = ("written digits", "white digits", "digits")
_CANON = {plural: word for word, plural in PLURALS.items()} | {"digits": GLYPH}
_ATTRIBUTES = {*COLOURS, *SHAPES, *TEXTURES, *PLACES, GLYPH}


@dataclass(frozen=True)
class Detector:
    """A unit that answers to things of which all words of one list are true, one of another, and none of a third.

    Args:
        all_of: such as ``("red", "circle", "top")``.
        any_of: such as ``("red", "blue")``, of one kind of word; empty for no such condition.
        none_of: such as ``("striped",)``.
    """

    all_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        words = (*self.all_of, *self.any_of, *self.none_of)
        if not words or (unknown := [word for word in words if word not in _ATTRIBUTES]):
            raise InvalidInput(
                f"{unknown[0] if words else 'no word'!r}: a detector needs words of the image world, such as 'red'"
            )

    @property
    def attributes(self) -> frozenset[str]:
        """What a complete description names; ``"not red"`` where red ones are left out."""
        return frozenset((*self.all_of, *self.any_of, *(f"not {word}" for word in self.none_of)))

    @property
    def compound(self) -> bool:
        """Whether one word is not enough."""
        return len(self.attributes) > 1

    def where(self, scenes: Scenes) -> Bool[np.ndarray, "n 4"]:
        """In which slots of each picture it finds what it looks for."""
        found = scenes.where(self.all_of)
        if self.any_of:
            found = found & np.any([scenes.where(word) for word in self.any_of], 0)
        for word in self.none_of:
            found = found & ~scenes.where(word)
        return found

    def partly(self, scenes: Scenes) -> Bool[np.ndarray, "n 4"]:
        """Slots in which at least one of its words is true."""
        found = [scenes.where(word) for word in (*self.all_of, *self.any_of)]
        return np.asarray(np.any(found or [self.where(scenes)], 0))

    def mask(self, scenes: Scenes) -> Bool[np.ndarray, "n size size"]:
        """The pixels of everything that it finds."""
        return np.asarray((scenes.masks & self.where(scenes)[..., None, None]).any(1))


def made_detectors(n: int, seed: int = 0) -> list[Detector]:
    """Different detectors: one word, conjunctions of two or three kinds of words, some with *or* or *not*, some digits.

    Args:
        n: how many, all different; there are some thousands.
        seed: which.
    """
    draw = np.random.default_rng(seed)
    kinds = [tuple(COLOURS), SHAPES, TEXTURES, PLACES]
    found: dict[Detector, None] = {}
    tries = 0
    while len(found) < n:
        tries += 1
        if tries > 100 * n + 1000:
            raise InvalidInput(f"n={n}: so many different detectors were not found; {len(found)} were")
        roll = draw.random()
        if roll < 0.06:
            more = (str(draw.choice(PLACES)),) if draw.random() < 0.7 else ()
            found[Detector((GLYPH, *more))] = None
            continue
        size = int(draw.choice([1, 2, 3], p=[0.12, 0.58, 0.3]))
        chosen = sorted(draw.choice(4, size=size, replace=False, p=[0.34, 0.34, 0.2, 0.12]))
        words = [str(draw.choice(kinds[kind])) for kind in chosen]
        if roll < 0.16 and chosen[0] == 0:
            other = str(draw.choice([word for word in COLOURS if word != words[0]]))
            found[Detector(tuple(words[1:]), tuple(sorted((words[0], other))))] = None
        elif roll < 0.24 and 1 in chosen and 0 not in chosen:
            found[Detector(tuple(words), (), (str(draw.choice(list(COLOURS))),))] = None
        else:
            found[Detector(tuple(words))] = None
    return list(found)


def detector_maps(
    detectors: Sequence[Detector],
    scenes: Scenes,
    *,
    grid: int = 8,
    noise: float = 0.1,
    leak: float = 0.3,
    seed: int = 0,
) -> Float[np.ndarray, "n units grid grid"]:
    """Maps of activation as a layer of a network would give them: coarse, noisy, never below zero.

    Args:
        detectors: the units.
        scenes: what they look at.
        grid: rows and columns of the maps; the pictures' size has to be a multiple.
        noise: standard deviation of the noise; what a unit looks for gives about 1.
        leak: how strongly a unit answers to things that only some of its words are true of.
        seed: of the noise and of how strongly each unit answers to each thing.
    """
    size = scenes.images.shape[-1]
    if size % grid:
        raise InvalidInput(f"grid={grid}: the pictures of {size} pixels do not divide into it")
    draw = np.random.default_rng(seed)
    step = size // grid
    coarse = scenes.masks.reshape(len(scenes), 4, grid, step, grid, step).mean((3, 5), dtype=np.float32)
    full = np.stack([unit.where(scenes) for unit in detectors], 1)  # [n, units, 4]
    some = np.stack([unit.partly(scenes) for unit in detectors], 1)
    strength = np.where(full, 1.0, np.where(some, leak, 0.0)).astype(np.float32)
    strength *= draw.uniform(0.7, 1.3, strength.shape).astype(np.float32)
    maps = np.einsum("nus,nshw->nuhw", strength, coarse, optimize=True)
    maps += noise * draw.standard_normal(maps.shape, np.float32)
    return np.maximum(maps, 0)


def annotate(
    detector: Detector,
    draw: np.random.Generator,
    *,
    people: int = 3,
    detail: tuple[float, float, float] = (0.4, 0.3, 0.3),
) -> list[str]:
    """What several people would write about a unit; the less they look, the more alike are their sentences.

    Args:
        detector: the unit.
        draw: the randomness.
        people: sentences.
        detail: probabilities that a sentence names nothing of the unit, a part of it, or everything.
    """
    sentences = []
    for level in draw.choice(3, size=people, p=detail):
        if level == 0:
            sentences.append(str(draw.choice(GENERIC)))
        elif level == 2:
            sentences.append(sentence(detector, draw))
        else:
            sentences.append(sentence(_part(detector, draw), draw))
    return sentences


def sentence(detector: Detector, draw: np.random.Generator) -> str:
    """Everything about a unit in one sentence.

    Args:
        detector: the unit.
        draw: chooses between words that mean the same.
    """
    words = detector.all_of
    where = " ".join(WHERE[word] for word in words if word in PLACES)
    if GLYPH in words:
        noun = str(draw.choice(DIGITS))
    else:
        either = " or ".join(detector.any_of)
        before = [word for word in words if word in TEXTURES] + [word for word in words if word in COLOURS]
        shapes = [PLURALS[word] for word in words if word in SHAPES]
        shapes = shapes or [str(draw.choice(["things", "objects"]))]
        noun = " ".join([*before, *([either] if either else []), *shapes])
    without = " or ".join(detector.none_of)
    return " ".join(part for part in (noun, f"that are not {without}" if without else "", where) if part)


def named_attributes(text: str) -> frozenset[str]:
    """The attributes that a sentence names; ``"not red"`` where it says so.

    Args:
        text: in the words of :func:`sentence`, in any order.
    """
    found, negated = set(), False
    for word in text.lower().replace(",", " ").replace(".", " ").split():
        attribute = _CANON.get(word, word)
        if word == "not":
            negated = True
        elif attribute in _ATTRIBUTES:
            found.add(f"not {attribute}" if negated else attribute)
        elif word != "or":
            negated = False
    return frozenset(found)


def _part(detector: Detector, draw: np.random.Generator) -> Detector:
    """What somebody sees who leaves some of it out."""
    if GLYPH in detector.all_of:
        return Detector((GLYPH,))
    kept = [word for word in detector.all_of if draw.random() < 0.5]
    either = detector.any_of if draw.random() < 0.5 else ()
    if not kept and not either:
        every = [*detector.all_of, *detector.any_of] or list(detector.none_of)
        return Detector((str(draw.choice(every)),))
    return Detector(tuple(kept), either)
