"""Measure the shape of representations.

``diffusion_spectral_entropy`` is a package and a function in it: here the name is the package.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "diffusion_spectral_entropy": [
            "BandwidthWarning",
            "DiffusionEntropyLoss",
            "MutualInformation",
            "RepresentationMonitor",
            "SpectralEntropy",
            "adjacency_spectral_entropy",
            "adjacency_spectral_mutual_information",
            "compare_initialisations",
            "diffusion_eigenvalues",
            "diffusion_matrix",
            "diffusion_matrix_entry_entropy",
            "diffusion_matrix_entry_mutual_information",
            "diffusion_spectral_mutual_information",
            "nearest_neighbour_mutual_information",
            "rank_models",
            "shannon_entropy_binned",
            "shannon_mutual_information_binned",
        ],
        "microscope": ["Look", "TrainingMicroscope"],
        "neural_collapse": [
            "CollapseMetrics",
            "CollapseMonitor",
            "CollapseReport",
            "CollapseWarning",
            "FramePrediction",
            "FreeFeatures",
            "NCHead",
            "collapse_metrics",
            "collapse_report",
            "collapse_threshold",
            "cross_entropy_figures",
            "gof_prediction",
            "sep_decay_loss",
            "solve_ufm",
            "ufm_optimum",
        ],
    },
    submodules=["diffusion_spectral_entropy", "microscope", "neural_collapse"],
)
