"""Words and the tokens that stand for them: with and without a space before them, capitalised, in the plural."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from broadsheet.errors import InvalidInput


class SeveralTokens(UserWarning):
    """A word is no single token; some of its pieces stand for it."""


def vocabulary_words(tokenizer: Any, size: int) -> tuple[str, ...]:
    """The text of every token id, its leading space kept.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: of the model's vocabulary; ids that the tokenizer does not know have the text ``""``.
    """
    known = min(len(tokenizer), size)
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    decoded = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    # SentencePiece drops the space of a text's first piece when it decodes it.
    texts = [
        piece.replace("\u2581", " ") if piece is not None and "\u2581" in piece else text
        for piece, text in zip(pieces, decoded, strict=True)
    ]
    return (*texts, *[""] * (size - known))


def word_ids(
    word: str,
    words: Sequence[str],
    *,
    case: bool = False,
    variants: bool = True,
    tokenizer: Any = None,
    pieces: str = "first",
) -> list[int]:
    """The ids of the tokens that stand for a word.

    Args:
        word: as written, without a space before it.
        words: the text of every token id.
        case: whether capitals matter.
        variants: count tokens with a space before the word, and its plural.
        tokenizer: of the model; splits a word that is no single token. Without it the longest token that the word
            begins with is taken.
        pieces: of such a word: ``"first"`` for its first token, ``"all"`` for all of them.

    Raises:
        InvalidInput: an empty word, or one that no token stands for.

    Warns:
        SeveralTokens: the word is no single token; the message shows how it is split.
    """
    if not word.strip():
        raise InvalidInput(f"word={word!r}: expected a word")
    if pieces not in ("first", "all"):
        raise InvalidInput(f"pieces={pieces!r}: expected 'first' or 'all'")

    def plain(text: str) -> str:
        text = text.strip() if variants else text
        return text if case else text.casefold()

    wanted = {plain(form) for form in ((word, *plurals(word.strip())) if variants else (word,))}
    found = [i for i, text in enumerate(words) if text and plain(text) in wanted]
    if found:
        return found
    split = _split(word.strip(), words, tokenizer)
    if not split:
        raise InvalidInput(f"word={word!r}: no token of the vocabulary stands for it or begins it")
    shown = " + ".join(repr(words[i]) for i in split)
    taken = split if pieces == "all" else split[:1]
    stand = "all of them stand" if pieces == "all" else "the first stands"
    warnings.warn(
        f"{word!r} is no single token but {shown}: {stand} for it",
        SeveralTokens,
        stacklevel=3,
    )
    return taken


def plurals(word: str) -> tuple[str, ...]:
    """The likely plural of an English noun."""
    lower = word.casefold()
    if lower.endswith("y") and lower[-2:-1] not in ("a", "e", "i", "o", "u", ""):
        return (word[:-1] + "ies",)
    return (word + ("es" if lower.endswith(("s", "x", "z", "ch", "sh")) else "s"),)


def target_ids(targets: str | int | Iterable[str | int], tokenizer: Any, size: int, words: Any = None) -> list[int]:
    """Token ids of words or of ids, or of several of either.

    Args:
        targets: words and token ids.
        tokenizer: needed for words.
        size: of the vocabulary.
        words: the text of every token id, where it is at hand.
    """
    wanted = [targets] if isinstance(targets, str | int) else list(targets)
    ids: list[int] = []
    for target in wanted:
        if isinstance(target, str):
            if tokenizer is None:
                raise InvalidInput(f"{target!r} is a word: hand in tokenizer=, or token ids")
            words = words or vocabulary_words(tokenizer, size)
            ids += word_ids(target, words, tokenizer=tokenizer)
        else:
            ids.append(int(target))
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong or not ids:
        raise InvalidInput(f"token id {wrong[0] if wrong else 'missing'}: the vocabulary has {size} tokens")
    return list(dict.fromkeys(ids))


def _split(word: str, words: Sequence[str], tokenizer: Any) -> list[int]:
    if tokenizer is not None:
        unknown = getattr(tokenizer, "unk_token_id", None)
        ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        ids = [i for i in ids if i != unknown and i < len(words) and words[i].strip()]
        return list(ids)
    by_text = {text: i for i, text in reversed(list(enumerate(words))) if text.strip()}
    out: list[int] = []
    rest = word
    while rest:
        piece = next((rest[:n] for n in range(len(rest), 0, -1) if rest[:n] in by_text), None)
        if piece is None:
            return out
        out.append(by_text[piece])
        rest = rest[len(piece) :]
    return out
