"""Two word spaces of one made-up language, each counted in contexts of its own: equal in meaning, apart in axes."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.nn.seeding import generator


@dataclass(frozen=True)
class WordSpaces:
    """Row i of all three is the same word.

    Attributes:
        left, right: ``[n, d]`` vectors, as two corpora give them.
        meaning: ``[n, latent]``, what both are made from.
    """

    left: Float[Tensor, "n d"]
    right: Float[Tensor, "n d"]
    meaning: Float[Tensor, "n latent"]


def made_word_spaces(
    n: int = 2000, d: int = 50, *, latent: int = 20, clusters: int = 60, contexts: int = 1000, rate: float = 2.0,
    strength: float = 1.0, seed: int = 0,
) -> WordSpaces:  # fmt: skip
    """Words in clusters of meaning, counted beside two disjoint sets of contexts, each table then factored.

    A word and a context meet at a Poisson rate whose logarithm is the product of their vectors; the word vectors of a
    corpus are the singular vectors of its double-centred logarithms of counts, as count-based embeddings are made.

    Args:
        n: words.
        d: features of either space.
        latent: features of meaning.
        clusters: of words.
        contexts: of either corpus.
        rate: mean count of a word in a context that does not care.
        strength: deviation of the log-rates: larger ones give clearer spaces.
        seed: of everything.
    """
    if d > min(n, contexts):
        raise InvalidInput(f"d={d}: at most the smaller of {n} words and {contexts} contexts")
    draw = generator(seed)
    centres = torch.randn(clusters, latent, generator=draw)
    meaning = centres[torch.randint(clusters, (n,), generator=draw)] + 0.6 * torch.randn(n, latent, generator=draw)
    meaning = meaning / meaning.square().mean().sqrt()
    spaces = []
    for _ in range(2):
        beside = torch.randn(contexts, latent, generator=draw) * strength / latent**0.5
        counts = torch.poisson(rate * (meaning @ beside.T).clamp(max=5).exp(), generator=draw)
        table = torch.log1p(counts)
        table = table - table.mean(1, keepdim=True) - table.mean(0) + table.mean()
        _, vectors = torch.linalg.eigh(table.T @ table)
        spaces.append(table @ vectors[:, -d:].flip(1))
        # The sign of a singular vector is the solver's; it is fixed so that a seed is a seed everywhere.
        top = spaces[-1].gather(0, spaces[-1].abs().argmax(0, keepdim=True))
        spaces[-1] = spaces[-1] * top.sign()
    return WordSpaces(spaces[0], spaces[1], meaning)
