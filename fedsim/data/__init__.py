"""Where the examples come from, and how they are spread over the clients."""

from fedsim.data.partitions import Dirichlet, Iid, Partition, Sampled, Shard, Spread, Table
from fedsim.data.sources import Dataset, Embedded, NpzFile, Source

__all__ = [
    "Dataset",
    "Dirichlet",
    "Embedded",
    "Iid",
    "NpzFile",
    "Partition",
    "Sampled",
    "Shard",
    "Source",
    "Spread",
    "Table",
]
