"""Who talks to whom among peers: graphs and their mixing matrices.

A mixing matrix ``W [n, n]`` is symmetric and doubly stochastic with Metropolis weights,
``w_ij = 1 / (1 + max(degree_i, degree_j))`` on every edge and the rest of each row on the diagonal, so a gossip step
``X <- W X`` keeps the mean of the rows and brings them together by the factor :func:`second_eigenvalue`.
Source: Xiao, Boyd and Lall 2005 for the weights; arXiv 2302.04083 for the graphs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, whole
from fedsim.rng import Draw

Adjacency = NDArray[np.bool_]
"""``[n, n]``, symmetric, without loops."""


class Topology(ABC):
    """A graph over ``n`` nodes, perhaps another one at every gossip step."""

    def mixing_matrix(self, nodes: int, draw: Draw) -> Tensor:
        """``W [nodes, nodes]`` in float64.

        Args:
            nodes: how many there are, at least 1.
            draw: the randomness of this gossip step, for graphs that are drawn.
        """
        return metropolis(self.adjacency(nodes, draw))

    def check(self, nodes: int) -> None:  # noqa: B027 - most graphs fit any number of nodes
        """Refuse settings that do not fit so many nodes.

        Raises:
            ConfigError: naming the setting.
        """

    @abstractmethod
    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """Who is a neighbour of whom; arguments as for :meth:`mixing_matrix`."""


def metropolis(adjacency: Adjacency) -> Tensor:
    """Metropolis weights of an undirected graph: symmetric, doubly stochastic, ``[n, n]`` in float64."""
    degree = adjacency.sum(axis=1)
    weights = np.where(adjacency, 1.0 / (1.0 + np.maximum(degree[:, None], degree[None, :])), 0.0)
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=1))
    return torch.from_numpy(weights)


def second_eigenvalue(mixing_matrix: Tensor) -> float:
    """``max(|lambda_2|, |lambda_n|)`` of a symmetric mixing matrix: how much of the differences one step leaves."""
    if len(mixing_matrix) == 1:
        return 0.0
    eigenvalues = torch.linalg.eigvalsh(mixing_matrix.double())  # ascending; the last one is 1
    return float(eigenvalues[:-1].abs().max())


class Ring(Topology):
    """Every node talks to the one before and the one behind it."""

    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """Neighbours ``i - 1`` and ``i + 1`` modulo ``nodes``."""
        return _circulant(nodes, [1])


class Grid(Topology):
    """A square lattice without wrap-around: ``ceil(sqrt(n))`` columns, the last row perhaps not full."""

    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """Neighbours to the left, to the right, above and below."""
        columns = math.isqrt(nodes - 1) + 1
        ids = np.arange(nodes)
        right = ids[(ids % columns < columns - 1) & (ids + 1 < nodes)]
        below = ids[ids + columns < nodes]
        return _edges(nodes, np.concatenate([right, below]), np.concatenate([right + 1, below + columns]))


class Exponential(Topology):
    """Neighbours at distances 1, 2, 4, 8, ... on a ring, in both directions."""

    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """Neighbours ``i +- 2^k`` modulo ``nodes`` for ``k = 0 .. floor(log2(nodes - 1))``."""
        return _circulant(nodes, [2**k for k in range((nodes - 1).bit_length())])


class Full(Topology):
    """Everybody talks to everybody: one step gives all nodes the mean."""

    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """Everybody else."""
        return ~np.eye(nodes, dtype=np.bool_)


class Random(Topology):
    """Fresh random neighbours at every gossip step: random cycles through all nodes, so that the graph is connected.

    Args:
        degree: neighbours of each node (fewer where two cycles share an edge); an odd one adds a random matching, and
            1 is the matching alone, which connects the nodes only over several steps.

    Raises:
        ConfigError: if ``degree`` is below 1.
    """

    def __init__(self, degree: int = 4) -> None:
        self.degree = whole("degree", degree, least=1)

    def check(self, nodes: int) -> None:
        """Refuse a degree that is not below the number of nodes."""
        if self.degree >= nodes > 1:
            raise ConfigError(f"topology.degree={self.degree}: must be below clients={nodes}, or take topology=full")

    def adjacency(self, nodes: int, draw: Draw) -> Adjacency:
        """A cycle for every two neighbours, and a matching for the odd one."""
        cycles, matching = divmod(self.degree, 2)
        orders = np.argsort(draw.words((cycles + matching, nodes)), axis=1)
        src, dst = orders[:cycles].ravel(), np.roll(orders[:cycles], -1, axis=1).ravel()
        if matching:
            pairs = orders[-1, : nodes // 2 * 2].reshape(-1, 2)
            src, dst = np.concatenate([src, pairs[:, 0]]), np.concatenate([dst, pairs[:, 1]])
        return _edges(nodes, src, dst)


def _circulant(nodes: int, offsets: list[int]) -> Adjacency:
    ids, distance = np.arange(nodes), np.array(offsets, dtype=np.int64)[:, None]
    return _edges(nodes, np.tile(ids, len(offsets)), ((ids + distance) % nodes).ravel())


def _edges(nodes: int, src: NDArray[np.int64], dst: NDArray[np.int64]) -> Adjacency:
    """The undirected graph of these edges, without loops."""
    adjacency = np.zeros((nodes, nodes), dtype=np.bool_)
    adjacency[src, dst] = adjacency[dst, src] = True
    np.fill_diagonal(adjacency, False)
    return adjacency
