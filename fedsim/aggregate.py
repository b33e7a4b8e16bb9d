"""Weights of updates: by samples, uniform, by staleness, and what unbiased ones are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import number, one_of
from fedsim.federation import Federation, Reply
from fedsim.local import LocalSGD
from fedsim.problems.base import WEIGHTINGS
from fedsim.vectors import weighted_sum

STALENESS_LAWS = ("constant", "polynomial", "hinge")


def reply_weights(replies: Sequence[Reply], weighting: str) -> list[float]:
    """Weights that sum to 1: ``n_i / sum n_j`` (``samples``) or ``1 / k`` (``uniform``).

    When no client of the cohort has a sample the sample weights are all zero.
    """
    if one_of("weighting", weighting, WEIGHTINGS) == "uniform":
        return [1.0 / len(replies)] * len(replies)
    total = sum(reply.samples for reply in replies)
    return [reply.samples / total if total else 0.0 for reply in replies]


def mean_update(replies: Sequence[Reply], weighting: str, name: str = "delta") -> Tensor:
    """``sum_i w_i reply_i[name]`` ``[d]``, the weights as :func:`reply_weights` gives them, in order of arrival."""
    return weighted_sum([reply[name] for reply in replies], reply_weights(replies, weighting))


def mean_direction(replies: Sequence[Reply], rate: float) -> Tensor:
    """``(1 / (rate sum_i K_i)) sum_i (x_0 - x_{i, K_i})`` ``[d]``: the mean of all local steps, in units of gradient.

    Args:
        replies: with the updates ``delta``, of tasks of ``K_i`` local steps that began at one model.
        rate: the learning rate of the steps. Zeros come back if it is 0 or no step was made.
    """
    length = rate * sum(reply.task.steps for reply in replies)
    factor = -1.0 / length if length else 0.0
    return weighted_sum([reply["delta"] for reply in replies], [factor] * len(replies))


def expected_seconds(fed: Federation, job: LocalSGD) -> NDArray[np.float64]:
    """``tau [clients]``: how long a task of ``job`` is expected to keep each client busy, at least one nanosecond."""
    ids = np.arange(fed.clients)
    gradients = job.local_steps(ids, fed.samples) * job.gradients_per_step
    return np.maximum(fed.profile(ids, gradients), 1e-9)


@dataclass(frozen=True)
class StalenessWeight:
    """The factor ``s(u)`` of an update ``u`` versions old (FedAsync, arXiv 1903.03934, section 5.2).

    ``constant``: 1; ``polynomial``: ``(u + 1)^-a``; ``hinge``: 1 up to ``b``, then ``1 / (a (u - b) + 1)``.
    """

    law: str = "polynomial"
    a: float = 0.5
    b: float = 4.0

    def __post_init__(self) -> None:
        one_of("staleness", self.law, STALENESS_LAWS)
        number("staleness_a", self.a, least=0)
        number("staleness_b", self.b, least=0)

    def __call__(self, staleness: int) -> float:
        """``s(staleness)``, in (0, 1]."""
        if self.law == "constant":
            return 1.0
        if self.law == "polynomial":
            return float((staleness + 1) ** -self.a)
        return 1.0 if staleness <= self.b else 1.0 / (self.a * (staleness - self.b) + 1.0)
