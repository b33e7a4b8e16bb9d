"""The two partitions of APPFL, in which FedCompass and its baselines were compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, optional_whole, whole
from fedsim.data.partitions.base import (
    Indices,
    Partition,
    Table,
    check_enough,
    cut_classes,
    deal,
    log_dirichlet,
    topped_up,
)
from fedsim.data.partitions.by_label import check_classes, present
from fedsim.rng import Randomness

FEWEST = {1: 10, 2: 7, 3: 6, 4: 5, 5: 5, 6: 4, 7: 4}
MOST = {1: 10, 2: 8, 3: 8, 4: 7, 5: 6, 6: 6, 7: 5}
"""Fewest and most classes of a client by the number of clients, for ten classes; with more clients 3 and 5."""


class AppflClass(Partition):
    """Every client holds some classes, each cut among the clients that hold it in about equal parts.

    A client has ``c ~ U{minimum_classes .. maximum_classes}`` classes, any of them. All clients draw anew until every
    class is held. A class is cut in proportion to ``|N(10, 3)|``, one example at least for each of its clients.

    Source: the class partition of FedCompass (Li et al. 2024, arXiv:2309.14675), as APPFL's ``class_noniid_partition``
    has it, bounds included.

    Args:
        minimum_classes: fewest classes of a client; None for what APPFL's table has for so many clients.
        maximum_classes: most classes of a client; None as above.
    """

    attempts = 1000

    def __init__(self, minimum_classes: int | None = None, maximum_classes: int | None = None) -> None:
        self.minimum_classes = optional_whole("minimum_classes", minimum_classes, least=1)
        self.maximum_classes = optional_whole("maximum_classes", maximum_classes, least=1)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        labels, sizes = present(table)
        held = self._held(clients, len(sizes), randomness)
        generator = randomness("partition", self.attempts).generator()
        weights = np.where(held, np.abs(generator.normal(10, 3, held.shape)), 0.0)
        counts = cut_classes(sizes, weights, generator, least=1)
        return deal(labels, counts, generator.permutation(len(labels)))

    def bounds(self, clients: int, classes: int) -> tuple[int, int]:
        """Fewest and most classes of a client, given so many clients and classes with examples.

        Raises:
            ConfigError: if there are not so many classes, or the fewest are more than the most.
        """
        fewest, most = self.minimum_classes, self.maximum_classes
        if fewest is None:
            fewest = min(FEWEST.get(clients, 3), most or classes, classes)
        if most is None:
            most = min(max(MOST.get(clients, 5), fewest), classes)
        check_classes("minimum_classes", fewest, classes)
        check_classes("maximum_classes", most, classes)
        if fewest > most:
            raise ConfigError(f"partition.minimum_classes={fewest}: must not be above maximum_classes={most}")
        return fewest, most

    def _held(self, clients: int, classes: int, randomness: Randomness) -> NDArray[np.bool_]:
        """``[clients, classes]``: who holds what, every class held by someone."""
        fewest, most = self.bounds(clients, classes)
        for attempt in range(self.attempts if clients * most >= classes else 0):
            uniform = randomness("partition", attempt, np.arange(clients)).uniform(classes + 1)
            wanted = fewest + np.floor(uniform[:, 0] * (most + 1 - fewest)).astype(np.int64)
            rank = np.argsort(np.argsort(uniform[:, 1:], axis=1), axis=1)
            held: NDArray[np.bool_] = rank < wanted[:, None]
            if held.any(axis=0).all():
                return held
        raise ConfigError(
            f"partition.maximum_classes={most}: clients={clients} do not come to hold all {classes} classes; raise one"
        )


class DualDirichlet(Partition):
    """Client sizes and every client's class mix, both drawn from Dirichlet laws.

    Sizes ``p ~ Dir(alpha1 / clients, ..)``, class mixes ``q_i ~ Dir(alpha2 * frequencies of the classes)``; of class
    ``j`` client ``i`` gets the share ``p_i q_ij / sum_k p_k q_kj``. Clients left with fewer than ``minimum`` examples
    take what they lack from those that hold most.

    Source: the dual Dirichlet partition of FedCompass (Li et al. 2024, arXiv:2309.14675), as APPFL's
    ``dirichlet_noniid_partition`` has it; there shares are rounded down, the last client gets the rest, and no client
    is promised an example.

    Args:
        alpha1: concentration of the sizes, 1e-9 to 1e9, of all clients together; 8 is flat for 8 clients.
        alpha2: concentration of the class mixes, 1e-9 to 1e9, of all classes together: 0.5 is 0.05 for each of ten.
        minimum: least examples per client.
    """

    def __init__(self, alpha1: float = 8.0, alpha2: float = 0.5, minimum: int = 1) -> None:
        self.alpha1 = number("alpha1", alpha1, least=1e-9, most=1e9)
        self.alpha2 = number("alpha2", alpha2, least=1e-9, most=1e9)
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        labels, sizes = present(table)
        check_enough(len(labels), clients, self.minimum)
        generator = randomness("partition", 0).generator()
        logs = log_dirichlet(np.full(clients, self.alpha1 / clients), generator)[:, None]
        logs = logs + log_dirichlet(np.tile(self.alpha2 * sizes / len(labels), (clients, 1)), generator)
        counts = cut_classes(sizes, np.exp(logs - logs.max(axis=0)), generator)
        holder = deal(labels, counts, generator.permutation(len(labels)))
        return topped_up(holder, clients, self.minimum, generator.permutation(len(labels)))
