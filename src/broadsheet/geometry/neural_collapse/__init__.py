"""Neural collapse in deep linear heads, balanced and imbalanced: the geometry predicted, measured and trained to.

Source: Dang, Tran, Osher, Tran-The, Ho and Nguyen, *Neural Collapse in Deep Linear Networks: From Balanced to
Imbalanced Data*, ICML 2023, arXiv:2301.00437.

    gof_prediction([200, 100, 50, 50], weight_decay=5e-3, feature_decay=5e-3, depth=3).to_frame()
    collapse_threshold(total=400, weight_decay=5e-3, feature_decay=5e-3)     # classes below this size vanish
    collapse_report(model, loader).to_frame()                                # how near a network of one's own is

Where this differs from the published scripts: a positive stationary point is kept only where it beats zero, squared
error is averaged over samples and not over classes (or the decays have to be multiplied), NC1's pseudo-inverse is cut
to the K - 1 directions there are, and nothing asserts that the simplex is optimal for deep heads under cross entropy.
"""

from broadsheet.geometry.neural_collapse.head import NCHead, sep_decay_loss
from broadsheet.geometry.neural_collapse.metrics import (
    CollapseMetrics,
    CollapseWarning,
    collapse_metrics,
    gram_plot,
    lengths_plot,
    metrics_of,
    nc1,
    nearest_mean_agreement,
)
from broadsheet.geometry.neural_collapse.report import CollapseMonitor, CollapseReport, collapse_report, linear_head
from broadsheet.geometry.neural_collapse.solve import FreeFeatures, objective, solve_ufm, ufm_optimum
from broadsheet.geometry.neural_collapse.theory import (
    CrossEntropyFigure,
    FramePrediction,
    LayerPrediction,
    collapse_threshold,
    cross_entropy_figures,
    gof_prediction,
    survival_bound,
)

__all__ = [
    "CollapseMetrics",
    "CollapseMonitor",
    "CollapseReport",
    "CollapseWarning",
    "CrossEntropyFigure",
    "FramePrediction",
    "FreeFeatures",
    "LayerPrediction",
    "NCHead",
    "collapse_metrics",
    "collapse_report",
    "collapse_threshold",
    "cross_entropy_figures",
    "gof_prediction",
    "gram_plot",
    "lengths_plot",
    "linear_head",
    "metrics_of",
    "nc1",
    "nearest_mean_agreement",
    "objective",
    "sep_decay_loss",
    "solve_ufm",
    "survival_bound",
    "ufm_optimum",
]
