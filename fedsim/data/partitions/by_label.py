"""Partitions by class: label skew of every kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, one_of, whole
from fedsim.data.partitions.base import (
    Floats,
    Indices,
    Partition,
    Table,
    check_enough,
    check_one_per_client,
    check_total,
    cut_classes,
    deal,
    even_blocks,
    listed,
    log_dirichlet,
    topped_up,
)
from fedsim.rng import Randomness


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
        check_enough(len(labels), clients, self.minimum)
        class_sizes = np.bincount(labels, minlength=classes)
        for attempt in range(self.attempts):
            generator = randomness("partition", attempt).generator()
            counts = self._counts(class_sizes, clients, generator)
            if counts.sum(axis=0).min() >= self.minimum:
                break
        holder = deal(labels, counts, generator.permutation(len(labels)))
        return topped_up(holder, clients, self.minimum, generator.permutation(len(labels)))

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
        holder[by_label] = dealt_to[even_blocks(len(labels), shards)]
        return holder


ASSIGNMENTS = ("random", "deterministic", "first-deterministic")


class Pathological(Partition):
    """Exactly so many classes for every client, each class cut equally among the clients that hold it.

    With ``random`` assignment a class may go to no one; then no one holds its examples.

    Source: Li, Diao, Chen and He 2022 (arXiv:2102.02079), ``#C = k``, as flwr-datasets' ``PathologicalPartitioner``
    offers it: the paper's own assignment is ``first-deterministic``.

    Args:
        classes_per_client: classes of each client.
        assignment: ``random``: any of them; ``deterministic``: client ``i`` has the classes ``i, i + 1, ..``, counted
            round; ``first-deterministic``: the class ``i``, counted round, and any others. Client ``i`` has the same
            classes in any population.
    """

    def __init__(self, classes_per_client: int = 2, assignment: str = "random") -> None:
        self.classes_per_client = whole("classes_per_client", classes_per_client, least=1)
        self.assignment = one_of("assignment", assignment, ASSIGNMENTS)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one."""
        labels, sizes = present(table)
        check_classes("classes_per_client", self.classes_per_client, len(sizes))
        held = np.zeros((clients, len(sizes)))
        held[np.arange(clients)[:, None], self._classes(clients, len(sizes), randomness)] = 1
        generator = randomness("partition", 1).generator()
        counts = cut_classes(sizes, held, generator, least=1)
        return deal(labels, counts, generator.permutation(len(labels)))

    def _classes(self, clients: int, classes: int, randomness: Randomness) -> Indices:
        """``[clients, classes_per_client]``: the classes of each client."""
        everyone = np.arange(clients)
        if self.assignment == "deterministic":
            return consecutive(clients, classes, self.classes_per_client)
        words = randomness("partition", 0, everyone).words(classes)
        if self.assignment == "first-deterministic":
            words[everyone, everyone % classes] = 0
        return np.argsort(words, axis=1)[:, : self.classes_per_client]


