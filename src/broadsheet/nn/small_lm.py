"""Small language models of Hugging Face's architectures, trained on the spot: a subject whose training is known.

They are ordinary ``transformers`` models, so whatever works on them works on a model from the hub.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import TrainingReport, cosine_schedule, fit

KINDS = ("gpt2", "gpt_neox", "llama")
IGNORED = -100  # a label that does not count


def small_language_model(
    vocab_size: int,
    *,
    kind: str = "llama",
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    hidden: int | None = None,
    length: int = 64,
    tied: bool = False,
    seed: int = 0,
    **config: Any,
) -> nn.Module:
    """A decoder with random weights, in evaluation mode.

    Args:
        vocab_size: tokens.
        kind: ``"gpt2"`` (learned positions, LayerNorm, plain MLP), ``"gpt_neox"`` (rotary, parallel branches) or
            ``"llama"`` (rotary, RMSNorm, gated MLP).
        width: of the residual stream.
        layers, heads: how many.
        hidden: units of the MLP; None for four times the width.
        length: positions at most.
        tied: the head is the embedding's transpose.
        seed: of the weights.
        **config: further entries of the model's Hugging Face configuration.
    """
    import transformers

    if kind not in KINDS:
        raise InvalidInput(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if width % heads:
        raise InvalidInput(f"width={width}, heads={heads}: the width has to be a multiple of the heads")
    common: dict[str, Any] = {"vocab_size": vocab_size, "tie_word_embeddings": tied, "bos_token_id": 0}
    common |= {"eos_token_id": None, "pad_token_id": None, "use_cache": True}
    if kind == "gpt2":
        common |= {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": hidden, "n_positions": length}
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        made: Any = transformers.GPT2Config(**(common | config))
        build: Any = transformers.GPT2LMHeadModel
    else:
        common |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        common |= {"intermediate_size": hidden or 4 * width, "max_position_embeddings": length}
        if kind == "llama":
            made = transformers.LlamaConfig(**(common | config))
            build = transformers.LlamaForCausalLM
        else:
            made = transformers.GPTNeoXConfig(**(common | config))
            build = transformers.GPTNeoXForCausalLM
    with seeded(seed):
        return build(made).eval()


@dataclass(frozen=True)
class _Batches:
    """Fresh batches without end, the same for the same seed."""

    sample: Callable[[int, torch.Generator], Any]
    batch: int
    random: torch.Generator
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = self.sample(self.batch, self.random)
            ids, labels = drawn if isinstance(drawn, tuple) else (drawn, drawn)
            yield ids.to(self.device), labels.to(self.device)


def language_model_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token, nats.

    Args:
        model: a causal language model.
        batch: ids ``[batch, time]`` and labels of the same shape; a label of -100 does not count. Labels stand at
            their token's own position, as in ``transformers``.
    """
    ids, labels = batch
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train_language_model(
    model: nn.Module,
    sample: Callable[[int, torch.Generator], Int[Tensor, "batch time"] | tuple[Tensor, Tensor]],
    *,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 0.01,
    warmup: int = 50,
    seed: int = 0,
    loss_fn: Callable[[Any, Any], Tensor] = language_model_loss,
    progress: Progress = SILENT,
    description: str = "language model",
    **how: Any,
) -> TrainingReport:
    """Train a causal language model on fresh batches: AdamW, warm-up, cosine decay, gradients clipped to norm 1.

    Args:
        model: trained in place, left in evaluation mode.
        sample: ``(batch, generator) -> ids [batch, time]``, or ids and labels, of which -100 do not count.
        steps, batch: optimizer steps and texts in each.
        lr: at its highest.
        weight_decay, warmup: of the optimizer; steps of linear warm-up.
        seed: of the batches.
        loss_fn: ``(model, (ids, labels)) -> loss``.
        progress, description: what the training is called where it is shown.
        **how: handed to :func:`broadsheet.nn.training.fit` (``checkpoint``, ``mixed_precision``, ...).

    Returns:
        the report of the training, with all losses.
    """
    device = next(model.parameters()).device
    random = generator(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    scheduler = cosine_schedule(optimizer, steps, min(warmup, steps // 2), final=0.1)
    with seeded(seed):
        report = fit(
            model,
            loss_fn,
            _Batches(sample, batch, random, device),
            steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            clip_norm=1.0,
            generators=[random, *how.pop("generators", ())],
            progress=progress,
            description=description,
            **how,
        )
    model.eval()
    return report
