"""Handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, split and made imbalanced as asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and their labels, apart for training and testing.

    Attributes:
        x, y: for training, ``[n, 1, 8, 8]`` float32 and ``[n]`` int64.
        x_test, y_test: held out.
    """

    x: Float[Tensor, "n ..."]
    y: Int[Tensor, " n"]
    x_test: Float[Tensor, "m ..."]
    y_test: Int[Tensor, " m"]

    def flat(self) -> "Digits":
        """The same with 64 features an image, ``[n, 64]``."""
        return Digits(self.x.flatten(1), self.y, self.x_test.flatten(1), self.y_test)


def load_digits_split(seed: int = 0, n_test: int = 497, counts: Sequence[int] | None = None) -> Digits:
    """The digits, stratified by class.

    Args:
        seed: of the split.
        n_test: held out, out of 1,797.
        counts: training images of each class 0 to 9 (or of the first classes alone, which are then all there are); None
            takes all that are left.

    Raises:
        InvalidInput: more are asked for than there are.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    if not 10 <= n_test <= len(images) - 10:
        raise InvalidInput(f"n_test={n_test}: there are {len(images)} images")
    x, x_test, y, y_test = train_test_split(images / 16, labels, test_size=n_test, random_state=seed, stratify=labels)
    x, x_test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in (x, x_test))
    y, y_test = torch.tensor(y), torch.tensor(y_test)
    if counts is not None:
        there = torch.bincount(y, minlength=10).tolist()
        if not 2 <= len(counts) <= 10 or any(not 0 < c <= t for c, t in zip(counts, there, strict=False)):
            raise InvalidInput(f"counts={list(counts)}: expected 2 to 10 numbers, at most {there[: len(counts)]}")
        rows = torch.cat([(y == label).nonzero().flatten()[:count] for label, count in enumerate(counts)])
        x, y, kept = x[rows], y[rows], y_test < len(counts)
        x_test, y_test = x_test[kept], y_test[kept]
    return Digits(x, y, x_test, y_test)
