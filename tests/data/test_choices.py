"""Labelled lists, questions in words, and the hand-built model that answers the lists."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from broadsheet.data.choices import ChoiceBatch, LabelledLists, check_pair
from broadsheet.data.planted_choice import PlantedChoice
from broadsheet.data.questions import (
    KINDS,
    TEMPLATES,
    ChoiceTemplate,
    MultipleChoiceSet,
    Question,
    load_mmlu,
    synthetic_questions,
)
from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import block_map

LISTS = LabelledLists()


@pytest.mark.parametrize("order", ["ordered", "rotated", "shuffled", "random", "mixed"])
def test_lists(order: str) -> None:
    batch = LISTS.sample(200, order, seed=1)
    again = LISTS.sample(200, order, seed=1)
    assert torch.equal(batch.input_ids, again.input_ids)
    assert not torch.equal(batch.input_ids, LISTS.sample(200, order, seed=2).input_ids)
    asked = batch.input_ids[:, -1]
    at = (batch.input_ids[:, :-1] == asked[:, None]).int()
    assert (at.sum(1) == 1).all()  # the word asked for stands in the list, once
    label = batch.input_ids.gather(1, at.argmax(1, keepdim=True) - 1)[:, 0]
    assert torch.equal(label, batch.right)
    assert batch.answer.bincount(minlength=4).min() > 30
    ordered = (batch.answers == torch.arange(2, 6)).all(1)
    few = {"ordered": 1.0, "rotated": 0.0, "shuffled": 1 / 24, "random": 0.0, "mixed": 0.5}[order]
    assert float(ordered.double().mean()) == pytest.approx(few, abs=0.12)
    if order in ("rotated", "shuffled"):
        assert torch.equal(batch.answers.sort(1).values, torch.arange(2, 6).expand(200, 4))
    ids, labels = LISTS.training(5, torch.Generator().manual_seed(0), order)
    assert ids.shape == (5, 12) and (labels[:, :-1] == -100).all() and torch.equal(labels[:, -1], ids[:, -1])


def test_a_corrupted_list_asks_for_another_word() -> None:
    batch = LISTS.sample(100, "random", seed=3)
    other = LISTS.corrupted(batch, seed=4)
    assert torch.equal(other.input_ids[:, :-1], batch.input_ids[:, :-1])
    assert (other.answer != batch.answer).all() and (other.right != batch.right).all()
    check_pair(batch, other)


def test_a_batch_refuses_what_does_not_fit() -> None:
    batch = LISTS.sample(6, seed=0)
    for changed, message in (
        ({"label_pos": batch.label_pos + 1}, "stands at label_pos"),
        ({"label_pos": batch.label_pos + 9}, "beyond the prompts' 11 tokens"),
        ({"answer": batch.answer + 4}, "expected items 0 to 3"),
        ({"answer": batch.answer[:3]}, r"answer has shape \(3,\)"),
        ({"attention_mask": torch.ones(6, 5)}, "attention_mask has shape"),
        ({"content_span": torch.zeros(6, 4)}, "content_span has shape"),
        ({"answers": batch.answers[:, [0, 0, 2, 3]]}, "a label of its own"),
    ):
        with pytest.raises(InvalidInput, match=message):
            replace(batch, **changed)
    with pytest.raises(InvalidInput, match="no prompt"):
        batch.select(slice(0, 0))
    with pytest.raises(InvalidInput, match="no more than the 3 labels"):
        LabelledLists(n_labels=3)
    with pytest.raises(InvalidInput, match="order='upside'"):
        LISTS.sample(3, "upside")
    with pytest.raises(InvalidInput, match="hand in one for each"):
        check_pair(batch, batch.select(slice(0, 3)))
    assert len(batch.select(batch.answer == batch.answer[0])) == int((batch.answer == batch.answer[0]).sum())


@pytest.mark.parametrize("feature", ["nth_item", "token"])
def test_the_planted_model_answers_every_kind_of_list(feature: str) -> None:
    model = PlantedChoice(LISTS, feature, seed=1)
    for order in ("ordered", "shuffled", "random"):
        batch = LISTS.sample(100, order, seed=5)
        logits = model(batch.input_ids)
        assert (logits[:, -1].argmax(-1) == batch.right).all()
        torch.testing.assert_close(block_map(model).forward(batch.input_ids), logits, atol=1e-9, rtol=0)
    batch = LISTS.sample(50, "random", seed=6)
    for name in model.true_nodes:  # each of its heads is needed
        layer, head = int(name.split(".")[1]), int(name.split(".")[-1])
        broken = block_map(model).forward(
            batch.input_ids,
            edit_z=lambda i, z, at=layer, head=head: z * (torch.arange(z.shape[2]) != head)[:, None] if i == at else z,
        )
        assert (broken[:, -1].argmax(-1) == batch.right).double().mean() < 0.6
    with pytest.raises(InvalidInput, match="feature='colour'"):
        PlantedChoice(LISTS, "colour")


# --------------------------------------------------------------------------------------------------- questions


def tokenizer(merges: tuple[str, ...] = (), spaced: bool = True) -> Any:
    """A byte-level BPE tokenizer in which some strings are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs: list[tuple[str, str]] = []
    for word in merges:
        word = word.replace(" ", "\u0120")
        pairs += [(word[:i], word[i]) for i in range(1, len(word))]
    pairs = list(dict.fromkeys(pairs))
    tokens = ["<pad>", *alphabet, *(a + b for a, b in pairs)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(dict.fromkeys(tokens))}, pairs))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=spaced)
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", clean_up_tokenization_spaces=False)


