"""How examples are spread over clients: evenly, by Dirichlet class shares, in shards, or drawn by each client."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, optional_number, whole
from fedsim.rng import Randomness

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """What a partition may know of the examples it spreads.

    Attributes:
        labels: int64 ``[n]``, class of each example, ``0 .. classes - 1``.
        classes: how many classes there are.
        ids: int64 ``[n]``, the natural client of each example (writer, role, subject); None if there is none.
        feature: gives one feature of every example, float64 ``[n]``, by its position in the flat example; None if the
            examples cannot be looked at.

    Raises:
        ConfigError: for labels that are no classes.
    """

    labels: Indices
    classes: int
    ids: Indices | None = None
    feature: Callable[[int], NDArray[np.float64]] | None = None

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels, dtype=np.int64)
        object.__setattr__(self, "labels", labels)
        if labels.size and not (labels.min() >= 0 and labels.max() < self.classes):
            raise ConfigError(
                f"labels to split must lie in 0 to {self.classes - 1}, got {labels.min()} to {labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.labels)


class Spread(ABC):
    """Which examples each client holds. Read only, small, and fit to be pickled.

    Attributes:
        sizes: ``[clients]``, how many examples each client holds.
    """

    sizes: Indices

    @abstractmethod
    def of(self, client: int) -> Indices:
        """``[sizes[client]]``: the positions of one client's examples; not to be written to."""


class Divided(Spread):
    """Every example with exactly one client.

    Attributes:
        order: ``[n]`` positions of the examples, client by client, ascending within each.
        starts: ``[clients + 1]``: client ``i`` holds ``order[starts[i]:starts[i + 1]]``.

    Args:
        holder: ``[n]`` which client holds each example.
        clients: how many clients there are.
    """

    def __init__(self, holder: Indices, clients: int) -> None:
        self.sizes = np.bincount(holder, minlength=clients)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        # A stable sort by holder keeps each client's positions ascending.
        self.order = np.argsort(holder, kind="stable")

    def of(self, client: int) -> Indices:
        """One client's examples, ascending."""
        return self.order[self.starts[client] : self.starts[client + 1]]


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


