"""A card for a feature: how often it is active and how strongly, in which texts, which words it promotes.

    card = feature_card(model, sae.feature(17), token_batches(texts, tokenizer), tokenizer=tokenizer)
    card.plot()                                           # a figure
    Path("card.html").write_text(card.to_html())          # a page
    page = feature_page(feature_cards(model, features, batches, tokenizer=tokenizer), "Layer 5")

Any :class:`~broadsheet.nn.features.Feature` has a card: SAE latents, factors, codes and neurons alike. The texts are
read once, for all features together; what is kept does not grow with them.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.activations import Batch, read_sites
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import Feature
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress

Sources = Callable[[Feature, Tensor, int], Tensor]
DECILES = 10


@dataclass(frozen=True)
class Excerpt:
    """Some tokens around one at which a feature is active.

    Attributes:
        token_ids: of the excerpt.
        tokens: as text, spaces included; without a tokenizer the ids.
        values: the feature at each token.
        place: the token it is about.
        text: number of the text, counted over all batches.
        sources: what each token gave to the activation at ``place``, where asked for.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    place: int
    text: int
    sources: tuple[float, ...] | None = None

    @property
    def activation(self) -> float:
        return self.values[self.place]


@dataclass(frozen=True)
class Decile:
    """Examples from a tenth of the tokens at which a feature is active.

    Attributes:
        low, high: the least and largest activation in it, estimated from the sample.
        examples: drawn at random.
    """

    low: float
    high: float
    examples: tuple[Excerpt, ...]


@dataclass(frozen=True)
class FeatureCard:
    """What there is to see of one feature.

    Attributes:
        name, site: of the feature.
        tokens: how many were read.
        density: share of them at which the feature is active.
        maximum, mean: of the activation where it is active; 0 where it never is.
        counts, edges: histogram of the activations that are not zero, ``[bins]`` and ``[bins + 1]``.
        top: where it is most active, one excerpt for each text, the most active first.
        deciles: from the least active tenth to the most; empty for a feature that is never active.
        promoted, suppressed: words whose logits it raises and lowers directly, with the size (up to the final norm's
            scale); empty where the model's head does not allow to say.
        parts: what it is made of, such as heads, with shares.
        description: in words, where somebody or something gave one.
    """

    name: str
    site: str
    tokens: int
    density: float | int
    maximum: float | int
    mean: float | int
    counts: Int[np.ndarray, " bins"]
    edges: Float[np.ndarray, " bins_and_one"]
    top: tuple[Excerpt, ...]
    deciles: tuple[Decile, ...]
    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()
    parts: tuple[tuple[str, float], ...] = ()
    description: str = ""

    def with_parts(self, parts: Mapping[str, float]) -> "FeatureCard":
        """The card with shares of parts, such as heads, to show."""
        return replace(self, parts=tuple((name, float(value)) for name, value in parts.items()))

    def described(self, description: str) -> "FeatureCard":
        """The card with a description in words."""
        return replace(self, description=description)

    def to_frame(self) -> pd.DataFrame:
        """One row for each excerpt: ``kind`` ("top", or "decile 1" to 10), ``activation``, ``text``, ``excerpt``."""
        rows = [("top", e.activation, e.text, "".join(e.tokens)) for e in self.top]
        for i, decile in enumerate(self.deciles, 1):
            rows += [(f"decile {i}", e.activation, e.text, "".join(e.tokens)) for e in decile.examples]
        return pd.DataFrame(rows, columns=["kind", "activation", "text", "excerpt"])

    def to_html(self) -> str:
        """One page of its own, without any external request; see :func:`feature_page`."""
        from broadsheet.nn.card_page import feature_page

        return feature_page([self], self.name or self.site)

    def plot(self, figure: Any = None) -> Any:
        """Histogram, words and the most active texts as a figure.

        Args:
            figure: matplotlib ``Figure`` or ``SubFigure`` to draw in; None makes one.
        """
        from broadsheet.nn.card_page import draw_card

        return draw_card(self, figure)


