"""Multiple-choice questions in words: made up, read from MMLU's files, and put into prompts for any tokenizer.

questions = synthetic_questions(64)                          # or load_mmlu("mmlu/test")
prompts = MultipleChoiceSet(questions, tokenizer)            # "(A) ... (B) ... Answer: ("
prompts.batch                                                # tokens, with the places of labels and options
prompts.mutate("shuffled").batch                             # the same questions under other labels
prompts.corrupted().batch                                    # the same with another right label, token for token
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from broadsheet.data.choices import ChoiceBatch
from broadsheet.errors import InvalidInput

KINDS = ("shuffled", "random_letters", "digits", "rotated", "other_separators")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CATEGORIES: dict[str, tuple[str, ...]] = {
    "a colour": ("red", "green", "blue", "yellow", "black", "white", "brown", "purple"),
    "an animal": ("horse", "dog", "cat", "wolf", "sheep", "lion", "bear", "rabbit"),
    "a fruit": ("apple", "pear", "cherry", "lemon", "grape", "melon", "peach", "banana"),
    "a country": ("France", "Italy", "Spain", "Japan", "India", "Brazil", "Egypt", "Canada"),
    "a day of the week": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "a month": ("January", "February", "April", "June", "July", "August", "October", "December"),
    "a musical instrument": ("piano", "violin", "guitar", "drum", "flute", "trumpet", "harp"),
    "something to wear": ("shirt", "hat", "coat", "shoe", "glove", "scarf", "dress"),
}


@dataclass(frozen=True)
class Question:
    """A question with its options.

    Args:
        text: the question.
        options: what to choose from, two at least.
        answer: index of the right one.
        subject: what it is about; may be empty.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if len(self.options) < 2 or not 0 <= self.answer < len(self.options):
            raise InvalidInput(
                f"{self.text[:60]!r}: answer={self.answer} of {len(self.options)} options: expected an index into two "
                "options or more"
            )

    def moved(self, order: Sequence[int]) -> "Question":
        """The same options in another order."""
        if sorted(order) != list(range(len(self.options))):
            raise InvalidInput(f"order={list(order)}: expected every index of {len(self.options)} options once")
        return replace(self, options=tuple(self.options[i] for i in order), answer=list(order).index(self.answer))


@dataclass(frozen=True)
class ChoiceTemplate:
    """How a question becomes a prompt.

    Args:
        question: with ``{question}``.
        item: a line for each option, with ``{label}`` and ``{text}``.
        closing: what comes before the answer.
        answer: what the model has to say, with ``{label}``; one token together with what stands before it.
        after: what follows the answer of a solved example.
        instruction: before everything.
    """

    question: str = "{question}\n"
    item: str = "({label}) {text}\n"
    closing: str = "Answer: ("
    answer: str = "{label}"
    after: str = ")\n\n"
    instruction: str = ""


TEMPLATES = {
    "brackets": ChoiceTemplate(),
    "dots": ChoiceTemplate(item="{label}. {text}\n", closing="Answer:", answer=" {label}", after="\n\n"),
    "half_brackets": ChoiceTemplate(item="{label}) {text}\n", closing="Answer:", answer=" {label}", after="\n\n"),
    "colons": ChoiceTemplate(item="{label}: {text}\n", closing="Answer:", answer=" {label}", after="\n\n"),
    "square": ChoiceTemplate(item="[{label}] {text}\n", closing="Answer: [", after="]\n\n"),
    "spaced": ChoiceTemplate(item="( {label} ) {text}\n", closing="Answer: (", answer=" {label}", after=" )\n\n"),
}


