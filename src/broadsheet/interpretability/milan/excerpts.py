"""Exemplars of features of language models, so that a describer can name them like units of a vision network.

What takes the place of a picture is an excerpt of text; its vector is the mean of its tokens' vectors, weighted by how
active the feature is at each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.encoders import VectorExemplars
from broadsheet.nn.features import Feature
from broadsheet.nn.hooks import capture, evaluating
from broadsheet.nn.progress import SILENT, Progress


def text_exemplars(
    model: nn.Module,
    features: Sequence[Feature],
    batches: Iterable[Any],
    k: int = 15,
    *,
    window: int = 15,
    tokens: Tensor | str | None = None,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> VectorExemplars:
    """The excerpts in which each feature is most active, as vectors.

    Args:
        model: a Hugging Face language model, or any module with a registered block map.
        features: SAE latents, SNMF factors, codes, neurons: any :class:`~broadsheet.nn.features.Feature`.
        batches: ids ``[batch, time]``, or pairs of them and attention masks; gone through once for each feature.
        k: excerpts of each.
        window: tokens shown on either side of the most active one.
        tokens: what a token's vector is: None for the model's input embedding, a component's name (such as
            ``"layers.1.resid_post"``) for its vector there within the excerpt, or a table ``[vocab, d]``.
        tokenizer: writes the excerpts out, for people.
        progress: where features done are shown.

    Returns:
        ``vectors [features, k, d]`` for :meth:`Describer.fit` and :meth:`Describer.describe`; a feature that is active
        nowhere is marked as one that cannot be described.

    Raises:
        InvalidInput: no features, fewer texts than ``k``, or batches that can be gone through only once.
    """
    if not len(features):
        raise InvalidInput("features is empty: hand in at least one")
    held = list(batches)
    reader = _reader(model, tokens)
    rows, names, alive, excerpts = [], [], [], []
    with progress.task("excerpts of features", total=len(features)) as task:
        for number, feature in enumerate(features):
            found = feature.top_examples(model, held, k, window)
            if len(found.token_ids) < k:
                raise InvalidInput(f"k={k}: the batches hold {len(found.token_ids)} texts")
            vectors = []
            for ids, values in zip(found.token_ids, found.values, strict=True):
                weight = torch.tensor(values, dtype=torch.float32).clamp_min(0)
                vectors.append(weight @ reader(ids) / weight.sum().clamp_min(torch.finfo(torch.float32).tiny))
            rows.append(torch.stack(vectors))
            names.append(feature.name or f"{feature.site}, feature {number}")
            alive.append(float(found.activation[0]) > 0)
            write = tokenizer.decode if tokenizer is not None else lambda ids: " ".join(map(str, ids))
            shown = [write(ids) for ids in found.token_ids]
            excerpts.append(tuple(shown))
            task.advance()
    return VectorExemplars(torch.stack(rows), tuple(names), None, torch.tensor(alive), tuple(excerpts))


def _reader(model: nn.Module, tokens: Tensor | str | None) -> Any:
    """From token ids to their vectors, ``[tokens, d]`` on the CPU."""
    device = next(model.parameters()).device
    if isinstance(tokens, str):
        from broadsheet.nn.blocks import block_map

        place = tokens
        site = block_map(model).resolve(place)

        @torch.no_grad()
        def read(ids: Sequence[int]) -> Tensor:
            with evaluating(model), capture(model, site) as seen:
                model(torch.tensor([list(ids)], device=device))
            return next(iter(seen.values()))[0].float().cpu()

        return read
    if tokens is None:
        if not hasattr(model, "get_input_embeddings"):
            raise InvalidInput(
                f"{type(model).__name__} has no get_input_embeddings(): hand in tokens=, a table or a component"
            )
        tokens = model.get_input_embeddings().weight  # type: ignore[operator]  # as every Hugging Face model has
    assert isinstance(tokens, Tensor)
    table = tokens.detach().float().cpu()
    return lambda ids: table[list(ids)]
