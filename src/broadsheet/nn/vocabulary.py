"""Which words of a vocabulary many directions point at: exact, in blocks, without the matrix of all logits.

:func:`rank_vocabulary` multiplies directions ``[n, d]`` (neurons, factors, decoder rows, steering vectors) with the
rows of an output head ``[V, d]`` and keeps, for each direction, the words with the largest and the smallest logits, the
log-sum-exp and the entropy of the softmax. ``[n, V]`` would be 59 billion numbers for the neurons of an 8B model; only
a block of it is ever there.

    head = unembedding(model)                      # broadsheet.nn.features
    words = rank_vocabulary(directions, head.weight.T, bias=head.bias, k=10)
    words.tokens[0], words.probs[0]                # the ten words of direction 0 and their probabilities
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.progress import SILENT, Progress

CHUNK = 32  # columns that share one maximum in the search for the largest


class SkippedDirections(UserWarning):
    """Some directions hold NaN or infinite values; they have no words."""


@dataclass(frozen=True)
class VocabularyRanking:
    """The words that ``n`` directions point at.

    A direction with NaN or infinite values has tokens -1 and NaN for every number.

    Attributes:
        tokens: ``[n, k]``, the largest logit first; of equal ones the smaller token id.
        logits: ``[n, k]``, of those tokens, before division by the temperature.
        bottom_tokens, bottom_logits: ``[n, k_bottom]``, the smallest logit first.
        logsumexp: ``[n]``, over all words that count, of the logits divided by the temperature.
        entropy: ``[n]``, of their softmax, nats.
        temperature: of ``logsumexp``, ``entropy`` and ``probs``.
    """

    tokens: Int[Tensor, "n k"]
    logits: Float[Tensor, "n k"]
    bottom_tokens: Int[Tensor, "n k_bottom"]
    bottom_logits: Float[Tensor, "n k_bottom"]
    logsumexp: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    temperature: float = 1.0

    @property
    def probs(self) -> Float[Tensor, "n k"]:
        """Softmax probabilities of ``tokens``, over all words that count."""
        return (self.logits / self.temperature - self.logsumexp[:, None]).exp()


@torch.no_grad()
def rank_vocabulary(
    directions: Float[Tensor, "n d"],
    vocabulary: Float[Tensor, "V width"],  # other names than d and V: the checks below say more than a shape error
    *,
    bias: Float[Tensor, " entries"] | None = None,
    k: int = 10,
    k_bottom: int | None = None,
    temperature: float = 1.0,
    exclude: Sequence[int] | Int[Tensor, " e"] = (),
    transform: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    block_directions: int = 512,
    block_vocabulary: int = 8192,
    progress: Progress = SILENT,
) -> VocabularyRanking:
    """The words that directions point at, as if from ``softmax((directions @ vocabulary.T + bias) / temperature)``.

    Args:
        directions: of any floating type; the work is done on their device.
        vocabulary: one row for each word, of any floating type, on any device: it is moved block by block.
        bias: of each word.
        k: words with the largest logits to keep.
        k_bottom: words with the smallest; None for as many, 0 for none.
        temperature: divides the logits in the softmax; never changes an order.
        exclude: token ids that do not count (special tokens, rows that pad the vocabulary).
        transform: elementwise and increasing, applied to the logits (a soft cap).
        dtype: in which blocks are multiplied; None for float32 (float64 if the directions are). Sums and results are
            float32 at least, whatever it is.
        block_directions, block_vocabulary: size of a block; they change time and memory, never the result beyond
            rounding.
        progress: where directions done are shown.

    Returns:
        the ranking, on the directions' device.

    Raises:
        InvalidInput: widths that differ, k beyond the vocabulary, a temperature that is not positive, an excluded id
            that is no word, NaN in the vocabulary, or logits that overflow ``dtype``.

    Warns:
        SkippedDirections: directions hold NaN or infinite values.

    Example:
        >>> import torch
        >>> ranking = rank_vocabulary(torch.tensor([[0.0, 2.0]]), torch.eye(2), k=1)
        >>> ranking.tokens.tolist(), round(float(ranking.probs[0, 0]), 3)
        ([[1]], 0.881)
    """
    n = len(directions)
    device = directions.device
    k_bottom = k if k_bottom is None else k_bottom
    words = _words_that_count(len(vocabulary), exclude, device)
    size = len(vocabulary) if words is None else len(words)
    _check(directions, vocabulary, bias, k, k_bottom, temperature, size, block_directions, block_vocabulary)
    sums = torch.promote_types(directions.dtype, torch.float32)
    dtype = dtype or sums

    bad = ~directions.isfinite().all(1)
    if bool(bad.any()):
        places = bad.nonzero().flatten()
        shown = ", ".join(map(str, places[:5].tolist()))
        warnings.warn(
            f"{len(places)} of {n} directions hold NaN or infinite values (rows {shown}{', ...' * (len(places) > 5)}): "
            "they have no words",
            SkippedDirections,
            stacklevel=2,
        )
    tokens = torch.full((n, k), -1, device=device)
    logits = torch.full((n, k), math.nan, dtype=sums, device=device)
    bottom_tokens = torch.full((n, k_bottom), -1, device=device)
    bottom_logits = torch.full((n, k_bottom), math.nan, dtype=sums, device=device)
    logsumexp, entropy = (torch.full((n,), math.nan, dtype=sums, device=device) for _ in range(2))

    good = (~bad).nonzero().flatten()
    with progress.task("words", len(good)) as task:
        for rows in good.split(block_directions):
            block = directions[rows].to(dtype)
            top, bottom, softmax = _Extremes(k), _Extremes(k_bottom, largest=False), _OnlineSoftmax()
            for start in range(0, size, block_vocabulary):
                stop = min(start + block_vocabulary, size)
                index = slice(start, stop) if words is None else words[start:stop].to(vocabulary.device)
                x = (block @ vocabulary[index].to(device, dtype).T).to(sums)
                if bias is not None:
                    x += bias[index].to(x)
                if transform is not None:
                    x = transform(x)
                top.update(x, start)
                bottom.update(x, start)
                softmax.update(x.div_(temperature))  # changes x: comes last
            tokens[rows], logits[rows] = top.index, top.values
            bottom_tokens[rows], bottom_logits[rows] = bottom.index, bottom.values
            logsumexp[rows], entropy[rows] = softmax.logsumexp, softmax.entropy
            task.advance(len(rows))
    overflowed = ~(logits.isfinite().all(1) & logsumexp.isfinite()) & ~bad
    if bool(overflowed.any()):
        row = int(overflowed.nonzero()[0])
        raise InvalidInput(
            f"the logits of direction {row} are not finite: either the vocabulary holds NaN or infinite values (token "
            f"{_first_bad(vocabulary)}), or they overflow {dtype}; pass dtype=torch.float32"
        )
    if words is not None:
        tokens = torch.where(tokens < 0, tokens, words[tokens])
        bottom_tokens = torch.where(bottom_tokens < 0, bottom_tokens, words[bottom_tokens])
    return VocabularyRanking(tokens, logits, bottom_tokens, bottom_logits, logsumexp, entropy, temperature)


def exact_topk(
    x: Float[Tensor, "n V"], k: int, largest: bool = True
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """``torch.topk`` with a definite order: of equal values the first column wins.

    Columns are dealt out to chunks; only the k chunks with the best maxima can hold one of the k best.

    Args:
        x: finite values.
        k: how many, at most the number of columns.
        largest: False for the smallest.
    """
    n, size = x.shape
    chunks = size // CHUNK
    if chunks < 4 * k or k == 0:
        return _topk(x, k, largest)
    body = x[:, : chunks * CHUNK].unflatten(1, (CHUNK, chunks))
    best, chosen = (body.amax(1) if largest else body.amin(1)).topk(k + 1, largest=largest)
    values = body.gather(2, chosen[:, None, :k].expand(-1, CHUNK, -1)).flatten(1)
    columns = (torch.arange(CHUNK, device=x.device)[:, None] * chunks + chosen[:, None, :k]).flatten(1)
    if size > chunks * CHUNK:
        values = torch.cat([values, x[:, chunks * CHUNK :]], 1)
        columns = torch.cat([columns, torch.arange(chunks * CHUNK, size, device=x.device).expand(n, -1)], 1)
    columns, order = columns.sort(1)  # so that of equal values the first column stands first
    top, place = _topk(values.gather(1, order), k, largest)
    index = columns.gather(1, place)
    tied = (best[:, k - 1] == best[:, k]).nonzero().flatten()  # a chunk left out holds an equal of one that is in
    if len(tied):
        top[tied], index[tied] = _topk(x[tied], k, largest)
    return top, index


def _topk(x: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """``torch.topk``, of equal values the first columns: it does not say which of them it takes."""
    size = x.shape[1]
    values, index = x.topk(min(k + 1, size), dim=1, largest=largest)
    if k < size:  # a value that is there once more beyond the k: rows that have to be sorted whole
        torn = (values[:, k - 1] == values[:, k]).nonzero().flatten() if k else index[:0, 0]
        values, index = values[:, :k], index[:, :k]
        if len(torn):
            whole = x[torn].sort(dim=1, descending=largest, stable=True)
            values[torn], index[torn] = whole.values[:, :k], whole.indices[:, :k]
    index, order = index.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=largest, stable=True)
    return values, index.gather(1, order)


class _Extremes:
    """The k largest (or smallest) of a row that comes in pieces from left to right."""

    def __init__(self, k: int, largest: bool = True) -> None:
        self.k, self.largest = k, largest
        self.values = self.index = torch.empty(0)

    def update(self, x: Tensor, start: int) -> None:
        values, index = exact_topk(x, min(self.k, x.shape[1]), self.largest)
        index = index + start
        if len(self.values):
            values, index = torch.cat([self.values, values], 1), torch.cat([self.index, index], 1)
            values, order = values.sort(dim=1, descending=self.largest, stable=True)  # earlier columns stand first
            values, index = values[:, : self.k], index.gather(1, order[:, : self.k])
        self.values, self.index = values, index


class _OnlineSoftmax:
    """Log-sum-exp and entropy of a row that comes in pieces: sums are kept relative to the largest value so far."""

    def __init__(self) -> None:
        self.top = self.total = self.weighted = torch.empty(0)

    def update(self, x: Tensor) -> None:
        """Takes the next columns; ``x`` is changed in place."""
        top = x.amax(1)
        if len(self.top):
            top = torch.maximum(top, self.top)
        x.sub_(top[:, None])
        weights = x.exp()
        total, weighted = weights.sum(1), x.mul_(weights).sum(1)
        if len(self.top):
            shift = self.top - top
            scale = shift.exp()
            weighted += scale * (self.weighted + shift * self.total)
            total += scale * self.total
        self.top, self.total, self.weighted = top, total, weighted

    @property
    def logsumexp(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def entropy(self) -> Tensor:
        return (self.total.log() - self.weighted / self.total).clamp_min(0)


def _words_that_count(size: int, exclude: Sequence[int] | Tensor, device: torch.device) -> Tensor | None:
    """The token ids that are left; None for all of them."""
    out = torch.as_tensor(exclude, dtype=torch.long, device=device).flatten()
    if not len(out):
        return None
    wrong = out[(out < 0) | (out >= size)]
    if len(wrong):
        raise InvalidInput(f"exclude holds {int(wrong[0])}: the vocabulary has {size} words (0 to {size - 1})")
    counts = torch.ones(size, dtype=torch.bool, device=device)
    counts[out] = False
    return counts.nonzero().flatten()


def _check(
    directions: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, k_bottom: int, temperature: float, size: int,
    *blocks: int,
) -> None:  # fmt: skip
    if directions.shape[1] != vocabulary.shape[1]:
        raise InvalidInput(
            f"the directions have {directions.shape[1]} features, the words "
            f"{vocabulary.shape[1]}: both are [_, d_model]"
        )
    if bias is not None and len(bias) != len(vocabulary):
        raise InvalidInput(f"bias has {len(bias)} entries for {len(vocabulary)} words")
    if not 1 <= k <= size or not 0 <= k_bottom <= size:
        raise InvalidInput(
            f"k={k}, k_bottom={k_bottom}: {size} words count, so 1 to {size} (0 for k_bottom) can be kept"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidInput(f"temperature={temperature}: expected a positive number")
    if min(blocks) < 1:
        raise InvalidInput(f"block_directions={blocks[0]}, block_vocabulary={blocks[1]}: must be at least 1")
    for name, tensor in {"directions": directions, "vocabulary": vocabulary}.items():
        if tensor.is_meta:
            raise InvalidInput(f"{name} have no values (meta device): load the weights, or read them from their files")


def _first_bad(vocabulary: Tensor) -> int | str:
    for start in range(0, len(vocabulary), 8192):
        bad = (~vocabulary[start : start + 8192].isfinite().all(1)).nonzero()
        if len(bad):
            return start + int(bad[0])
    return "none"
