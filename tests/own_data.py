"""Loaders as users write them, for the tests of deployments."""

from __future__ import annotations

import numpy as np

import fedsim
from fedsim.data import Dataset, Embedded, Iid
from fedsim.rng import Randomness


def examples(node_config):
    """The examples that the configured partition gives this node, as if they were its own."""
    client, clients = node_config["partition-id"], node_config["num-partitions"]
    problem = fedsim.Classification(Embedded(), partition=Iid(), validation=0.02)
    problem.prepare(clients, Randomness(0))
    rows = problem.part_rows(np.array([client]), "training")
    return Dataset(problem.train_x[rows], problem.train_y[rows], problem.test_x[:1], problem.test_y[:1], 10)


def problem(node_config):
    """A problem in which one client holds everything."""
    return fedsim.LeastSquares(samples_low=5, samples_high=9)


def nothing(node_config):
    """No data at all."""
    return
