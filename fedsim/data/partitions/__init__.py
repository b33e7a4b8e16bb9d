"""How examples are spread over clients.

* by size: evenly (:class:`Iid`), by a client's number (:class:`Linear`, :class:`Square`, :class:`Exponential`), as
  told (:class:`Size`);
* by label: :class:`Dirichlet`, :class:`InnerDirichlet`, :class:`DualDirichlet`, :class:`Shard`, :class:`Pathological`,
  :class:`Distribution`, :class:`AppflClass`;
* by what else is known of an example: :class:`Natural`, :class:`Continuous`;
* drawn by each client when needed: :class:`Sampled`;
* by the package of the same names: :class:`FlwrDatasets`.
"""

from fedsim.data.partitions.appfl import AppflClass, DualDirichlet
from fedsim.data.partitions.base import Divided, Indices, Partition, Spread, Table
from fedsim.data.partitions.by_example import Continuous, Natural
from fedsim.data.partitions.by_label import Dirichlet, Distribution, InnerDirichlet, Pathological, Shard
from fedsim.data.partitions.by_size import Exponential, Iid, Linear, Size, Square
from fedsim.data.partitions.drawn import Drawn, Sampled
from fedsim.data.partitions.flwr import FlwrDatasets

__all__ = [
    "AppflClass",
    "Continuous",
    "Dirichlet",
    "Distribution",
    "Divided",
    "Drawn",
    "DualDirichlet",
    "Exponential",
    "FlwrDatasets",
    "Iid",
    "Indices",
    "InnerDirichlet",
    "Linear",
    "Natural",
    "Partition",
    "Pathological",
    "Sampled",
    "Shard",
    "Size",
    "Spread",
    "Square",
    "Table",
]
