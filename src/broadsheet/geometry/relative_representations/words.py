"""Two word spaces made comparable: the words both have, chosen as the paper chooses them (section 5.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class SharedWords:
    """Words of two spaces, the left one's most frequent first.

    Attributes:
        words: n of them.
        left, right: ``[n, d]`` and ``[n, e]`` vectors.
    """

    words: tuple[str, ...]
    left: Float[Tensor, "n d"]
    right: Float[Tensor, "n e"]


def shared_words(
    left: Any, right: Any, *, skip: int = 400, min_length: int = 4, alphabetic: bool = True, top: int | None = 20_000
) -> SharedWords:
    """The words that two spaces have in common.

    Args:
        left, right: ``{word: vector}`` with the most frequent first, or gensim's ``KeyedVectors``.
        skip: the left space's most frequent words left out: they mean little by themselves.
        min_length: letters of a word.
        alphabetic: letters only.
        top: so many words at most; None for all.

    Raises:
        InvalidInput: no word is left.
    """
    a, b = as_mapping(left), as_mapping(right)
    words = [
        word
        for i, word in enumerate(a)
        if i >= skip and word in b and len(word) >= min_length and (word.isalpha() or not alphabetic)
    ][:top]
    if not words:
        raise InvalidInput(
            f"no word is left of {len(a)} and {len(b)}: do both lists hold the same language, and is skip={skip} below "
            "the length of the left one?"
        )
    return SharedWords(tuple(words), _stacked(a, words), _stacked(b, words))


def as_mapping(space: Any) -> Mapping[str, Any]:
    """``{word: vector}`` of a mapping, or of gensim's ``KeyedVectors``."""
    if isinstance(space, Mapping):
        return space
    keys, vectors = getattr(space, "index_to_key", None), getattr(space, "vectors", None)
    if keys is None or vectors is None:
        raise InvalidInput(
            f"a word space of type {type(space).__name__}: {{word: vector}} or gensim's KeyedVectors is expected"
        )
    return dict(zip(keys, vectors, strict=True))


def _stacked(space: Mapping[str, Any], words: list[str]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(space[word], dtype=np.float32) for word in words]))