@dataclass(frozen=True)
class MultipleChoiceSet:
    """Questions put into prompts, with the places of their labels and options.

    Args:
        questions: each with as many options as there are labels.
        tokenizer: a Hugging Face tokenizer that knows where its tokens stand in a text (a "fast" one).
        labels: one for each item (``"ABCD"``, or a list of texts), or a list of them for each question.
        template: a :class:`ChoiceTemplate`, or a name in :data:`TEMPLATES`.
        shots: solved examples that stand before every question, under the first question's labels.
        padding_side: where shorter prompts are filled up, ``"right"`` or ``"left"``.

    Raises:
        InvalidInput: no questions, options that are not as many as labels, labels that are the same, or a label that is
            not one token, with its pieces and a template that works.
    """

    questions: Sequence[Question]
    tokenizer: Any
    labels: Any = "ABCD"
    template: ChoiceTemplate | str = "brackets"
    shots: Sequence[Question] = ()
    padding_side: str = "right"

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))
        object.__setattr__(self, "shots", tuple(self.shots))
        if not self.questions:
            raise InvalidInput("questions is empty: hand in at least one Question")
        if isinstance(self.template, str):
            if self.template not in TEMPLATES:
                raise InvalidInput(f"template={self.template!r}: expected one of {', '.join(TEMPLATES)}")
            object.__setattr__(self, "template", TEMPLATES[self.template])
        if self.padding_side not in ("left", "right"):
            raise InvalidInput(f"padding_side={self.padding_side!r}: expected 'left' or 'right'")
        if not getattr(self.tokenizer, "is_fast", False):
            raise InvalidInput(
                f"{type(self.tokenizer).__name__} does not say where its tokens stand in a text: load the fast "
                "tokenizer (use_fast=True)"
            )
        for question, labels in zip(self.questions, self.label_texts, strict=True):
            if len(labels) != len(question.options) or len(set(labels)) < len(labels):
                raise InvalidInput(
                    f"labels={list(labels)} for {len(question.options)} options ({question.text[:40]!r}): expected as "
                    "many, each another"
                )
        _ = self.batch  # what does not fit is said now, not later

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def label_texts(self) -> tuple[tuple[str, ...], ...]:
        """The labels of every question."""
        if isinstance(self.labels, str) or all(isinstance(label, str) for label in self.labels):
            return (tuple(self.labels),) * len(self.questions)
        if len(self.labels) != len(self.questions):
            raise InvalidInput(f"labels for {len(self.labels)} questions: there are {len(self.questions)}")
        return tuple(tuple(labels) for labels in self.labels)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The prompts, up to where the answer is due."""
        pairs, template, head = zip(self.questions, self.label_texts, strict=True), _plain(self.template), self._head
        return tuple(_written(template, question, labels, head)[0] for question, labels in pairs)

    @cached_property
    def batch(self) -> ChoiceBatch:
        """The prompts as tokens."""
        head = self._head
        found = [
            self._encoded(question, labels, head)
            for question, labels in zip(self.questions, self.label_texts, strict=True)
        ]
        longest = max(len(row["ids"]) for row in found)
        pad = next((x for x in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if x is not None), 0)
        left = self.padding_side == "left"
        ids, masks, shift = [], [], []
        for row in found:
            fill = longest - len(row["ids"])
            ids.append([pad] * fill + row["ids"] if left else row["ids"] + [pad] * fill)
            masks.append([0] * fill + [1] * len(row["ids"]) if left else [1] * len(row["ids"]) + [0] * fill)
            shift.append(fill if left else 0)
        moved, mask = torch.tensor(shift), torch.tensor(masks)
        answers, labels = (torch.tensor([row[name] for row in found]) for name in ("answers", "labels"))
        return ChoiceBatch(
            torch.tensor(ids),
            answers,
            torch.tensor([question.answer for question in self.questions]),
            torch.tensor([row["places"] for row in found]) + moved[:, None],
            torch.tensor([row["spans"] for row in found]) + moved[:, None, None],
            None if bool(mask.all()) else mask,
            torch.tensor([len(row["ids"]) - 1 for row in found]) + moved,
            None if bool((labels == answers).all()) else labels,
        )

    def mutate(self, kind: str, seed: int = 0) -> "MultipleChoiceSet":
        """The same questions under other labels; the right option stays where it is.

        Args:
            kind: ``"shuffled"`` (the same labels in another order), ``"rotated"`` (begun with another one),
                ``"random_letters"``, ``"digits"`` (1, 2, ...), or ``"other_separators"`` (another template, the first
                that this tokenizer can do).
            seed: of what is drawn by chance.
        """
        random, n = np.random.default_rng(seed), len(self.questions[0].options)
        if kind == "other_separators":
            for template in TEMPLATES.values():
                if template.item != _plain(self.template).item:
                    try:
                        return replace(self, template=replace(template, instruction=_plain(self.template).instruction))
                    except InvalidInput:
                        continue
            raise InvalidInput("other_separators: no other template keeps these labels in one token each")
        if kind == "digits":
            if n > 9:
                raise InvalidInput(f"digits: {n} items; there are digits for 9")
            return replace(self, labels="123456789"[:n])
        made = []
        for labels in self.label_texts:
            if kind == "shuffled":
                order = random.permutation(n)
                while n > 1 and (order == np.arange(n)).all():
                    order = random.permutation(n)
                made.append(tuple(labels[i] for i in order))
            elif kind == "rotated":
                by = int(random.integers(1, n))
                made.append(labels[by:] + labels[:by])
            elif kind == "random_letters":
                made.append(tuple(LETTERS[i] for i in random.permutation(26)[:n]))
            else:
                raise InvalidInput(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
        return replace(self, labels=tuple(made))

    def corrupted(self, kind: str = "moved", seed: int = 0) -> "MultipleChoiceSet":
        """Prompts to patch with, one for each, of the same length and with another right label.

        Args:
            kind: ``"moved"`` (the same question, its options moved around) or ``"other"`` (another of the set).
            seed: of the choice.

        Raises:
            InvalidInput: no prompt of the same length can be had for a question.
        """
        if kind not in ("moved", "other"):
            raise InvalidInput(f"kind={kind!r}: expected 'moved' or 'other'")
        random, lengths = np.random.default_rng(seed), self.batch.lengths.tolist()
        head, template = self._head, _plain(self.template)

        def length(question: Question, labels: Sequence[str]) -> int:
            return len(_tokens(self.tokenizer, _written(template, question, labels, head)[0])[0])

        rights = [labels[q.answer] for q, labels in zip(self.questions, self.label_texts, strict=True)]
        chosen: list[Question] = []
        for i, (question, labels) in enumerate(zip(self.questions, self.label_texts, strict=True)):
            if kind == "other":
                fits = [
                    j for j, other in enumerate(self.questions)
                    if lengths[j] == lengths[i] and labels[other.answer] != rights[i]
                    and self.label_texts[j] == labels
                ]  # fmt: skip
                if not fits:
                    raise InvalidInput(
                        f"question {i}: no other one has {lengths[i]} tokens, the same labels and another right one; "
                        "use kind='moved', or more questions"
                    )
                chosen.append(self.questions[int(random.choice(fits))])
                continue
            n = len(question.options)
            for _ in range(20 * n):
                other = question.moved(random.permutation(n).tolist())
                if other.answer != question.answer and length(other, labels) == lengths[i]:
                    chosen.append(other)
                    break
            else:
                raise InvalidInput(
                    f"question {i} ({question.text[:40]!r}): its options cannot be moved without changing its length"
                )
        return replace(self, questions=tuple(chosen))

    def select(self, rows: Iterable[int] | torch.Tensor) -> "MultipleChoiceSet":
        """Some of the questions, by their numbers (a mask of truth values works, too)."""
        given = list(rows)
        numbers = [int(i) for i in given]
        if len(given) == len(self) and all(_truth(x) for x in given):
            numbers = [i for i, keep in enumerate(given) if bool(keep)]
        texts = self.label_texts
        return replace(
            self, questions=tuple(self.questions[i] for i in numbers), labels=tuple(texts[i] for i in numbers)
        )

    @property
    def _head(self) -> str:
        """The solved examples."""
        template, text = _plain(self.template), ""
        for shot in self.shots:
            own = self.label_texts[0]
            labels = own if len(own) == len(shot.options) else tuple(LETTERS[: len(shot.options)])
            solved = _written(template, shot, labels)[0].removeprefix(template.instruction)
            text += solved + template.answer.format(label=labels[shot.answer]) + template.after
        return text

    def _encoded(self, question: Question, labels: Sequence[str], head: str) -> dict[str, list]:
        try:
            return _encoded(self.tokenizer, _plain(self.template), question, labels, head)
        except _Split as error:
            works = _working(self.tokenizer, labels)
            hint = f"template={works!r} works with this tokenizer" if works else "choose labels of one token each"
            raise InvalidInput(f"{error}: {hint}") from None


def synthetic_questions(n: int, n_options: int = 4, seed: int = 0) -> list[Question]:
    """Easy questions whose answers are known: which of these is a colour, what is 3 + 4.

    Args:
        n: questions; every second one is a sum.
        n_options: of each, 2 to 8.
        seed: of everything.
    """
    if n < 1 or not 2 <= n_options <= len(CATEGORIES):
        raise InvalidInput(f"n={n}, n_options={n_options}: expected at least 1 question of 2 to {len(CATEGORIES)}")
    random = np.random.default_rng(seed)
    names, made = list(CATEGORIES), []
    for i in range(n):
        answer = int(random.integers(n_options))
        if i % 2:
            a, b = (int(x) for x in random.integers(1, 10, 2))
            wrong = [x for x in range(2, 19) if x != a + b]
            options = [str(wrong[j]) for j in random.permutation(len(wrong))[:n_options]]
            options[answer] = str(a + b)
            made.append(Question(f"What is {a} + {b}?", tuple(options), answer, "sums"))
        else:
            kinds = [names[j] for j in random.permutation(len(names))[:n_options]]
            options = [str(random.choice(CATEGORIES[kind])) for kind in kinds]
            made.append(Question(f"Which of these is {kinds[answer]}?", tuple(options), answer, "categories"))
    return made


def load_mmlu(path: str | Path, subjects: Sequence[str] | None = None) -> list[Question]:
    """Questions of MMLU (arXiv:2009.03300) from files on disk.

    Args:
        path: a file or a folder of them: CSV as its authors give it (question, four options, letter; no header), or
            with a header ``question,A,B,C,D,answer``; JSON or JSON lines with ``question``, ``choices`` and ``answer``
            (an index or a letter).
        subjects: only these; a CSV's subject is its file's name without ``_test``, ``_dev`` or ``_val``.

    Raises:
        InvalidInput: no such files, or a row that is no question, with file and row.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in (".csv", ".json", ".jsonl"))
    if not files:
        raise InvalidInput(f"{path}: no file and no folder with .csv, .json or .jsonl files")
    found: list[Question] = []
    for file in files:
        subject = file.stem
        for part in ("_test", "_dev", "_val"):
            subject = subject.removesuffix(part)
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".csv":
            rows: list[Any] = list(csv.reader(text.splitlines(keepends=True)))
            if rows and rows[0] and rows[0][0].strip().lower() == "question":
                rows = rows[1:]
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
        for number, row in enumerate(rows, 1):
            try:
                found.append(_mmlu_row(row, subject))
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise InvalidInput(f"{file}, row {number}: no question of MMLU ({error}): {str(row)[:80]}") from error
    if subjects is not None:
        found = [question for question in found if question.subject in subjects]
        if not found:
            raise InvalidInput(f"{path}: no question about {', '.join(subjects)}")
    return found


