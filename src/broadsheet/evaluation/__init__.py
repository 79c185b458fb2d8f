"""Test models where accuracy does not look: blind spots, distraction, data sets as they are."""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "level_set_traversal": [
            "BlindSpotReport",
            "PathWidth",
            "Traversal",
            "TriangleConfidence",
            "blind_spot_grid",
            "blind_spot_report",
            "image_distances",
            "path_confidence",
            "path_width",
            "star_score",
            "triangle_confidence",
        ],
    },
    submodules=["level_set_traversal"],
)
