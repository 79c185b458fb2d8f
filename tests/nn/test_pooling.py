"""One vector for each sample: tokens without their padding, maps, and what Hugging Face models give."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from broadsheet.errors import InvalidInput
from broadsheet.nn.pooling import pooled

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: BaseModelOutput(last_hidden_state=x)])
def test_padding_on_either_side_does_not_count(how, wrap):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = pooled(wrap(x), how, MASK)
    for i, row in enumerate(MASK.bool()):
        tokens = x[i][row]
        expected = {"mean": tokens.mean(0), "first": tokens[0], "last": tokens[-1]}[how]
        torch.testing.assert_close(found[i], expected)


def test_maps_vectors_and_functions():
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pooled(maps, "mean"), maps.mean((2, 3)))
    assert pooled(maps, "flatten").shape == (2, 60)
    torch.testing.assert_close(pooled(maps, lambda z, mask: z[:, :, 0, 0]), maps[:, :, 0, 0])
    vectors = maps[:, :, 0, 0]
    assert pooled(vectors, None) is vectors


def test_a_pooled_output_stays_as_it_is():
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pooled(vectors, "mean", MASK), vectors)


@pytest.mark.parametrize(
    ("output", "how", "word"),
    [
        (torch.zeros(2, 3, 4), None, r"\(2, 3, 4\).*pool="),
        (torch.zeros(2, 3, 4), "max", "pool='max'"),
        (torch.zeros(2, 3, 4, 5, 6), "mean", r"\(2, 3, 4, 5, 6\)"),
        (("text",), "mean", "without a tensor"),
        (torch.zeros(2, 3, 4), lambda z, mask: z, "pool="),
    ],
)
def test_bad_outputs(output, how, word):
    with pytest.raises(InvalidInput, match=word):
        pooled(output, how)
