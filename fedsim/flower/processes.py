"""Other programs as processes of ours: started with a log each, watched, and stopped with all that they started.

Each begins a session of its own, so that a Ctrl-C in the terminal reaches only us, and so that what it starts can be
told from everything else on the machine: nothing outside these sessions is ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from fedsim.checks import Interrupted, SimulationError

if TYPE_CHECKING:
    import psutil

GRACE_SECONDS = 10.0
"""How long a process that was asked to end may take before it is killed."""

LONGEST_STOP_SECONDS = 40.0
"""After this everything that is left is killed at once; after twice as long it is left to the system."""

TAIL_LINES = 15
"""Lines of a dead process's log that an error shows."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Process:
    """One process that was started: what to call it, the process itself, and where its output goes."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its process id, which is that of its session too."""
        return self.popen.pid

    @property
    def status(self) -> int | None:
        """Its exit status: minus the signal's number if it was killed, None while it runs."""
        return self.popen.poll()

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its output."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def died(self) -> str:
        """One line on how it ended."""
        status = self.status
        if status is not None and status < 0:
            return f"{self.name} was killed by {signal.Signals(-status).name}"
        return f"{self.name} ended with status {status}"


class Processes:
    """Starts processes and, when it is left, stops them and whatever they have started.

    Args:
        folder: where the logs go, one ``NAME.log`` each; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []
        self._sessions: set[int] = set()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except BaseException:  # a signal, in the moment before it is ignored
            self.stop()
            raise

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Process:
        """Start ``command`` in ``folder``, with nothing to read and its output in ``NAME.log``.

        Raises:
            SimulationError: if there is no such program, or it cannot be started.
        """
        log = self.folder / f"{name.replace(' ', '-')}.log"
        try:
            with log.open("ab") as output, _later():  # what has been started must be known before we can be stopped
                popen = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=folder,
                    start_new_session=True,
                )
                process = Process(name, popen, log)
                self._sessions.add(popen.pid)
                self.started.append(process)
        except OSError as error:
            raise SimulationError(f"{name}: cannot be started: {command[0]}: {error.strerror}") from None
        return process

    def finish(self, process: Process, seconds: float) -> None:
        """Wait until ``process`` has ended well, for at most so many seconds.

        Raises:
            SimulationError: with the end of its log, if it fails or takes longer.
        """
        try:
            status = process.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise SimulationError(f"{process.name} has not ended after {seconds:g} s\n{process.tail()}") from None
        if status != 0:
            raise SimulationError(f"{process.died()}\n{process.tail()}")

    def look(self) -> None:
        """Keep the list of our sessions up to date; to be called every second or so while processes run.

        A child is found so even when its parent is gone, and a session that is empty is forgotten before the
        system can give its number to somebody else.
        """
        import psutil

        self._sessions = {member.session for member in self._members()}
        for process in self.started:
            if process.status is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._sessions.update(_sessions_of(psutil.Process(process.pid).children(recursive=True)))

    def stop(self) -> None:
        """Ask every process of our sessions to end, those first that have no children, and kill what does not.

        Signals that come meanwhile are ignored.
        """
        with _deaf():
            self.look()
            asked: dict[psutil.Process, float] = {}
            began = time.monotonic()
            while members := self._members():
                now = time.monotonic()
                if now - began > 2 * LONGEST_STOP_SECONDS:  # nobody can kill what hangs in the kernel
                    break
                parents = {process.ppid for process in members}
                for process in members:
                    patience = GRACE_SECONDS if now - began < LONGEST_STOP_SECONDS else 0.0
                    if process.pid not in parents or patience == 0.0:
                        _signal(process.itself, asked, now, patience)
                time.sleep(0.05)
            self._sessions.clear()

    def _members(self) -> list[_Member]:
        """Every process in our sessions that is alive."""
        import psutil

        for process in self.started:
            process.popen.poll()  # or it stays among the living
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if (session := os.getsid(pid)) in self._sessions:
                    itself = psutil.Process(pid)
                    if itself.status() != psutil.STATUS_ZOMBIE:
                        found.append(_Member(pid, itself.ppid(), session, itself))
        return found


@dataclass(frozen=True)
class _Member:
    pid: int
    ppid: int
    session: int
    itself: psutil.Process


def _sessions_of(processes: Iterable[psutil.Process]) -> set[int]:
    sessions = set()
    for process in processes:
        with contextlib.suppress(OSError):
            sessions.add(os.getsid(process.pid))
    return sessions


def _signal(process: psutil.Process, asked: dict[psutil.Process, float], now: float, patience: float) -> None:
    """Ask a process to end, or kill it if it was asked long enough ago."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        if process not in asked:
            asked[process] = now
            process.terminate()
        elif now - asked[process] >= patience:
            process.kill()


@contextlib.contextmanager
def _deaf() -> Any:
    before = {each: signal.signal(each, signal.SIG_IGN) for each in ENDING} if _in_main_thread() else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _later() -> Any:
    """Signals that come meanwhile act at the end of it."""
    came: list[int] = []
    heard = [each for each in ENDING if callable(signal.getsignal(each))] if _in_main_thread() else []
    before = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for missed in came:
            signal.raise_signal(missed)


@contextlib.contextmanager
def interruptible() -> Any:
    """While it is entered, and in the main thread, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`.

    So that what was started is stopped on the way out. A signal that the process ignores is left ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.strsignal(number) or "signal", number)

    heard = [each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN] if _in_main_thread() else []
    before = {each: signal.signal(each, interrupt) for each in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