def feature_card(
    model: nn.Module,
    feature: Feature,
    batches: Iterable[Batch],
    *,
    parts: Mapping[str, float] | None = None,
    description: str = "",
    **how: Any,
) -> FeatureCard:
    """The card of one feature.

    Args:
        model, batches: as in :func:`feature_cards`, whose other arguments may be given too.
        feature: from whatever method.
        parts: shares of parts to show, such as those of heads.
        description: in words.
    """
    card = feature_cards(model, [feature], batches, **how)[0].described(description)
    return card if parts is None else card.with_parts(parts)


@torch.no_grad()
def feature_cards(
    model: nn.Module,
    features: Sequence[Feature],
    batches: Iterable[Batch],
    *,
    tokenizer: Any = None,
    k: int = 10,
    per_decile: int = 3,
    window: int = 15,
    words: int = 10,
    bins: int = 80,
    threshold: float | int = 0.0,
    skip_first: bool = False,
    exclude_tokens: Sequence[int] = (),
    sources: Sources | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = SILENT,
) -> list[FeatureCard]:
    """Cards of several features, whose texts are read once for all of them.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        features: at one place or several.
        batches: ids ``[batch, time]``, or pairs of them and attention masks; padding on either side.
        tokenizer: turns ids into text; without one the ids are shown.
        k: texts with the largest activations.
        per_decile: examples drawn from each tenth of the active tokens.
        window: tokens shown on either side.
        words: promoted and suppressed words; 0 for none.
        bins: of the histogram, an even number.
        threshold: above it a feature counts as active.
        skip_first: leave out each text's first token.
        exclude_tokens: token ids to leave out (BOS, separators).
        sources: ``(feature, input_ids [1, time], position) -> [time]``, what every token gave to the activation at a
            position; asked for the excerpts that are shown, after the texts are read.
        generator: of the examples, on the CPU.
        progress: where texts read are shown.

    Raises:
        InvalidInput: no features, an empty iterable, a number out of range, or activations that are not finite.
    """
    limits = {"k": (k, 1), "per_decile": (per_decile, 0), "window": (window, 0), "words": (words, 0), "bins": (bins, 2)}
    for name, (value, least) in limits.items():
        if value < least:
            raise InvalidInput(f"{name}={value}: must be at least {least}")
    if bins % 2:
        raise InvalidInput(f"bins={bins}: expected an even number")
    if not features:
        raise InvalidInput("features is empty: hand in at least one Feature")
    the_map = block_map(model)
    sites = {feature.site: feature._site(the_map) for feature in features}
    seen = [_Seen(k, 30 * per_decile, bins, threshold, window) for _ in features]
    device = next(model.parameters()).device
    excluded = torch.tensor(list(exclude_tokens), dtype=torch.long, device=device)
    read = 0
    with evaluating(model), progress.task("feature cards") as task:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            if ids.ndim != 2:
                raise InvalidInput(f"a batch has shape {tuple(ids.shape)}: expected token ids [batch, time]")
            padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
            ids, mask = padded.input_ids, padded.attention_mask
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().clone()
            lengths = kept.sum(1).cpu()
            if skip_first:
                kept[:, 0] = False
            if len(excluded):
                kept &= ~torch.isin(ids, excluded)
            held = read_sites(model, sites.values(), ids, mask)
            keys = torch.rand(ids.shape, generator=generator)  # one for each token, so that cards do not depend on
            ids, kept = ids.cpu(), kept.cpu()  # which other features are read beside them
            for feature, one in zip(features, seen, strict=True):
                values = feature.read(held[feature.site]).float().cpu()
                if not bool(values[kept].isfinite().all()):
                    raise InvalidInput(
                        f"activations of {feature.name or feature.site} are not finite: load the model in bfloat16 or "
                        "float32"
                    )
                one.add(values, kept, keys, ids, lengths, read)
            read += len(ids)
            task.advance(len(ids))
    if read == 0:
        raise InvalidInput("batches is empty: hand in token ids [batch, time]")
    if seen[0].tokens == 0:
        raise InvalidInput("no token is left: everything in the batches is padding or excluded")
    return [
        _card(model, feature, one, tokenizer, words, per_decile, sources)
        for feature, one in zip(features, seen, strict=True)
    ]


