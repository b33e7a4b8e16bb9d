"""What the tests of partitions share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partitions import (
    Partition,
    Spread,
    Table,
)
from fedsim.rng import Randomness

Array = NDArray[Any]


def parts_of(spread: Spread) -> list[Array]:
    return [spread.of(client) for client in range(len(spread.sizes))]


def counted(partition: Partition, table: Table, clients: int, seed: int = 0) -> Array:
    """``[clients, classes]`` counts."""
    parts = parts_of(partition.split(table, clients, Randomness(seed)))
    return np.stack([np.bincount(table.labels[part], minlength=table.classes) for part in parts])


def balanced(examples: int, classes: int = 10, **more: Any) -> Table:
    return Table(np.arange(examples) % classes, classes, **more)


def law_holds(pvalue: float) -> bool:
    """One test in ten thousand would fail by chance; the draws are keyed, so none does twice."""
    return bool(pvalue > 1e-4)