class Partition(ABC):  # noqa: B024 - either of two methods makes one
    """A rule by which clients hold examples.

    A rule that gives every example to exactly one client writes :meth:`holders`; any other one writes :meth:`spread`.
    """

    def split(self, table: Table, clients: int, randomness: Randomness) -> Spread:
        """The examples of each client.

        Args:
            table: what may be known of the examples.
            clients: how many clients there are.
            randomness: where all draws come from, under the purpose ``"partition"``.

        Returns:
            Which positions in the table each client holds.

        Raises:
            ConfigError: if the examples cannot be spread like this.
        """
        return self.spread(table, whole("clients", clients, least=1), randomness)

    def spread(self, table: Table, clients: int, randomness: Randomness) -> Spread:
        """What :meth:`split` returns; its arguments have been checked."""
        return Divided(self.holders(table, clients, randomness), clients)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client, ``0 .. clients - 1``, holds each example ``[n]``; arguments as for :meth:`split`."""
        raise NotImplementedError(f"{type(self).__name__} must have holders() or spread()")


class Iid(Partition):
    """Examples in random order, dealt so that no two clients' counts differ by more than one.

    Args:
        minimum: least examples per client; with 0 there may be more clients than examples.
    """

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        _check_enough(len(table), clients, self.minimum)
        holder = np.empty(len(table), dtype=np.int64)
        holder[randomness("partition", 0).permutation(len(table))] = _even_blocks(len(table), clients)
        return holder


class Dirichlet(Partition):
    """Every class is cut among the clients in shares drawn from a symmetric Dirichlet law.

    The shares are drawn anew, at most 100 times, until every client has ``minimum`` examples. Where that
    does not come about (small ``alpha``, many clients) the last draw is kept and each client that is short
    takes what it lacks, one example at a time, from whoever has the most then: random examples of theirs.

    Source: Hsu, Qi and Brown 2019 (arXiv:1909.06335) in the per-class form of Yurochkin et al. 2019
    (arXiv:1905.12022), which flwr-datasets' ``DirichletPartitioner`` uses too.

    Args:
        alpha: concentration; small gives few classes per client, large gives equal shares.
        minimum: least examples per client.
    """

    attempts = 100

    def __init__(self, alpha: float = 0.3, minimum: int = 1) -> None:
        self.alpha = number("alpha", alpha, above=0, most=1e9)
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        labels, classes = table.labels, table.classes
        _check_enough(len(labels), clients, self.minimum)
        class_sizes = np.bincount(labels, minlength=classes)
        for attempt in range(self.attempts):
            generator = randomness("partition", attempt).generator()
            counts = self._counts(class_sizes, clients, generator)
            if counts.sum(axis=0).min() >= self.minimum:
                break
        shuffled = generator.permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        holder = np.empty(len(labels), dtype=np.int64)
        holder[by_class] = np.repeat(np.tile(np.arange(clients), classes), counts.reshape(-1))
        return _topped_up(holder, clients, self.minimum, generator.permutation(len(labels)))

    def _counts(self, class_sizes: Indices, clients: int, generator: np.random.Generator) -> Indices:
        """``[classes, clients]``: how many examples of each class each client gets."""
        counts = np.zeros((len(class_sizes), clients), dtype=np.int64)
        for label, size in enumerate(class_sizes):
            shares = generator.dirichlet(np.full(clients, self.alpha))
            cuts = np.minimum(np.floor(np.cumsum(shares) * size), size).astype(np.int64)
            cuts[-1] = size
            # Cutting in an order of its own per class: else rounding would favour the same clients in every class.
            counts[label, generator.permutation(clients)] = np.diff(cuts, prepend=0)
        return counts


class Shard(Partition):
    """Examples sorted by label are cut into equal shards, and every client is dealt some of them.

    Shard sizes differ by at most one. Source: McMahan et al. 2017 (arXiv:1602.05629), section 3.

    Args:
        shards_per_client: shards dealt to each client; few give few classes per client.
    """

    def __init__(self, shards_per_client: int = 2) -> None:
        self.shards_per_client = whole("shards_per_client", shards_per_client, least=1)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        labels = table.labels
        shards = clients * self.shards_per_client
        if len(labels) < shards:
            raise ConfigError(
                f"partition.shards_per_client={self.shards_per_client}: clients={clients} need {shards} training "
                f"examples, one per shard, there are {len(labels)}"
            )
        shuffled = randomness("partition", 0).permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        dealt_to = randomness("partition", 1).permutation(shards) // self.shards_per_client
        holder = np.empty(len(labels), dtype=np.int64)
        holder[by_label] = dealt_to[_even_blocks(len(labels), shards)]
        return holder


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


def _check_enough(examples: int, clients: int, minimum: int) -> None:
    if examples < clients * minimum:
        raise ConfigError(
            f"partition.minimum={minimum}: clients={clients} need {clients * minimum} training examples, "
            f"there are {examples}"
        )


def _even_blocks(items: int, blocks: int) -> Indices:
    """The block ``0 .. blocks - 1`` of each of ``items`` items in a row; sizes differ by at most one."""
    return np.arange(items, dtype=np.int64) * blocks // max(items, 1)


def _topped_up(holder: Indices, clients: int, minimum: int, order: Indices) -> Indices:
    """``holder`` with examples moved, in ``order``, from the largest clients to those below ``minimum``."""
    sizes = np.bincount(holder, minlength=clients)
    lacking = np.maximum(minimum - sizes, 0)
    if not lacking.any():
        return holder
    held = order[np.argsort(holder[order], kind="stable")]  # each client's examples in a row, randomly ordered
    following = np.cumsum(sizes) - sizes  # where the next example a client gives away lies in `held`
    largest = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(largest)
    for receiver in np.repeat(np.arange(clients), lacking):
        size, giver = largest[0]
        holder[held[following[giver]]] = receiver
        following[giver] += 1
        heapq.heapreplace(largest, (size + 1, giver))
    return holder
