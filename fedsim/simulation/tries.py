"""Whom picks of few try first, drawn for many picks at once: one key in plain Python costs as much as ten in arrays."""

from __future__ import annotations

import numpy as np

from fedsim.rng import Draw, Randomness

TOGETHER = 1024
"""Tries drawn at once."""

SPARE = 2
"""Tries of each pick beside those it needs, for most find somebody idle."""


class Tries:
    """Clients in the order in which each pick tries them, keyed by the pick's number: nothing here has to be saved.

    Args:
        randomness: of the run.
        clients: how many there are.
    """

    def __init__(self, randomness: Randomness, clients: int) -> None:
        self._randomness, self._clients = randomness, clients
        self._begin = 0
        """The first pick that has been drawn for."""
        self._width = 0
        self._drawn: list[list[int]] = []

    def draw(self, pick: int) -> Draw:
        """The key of a pick."""
        return self._randomness("pick by trial", pick)

    def first(self, pick: int, k: int) -> list[int]:
        """What ``draw(pick).integers(clients, k + SPARE)`` is."""
        row, width = pick - self._begin, k + SPARE
        if not (0 <= row < len(self._drawn) and width <= self._width):
            row, self._begin, self._width = 0, pick, width
            together = self._randomness("pick by trial", pick + np.arange(-(-TOGETHER // width)))
            self._drawn = together.integers(self._clients, width).tolist()
        tried = self._drawn[row]
        return tried if width == self._width else tried[:width]
