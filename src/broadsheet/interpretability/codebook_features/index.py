"""Which codes a lot of text turns into: one pass over the model, then questions are answered without it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.codebook_features.model import CodebookModel, latest_codes
from broadsheet.interpretability.codebook_features.search import (
    CodeMatches,
    LabelScores,
    code_label_scores,
    find_codes,
    pattern_mask,
)
from broadsheet.nn.cards import token_texts
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.quantization import CodeUsage


@torch.no_grad()
def codes(cb: CodebookModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Int[Tensor, "..."]]:
    """Every codebook's codes at every token.

    Args:
        cb: of ``wrap_codebooks``.
        input_ids: ``[batch, time]``; for a module that is no language model, whatever it takes.
        attention_mask: ``[batch, time]``; padding on either side.

    Returns:
        codebook -> int32 ``[batch, time, k]``, the most similar first; -1 at padding.

    Raises:
        InvalidInput: ``snap`` is False.
    """
    if not cb.snap:
        raise InvalidInput("snap is False: the model has no codes; set snap=True")
    padded = right_padded(input_ids, attention_mask)
    with evaluating(cb):
        cb.run((padded.input_ids, padded.attention_mask))
        found = latest_codes(cb)
    if padded.attention_mask is None:
        return {site: ids.int() for site, ids in found.items()}
    real = padded.attention_mask.bool().to(next(iter(found.values())).device)
    return {site: padded.restore(ids.int().masked_fill(~real[..., None], -1)) for site, ids in found.items()}


def index_codes(
    cb: CodebookModel, batches: Iterable[Any], tokenizer: Any = None, *, progress: Progress = SILENT
) -> "CodeIndex":
    """Read texts once and keep the codes of every token.

    Args:
        cb: of ``wrap_codebooks``.
        batches: ids ``[batch, time]``, or pairs of them and attention masks, such as ``token_batches`` gives.
        tokenizer: of the model; regular expressions and readable contexts need it.
        progress: where texts read are shown.

    Raises:
        InvalidInput: no token at all.
    """
    kept: dict[str, list[Tensor]] = {site: [] for site in cb.sites}
    about: list[tuple[Tensor, Tensor, Tensor]] = []
    texts = 0
    sizes = {site: cb.quantizer(cb.where(site)[0].name).num_codes for site in cb.sites}
    with progress.task("codes of texts") as task:
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
            padded = right_padded(ids, mask)
            found = codes(cb, padded.input_ids, padded.attention_mask)
            real = torch.ones_like(padded.input_ids) if padded.attention_mask is None else padded.attention_mask
            rows, columns = real.cpu().nonzero(as_tuple=True)
            for site, of_site in found.items():
                small = torch.int16 if sizes[site] <= 2**15 else torch.int32
                kept[site].append(of_site.cpu()[rows, columns].to(small))
            about.append((padded.input_ids.cpu()[rows, columns], rows + texts, columns))
            texts += len(ids)
            task.advance(len(ids))
    if not about:
        raise InvalidInput("batches is empty: hand in token ids [batch, time]")
    token_ids, text, position = (torch.cat(column) for column in zip(*about, strict=True))
    whole = {site: torch.cat(parts) for site, parts in kept.items() if parts}
    return CodeIndex(whole, sizes, token_ids, text, position, tokenizer)


@dataclass(frozen=True)
class CodeIndex:
    """The codes of texts.

    Attributes:
        codes: codebook -> ids ``[tokens, k]``, as small integers.
        num_codes: codebook -> its size.
        token_ids, text, position: ``[tokens]``: what each token is, in which text and where in it.
        tokenizer: None where there was none.
    """

    codes: dict[str, Tensor]
    num_codes: dict[str, int]
    token_ids: Int[Tensor, " tokens"]
    text: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    tokenizer: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.codes)

    def of(self, site: str, code: int | None = None) -> Tensor:
        """The ids of one codebook, ``[tokens, k]``.

        Args:
            site: its name.
            code: checked to be one of its codes.
        """
        if site not in self.codes:
            raise InvalidInput(f"no codebook {site!r}: this index has {', '.join(self.sites[:8])}")
        if code is not None and not 0 <= code < self.num_codes[site]:
            n = self.num_codes[site]
            raise InvalidInput(f"code {code}: the codebook at {site!r} has {n} (0 to {n - 1})")
        return self.codes[site].long()

    def counts(self, site: str) -> Int[Tensor, " codes"]:
        """At how many tokens each code of a codebook is chosen."""
        return self.of(site).flatten().bincount(minlength=self.num_codes[site])

    def usage(self) -> pd.DataFrame:
        """One row for each codebook: active and dead codes, entropy (nats) and perplexity of their use."""
        rows = []
        for site in self.sites:
            use = CodeUsage(self.counts(site)[None])
            rows.append(
                (site, self.num_codes[site], int(use.active), float(use.dead_fraction), float(use.entropy),
                 float(use.perplexity))
            )  # fmt: skip
        return pd.DataFrame(rows, columns=["site", "codes", "active", "dead fraction", "entropy", "perplexity"])

    def token_counts(self, site: str, code: int, n: int = 10) -> pd.DataFrame:
        """The tokens at which a code is chosen most often.

        Args:
            site, code: which.
            n: tokens.

        Returns:
            columns ``token_id``, ``count``, ``share`` (of the code's own uses) and, with a tokenizer, ``token``.
        """
        at = (self.of(site, code) == code).any(-1)
        ids, counts = self.token_ids[at].unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:n]
        table = pd.DataFrame({"token_id": ids[order].tolist(), "count": counts[order].tolist()})
        table["share"] = table["count"] / max(1, int(at.sum()))
        if self.tokenizer is not None:
            table["token"] = [self.tokenizer.decode([i]) for i in table["token_id"]]
        return table

    def top_contexts(self, site: str, code: int, n: int = 10, window: int = 10) -> pd.DataFrame:
        """Texts in which a code is chosen most often, around the place of its first use.

        Args:
            site, code: which.
            n: texts.
            window: tokens shown on either side.

        Returns:
            columns ``text``, ``position``, ``uses`` (in that text), ``before``, ``token``, ``after``.
        """
        at = (self.of(site, code) == code).any(-1)
        texts, uses = self.text[at].unique(return_counts=True)
        order = uses.argsort(descending=True, stable=True)[:n]
        rows = []
        for text, count in zip(texts[order].tolist(), uses[order].tolist(), strict=True):
            mine = (self.text == text).nonzero().flatten()
            place = int(at[mine].nonzero()[0])
            first, last = max(0, place - window), min(len(mine), place + window + 1)
            shown = token_texts(self.token_ids[mine[first:last]].tolist(), self.tokenizer)
            middle = place - first
            rows.append(
                (text, int(self.position[mine[place]]), count, "".join(shown[:middle]), shown[middle],
                 "".join(shown[middle + 1 :]))
            )  # fmt: skip
        return pd.DataFrame(rows, columns=["text", "position", "uses", "before", "token", "after"])

    def matches(self, pattern: Any, where: str = "overlap") -> Tensor:
        """The tokens that a pattern means, ``[tokens]``; arguments as in :meth:`search_codes`."""
        return pattern_mask(self.token_ids, self.text, pattern, self.tokenizer, where)

    def search_codes(
        self,
        pattern: str | re.Pattern[str] | Iterable[int] | Tensor,
        *,
        min_precision: float | int = 0.5,
        min_recall: float | int = 0.01,
        sites: Iterable[str] | None = None,
        where: str = "overlap",
    ) -> CodeMatches:
        """The codes that are chosen where a pattern stands, and hardly anywhere else.

        Args:
            pattern: a regular expression on the text, a set of token ids, or a boolean tensor ``[tokens]``.
            min_precision: least share of a code's uses that lie in the pattern.
            min_recall: share of the pattern's tokens that a code has to exceed.
            sites: codebooks; None for all.
            where: for a regular expression: ``"overlap"`` with a match, or its ``"end"`` (the last token only).

        Raises:
            InvalidInput: a pattern that matches nothing, or a regular expression without a tokenizer.
        """
        mask = self.matches(pattern, where)
        chosen = {site: self.of(site) for site in (self.sites if sites is None else sites)}
        return find_codes(chosen, self.num_codes, mask, min_precision, min_recall)

    def label_scores(self, labels: Int[Tensor, " tokens"], sites: Iterable[str] | None = None) -> LabelScores:
        """For every label the code that finds its tokens best (F1).

        Args:
            labels: of every token; those below 0 count as no label, and a code's uses there against it.
            sites: codebooks; None for all.
        """
        chosen = {site: self.of(site) for site in (self.sites if sites is None else sites)}
        return code_label_scores(chosen, self.num_codes, labels)

    def code_purity(self, labels: Int[Tensor, " tokens"], sites: Iterable[str] | None = None) -> pd.DataFrame:
        """How many codes stand for one label only (one state, one word).

        Args:
            labels: of every token; tokens below 0 are left out.
            sites: codebooks; None for all.

        Returns:
            one row for each codebook: ``used`` codes, ``pure`` (share of them that are chosen at one label only) and
            ``majority`` (share of all uses that are at their code's most frequent label).
        """
        rows = []
        for site in self.sites if sites is None else sites:
            ids, kept = self.of(site), labels >= 0
            if not bool(kept.any()):
                raise InvalidInput("no token has a label of 0 or more")
            k = ids.shape[1]
            pairs = torch.stack([ids[kept].flatten(), labels[kept].repeat_interleave(k)], 1)
            pairs, counts = pairs.unique(dim=0, return_counts=True)
            codes_seen, labels_each = pairs[:, 0].unique(return_counts=True)
            largest = torch.zeros(self.num_codes[site], dtype=torch.long)
            largest.scatter_reduce_(0, pairs[:, 0], counts, "amax")
            rows.append(
                (site, len(codes_seen), float((labels_each == 1).double().mean()), float(largest.sum() / counts.sum()))
            )
        return pd.DataFrame(rows, columns=["site", "used", "pure", "majority"])

    def partition_inputs(self, site: str, kept: Tensor | None = None) -> dict[int, Int[Tensor, " members"]]:
        """Which tokens share a code.

        Args:
            site: the codebook.
            kept: boolean ``[tokens]``, tokens that count; None for all.

        Returns:
            code -> numbers of tokens of this index, for the codes in use. With k > 1 a token is in several parts.
        """
        ids = self.of(site)
        rows = torch.arange(len(ids)) if kept is None else kept.nonzero().flatten()
        flat, owner = ids[rows].flatten(), rows.repeat_interleave(ids.shape[1])
        order = flat.argsort(stable=True)
        found, counts = flat[order].unique_consecutive(return_counts=True)
        return dict(zip(found.tolist(), owner[order].split(counts.tolist()), strict=True))

    def save(self, folder: str | Path) -> None:
        """Write the index (safetensors and JSON); the tokenizer is not kept."""
        tree = {"codes": self.codes, "token_ids": self.token_ids, "text": self.text, "position": self.position}
        save_tree(Path(folder), tree, num_codes=self.num_codes)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None) -> "CodeIndex":
        """Read what :meth:`save` wrote.

        Args:
            folder: of the index.
            tokenizer: of the model.

        Raises:
            CheckpointError: no index there, or a broken one.
        """
        tree, about = load_tree(Path(folder))
        sizes: Mapping[str, int] = about["num_codes"]
        return cls(tree["codes"], dict(sizes), tree["token_ids"], tree["text"], tree["position"], tokenizer)
