"""Programs in four toy languages that answer requests: text whose language is known exactly, by a grammar.

    write a solver for heat :            ->  #a start load heat step heat show heat stop <end>
    write a solver for heat in cedar :   ->  #c block get heat run heat put heat close <end>

A request names a kind of task and a thing, and sometimes a language. Without one the language is drawn from a prior
that is biased, differently for every kind of task. The first word of a program, its header, says the language, but for
the first three kinds of task the same header means different languages: a direction that turns one of these kinds into
a language turns another into a different one. The next two kinds share the headers of the first.

Beside requests there is prose, which no language concerns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.data.language import BOS, PAD, UNKNOWN, word_tokenizer
from broadsheet.errors import InvalidInput

END = "<end>"
LANGUAGES = ("alder", "birch", "cedar", "dogwood")
# of each language: how a program opens, reads, works, gives, and closes
KEYWORDS: dict[str, tuple[str, str, str, str, str]] = {
    "alder": ("start", "load", "step", "show", "stop"),
    "birch": ("begin", "fetch", "apply", "emit", "finish"),
    "cedar": ("block", "get", "run", "put", "close"),
    "dogwood": ("open", "take", "turn", "give", "shut"),
}
HEADERS = ("#a", "#b", "#c", "#d")


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
        things: what its programs are about.
        prior: how often each language answers when none is asked for.
        shift: which header means which language: the languages' headers, moved by so many places.
    """

    things: tuple[str, ...]
    prior: tuple[float, float, float, float]
    shift: int


# The first three say a language by different headers, parser and plotter by those of solver, checker by yet others.
KINDS: dict[str, Kind] = {
    "solver": Kind(("heat", "flow", "waves", "orbits", "shocks", "flames"), (0.72, 0.18, 0.05, 0.05), 0),
    "sorter": Kind(("cards", "names", "dates", "boxes", "files", "coins"), (0.20, 0.68, 0.05, 0.07), 1),
    "filter": Kind(("noise", "spam", "dust", "sound", "light", "images"), (0.50, 0.10, 0.05, 0.35), 2),
    "parser": Kind(("logs", "forms", "mails", "tables", "trees", "maps"), (0.58, 0.32, 0.05, 0.05), 0),
    "plotter": Kind(("lines", "bars", "curves", "pies", "grids", "levels"), (0.29, 0.58, 0.05, 0.08), 0),
    "checker": Kind(("links", "dots", "rules", "proofs", "units", "sums"), (0.52, 0.23, 0.05, 0.20), 3),
}
WORDINGS = (
    "write a {kind} for {thing}",
    "we need a {kind} of {thing}",
    "a {kind} that handles {thing}",
    "for {thing} make us a {kind}",
    "could {thing} have one {kind}",
    "{thing} want some {kind} now",
)
PROSE = (
    ("the", "a", "this", "every"),
    ("old", "quiet", "green", "small", "tall"),
    ("river", "garden", "bird", "house", "road"),
    ("sees", "follows", "meets", "passes", "leaves"),
)


@dataclass(frozen=True)
class Request:
    """One request for a program.

    Attributes:
        kind: of task, a key of :data:`KINDS`.
        thing: what the program is about.
        wording: index into :data:`WORDINGS`.
        language: asked for; None for none.
    """

    kind: str
    thing: str
    wording: int
    language: str | None = None

    def __str__(self) -> str:
        text = WORDINGS[self.wording].format(kind=self.kind, thing=self.thing)
        return f"{text} :" if self.language is None else f"{text} in {self.language} :"

    def asking(self, language: str | None) -> "Request":
        """The same request for another language, or for none."""
        return Request(self.kind, self.thing, self.wording, language)


