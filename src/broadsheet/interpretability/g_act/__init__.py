"""G-ACT: steer a language model's habits by directions that a probe picks from the state it finds.

    profile = bias_profile(model, tokenizer, prompts, classify)             # which language does it answer in?
    pairs = collect_pairs(model, tokenizer, [(prompt, in_cpp, in_python), ...])
    steering = GACT().fit(pairs)
    with steering(model, alpha=0.1):
        model.generate(...)

Baselines: :func:`mean_difference` (one direction for all states), :class:`ACT` (probes of single heads),
:func:`scale_neuron` (one hidden unit turned up), :func:`prompt_hint`.

Reference: Sharma and Raman, "Steering Conceptual Bias via Transformer Latent-Subspace Activation" (arXiv:2506.18887).
There is no public code; what the description leaves open is decided here, and said where it is decided.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "act": ["ACT", "ACTModel", "two_folds"],
        "gact": ["DroppedPairs", "FewerClusters", "GACT", "mean_difference", "prompt_hint"],
        "injection": ["QuantizedBlocks", "injecting"],
        "model": ["SteeringModel"],
        "neurons": ["NeuronScores", "neuron_attribution", "scale_neuron"],
        "pairs": ["PairActivations", "collect_pairs"],
        "sites": ["SITES", "Place", "places"],
        "probes": ["Probes", "score_probes", "train_probes"],
        "profile": ["BiasProfile", "bias_profile"],
        "refinement": ["refine", "refine_directly"],
        "report": [
            "Collapsed",
            "Overhead",
            "SteeringReport",
            "at_all_positions",
            "steering_overhead",
            "steering_report",
        ],
    },
)
