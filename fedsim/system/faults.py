"""Tasks that are lost: a drop-out probability per task, what going offline does, and when it is noticed."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import number, one_of, seconds
from fedsim.kernel import to_ns
from fedsim.rng import Draw, Randomness
from fedsim.system.base import Ids


class Stage(IntEnum):
    """Where in a task its client drops out."""

    NONE = 0
    BEFORE = 1
    DURING = 2
    AFTER = 3


STAGES = {"before": Stage.BEFORE, "during": Stage.DURING, "after": Stage.AFTER}
"""The stages that a configuration can name."""


class Faults:
    """The fault model.

    Args:
        dropout: probability that a task is lost, independently for each.
        when: where: ``before`` the local work, ``during`` it, ``after`` it (before the upload), or
            ``any`` of the three with equal probability.
        on_offline: what becomes of a task whose client goes offline: ``finish``, ``lose``, ``pause``;
            None leaves it to :meth:`offline_policy`.
        detect: seconds until the server notices a loss.
        on_error: what a client whose local code raises brings about: ``fail`` ends the run, ``drop`` loses the
            task (outcome ``failed``).

    Raises:
        ConfigError: if an argument is out of range or an unknown name.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        when: str = "during",
        on_offline: str | None = None,
        detect: float = 0.0,
        on_error: str = "fail",
    ) -> None:
        self.dropout = number("dropout", dropout, least=0, most=1)
        self.when = one_of("when", when, (*STAGES, "any"))
        self.on_offline = None if on_offline is None else one_of("on_offline", on_offline, ("finish", "lose", "pause"))
        self.detect = seconds("detect", detect, least=0)
        self.detect_ns = to_ns(self.detect)
        """``detect`` in nanoseconds."""
        self.on_error = one_of("on_error", on_error, ("fail", "drop"))

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Take the run's randomness; nothing is drawn per client."""
        self._randomness = randomness

    def draw(self, clients: Ids, nth: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
        """Whether and where the ``nth[i]``-th task of ``clients[i]`` is lost.

        Returns:
            ``stage`` int8 ``[k]``, codes of :class:`Stage`; and ``fraction`` float64 ``[k]``, the share of
            the local work done by then: uniform in (0, 1) for DURING, 0 for BEFORE, else 1.
        """
        count = len(clients)
        if self.dropout == 0:
            return np.full(count, Stage.NONE, dtype=np.int8), np.ones(count)
        lost, which, where = self.dropout_draw(clients, nth).uniform(3).T
        if self.when == "any":
            stage = Stage.BEFORE + np.minimum(3 * which, 2).astype(np.int8)
        else:
            stage = np.full(count, STAGES[self.when], dtype=np.int8)
        stage = np.where(lost <= self.dropout, stage, Stage.NONE).astype(np.int8)
        fraction = np.where(stage == Stage.DURING, where, np.where(stage == Stage.BEFORE, 0.0, 1.0))
        return stage, fraction

    def dropout_draw(self, clients: int | Ids, nth: int | NDArray[np.int64]) -> Draw:
        """The key of what happens to clients' ``nth`` tasks: whether lost, at which stage and where in it."""
        return self._randomness("faults.dropout", clients, nth)

    def offline_policy(self, slotted: bool) -> str:
        """What going offline does to a task: ``on_offline``, else ``finish`` when slotted and ``lose`` when not.

        In a slotted model the state holds for a whole slot by decree and says who may begin, not when a
        phone was unplugged.
        """
        if self.on_offline is not None:
            return self.on_offline
        return "finish" if slotted else "lose"
