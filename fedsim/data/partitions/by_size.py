"""Partitions that set how many examples each client holds, whatever these are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from fedsim.checks import ConfigError, number, whole
from fedsim.data.partitions.base import (
    Floats,
    Indices,
    Partition,
    Table,
    apportioned,
    check_enough,
    check_one_per_client,
    check_total,
    even_blocks,
    listed,
)
from fedsim.rng import Randomness


class Iid(Partition):
    """Examples in random order, dealt so that no two clients' counts differ by more than one.

    Args:
        minimum: least examples per client; with 0 there may be more clients than examples.
    """

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        check_enough(len(table), clients, self.minimum)
        holder = np.empty(len(table), dtype=np.int64)
        holder[randomness("partition", 0).permutation(len(table))] = even_blocks(len(table), clients)
        return holder


class Proportional(Partition):
    """Random examples, as many as the client's number says: client ``i`` has a weight, and its size follows that.

    Sizes are rounded by largest remainder. Clients that would hold fewer than ``minimum`` examples get what they lack
    from those that hold most.

    Args:
        minimum: least examples per client.
    """

    def __init__(self, minimum: int = 1) -> None:
        self.minimum = whole("minimum", minimum, least=0)

    @abstractmethod
    def weights(self, clients: int) -> Floats:
        """``[clients]``: what sizes are proportional to, for client ``i`` a function of ``i + 1``."""

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        check_enough(len(table), clients, self.minimum)
        sizes = apportioned(len(table), self.weights(clients), self.minimum)
        return _shuffled(sizes, len(table), randomness)


class Linear(Proportional):
    """Sizes proportional to ``i + 1``.

    Source: flwr-datasets' ``LinearPartitioner``, which rounds all sizes down and gives the last client the rest.
    """

    def weights(self, clients: int) -> Floats:
        """``[clients]``: 1, 2, 3 ..."""
        return np.arange(1, clients + 1, dtype=np.float64)


class Square(Proportional):
    """Sizes proportional to ``(i + 1)^2``.

    Source: flwr-datasets' ``SquarePartitioner``, which rounds all sizes down and gives the last client the rest.
    """

    def weights(self, clients: int) -> Floats:
        """``[clients]``: 1, 4, 9 ..."""
        return np.arange(1, clients + 1, dtype=np.float64) ** 2


class Exponential(Proportional):
    """Sizes proportional to ``e^(i + 1)``: the last few clients hold nearly everything.

    Source: flwr-datasets' ``ExponentialPartitioner``, which rounds all sizes down, gives the last client the rest, and
    refuses what leaves clients without examples: more than about ten of them.
    """

    def weights(self, clients: int) -> Floats:
        """``[clients]``, the largest of them 1."""
        weights: Floats = np.exp(np.arange(1.0 - clients, 1.0))
        return weights


class Size(Partition):
    """Random examples, as many for each client as it is told. What is left over no one holds.

    Source: flwr-datasets' ``SizePartitioner``, which takes counts only.

    Args:
        sizes: examples of each client, one number per client.
        fractions: instead of ``sizes``, each client's share of all examples; rounded by largest remainder.
    """

    def __init__(self, sizes: Sequence[int] | None = None, fractions: Sequence[float] | None = None) -> None:
        if (sizes is None) == (fractions is None):
            raise ConfigError(
                "sizes: give one of two lists, sizes=[..] or fractions=[..], with a number for every client"
            )
        self.sizes = None if sizes is None else listed("sizes", sizes, "whole numbers", whole)
        self.fractions = None if fractions is None else listed("fractions", fractions, "numbers", _fraction)
        if self.fractions is not None and not 0 < sum(self.fractions) <= 1 + 1e-9:
            raise ConfigError(f"fractions: must sum to a number > 0 and <= 1, they sum to {sum(self.fractions):g}")

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one."""
        if self.sizes is not None:
            check_one_per_client("sizes", self.sizes, clients)
            check_total("sizes", self.sizes, len(table))
            return _shuffled(np.array(self.sizes, dtype=np.int64), len(table), randomness)
        assert self.fractions is not None
        check_one_per_client("fractions", self.fractions, clients)
        unused = max(0.0, 1 - sum(self.fractions))
        weights = np.array([*self.fractions, unused if unused > 1e-9 else 0.0])
        return _shuffled(apportioned(len(table), weights)[:-1], len(table), randomness)


def _fraction(key: str, value: float) -> float:
    return number(key, value, least=0, most=1)


def _shuffled(sizes: Indices, examples: int, randomness: Randomness) -> Indices:
    """Who holds each of ``examples`` examples ``[n]``: any so many of them, -1 for the rest."""
    holder = np.full(examples, -1, dtype=np.int64)
    order = randomness("partition", 0).permutation(examples)
    holder[order[: sizes.sum()]] = np.repeat(np.arange(len(sizes)), sizes)
    return holder
