"""Digits and the small classifiers on them."""

import pytest
import torch

from broadsheet.data.digits import load_digits_split
from broadsheet.errors import InvalidInput
from broadsheet.nn.small_classifiers import accuracy, mlp, small_cnn, train_classifier


def test_digits_are_split_by_class_and_made_imbalanced():
    digits = load_digits_split(seed=1)
    assert len(digits.x) == 1300 and len(digits.x_test) == 497
    assert (float(digits.x.min()), float(digits.x.max())) == (0, 1)
    shares = torch.bincount(digits.y) / 1300 - torch.bincount(digits.y_test) / 497
    assert float(shares.abs().max()) < 0.003
    few = load_digits_split(seed=1, counts=[50, 20, 5])
    assert torch.bincount(few.y).tolist() == [50, 20, 5]
    assert set(few.y_test.tolist()) == {0, 1, 2}
    assert few.flat().x.shape == (75, 64)
    with pytest.raises(InvalidInput, match="at most"):
        load_digits_split(counts=[500, 20])


def test_the_network_learns_and_is_the_same_for_the_same_seed():
    digits = load_digits_split()
    before = torch.get_rng_state()
    models = [small_cnn((16, 16, 16), 32, seed=3) for _ in range(2)]
    assert accuracy(models[0], digits.x_test, digits.y_test) < 0.4
    for model in models:
        train_classifier(model, digits.x, digits.y, epochs=6, lr=5e-3, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert accuracy(models[0], digits.x_test, digits.y_test) > 0.85
    assert torch.equal(models[0](digits.x_test), models[1](digits.x_test))
    assert not models[0].training
    assert [name for name, _ in models[0].named_children()] == [
        "conv1",
        "conv2",
        "pool2",
        "conv3",
        "flat",
        "fc",
        "head",
    ]


def test_a_network_for_colours_with_norms_that_is_halved_where_asked():
    model = small_cnn((4, 6, 8), 10, 5, size=32, in_channels=3, halve=(1, 3), norm=True)
    names = [name for name, _ in model.named_children()]
    assert names == ["conv1", "pool1", "conv2", "conv3", "pool3", "flat", "fc", "head"]
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 3
    assert model.fc[0].in_features == 8 * 8 * 8
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_dense_layers():
    model = mlp([64, 16, 10], torch.nn.GELU)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert isinstance(mlp([4, 3], last=True)[-1], torch.nn.ReLU)
    with pytest.raises(InvalidInput, match="at least"):
        mlp([4])
    with pytest.raises(InvalidInput, match="one label"):
        train_classifier(model, torch.zeros(2, 64), torch.zeros(3, dtype=torch.long), epochs=1)
