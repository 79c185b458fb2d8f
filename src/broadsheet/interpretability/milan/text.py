"""Words: splitting sentences, numbering words, and telling nouns from adjectives without a parser.

The tagger is a list of function words and a few endings: right for the short, plain sentences in which people describe
units, no parser of English. Hand in a spaCy pipeline for one (:func:`spacy_words`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput, MissingExtra

START, STOP, PAD, UNKNOWN = "<start>", "<stop>", "<pad>", "<unk>"
SPECIALS = (START, STOP, PAD, UNKNOWN)
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, in order.

    >>> split_words("The upper edge of round, red things.")
    ['the', 'upper', 'edge', 'of', 'round', ',', 'red', 'things', '.']
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers; the four special ones come first.

    Attributes:
        words: by number.
        split: from a sentence to its words.
    """

    words: tuple[str, ...]
    split: Callable[[str], list[str]] = split_words

    @classmethod
    def of(
        cls, texts: Iterable[str], min_count: int = 1, split: Callable[[str], list[str]] = split_words
    ) -> "Vocabulary":
        """Every word of some sentences, the most frequent first.

        Args:
            texts: the sentences.
            min_count: rarer words become unknown ones.
            split: from a sentence to its words; :func:`spacy_words` makes one of a spaCy pipeline.

        Raises:
            InvalidInput: no sentence holds a word.
        """
        counts = Counter(word for text in texts for word in split(text))
        words = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        if not words:
            raise InvalidInput("the sentences hold no word: hand in at least one that is not empty")
        return cls((*SPECIALS, *words), split)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def start(self) -> int:
        return 0

    @property
    def stop(self) -> int:
        return 1

    @property
    def pad(self) -> int:
        return 2

    @property
    def unknown(self) -> int:
        return 3

    def encode(self, texts: Sequence[str], length: int = 15) -> Int[Tensor, "n time"]:
        """Numbers of the words, each sentence ended by the stop token and filled up with padding.

        Args:
            texts: sentences; none may be empty.
            length: words at most; what is beyond is cut off (and such a sentence has no stop token).

        Raises:
            InvalidInput: an empty sentence.
        """
        table = {word: i for i, word in enumerate(self.words)}
        rows = []
        for number, text in enumerate(texts):
            words = self.split(text)
            if not words:
                raise InvalidInput(f"sentence {number} is empty ({text!r}): leave it out")
            ids = [table.get(word, self.unknown) for word in words]
            rows.append([*ids, self.stop] if len(ids) <= length else ids[:length])
        longest = max(map(len, rows), default=1)
        padded = [[*row, *[self.pad] * (longest - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.long).view(len(rows), longest)

    def decode(self, tokens: Int[Tensor, " time"] | Sequence[int]) -> str:
        """The sentence, up to the stop token."""
        words = []
        for token in tokens:
            if int(token) == self.stop:
                break
            if int(token) not in (self.start, self.pad):
                words.append(self.words[int(token)])
        return re.sub(r" ([,.;:!?])", r"\1", " ".join(words))


FUNCTION_WORDS = {
    "adposition": (
        "of in on at by with without from to into onto over under above below between behind beside near around "
        "along across through inside outside against beneath underneath within during about toward towards up down off"
    ),
    "other": (
        "the a an and or but that which who whose this these those it its their his her some any all many several "
        "various no not very more most other another each is are was were be been being has have had do does did can "
        "there here one two three four five as than for etc"
    ),
}
_FUNCTION = {word: tag for tag, words in FUNCTION_WORDS.items() for word in words.split()}
_ADJECTIVES = frozenset(
    word
    for line in (
        "red green blue yellow purple cyan orange pink brown black white grey gray dark bright light pale colourful",
        "colorful coloured colored round square circular rectangular triangular curved straight flat thin thick wide",
        "narrow long short tall small large big tiny huge high low upper lower left right top bottom middle central",
        "vertical horizontal diagonal parallel plain striped dotted spotted checkered patterned textured smooth rough",
        "shiny furry hairy wooden metallic soft hard sharp similar different same repeating human open empty old new",
        "written",
    )
    for word in line.split()
)
# Ambiguous words that end a sentence, or stand before a function word, are things: "at the top", "on the left".
_NOUNS_AT_THE_END = {"top", "bottom", "left", "right", "middle", "square", "light", "human", "red", "green", "blue"}
_ADJECTIVE_ENDINGS = ("ful", "ous", "ish", "ic", "al", "ive", "less", "able", "ible", "ular", "ed", "y")
_VERB_LINE = "look looks show shows contain contains hold holds stand stands run runs walk walks sit sits move"
_VERBS = frozenset(_VERB_LINE.split())


def tag_words(words: Sequence[str]) -> list[str]:
    """Each word's part of speech: ``noun``, ``verb``, ``adjective``, ``adposition`` or ``other``.

    Args:
        words: of one sentence, as :func:`split_words` gives them.

    >>> tag_words(["striped", "red", "circles", "at", "the", "top"])
    ['adjective', 'adjective', 'noun', 'adposition', 'other', 'noun']
    """
    tags = []
    for i, word in enumerate(words):
        last = i + 1 == len(words) or words[i + 1] in _FUNCTION or not words[i + 1][0].isalnum()
        if not word[0].isalnum():
            tags.append("other")
        elif word in _FUNCTION:
            tags.append(_FUNCTION[word])
        elif word in _VERBS or (word.endswith("ing") and last and i > 0):
            tags.append("verb")
        elif word in _ADJECTIVES:
            tags.append("noun" if last and word in _NOUNS_AT_THE_END else "adjective")
        elif not last and word.endswith(_ADJECTIVE_ENDINGS):
            tags.append("adjective")
        else:
            tags.append("noun")
    return tags


@dataclass(frozen=True)
class Grammar:
    """What a sentence is made of.

    Attributes:
        n_nouns, n_verbs, n_adjectives, n_adpositions: words of each kind.
        length: words and marks.
        parse_depth: longest way from the root of the tree of dependencies to a word; without a parser one for the
            main noun, and one more for each preposition or relative clause that hangs on it.
    """

    n_nouns: int
    n_verbs: int
    n_adjectives: int
    n_adpositions: int
    length: int
    parse_depth: int


def grammar(text: str, nlp: Any = None) -> Grammar:
    """Count the kinds of words of a sentence.

    Args:
        text: a description.
        nlp: a spaCy pipeline with tagger and parser; None for the rules of this module.
    """
    if nlp is not None:
        document = list(nlp(text))
        kinds = {"NOUN": "noun", "PROPN": "noun", "VERB": "verb", "ADJ": "adjective", "ADP": "adposition"}
        tags = [kinds.get(token.pos_, "other") for token in document]
        depth = max((1 + len(list(token.ancestors)) for token in document), default=0)
        n = len(document)
    else:
        words = split_words(text)
        tags = tag_words(words)
        depth = bool(words) + tags.count("adposition") + sum(word in ("that", "which", "who") for word in words)
        n = len(words)
    counts = Counter(tags)
    return Grammar(counts["noun"], counts["verb"], counts["adjective"], counts["adposition"], n, int(depth))


def spacy_words(model: str = "en_core_web_sm") -> Callable[[str], list[str]]:
    """A splitter that uses spaCy's tokenizer, as the paper does.

    Args:
        model: the name of an installed spaCy model.

    Raises:
        MissingExtra: spaCy or the model is not installed.
    """
    try:
        import spacy  # type: ignore[import-not-found]  # optional, never among our own dependencies

        nlp = spacy.load(model, disable=["parser", "ner", "lemmatizer", "tagger"])
    except (ImportError, OSError) as error:
        raise MissingExtra(
            f"spaCy with {model} is not installed. Install it with: pip install spacy; python -m spacy download {model}"
            "; or leave the splitter out: the one of this module needs nothing"
        ) from error
    return lambda text: [token.text.lower() for token in nlp(text) if not token.is_space]
