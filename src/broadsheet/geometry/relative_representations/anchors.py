"""Which samples are the anchors, and who they are, so that two sides can tell whether they have the same ones."""

import hashlib
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import InvalidInput
from broadsheet.geometry.relative_representations.similarity import AnchorWarning, unit
from broadsheet.nn.seeding import generator
from broadsheet.nn.validation import require_finite

METHODS = ("uniform", "fps", "kmeans", "top")


@dataclass(frozen=True)
class Anchors:
    """Anchor samples, as their encoder reads them.

    Attributes:
        samples: a tensor ``[k, ...]``, a list of k texts or other objects, or a mapping of tensors with k rows each.
        ids: of the samples, in order; made from their content where none were given, so that equal samples have equal
            ids on both sides of a stitch.
    """

    samples: Any
    ids: tuple[Hashable, ...]

    @classmethod
    def of(cls, samples: Any, ids: Iterable[Hashable] | None = None) -> "Anchors":
        """Anchors from samples.

        Args:
            samples: as :attr:`samples`, or anchors, which are handed on.
            ids: one for each, all different; None to make them from the content.

        Raises:
            InvalidInput: no samples, as many ids as samples is not true, or ids that repeat.
        """
        if isinstance(samples, Anchors):
            return samples if ids is None else cls.of(samples.samples, ids)
        count = n_samples(samples)
        if count == 0:
            raise InvalidInput("k=0 anchors: at least one is needed")
        named = tuple(_digests(samples) if ids is None else _plain(ids))
        if len(named) != count:
            raise InvalidInput(f"{count} anchors and {len(named)} ids: one for each is expected")
        if len(set(named)) < count:
            twice = next(name for name in named if named.count(name) > 1)
            raise InvalidInput(f"anchor {twice!r} stands there more than once: choose {count} different samples")
        return cls(samples, named)

    @classmethod
    def take(cls, data: Any, indices: Iterable[int] | Tensor, held_out: Iterable[int] | Tensor = ()) -> "Anchors":
        """The samples of a data set at these indices, which become the ids.

        Args:
            data: a tensor, a list, a mapping of tensors, or a ``Dataset`` whose items are tensors, or tuples that begin
                with one.
            indices: ``[k]``, such as those of :func:`select_anchors`.
            held_out: indices of the test samples.

        Warns:
            AnchorWarning: anchors among the test samples: their own likeness to themselves leaks into the test.
        """
        chosen = [int(i) for i in _plain(indices)]
        leaked = sorted(set(chosen) & {int(i) for i in _plain(held_out)})
        if leaked:
            warnings.warn(
                f"{len(leaked)} of the {len(chosen)} anchors are test samples, first {leaked[0]}: choose anchors from "
                "the training set, or the score is too good",
                AnchorWarning,
                stacklevel=2,
            )
        count = n_samples(data)
        wrong = [i for i in chosen if not 0 <= i < count]
        if wrong:
            raise InvalidInput(f"anchor {wrong[0]}: the data has {count} samples")
        return cls.of(take_rows(data, chosen), chosen)

    def __len__(self) -> int:
        return len(self.ids)


def n_samples(samples: Any) -> int:
    """How many samples a tensor, a sequence or a mapping of tensors holds."""
    if isinstance(samples, str):
        raise InvalidInput(f"{samples!r} is one text: a list of texts is expected")
    if isinstance(samples, Mapping):
        lengths = {len(value) for value in samples.values() if isinstance(value, Tensor)}
        if len(lengths) != 1:
            raise InvalidInput(f"a mapping of tensors with the same number of rows is expected, got {sorted(lengths)}")
        return lengths.pop()
    if not isinstance(samples, Sized):
        raise InvalidInput(f"samples of type {type(samples).__name__}: a tensor, a list or a mapping is expected")
    return len(samples)


def take_rows(data: Any, rows: Sequence[int] | slice) -> Any:
    """Samples of a tensor, a sequence, a mapping of tensors or a data set, as their encoder reads them."""
    if isinstance(data, Tensor):
        return data[rows if isinstance(rows, slice) else list(rows)]
    if isinstance(data, Mapping):
        return {key: take_rows(value, rows) for key, value in data.items() if isinstance(value, Tensor)}
    if isinstance(rows, slice):
        rows = range(*rows.indices(len(data)))
    items = [data[i] for i in rows]
    items = [item[0] if isinstance(item, tuple | list) else item for item in items]
    return torch.stack(items) if items and all(isinstance(item, Tensor) for item in items) else items


