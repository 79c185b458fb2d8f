"""Choosing among a beam's sentences by how well they fit the pictures in CLIP's eyes (the authors' later addition)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.descriptions import Descriptions
from broadsheet.interpretability.milan.exemplars import Exemplars
from broadsheet.nn.hooks import evaluating

Similarity = Callable[[Tensor, Sequence[str]], Tensor]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def rerank_with_clip(
    descriptions: Descriptions, exemplars: Exemplars, similarity: Similarity, lam: float | int = 0.5
) -> Descriptions:
    """Choose each unit's sentence by ``(1 - lam) * fit to the active regions + lam * fit to the whole pictures``.

    The regions are the pictures with everything outside the mask turned grey. (The official code hides patches from
    CLIP's class token instead, which ties it to one architecture.)

    Args:
        descriptions: from a wide beam; the authors use 1000 sentences.
        exemplars: of the same units.
        similarity: ``(pictures [n, 3, h, w] in 0..1, texts) -> [n, texts]``; see :func:`clip_similarity`.
        lam: weight of the whole pictures, from 0 to 1.

    Raises:
        InvalidInput: other units, or ``lam`` out of range.
    """
    if not 0 <= lam <= 1:
        raise InvalidInput(f"lam={lam}: expected 0 to 1")
    if len(descriptions) != len(exemplars):
        raise InvalidInput(f"descriptions of {len(descriptions)} units for {len(exemplars)} units of exemplars")
    chosen = descriptions.chosen.clone()
    for i in range(len(exemplars)):
        unit = exemplars[[i]]
        images = unit.images[0].float() / 255
        masked = torch.where(unit.masks[0], images, images.new_tensor(0.5))
        texts = descriptions.beam[i]
        usable = descriptions.log_likelihood[i].isfinite() & torch.tensor([bool(text) for text in texts])
        fit = (1 - lam) * similarity(masked, texts).mean(0) + lam * similarity(images, texts).mean(0)
        if bool(usable.any()):
            chosen[i] = fit.cpu().masked_fill(~usable, -torch.inf).argmax()
    return replace(descriptions, chosen=chosen)


def clip_similarity(model: nn.Module, tokenizer: Any, batch_size: int = 256) -> Similarity:
    """Cosines of pictures and texts from a Hugging Face ``CLIPModel``.

    Args:
        model: a ``CLIPModel``.
        tokenizer: its tokenizer.
        batch_size: texts at a time.
    """
    net: Any = model
    size = int(net.config.vision_config.image_size)

    @torch.no_grad()
    def similarity(pictures: Float[Tensor, "n 3 h w"], texts: Sequence[str]) -> Float[Tensor, "n texts"]:
        device = next(model.parameters()).device
        pixels = torch.nn.functional.interpolate(pictures.to(device), size=(size, size), mode="bicubic", antialias=True)
        mean, std = (pixels.new_tensor(x).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
        with evaluating(model):
            seen = _embedding(net.get_image_features(pixel_values=(pixels.clamp(0, 1) - mean) / std))
            said = []
            for start in range(0, len(texts), batch_size):
                words = tokenizer(
                    list(texts[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt"
                )
                said.append(_embedding(net.get_text_features(**words.to(device))))
        return nn.functional.normalize(seen, dim=-1) @ nn.functional.normalize(torch.cat(said), dim=-1).T

    return similarity


def _embedding(output: Any) -> Tensor:
    """The projected embedding, whichever way this release of transformers hands it out."""
    return output if isinstance(output, Tensor) else output.pooler_output
