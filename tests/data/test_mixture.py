"""The mixture's labels are those of its texts."""

import pytest
import torch

from broadsheet.data.mixture import BRACKETS, TASKS, TaskMixture
from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator


def test_labels_are_those_of_the_texts():
    mixture = TaskMixture(n_words=18, length=48)
    found = mixture.sample(200, generator(0))
    ids = found.input_ids
    assert ids.shape == (200, 48) and (ids[:, 0] == 0).all()
    assert int(ids.max()) == mixture.vocab_size - 1 and ((ids[:, 1:] >= 3).all())
    following = torch.cat([ids[:, 1:], torch.full((200, 1), -1)], 1)[:, :-1]
    source, task = found.source[:, :-1], found.task[:, :-1]
    rows, columns = (source >= 0).nonzero(as_tuple=True)
    # The next token is the one that stood at the source, and the source is earlier.
    assert (ids[rows, source[rows, columns]] == following[rows, columns]).all()
    assert (source[rows, columns] <= columns).all()
    assert ((source >= 0) == ((task == 0) | (task == 3))).all()
    induction = (task == 0).nonzero(as_tuple=True)
    assert (ids[induction[0], source[induction] - 1] == ids[induction]).all()  # the token before the source is this one
    double = task == 1
    assert (ids[:, :-1][double] == following[double]).all()
    inside = found.bracket[:, :-1] >= 0
    assert ((task == 2) == inside).all()
    kind = found.bracket[:, :-1][inside]
    after = following[inside]
    word = after >= mixture.first_word
    assert ((after[word] - mixture.first_word) % 3 == kind[word]).all()
    assert (after[~word] == 4 + 2 * kind[~word]).all()
    assert all((task == k).sum() > 500 for k in range(len(TASKS)))


def test_the_same_seed_gives_the_same_texts_and_words_are_a_vocabulary():
    mixture = TaskMixture()
    assert torch.equal(mixture.sample(5, generator(1)).input_ids, mixture.sample(5, generator(1)).input_ids)
    assert not torch.equal(mixture.sample(5, generator(1)).input_ids, mixture.sample(5, generator(2)).input_ids)
    assert len(set(mixture.words)) == mixture.vocab_size
    ids = mixture.sample(1, generator(0)).input_ids[0].tolist()
    tokenizer = mixture.tokenizer()
    assert tokenizer(tokenizer.decode(ids[1:]))["input_ids"] == ids
    assert len(BRACKETS) == 3


def test_bad_input():
    for how in ({"n_words": 10}, {"n_words": 6}, {"n_words": 99}, {"length": 5}):
        with pytest.raises(InvalidInput, match=next(iter(how))):
            TaskMixture(**how)
