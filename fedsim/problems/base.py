"""What the simulator and its workers need of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, one_of
from fedsim.problems.chain import Chain
from fedsim.problems.network import Network
from fedsim.problems.sequential import Stage
from fedsim.rng import Randomness
from fedsim.vectors import Layout

WEIGHTINGS = ("samples", "uniform")
"""How clients may count in an objective: by their examples, or all alike."""

CLIENTS = 100
"""Clients whose own examples are looked up at once: drawn together they cost a tenth of what they do one by one."""

EXAMPLES = 10**6
"""Examples looked up at once at most, if clients hold very many."""


class Problem(ABC):
    """An objective ``f(x) = sum_i p_i f_i(x)`` spread over clients.

    After :meth:`prepare` a problem is read only: workers share it. ``gradient`` is all that training
    needs of it, ``evaluate`` all that the records need.
    """

    clients: int
    """How many clients there are."""
    samples: NDArray[np.int64]
    """``[clients]``: how many training examples each client holds."""
    layout: Layout
    """How a flat parameter vector is made up."""
    trains: bool = True
    """False if there is nothing to train: local steps then take virtual time only."""
    target_metric: tuple[str, str] | None = None
    """The metric ``target`` is compared with, and ``"above"`` or ``"below"``; None if there is none."""
    client_parts: tuple[str, ...] = ()
    """For what clients keep examples of their own apart from training: none, or some of ``"test", "validation"``."""

    @abstractmethod
    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Spread the problem over ``clients`` clients: sets ``clients``, ``samples`` and ``layout``.

        Every draw must come from ``randomness``, so that the spread is a function of the seed alone.
        """

    @abstractmethod
    def initial(self) -> Tensor:
        """A new copy of the initial model ``[d]``."""

    @abstractmethod
    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """The gradient ``[d]`` at ``x [d]`` of one client's mean loss over ``batch``.

        Args:
            x: parameters; not to be changed.
            client: whose data.
            batch: positions ``0 .. samples[client] - 1`` within the client's own examples; None is all of them.
            noise: a 63-bit seed, different for every gradient, for models that draw (dropout).
        """

    def descend(self, x: Tensor, client: int, batch: Tensor | None, noise: int, lr: Tensor) -> None:
        """``x <- x - lr * gradient`` in place: for problems that need not make the gradient to take a step.

        Args:
            x: parameters ``[d]``.
            client: whose data, as ``batch`` and ``noise`` for :meth:`gradient`.
            batch: positions within the client's examples; None is all of them.
            noise: the seed of what is drawn.
            lr: the learning rate ``[1]``, of the parameters' dtype.
        """
        x.addcmul_(lr, self.gradient(x, client, batch, noise), value=-1.0)

    @abstractmethod
    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Metrics of one parameter vector, such as ``loss, accuracy, val_loss, val_accuracy``."""

    def chain(self) -> Chain | None:
        """The problem as a chain of linear layers, if it is one: whole groups are then trained without autograd."""
        return None

    def network(self) -> Network | None:
        """The problem as a torch module, if it is one: whole groups are then trained as stacks on a GPU."""
        return None

    def on(self, device: torch.device) -> Problem:
        """A copy to train from, whose examples and module are on another device; vectors must be there, too.

        Raises:
            ConfigError: if this problem can be trained in main memory only.
        """
        raise ConfigError(f"device={device.type}: {type(self).__name__} is trained in main memory only, use device=cpu")

    def with_linear(self, made: Callable[[str, str | None], Stage]) -> Problem:
        """This problem to train from, with linear layers that ``made`` makes from the names of weight and bias.

        Itself, unless it is a module in single precision with such layers, all of whose layers are known.
        """
        return self

    def evaluate_clients(self, x: Tensor, clients: NDArray[np.int64], part: str) -> dict[str, NDArray[np.float64]]:
        """Metrics of one parameter vector on each client's own examples, such as ``loss, accuracy``.

        Args:
            x: parameters ``[d]``; not to be changed.
            clients: whose examples, ``[k]``.
            part: which of them, one of ``client_parts``.

        Returns:
            ``[k]`` for each metric, NaN for a client that keeps no examples apart; nothing if no client does.
        """
        return {}

    def class_counts(self) -> NDArray[np.int64] | None:
        """``[clients, classes]``: training examples of each class each client holds; None if there are no classes."""
        return None

    def client_table(self) -> dict[str, NDArray[Any]]:
        """Columns about the clients for ``clients.parquet`` (class counts, say), each of length ``clients``."""
        return {"samples": self.samples}


def objective_weights(samples: NDArray[np.int64], weighting: str) -> NDArray[np.float64]:
    """``p [clients]`` of the objective ``sum_i p_i F_i``: ``n_i / n`` (``samples``), or the same for all who have data.

    Raises:
        ConfigError: if ``weighting`` is another name.
    """
    counts = samples if one_of("weighting", weighting, WEIGHTINGS) == "samples" else samples > 0
    weights: NDArray[np.float64] = counts / max(int(counts.sum()), 1)
    return weights


def count_classes(
    labels: Callable[[NDArray[np.int64]], NDArray[np.int64]], samples: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """``[clients, classes]``: examples of each class each client holds.

    Args:
        labels: gives the classes of the examples of clients ``[k]``, client by client.
        samples: ``[clients]``, how many examples each client holds.
        classes: how many classes there are.
    """
    counts = np.empty((len(samples), classes), dtype=np.int64)
    at_once = max(1, min(CLIENTS, EXAMPLES // max(1, int(samples.max()))))
    for start in range(0, len(samples), at_once):
        some = np.arange(start, min(start + at_once, len(samples)))
        owner = np.repeat(np.arange(len(some)), samples[some])
        cells = np.bincount(owner * classes + labels(some), minlength=len(some) * classes)
        counts[some] = cells.reshape(len(some), classes)
    return counts
