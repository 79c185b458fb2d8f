"""Which units different networks share: one to one, a few to one, and groups with groups.

Source: Li, Yosinski, Clune, Lipson and Hopcroft, *Convergent Learning: Do different neural networks learn the same
representations?*, ICLR 2016, arXiv:1511.07543.

    report = convergence_report([net_1, net_2, net_3], ["conv1", "conv2"], loader)
    report.to_frame()
    report.plot()

Where this differs from the published code: units that do not vary are left out and listed instead of giving NaN; sums
are centred, in double precision; pairs are scored on samples that they were not chosen on; untrained networks are
matched too, since shared inputs alone make units correlate; sparse maps are solved to exact zeros; the bias of a mutual
information in nats is corrected in nats.
"""

from broadsheet.geometry.convergent_learning.clusters import (
    UnitClusters,
    UnitTree,
    block_plot,
    hierarchical_unit_clusters,
    spectral_unit_clusters,
)
from broadsheet.geometry.convergent_learning.information import unit_mutual_information
from broadsheet.geometry.convergent_learning.mapping import MappingLayer, matched_layer
from broadsheet.geometry.convergent_learning.matching import UnitMatching, match_units
from broadsheet.geometry.convergent_learning.report import ConvergenceReport, LayerConvergence, convergence_report
from broadsheet.geometry.convergent_learning.sparse import SparseMap, SparsePath, sparse_map, sparse_path
from broadsheet.geometry.convergent_learning.statistics import (
    ConvergentLearningWarning,
    StackedUnits,
    UnitStatistics,
    unit_correlation,
)
from broadsheet.geometry.convergent_learning.subspaces import SubspaceOverlap, subspace_overlap

__all__ = [
    "ConvergenceReport",
    "ConvergentLearningWarning",
    "LayerConvergence",
    "MappingLayer",
    "SparseMap",
    "SparsePath",
    "StackedUnits",
    "SubspaceOverlap",
    "UnitClusters",
    "UnitMatching",
    "UnitStatistics",
    "UnitTree",
    "block_plot",
    "convergence_report",
    "hierarchical_unit_clusters",
    "match_units",
    "matched_layer",
    "sparse_map",
    "sparse_path",
    "spectral_unit_clusters",
    "subspace_overlap",
    "unit_correlation",
    "unit_mutual_information",
]