def check_same(a: Anchors, b: Anchors, parallel: bool = False) -> None:
    """Refuse two lists of anchors that do not match item by item.

    Args:
        a, b: of the two sides.
        parallel: the samples differ (another language, another modality) but item i of one means item i of the other.

    Raises:
        InvalidInput: different lengths, or other samples without ``parallel``.
    """
    if len(a) != len(b):
        raise InvalidInput(
            f"{len(a)} anchors on one side, {len(b)} on the other: relative latents have one column for each anchor, "
            "so both need the same number (latents of different width are fine)"
        )
    if parallel or a.ids == b.ids:
        return
    if set(a.ids) == set(b.ids):
        raise InvalidInput("both sides have the same anchors in another order: put them into one order")
    shared = len(set(a.ids) & set(b.ids))
    raise InvalidInput(
        f"only {shared} of {len(a)} anchors are the same on both sides: stitch on one list, or say parallel=True where "
        "item i of one list means the same as item i of the other"
    )


def select_anchors(
    data: Any,
    k: int,
    method: str = "uniform",
    *,
    stratify: Any = None,
    top: int | None = None,
    held_out: Iterable[int] | Tensor = (),
    seed: int = 0,
) -> Int[Tensor, " k"]:
    """Choose anchors among samples.

    Args:
        data: latents ``[n, d]``; for ``"uniform"`` and ``"top"`` anything with a length.
        k: anchors.
        method: ``"uniform"`` at random; ``"fps"`` farthest points by cosine, one after the other; ``"kmeans"`` the
            sample nearest each of k centroids of the directions; ``"top"`` at random among the first ``top`` samples
            (words, the most frequent first).
        stratify: ``[n]`` labels, numbers or names; each class then has its share of the anchors, as equal as can be.
        top: of ``"top"``.
        held_out: indices that are not to be chosen, such as the test samples.
        seed: of everything random.

    Returns:
        ``[k]`` indices, ascending, all different.

    Raises:
        InvalidInput: k below 1 or beyond the samples there are, or no latents where the method needs them.
    """
    if method not in METHODS:
        raise InvalidInput(f"method={method!r}: expected one of {', '.join(METHODS)} (or parallel_anchors for pairs)")
    n = n_samples(data)
    if (top is None) == (method == "top"):
        raise InvalidInput(f"top={top}: method 'top' needs it, the others have no use for it")
    if top is not None and top < 1:
        raise InvalidInput(f"top={top}: at least one sample to choose from is needed")
    allowed = torch.ones(n, dtype=torch.bool)
    for i in _plain(held_out):
        if not 0 <= int(i) < n:
            raise InvalidInput(f"held_out holds {int(i)}: the data has {n} samples")
        allowed[int(i)] = False
    if top is not None:
        allowed[top:] = False
    count = int(allowed.sum())
    if not 1 <= k <= count:
        raise InvalidInput(f"k={k}: expected 1 to {count}, the samples there are to choose from")
    latents = None
    if method in ("fps", "kmeans"):
        if not (isinstance(data, Tensor) and data.ndim == 2 and data.is_floating_point()):
            raise InvalidInput(f"method={method!r} needs latents, a floating tensor [n, d]: encode the samples first")
        require_finite("latents", data)
        latents = data.detach()
    labels = np.zeros(n, dtype=int) if stratify is None else np.asarray(_cpu(stratify))
    if labels.shape != (n,):
        raise InvalidInput(f"stratify has shape {labels.shape}: one label for each of the {n} samples is expected")
    labels = torch.as_tensor(np.unique(labels, return_inverse=True)[1])
    draw, chosen = generator(seed), []
    for label, share in _shares(labels[allowed], k, draw).items():
        rows = ((labels == label) & allowed).nonzero().flatten()
        if share:
            chosen.append(rows[_pick(None if latents is None else latents[rows], len(rows), share, method, draw, seed)])
    return torch.cat(chosen).sort().values


