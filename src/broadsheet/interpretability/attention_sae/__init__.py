"""Sparse autoencoders of what attention heads put out: features, the heads and tokens behind each, and their effects.

    sae = AttentionSAE.for_layer(model, 5)                                  # arXiv:2406.17759
    sae.fit(ActivationBuffer(model, sae.site, batches), steps=25_000)
    evaluate_sae(model, sae, batches)                                           # L0, loss recovered, dead features
    head_weights(sae), dfa(model, sae, ids, feature), recursive_dfa(...)    # heads and tokens behind a feature
    feature_page(latent_cards(model, sae, features, batches))               # one page to read

Where the paper's code differs from its text, or goes wrong, ours follows the text: one position is ablated where one is
asked for, the error term can be left out, dead features are resampled within the training, rows stay float32, and the
norm's scale is kept in recursive attribution, so that shares add up.
"""

from broadsheet.interpretability.attention_sae.autoencoder import AttentionSAE, capture_z
from broadsheet.interpretability.attention_sae.direct import DirectFeatureAttribution, dfa
from broadsheet.interpretability.attention_sae.evaluation import (
    ProxyAgreement,
    SAEEvaluation,
    evaluate_sae,
    specificity_sensitivity,
)
from broadsheet.interpretability.attention_sae.heads import head_attribution, head_weights, top_features
from broadsheet.interpretability.attention_sae.induction import (
    NaturalPrefixes,
    PrefixScores,
    natural_prefixes,
    prefix_induction_scores,
)
from broadsheet.interpretability.attention_sae.interventions import (
    FeatureEffects,
    ablate_features,
    edit_features,
    feature_effects,
)
from broadsheet.interpretability.attention_sae.latents import latent_cards
from broadsheet.interpretability.attention_sae.recursive import AttributionNode, AttributionTree, recursive_dfa
from broadsheet.nn.cards import feature_page

__all__ = [
    "AttentionSAE",
    "AttributionNode",
    "AttributionTree",
    "DirectFeatureAttribution",
    "FeatureEffects",
    "NaturalPrefixes",
    "PrefixScores",
    "ProxyAgreement",
    "SAEEvaluation",
    "ablate_features",
    "capture_z",
    "dfa",
    "edit_features",
    "evaluate_sae",
    "feature_effects",
    "feature_page",
    "head_attribution",
    "head_weights",
    "latent_cards",
    "natural_prefixes",
    "prefix_induction_scores",
    "recursive_dfa",
    "specificity_sensitivity",
    "top_features",
]