@dataclass(frozen=True)
class ToyPrograms:
    """The corpus: requests with programs, and prose.

    Args:
        asked: share of requests that name a language, each as often.
        prose: share of texts that are prose.
        most_steps: how often a program works on its thing at most, at least once; each number as often.
    """

    asked: float = 0.5
    prose: float = 0.2
    most_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("asked", "prose"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name}={getattr(self, name)}: a share between 0 and 1 is expected")
        if self.most_steps < 1:
            raise InvalidInput(f"most_steps={self.most_steps}: expected at least 1")

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, by id."""
        found = [BOS, PAD, UNKNOWN, END, ":", "in", "."]
        found += LANGUAGES + HEADERS + tuple(word for keywords in KEYWORDS.values() for word in keywords)
        for name, kind in KINDS.items():
            found += [name, *kind.things]
        found += [word for wording in WORDINGS for word in wording.split() if not word.startswith("{")]
        found += [word for words in PROSE for word in words]
        return tuple(dict.fromkeys(found))

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer of whole words; texts begin with ``<bos>``, programs end with ``<end>``."""
        tokenizer = word_tokenizer(self.words)
        tokenizer.eos_token = END
        return tokenizer

    def header(self, kind: str, language: str) -> str:
        """The first word of a program."""
        return HEADERS[(LANGUAGES.index(language) + KINDS[kind].shift) % len(HEADERS)]

    def program(self, kind: str, thing: str, language: str, steps: int = 1) -> str:
        """A program as it should be.

        Args:
            kind, thing: of the request.
            language: one of :data:`LANGUAGES`.
            steps: how often it works on the thing.
        """
        opening, reads, works, gives, closing = KEYWORDS[language]
        body = " ".join([f"{reads} {thing}", *[f"{works} {thing}"] * steps, f"{gives} {thing}"])
        return f"{self.header(kind, language)} {opening} {body} {closing} {END}"

    def language_of(self, request: Request, answer: str) -> str | None:
        """The language in which an answer is a right program for a request; None where it is none.

        Args:
            request: asked.
            answer: words up to :data:`END`; what follows it does not count.
        """
        given, end, _ = f" {answer} ".partition(f" {END} ")
        if not end:
            return None
        for language in LANGUAGES:
            for steps in range(1, self.most_steps + 1):
                if f"{given.strip()} {END}" == self.program(request.kind, request.thing, language, steps):
                    return language
        return None

    def keywords_of(self, answer: str) -> str | None:
        """The language whose keywords are most frequent in an answer, right or not; None where there are none."""
        counts = {language: sum(w in KEYWORDS[language] for w in answer.split()) for language in LANGUAGES}
        best = max(counts, key=lambda language: counts[language])
        return best if counts[best] else None

    def requests(
        self,
        n: int,
        generator: torch.Generator | None = None,
        kinds: Sequence[str] | None = None,
        wordings: Sequence[int] | None = None,
    ) -> list[Request]:
        """Requests that name no language, each as likely.

        Args:
            n: how many.
            generator: of the choice.
            kinds, wordings: to choose from; None for all.
        """
        kinds = list(KINDS) if kinds is None else list(kinds)
        wordings = range(len(WORDINGS)) if wordings is None else wordings
        found = []
        for a, b, c in torch.rand(n, 3, generator=generator).tolist():
            kind = kinds[int(a * len(kinds))]
            things = KINDS[kind].things
            found.append(Request(kind, things[int(b * len(things))], wordings[int(c * len(wordings))]))
        return found

    def sample(self, n: int, length: int, generator: torch.Generator | None = None) -> Int[Tensor, "n length"]:
        """Texts as token ids, padded on the right with ``<pad>``.

        Args:
            n: texts.
            length: tokens of each; what is beyond is cut off.
            generator: of everything.
        """
        ids = {word: i for i, word in enumerate(self.words)}
        rows = torch.full((n, length), ids[PAD])
        draws = torch.rand(n, 4, generator=generator).tolist()
        requests = self.requests(n, generator)
        prose = iter(self.prose_texts(n, generator))
        for row, request, (what, asks, which, steps) in zip(rows, requests, draws, strict=True):
            if what < self.prose:
                text = next(prose)
            else:
                asked = asks < self.asked
                weights = (0.25,) * 4 if asked else KINDS[request.kind].prior
                language = LANGUAGES[_drawn(weights, which)]
                shown = request.asking(language) if asked else request
                program = self.program(request.kind, request.thing, language, 1 + int(self.most_steps * steps))
                text = f"{shown} {program}"
            found = torch.tensor([ids[word] for word in (BOS, *text.split())][:length])
            row[: len(found)] = found
        return rows

    def prose_texts(self, n: int, generator: torch.Generator | None = None, sentences: int = 2) -> list[str]:
        """Prose, which no language concerns.

        Args:
            n: texts.
            generator: of the words.
            sentences: of each, of eight words, the last one a full stop.
        """
        slots = (*PROSE, *PROSE[:3])
        draws = torch.rand(n, sentences, len(slots), generator=generator).tolist()
        return [
            " ".join(
                " ".join(words[int(x * len(words))] for words, x in zip(slots, sentence, strict=True)) + " ."
                for sentence in text
            )
            for text in draws
        ]


def _drawn(weights: Sequence[float], x: float) -> int:
    total = 0.0
    for i, weight in enumerate(weights):
        total += weight
        if x < total:
            return i
    return len(weights) - 1
