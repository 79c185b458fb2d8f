"""Sparse semi-NMF as a scikit-learn estimator, on arrays and on tensors of any device."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.snmf.fitting import Factorisation, factorise
from broadsheet.interpretability.snmf.initial import initial_coefficients
from broadsheet.interpretability.snmf.reading import FactorReading
from broadsheet.interpretability.snmf.source import Source
from broadsheet.interpretability.snmf.updates import (
    FeatureProduct,
    check_settings,
    entries_kept,
    keep_largest,
    nonnegative_codes,
    solve_features,
)
from broadsheet.nn.checkpoint import replace_folder
from broadsheet.nn.features import Feature
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator
from broadsheet.nn.validation import require_finite

WARM_UP = 50  # iterations on the first batch of partial_fit


class SemiNMF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Split activations into features of few neurons, each token a non-negative mix of them.

    Rows are tokens, columns neurons (the paper writes the transpose). Arrays give arrays and tensors give tensors, on
    their own device; ``numpy.memmap`` and tensors on one are read block by block. Half precision is read as it is and
    computed with in float32.

    Args:
        n_components: features K.
        sparsity: share of the neurons that a feature keeps, in (0, 1]; 1 for plain semi-NMF.
        init: ``"random"``, ``"svd"``, ``"kmeans"``, or coefficients ``[n, K]`` to begin with. On planted features the
            start matters: ``"svd"`` found all, random ones not always.
        n_init: starts with other random numbers, of which the one with the lowest loss is kept; random numbers play no
            part in ``"svd"`` and given coefficients.
        solver: ``"multiplicative"`` (the paper's) or ``"projected"`` (exact for one feature after the other, cut at 0;
            fewer iterations).
        max_iter: iterations at most.
        tol: an improvement by less than this share of ``|A|^2`` does not count (the official code's is absolute).
        patience: stop after this many iterations in a row that do not count.
        reg: added to the diagonal in the least squares.
        batch_size: tokens in memory at a time; None for all where they are in memory already.
        forgetting: :meth:`partial_fit` weighs what it has seen by this factor at each batch, in (0, 1].
        random_state: None, seed or ``numpy.random.RandomState``.

    Attributes:
        features_: ``[K, d]``, signed, at most ``ceil(sparsity * d)`` nonzeros each; ``components_`` is the same.
        coefficients_: ``[n, K]`` of the rows that were fitted, at least 0, as the iteration left them.
        loss_curve_: ``|A - F G^T|^2`` after each iteration; lowest at ``best_iter_``, which the factors belong to.
        explained_: share of ``|A|^2`` that the factors explain.
        n_iter_: iterations made.
        n_features_in_: neurons d.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> activations = rng.random((50, 3)) @ rng.normal(size=(3, 20))
        >>> snmf = SemiNMF(n_components=3, sparsity=1.0, init="svd", random_state=0).fit(activations)
        >>> snmf.features_.shape, snmf.coefficients_.shape, bool(snmf.explained_ > 0.99)
        ((3, 20), (50, 3), True)
    """

    # Any value is taken here and looked at in fit: scikit-learn's rule.
    def __init__(
        self,
        n_components: Any = 100,
        sparsity: Any = 0.01,
        init: Any = "random",
        n_init: Any = 1,
        solver: Any = "multiplicative",
        max_iter: Any = 2000,
        tol: Any = 1e-4,
        patience: Any = 500,
        reg: Any = 1e-6,
        batch_size: Any = None,
        forgetting: Any = 0.98,
        random_state: Any = 0,
    ) -> None:
        self.n_components = n_components
        self.sparsity = sparsity
        self.init = init
        self.n_init = n_init
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.patience = patience
        self.reg = reg
        self.batch_size = batch_size
        self.forgetting = forgetting
        self.random_state = random_state

    # ------------------------------------------------------------------------------------------------- fitting

    @torch.no_grad()
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress = SILENT,
    ) -> "SemiNMF":
        """Factorise the activations.

        Args:
            X: ``[n, d]``, an array or a tensor.
            y: ignored.
            checkpoint: folder; a fit that was interrupted goes on from there.
            progress: where iterations are shown.

        Raises:
            InvalidInput: NaN, rows that are all the same, more features than rows, integers in a tensor, or a setting
                out of range.
        """
        source = self._source(X, reset=True)
        check_settings(source.n, source.d, self._k(), self.sparsity)
        found = self._best_of_starts(source, checkpoint, progress)
        self.features_ = self._like(X, found.features)
        self.coefficients_ = self._like(X, found.coefficients)
        self.loss_curve_ = np.array(found.losses)
        self.best_iter_, self.n_iter_ = found.best, len(found.losses)
        self.explained_ = 1 - found.losses[found.best] / found.total
        self.reseeded_ = found.reseeded
        self._forget()
        return self

    def _best_of_starts(self, source: Source, checkpoint: str | Path | None, progress: Progress) -> Factorisation:
        if self.n_init < 1:
            raise InvalidInput(f"n_init={self.n_init}: must be at least 1")
        random = check_random_state(self.random_state)
        starts = self.n_init if isinstance(self.init, str) and self.init != "svd" else 1
        best: Factorisation | None = None
        for start in range(starts):
            codes = initial_coefficients(source, self._k(), self.init, generator(int(random.randint(2**31 - 1))))
            found = factorise(
                source, codes, sparsity=self.sparsity, solver=self.solver, max_iter=self.max_iter, tol=self.tol,
                patience=self.patience, reg=self.reg, progress=progress,
                checkpoint=None if checkpoint is None else Path(checkpoint) / f"start-{start}",
            )  # fmt: skip
            if best is None or min(found.losses) < min(best.losses):
                best = found
        assert best is not None
        return best

    @torch.no_grad()
    def partial_fit(self, X: Any, y: Any = None) -> "SemiNMF":
        """Go on with one more batch of activations that need not be kept: for streams larger than memory.

        The coefficients of the batch are solved for with the present features; the features are then solved for with
        all batches seen, older ones weighing less. The first batch, which has to hold at least as many rows as
        features, is factorised by itself; after :meth:`fit`, batches go on from what was fitted.

        Args:
            X: ``[batch, d]``.
            y: ignored.
        """
        if not 0 < self.forgetting <= 1:
            raise InvalidInput(f"forgetting={self.forgetting}: expected a number in (0, 1]")
        first = not hasattr(self, "features_")
        source = self._source(X, reset=first)
        if first:
            check_settings(source.n, source.d, self._k(), self.sparsity)
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            codes = initial_coefficients(source, self._k(), self.init, generator(int(seed)))
            how: dict[str, Any] = {"sparsity": self.sparsity, "solver": self.solver, "reg": self.reg}
            found = factorise(source, codes, max_iter=min(WARM_UP, self.max_iter), **how)
            features = found.features.T
            self._forget()
        else:
            source.scan()
            features = torch.as_tensor(self.features_).to(source.device, source.dtype).T
        count = entries_kept(source.d, self.sparsity)
        codes = _codes(source, features, count)
        cross, gram = torch.zeros_like(features), codes @ codes.T
        for where, block in source:
            cross += block @ codes[:, where].T
        if self._seen is not None:
            old = [torch.as_tensor(x).to(cross) for x in self._seen]
            cross, gram = cross + self.forgetting * old[0], gram + self.forgetting * old[1]
        # least squares in units of which every feature's coefficients have length 1, as in the iteration
        size = gram.diagonal().sqrt().clamp_min(1e-8)
        solved = keep_largest(solve_features(cross / size, gram / size / size[:, None], self.reg), count) / size
        # A feature that no batch has used for long stays as it was.
        unused = (gram.diagonal() <= 1e-16) | (solved.norm(dim=0) == 0)
        features = torch.where(unused, features, solved)
        self._seen = (cross, gram)
        self.features_ = self._like(X, features.T.contiguous())
        self.coefficients_ = self._like(X, codes.T.contiguous())
        self.n_iter_ = getattr(self, "n_iter_", 0) + 1
        self.n_samples_seen_ = getattr(self, "n_samples_seen_", 0) + source.n
        return self

    def _forget(self) -> None:
        self._seen: tuple[Tensor, Tensor] | None = None
        self.n_samples_seen_ = 0

    # ------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def transform(self, X: Any) -> Any:
        """How much of each feature new activations hold: non-negative least squares for the fitted features.

        The paper has no such step. On the rows that were fitted it gives a lower error than ``coefficients_``.

        Args:
            X: ``[n, d]``.

        Returns:
            ``[n, K]``, an array or a tensor as ``X`` is.
        """
        check_is_fitted(self, "features_")
        source = self._source(X, reset=False)
        features = torch.as_tensor(self.features_).to(source.device, source.dtype).T
        codes = _codes(source, features, entries_kept(source.d, self.sparsity))
        return self._like(X, codes.T.contiguous())

    def inverse_transform(self, X: Any) -> Any:
        """Activations ``[n, d]`` from coefficients ``[n, K]``.

        Args:
            X: coefficients.
        """
        check_is_fitted(self, "features_")
        if isinstance(X, Tensor):
            return X @ torch.as_tensor(self.features_).to(X)
        return np.asarray(X) @ np.asarray(torch.as_tensor(self.features_).cpu())

    @property
    def components_(self) -> Any:
        """The features, under scikit-learn's name."""
        check_is_fitted(self, "features_")
        return self.features_

    @property
    def _n_features_out(self) -> int:
        return self._k()

    def feature(self, index: int, site: str) -> Feature:
        """One feature for every other method: it reads its coefficient, and writes its neurons.

        The reading is :meth:`transform`'s, so that features which share neurons do not count twice; gradients flow
        through it.

        Args:
            index: of the feature.
            site: the component's name, such as ``"layers.3.mlp.act"``.
        """
        check_is_fitted(self, "features_")
        if not 0 <= index < len(self.features_):
            raise InvalidInput(f"feature {index}: {len(self.features_)} were fitted (0 to {len(self.features_) - 1})")
        features = torch.as_tensor(self.features_)
        return Feature(site, features[index], FactorReading(features, index), f"factor {index}")

    # ------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the features (safetensors) and settings (config.json); the coefficients of the fitted rows stay behind.

        Args:
            save_directory: a folder, made or replaced as a whole.
        """
        from safetensors.torch import save_file

        check_is_fitted(self, "features_")
        settings = self.get_params()
        settings["init"] = settings["init"] if isinstance(settings["init"], str) else "random"
        state = settings["random_state"]
        settings["random_state"] = int(state) if isinstance(state, int | np.integer) else None
        about = {"model": type(self).__name__, "settings": settings, "array": isinstance(self.features_, np.ndarray)}

        def write(folder: Path) -> None:
            features = torch.as_tensor(self.features_).detach().cpu().contiguous()
            save_file({"features": features}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(about, indent=1, default=float) + "\n")

        replace_folder(Path(save_directory), write)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SemiNMF":
        """What :meth:`save_pretrained` wrote, from a folder or from the Hugging Face hub.

        Args:
            folder: a folder, or a repository's name where there is no such folder.

        Raises:
            CheckpointError: a file is missing or broken.
        """
        from safetensors.torch import load_file

        source = Path(folder)
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            try:
                source = Path(snapshot_download(str(folder), allow_patterns=["config.json", "model.safetensors"]))
            except Exception as error:
                raise CheckpointError(f"{folder}: no such folder, and no such repository ({error})") from error
        try:
            about = json.loads((source / "config.json").read_text())
            features = load_file(source / "model.safetensors")["features"]
            loaded = cls(**about["settings"])
        except Exception as error:  # any way of being broken ends in one clear sentence
            raise CheckpointError(f"{source}: no readable SemiNMF ({type(error).__name__}: {error})") from error
        loaded.features_ = features.numpy() if about["array"] else features
        loaded.n_features_in_ = features.shape[1]
        loaded._forget()
        return loaded

    # ------------------------------------------------------------------------------------------------- inputs

    def _k(self) -> int:
        return int(self.n_components) if isinstance(self.n_components, np.integer) else self.n_components

    def _source(self, X: Any, reset: bool) -> Source:
        if isinstance(X, Tensor):
            source = Source(X, self.batch_size)
            if reset:
                self.n_features_in_ = source.d
            elif source.d != self.n_features_in_:
                raise InvalidInput(f"X has {source.d} features, SemiNMF was fitted on {self.n_features_in_}")
            if not reset:
                require_finite("X", X) if source.n * source.d <= 2**28 else source.scan()
            return source
        kinds = [np.float64, np.float32, np.float16]
        on_disk = isinstance(X, np.memmap)
        checked = validate_data(self, X, reset=reset, dtype=kinds, ensure_all_finite=not on_disk or not reset)
        # validate_data hands back a plain view of a file in memory's clothes: say again that it lies on disk
        return Source(X if on_disk and checked.dtype == X.dtype else checked, self.batch_size)

    def _like(self, X: Any, value: Tensor) -> Any:
        return value if isinstance(X, Tensor) else value.cpu().numpy()


def _codes(source: Source, features: Tensor, count: int) -> Tensor:
    """Coefficients ``[K, n]`` for fixed features ``[d, K]``, block by block."""
    product, inner = FeatureProduct(features, count), features.T @ features
    return torch.cat([nonnegative_codes(product(block), inner) for _, block in source], 1)
