"""A transformer that answers labelled lists by a circuit put in by hand, by place in the list or by label.

Three layers of attention on :class:`broadsheet.data.choices.LabelledLists`. The final token finds its word in the list
(head (1, 0)) and takes what it needs to know of it: which item it is, or which label stands before it (copied to the
word by head (0, 0)). The letter head (2, 0) then looks for the label of that item, or for that label, and says it. All
other heads hold small random weights. Which feature its queries and keys carry is thereby known.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.data.choices import LabelledLists
from broadsheet.errors import InvalidInput
from broadsheet.nn.blocks import Attention, Block, BlockMap, Linear, register_block_map
from broadsheet.nn.seeding import generator


class PlantedChoice(nn.Module):
    """The hand-built model.

    Args:
        lists: the prompts that it answers.
        feature: what the letter head goes by, ``"nth_item"`` or ``"token"``.
        beta: scale of the planted heads' scores: the larger, the more certain they are.
        gain: of the logits.
        n_noise: noise heads in each layer.
        noise: standard deviation of their weights.
        seed: of the noise.
        dtype: of the weights.

    Attributes:
        letter_head: name of the head that looks at the right label.
        true_nodes: names of all planted heads.

    Example:
        >>> lists = LabelledLists()
        >>> batch = lists.sample(8, "random", seed=0)
        >>> model = PlantedChoice(lists, "token")
        >>> bool((model(batch.input_ids)[:, -1].argmax(-1) == batch.right).all())
        True
    """

    letter_head = "layers.2.attn.head.0"

    def __init__(
        self,
        lists: LabelledLists,
        feature: str = "nth_item",
        beta: float = 12.0,
        gain: float = 8.0,
        n_noise: int = 3,
        noise: float = 0.03,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if feature not in ("nth_item", "token") or n_noise < 0 or not beta > 0:
            raise InvalidInput(
                f"feature={feature!r}, n_noise={n_noise}, beta={beta}: expected 'nth_item' or 'token', at least 0 "
                "noise heads and a positive beta"
            )
        self.lists, self.feature, self.n_heads = lists, feature, 1 + n_noise
        vocab, time, items = lists.vocab_size, lists.length, lists.n_items
        self.d_head, self.width = max(vocab + 1, time), 4 * vocab + time
        by_item = feature == "nth_item"
        self.true_nodes = tuple(f"layers.{layer}.attn.head.0" for layer in range(1 if by_item else 0, 3))
        random = generator(seed)

        def weights(*shape: int) -> nn.Parameter:
            x = noise * torch.randn(*shape, generator=random, dtype=torch.float64)
            x[:, 0] = 0  # head 0 is planted
            return nn.Parameter(x.to(dtype))

        heads, width, size = self.n_heads, self.width, self.d_head
        self.W_Q, self.W_K, self.W_V = (weights(3, heads, width, size) for _ in range(3))
        self.W_O = weights(3, heads, size, width)
        token, place = slice(0, vocab), slice(vocab, vocab + time)
        label, known, out = (slice(i * vocab + time, (i + 1) * vocab + time) for i in (1, 2, 3))
        copy, places = torch.eye(vocab, dtype=dtype), torch.eye(time, dtype=dtype)
        at = torch.arange(items)
        with torch.no_grad():
            if not by_item:  # every token takes over the one before it
                self.W_Q[0, 0, place, :time] = beta * places.roll(-1, 1).tril(-1)
                self.W_K[0, 0, place, :time] = places
                self.W_V[0, 0, token, :vocab] = copy
                self.W_O[0, 0, :vocab, label] = copy
            self.W_Q[1, 0, token, :vocab] = beta * copy
            self.W_K[1, 0, token, :vocab] = copy
            self.W_Q[1, 0, vocab + time - 1, vocab] = -2 * beta  # the final token is not to find itself
            self.W_K[1, 0, vocab + time - 1, vocab] = 1
            if by_item:
                self.W_V[1, 0, vocab + 2 + 2 * at, at] = 1
            else:
                self.W_V[1, 0, label, :vocab] = copy
            self.W_O[1, 0, :vocab, known] = copy
            self.W_Q[2, 0, known, :vocab] = beta * copy
            if by_item:
                self.W_K[2, 0, vocab + 1 + 2 * at, at] = 1
            else:
                labels = torch.arange(2, 2 + lists.n_labels)
                self.W_K[2, 0, labels, labels] = 1
            self.W_V[2, 0, token, :vocab] = copy
            self.W_O[2, 0, :vocab, out] = copy
        unembed = torch.zeros(width, vocab, dtype=dtype)
        unembed[out] = gain * copy
        self.W_U = nn.Parameter(unembed)

    def embed(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """One-hot tokens and positions; the other slots empty."""
        batch, time = input_ids.shape
        if time > self.lists.length:
            raise InvalidInput(f"prompts of {time} tokens: the model has {self.lists.length} positions")
        vocab = self.lists.vocab_size
        x = torch.zeros(batch, time, self.width, dtype=self.W_U.dtype, device=self.W_U.device)
        x[..., :vocab] = nn.functional.one_hot(input_ids, vocab).to(x)
        x[..., vocab : vocab + time] = torch.eye(time).to(x)
        return x

    def forward(self, input_ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token."""
        x = self.embed(input_ids)
        time = x.shape[1]
        future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        for layer in range(3):
            q, k, v = (torch.einsum("btw,hwd->bhtd", x, w[layer]) for w in (self.W_Q, self.W_K, self.W_V))
            pattern = (q @ k.transpose(-1, -2)).masked_fill(future, -1e30).softmax(-1)
            x = x + torch.einsum("bhtd,hdw->btw", pattern @ v, self.W_O[layer])
        return x @ self.W_U


def _read(model: PlantedChoice) -> BlockMap:
    def block(layer: int) -> Block:
        q, k, v = (Linear(w[layer].transpose(0, 1).reshape(model.width, -1)) for w in (model.W_Q, model.W_K, model.W_V))
        return Block(Attention(model.n_heads, model.d_head, q, k, v, Linear(model.W_O[layer].flatten(0, 1)), scale=1.0))

    return BlockMap(
        model, tuple(block(i) for i in range(3)), lambda ids, mask: model.embed(ids), head=(Linear(model.W_U),)
    )


register_block_map(PlantedChoice, _read)