def _mmlu_row(row: Any, subject: str) -> Question:
    if isinstance(row, dict):
        answer = row["answer"]
        index = LETTERS.index(answer.strip()) if isinstance(answer, str) else int(answer)
        options = tuple(str(option) for option in row["choices"])
        return Question(str(row["question"]), options, index, str(row.get("subject") or subject))
    text, *options, answer = row
    return Question(text, tuple(options), LETTERS.index(answer.strip()), subject)


def _plain(template: ChoiceTemplate | str) -> ChoiceTemplate:
    return TEMPLATES[template] if isinstance(template, str) else template


# ---------------------------------------------------------------------------------------------------------- tokens


class _Split(InvalidInput):
    """A label that is not one token."""


def _written(
    template: ChoiceTemplate, question: Question, labels: Sequence[str], head: str = ""
) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """A prompt, and where labels and options stand in it."""
    text = template.instruction + head + template.question.format(question=question.text)
    at, spans = [], []
    before, rest = template.item.split("{label}")
    between, after = rest.split("{text}")
    for label, option in zip(labels, question.options, strict=True):
        text += before
        at.append((len(text), len(text) + len(label)))
        text += label + between
        spans.append((len(text), len(text) + len(option)))
        text += option + after
    return text + template.closing, at, spans


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and their places in the text."""
    made = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, where, special = (list(made[x]) for x in ("input_ids", "offset_mapping", "special_tokens_mask"))
    while special and special[-1]:  # an end of text would stand between prompt and answer
        ids, where, special = ids[:-1], where[:-1], special[:-1]
    return ids, [tuple(x) for x in where]


def _encoded(
    tokenizer: Any, template: ChoiceTemplate, question: Question, labels: Sequence[str], head: str
) -> dict[str, list]:
    """Ids, answers, label tokens, and the places of labels and options."""
    text, at, spans = _written(template, question, labels, head)
    ids, where = _tokens(tokenizer, text)
    answers = []
    for label in labels:
        whole = _tokens(tokenizer, text + template.answer.format(label=label))[0]
        if whole[: len(ids)] != ids or len(whole) != len(ids) + 1:
            shared = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
            raise _Split(_split(tokenizer, label, "the answer", whole[shared:], ids[shared:]))
        answers.append(whole[-1])
    places, tokens = [], []
    for label, (start, end) in zip(labels, at, strict=True):
        inside = _overlapping(where, start, end)
        if len(inside) != 1:
            raise _Split(_split(tokenizer, label, "the label in the list", [ids[i] for i in inside]))
        places.append(inside[0])
        tokens.append(ids[inside[0]])
    if len(set(tokens)) < len(tokens) or len(set(answers)) < len(answers):
        raise InvalidInput(
            f"labels={list(labels)}: this tokenizer gives two of them the same token (an unknown one?); choose labels "
            "that it knows"
        )
    found = [_overlapping(where, start, end) for start, end in spans]
    content = [[inside[0], inside[-1] + 1] if inside else [0, 0] for inside in found]
    return {"ids": ids, "answers": answers, "labels": tokens, "places": places, "spans": content}


def _split(tokenizer: Any, label: str, what: str, pieces: Sequence[int], before: Sequence[int] = ()) -> str:
    def shown(ids: Sequence[int]) -> str:
        return " | ".join(repr(tokenizer.decode([i])) for i in ids)

    if before:
        return f"label {label!r}: {what} merges with what stands before it ({shown(before)} becomes {shown(pieces)})"
    return f"label {label!r}: {what} is {len(pieces)} tokens ({shown(pieces)}), one is expected"


def _working(tokenizer: Any, labels: Sequence[str]) -> str | None:
    """A template that gives each of the labels one token."""
    question = Question("?", tuple(str(i) for i in range(len(labels))), 0)
    for name, template in TEMPLATES.items():
        try:
            _encoded(tokenizer, template, question, labels, "")
        except InvalidInput:
            continue
        return name
    return None


def _overlapping(where: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    return [i for i, (low, high) in enumerate(where) if low < end and high > start]


def _truth(x: Any) -> bool:
    return isinstance(x, bool | np.bool_) or (isinstance(x, torch.Tensor) and x.dtype == torch.bool)
