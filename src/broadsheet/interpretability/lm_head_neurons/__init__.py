"""Reading neurons through the output head (arXiv 2501.02688): what every MLP neuron stands for, from weights alone.

A neuron's input weights are a direction in the residual stream; the model's own head says which words it points at. The
map of all neurons can be searched, compared with another model's, and put to the test by clamping neurons while the
model generates. A folder of safetensors is read one layer at a time, so that the model need not fit in memory.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "clamping": ["ClampSweep", "clamp", "clamp_sweep", "largest_values", "probability_of"],
        "comparing": ["MapComparison", "compare"],
        "decode": ["decode_directions", "decode_experts", "decode_neurons"],
        "lookup": ["NeuronActivations", "concept_vector", "nearest_neurons", "neuron_activations"],
        "maps": ["NeuronMap"],
        "words": ["SeveralTokens"],
    },
)
