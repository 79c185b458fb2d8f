"""Codebook features (arXiv 2310.17230): a model whose hidden states are a few integers at each place.

A bottleneck after every attention head and MLP replaces the activation by the nearest of a list of learned vectors; the
model is trained or fine-tuned with the bottlenecks in place. Codes can then be searched like words, and switched on.

    cb = wrap_codebooks(model, at=("attn_heads", "mlp"), num_codes=1000)
    fit(cb, batches, steps=15_000, lr=5e-4)
    index = index_codes(cb, batches, tokenizer)
    site, code = index.search_codes(r"January|February").best
    with intervene(cb, {(site, code): None}):
        cb.generate(prompt, max_new_tokens=50)

Where paper and official code differ: the paper adds up the chosen codes, the code takes their mean (the default here;
``reduce="sum"`` for the other); the code leaves the norm before an MLP's codebook untrained (``train_norm=False``).
The code's commitment term is not divided by the number of tokens; ours is a mean, like the reconstruction.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "analysis": ["MergedInputs", "merged_inputs", "similar_codes"],
        "index": ["CodeIndex", "codes", "index_codes"],
        "interventions": ["intervene", "patch_codes"],
        "model": ["CodebookModel", "wrap_codebooks"],
        "neurons": ["NeuronComparison", "best_neuron", "compare_with_neurons", "neuron_outputs", "neuron_scores"],
        "search": ["CodeMatches", "LabelScores"],
        "training": ["FitReport", "fit", "next_token_loss"],
    },
)
