"""The prior p(d): how likely a description is when nobody has looked at the unit (a two-layer LSTM)."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.text import Vocabulary
from broadsheet.nn.early_stopping import BestWeights
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator, seeded


class SentenceLM(nn.Module, PyTorchModelHubMixin):
    """A language model of descriptions.

    Args:
        words: of the vocabulary, the special ones first (:class:`Vocabulary`).
        embedding: width of the words' vectors.
        hidden: width of the LSTM.
        layers: of the LSTM.
        dropout: between the layers and before the output.
        length: words of a sentence at most.
        seed: of the initial weights.
    """

    def __init__(
        self,
        words: Sequence[str],
        embedding: int = 128,
        hidden: int = 512,
        layers: int = 2,
        dropout: float = 0.5,
        length: int = 15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary, self.length = Vocabulary(tuple(words)), length
        with seeded(seed):
            self.embedding = nn.Embedding(len(words), embedding)
            self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
            self.dropout = nn.Dropout(dropout)
            self.output = nn.Linear(hidden, len(words))

    def forward(self, tokens: Int[Tensor, "n time"]) -> Float[Tensor, "n time vocab"]:
        """Log-probability of every word at every place, given the words before it.

        Args:
            tokens: as :meth:`Vocabulary.encode` gives them.
        """
        hidden, _ = self.lstm(self.embedding(started(tokens, self.vocabulary.start)))
        return self.output(self.dropout(hidden)).log_softmax(-1)

    def step(self, token: Int[Tensor, " n"], state: Any) -> tuple[Float[Tensor, "n vocab"], Any]:
        """One word further: log-probabilities and the new state.

        Args:
            token: the word just said.
            state: what the last step gave; None at the start.
        """
        packed = None if state is None else tuple(part.transpose(0, 1).contiguous() for part in state)
        hidden, new = self.lstm(self.embedding(token[:, None]), packed)
        return self.output(self.dropout(hidden[:, 0])).log_softmax(-1), tuple(part.transpose(0, 1) for part in new)

    @torch.no_grad()
    def token_logp(self, tokens: Int[Tensor, "n time"]) -> Float[Tensor, " n"]:
        """Log-probability of whole sentences, the stop token included and padding left out; nats."""
        with evaluating(self):
            return sequence_logp(self(tokens), tokens, self.vocabulary.pad)

    def logp(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Log-probability of sentences, nats.

        Raises:
            InvalidInput: an empty sentence.
        """
        return self.token_logp(self.vocabulary.encode(texts, self.length).to(self.output.weight.device))

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        vocabulary: Vocabulary | None = None,
        *,
        held_out: Sequence[str] = (),
        epochs: int = 100,
        batch: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        patience: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: Progress = SILENT,
        checkpoint: Any = None,
        **sizes: Any,
    ) -> "SentenceLM":
        """Train on descriptions.

        Args:
            texts: the descriptions, repetitions included.
            vocabulary: shared with a decoder; None makes one of ``texts``.
            held_out: descriptions of other units; when their loss has not fallen for more than ``patience`` epochs the
                training ends and the best weights are restored. Without any, all epochs are done.
            epochs, batch, lr, weight_decay: of AdamW.
            patience: epochs.
            seed: of weights and order.
            device: to train on.
            progress: where steps are shown.
            checkpoint: a folder to resume from.
            **sizes: ``embedding``, ``hidden``, ``layers``, ``dropout``, ``length``.

        Raises:
            InvalidInput: no texts, or an empty one.
        """
        if not len(texts):
            raise InvalidInput("texts is empty: the prior is learned from descriptions")
        vocabulary = vocabulary or Vocabulary.of(texts)
        model = cls(list(vocabulary.words), seed=seed, **sizes).to(device)
        model.vocabulary = vocabulary
        tokens = vocabulary.encode(texts, model.length)
        others = vocabulary.encode(held_out, model.length).to(device) if len(held_out) else None
        loader = DataLoader(TensorDataset(tokens), batch, shuffle=True, generator=generator(seed))

        def loss(net: Any, rows: tuple[Tensor] | list[Tensor]) -> Tensor:
            target = rows[0].to(device)
            target = target[:, : int((target != vocabulary.pad).sum(1).max())]
            logp = net(target).gather(-1, target[..., None])[..., 0]
            real = target != vocabulary.pad
            return -(logp * real).sum() / real.sum()

        def score(net: Any) -> float:
            return 0.0 if others is None else -float(loss(net, (others,)))

        keeper = BestWeights(score, every=len(loader), patience=patience + 1 if others is not None else epochs + 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        with seeded(seed):
            keeper.fit(
                model, loss, loader, steps=epochs * len(loader), optimizer=optimizer, checkpoint=checkpoint,
                progress=progress, description="training the prior", restore=others is not None,
            )  # fmt: skip
        return model.eval()


def started(tokens: Int[Tensor, "n time"], start: int) -> Int[Tensor, "n time"]:
    """What is read when each word is predicted: the start token, then the words but the last."""
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)


def sequence_logp(logp: Float[Tensor, "n time vocab"], tokens: Int[Tensor, "n time"], pad: int) -> Float[Tensor, " n"]:
    """Sum of the words' log-probabilities, padding left out."""
    each = logp.gather(-1, tokens[..., None])[..., 0]
    return torch.where(tokens == pad, 0.0, each).sum(1)
