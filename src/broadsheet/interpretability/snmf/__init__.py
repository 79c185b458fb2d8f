"""Sparse semi-non-negative matrix factorisation of MLP activations (arXiv 2506.10920): concepts without labels.

The hidden units of one MLP layer on some thousand tokens are split into features of few neurons, and each token is a
non-negative mix of them. The mix says at which tokens a feature is active, the neurons what it writes; adding them
steers the model, and factorising the features again gives a tree from narrow to broad concepts.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "concepts": ["Concepts", "collect_mlp_activations", "find_concepts", "written_to_residual"],
        "detection": ["ClampedDetection", "Detection", "concept_detection", "difference_of_means"],
        "estimator": ["SemiNMF"],
        "fitting": ["Factorisation", "factorise"],
        "hierarchy": ["HierarchicalSemiNMF", "TunedFactors"],
        "reading": ["FactorReading"],
        "source": ["Source"],
        "steering": [
            "KL_TARGETS",
            "PROMPT",
            "SteeringCurve",
            "alpha_for_kl",
            "judge_prompts",
            "judged",
            "logit_shift",
            "next_token_kl",
            "next_token_logits",
            "steered_texts",
            "steering_curve",
        ],
        "tree": ["ConceptTree", "NeuronOverlap", "neuron_overlap"],
    },
)
