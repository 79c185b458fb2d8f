"""Cards of an attention autoencoder's features: head shares and the tokens that each activation was read from."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE, as_tensor
from broadsheet.interpretability.attention_sae.direct import dfa
from broadsheet.interpretability.attention_sae.heads import head_weights
from broadsheet.nn.activations import Batch
from broadsheet.nn.cards import FeatureCard, feature_cards
from broadsheet.nn.features import Feature


def latent_cards(
    model: nn.Module,
    sae: AttentionSAE,
    features: int | Sequence[int] | Tensor,
    batches: Iterable[Batch],
    *,
    sources: bool = True,
    **how: Any,
) -> list[FeatureCard]:
    """Cards with each feature's head shares and, under every excerpt, direct feature attribution by source token.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        sae: of one of its layers.
        features: one index or several.
        batches: ids ``[batch, time]``, or pairs of them and attention masks.
        sources: attribute the activations that are shown.
        **how: handed to :func:`broadsheet.nn.cards.feature_cards` (``tokenizer``, ``k``, ``skip_first``, ...).
    """
    the_map = sae.check_model(model)
    index = as_tensor(features, sae).tolist()
    shares = head_weights(sae)
    chosen = [sae.feature(i) for i in index]
    number = {id(feature): i for feature, i in zip(chosen, index, strict=True)}

    def read_from(feature: Feature, input_ids: Tensor, position: int) -> Tensor:
        return dfa(the_map, sae, input_ids, number[id(feature)], position).by_source[0]

    cards = feature_cards(model, chosen, batches, sources=read_from if sources else None, **how)
    return [
        card.with_parts({f"head {h}": float(share) for h, share in enumerate(shares[i].tolist())})
        for card, i in zip(cards, index, strict=True)
    ]
