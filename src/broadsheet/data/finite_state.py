"""A language spoken by a finite-state machine: walks over states, each written as a few digits.

Every state has a fixed number of successors, all equally likely. With more states than a model has neurons, the model
cannot keep a neuron for each. Reference: Tamkin et al., codebook features (arXiv:2310.17230, section 4).
"""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput


class TokFSM:
    """A random machine and its language: BOS, then the digits of one state after the other.

    Token ids: 0 to ``base - 1`` are digits, the most significant first; ``base`` is BOS.

    Args:
        n_states: how many.
        n_successors: of every state, drawn without replacement.
        base: of the digits; a state takes as many digits as ``n_states`` needs.
        seed: of the machine; its texts are drawn with their own generator.

    Example:
        >>> fsm = TokFSM(n_states=9, n_successors=2, base=3)
        >>> fsm.digits, fsm.encode(torch.tensor([7])).tolist()
        (2, [[2, 1]])
    """

    def __init__(self, n_states: int = 100, n_successors: int = 10, base: int = 10, seed: int = 0) -> None:
        if n_states < 2:
            raise InvalidInput(f"n_states={n_states}: a machine needs at least 2")
        if not 1 <= n_successors <= n_states:
            raise InvalidInput(f"n_successors={n_successors}: expected 1 to n_states={n_states}")
        if base < 2:
            raise InvalidInput(f"base={base}: digits need a base of at least 2")
        self.n_states, self.n_successors, self.base = n_states, n_successors, base
        self.digits = 1
        while base**self.digits < n_states:
            self.digits += 1
        random = np.random.default_rng(seed)
        drawn = [random.choice(n_states, size=n_successors, replace=False) for _ in range(n_states)]
        self.successors: Int[Tensor, "states successors"] = torch.from_numpy(np.stack(drawn)).long()

    @property
    def bos(self) -> int:
        """The token that begins a text."""
        return self.base

    @property
    def vocab_size(self) -> int:
        return self.base + 1

    @cached_property
    def transitions(self) -> Float[Tensor, "states states"]:
        """Probability of every next state; rows sum to 1."""
        table = torch.zeros(self.n_states, self.n_states)
        return table.scatter_(1, self.successors, 1 / self.n_successors)

    @cached_property
    def next_digit(self) -> Float[Tensor, "contexts base"]:
        """Probability of the next digit after every context: a state, or a state and the next one's first digits.

        Contexts stand in the order of :meth:`contexts`; those that cannot come have zeros.
        """
        spelled = self.encode(self.successors)  # [states, successors, digits]
        tables = []
        for known in range(self.digits):
            prefix = self._number(spelled[..., :known]) if known else torch.zeros_like(self.successors)
            table = torch.zeros(self.n_states, self.base**known, self.base)
            rows = torch.arange(self.n_states)[:, None].expand_as(prefix)
            table.index_put_((rows, prefix, spelled[..., known]), torch.ones(()), accumulate=True)
            tables.append((table / table.sum(-1, keepdim=True).clamp_min(1)).flatten(0, 1))
        return torch.cat(tables)

    def encode(self, states: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch digits"]:
        """The digits of states."""
        powers = self.base ** torch.arange(self.digits - 1, -1, -1, device=states.device)
        return (states[..., None] // powers) % self.base

    def walk(self, n: int, steps: int, generator: torch.Generator | None = None) -> Int[Tensor, "n steps"]:
        """States of random walks that begin anywhere.

        Args:
            n: walks.
            steps: states in each.
            generator: of everything.
        """
        if n < 1 or steps < 1:
            raise InvalidInput(f"n={n}, steps={steps}: expected at least one walk of at least one state")
        states = [torch.randint(self.n_states, (n,), generator=generator)]
        choices = torch.randint(self.n_successors, (n, steps - 1), generator=generator)
        for step in range(steps - 1):
            states.append(self.successors[states[-1], choices[:, step]])
        return torch.stack(states, 1)

    def sample(self, n: int, length: int, generator: torch.Generator | None = None) -> Int[Tensor, "n length"]:
        """Texts of ``length`` tokens, BOS included; the last state may be cut.

        Args:
            n: texts.
            length: at least 2.
            generator: of everything.
        """
        if length < 2:
            raise InvalidInput(f"length={length}: BOS and at least one digit are expected")
        steps = -(-(length - 1) // self.digits)
        digits = self.encode(self.walk(n, steps, generator)).flatten(1)[:, : length - 1]
        return torch.cat([torch.full((n, 1), self.bos), digits], 1)

    def decode(self, input_ids: Int[Tensor, "n length"]) -> Int[Tensor, "n states"]:
        """The states of texts that begin with BOS; -1 where the digits name none.

        Raises:
            InvalidInput: no BOS, or digits left over: cut the texts behind a whole state first.
        """
        if not bool((input_ids[:, 0] == self.bos).all()):
            raise InvalidInput(f"the texts do not all begin with BOS (token {self.bos})")
        left = (input_ids.shape[1] - 1) % self.digits
        if left:
            raise InvalidInput(
                f"{input_ids.shape[1] - 1} digits are no whole number of states of {self.digits}: leave out the last "
                f"{left}"
            )
        digits = input_ids[:, 1:].unflatten(1, (-1, self.digits))
        states = self._number(digits)
        wrong = (digits >= self.base).any(-1) | (states >= self.n_states)
        return states.masked_fill(wrong, -1)

    def contexts(self, input_ids: Int[Tensor, "n length"]) -> Int[Tensor, "n length"]:
        """What every token knows: the number of its row in :attr:`next_digit`, -1 at BOS and in the first state.

        At a state's last digit that is the state itself, 0 to ``n_states - 1``; at an earlier digit it is the state
        before, with the digits seen since.
        """
        n, length = input_ids.shape
        out = torch.full((n, length), -1, dtype=torch.long, device=input_ids.device)
        whole = input_ids[:, : 1 + (length - 1) // self.digits * self.digits]
        states = self.decode(whole)
        out[:, self.digits :: self.digits] = states
        offset = self.n_states
        for known in range(1, self.digits):
            size = self.base**known
            places = torch.arange(self.digits + known, length, self.digits)
            before = states[:, : len(places)]
            seen = torch.stack([input_ids[:, places - i] for i in range(known - 1, -1, -1)], -1)
            value = offset + before * size + self._number(seen)
            out[:, places] = torch.where((before >= 0) & (seen < self.base).all(-1), value, -1)
            offset += self.n_states * size
        return out

    def valid_mass(
        self, logits: Float[Tensor, "n length vocab"], input_ids: Int[Tensor, "n length"]
    ) -> Float[Tensor, " digits"]:
        """Probability that a model gives to digits that can come next, for the first, second, ... digit of a state.

        Args:
            logits: of the model on ``input_ids``.
            input_ids: texts of the machine.
        """
        contexts = self.contexts(input_ids)
        allowed: Bool[Tensor, "contexts base"] = (self.next_digit > 0).to(logits.device)
        p = logits.softmax(-1)[..., : self.base]
        mass = (p * allowed[contexts.clamp_min(0)]).sum(-1)
        place = (torch.arange(input_ids.shape[1], device=contexts.device) % self.digits).expand_as(contexts)
        return torch.stack([mass[(contexts >= 0) & (place == digit)].mean() for digit in range(self.digits)])

    def transition_accuracy(self, input_ids: Int[Tensor, "n length"]) -> float:
        """Share of consecutive states in texts, such as generated ones, that are edges of the machine.

        Args:
            input_ids: BOS and whole states.
        """
        states = self.decode(input_ids)
        if states.shape[1] < 2:
            raise InvalidInput("texts of at least two states are needed to count transitions")
        edges = (self.transitions > 0).to(states.device)
        a, b = states[:, :-1], states[:, 1:]
        return float((edges[a.clamp_min(0), b.clamp_min(0)] & (a >= 0) & (b >= 0)).double().mean())

    @torch.no_grad()
    def first_transition_accuracy(self, model: torch.nn.Module) -> float:
        """Share of each state's most probable next states that are edges, the model reading BOS and the state only.

        As many next states are taken as there are successors.

        Args:
            model: a causal language model over this vocabulary.
        """
        device = next(model.parameters()).device
        states = torch.arange(self.n_states)
        ids = torch.cat([torch.full((self.n_states, 1), self.bos), self.encode(states)], 1).to(device)
        logp = torch.zeros(self.n_states, 1, device=device)
        for _ in range(self.digits):  # one digit more each time, all of them side by side
            step = model(ids.flatten(0, -2)).logits[:, -1].log_softmax(-1)[:, : self.base]
            logp = (logp.flatten()[:, None] + step).view(self.n_states, -1)
            grown = ids.view(self.n_states, -1, 1, ids.shape[-1]).expand(-1, -1, self.base, -1)
            digit = torch.arange(self.base, device=device).view(1, 1, -1, 1).expand(*grown.shape[:3], 1)
            ids = torch.cat([grown, digit], -1).flatten(1, 2)
        best = logp[:, : self.n_states].topk(self.n_successors).indices.cpu()
        return float((self.transitions.gather(1, best) > 0).double().mean())

    def _number(self, digits: Tensor) -> Tensor:
        powers = self.base ** torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device)
        return (digits * powers).sum(-1)