class Distribution(Partition):
    """Consecutive classes for every client, each class cut by weights given or drawn from a log-normal law.

    Client ``i`` holds the classes ``i, i + 1, ..``, counted round: first ``preassigned`` examples of each, then its
    share of the class's others. Its weights lie in its classes' rows, in the order of clients.

    Source: flwr-datasets' ``DistributionPartitioner``, after the power law of Li et al. 2020 (arXiv:1812.06127), whose
    MNIST has 1,000 clients, 2 classes each and ``sigma`` 2. There all shares are rounded down and one client of a
    class gets what is left of it; here by largest remainder. Nor need clients be a multiple of classes here.

    Args:
        classes_per_client: classes of each client.
        preassigned: examples of each of its classes that every client gets beforehand.
        sigma: standard deviation of the weights' logarithms.
        table: instead, the weights: a row per class that anyone holds, one number for each client that does.
    """

    def __init__(
        self,
        classes_per_client: int = 2,
        preassigned: int = 5,
        sigma: float = 2.0,
        table: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.classes_per_client = whole("classes_per_client", classes_per_client, least=1)
        self.preassigned = whole("preassigned", preassigned, least=0)
        self.sigma = number("sigma", sigma, least=0, most=1e6)
        self.table = None if table is None else listed("table", table, "lists, one per class", _row)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one, if there are fewer clients than classes."""
        labels, sizes = present(table)
        check_classes("classes_per_client", self.classes_per_client, len(sizes))
        held = np.zeros((clients, len(sizes)), dtype=np.bool_)
        held[np.arange(clients)[:, None], consecutive(clients, len(sizes), self.classes_per_client)] = True
        before = self.preassigned * held.sum(axis=0)
        if (before > sizes).any():
            raise ConfigError(
                f"partition.preassigned={self.preassigned}: takes {before[before > sizes][0]} examples of a class that "
                f"has {sizes[before > sizes][0]}, with clients={clients}"
            )
        generator = randomness("partition", 1).generator()
        weights = np.zeros(held.shape)
        weights.T[held.T] = self._weights(held, randomness)
        counts = cut_classes(sizes - before, weights, generator) + self.preassigned * held.T
        return deal(labels, counts, generator.permutation(len(labels)))

    def _weights(self, held: NDArray[np.bool_], randomness: Randomness) -> Floats:
        """The weights, class by class, in the order of the clients that hold it."""
        holders = held.sum(axis=0)
        if self.table is not None:
            found, needed = [len(row) for row in self.table], holders[holders > 0].tolist()
            if found != needed:
                raise ConfigError(
                    f"partition.table: its rows have {found} numbers, clients={len(held)} with "
                    f"classes_per_client={self.classes_per_client} need {needed}"
                )
            return np.array([weight for row in self.table for weight in row])
        logs = self.sigma * randomness("partition", 0).normal(int(holders.sum()))
        # Weights that differ by more than e^700 cannot both be told from nothing: the smaller gets the least there is.
        weights: Floats = np.exp(np.maximum(logs - logs.max(), -700))
        return weights


class InnerDirichlet(Partition):
    """Sizes first, then every client's class shares: each is drawn from a Dirichlet law of its own.

    Clients draw their examples in turns, whoever is not full being as likely as any other to be next, each a class by
    its shares. A class that is used up has no share any more; what a client would have drawn of it, it draws of the
    classes that are left.

    Source: Acar et al. 2021 (FedDyn, arXiv:2111.04263), flwr-datasets' ``InnerDirichletPartitioner``.

    Args:
        alpha: concentration of the class shares, 1e-9 to 1e9; small gives few classes per client.
        sizes: examples of each client, one number per client; what is left over no one holds. None shares all
            examples out equally.
    """

    def __init__(self, alpha: float = 0.5, sizes: Sequence[int] | None = None) -> None:
        self.alpha = number("alpha", alpha, least=1e-9, most=1e9)
        self.sizes = None if sizes is None else listed("sizes", sizes, "whole numbers", whole)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one."""
        labels, class_sizes = present(table)
        if self.sizes is None:
            sizes = np.bincount(even_blocks(len(labels), clients), minlength=clients)
        else:
            check_one_per_client("sizes", self.sizes, clients)
            check_total("sizes", self.sizes, len(labels))
            sizes = np.array(self.sizes, dtype=np.int64)
        generator = randomness("partition", 0).generator()
        shares = log_dirichlet(np.full((clients, len(class_sizes)), self.alpha), generator)
        turns = _turns(sizes, generator)
        drawn = _drawn_labels(turns, shares, class_sizes, generator)
        counts = np.bincount(drawn * clients + turns, minlength=shares.size).reshape(-1, clients)
        return deal(labels, counts, generator.permutation(len(labels)))


def present(table: Table) -> tuple[Indices, Indices]:
    """Labels ``[n]`` counted among the classes that have examples, and how many examples each of these has.

    Raises:
        ConfigError: if there are no examples.
    """
    if not len(table):
        raise ConfigError("partition: there are no training examples to spread")
    sizes = np.bincount(table.labels, minlength=table.classes)
    number_of = np.cumsum(sizes > 0) - 1
    return number_of[table.labels], sizes[sizes > 0]


def check_classes(key: str, wanted: int, classes: int) -> None:
    """Refuse more classes per client than the data have."""
    if wanted > classes:
        raise ConfigError(f"partition.{key}={wanted}: the training examples have {classes} classes")


def consecutive(clients: int, classes: int, each: int) -> Indices:
    """``[clients, each]``: the classes ``i, i + 1, ..`` of client ``i``, counted round."""
    found: Indices = (np.arange(clients)[:, None] + np.arange(each)) % classes
    return found


def _row(key: str, values: Sequence[float]) -> tuple[float, ...]:
    row: tuple[float, ...] = listed(key, values, "numbers", lambda key, value: number(key, value, least=0, most=1e100))
    if not sum(row) > 0:
        raise ConfigError(f"{key}={values}: must not be all zero")
    return row


def _turns(sizes: Indices, generator: np.random.Generator) -> Indices:
    """``[sum of sizes]``: who draws next, any client that is not full with the same chance.

    Each client draws at the instants of a Poisson process of its own, all of one rate, until it is full.
    """
    instants = np.concatenate([[0.0], np.cumsum(generator.standard_exponential(int(sizes.sum())))])
    own_start = np.repeat(instants[np.cumsum(sizes) - sizes], sizes)
    turns: Indices = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(instants[1:] - own_start, kind="stable")]
    return turns


def _drawn_labels(turns: Indices, shares: Floats, class_sizes: Indices, generator: np.random.Generator) -> Indices:
    """``[turns]``: the class drawn at each turn, none more often than it has examples.

    All turns draw at once as if nothing ran out. Then, for one class after the other, in the order in which they run
    out, the turns that came too late draw again of the classes still open: what drawing turn by turn would do.

    Args:
        turns: who draws.
        shares: ``[clients, classes]``, logarithms of their class shares.
        class_sizes: ``[classes]``.
        generator: where the draws come from.
    """
    open_classes = np.arange(len(class_sizes))
    drawn = _draw(turns, shares, open_classes, generator)
    while True:
        late = {}
        for label in np.flatnonzero(np.bincount(drawn, minlength=len(class_sizes)) > class_sizes):
            late[label] = np.flatnonzero(drawn == label)[class_sizes[label] :]
        if not late:
            return drawn
        first = min(late, key=lambda label: int(late[label][0]))
        open_classes = open_classes[open_classes != first]
        drawn[late[first]] = _draw(turns[late[first]], shares, open_classes, generator)


def _draw(turns: Indices, shares: Floats, open_classes: Indices, generator: np.random.Generator) -> Indices:
    """``[turns]``: a class of ``open_classes`` for each turn, by the client's shares of these."""
    logs = shares[:, open_classes]
    upto = np.cumsum(np.exp(logs - logs.max(axis=1, keepdims=True)), axis=1)
    where = generator.random(len(turns)) * upto[turns, -1]
    place = np.zeros(len(turns), dtype=np.int64)
    for edge in upto[:, :-1].T:  # a comparison per class takes a third of the time of one for all
        place += edge[turns] <= where
    drawn: Indices = open_classes[place]
    return drawn
