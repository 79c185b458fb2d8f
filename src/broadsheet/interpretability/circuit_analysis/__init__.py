"""Circuit analysis of multiple choice (arXiv:2307.09458): which heads turn a known answer into its letter, and how.

prompts = MultipleChoiceSet(questions, tokenizer)   # or any ChoiceBatch
batch, corrupt = prompts.batch, prompts.corrupted().batch
shares = logit_attribution(model, batch)            # what every head and MLP adds to each letter's logit
effects = patch_effects(model, batch, corrupt)      # total, direct and indirect effect of every node
outputs = output_nodes(model, batch, corrupt)       # how few direct contributions do the task
heads = categorise_heads(attention_table(model, batch), shares).named("correct_letter")
compression = compress_heads(model, heads, batch, rank=3)
compression.evaluate(prompts.mutate("shuffled").batch)
feature_test(model, heads, "nth_item", batch)       # is it the place in the list, or the letter?
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "attention": ["AttentionTable", "HeadCategories", "attention_table", "categorise_heads"],
        "compression": ["Compression", "RankCurve", "Subspace", "compress_heads", "rank_curve"],
        "effects": ["PatchEffects", "logit_attribution", "patch_effects"],
        "features": ["Centroids", "FeatureTest", "centroids", "compare_features", "feature_test"],
        "figures": ["attribution_bars"],
        "outputs": ["OutputNodes", "output_nodes"],
        "paths": ["Paths", "path_effects"],
        "prompts": [
            "ChoiceBatch",
            "ChoiceTemplate",
            "LabelledLists",
            "MultipleChoiceSet",
            "Question",
            "load_mmlu",
            "synthetic_questions",
        ],
        "skill": ["ModelAtChance", "answered"],
        "substitution": ["Score", "Substitution"],
    },
)
