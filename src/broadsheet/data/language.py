"""Made-up text whose meaning is known: texts about topics, and a tokenizer of whole words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput

BOS, PAD, UNKNOWN = "<bos>", "<pad>", "<unk>"

# Eight topics of nature, then eight of people: a tree of two groups.
TOPICS: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "horse", "wolf", "bear", "fox", "sheep", "goat"),
    "birds": ("eagle", "crow", "owl", "swan", "duck", "finch", "hawk", "robin"),
    "weather": ("rain", "snow", "storm", "cloud", "wind", "fog", "frost", "thunder"),
    "sea": ("wave", "tide", "coral", "whale", "shore", "reef", "harbour", "anchor"),
    "sky": ("star", "moon", "comet", "planet", "orbit", "galaxy", "eclipse", "meteor"),
    "forest": ("oak", "pine", "moss", "fern", "birch", "leaf", "bark", "root"),
    "fruit": ("apple", "pear", "plum", "cherry", "lemon", "grape", "melon", "peach"),
    "stones": ("granite", "marble", "quartz", "slate", "basalt", "chalk", "flint", "amber"),
    "music": ("violin", "drum", "piano", "choir", "melody", "flute", "chord", "rhythm"),
    "law": ("judge", "court", "verdict", "jury", "lawyer", "trial", "statute", "appeal"),
    "sport": ("goal", "team", "coach", "match", "player", "league", "stadium", "referee"),
    "medicine": ("doctor", "nurse", "fever", "surgeon", "clinic", "vaccine", "patient", "remedy"),
    "money": ("bank", "loan", "profit", "market", "stock", "credit", "invoice", "budget"),
    "kitchen": ("oven", "knife", "pan", "recipe", "spoon", "flour", "soup", "butter"),
    "travel": ("train", "ticket", "airport", "luggage", "hotel", "passport", "map", "station"),
    "school": ("teacher", "pupil", "lesson", "exam", "desk", "pencil", "essay", "grade"),
}
COMMON = (
    "the", "a", "and", "of", "to", "in", "is", "was", "it", "that", "with", "for", "on", "as", "by", "at", "from",
    "this", "which", "one", "some", "then", "when", "very", "also", "more", "over", "under", "new", "old", "here",
    "there",
)  # fmt: skip


@dataclass(frozen=True)
class TopicCorpus:
    """Texts about one topic each: words of the topic among words that all texts share.

    Word ids: 0 is BOS, 1 padding, 2 unknown; then the common words, then the topics' words, topic after topic.

    Args:
        n_topics: at most 16; the first half is about nature, the second about people.
        words_per_topic: at most 8.
        n_common: common words, at most 32.
        topical: probability that a word is one of the topic.
        related: probability that a topical word comes from any topic of the same half.
    """

    n_topics: int = 16
    words_per_topic: int = 8
    n_common: int = 32
    topical: float = 0.5
    related: float = 0.0

    def __post_init__(self) -> None:
        limits = {"n_topics": (2, 16), "words_per_topic": (1, 8), "n_common": (1, 32)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise InvalidInput(f"{name}={getattr(self, name)}: expected {low} to {high}")
        for name in ("topical", "related"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name}={getattr(self, name)}: a probability is expected")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the topics; a smaller number takes as many of either half."""
        names = list(TOPICS)
        first = (self.n_topics + 1) // 2
        return (*names[:first], *names[8 : 8 + self.n_topics - first])

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, by id."""
        topical = [word for name in self.names for word in TOPICS[name][: self.words_per_topic]]
        return (BOS, PAD, UNKNOWN, *COMMON[: self.n_common], *topical)

    @property
    def vocab_size(self) -> int:
        return 3 + self.n_common + self.n_topics * self.words_per_topic

    @property
    def topic_tokens(self) -> Int[Tensor, "topics words"]:
        """The ids of every topic's words."""
        first = 3 + self.n_common
        return torch.arange(first, self.vocab_size).view(self.n_topics, self.words_per_topic)

    @property
    def topic_of(self) -> Int[Tensor, " vocab"]:
        """The topic of every word; -1 for common ones."""
        table = torch.full((self.vocab_size,), -1)
        table[3 + self.n_common :] = torch.arange(self.n_topics).repeat_interleave(self.words_per_topic)
        return table

    @property
    def groups(self) -> Int[Tensor, " topics"]:
        """0 for topics of nature, 1 for those of people."""
        first = (self.n_topics + 1) // 2
        return (torch.arange(self.n_topics) >= first).long()

    def sample(
        self,
        n: int,
        length: int,
        generator: torch.Generator | None = None,
        topics: Tensor | None = None,
        weights: Float[Tensor, " topics"] | None = None,
    ) -> tuple[Int[Tensor, "n length"], Int[Tensor, " n"]]:
        """Draw texts, each beginning with BOS.

        Args:
            n: texts.
            length: tokens of each, BOS included.
            generator: of everything.
            topics: ``[n]``, fixed beforehand; None draws them.
            weights: how often each topic comes; None for equally often.

        Returns:
            ids and topics.
        """
        if length < 2:
            raise InvalidInput(f"length={length}: BOS and at least one word are expected")
        if topics is None:
            chances = torch.ones(self.n_topics) if weights is None else weights
            topics = torch.multinomial(chances, n, replacement=True, generator=generator)
        shape = (n, length)
        common = torch.randint(self.n_common, shape, generator=generator) + 3
        about = topics[:, None].expand(shape)
        group = self.groups
        first, size = (group == 0).nonzero().min(), int((group == 0).sum())
        start = torch.where(group[topics] == 0, first, size)[:, None]
        count = torch.where(group[topics] == 0, size, self.n_topics - size)[:, None]
        sibling = start + (torch.rand(shape, generator=generator) * count).long()
        about = torch.where(torch.rand(shape, generator=generator) < self.related, sibling, about)
        word = torch.randint(self.words_per_topic, shape, generator=generator)
        topical = self.topic_tokens[about, word]
        ids = torch.where(torch.rand(shape, generator=generator) < self.topical, topical, common)
        ids[:, 0] = 0
        return ids, topics

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """Ids as words."""
        words = self.words
        return " ".join(words[int(i)] for i in ids)

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer of this vocabulary."""
        return word_tokenizer(self.words)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A Hugging Face tokenizer that knows whole words, split at white space; BOS comes first in every text.

    Args:
        words: by id; ``<bos>``, ``<pad>`` and ``<unk>`` among them.

    Returns:
        a ``transformers.PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    missing = [special for special in (BOS, PAD, UNKNOWN) if special not in words]
    if missing or len(set(words)) < len(words):
        what = f"lacks {missing[0]!r}" if missing else "holds a word twice"
        raise InvalidInput(
            f"the vocabulary {what}: each of {BOS}, {PAD}, {UNKNOWN} and every word has to be there once"
        )
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
