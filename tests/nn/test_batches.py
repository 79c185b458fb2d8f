"""Batches of every kind become calls of a model; layers' outputs become samples of units."""

import pytest
import torch
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.batches import by_position, class_labels, model_inputs, unit_samples
from broadsheet.nn.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT_IDS = torch.tensor([[5, 6, 7, 8], [1, 1, 9, 10]])
LEFT_MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def test_labels_are_left_out():
    x, y = torch.randn(3, 1, 8, 8), torch.arange(3)
    for batch in (x, (x,), (x, y), [x, y]):
        given = model_inputs(batch)
        assert given.args[0] is x and len(given.args) == 1
        assert given.n == 3
        assert given.mask is None
    given = model_inputs({"input_ids": IDS, "attention_mask": MASK, "labels": IDS})
    assert set(given.kwargs) == {"input_ids", "attention_mask"}
    assert set(model_inputs(({"pixel_values": x}, y)).kwargs) == {"pixel_values"}
    assert model_inputs(({"pixel_values": x, "label": y}, y)).n == 3


def test_labels_of_a_language_model_are_no_mask():
    targets = torch.tensor([[6, 7, 8, 2], [10, -100, -100, -100]])
    given = model_inputs((IDS, targets))
    assert given.kwargs == {} and given.mask is None
    assert torch.equal(model_inputs((IDS, MASK)).mask, MASK.bool())


def test_images_stay_with_whole_number_labels_of_their_shape():
    x = torch.rand(2, 4)
    assert model_inputs((x, torch.ones(2, 4))).args[0] is x
    assert model_inputs((x, torch.ones(2, 4))).mask is None


def test_padding_on_the_left_is_moved_with_everything_beside_it():
    kinds = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]])
    given = model_inputs({"input_ids": LEFT_IDS, "attention_mask": LEFT_MASK, "token_type_ids": kinds, "labels": IDS})
    assert torch.equal(given.kwargs["input_ids"], IDS)
    assert torch.equal(given.kwargs["attention_mask"], MASK)
    assert given.kwargs["token_type_ids"][1, :2].tolist() == [1, 0]
    assert torch.equal(given.mask, MASK.bool())
    positions = {"input_ids": LEFT_IDS, "attention_mask": LEFT_MASK, "position_ids": LEFT_IDS}
    assert "position_ids" not in model_inputs(positions).kwargs


def test_a_model_gives_the_same_tokens_for_either_side():
    model = tiny_model("gpt2").transformer
    found = []
    for batch in ((IDS, MASK), {"input_ids": LEFT_IDS, "attention_mask": LEFT_MASK}, [LEFT_IDS, LEFT_MASK]):
        given = model_inputs(batch).to("cpu")
        with torch.no_grad():
            found.append(unit_samples(given.call(model).last_hidden_state, given.mask))
    assert found[0].shape == (6, 24)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_what_is_no_batch():
    with pytest.raises(InvalidInput, match="is a str"):
        model_inputs("words")
    with pytest.raises(InvalidInput, match="begins with a str"):
        model_inputs(("words", torch.ones(1)))
    with pytest.raises(InvalidInput, match="no tensor"):
        _ = model_inputs({"names": ["a"]}).n


def test_every_position_is_a_sample():
    maps = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    rows = unit_samples(maps)
    assert rows.shape == (8, 3)
    assert torch.equal(rows[5], maps[1, :, 0, 1])
    assert torch.equal(by_position(maps)[1, 1], maps[1, :, 0, 1])
    assert by_position(torch.randn(2, 6)).shape == (2, 1, 6)
    last = unit_samples(maps.movedim(1, -1), channels="last")
    assert torch.equal(last, rows)
    assert torch.equal(unit_samples(maps, places=torch.tensor([3, 0]))[2], maps[1, :, 1, 1])
    video = torch.randn(2, 5, 3, 2, 2)
    assert torch.equal(unit_samples(video)[12 + 7], video[1, :, 1, 1, 1])
    tokens = torch.randn(2, 4, 6)
    assert torch.equal(unit_samples(tokens, MASK), tokens[MASK.bool()])
    assert torch.equal(unit_samples(tokens, MASK, places=torch.tensor([0, 2])), tokens[[0, 0, 1], [0, 2, 0]])
    assert unit_samples(tokens, channels="first").shape == (12, 4)
    assert unit_samples(torch.randn(2, 6), MASK).shape == (2, 6)
    assert unit_samples(torch.randn(2, 7, 6), MASK).shape == (14, 6)  # patches, not the masked tokens


def test_what_has_no_units():
    for bad in (torch.randn(4), torch.ones(3, 2, dtype=torch.long)):
        with pytest.raises(InvalidInput, match="expected floating numbers"):
            unit_samples(bad)
    with pytest.raises(InvalidInput, match="'auto', 'first' or 'last'"):
        unit_samples(torch.randn(2, 2), channels="middle")
    with pytest.raises(InvalidInput, match="there are 4 positions"):
        unit_samples(torch.randn(1, 2, 2, 2), places=torch.tensor([4]))


def test_a_loader_of_torch_is_understood():
    data = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.arange(5))
    model = nn.Linear(3, 2)
    outputs = [model_inputs(batch).call(model) for batch in torch.utils.data.DataLoader(data, batch_size=2)]
    assert [len(output) for output in outputs] == [2, 2, 1]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
        ((torch.zeros(3, 2), [2, 0, 1]), [2, 0, 1]),
        ((torch.zeros(3, 2), torch.eye(3)[[2, 0, 1]]), [2, 0, 1]),
        ({"input_ids": torch.zeros(3, 2), "labels": torch.tensor([2, 0, 1])}, [2, 0, 1]),
        ({"input_ids": torch.zeros(3, 2), "label": torch.tensor([2, 0, 1])}, [2, 0, 1]),
        ((torch.zeros(3, 2), torch.rand(3)), None),  # a regression
        ((torch.ones(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.long)), None),  # ids and their mask
        (torch.zeros(3, 2), None),
        ({"input_ids": torch.zeros(3, 2)}, None),
    ],
)
def test_classes_of_a_batch(batch, expected):
    found = class_labels(batch)
    assert (found is None) if expected is None else (found.tolist() == expected and found.dtype == torch.long)
