"""Latent spaces that speak to each other: samples described by their likeness to anchors.

Source: Moschella, Maiorca, Fumero, Norelli, Locatello and Rodola, *Relative Representations Enable Zero-Shot Latent
Space Communication*, ICLR 2023, arXiv:2209.15430.

    relative_projection(latents, latents[anchors])            # rotations and scales of the space drop out
    model = RelativeModel(encoder, head, samples[anchors])    # trained end to end
    stitch(model_a, model_b)(x)                               # a's encoder under b's head, nothing trained
    compare_spaces(z1, z2, anchors).to_frame()                # how far two spaces agree

Where this differs from the released code: similarities may be taken about a centre or in whitened axes (cosines cancel
rotations and scales, not shifts), a frozen encoder embeds its anchors once, the head of frozen encoders does not look
at the rest of the batch, and two lists of anchors are only put together when they are the same samples in one order, or
said to be parallel.
"""

from broadsheet.geometry.relative_representations.anchors import (
    Anchors,
    check_same,
    farthest_points,
    parallel_anchors,
    select_anchors,
)
from broadsheet.geometry.relative_representations.bootstrap import BootstrappedAnchors, bootstrap_anchors
from broadsheet.geometry.relative_representations.comparison import (
    AnchorCurve,
    ProxyStudy,
    SpaceComparison,
    anchor_curve,
    compare_spaces,
    performance_proxy,
    proxy_study,
)
from broadsheet.geometry.relative_representations.encoder import RelativeEncoder
from broadsheet.geometry.relative_representations.layer import RelativeHead, RelativeLayer
from broadsheet.geometry.relative_representations.model import AbsoluteModel, RelativeModel, latents_of
from broadsheet.geometry.relative_representations.plots import latent_plot, reconstruction_plot
from broadsheet.geometry.relative_representations.similarity import (
    SIMILARITIES,
    AnchorWarning,
    Frame,
    mean_pairwise_cosine,
    relative_projection,
)
from broadsheet.geometry.relative_representations.stitching import (
    StitchedModel,
    StitchingMatrix,
    StitchWarning,
    stitch,
    stitching_matrix,
)
from broadsheet.geometry.relative_representations.words import SharedWords, shared_words
from broadsheet.nn.pooling import pooled

__all__ = [
    "SIMILARITIES",
    "AbsoluteModel",
    "AnchorCurve",
    "AnchorWarning",
    "Anchors",
    "BootstrappedAnchors",
    "Frame",
    "ProxyStudy",
    "RelativeEncoder",
    "RelativeHead",
    "RelativeLayer",
    "RelativeModel",
    "SharedWords",
    "SpaceComparison",
    "StitchWarning",
    "StitchedModel",
    "StitchingMatrix",
    "anchor_curve",
    "bootstrap_anchors",
    "check_same",
    "compare_spaces",
    "farthest_points",
    "latent_plot",
    "latents_of",
    "mean_pairwise_cosine",
    "parallel_anchors",
    "performance_proxy",
    "pooled",
    "proxy_study",
    "reconstruction_plot",
    "relative_projection",
    "select_anchors",
    "shared_words",
    "stitch",
    "stitching_matrix",
]
