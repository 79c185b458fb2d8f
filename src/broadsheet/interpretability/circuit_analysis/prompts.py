"""The prompts that this package works on, handed on from where all methods find them."""

from broadsheet.data.choices import ChoiceBatch, LabelledLists
from broadsheet.data.questions import (
    TEMPLATES,
    ChoiceTemplate,
    MultipleChoiceSet,
    Question,
    load_mmlu,
    synthetic_questions,
)

__all__ = [
    "TEMPLATES",
    "ChoiceBatch",
    "ChoiceTemplate",
    "LabelledLists",
    "MultipleChoiceSet",
    "Question",
    "load_mmlu",
    "synthetic_questions",
]