@dataclass(order=True)
class _Spot:
    """One token and the text around it, in the order of ``rank``."""

    rank: tuple[float, int]
    ids: Tensor
    values: Tensor
    place: int
    text: int


class _Seen:
    """What is kept of one feature while texts go by."""

    def __init__(self, k: int, sample: int, bins: int, threshold: float, window: int) -> None:
        self.k, self.size, self.threshold, self.window = k, sample, threshold, window
        self.counts, self.reach = np.zeros(bins, dtype=np.int64), 0.0
        self.tokens = self.active = 0
        self.total, self.maximum = 0.0, 0.0
        self.top: list[_Spot] = []  # heaps, the one to go first at the front
        self.sample: list[_Spot] = []
        self.order = 0  # tells equal ranks apart

    def add(self, values: Tensor, kept: Tensor, keys: Tensor, ids: Tensor, lengths: Tensor, first: int) -> None:
        on = kept & (values > self.threshold)
        self.tokens += int(kept.sum())
        self.active += int(on.sum())
        self.total += float(values[on].double().sum())
        self._count(values[kept & (values != 0)].double().numpy())
        best, places = values.masked_fill(~on, -torch.inf).max(1)
        for row in on.any(1).nonzero().flatten().tolist():
            if len(self.top) < self.k or float(best[row]) > self.top[0].rank[0]:
                self._keep(self.top, self.k, float(best[row]), values, ids, lengths, row, int(places[row]), first)
        self.maximum = max(self.maximum, float(best.max()))
        rows, columns = on.nonzero(as_tuple=True)
        ranks = -keys[rows, columns]
        if len(self.sample) == self.size and self.size:
            new = (ranks > self.sample[0].rank[0]).nonzero().flatten()
        else:
            new = torch.arange(len(ranks)) if self.size else ranks[:0].long()
        if len(new) > self.size:  # of one batch, no more than could stay
            new = new[ranks[new].topk(self.size).indices]
        for i in new.tolist():
            place = int(columns[i])
            self._keep(self.sample, self.size, float(ranks[i]), values, ids, lengths, int(rows[i]), place, first)

    def _keep(
        self, heap: list[_Spot], size: int, rank: float, values: Tensor, ids: Tensor, lengths: Tensor, row: int,
        place: int, first: int,
    ) -> None:  # fmt: skip
        self.order += 1
        end = int(lengths[row])
        spot = _Spot((rank, -self.order), ids[row, :end].clone(), values[row, :end].clone(), place, first + row)
        if len(heap) < size:
            heapq.heappush(heap, spot)
        else:
            heapq.heappushpop(heap, spot)

    def _count(self, values: np.ndarray) -> None:
        """A histogram from -reach to reach; when a value lies beyond, bins join in pairs and the reach doubles."""
        if not len(values):
            return
        largest = float(np.abs(values).max())
        if self.reach == 0:
            self.reach = 2.0 ** math.floor(math.log2(largest) + 1)
        half = len(self.counts) // 2
        while largest >= self.reach:
            self.reach *= 2
            joined = np.zeros_like(self.counts)
            for i, count in enumerate(self.counts):
                joined[half + (i - half) // 2] += count
            self.counts = joined
        self.counts += np.histogram(values, len(self.counts), (-self.reach, self.reach))[0]


def _card(
    model: nn.Module, feature: Feature, seen: _Seen, tokenizer: Any, words: int, per_decile: int,
    sources: Sources | None,
) -> FeatureCard:  # fmt: skip
    device = next(model.parameters()).device

    def excerpt(spot: _Spot) -> Excerpt:
        first, last = max(0, spot.place - seen.window), min(len(spot.ids), spot.place + seen.window + 1)
        ids = spot.ids[first:last].tolist()
        given = None
        if sources is not None:
            shares = sources(feature, spot.ids[None].to(device), spot.place)
            given = tuple(shares[first:last].float().tolist())
        return Excerpt(
            tuple(ids), tuple(token_texts(ids, tokenizer)), tuple(spot.values[first:last].tolist()),
            spot.place - first, spot.text, given,
        )  # fmt: skip

    deciles = []
    drawn = sorted(seen.sample, key=lambda spot: float(spot.values[spot.place]))
    if drawn and per_decile:
        for i in range(DECILES):
            part = drawn[len(drawn) * i // DECILES : len(drawn) * (i + 1) // DECILES]
            if part:
                low, high = (float(spot.values[spot.place]) for spot in (part[0], part[-1]))
                chosen = sorted(part, key=lambda spot: spot.rank)[:per_decile]
                chosen.sort(key=lambda spot: -float(spot.values[spot.place]))
                deciles.append(Decile(low, high, tuple(excerpt(spot) for spot in chosen)))
    top = sorted(seen.top, key=lambda spot: spot.rank, reverse=True)
    filled = seen.counts.nonzero()[0]
    edges = np.linspace(-seen.reach, seen.reach, len(seen.counts) + 1)
    first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)
    promoted, suppressed = _words(model, feature, words, tokenizer)
    return FeatureCard(
        feature.name, feature.site, seen.tokens, seen.active / seen.tokens, seen.maximum,
        seen.total / seen.active if seen.active else 0.0, seen.counts[first:last], edges[first : last + 1],
        tuple(excerpt(spot) for spot in top), tuple(deciles), promoted, suppressed,
    )  # fmt: skip


def _words(model: nn.Module, feature: Feature, k: int, tokenizer: Any) -> tuple[Any, Any]:
    """Words that the feature raises and lowers; none where the head or the place does not allow it."""
    if k == 0:
        return (), ()
    try:
        effect = feature.logit_effect(model).float().cpu()
    except (UnsupportedModel, InvalidInput):
        return (), ()
    sides = []
    for sign in (1, -1):
        best = (sign * effect).topk(min(k, len(effect))).indices.tolist()
        names = [token_texts([i], tokenizer)[0] for i in best]
        sides.append(tuple((name, float(effect[i])) for name, i in zip(names, best, strict=True)))
    return sides[0], sides[1]


def token_texts(ids: Sequence[int], tokenizer: Any = None) -> list[str]:
    """Every token as text, such that they stand for the whole when put together, spaces included.

    Args:
        ids: token ids of one text.
        tokenizer: a Hugging Face tokenizer; None gives the ids, with a space before each.

    Example:
        >>> token_texts([5, 17])
        [' 5', ' 17']
    """
    ids = [int(i) for i in ids]
    if tokenizer is None:
        return [f" {i}" for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    singles = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    texts = []
    for i, (piece, single) in enumerate(zip(pieces, singles, strict=True)):
        if piece is None:  # an id that the tokenizer does not know
            texts.append(f"⟨{ids[i]}⟩")
        elif str(piece).startswith("▁") and not single.startswith(" "):  # SentencePiece drops a text's first space
            texts.append(f" {single}")
        elif i and str(piece) == single and _spaced(tokenizer, ids[i - 1], ids[i], singles[i - 1] + single):
            texts.append(f" {single}")  # a tokenizer of whole words
        else:
            texts.append(single)
    return texts


def _spaced(tokenizer: Any, before: int, after: int, joined: str) -> bool:
    """Whether decoding puts a space between two tokens that have none of their own."""
    together = tokenizer.decode([before, after], clean_up_tokenization_spaces=False)
    return together != joined and together.replace(" ", "") == joined.replace(" ", "")


def feature_page(cards: Sequence[FeatureCard], title: str = "Features") -> str:
    """Cards one below the other as one HTML document; see :func:`broadsheet.nn.card_page.feature_page`."""
    from broadsheet.nn.card_page import feature_page as page

    return page(cards, title)
