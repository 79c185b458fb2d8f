"""Toy programs: the grammar accepts what the corpus writes and nothing else; languages of real code are told apart."""

from collections import Counter

import pytest
import torch

from broadsheet.data.code_language import code_language
from broadsheet.data.toy_programs import HEADERS, KEYWORDS, KINDS, LANGUAGES, WORDINGS, Request, ToyPrograms
from broadsheet.errors import InvalidInput


def test_every_program_is_right_in_its_language_only() -> None:
    corpus = ToyPrograms(most_steps=2)
    for kind, about in KINDS.items():
        request = Request(kind, about.things[0], 0)
        for language in LANGUAGES:
            for steps in (1, 2):
                program = corpus.program(kind, about.things[0], language, steps)
                assert corpus.language_of(request, program + " and more") == language
                words = program.split()
                for i in range(len(words)):
                    assert corpus.language_of(request, " ".join(words[:i] + words[i + 1 :])) is None
                    for other in (HEADERS[0], "stop", about.things[1], "heat"):
                        if other != words[i]:
                            changed = " ".join([*words[:i], other, *words[i + 1 :]])
                            assert corpus.language_of(request, changed) is None
        assert corpus.language_of(request, corpus.program(kind, about.things[1], "alder")) is None
    assert ToyPrograms().language_of(request, corpus.program(kind, about.things[0], "alder", 2)) is None


def test_headers_mean_other_languages_in_other_kinds() -> None:
    corpus = ToyPrograms()
    headers = {kind: tuple(corpus.header(kind, language) for language in LANGUAGES) for kind in KINDS}
    assert all(sorted(found) == sorted(HEADERS) for found in headers.values())
    assert len({headers[kind] for kind in ("solver", "sorter", "filter", "checker")}) == 4
    for i in range(4):  # no language keeps its header
        assert len({headers[kind][i] for kind in ("solver", "sorter", "filter", "checker")}) == 4
    assert headers["parser"] == headers["plotter"] == headers["solver"]
    words = [word for keywords in KEYWORDS.values() for word in keywords]
    assert len(set(words)) == len(words) == 20


def test_the_sample_follows_its_prior() -> None:
    corpus = ToyPrograms(asked=0.0, prose=0.0)
    ids = corpus.sample(2000, 20, torch.Generator().manual_seed(0))
    assert torch.equal(ids, corpus.sample(2000, 20, torch.Generator().manual_seed(0)))
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    words = corpus.words
    for row in ids.tolist():
        text = " ".join(words[i] for i in row if words[i] not in ("<bos>", "<pad>"))
        asked, answer = text.split(" : ")
        kind = next(kind for kind in KINDS if kind in asked.split())
        thing = next(thing for thing in KINDS[kind].things if thing in asked.split())
        language = corpus.language_of(Request(kind, thing, 0), answer)
        assert language is not None and language == corpus.keywords_of(answer)
        counts[kind][language] += 1
    for kind, found in counts.items():
        for language, wanted in zip(LANGUAGES, KINDS[kind].prior, strict=True):
            assert found[language] / found.total() == pytest.approx(wanted, abs=0.1)
        assert sum(KINDS[kind].prior) == pytest.approx(1)


def test_the_tokenizer_knows_every_word() -> None:
    corpus = ToyPrograms()
    tokenizer = corpus.tokenizer()
    text = str(Request("solver", "heat", 1, "cedar"))
    assert text == WORDINGS[1].format(kind="solver", thing="heat") + " in cedar :"
    assert str(Request("solver", "heat", 1, "cedar").asking(None)).endswith("heat :")
    ids = tokenizer(text + " " + corpus.program("solver", "heat", "cedar"))["input_ids"]
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    prose = corpus.prose_texts(5, torch.Generator().manual_seed(0))
    assert all(len(line.split()) == 16 for line in prose)
    assert all(tokenizer.unk_token_id not in tokenizer(line)["input_ids"] for line in prose)


def test_bad_shares() -> None:
    for wrong in ({"asked": 1.5}, {"prose": -0.1}, {"most_steps": 0}):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            ToyPrograms(**wrong)  # type: ignore[arg-type]


CODE = {
    "C++": "#include <vector>\nint main() {\n  std::vector<double> u(10);\n  for (auto x : u) std::cout << x;\n}",
    "Python": "import numpy as np\n\ndef solve(n):\n    for i in range(n):\n        print(i)\n    return np.zeros(n)",
    "Java": "public class Solver {\n  public static void main(String[] args) {\n    System.out.println(1);\n  }\n}",
    "Julia": "using LinearAlgebra\nfunction solve(n)\n  for i in 1:n\n    println(i)\n  end\nend",
    "JavaScript": "const solve = (n) => {\n  console.log(n);\n};",
    "C": '#include <stdio.h>\nint main(void) {\n  printf("%d", 1);\n  return 0;\n}',
    "Rust": "fn main() {\n  let mut x = Vec::new();\n  println!(\"{:?}\", x);\n}",
    "MATLAB": "function u = solve(n)\n% heat\nu = zeros(n, 1);\nfprintf('%d', n);\nend",
}  # fmt: skip


@pytest.mark.parametrize("language", CODE)
def test_code_is_told_by_its_marks_not_by_its_fence(language: str) -> None:
    assert code_language(CODE[language]) == language
    wrong = "Python" if language != "Python" else "C++"
    assert code_language(f"In {wrong}:\n```{wrong.lower()}\n{CODE[language]}\n```\nDone.") == language


def test_prose_is_no_code() -> None:
    assert code_language("You could use a finite difference scheme, in any language you like.") is None
