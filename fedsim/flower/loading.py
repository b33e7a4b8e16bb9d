"""A node's problem: the configured one with the node's part of it, or with data of the node's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedsim.checks import ConfigError
from fedsim.config import locate
from fedsim.data.partitions import Partition, Table
from fedsim.data.partitions.base import Indices
from fedsim.data.sources import Dataset
from fedsim.problems.base import Problem
from fedsim.problems.classification import Classification
from fedsim.rng import Randomness

Loader = Callable[[Mapping[str, Any]], Dataset | Problem]
"""What a user names: gets the node's own configuration (``partition-id`` and whatever else it was started with), gives
the data the node holds, as the training examples of a data set, or a whole problem."""


class AllHeldBy(Partition):
    """Every example is one client's.

    Args:
        client: whose.
    """

    def __init__(self, client: int) -> None:
        self.client = client

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """``client`` for each example ``[n]``."""
        return np.full(len(table), self.client, dtype=np.int64)


def own_problem(problem: Problem, loader: str, client: int, node_config: Mapping[str, Any]) -> Problem:
    """The problem, not yet prepared, that a node with data of its own trains.

    Args:
        problem: the configured one, which says what the model is.
        loader: ``package.module:function``, a :data:`Loader`.
        client: who the node is.
        node_config: what the node was started with.

    Raises:
        ConfigError: naming ``loader`` if there is no such function, or it gives something else.
    """
    module, colon, name = loader.partition(":")
    if not colon:
        raise ConfigError(f"loader={loader}: must be package.module:function")
    given = locate(f"{module}.{name}", "loader")(dict(node_config))
    if isinstance(given, Problem):
        return given
    if not isinstance(given, Dataset):
        raise ConfigError(f"loader={loader}: gave a {type(given).__name__}, must give a fedsim Dataset or Problem")
    if not isinstance(problem, Classification):
        name = type(problem).__name__
        raise ConfigError(f"loader={loader}: gave a Dataset, which {name} does not learn; give a Problem")
    return Classification(
        given,
        problem.model,
        AllHeldBy(client),
        validation=0.0,
        precision=problem.precision,
        compile=problem.compile,
    )


def prepared(problem: Problem, clients: int, seed: int) -> Problem:
    """The problem, ready to be trained in one thread.

    Raises:
        ConfigError: if its data cannot be had or do not fit.
    """
    torch.set_num_threads(1)  # more would change sums, and are slower on small models
    problem.prepare(clients, Randomness(seed))
    return problem
