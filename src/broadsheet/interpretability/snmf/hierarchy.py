"""From narrow to broad concepts: the features of one factorisation are factorised again."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.snmf.estimator import SemiNMF
from broadsheet.interpretability.snmf.source import Source
from broadsheet.interpretability.snmf.tree import ConceptTree
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.training import fit as train


@dataclass(frozen=True)
class TunedFactors:
    """All levels' coefficients and the last level's features after joint tuning.

    Attributes:
        coefficients: ``G_1 [n, r_1], G_2 [r_1, r_2], ...``.
        features: ``[r_last, d]``.
        losses: mean squared error before each step.
    """

    coefficients: tuple[Tensor, ...]
    features: Float[Tensor, "r d"]
    losses: tuple[float, ...]

    @property
    def negative_share(self) -> float:
        """Share of the coefficients that are below 0: 0 unless the constraint was given up."""
        count = sum(int((g < 0).sum()) for g in self.coefficients)
        return count / sum(g.numel() for g in self.coefficients)


class HierarchicalSemiNMF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Semi-NMF of the activations, then of the features found, level after level.

    Level 0 factorises the activations into ``ranks[0]`` narrow features, level ``j`` the features of level ``j - 1``
    into ``ranks[j]`` broader ones, each with the same settings.

    Args:
        ranks: features of each level, falling.
        sparsity, init, n_init, solver, max_iter, tol, patience, reg, batch_size, random_state: of each level's
            :class:`~broadsheet.interpretability.snmf.SemiNMF`.

    Attributes:
        levels_: the fitted estimators; ``levels_[j].coefficients_`` links level ``j - 1`` to level ``j``.
        n_iter_: iterations of all levels.
        n_features_in_: neurons.

    Example:
        >>> import numpy as np
        >>> activations = np.random.default_rng(0).normal(size=(40, 10))
        >>> deep = HierarchicalSemiNMF(ranks=(4, 2), sparsity=0.5, max_iter=20).fit(activations)
        >>> deep.coefficients(1).shape, len(deep.concept_tree(1, 0).children) > 0
        ((40, 2), True)
    """

    # Any value is taken here and looked at in fit: scikit-learn's rule.
    def __init__(
        self,
        ranks: Any = (400, 200, 100, 50),
        sparsity: Any = 0.01,
        init: Any = "random",
        n_init: Any = 1,
        solver: Any = "multiplicative",
        max_iter: Any = 2000,
        tol: Any = 1e-4,
        patience: Any = 500,
        reg: Any = 1e-6,
        batch_size: Any = None,
        random_state: Any = 0,
    ) -> None:
        self.ranks = ranks
        self.sparsity = sparsity
        self.init = init
        self.n_init = n_init
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.patience = patience
        self.reg = reg
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any = None, *, checkpoint: str | Path | None = None, progress: Progress = SILENT
    ) -> "HierarchicalSemiNMF":
        """Factorise all levels.

        Args:
            X: ``[n, d]``, an array or a tensor.
            y: ignored.
            checkpoint: folder with one checkpoint for each level.
            progress: where iterations are shown.

        Raises:
            InvalidInput: ranks that do not fall, or what :meth:`SemiNMF.fit` refuses.
        """
        ranks = list(self.ranks)
        if not ranks or any(low >= high for high, low in itertools.pairwise(ranks)):
            raise InvalidInput(f"ranks={tuple(ranks)}: expected numbers of features that fall from level to level")
        settings = {name: value for name, value in self.get_params(deep=False).items() if name != "ranks"}
        self.levels_: list[SemiNMF] = []
        data = X
        for level, rank in enumerate(ranks):
            where = None if checkpoint is None else Path(checkpoint) / f"level-{level}"
            estimator = SemiNMF(rank, **settings).fit(data, checkpoint=where, progress=progress)
            self.levels_.append(estimator)
            data = estimator.features_
        self.n_features_in_ = self.levels_[0].n_features_in_
        self.n_iter_ = sum(estimator.n_iter_ for estimator in self.levels_)
        if hasattr(self.levels_[0], "feature_names_in_"):
            self.feature_names_in_ = self.levels_[0].feature_names_in_
        return self

    @property
    def _n_features_out(self) -> int:
        return len(self.levels_[-1].features_)

    def features(self, level: int) -> Any:
        """The features of a level, ``[r, d]``.

        Args:
            level: 0 for the narrowest.
        """
        return self._level(level).features_

    def links(self, level: int) -> Any:
        """How much of each feature of ``level`` is in each one of the narrowest, ``[r_0, r_level]``.

        Args:
            level: at least 1.
        """
        self._level(level)
        if level == 0:
            raise InvalidInput("level=0 is the narrowest: links go from it to level 1 and above")
        product = self.levels_[1].coefficients_
        for estimator in self.levels_[2 : level + 1]:
            product = product @ estimator.coefficients_
        return product

    def coefficients(self, level: int) -> Any:
        """Effective coefficients of a level on the rows that were fitted: ``G_1 G_2 ... G_level``, ``[n, r]``.

        Args:
            level: 0 for the narrowest.
        """
        narrow = self._level(0).coefficients_
        return narrow if level == 0 else narrow @ self.links(level)

    def parents(self, level: int) -> Int[Tensor, " r0"]:
        """Which feature of ``level`` each one of the narrowest is made of most: coefficient times the feature's length.

        Args:
            level: at least 1.
        """
        size = torch.as_tensor(self.features(level)).norm(dim=1)
        return (torch.as_tensor(self.links(level)) * size).argmax(1)

    def transform(self, X: Any) -> Any:
        """Coefficients of new activations at the last level, ``[n, r]``.

        Args:
            X: ``[n, d]``.
        """
        check_is_fitted(self, "levels_")
        narrow = self.levels_[0].transform(X)
        if len(self.levels_) == 1:
            return narrow
        links = self.links(len(self.levels_) - 1)
        return narrow @ (torch.as_tensor(links).to(narrow) if isinstance(narrow, Tensor) else links)

    def concept_tree(self, level: int, k: int, top_children: int = 3, threshold: float = 0.5) -> ConceptTree:
        """A broad feature, the narrower ones that it is made of, theirs, and so on.

        Args:
            level, k: which feature.
            top_children: of each feature at most.
            threshold: a child's coefficient has to reach this share of the largest one in its column.
        """
        estimator = self._level(level)
        if not 0 <= k < len(estimator.features_):
            raise InvalidInput(f"k={k}: level {level} has {len(estimator.features_)} features")
        if top_children < 1 or not 0 <= threshold <= 1:
            raise InvalidInput(f"top_children={top_children}, threshold={threshold}: expected at least 1, and 0 to 1")

        def grow(at: int, index: int, weight: float) -> ConceptTree:
            if at == 0:
                return ConceptTree(0, index, weight)
            column = torch.as_tensor(self.levels_[at].coefficients_)[:, index]
            best = column.topk(min(top_children, len(column)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            least = threshold * float(column.max())
            children = [grow(at - 1, child, value) for child, value in pairs if value > 0 and value >= least]
            return ConceptTree(at, index, weight, tuple(children))

        return grow(level, k, 1.0)

    def fine_tune(
        self, X: Any, *, steps: int = 500, lr: float = 1e-3, nonnegative: bool = True, **how: Any
    ) -> TunedFactors:
        """All levels' coefficients and the last features tuned together for the error on the activations (Adam).

        The official code lets coefficients go below 0 here; ours are cut at 0 after each step. Features keep their
        neurons. What was fitted stays as it was: trees are those of the untuned factors.

        Args:
            X: the activations that were fitted.
            steps, lr: of Adam.
            nonnegative: False for the official behaviour.
            **how: handed to :func:`broadsheet.nn.training.fit` (``checkpoint``, ``progress``, ...).
        """
        check_is_fitted(self, "levels_")
        data = next(iter(Source(X, Source(X).n)))[1].T
        chain = _Chain([torch.as_tensor(e.coefficients_) for e in self.levels_], torch.as_tensor(self.features(-1)))
        chain = chain.to(data)
        mask = chain.features.detach() != 0

        def after(step: int, model: Any) -> None:
            with torch.no_grad():
                chain.features *= mask
                if nonnegative:
                    for weight in chain.coefficients:
                        weight.clamp_min_(0)

        report = train(
            chain, lambda model, batch: (model() - batch).square().mean(), [data], steps=steps,
            optimizer=torch.optim.Adam(chain.parameters(), lr), callback=after, description="tuning all levels", **how,
        )  # fmt: skip
        return TunedFactors(
            tuple(weight.detach() for weight in chain.coefficients), chain.features.detach(), tuple(report.losses)
        )

    def _level(self, level: int) -> SemiNMF:
        check_is_fitted(self, "levels_")
        n = len(self.levels_)
        if not -n <= level < n:
            raise InvalidInput(f"level={level}: there are {n} levels (0, the narrowest, to {n - 1})")
        return self.levels_[level]


class _Chain(nn.Module):
    """The product of all levels."""

    def __init__(self, coefficients: list[Tensor], features: Tensor) -> None:
        super().__init__()
        self.coefficients = nn.ParameterList(nn.Parameter(g.clone()) for g in coefficients)
        self.features = nn.Parameter(features.clone())

    def forward(self) -> Tensor:
        product = self.features
        for weight in reversed(list(self.coefficients)):
            product = weight @ product
        return product
