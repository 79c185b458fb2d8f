"""The concepts in one MLP layer of the user's model: activations of her texts, factors, and what each is about."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.snmf.estimator import SemiNMF
from broadsheet.nn.activations import Activations, collect_activations, token_batches
from broadsheet.nn.blocks import block_map
from broadsheet.nn.features import Examples, Feature, mapped, site_width
from broadsheet.nn.progress import SILENT, Progress

Texts = Iterable[str] | Iterable[Sequence[int]] | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Concepts:
    """A fitted factorisation with the tokens that it was fitted on.

    Attributes:
        snmf: the fitted estimator.
        site: the place in the model, such as ``"layers.3.mlp.act"``.
        activations: ``values [n, d]`` and for each row its token, text and position.
        texts: the token ids of every text, ``[time]`` each, of their own lengths.
    """

    snmf: SemiNMF
    site: str
    activations: Activations
    texts: tuple[Tensor, ...]

    @property
    def coefficients(self) -> Tensor:
        """``[n, K]``, one row for each token."""
        return torch.as_tensor(self.snmf.coefficients_)

    def __len__(self) -> int:
        return len(self.snmf.features_)

    def feature(self, k: int) -> Feature:
        """One factor for every other method.

        Args:
            k: which.
        """
        return self.snmf.feature(k, self.site)

    def top_contexts(self, k: int, n: int = 25, window: int = 15) -> Examples:
        """The tokens that hold most of a factor, with the text around them.

        Args:
            k: which factor.
            n: tokens; several may stand in one text.
            window: tokens shown on either side.
        """
        self.feature(k)
        if n < 1 or window < 0:
            raise InvalidInput(f"n={n}, window={window}: expected at least 1 and 0")
        column = self.coefficients[:, k].float().cpu()
        best = column.topk(min(n, len(column)))
        text, position = self.activations.text.cpu(), self.activations.position.cpu()
        found = []
        for row in best.indices.tolist():
            here, place = int(text[row]), int(position[row])
            ids = self.texts[here]
            first, last = max(0, place - window), min(len(ids), place + window + 1)
            values = torch.zeros(len(ids))
            rows = (text == here).nonzero().flatten()
            values[position[rows]] = column[rows]
            found.append((here, tuple(ids[first:last].tolist()), tuple(values[first:last].tolist()), place - first))
        return Examples(best.values, *(tuple(part) for part in zip(*found, strict=True)))

    def vocab_projection(
        self, model: nn.Module, k: int, top: int = 50, sign: int = 1, tokenizer: Any = None
    ) -> pd.DataFrame:
        """The tokens whose logits a factor raises (``sign=1``) or lowers (``sign=-1``) most, by its direct path.

        Args:
            model: with a head of one matrix.
            k: which factor.
            top: tokens.
            sign: 1 or -1.
            tokenizer: turns ids into text.
        """
        if sign not in (1, -1):
            raise InvalidInput(f"sign={sign}: expected 1 (promoted) or -1 (suppressed)")
        table = self.feature(k).promoted(model, top, tokenizer)
        wanted = "promoted" if sign == 1 else "suppressed"
        return table.loc[table["sign"] == wanted].reset_index(drop=True)


def mlp_site(model: nn.Module, layer: int) -> str:
    """The name of a layer's MLP activations, the input of its down projection.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        layer: counted from 0.

    Raises:
        InvalidInput: no such layer.
    """
    site = f"layers.{layer}.mlp.act"
    if layer < 0:
        raise InvalidInput(f"layer={layer}: expected 0 or above")
    mapped(model).resolve(site)
    return site


def collect_mlp_activations(
    model: nn.Module,
    texts: Texts,
    layer: int,
    tokenizer: Any = None,
    *,
    batch_size: int = 16,
    max_length: int = 128,
    skip_first: bool = True,
    exclude_tokens: Sequence[int] = (),
    path: str | Path | None = None,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Activations, tuple[Tensor, ...]]:
    """What enters an MLP's down projection at every token: after the activation function, times the gate if any.

    Args:
        model: a Hugging Face decoder or encoder, or any module with a registered block map.
        texts: strings or lists of ids, or batches: ids ``[batch, time]``, or pairs of them and attention masks.
        layer: counted from 0.
        tokenizer: for strings.
        batch_size, max_length: of the batches that are made of strings and lists.
        skip_first: leave out each text's first token: BOS, or the token whose activations stand for it.
        exclude_tokens: further token ids to leave out.
        path, max_tokens: write to a file, as in :func:`broadsheet.nn.activations.collect_activations`.
        progress: where texts read are shown.

    Returns:
        float32 rows with token, text and position, padding left out; and the token ids of every text.
    """
    site = mlp_site(model, layer)
    kept: list[Tensor] = []

    def watched() -> Iterable[Any]:
        for ids, mask in as_batches(texts, tokenizer, batch_size, max_length):
            for row, real in zip(ids, [None] * len(ids) if mask is None else mask, strict=True):
                kept.append((row if real is None else row[real.bool()]).cpu())
            yield ids, mask

    rows = collect_activations(
        model, site, watched(), path=path, max_tokens=max_tokens, skip_first=skip_first,
        exclude_tokens=exclude_tokens, progress=progress,
    )  # fmt: skip
    return rows, tuple(kept)


def find_concepts(
    model: nn.Module,
    texts: Texts | Activations | Tensor,
    layer: int,
    tokenizer: Any = None,
    *,
    snmf: SemiNMF | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = SILENT,
    **how: Any,
) -> Concepts:
    """Factorise one MLP layer's activations on some texts.

    Args:
        model: a Hugging Face decoder or encoder, or any module with a registered block map.
        texts: as in :func:`collect_mlp_activations`; or activations of this layer that were collected before (in a
            mere matrix ``[n, d]``, tokens are -1).
        layer: counted from 0.
        tokenizer: for strings.
        snmf: with the wanted settings; it is fitted in place. None for the defaults.
        checkpoint: folder of the factorisation.
        progress: where texts and iterations are shown.
        **how: handed to :func:`collect_mlp_activations`.

    Raises:
        InvalidInput: a layer out of range, activations of another width, or what :meth:`SemiNMF.fit` refuses.
    """
    site = mlp_site(model, layer)
    width = site_width(model, site)
    if isinstance(texts, Tensor) and texts.is_floating_point():
        unknown = torch.full((len(texts),), -1)
        texts = Activations(texts, unknown, torch.zeros_like(unknown), torch.arange(len(texts)))
    if isinstance(texts, Activations):
        shape = tuple(texts.values.shape)
        if shape[1] != width:
            turned = "; it looks transposed: one row for each token is expected" if shape[0] == width else ""
            raise InvalidInput(f"the activations have shape {shape}, {site!r} is {width} wide{turned}")
        rows, kept = texts, _texts_of(texts)
    else:
        rows, kept = collect_mlp_activations(model, texts, layer, tokenizer, progress=progress, **how)
    estimator = SemiNMF() if snmf is None else snmf
    estimator.fit(rows.values, checkpoint=checkpoint, progress=progress)
    return Concepts(estimator, site, rows, kept)


def _texts_of(rows: Activations) -> tuple[Tensor, ...]:
    """The texts as far as the rows tell: -1 stands for tokens that were left out."""
    text, position, tokens = rows.text.cpu(), rows.position.cpu(), rows.token_ids.cpu()
    found = []
    for number in range(int(text.max()) + 1):
        here = text == number
        ids = torch.full((int(position[here].max()) + 1 if bool(here.any()) else 0,), -1)
        ids[position[here]] = tokens[here]
        found.append(ids)
    return tuple(found)


def written_to_residual(model: nn.Module, feature: Feature) -> Feature:
    """What a feature of MLP activations adds to the residual stream, as a feature there.

    Where the MLP's output has a norm of its own (Gemma 2 and 3) the factor goes through output matrix, bias and that
    norm; steering then adds the result behind the norm, as the paper does for Gemma.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        feature: at ``"layers.*.mlp.act"``.
    """
    the_map = block_map(model)
    block = the_map.blocks[feature.layer]
    if not feature.site.endswith(".mlp.act") or block.mlp is None:
        raise InvalidInput(f"site={feature.site!r}: expected a feature of MLP activations ('layers.*.mlp.act')")
    if block.scheme == "post":
        raise InvalidInput("this model normalises the residual stream after the MLP: steer at the MLP's own site")
    if block.out_norm2 is None:
        write = feature.in_residual(the_map)
    else:
        with torch.no_grad():
            write = block.out_norm2(block.mlp.w_out(feature.write.to(block.mlp.w_out.weight)))
    return Feature(f"layers.{feature.layer}.resid_post", write.detach(), name=feature.name)


def as_batches(
    texts: Any, tokenizer: Any = None, batch_size: int = 16, max_length: int = 128
) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Whatever form texts come in, as pairs of ids and mask.

    Args:
        texts: strings, lists of ids, id tensors ``[batch, time]``, or pairs of them and masks; a single batch will do.
        tokenizer: for strings.
        batch_size, max_length: of the batches that are made of strings and lists.
    """
    if isinstance(texts, str):
        raise InvalidInput("texts is one string: hand in a list of them")
    if isinstance(texts, Tensor):
        yield texts, None
        return
    if hasattr(texts, "keys") and "input_ids" in texts:  # what a tokenizer gives
        yield texts["input_ids"], texts.get("attention_mask")
        return
    rest = iter(texts)
    first = next(rest, None)
    if first is None:
        raise InvalidInput("texts is empty")

    def again() -> Iterable[Any]:
        yield first
        yield from rest

    if isinstance(first, Tensor) and first.ndim == 2:
        for ids in again():
            yield (ids, None) if isinstance(ids, Tensor) else ids
    elif isinstance(first, tuple) and isinstance(first[0], Tensor):
        yield from again()
    else:
        yield from token_batches(again(), tokenizer, batch_size=batch_size, max_length=max_length)
