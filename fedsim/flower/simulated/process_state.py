"""What a process shares with the code of an app: global seeds, the clock's sleep, the log. Lent, and put back."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from fedsim.flower.simulated.internals import strategies_sleep
from fedsim.rng import Draw


@contextmanager
def seeded(draw: Draw) -> Iterator[None]:
    """Global generators of ``random``, NumPy and torch that begin at ``draw``; as they were before, afterwards.

    Nested, so that a client's draws do not move those of the server that waits for it.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = draw.torch_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class VirtualSleep:
    """``time.sleep`` that lets virtual time pass instead, in the thread that made it and while it is installed.

    Args:
        wait: lets so many seconds of virtual time pass.
    """

    def __init__(self, wait: Callable[[float], None]) -> None:
        self.wait = wait
        self._on = False
        self._thread = threading.get_ident()
        self._real = time.sleep

    def __call__(self, seconds: float) -> None:
        """Wait ``seconds``."""
        if not self._on or threading.get_ident() != self._thread:
            self._real(seconds)
        else:
            self.wait(seconds)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Be ``time.sleep``, and the ``sleep`` of Flower's strategies."""
        self._on = True
        try:
            with mock.patch.object(time, "sleep", self), strategies_sleep(self):
                yield
        finally:
            self._on = False  # modules of the app may keep it under a name of theirs

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Be real sleep again, while clients are at work: theirs is none of the server's."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before


class _Forward(logging.Handler):
    """Hands records on to another logger, without empty lines."""

    def __init__(self, to: logging.Logger) -> None:
        super().__init__()
        self.to = to

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().rstrip()
        if text:
            self.to.log(record.levelno, "flwr: %s", text)


@contextmanager
def flower_log(to: logging.Logger) -> Iterator[None]:
    """Flower's log lines in ours instead of on the screen."""
    flower = logging.getLogger("flwr")
    before, propagate = list(flower.handlers), flower.propagate
    flower.handlers, flower.propagate = [_Forward(to)], False
    try:
        yield
    finally:
        flower.handlers, flower.propagate = before, propagate


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Modules in ``folder`` found before all others."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
