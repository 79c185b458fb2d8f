"""The attack stays inside its ball and is exact for a linear model; training against it helps."""

import pytest
import torch
from torch import nn

from broadsheet.data.digits import load_digits_split
from broadsheet.errors import InvalidInput
from broadsheet.nn.adversarial import AdversarialLoss, pgd_attack
from broadsheet.nn.small_classifiers import accuracy, mlp, train_classifier


def test_the_attack_on_a_linear_model_is_the_known_one():
    model = nn.Linear(6, 2).double().train()
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    moved = pgd_attack(model, x, y, 0.1, 8)
    away = (model.weight[1] - model.weight[0]).sign() * torch.where(y == 0, 1, -1)[:, None]
    torch.testing.assert_close(moved, (x + 0.1 * away).clamp(0, 1))
    assert model.training
    free = pgd_attack(model, x, y, 0.1, 8, box=None)
    torch.testing.assert_close(free, x + 0.1 * away)
    with pytest.raises(InvalidInput, match="eps=0"):
        pgd_attack(model, x, y, 0.0)


def test_a_random_start_stays_inside():
    model, x = mlp([9, 8, 3]), torch.rand(20, 9)
    start = torch.Generator().manual_seed(0)
    moved = pgd_attack(model, x, torch.zeros(20, dtype=torch.long), 0.05, 3, generator=start)
    assert float((moved - x).abs().max()) <= 0.05 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1


def test_training_against_it_makes_a_network_harder_to_move():
    digits = load_digits_split(0)
    robust = []
    for loss in (None, AdversarialLoss(0.1, 3)):
        model = mlp([64, 48, 10], seed=1)
        how = {} if loss is None else {"loss_fn": loss}
        train_classifier(model, digits.x, digits.y, epochs=6, lr=3e-3, **how)
        attacked = pgd_attack(model, digits.x_test, digits.y_test, 0.1, 8)
        robust.append(accuracy(model, attacked, digits.y_test))
    assert robust[1] > robust[0] + 0.1
