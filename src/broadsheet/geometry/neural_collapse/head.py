"""A deep linear head for the user's own backbone, and the objective under which theory says where it ends."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.geometry.neural_collapse.metrics import as_labels
from broadsheet.geometry.neural_collapse.theory import Decay, _decays


class NCHead(nn.Sequential, PyTorchModelHubMixin, library_name="broadsheet"):
    """Linear layers without anything between them; a bias in the last one only, or nowhere.

    Args:
        d: features.
        K: classes.
        depth: layers.
        bias: of the last layer.
        widths: of the hidden layers; None for ``d`` each.
        orthogonal: initial weights with orthonormal rows or columns, as the paper has them.

    Attributes:
        product: ``[K, d]``, all weights multiplied.
    """

    def __init__(
        self,
        d: int,
        K: int,
        depth: int = 1,
        bias: bool = False,
        widths: Sequence[int] | None = None,
        orthogonal: bool = True,
    ) -> None:
        if depth < 1 or d < 1 or K < 2:
            raise InvalidInput(f"d={d}, K={K}, depth={depth}: expected positive numbers and at least two classes")
        sizes = [d, *(widths if widths is not None else [d] * (depth - 1)), K]
        if len(sizes) != depth + 1:
            raise InvalidInput(f"widths={list(widths or ())}: expected one for each of the {depth - 1} hidden layers")
        layers = [nn.Linear(a, b, bias=bias and i == depth - 1) for i, (a, b) in enumerate(pairwise(sizes))]
        if orthogonal:
            for layer in layers:
                nn.init.orthogonal_(layer.weight)
        super().__init__(*layers)

    @property
    def product(self) -> Float[Tensor, "K d"]:
        weights = [layer.get_parameter("weight") for layer in self]
        return reduce(lambda product, weight: weight @ product, weights)


def sep_decay_loss(
    logits: Float[Tensor, "n K"],
    features: Tensor,
    head: nn.Module,
    y: Tensor,
    wd: Decay,
    fd: float,
    n_samples: int | None = None,
    loss: str = "mse",
) -> Tensor:
    """The paper's objective on a batch: the loss, decay of the head's weights, decay of the features.

    Give the head's and the last features' parameters no other decay. The squared error is summed over classes and
    halved, unlike ``torch.nn.MSELoss``, so the decays are those of :func:`gof_prediction` as they stand.

    Args:
        logits: ``[n, K]``.
        features: ``[n, d]``, what the head read.
        head: an :class:`NCHead`, or any module whose ``nn.Linear`` layers are the head's.
        y: ``[n]`` integers or one-hot rows.
        wd: weight decay of each layer.
        fd: feature decay.
        n_samples: of the whole training set, so that batches add up to its features' penalty; None: the batch is it.
        loss: ``"mse"`` or ``"ce"``.
    """
    if loss not in ("mse", "ce"):
        raise InvalidInput(f"loss={loss!r}: expected 'mse' or 'ce'")
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    decays = _decays(wd, fd, len(layers))
    y = as_labels(y)
    if len(features) != len(logits) or len(y) != len(logits):
        raise InvalidInput(f"{len(logits)} logits, {len(features)} features, {len(y)} labels: expected as many of each")
    if loss == "mse":
        target = nn.functional.one_hot(y, logits.shape[1]).to(logits)
        fit = (logits - target).square().sum() / (2 * len(logits))
    else:
        fit = nn.functional.cross_entropy(logits, y)
    weights = torch.stack(
        [decay / 2 * layer.weight.square().sum() for decay, layer in zip(decays, layers, strict=True)]
    )
    scale = 1.0 if n_samples is None else n_samples / len(features)
    return fit + weights.sum() + scale * fd / 2 * features.flatten(1).square().sum()