PLAIN = tokenizer()
QUESTIONS = synthetic_questions(12, seed=1)


@pytest.mark.parametrize("template", ["brackets", "square"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_know_where_labels_and_options_stand(template: str, side: str) -> None:
    prompts = MultipleChoiceSet(QUESTIONS, PLAIN, template=template, padding_side=side)
    batch = prompts.batch
    assert batch.final_pos is not None and batch.content_span is not None and batch.attention_mask is not None
    for i, question in enumerate(QUESTIONS):
        ids = batch.input_ids[i]
        assert PLAIN.decode(ids[batch.attention_mask[i].bool()]) == prompts.texts[i]
        assert [PLAIN.decode([ids[at]]) for at in batch.label_pos[i]] == list("ABCD")
        spans = [PLAIN.decode(ids[a:b]) for a, b in batch.content_span[i].tolist()]
        assert spans == list(question.options)
        assert int(batch.final_pos[i]) == int(batch.attention_mask[i].nonzero().max())
        assert PLAIN.decode([batch.right[i]]) == "ABCD"[question.answer]


def test_mutations_keep_the_question_and_change_the_labels() -> None:
    prompts = MultipleChoiceSet(QUESTIONS, PLAIN)
    for kind in KINDS:
        changed = prompts.mutate(kind, seed=3)
        assert changed.questions == prompts.questions
        assert torch.equal(changed.batch.answer, prompts.batch.answer)
        if kind == "other_separators":
            assert changed.texts != prompts.texts and torch.equal(changed.batch.answers, prompts.batch.answers)
        else:
            assert not torch.equal(changed.batch.answers, prompts.batch.answers)
            assert torch.equal(changed.batch.label_pos, prompts.batch.label_pos)
    assert {tuple(sorted(x)) for x in prompts.mutate("shuffled").label_texts} == {tuple("ABCD")}
    assert all("".join(x) in "ABCDABC" for x in prompts.mutate("rotated").label_texts)
    assert prompts.mutate("digits").label_texts[0] == tuple("1234")
    with pytest.raises(InvalidInput, match="kind='upside'"):
        prompts.mutate("upside")


@pytest.mark.parametrize("kind", ["moved", "other"])
def test_corrupt_prompts_are_of_the_same_length(kind: str) -> None:
    prompts = MultipleChoiceSet(synthetic_questions(200, seed=2)[1::2], PLAIN)
    prompts = prompts.select(prompts.batch.lengths == prompts.batch.lengths.mode().values)
    other = prompts.corrupted(kind, seed=1)
    check_pair(prompts.batch, other.batch)
    if kind == "moved":
        pairs = zip(prompts.questions, other.questions, strict=True)
        assert all(sorted(a.options) == sorted(b.options) and a.text == b.text for a, b in pairs)


def test_a_label_that_splits_or_merges_is_refused_with_a_template_that_works() -> None:
    with pytest.raises(InvalidInput, match=r"' ' \| 'A'.*template='brackets' works"):
        MultipleChoiceSet(QUESTIONS, PLAIN, template="dots")
    merging = tokenizer(("(A", "(B", "(C", "(D", " A", " B", " C", " D"), spaced=False)
    with pytest.raises(InvalidInput, match=r"merges with what stands before it .*template='dots' works"):
        MultipleChoiceSet(QUESTIONS, merging)
    prompts = MultipleChoiceSet(QUESTIONS, merging, template="dots")
    assert prompts.batch.labels is not None  # "A" in the list, " A" after "Answer:"
    assert PLAIN.decode([prompts.batch.labels[0, 1]]) == "B" and merging.decode([prompts.batch.answers[0, 1]]) == " B"
    with pytest.raises(InvalidInput, match=r"'Y' \| 'e' \| 's'"):
        MultipleChoiceSet([Question("?", ("a", "b"), 0)], PLAIN, labels=["Yes", "No"])


def test_bad_sets() -> None:
    for arguments, message in (
        ({"questions": []}, "questions is empty"),
        ({"labels": "ABC"}, "for 4 options"),
        ({"labels": "AABC"}, "each another"),
        ({"labels": [("A", "B", "C", "D")]}, "labels for 1 questions"),
        ({"template": "round"}, "template='round'"),
        ({"padding_side": "up"}, "padding_side='up'"),
        ({"tokenizer": object()}, "fast"),
    ):
        with pytest.raises(InvalidInput, match=message):
            MultipleChoiceSet(**{"questions": QUESTIONS, "tokenizer": PLAIN} | arguments)
    with pytest.raises(InvalidInput, match="answer=3 of 2"):
        Question("?", ("a", "b"), 3)
    with pytest.raises(InvalidInput, match="n_options=9"):
        synthetic_questions(3, n_options=9)


def test_solved_examples_stand_before_the_question() -> None:
    template = ChoiceTemplate(instruction="Choose.\n\n")
    prompts = MultipleChoiceSet(QUESTIONS[2:4], PLAIN, template=template, shots=tuple(QUESTIONS[:2]))
    alone = MultipleChoiceSet(QUESTIONS[2:4], PLAIN, template=template)
    assert prompts.texts[0].startswith("Choose.\n\nWhich") and prompts.texts[0].count("Choose") == 1
    assert prompts.texts[0].endswith(alone.texts[0].removeprefix("Choose.\n\n"))
    assert f"Answer: ({'ABCD'[QUESTIONS[0].answer]})\n\n" in prompts.texts[0]
    assert (prompts.batch.label_pos > alone.batch.label_pos).all()


def test_synthetic_questions_have_one_right_answer() -> None:
    for question in synthetic_questions(60, seed=5):
        assert len(set(question.options)) == 4
        if question.subject == "sums":
            a, b = (int(x) for x in question.text.removeprefix("What is ").removesuffix("?").split(" + "))
            assert [int(x) == a + b for x in question.options].count(True) == 1
            assert int(question.options[question.answer]) == a + b


def test_mmlu_in_all_its_files(tmp_path: Path) -> None:
    rows = [["What, then?", "a", "b, c", "d", "e", "B"], ["Two?", "w", "x", "y", "z", "D"]]
    lines = ['"What, then?",a,"b, c",d,e,B', "Two?,w,x,y,z,D"]
    (tmp_path / "law_test.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "headed.csv").write_text("question,A,B,C,D,answer\n" + "\n".join(lines), encoding="utf-8")
    dicts = [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5]), "subject": "law"} for r in rows]
    (tmp_path / "one.json").write_text(json.dumps(dicts), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, dicts)) + "\n", encoding="utf-8")
    for file in tmp_path.iterdir():
        found = load_mmlu(file)
        assert [(q.text, list(q.options), "ABCD"[q.answer]) for q in found] == [(r[0], r[1:5], r[5]) for r in rows]
    assert len(load_mmlu(tmp_path)) == 8 and len(load_mmlu(tmp_path, ["law"])) == 6
    assert load_mmlu(tmp_path / "law_test.csv")[0].subject == "law"
    with pytest.raises(InvalidInput, match="no question about physics"):
        load_mmlu(tmp_path, ["physics"])
    with pytest.raises(InvalidInput, match="no file and no folder"):
        load_mmlu(tmp_path / "none")
    (tmp_path / "bad.csv").write_text("What?,a,b,c,d,Q\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"bad\.csv, row 1"):
        load_mmlu(tmp_path / "bad.csv")


def test_a_template_keeps_its_name() -> None:
    assert MultipleChoiceSet(QUESTIONS, PLAIN).template == TEMPLATES["brackets"]
    assert isinstance(MultipleChoiceSet(QUESTIONS, PLAIN).batch, ChoiceBatch)
