"""Blind spots of vision models: inputs that look like something else while the model stays as sure as before.

Source: Balasubramanian, Sadasivan, Sriramanan and Feizi, *Exploring Geometry of Blind Spots in Vision Models*, NeurIPS
2023, arXiv:2310.19889.

    found = level_set_traversal(model, source, target, record_every=50)   # any classifier, images in [0, 1]
    found.to_frame(), found.plot()
    triangle_confidence(model, found.source, found.images, other.images).plot()
    blind_spot_report({"standard": model, "robust": twin}, loader, n=200).summary()
"""

from broadsheet.evaluation.level_set_traversal.distances import image_distances, structural_similarity
from broadsheet.evaluation.level_set_traversal.inputs import Classifier, SkippedSources
from broadsheet.evaluation.level_set_traversal.probes import (
    PathWidth,
    TriangleConfidence,
    path_confidence,
    path_width,
    star_score,
    triangle_confidence,
)
from broadsheet.evaluation.level_set_traversal.report import (
    BlindSpotGrid,
    BlindSpotReport,
    blind_spot_grid,
    blind_spot_report,
)
from broadsheet.evaluation.level_set_traversal.traversal import Traversal, level_set_traversal, project, show

__all__ = [
    "BlindSpotGrid",
    "BlindSpotReport",
    "Classifier",
    "PathWidth",
    "SkippedSources",
    "Traversal",
    "TriangleConfidence",
    "blind_spot_grid",
    "blind_spot_report",
    "image_distances",
    "level_set_traversal",
    "path_confidence",
    "path_width",
    "project",
    "show",
    "star_score",
    "structural_similarity",
    "triangle_confidence",
]
