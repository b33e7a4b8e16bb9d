"""Partitions by what is known of an example besides its class: who made it, or one of its features."""

from __future__ import annotations

import numpy as np

from fedsim.checks import ConfigError, number, whole
from fedsim.data.partitions.base import Floats, Indices, Partition, Table, check_enough, even_blocks
from fedsim.rng import Randomness


class Natural(Partition):
    """Every client is one of those who made the data: a writer, a role, a subject.

    If there are more of them than clients, a random choice takes part and the examples of the others no one holds. The
    choice is keyed: client ``i`` is the same in a population of any size.

    Source: flwr-datasets' ``NaturalIdPartitioner``, where all take part in the order of their ids.

    Args:
        minimum: fewest examples that one must have made to take part.
    """

    def __init__(self, minimum: int = 1) -> None:
        self.minimum = whole("minimum", minimum, least=1)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one."""
        if table.ids is None:
            raise ConfigError("partition=natural: these data do not say who made an example; take another partition")
        ids, of_example, sizes = np.unique(table.ids, return_inverse=True, return_counts=True)
        enough = np.flatnonzero(sizes >= self.minimum)
        if clients > len(enough):
            raise ConfigError(
                f"clients={clients}: partition=natural has {len(enough)} with minimum={self.minimum} training examples "
                "(problem.validation keeps examples back)"
            )
        chosen = enough[randomness("partition", 0).permutation(len(enough))[:clients]]
        client = np.full(len(ids), -1, dtype=np.int64)
        client[chosen] = np.arange(clients)
        holder: Indices = client[of_example]
        return holder


class Continuous(Partition):
    """Examples sorted by one feature, more or less strictly, and cut into equal parts.

    They are sorted by ``strictness`` times the standardised feature plus ``1 - strictness`` times standard normal
    noise. Examples that are equal in that come in random order.

    Source: flwr-datasets' ``ContinuousPartitioner``.

    Args:
        feature: which one: its position in the flat example.
        strictness: 0 to 1: 0 deals at random, 1 sorts by the feature alone.
        minimum: least examples per client.
    """

    def __init__(self, feature: int = 0, strictness: float = 0.5, minimum: int = 1) -> None:
        self.feature = whole("feature", feature, least=0)
        self.strictness = number("strictness", strictness, least=0, most=1)
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        check_enough(len(table), clients, self.minimum)
        score = (1 - self.strictness) * randomness("partition", 0).normal(len(table))
        if self.strictness and len(table):
            score += self.strictness * self._standardised(table)
        holder = np.empty(len(table), dtype=np.int64)
        holder[np.lexsort((randomness("partition", 1).words(len(table)), score))] = even_blocks(len(table), clients)
        return holder

    def _standardised(self, table: Table) -> Floats:
        """``[n]``: the feature, of mean 0 and standard deviation 1."""
        if table.feature is None:
            raise ConfigError("partition=continuous: the examples of these data cannot be looked at")
        try:
            values = table.feature(self.feature)
        except IndexError:
            raise ConfigError(f"partition.feature={self.feature}: an example has no such position") from None
        spread = values.std()
        if not spread > 1e-9 * np.abs(values).max():  # what rounding leaves of equal values
            raise ConfigError(f"partition.feature={self.feature}: is the same in every example; take another one")
        standardised: Floats = (values - values.mean()) / spread
        return standardised
