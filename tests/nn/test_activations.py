"""Streams of activations: the right rows, whatever the padding; nothing computed after them; buffers that shuffle."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import InvalidInput
from broadsheet.nn.activations import (
    ActivationBuffer,
    RowBatches,
    collect_activations,
    stream_activations,
    token_batches,
)
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import capture
from broadsheet.nn.padding import right_padded
from broadsheet.nn.seeding import generator
from broadsheet.nn.tiny_models import tiny_inputs, tiny_model

SITES = ["layers.0.attn.z", "layers.1.mlp.act", "layers.0.resid_post", "layers.1.attn", "layers.0.resid_pre"]


def texts() -> list[list[int]]:
    return [[0, 5, 6, 7, 8], [0, 9], [0, 3, 4, 11], [0, 2, 2]]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "neox-parallel"])
def test_rows_are_those_of_each_text_alone(family: str, site: str) -> None:
    model = tiny_model(family)
    found = collect_activations(model, site, token_batches(texts(), batch_size=3), dtype=torch.float64)
    expected = []
    for ids in texts():
        with capture(model, block_map(model).resolve(site)) as seen, torch.no_grad():
            model(torch.tensor([ids]))
        expected.append(seen[site][0])
    torch.testing.assert_close(found.values, torch.cat(expected), atol=1e-12, rtol=0)
    assert found.token_ids.tolist() == [token for ids in texts() for token in ids]
    assert found.text.tolist() == [i for i, ids in enumerate(texts()) for _ in ids]
    assert found.position.tolist() == [p for ids in texts() for p in range(len(ids))]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_left_padding_gives_the_same_rows() -> None:
    model = tiny_model("gpt2")
    right = list(token_batches(texts(), batch_size=4))
    ids, mask = right[0]
    turned = [len(row) - int(m.sum()) for row, m in zip(ids, mask, strict=True)]
    left_ids = torch.stack([row.roll(by) for row, by in zip(ids, turned, strict=True)])
    left_mask = torch.stack([row.roll(by) for row, by in zip(mask, turned, strict=True)])
    assert not torch.equal(left_mask, mask)
    a = collect_activations(model, "layers.1.mlp", right)
    b = collect_activations(model, "layers.1.mlp", [(left_ids, left_mask)])
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.position, b.position)
    torch.testing.assert_close(a.values, b.values)


def test_the_rest_of_the_model_is_not_run() -> None:
    model = tiny_model("llama")
    called = []
    model.model.layers[1].register_forward_hook(lambda *_: called.append(1))
    collect_activations(model, "layers.0.mlp.act", [tiny_inputs("llama")])
    assert called == []
    collect_activations(model, "layers.1.mlp.act", [tiny_inputs("llama")])
    assert called == []  # stopped inside layer 1, before its end


def test_tokens_can_be_left_out() -> None:
    model = tiny_model("gpt2")
    found = collect_activations(
        model, "layers.0.mlp", token_batches(texts(), batch_size=2), skip_first=True, exclude_tokens=[2, 9]
    )
    assert found.token_ids.tolist() == [5, 6, 7, 8, 3, 4, 11]
    with pytest.raises(InvalidInput, match="no token is left"):
        collect_activations(model, "layers.0.mlp", [torch.tensor([[2, 2]])], exclude_tokens=[2])


def test_a_file_holds_what_memory_would(tmp_path) -> None:
    model = tiny_model("gpt2", torch.float32)
    batches = list(token_batches(texts(), batch_size=2))
    held = collect_activations(model, "layers.0.mlp.act", batches)
    disk = collect_activations(model, "layers.0.mlp.act", batches, path=tmp_path / "acts", max_tokens=100)
    torch.testing.assert_close(disk.values, held.values)
    assert np.load(tmp_path / "acts.npy", mmap_mode="r").shape == (100, 40)
    few = collect_activations(model, "layers.0.mlp.act", batches, max_tokens=6)
    assert torch.equal(few.values, held.values[:6])
    with pytest.raises(InvalidInput, match="max_tokens"):
        collect_activations(model, "layers.0.mlp.act", batches, path=tmp_path / "other")


def test_the_buffer_shuffles_and_loses_nothing() -> None:
    model = tiny_model("gpt2", torch.float32)
    batches = [tiny_inputs("gpt2", 6, seed) for seed in range(3)]
    everything = collect_activations(model, "layers.0.attn.z", batches, skip_first=True).values
    buffer = ActivationBuffer(model, "layers.0.attn.z", batches, batch_size=9, buffer_batches=4, generator=generator(3))
    drawn = list(itertools.islice(buffer, 12))
    assert all(rows.shape == (9, 24) for rows in drawn)
    again = list(itertools.islice(ActivationBuffer(
        model, "layers.0.attn.z", batches, batch_size=9, buffer_batches=4, generator=generator(3)
    ), 12))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    distance = torch.cdist(torch.cat(drawn).double(), everything.double())
    assert distance.min(1).values.max() < 1e-5  # each row is one of the model's
    counts = torch.bincount(distance.argmin(1), minlength=len(everything))
    assert counts.sum() == 108
    assert len(everything) == 108
    assert counts.max() <= 2
    assert (counts > 0).float().mean() > 0.6  # read in turn, not drawn again and again
    order = distance.argmin(1)
    assert (order[1:] - order[:-1] == 1).float().mean() < 0.2


def test_the_buffer_s_input_has_to_last() -> None:
    model = tiny_model("gpt2")
    once = iter([tiny_inputs("gpt2")])
    with pytest.raises(InvalidInput, match="an iterator that has ended"):
        list(itertools.islice(ActivationBuffer(model, "layers.0.mlp", once, batch_size=4, buffer_batches=2), 9))
    fresh = ActivationBuffer(model, "layers.0.mlp", lambda: iter([tiny_inputs("gpt2")]), batch_size=4, buffer_batches=2)
    assert len(list(itertools.islice(fresh, 9))) == 9


def test_what_overflows_is_named() -> None:
    model = tiny_model("gpt2", torch.float32)
    weight = model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight[:, 3:5] = torch.tensor([3e38, -3e38])
    with pytest.raises(InvalidInput, match=r"layers.0.mlp.act: activations of text 0, token \d+ are not finite"):
        collect_activations(model, "layers.0.mlp.act", [tiny_inputs("gpt2")])


def test_texts_are_tokenized() -> None:
    tokenizer = TopicCorpus().tokenizer()
    ((ids, mask),) = token_batches(["dog cat the", "judge"], tokenizer)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokenizer.decode(ids[0]) == "<bos> dog cat the"
    assert ids[1, 2:].tolist() == [tokenizer.pad_token_id] * 2
    ((short, _),) = token_batches(["dog cat the"], tokenizer, max_length=3)
    assert short.shape == (1, 3)
    with pytest.raises(InvalidInput, match="text 1 is empty"):
        list(token_batches(["dog", " "], tokenizer))
    with pytest.raises(InvalidInput, match="tokenizer"):
        list(token_batches(["dog"]))


def test_moved_rows_come_back() -> None:
    ids = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9], [6, 7, 8, 2]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    padded = right_padded(ids, mask)
    assert padded.input_ids.tolist() == [[1, 2, 9, 9], [3, 4, 5, 9], [6, 7, 8, 2]]
    assert padded.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded.last.tolist() == [1, 2, 3]
    assert torch.equal(padded.restore(padded.input_ids), ids)
    assert right_padded(ids).last.tolist() == [3, 3, 3]
    for bad, word in ((mask[:, :3], "shape"), (torch.tensor([[1, 0, 1, 1]]), "hole"), (mask[:1] * 0, "nothing but")):
        with pytest.raises(InvalidInput, match=word):
            right_padded(ids[: len(bad)], bad)


class Unmapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_model_without_a_map_is_refused() -> None:
    with pytest.raises(TypeError, match="register_block_map"):
        list(stream_activations(Unmapped(), "layers.0.mlp", [torch.zeros(1, 2)]))


def test_row_batches_hold_every_row_once_in_another_order_each_time():
    rows = torch.arange(10.0)[:, None]
    batches = RowBatches(rows, 5, generator(0))
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 2
    assert sorted(torch.cat(first).flatten().tolist()) == list(range(10))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert [len(part) for part in RowBatches(rows, 4)] == [4, 4]
    again = RowBatches(rows, 5, generator(0))
    assert torch.equal(torch.cat(list(again)), torch.cat(first))
    for wrong in (0, 11):
        with pytest.raises(InvalidInput, match=f"batch_size={wrong}"):
            RowBatches(rows, wrong)
