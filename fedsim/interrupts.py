"""The first SIGINT or SIGTERM asks a run to stop at the end of its instant, so that it can save itself."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fedsim.checks import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, and in the main thread, a first signal is only noted; a second one acts as usual.

    A signal that the process ignores is left ignored.

    Attributes:
        received: the signal's number, None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heard = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
            self._before = {each: signal.signal(each, self._note) for each in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self, _: object) -> None:
        """An observer of the simulation.

        Raises:
            Interrupted: if a signal has come.
        """
        if self.received is not None:
            raise Interrupted(signal.strsignal(self.received) or "signal", self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        text = b"fedsim: stopping at the end of this instant to save the run; once more stops at once\n"
        os.write(2, text)  # print may be in the middle of something

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
