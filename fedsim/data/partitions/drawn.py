"""Clients that draw their examples when they are asked for: any population from any data set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, optional_number, whole
from fedsim.data.partitions.base import Indices, Partition, Spread, Table
from fedsim.rng import Randomness


class Drawn(Spread):
    """Every client's examples drawn when they are asked for: see :class:`Sampled`. Nothing is kept per client.

    Args:
        labels: ``[n]`` class of each example.
        clients: how many clients there are.
        samples: examples each client draws.
        alpha: concentration of the clients' class shares; None gives all of them the data's own.
        randomness: where all draws come from, keyed by ``("partition", client)``.
    """

    def __init__(
        self, labels: Indices, clients: int, samples: int, alpha: float | None, randomness: Randomness
    ) -> None:
        self.sizes = np.full(clients, samples, dtype=np.int64)
        self.samples, self.alpha, self.randomness = samples, alpha, randomness
        sizes = np.bincount(labels)
        self.class_sizes = sizes[sizes > 0]
        """Of the classes that have examples: of no other is anything drawn."""
        self.class_starts = np.cumsum(self.class_sizes) - self.class_sizes
        self.by_class = np.argsort(labels, kind="stable")

    def of(self, client: int) -> Indices:
        """One client's examples, in the order drawn."""
        positions: Indices = self.draw(np.array([client]))[0]
        return positions

    def each(self, clients: Indices) -> list[Indices]:
        """One client's examples after the other's, in the order drawn."""
        return list(self.draw(clients))

    def draw(self, clients: Indices) -> Indices:
        """``[k, samples]``: the examples of each of ``clients [k]``, for a tenth of the time that one by one takes."""
        return self._positions(self.randomness("partition", clients).uniform(self._words))

    @property
    def _words(self) -> int:
        return 2 * (len(self.class_sizes) + self.samples)

    def _positions(self, uniform: NDArray[np.float64]) -> Indices:
        """``[k, samples]`` from ``uniform [k, words]``: the first make the class shares, then two make each example."""
        classes = len(self.class_sizes)
        upto = np.cumsum(self._shares(uniform[:, : 2 * classes]), axis=1)
        which, where = uniform[:, 2 * classes :: 2], uniform[:, 2 * classes + 1 :: 2]
        label = (upto[:, None, :] <= (which * upto[:, -1:])[:, :, None]).sum(axis=2)
        label = np.minimum(label, classes - 1)  # rounding may take which * total up to the total
        size = self.class_sizes[label]
        within = np.minimum((where * size).astype(np.int64), size - 1)
        positions: Indices = self.by_class[self.class_starts[label] + within]
        return positions

    def _shares(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[k, classes]`` class shares up to a factor, from ``uniform [k, 2 classes]``.

        Gamma variates made equal to one in sum are Dirichlet. With small ``alpha`` nearly all of them lie below
        the smallest float, so they are made as logarithms: if ``G ~ Gamma(alpha + 1)`` and ``U`` is uniform,
        ``G U^(1 / alpha) ~ Gamma(alpha)`` (Marsaglia and Tsang 2000, section 6).
        """
        if self.alpha is None:
            return np.broadcast_to(self.class_sizes.astype(np.float64), (len(uniform), len(self.class_sizes)))
        from scipy.special import gammaincinv  # half a second that no other partition should pay

        classes = len(self.class_sizes)
        logs = np.log(gammaincinv(self.alpha + 1, uniform[:, :classes])) + np.log(uniform[:, classes:]) / self.alpha
        shares: NDArray[np.float64] = np.exp(logs - logs.max(axis=1, keepdims=True))
        return shares


class Sampled(Partition):
    """Every client draws its examples for itself, when it is first needed: any population from any data set.

    Client ``i`` has class shares ``q_i ~ Dirichlet(alpha, .., alpha)`` over the classes that have examples, and each
    of its examples is a class drawn from ``q_i``, then any example of that class. The draws are keyed by (seed,
    client): a client holds the same examples in a population of any size. Unlike the others this rule neither keeps
    clients apart nor uses all data: clients may share an example, one may hold it twice, and some no one holds.

    Source: Hsu, Qi and Brown 2019 (arXiv:1909.06335), who draw every client's class distribution from a Dirichlet
    law; with ``K`` equally frequent classes their concentration is ``K`` times ``alpha``.

    Args:
        samples: examples of each client.
        alpha: concentration, 1e-9 to 1e9; small gives few classes per client, large equally many of each. None
            gives every client the data's own class frequencies.
    """

    def __init__(self, samples: int = 20, alpha: float | None = 0.3) -> None:
        self.samples = whole("samples", samples, least=1, most=10**6)
        self.alpha = optional_number("alpha", alpha, least=1e-9, most=1e9)

    def spread(self, table: Table, clients: int, randomness: Randomness) -> Drawn:
        """Nothing is drawn yet: the :class:`Drawn` does so client by client."""
        if not len(table):
            raise ConfigError(f"partition.samples={self.samples}: there are no training examples to draw from")
        return Drawn(table.labels, clients, self.samples, self.alpha, randomness)
