"""How examples are spread over clients: evenly, by Dirichlet class shares, or in shards of one label."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, number, whole
from fedsim.rng import Randomness

Indices = NDArray[np.int64]


class Partition(ABC):
    """A rule that gives every example to exactly one client."""

    def split(self, labels: Indices, clients: int, classes: int, randomness: Randomness) -> list[Indices]:
        """The examples of each client.

        Args:
            labels: ``[n]`` class of each example, ``0 .. classes - 1``.
            clients: how many clients there are.
            classes: how many classes there are.
            randomness: where all draws come from, under the purpose ``"partition"``.

        Returns:
            For each client the positions in ``labels`` it holds, ascending; none is lost or held twice.

        Raises:
            ConfigError: if the examples cannot be spread like this.
        """
        clients = whole("clients", clients, least=1)
        labels = np.asarray(labels, dtype=np.int64)
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise ConfigError(f"labels to split must lie in 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
        holder = self.holders(labels, clients, classes, randomness)
        # A stable sort by holder keeps each client's positions ascending.
        order = np.argsort(holder, kind="stable")
        ends = np.cumsum(np.bincount(holder, minlength=clients))
        return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @abstractmethod
    def holders(self, labels: Indices, clients: int, classes: int, randomness: Randomness) -> Indices:
        """Which client, ``0 .. clients - 1``, holds each example ``[n]``; arguments as for :meth:`split`."""


class Iid(Partition):
    """Examples in random order, dealt so that no two clients' counts differ by more than one.

    Args:
        minimum: least examples per client; with 0 there may be more clients than examples.
    """

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = whole("minimum", minimum, least=0)

    def holders(self, labels: Indices, clients: int, classes: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
        _check_enough(len(labels), clients, self.minimum)
        holder = np.empty(len(labels), dtype=np.int64)
        holder[randomness("partition", 0).permutation(len(labels))] = _even_blocks(len(labels), clients)
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

    def holders(self, labels: Indices, clients: int, classes: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
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

    def holders(self, labels: Indices, clients: int, classes: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``."""
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
