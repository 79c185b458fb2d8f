"""Weights drawn anew: like the constructor's, apart from the model's, and the same for a seed."""

import pytest
import torch
from torch import nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.small_classifiers import small_cnn
from broadsheet.nn.tiny_models import FAMILIES, tiny_inputs, tiny_model
from broadsheet.nn.untrained import untrained_copy


def test_a_sequential_is_what_its_constructor_makes():
    trained = small_cnn(seed=0).train()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(3)
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    fresh, state = untrained_copy(trained, seed=5), torch.get_rng_state()
    for (name, weight), (_, made) in zip(fresh.named_parameters(), small_cnn(seed=5).named_parameters(), strict=True):
        assert torch.equal(weight, made), name
    assert not fresh.training and trained.training
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(untrained_copy(trained, seed=6)[0][0].weight, fresh[0][0].weight)


def test_running_statistics_and_attention_start_anew():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).double()
    model[0](torch.randn(50, 8, dtype=torch.float64) + 4)
    fresh = untrained_copy(model)
    assert float(model[0].running_mean.mean()) > 0.3
    assert not fresh[0].running_mean.any()
    assert fresh[1].self_attn.in_proj_weight.dtype == torch.float64
    assert not torch.equal(fresh[1].self_attn.in_proj_weight, model[1].self_attn.in_proj_weight)


@pytest.mark.parametrize("family", [name for name in ("gpt2", "llama", "bert", "vit") if name in FAMILIES])
def test_hugging_face_models_are_made_from_their_configuration(family):
    model = tiny_model(family)
    fresh, again = untrained_copy(model, 1), untrained_copy(model, 1)
    inputs = tiny_inputs(family)
    with torch.no_grad():
        one, two, old = (m(inputs)[0] for m in (fresh, again, model))
    assert torch.equal(one, two)
    assert one.dtype == old.dtype and one.shape == old.shape
    assert not torch.allclose(one, old)
    assert not fresh.training


def test_weights_that_nobody_knows_how_to_draw():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(InvalidInput, match="0 has weights but no reset_parameters"):
        untrained_copy(nn.Sequential(Own(), nn.Linear(3, 3)))
    assert isinstance(untrained_copy(nn.ReLU()), nn.ReLU)
