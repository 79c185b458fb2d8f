"""p(d|E): an LSTM that says a sentence while it attends to the exemplars (equation 4 and appendix B of the paper)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.language_model import started
from broadsheet.nn.seeding import seeded


class Looked(NamedTuple):
    """Exemplars and what attention needs of them, computed once for a whole sentence."""

    vectors: Tensor  # [n, k, d]
    keys: Tensor  # [n, k, attention]


class CaptionDecoder(nn.Module):
    """Attention LSTM over exemplar vectors.

    Args:
        width: of an exemplar's vector.
        vocab: words.
        embedding: width of the words' vectors.
        hidden: width of the LSTM.
        attention: width of the attention's hidden layer; None for the smaller of ``hidden`` and ``width``.
        dropout: before the output.
        seed: of the initial weights.
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        embedding: int = 128,
        hidden: int = 512,
        attention: int | None = None,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.width = width
        inner = min(hidden, width) if attention is None else attention
        with seeded(seed):
            self.first_hidden = nn.Linear(width, hidden)
            self.first_cell = nn.Linear(width, hidden)
            self.embedding = nn.Embedding(vocab, embedding)
            self.query = nn.Linear(hidden, inner)
            self.key = nn.Linear(width, inner)
            self.score = nn.Linear(inner, 1)
            self.gate = nn.Linear(hidden, width)
            self.lstm = nn.LSTMCell(embedding + width, hidden)
            self.dropout = nn.Dropout(dropout)
            self.output = nn.Linear(hidden, vocab)
        # Encoders differ in scale by orders of magnitude: vectors are centred and scaled by what training saw.
        self.centre: Tensor
        self.scale: Tensor
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def standardise(self, vectors: Float[Tensor, "units k d"]) -> None:
        """Take centre and scale of every entry from these vectors."""
        flat = vectors.flatten(0, 1)
        self.centre.copy_(flat.mean(0))
        spread = flat.std(0, correction=0)
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def look(self, vectors: Float[Tensor, "n k d"]) -> Looked:
        """Exemplars made ready for :meth:`begin` and :meth:`step`."""
        if vectors.shape[-1] != self.width:
            raise InvalidInput(
                f"the exemplars' vectors have {vectors.shape[-1]} entries, the describer was trained on {self.width}: "
                "use the encoder that it was trained with"
            )
        vectors = (vectors.to(self.centre) - self.centre) / self.scale
        return Looked(vectors, self.key(vectors))

    def begin(self, looked: Looked) -> tuple[Tensor, Tensor]:
        """The LSTM's first state, from the exemplars' mean."""
        mean = looked.vectors.mean(1)
        return self.first_hidden(mean).tanh(), self.first_cell(mean).tanh()

    def step(
        self, token: Int[Tensor, " n"], looked: Looked, state: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "n vocab"], tuple[Tensor, Tensor], Float[Tensor, "n k"]]:
        """One word further.

        Returns:
            log-probabilities of the next word, the new state, the attention to each exemplar.
        """
        hidden, _ = state
        weights = self.score((self.query(hidden)[:, None] + looked.keys).tanh())[..., 0].softmax(1)
        seen = self.gate(hidden).sigmoid() * (weights[..., None] * looked.vectors).sum(1)
        hidden, cell = self.lstm(torch.cat([self.embedding(token), seen], 1), state)
        return self.output(self.dropout(hidden)).log_softmax(-1), (hidden, cell), weights

    def forward(
        self, vectors: Float[Tensor, "n k d"], tokens: Int[Tensor, "n time"], start: int = 0
    ) -> tuple[Float[Tensor, "n time vocab"], Float[Tensor, "n time k"]]:
        """Log-probabilities and attention at every word of given sentences (teacher forcing).

        Args:
            vectors: exemplars.
            tokens: sentences, the start token not included.
            start: its number.
        """
        looked = self.look(vectors)
        state = self.begin(looked)
        logp, attention = [], []
        for token in started(tokens, start).unbind(1):
            step, state, weights = self.step(token, looked, state)
            logp.append(step)
            attention.append(weights)
        return torch.stack(logp, 1), torch.stack(attention, 1)


def attention_penalty(attention: Float[Tensor, "n time k"], real: Tensor | None = None) -> Float[Tensor, ""]:
    """How unevenly a sentence looks at its exemplars: mean of ``(1 - sum over words of attention)^2``.

    Args:
        attention: of every word.
        real: ``[n, time]``, False at padding, which does not count. The official code counts it; None does the same.
    """
    if real is not None:
        attention = attention * real[..., None].to(attention)
    return (1 - attention.sum(1)).square().mean()
