"""Logistic regression with a penalty: convex, on real examples, with the optimum found to rounding."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, number, one_of
from fedsim.data.partitions import Divided, Iid, Partition, Table
from fedsim.data.sources import Dataset, Embedded, Source
from fedsim.problems.base import WEIGHTINGS, Problem, count_classes, objective_weights
from fedsim.problems.chain import Chain, Layer
from fedsim.rng import Randomness
from fedsim.vectors import Layout

MOST_FEATURES = 4096
"""The optimum needs a few matrices of so many rows and columns, 0.1 GB each, and minutes."""

MOST_ENTRIES = 2**29
"""Most features of all examples together, 4 GB of them."""

ROWS = 4096
"""Examples whose part of the Hessian is computed at once."""

ATTEMPTS = 100
"""Newton steps at most; a dozen is usual."""

SHORTEST = 1e-6
"""The shortest part of a Newton step to try."""


class LogisticRegression(Problem):
    """Client ``i`` has ``f_i(x) = mean_j log(1 + exp(-b_j h_j^T x)) + l2/2 ||x||^2``; the aim is ``sum_i p_i f_i``.

    ``h_j`` are an example's features with a 1 behind them, so that the last parameter is the bias; the penalty is on
    it as on the others, which makes the aim ``l2``-strongly convex. ``b_j`` is 1 for odd classes and -1 for even
    ones: with two classes that is class 1 against class 0, with ten it is the usual even against odd. float64.
    All training examples are the clients' (nothing is tuned on this, so no validation share is kept). The clients'
    examples are looked up once, client by client, to find the optimum. Features take 8 bytes each, of all examples for
    training and for testing together at most 4 GB.

    Attributes:
        train_h: ``[n, features + 1]``, the training examples.
        train_y: ``[n]``, 1 for odd classes and 0 for even ones; float64.
        spread: which training examples each client holds.
        weights: ``[clients]``: ``p``, in sum 1; a client without examples does not count.
        optimum: ``[features + 1]``: where the aim is least.

    Args:
        data: a source, or a data set already loaded; the embedded images unless given.
        partition: how training examples are spread; :class:`Iid` unless given.
        l2: factor of the penalty ``1/2 ||x||^2``.
        weighting: ``samples`` makes ``p_i = n_i / n``, ``uniform`` makes it 1 over the number of clients that have
            examples.

    Raises:
        ConfigError: from the constructor for wrong arguments, from :meth:`prepare` for data that do not fit.
    """

    def __init__(
        self,
        data: Source | Dataset | None = None,
        partition: Partition | None = None,
        l2: float = 0.01,
        weighting: str = "samples",
    ) -> None:
        self.data = Embedded() if data is None else data
        self.partition = Iid() if partition is None else partition
        self.l2 = number("l2", l2, least=1e-9, most=1e9)
        self.weighting = one_of("weighting", weighting, WEIGHTINGS)
        if not isinstance(self.data, (Dataset, Source)):
            raise ConfigError(f"data={data!r}: must be a Dataset or have load()")
        if not isinstance(self.partition, Partition):
            raise ConfigError(f"partition={partition!r}: must be a Partition")
        self.target_metric = ("distance", "below")

    # ---- preparation -----------------------------------------------------------------------------

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Load the data, spread them over ``clients`` clients and find the optimum."""
        data = self.data if isinstance(self.data, Dataset) else self.data.load()
        width = prod(data.shape) + 1
        if width > MOST_FEATURES + 1:
            raise ConfigError(f"problem: an example of {data.name} has {width - 1} features, allowed: {MOST_FEATURES}")
        entries = (len(data.train_y) + len(data.test_y)) * width
        if entries > MOST_ENTRIES:
            raise ConfigError(
                f"problem: the features of {data.name} take {entries / 2**27:.1f} GB; at most 4 GB can be held"
            )
        self.train_h, self.test_h = _features(data.train_x), _features(data.test_x)
        self.layout = Layout(("weight", "bias"), ((width - 1,), (1,)), torch.float64)
        self.labels, self.classes = data.train_y.numpy(), data.classes
        self.train_y, self.test_y = (each.remainder(2).double() for each in (data.train_y, data.test_y))
        self.spread = self.partition.split(self._table(data), clients, randomness)
        self.clients, self.samples = clients, self.spread.sizes
        self.weights = objective_weights(self.samples, self.weighting)
        self._share = self._example_weights()
        self._solve()

    def _table(self, data: Dataset) -> Table:
        """What a partition may know of the training examples."""
        ids = None if data.train_ids is None else data.train_ids.numpy()

        def feature(position: int) -> NDArray[np.float64]:
            column: NDArray[np.float64] = self.train_h[:, :-1][:, position].numpy()  # the last is the bias's 1
            return column

        return Table(self.labels, self.classes, ids, feature)

    def _example_weights(self) -> Tensor:
        """``[n]``: how much each training example counts in the aim, in sum 1."""
        held = np.concatenate(self.spread.each(np.arange(self.clients)))
        share = np.repeat(self.weights / np.maximum(self.samples, 1), self.samples)
        return torch.from_numpy(np.bincount(held, share, minlength=len(self.labels)))

    def _solve(self) -> None:
        """Newton's method, its steps halved until the gradient shrinks, until rounding lets it shrink no more."""
        x, slope = self.initial(), self._aim_gradient(self.initial())
        first = float(slope.norm())
        for _ in range(ATTEMPTS):
            step, singular = torch.linalg.solve_ex(self.hessian(x), slope)
            length = 0.0 if singular else 1.0
            while length > SHORTEST:
                tried = x - length * step
                tried_slope = self._aim_gradient(tried)
                if tried_slope.norm() < (1 - length / 4) * slope.norm():
                    break
                length /= 2
            else:
                break
            x, slope = tried, tried_slope
            if slope.norm() <= 1e-15 * first:
                break
        if not float(slope.norm()) <= 1e-12 * max(first, 1.0):
            raise ConfigError(f"problem.l2={self.l2}: the optimum cannot be found; take a larger l2, or scale the data")
        self.optimum = x
        self._least = self._aim(x)

    def hessian(self, x: Tensor) -> Tensor:
        """The aim's ``[d, d]`` at ``x [d]``."""
        odds = torch.sigmoid(self.train_h @ x)
        curvature = (self._share * odds * (1 - odds))[:, None]
        total = torch.zeros((len(x), len(x)), dtype=torch.float64)
        for start in range(0, len(odds), ROWS):  # the weighted examples of all at once would be as large as the data
            h = self.train_h[start : start + ROWS]
            total += (curvature[start : start + ROWS] * h).T @ h
        total.diagonal().add_(self.l2)
        return total

    def _aim_gradient(self, x: Tensor) -> Tensor:
        error = torch.sigmoid(self.train_h @ x) - self.train_y
        return self.train_h.T @ (self._share * error) + self.l2 * x

    def _aim(self, x: Tensor) -> float:
        margins = (2 * self.train_y - 1) * (self.train_h @ x)
        losses = torch.logaddexp(torch.zeros_like(margins), -margins)
        return float(self._share @ losses) + 0.5 * self.l2 * float(x @ x)

    # ---- what training and records need ----------------------------------------------------------

    def initial(self) -> Tensor:
        """Zeros ``[features + 1]``."""
        return self.layout.zeros()

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """One client's examples ``[n_i, features + 1]`` and labels ``[n_i]``, 0 or 1."""
        rows = torch.from_numpy(self.spread.of(client))
        return self.train_h.index_select(0, rows), self.train_y.index_select(0, rows)

    def chain(self) -> Chain:
        """One layer of one output; its bias is the weight of the 1 that ends every example."""
        layer = Layer(self.train_h.shape[1], 1, weight=0, bias=None)
        return Chain((layer,), "binary", self.train_h, self.train_y, self._rows, self.l2)

    def _rows(self, clients: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.concatenate(self.spread.each(clients)))

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """The gradient ``[d]`` at ``x [d]`` over a client's batch, penalty and all; zero without examples."""
        rows = torch.from_numpy(self.spread.of(client))
        if batch is not None:
            rows = rows[batch]
        if not len(rows):
            return self.layout.zeros()
        h, y = self.train_h.index_select(0, rows), self.train_y.index_select(0, rows)
        return h.T @ (torch.sigmoid(h @ x) - y) / len(rows) + self.l2 * x

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``loss``, the aim; ``accuracy`` on the test set; ``gap``, how far the aim is above its least; and
        ``distance``, squared, to the optimum.
        """
        loss = self._aim(x)
        right = (self.test_h @ x > 0) == (self.test_y > 0)
        gap = max(loss - self._least, 0.0)  # rounding may take the difference below zero
        distance = float(((x - self.optimum) ** 2).sum())
        return {"loss": loss, "accuracy": float(right.double().mean()), "gap": gap, "distance": distance}

    def class_counts(self) -> NDArray[np.int64]:
        """``[clients, classes]``: training examples of each class of the data each client holds."""

        def held(clients: NDArray[np.int64]) -> NDArray[np.int64]:
            return self.labels[np.concatenate(self.spread.each(clients))]

        return count_classes(held, self.samples, self.classes)

    def client_table(self) -> dict[str, NDArray[Any]]:
        """``samples`` and ``class_0 .. class_{classes - 1}``: how many examples of each class a client holds.

        Only ``samples`` where clients draw their examples when they are needed.
        """
        if not isinstance(self.spread, Divided):
            return super().client_table()
        counts = self.class_counts()
        return {"samples": self.samples} | {f"class_{label}": counts[:, label] for label in range(self.classes)}


def _features(x: Tensor) -> Tensor:
    """Examples ``[n, ...]`` as rows of float64 with a 1 behind them, ``[n, features + 1]``."""
    flat = x.flatten(1)
    features = torch.ones((len(flat), flat.shape[1] + 1), dtype=torch.float64)
    features[:, :-1] = flat
    return features
