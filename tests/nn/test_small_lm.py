"""Small language models learn what their text holds, the same for the same seed; topic texts are what they say."""

import math

import pytest
import torch

from broadsheet.data.language import COMMON, TOPICS, TopicCorpus, word_tokenizer
from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import block_map
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import KINDS, language_model_loss, small_language_model, train_language_model


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_mapped_and_seeded(kind: str) -> None:
    model = small_language_model(20, kind=kind, width=16, layers=1, heads=2, length=8, seed=3)
    ids = torch.randint(20, (2, 8), generator=generator(0))
    with torch.no_grad():
        torch.testing.assert_close(block_map(model).forward(ids), model(ids).logits, atol=1e-5, rtol=1e-5)
    again = small_language_model(20, kind=kind, width=16, layers=1, heads=2, length=8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    tied = small_language_model(20, kind=kind, width=16, layers=1, heads=2, tied=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    with pytest.raises(InvalidInput, match="kind='bert'"):
        small_language_model(20, kind="bert")
    with pytest.raises(InvalidInput, match="multiple"):
        small_language_model(20, width=10, heads=3)


def test_training_learns_the_frequencies() -> None:
    """Independent words: the best that can be learned is their entropy."""
    chances = torch.tensor([0.5, 0.25, 0.125, 0.125])

    def sample(n: int, draw: torch.Generator) -> torch.Tensor:
        return torch.multinomial(chances, n * 6, replacement=True, generator=draw).view(n, 6)

    losses = []
    for seed in (0, 0, 1):
        model = small_language_model(4, width=8, layers=1, heads=2, length=6)
        losses.append(train_language_model(model, sample, steps=150, batch=64, seed=seed).losses)
        assert not model.training
    assert losses[0] == losses[1] != losses[2]
    best = -float((chances * chances.log()).sum())
    assert sum(losses[0][-30:]) / 30 == pytest.approx(best, abs=0.03)


def test_labels_that_do_not_count() -> None:
    model = small_language_model(5, width=8, layers=1, heads=2, length=6)
    ids = torch.randint(5, (3, 6), generator=generator(0))
    whole = language_model_loss(model, (ids, ids))
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    expected = -torch.stack([logits[:, i, :].gather(1, ids[:, i + 1 : i + 2]) for i in range(5)]).mean()
    torch.testing.assert_close(whole.detach(), expected)
    labels = torch.full_like(ids, -100)
    labels[:, 3] = ids[:, 3]
    torch.testing.assert_close(
        language_model_loss(model, (ids, labels)).detach(), -logits[:, 2, :].gather(1, ids[:, 3:4]).mean()
    )


def test_topic_texts_are_about_their_topics() -> None:
    corpus = TopicCorpus(8, 6, 16, topical=0.6)
    assert corpus.vocab_size == len(corpus.words) == 3 + 16 + 48
    assert corpus.names == (*list(TOPICS)[:4], *list(TOPICS)[8:12])
    ids, topics = corpus.sample(400, 21, generator(0))
    assert (ids[:, 0] == 0).all()
    of = corpus.topic_of[ids[:, 1:]]
    assert ((of == -1) | (of == topics[:, None])).all()
    assert float((of >= 0).float().mean()) == pytest.approx(0.6, abs=0.02)
    assert corpus.words[int(corpus.topic_tokens[0, 0])] == "dog"
    assert torch.equal(corpus.groups, torch.tensor([0] * 4 + [1] * 4))
    mixed, about = TopicCorpus(8, 6, 16, topical=0.6, related=0.5).sample(400, 21, generator(0))
    of = corpus.topic_of[mixed[:, 1:]]
    group = corpus.groups
    assert (group[of[of >= 0]] == group[about[:, None].expand_as(of)[of >= 0]]).all()
    own = (of == about[:, None])[of >= 0].float().mean()
    assert float(own) == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    weights = torch.tensor([1.0] + [0.0] * 7)
    assert (corpus.sample(9, 4, generator(0), weights=weights)[1] == 0).all()
    assert torch.equal(corpus.sample(2, 4, generator(0), topics=torch.tensor([3, 5]))[1], torch.tensor([3, 5]))


def test_all_words_are_different() -> None:
    words = TopicCorpus().words
    assert len(set(words)) == len(words) == 3 + 32 + 128
    assert all(len(words) == 8 for words in TOPICS.values())
    assert len(COMMON) == 32


def test_the_tokenizer_is_one() -> None:
    corpus = TopicCorpus()
    tokenizer = corpus.tokenizer()
    ids = corpus.sample(3, 9, generator(1))[0]
    for row in ids:
        assert tokenizer(corpus.text(row[1:]))["input_ids"] == row.tolist()
    assert tokenizer("dog zebra")["input_ids"][-1] == tokenizer.unk_token_id
    assert tokenizer.vocab_size == corpus.vocab_size
    with pytest.raises(InvalidInput, match="<pad>"):
        word_tokenizer(["<bos>", "<unk>"])


def test_bad_corpora() -> None:
    for bad in ({"n_topics": 17}, {"words_per_topic": 0}, {"topical": 1.5}):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            TopicCorpus(**bad)
    with pytest.raises(InvalidInput, match="length=1"):
        TopicCorpus().sample(2, 1)
    assert math.isfinite(TopicCorpus(2, 1, 1).vocab_size)
