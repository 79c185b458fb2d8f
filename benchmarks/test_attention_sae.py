"""Training throughput against SAELens and dictionary-learning, and direct feature attribution against the plain way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from broadsheet.interpretability.attention_sae import AttentionSAE, dfa
from broadsheet.interpretability.attention_sae.direct import head_inputs
from broadsheet.nn.blocks import block_map
from broadsheet.nn.padding import right_padded
from broadsheet.nn.seeding import generator, seeded

# Heads, features of a head, entries of the dictionary, rows of a batch, steps.
SIZES = [(4, 16, 512, 1024, 60), (12, 64, 3072, 1024, 12), (12, 64, 6144, 2048, 6)]
TRAIN = pytest.mark.benchmark(group="attention-sae: training steps")
EVERY = pytest.mark.parametrize("size", SIZES, ids=str)
DFA = pytest.mark.benchmark(group="attention-sae: attribution by head and source")
LENGTHS = pytest.mark.parametrize("length", [64, 256], ids=str)


class Rows:
    """The same few batches over and over."""

    def __init__(self, size: tuple[int, ...]) -> None:
        heads, d_head, _, batch, _ = size
        self.batches = [torch.randn(batch, heads * d_head, generator=generator(i)) for i in range(4)]

    def __iter__(self) -> Any:
        while True:
            yield from self.batches


@TRAIN
@EVERY
def test_ours(benchmark: Any, size: tuple[int, ...]) -> None:
    heads, d_head, n_features, _, steps = size
    rows = Rows(size)

    def work() -> None:
        AttentionSAE(heads, d_head, n_features, scale=1.0).fit(rows, steps=steps, l1=1.0, lr=1e-3, warmup=1)

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


@TRAIN
@EVERY
def test_saelens(benchmark: Any, size: tuple[int, ...]) -> None:
    lens = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    heads, d_head, n_features, batch, steps = size
    rows = Rows(size)

    def work() -> None:
        config = lens.StandardTrainingSAEConfig(d_in=heads * d_head, d_sae=n_features, l1_coefficient=1.0)
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * batch, train_batch_size_samples=batch, lr=1e-3, lr_end=1e-3,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            lens.StandardTrainingSAE(config), iter(rows),
        )  # fmt: skip
        trainer.fit()

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


@TRAIN
@EVERY
def test_dictionary_learning(benchmark: Any, size: tuple[int, ...]) -> None:
    pytest.importorskip("dictionary_learning", reason="the peer dictionary_learning is not installed")
    from dictionary_learning.trainers.standard import StandardTrainer

    heads, d_head, n_features, _, steps = size
    rows = Rows(size)

    def work() -> None:
        trainer = StandardTrainer(
            steps=steps, activation_dim=heads * d_head, dict_size=n_features, layer=0, lm_name="none", l1_penalty=1.0,
            lr=1e-3, warmup_steps=1, sparsity_warmup_steps=None, device="cpu",
        )  # fmt: skip
        for step, x in zip(range(steps), rows, strict=False):
            trainer.update(step, x)

    benchmark.pedantic(work, rounds=3, warmup_rounds=1)


def setting(length: int) -> tuple[Any, AttentionSAE, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_embd=256, n_layer=2, n_head=8, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    with seeded(0):
        model = GPT2LMHeadModel(config).eval()
        ids = torch.randint(256, (4, length))
    return model, AttentionSAE.for_layer(model, 1, 1024, scale=1.0), ids


@DFA
@LENGTHS
def test_ours_attribution(benchmark: Any, length: int) -> None:
    model, sae, ids = setting(length)
    benchmark.pedantic(lambda: dfa(model, sae, ids, 7, length - 1), rounds=5, warmup_rounds=1)


@DFA
@LENGTHS
def test_every_weighted_value(benchmark: Any, length: int) -> None:
    """Pattern times value for all pairs of positions first, projected afterwards, as the released code does."""
    model, sae, ids = setting(length)
    the_map = block_map(model)

    def work() -> Tensor:
        pattern, v, _ = head_inputs(the_map, right_padded(ids), 1)
        every = pattern.permute(0, 2, 3, 1)[..., None] * v[:, None]  # [batch, time, source, head, d]
        return torch.einsum("btshd,hd->bths", every, sae.readers[7])[:, -1]

    benchmark.pedantic(work, rounds=5, warmup_rounds=1)
