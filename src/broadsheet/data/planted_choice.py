"""A transformer that answers labelled lists by a circuit put in by hand, by place in the list or by label.

Three layers of attention on :class:`broadsheet.data.choices.LabelledLists`. The final token finds its word in the list
(head (1, 0)) and takes what it needs to know of it: which item it is, or which label stands before it (copied to the
word by head (0, 0)). The letter head (2, 0) then looks for the label of that item, or for that label, and says it. All
other heads hold small random weights. Which feature its queries and keys carry is thereby known.
"""

import torch

from broadsheet.data.choices import LabelledLists
from broadsheet.data.planted import PlantedModel
from broadsheet.errors import InvalidInput


class PlantedChoice(PlantedModel):
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
        if feature not in ("nth_item", "token") or n_noise < 0 or not beta > 0:
            raise InvalidInput(
                f"feature={feature!r}, n_noise={n_noise}, beta={beta}: expected 'nth_item' or 'token', at least 0 "
                "noise heads and a positive beta"
            )
        vocab, time, items = lists.vocab_size, lists.length, lists.n_items
        super().__init__(3, vocab, time, 4, max(vocab + 1, time), n_noise, noise, seed, dtype)
        self.lists, self.feature = lists, feature
        by_item = feature == "nth_item"
        self.true_nodes = tuple(f"layers.{layer}.attn.head.0" for layer in range(1 if by_item else 0, 3))
        token, place, label, known, out = self.slot(0), self.place, self.slot(1), self.slot(2), self.slot(3)
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
            self.W_U[out] = gain * copy
