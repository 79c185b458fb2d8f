"""How alike two texts are: BLEU, from counts of short runs of words."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.text import split_words


def bleu(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    split: Callable[[str], list[str]] = split_words,
    order: int = 4,
) -> float:
    """BLEU of a set of sentences against several references each, 0 to 1 (Papineni et al., 2002).

    Counts are summed over the set before they are divided. Orders without a match are smoothed as in NIST's script:
    each such order counts half as much as the one before it.

    Args:
        texts: one sentence for each unit.
        references: what people said of each.
        split: from a sentence to its words.
        order: longest run of words.

    Raises:
        InvalidInput: other numbers, or nothing to compare.
    """
    if len(texts) != len(references) or not texts:
        raise InvalidInput(
            f"{len(texts)} sentences against references for {len(references)}: expected as many, and some"
        )
    match, total = [0] * order, [0] * order
    said = wanted = 0
    for text, others in zip(texts, references, strict=True):
        words = split(text)
        sources = [split(other) for other in others]
        if not sources:
            raise InvalidInput(f"no reference for {text!r}")
        said += len(words)
        wanted += min((abs(len(source) - len(words)), len(source)) for source in sources)[1]
        for n in range(1, order + 1):
            grams = _grams(words, n)
            best: Counter[tuple[str, ...]] = Counter()
            for source in sources:
                best |= _grams(source, n)
            match[n - 1] += sum((grams & best).values())
            total[n - 1] += sum(grams.values())
    smooth, logs = 1.0, 0.0
    used = [n for n in range(order) if total[n]]
    if not used or not match[0]:
        return 0.0
    for n in used:
        if match[n]:
            logs += math.log(match[n] / total[n])
        else:
            smooth *= 2
            logs += math.log(1 / (smooth * total[n]))
    brevity = 1.0 if said >= wanted else math.exp(1 - wanted / said)
    return brevity * math.exp(logs / len(used))


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
