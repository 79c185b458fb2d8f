"""The experiment measures every claim, and its full path runs on a tiny model from disk."""

import pytest
import torch

from broadsheet.diagrams.neural_circuit_diagrams.operator_graph import rebuild, recorded
from broadsheet.errors import DataMissing
from broadsheet.experiments import neural_circuit_diagrams as experiment
from broadsheet.lab import Context
from broadsheet.lab.testing import trial

pytest.importorskip("transformers")


def test_small_measures_every_claim_and_draws():
    context, record, plates = trial("neural-circuit-diagrams", seed=1)
    assert [p.name for p in plates][-1] == "rebuilt" and len(plates) == 15
    assert all(p.caption and p.figure.axes for p in plates)
    assert context.measured["diagram-runs"][0] == 1.0
    assert context.measured["rebuilt-from-drawing"][0] == 1.0
    assert context.measured["cost-is-counted-cost"][0] == 0.0
    # The rival is no straw man: where shapes say all, it rebuilds the program.
    assert record["graph"]["digit-mlp"] and not record["graph"]["scaled-attention"]


def test_the_operator_graph_of_a_chain_is_enough():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert torch.equal(rebuild(recorded(model, (x,)), (x,)), model(x))


def test_full_path_on_a_tiny_model_from_disk(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    context = Context.for_tests("neural-circuit-diagrams", 0, tmp_path, "full")
    with pytest.raises(DataMissing, match=r"config\.json"):
        experiment.run(context)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(context.data_dir / "model")
    record = experiment.run(context)
    assert context.measured["published-model-runs"][0] < 1e-4
    assert record["published"]["steps"] > 50
