"""Which programming language an answer is written in, from the code itself: a fence's tag alone proves nothing."""

import re

CUES: dict[str, tuple[str, ...]] = {
    "C++": (
        r"#include\s*<\w+>", r"\bstd::", r"\b(?:cout|cin|endl)\b", r"\bint\s+main\s*\(", r"\busing\s+namespace\b",
        r"\btemplate\s*<", r"::\w+\s*\(", r"\b(?:const\s+)?(?:auto|double|vector<[^>]+>)\s*&?\s*\w+\s*[=;(]",
    ),
    "Python": (
        r"^\s*def\s+\w+\s*\(.*\)\s*(?:->.*)?:\s*$", r"^\s*import\s+[\w.]+(?:\s+as\s+\w+)?\s*$",
        r"^\s*from\s+[\w.]+\s+import\b", r"\bself\.", r"^\s*(?:for|while|if|elif|with)\b.*:\s*(?:#.*)?$",
        r"__name__\s*==", r"^\s*class\s+\w+(?:\(.*\))?:\s*$", r"\bnp\.\w+", r"\bprint\(f?[\"']",
    ),
    "Java": (
        r"\bpublic\s+(?:static\s+)?(?:class|void|final|double|int|String)\b", r"\bSystem\.out\.print",
        r"^\s*import\s+java[\w.]*\*?;", r"\bnew\s+\w+(?:<[^>]*>)?\s*[\[(]", r"\bString\[\]", r"\bprivate\s+\w+",
    ),
    "Julia": (
        r"^\s*function\s+\w+!?\s*\(.*\)\s*$", r"^\s*end\s*$", r"^\s*using\s+[A-Z]\w+", r"\bprintln\(",
        r"::(?:Float64|Int64|Int|Vector|Matrix|AbstractArray)\b", r"\b\w+!\(",
        r"^\s*for\s+\w+\s+(?:in|=)\s+[^{:]+:[^{]+$",
        r"\.\+|\.\*|\.\^|\.=",
    ),
    "JavaScript": (
        r"\b(?:const|let|var)\s+\w+\s*=", r"=>\s*[{(]?", r"\bconsole\.log\(", r"\bfunction\s*\w*\s*\(.*\)\s*\{",
        r"\brequire\(",
    ),
    "C": (r"#include\s*<(?:stdio|stdlib|math|string)\.h>", r"\bprintf\s*\(", r"\bmalloc\s*\(", r"\bint\s+main\s*\("),
    "Rust": (r"\bfn\s+\w+\s*[(<]", r"\blet\s+mut\b", r"\bprintln!\(", r"\bimpl\b", r"\bVec<"),
    "MATLAB": (r"^\s*function\s+.*=\s*\w+\(", r"\bzeros\(\w+\s*,", r"^\s*%", r"\bfprintf\(", r"\bend\s*;?\s*$"),
}  # fmt: skip
_COMPILED = {name: [re.compile(cue, re.MULTILINE) for cue in cues] for name, cues in CUES.items()}
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_language(answer: str) -> str | None:
    """The language whose marks are most frequent in the code of an answer.

    Args:
        answer: text with or without code fences; where there are fences, only what is inside counts, not their tags.

    Returns:
        ``"C++"``, ``"Python"``, ``"Java"``, ``"Julia"``, ``"JavaScript"``, ``"C"``, ``"Rust"`` or ``"MATLAB"``; None
        where fewer than two marks are found.

    Example:
        >>> code_language("#include <iostream>\\nint main() { std::cout << 1; }")
        'C++'
        >>> code_language("I would rather not.") is None
        True
    """
    inside = _FENCE.findall(answer)
    code = "\n".join(inside) if inside else answer
    counts = {name: sum(min(len(cue.findall(code)), 5) for cue in cues) for name, cues in _COMPILED.items()}
    if counts["C++"] and not re.search(r"std::|<iostream>|\bcout\b|template\s*<|namespace|vector<", code):
        counts["C++"] = min(counts["C++"], counts["C"] - 1) if counts["C"] else counts["C++"]
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= 2 else None