def parallel_anchors(
    left: Sequence[Hashable] | Mapping[Hashable, Any],
    right: Sequence[Hashable] | Mapping[Hashable, Any],
    k: int | None = None,
    *,
    pairs: Sequence[tuple[Hashable, Hashable]] | None = None,
    seed: int = 0,
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """Anchors that both sides have: places of the same ids, or of pairs that mean the same.

    Args:
        left, right: ids of the samples of either side, in order (a mapping's keys: words).
        k: anchors, drawn at random; None for all there are.
        pairs: (left id, right id), such as the lines of a dictionary; None pairs equal ids.
        seed: of the draw.

    Returns:
        places on the left, ascending, and their partners' on the right.

    Raises:
        InvalidInput: fewer than ``k`` pairs with both ends there.
    """
    places = [{name: i for i, name in enumerate(side)} for side in (left, right)]
    given = [(name, name) for name in places[0]] if pairs is None else list(pairs)
    found, used = [], (set(), set())
    for a, b in given:
        if a in places[0] and b in places[1] and a not in used[0] and b not in used[1]:
            found.append((places[0][a], places[1][b]))
            used[0].add(a)
            used[1].add(b)
    k = len(found) if k is None else k
    if not 1 <= k <= len(found):
        raise InvalidInput(f"k={k}: {len(found)} pairs have both ends among the samples")
    order = torch.randperm(len(found), generator=generator(seed))[:k].tolist()
    kept = sorted(found[i] for i in order)
    return torch.tensor([a for a, _ in kept]), torch.tensor([b for _, b in kept])


def farthest_points(latents: Float[Tensor, "n d"], k: int, first: int = 0) -> Int[Tensor, " k"]:
    """Points chosen one after the other, each the least like all before it by cosine; ``n k d`` operations.

    Args:
        latents: ``[n, d]``.
        k: points.
        first: the one to begin with.
    """
    rows = unit(latents)
    chosen = [first]
    nearest = rows @ rows[first]
    nearest[first] = torch.inf
    for _ in range(k - 1):
        new = int(nearest.argmin())
        nearest = torch.maximum(nearest, rows @ rows[new])
        nearest[new] = torch.inf  # a duplicate of a chosen point may still be chosen, the point itself may not
        chosen.append(new)
    return torch.tensor(chosen)


def _pick(latents: Tensor | None, n: int, k: int, method: str, draw: torch.Generator, seed: int) -> Tensor:
    if latents is None:
        return torch.randperm(n, generator=draw)[:k]
    if method == "fps":
        return farthest_points(latents, k, int(torch.randint(n, (1,), generator=draw))).cpu()
    return _nearest_to_centroids(latents, k, seed)


def _nearest_to_centroids(latents: Tensor, k: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    rows = unit(latents).double().cpu()
    found = KMeans(k, n_init=1, random_state=seed).fit(rows.numpy())  # pyright: ignore[reportArgumentType]
    centres = torch.as_tensor(found.cluster_centers_)
    labels = torch.as_tensor(found.labels_, dtype=torch.long)
    away = (rows - centres[labels]).square().sum(1)
    chosen = [int(torch.where(labels == c, away, torch.inf).argmin()) for c in range(k) if bool((labels == c).any())]
    # Duplicates can leave a cluster empty: the samples farthest from what is chosen fill up.
    taken = set(chosen)
    spare = [i for i in away.argsort(descending=True).tolist() if i not in taken]
    return torch.tensor(chosen + spare[: k - len(chosen)])


def _shares(labels: Tensor, k: int, draw: torch.Generator) -> dict[int, int]:
    """Anchors of each class: equal, as far as classes are large enough and k divides; the rest drawn."""
    classes, counts = labels.unique(return_counts=True)
    room = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    share = dict.fromkeys(room, 0)
    left = k
    while left:
        open_ = [c for c in room if share[c] < room[c]]
        each = left // len(open_)
        if each == 0:
            order = torch.randperm(len(open_), generator=draw).tolist()
            for i in order[:left]:
                share[open_[i]] += 1
            return share
        for c in open_:
            more = min(each, room[c] - share[c])
            share[c] += more
            left -= more
    return share


def _digests(samples: Any) -> list[str]:
    if isinstance(samples, Mapping):
        tensors = {key: value for key, value in samples.items() if isinstance(value, Tensor)}
        rows = [b"".join(_bytes(tensors[key][i]) for key in sorted(tensors)) for i in range(n_samples(samples))]
    else:
        rows = [_bytes(sample) for sample in samples]
    return [hashlib.sha256(row).hexdigest()[:16] for row in rows]


def _bytes(sample: Any) -> bytes:
    if isinstance(sample, Tensor):
        return np.ascontiguousarray(sample.detach().cpu().double().numpy()).tobytes()
    if isinstance(sample, np.ndarray):
        return np.ascontiguousarray(sample).tobytes()
    if isinstance(sample, str):
        return sample.encode()
    raise InvalidInput(f"anchors of type {type(sample).__name__} need ids: hand in ids=")


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)


def _cpu(values: Any) -> Any:
    return values.detach().cpu() if isinstance(values, Tensor) else values
