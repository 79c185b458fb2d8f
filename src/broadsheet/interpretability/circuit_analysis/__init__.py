"""Circuit analysis of multiple choice (arXiv:2307.09458): which heads turn a known answer into its letter, and how.

shares = logit_attribution(model, batch)            # what every head and MLP adds to each letter's logit
effects = patch_effects(model, batch, corrupt)      # total, direct and indirect effect of every node
outputs = output_nodes(model, batch, corrupt)       # how few direct contributions do the task
heads = categorise_heads(attention_table(model, batch), shares)
compression = compress_heads(model, heads.named("correct_letter"), batch, rank=3)
compression.evaluate(mutated)
"""

from broadsheet.interpretability.circuit_analysis.attention import (
    AttentionTable,
    HeadCategories,
    attention_table,
    categorise_heads,
)
from broadsheet.interpretability.circuit_analysis.batch import ChoiceBatch
from broadsheet.interpretability.circuit_analysis.compression import Compression, Score, compress_heads
from broadsheet.interpretability.circuit_analysis.effects import (
    OutputNodes,
    PatchEffects,
    logit_attribution,
    output_nodes,
    patch_effects,
)

__all__ = [
    "AttentionTable",
    "ChoiceBatch",
    "Compression",
    "HeadCategories",
    "OutputNodes",
    "PatchEffects",
    "Score",
    "attention_table",
    "categorise_heads",
    "compress_heads",
    "logit_attribution",
    "output_nodes",
    "patch_effects",
]
