"""Sentences for the units of a network (MILAN, arXiv:2201.11114): what excites them, in words; then audit and repair.

    exemplars = top_exemplars(model, dataset, "layer4")
    describer = Describer.fit(exemplars, sentences, encoder=encoder)
    found = describer.describe(exemplars)
    audit(found, "face"); edit(model, found, ["text", "letter"], val, test)

Where the official code is followed in another way: early stopping restores the best weights, not the last; padding does
not count in the attention's penalty; a sentence that did not end is not chosen while another did; units of transformers
can be switched off, too; units that never fire are not described.
"""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "analysis": ["Audit", "Edit", "Importance", "accuracy", "audit", "edit", "importance", "order_by"],
        "baselines": [
            "Label", "compositional", "constant_description", "intersection_over_union", "nearest_description",
            "net_dissect",
        ],
        "clip": ["clip_similarity", "rerank_with_clip"],
        "decoder": ["CaptionDecoder", "attention_penalty"],
        "describer": ["Describer", "PMITerms"],
        "descriptions": ["Description", "Descriptions"],
        "encoders": [
            "IMAGENET_MEAN", "IMAGENET_STD", "PyramidEncoder", "SpatialEncoder", "VectorExemplars", "encode",
            "encode_pictures",
        ],
        "exemplars": ["Exemplars", "draw_grid", "exemplars_from_maps", "top_exemplars"],
        "language_model": ["SentenceLM"],
        "layers": ["as_maps"],
        "metrics": ["bleu"],
        "text": ["Grammar", "Vocabulary", "grammar", "spacy_words", "split_words", "tag_words"],
        "excerpts": ["text_exemplars"],
    },
)  # fmt: skip
