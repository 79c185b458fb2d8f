"""A transformer with a circuit put in by hand: two attention layers that do induction, and heads that do nothing.

The residual stream has four slots: token (one-hot), position (one-hot), token before, output. Head (0, 0) attends from
position i to i - 1 and copies its token into the slot "token before"; head (1, 0) looks for positions whose token
before is the current token and copies what stands there to the output. All other heads hold small random weights.
``beta`` scales the scores of the two heads: the larger, the more saturated their softmax, and the smaller its gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import Attention, Block, BlockMap, Linear, register_block_map
from broadsheet.nn.seeding import generator


class PlantedModel(nn.Module):
    """Layers of attention over one-hot tokens and positions: what hand-built circuits are written into.

    Head 0 of every layer is left zero for the circuit, all others hold small random weights.

    Args:
        n_layers: of attention.
        vocab: tokens.
        length: the longest prompt.
        slots: of ``vocab`` features each in the residual stream, the token's own among them; then come ``length`` for
            the position, behind the first.
        d_head: of every head.
        n_noise: noise heads in each layer.
        noise: standard deviation of their weights.
        seed: of the noise.
        dtype: of the weights.
    """

    def __init__(
        self, n_layers: int, vocab: int, length: int, slots: int, d_head: int, n_noise: int, noise: float, seed: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab, self.length, self.n_heads, self.d_head = vocab, length, 1 + n_noise, d_head
        self.width = slots * vocab + length
        random = generator(seed)

        def weights(*shape: int) -> nn.Parameter:
            x = noise * torch.randn(*shape, generator=random, dtype=torch.float64)
            x[:, 0] = 0  # head 0 is planted
            return nn.Parameter(x.to(dtype))

        self.W_Q, self.W_K, self.W_V = (weights(n_layers, self.n_heads, self.width, d_head) for _ in range(3))
        self.W_O = weights(n_layers, self.n_heads, d_head, self.width)
        self.W_U = nn.Parameter(torch.zeros(self.width, vocab, dtype=dtype))

    def slot(self, number: int) -> slice:
        """Features of a slot of ``vocab``: 0 is the token itself, further ones stand behind the position."""
        start = number * self.vocab + (self.length if number else 0)
        return slice(start, start + self.vocab)

    @property
    def place(self) -> slice:
        """Features of the position."""
        return slice(self.vocab, self.vocab + self.length)

    def embed(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """One-hot tokens and positions; the other slots empty."""
        batch, time = input_ids.shape
        if time > self.length:
            raise InvalidInput(f"prompts of {time} tokens: the model has {self.length} positions")
        x = torch.zeros(batch, time, self.width, dtype=self.W_U.dtype, device=self.W_U.device)
        x[..., : self.vocab] = nn.functional.one_hot(input_ids, self.vocab).to(x)
        x[..., self.vocab : self.vocab + time] = torch.eye(time).to(x)
        return x

    def forward(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token."""
        x = self.embed(input_ids)
        time = x.shape[1]
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        for layer in range(len(self.W_Q)):
            q, k, v = (torch.einsum("btw,hwd->bhtd", x, w[layer]) for w in (self.W_Q, self.W_K, self.W_V))
            pattern = (q @ k.transpose(-1, -2)).masked_fill(future, -1e30).softmax(-1)
            x = x + torch.einsum("bhtd,hdw->btw", pattern @ v, self.W_O[layer])
        return x @ self.W_U


def _read(model: PlantedModel) -> BlockMap:
    """How :func:`broadsheet.nn.blocks.block_map` reads these models: the example of a registered architecture."""

    def block(layer: int) -> Block:
        q, k, v = (Linear(w[layer].transpose(0, 1).reshape(model.width, -1)) for w in (model.W_Q, model.W_K, model.W_V))
        back = Linear(model.W_O[layer].reshape(-1, model.width))
        return Block(Attention(model.n_heads, model.d_head, q, k, v, back, scale=1.0))

    blocks = tuple(block(layer) for layer in range(len(model.W_Q)))
    return BlockMap(model, blocks, lambda ids, mask: model.embed(ids), head=(Linear(model.W_U),))


register_block_map(PlantedModel, _read)


class PlantedInduction(PlantedModel):
    """The hand-built induction transformer.

    Args:
        beta: scale of the planted heads' scores.
        vocab: tokens.
        length: the longest prompt.
        n_noise: noise heads in each layer.
        noise: standard deviation of their weights.
        seed: of the noise.
        dtype: of the weights.

    Attributes:
        true_nodes: ``((0, 0), (1, 0))``, (layer, head) of the circuit.

    Example:
        >>> import torch
        >>> model = PlantedInduction(beta=16.0, vocab=5, length=6)
        >>> model(torch.tensor([[3, 1, 4, 0, 2, 1]]))[0, -1].argmax().item()
        4
    """

    true_nodes = ((0, 0), (1, 0))

    def __init__(
        self,
        beta: float = 8.0,
        vocab: int = 16,
        length: int = 24,
        n_noise: int = 5,
        noise: float = 0.05,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if vocab < 2 or length < 3 or n_noise < 0 or not beta > 0:
            raise InvalidInput(
                f"vocab={vocab}, length={length}, n_noise={n_noise}, beta={beta}: expected at least 2 tokens, "
                "3 positions, 0 noise heads and a positive beta"
            )
        super().__init__(2, vocab, length, 3, max(vocab, length), n_noise, noise, seed, dtype)
        token, place, before, out = self.slot(0), self.place, self.slot(1), self.slot(2)
        copy = torch.eye(vocab, dtype=dtype)
        with torch.no_grad():
            i = torch.arange(1, length)
            shift = torch.zeros(length, length, dtype=dtype)
            shift[i, i - 1] = beta
            self.W_Q[0, 0, place, :length] = shift
            self.W_K[0, 0, place, :length] = torch.eye(length, dtype=dtype)
            self.W_V[0, 0, token, :vocab] = copy
            self.W_O[0, 0, :vocab, before] = copy
            self.W_Q[1, 0, token, :vocab] = beta * copy
            self.W_K[1, 0, before, :vocab] = copy
            self.W_V[1, 0, token, :vocab] = copy
            self.W_O[1, 0, :vocab, out] = copy
            self.W_U[out] = copy
