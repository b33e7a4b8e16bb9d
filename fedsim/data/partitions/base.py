"""What every partition is made of: the table it sees, the spread it makes, and how whole examples are shared out."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError, whole
from fedsim.rng import Randomness

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


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
        ConfigError: for labels that are no classes, and for another number of ids than of labels.
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
        if self.ids is not None:
            object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.int64))
            if self.ids.shape != labels.shape:
                raise ConfigError(f"ids to split by must be {len(labels)}, one per label, got {len(self.ids)}")

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

    def each(self, clients: Indices) -> list[Indices]:
        """What :meth:`of` gives for each of ``clients [k]``."""
        return [self.of(client) for client in clients.tolist()]


class Divided(Spread):
    """Every example with one client at most.

    Attributes:
        order: ``[held]`` positions of the examples that are held, client by client, ascending within each.
        starts: ``[clients + 1]``: client ``i`` holds ``order[starts[i]:starts[i + 1]]``.

    Args:
        holder: ``[n]`` which client holds each example; -1 for those that no one does.
        clients: how many clients there are.
    """

    def __init__(self, holder: Indices, clients: int) -> None:
        held = holder[holder >= 0]
        self.sizes = np.bincount(held, minlength=clients)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        # A stable sort by holder keeps each client's positions ascending.
        self.order = np.argsort(holder, kind="stable")[len(holder) - len(held) :]

    def of(self, client: int) -> Indices:
        """One client's examples, ascending."""
        return self.order[self.starts[client] : self.starts[client + 1]]


class Partition(ABC):  # noqa: B024 - either of two methods makes one
    """A rule by which clients hold examples.

    A rule that gives no example to two clients writes :meth:`holders`; any other one writes :meth:`spread`.
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
            ConfigError: if the examples cannot be spread like this, or no client would hold any.
        """
        made = self.spread(table, whole("clients", clients, least=1), randomness)
        if not made.sizes.any():
            raise ConfigError(
                f"partition: no client holds an example; clients={clients} could share {len(table)} training examples"
            )
        return made

    def spread(self, table: Table, clients: int, randomness: Randomness) -> Spread:
        """What :meth:`split` returns; its arguments have been checked."""
        return Divided(self.holders(table, clients, randomness), clients)

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client, ``0 .. clients - 1``, holds each example ``[n]``, -1 for no one; arguments of :meth:`split`."""
        raise NotImplementedError(f"{type(self).__name__} must have holders() or spread()")


# ---- sharing out whole examples --------------------------------------------------------------------


def check_enough(examples: int, clients: int, minimum: int) -> None:
    """Refuse a ``minimum`` of examples per client that so few examples cannot give."""
    if examples < clients * minimum:
        raise ConfigError(
            f"partition.minimum={minimum}: clients={clients} need {clients * minimum} training examples, "
            f"there are {examples}"
        )


def even_blocks(items: int, blocks: int) -> Indices:
    """The block ``0 .. blocks - 1`` of each of ``items`` items in a row; sizes differ by at most one."""
    return np.arange(items, dtype=np.int64) * blocks // max(items, 1)


def topped_up(holder: Indices, clients: int, minimum: int, order: Indices) -> Indices:
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


def apportioned(total: int, weights: Floats, least: int = 0) -> Indices:
    """Whole numbers ``[k]`` that sum to ``total`` and follow ``weights [k]`` by largest remainder.

    Those below ``least`` are raised to it, one by one from whichever is the largest then. Ties go to the first, so
    callers who must favour no one hand the weights over in random order.

    Args:
        total: what is shared out, at least ``least`` times ``k``.
        weights: not negative, of positive sum.
        least: the smallest share.
    """
    exact = weights / weights.sum() * total
    shares: Indices = np.floor(exact).astype(np.int64)
    left = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    lacking = int(np.maximum(least - shares, 0).sum())
    if lacking:
        shares = np.maximum(shares, least)
        largest = [(-int(share), place) for place, share in enumerate(shares)]
        heapq.heapify(largest)
        for _ in range(lacking):
            share, place = largest[0]
            shares[place] -= 1
            heapq.heapreplace(largest, (share + 1, place))
    return shares


def cut_classes(class_sizes: Indices, weights: Floats, generator: np.random.Generator, least: int = 0) -> Indices:
    """``[classes, clients]``: every class cut among the clients that have a positive weight for it.

    Args:
        class_sizes: ``[classes]``, how many examples of each class there are to cut.
        weights: ``[clients, classes]``, what the cut follows.
        generator: draws who comes first where rounding has to favour someone, anew for every class.
        least: fewest examples of a class that a client with a positive weight for it gets.

    Raises:
        ConfigError: if a class has too few examples for that.
    """
    counts = np.zeros(weights.T.shape, dtype=np.int64)
    for label, size in enumerate(class_sizes):
        holders = generator.permutation(np.flatnonzero(weights[:, label]))
        if size < least * len(holders):
            raise ConfigError(
                f"clients={len(weights)}: {len(holders)} of them would hold the same class, which has only {size} "
                "training examples; take fewer clients or fewer classes per client"
            )
        if len(holders):
            counts[label, holders] = apportioned(int(size), weights[holders, label], least)
    return counts


def deal(labels: Indices, counts: Indices, shuffled: Indices) -> Indices:
    """Who holds each example ``[n]`` if clients get so many of each class; -1 for what is left over.

    Args:
        labels: ``[n]`` class of each example, ``0 .. classes - 1``.
        counts: ``[classes, clients]``.
        shuffled: ``[n]``, the order in which the examples of a class are dealt.
    """
    classes, clients = counts.shape
    left = np.bincount(labels, minlength=classes) - counts.sum(axis=1)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    holder = np.empty(len(labels), dtype=np.int64)
    receivers = np.tile(np.append(np.arange(clients), -1), classes)
    holder[by_class] = np.repeat(receivers, np.column_stack([counts, left]).reshape(-1))
    return holder


def log_dirichlet(concentration: Floats, generator: np.random.Generator) -> Floats:
    """Logarithms ``[..., k]`` of Dirichlet shares of ``concentration [..., k]``, exact where shares are too small.

    If ``G ~ Gamma(a + 1)`` and ``E`` is exponential, ``log G - E / a`` is the logarithm of a ``Gamma(a)`` variate
    (Marsaglia and Tsang 2000, section 6); gamma variates made equal to one in sum are Dirichlet.
    """
    logs = np.log(generator.standard_gamma(concentration + 1))
    logs -= generator.standard_exponential(concentration.shape) / concentration
    normalised: Floats = logs - np.logaddexp.reduce(logs, axis=-1, keepdims=True)
    return normalised


def listed(key: str, values: Any, allowed: str, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """``values`` as a tuple, each passed through ``check(key, value)``.

    Raises:
        ConfigError: if it is no list or an empty one; whatever ``check`` raises.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"{key}={values}: must be a list of {allowed}")
    return tuple(check(f"{key}[{place}]", value) for place, value in enumerate(values))


def check_one_per_client(key: str, values: Sequence[Any], clients: int) -> None:
    """Refuse a list that has not one value for every client."""
    if len(values) != clients:
        raise ConfigError(f"partition.{key}: {len(values)} numbers for clients={clients}")


def check_total(key: str, sizes: Sequence[int], examples: int) -> None:
    """Refuse sizes that sum to more than the examples there are."""
    if sum(sizes) > examples:
        raise ConfigError(f"partition.{key}: sum to {sum(sizes)}, there are {examples} training examples")
