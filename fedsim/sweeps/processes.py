"""The members of a sweep while they run, each in a process of its own, and what they tell."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedsim.assemble import Assembly
from fedsim.checks import FedsimError, Interrupted
from fedsim.progress import done, ended, state
from fedsim.sweeps.index import Index
from fedsim.sweeps.members import AFRESH, RESUMED
from fedsim.sweeps.screen import Screen

if TYPE_CHECKING:
    from fedsim.simulation import Simulation

PRELOADED = ["fedsim.sweeps", "pyarrow.parquet", "pandas"]
"""What every member needs: imported once, before they part. It takes longer than many a run."""

TELL_SECONDS = 0.25
"""Between two words of a member on how far it is."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep: the name of its folder, its configuration and choices, and what becomes of it."""

    name: str
    config: dict[str, Any]
    choices: dict[str, str]
    state: str


@dataclass
class Sweep:
    """The members of a sweep while they run, at most ``jobs`` at a time; ``expected`` in all, as far as is known.

    Attributes:
        statuses: exit status of each member that has ended, by name.
        interrupted: the signal that told the sweep to stop; 0 so far.
    """

    folder: Path
    jobs: int
    index: Index
    expected: int
    statuses: dict[str, int] = field(default_factory=dict)
    interrupted: int = 0
    _running: dict[str, tuple[BaseProcess, Connection | None]] = field(default_factory=dict)
    _before: dict[int, Any] = field(default_factory=dict)
    _screen: Screen = field(init=False)

    def __enter__(self) -> Sweep:
        self._before = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}
        self._screen = Screen(self.folder.name, self.expected)
        self._screen.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """Wait for those that run; what :meth:`heed` raised ends here, once they have saved themselves."""
        try:
            while self._running:
                self._wait()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._screen.__exit__()
            if self.folder.is_dir():
                self.index.write()
        return kind is not None and issubclass(kind, Interrupted)

    def heed(self) -> None:
        """Raise :class:`Interrupted`, to begin nothing more, if the sweep has been told to stop."""
        if self.interrupted:
            raise Interrupted("interrupted", self.interrupted)

    def start(self, member: Member) -> None:
        """Begin a member as soon as there is room for it.

        Raises:
            Interrupted: if the sweep has been told to stop.
        """
        while len(self._running) >= self.jobs:
            self._wait()
        self.heed()
        values = {**member.config, "out": str(self.folder / member.name)}
        if member.state == AFRESH:
            values["overwrite"] = True
        # A fresh process for each: one that is killed, for the memory it takes say, is the only one to go.
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        heard, told = context.Pipe(duplex=False) if self._screen.shown else (None, None)
        arguments = (values, member.choices, member.state == RESUMED, told)
        process = context.Process(target=_run_member, args=arguments)
        process.start()
        if told is not None:
            told.close()  # the member has the only end now: when it is gone, we hear so
        self._running[member.name] = (process, heard)
        self.index.set(member.name, "running")
        self._screen.began(member.name)
        if self.interrupted:  # while it was being started
            process.terminate()

    def wait_for(self, name: str) -> int:
        """Wait until a member has ended; its exit status."""
        while name in self._running:
            self._wait()
        return self.statuses.get(name, 0)

    def _wait(self) -> None:
        """Take in what members tell and those that have ended; returns when one has, or after a second."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            sentinels = [process.sentinel for process, _ in self._running.values()]
            pipes = {heard: name for name, (_, heard) in self._running.items() if heard is not None}
            for ready in connection.wait([*sentinels, *pipes], timeout=1.0):
                if isinstance(ready, Connection):
                    self._hear(pipes[ready], ready)
            ended_now = [name for name, (process, _) in self._running.items() if not process.is_alive()]
            for name in ended_now:
                self._take_in(name)
            if ended_now or self.interrupted:
                return

    def _hear(self, name: str, pipe: Connection) -> None:
        """Take in one word of a member; close the pipe at its end."""
        try:
            kind, *words = pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            self._running[name] = (self._running[name][0], None)
            return
        if kind == "progress":
            self._screen.progressed(name, *words)
        else:
            print(*words, file=sys.stdout if kind == "out" else sys.stderr, flush=True)

    def _take_in(self, name: str) -> None:
        process, pipe = self._running[name]
        while pipe is not None and pipe.poll():
            self._hear(name, pipe)
            pipe = self._running[name][1]
        if pipe is not None:
            pipe.close()
        process.join()
        status = process.exitcode or 0
        del self._running[name]
        self.statuses[name] = abs(status)
        if status < 0 and not self.interrupted:
            print(f"fedsim: {name}: its process was killed ({signal.strsignal(-status)})", file=sys.stderr)
        stopped = self.interrupted and status
        self.index.set(name, "stopped" if stopped else "failed" if status else "complete")
        self._screen.ended(name, well=not status)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Tell every running member to save itself; a second signal stops them at once."""
        self.interrupted = number
        for process, _ in list(self._running.values()):
            process.terminate()


def tell_failed(failed: Sequence[str], count: int) -> None:
    """One line about members that failed, if any."""
    if failed:
        print(f"fedsim: {len(failed)} of {count} runs failed: {', '.join(failed)}", file=sys.stderr)


class _Teller(io.TextIOBase):
    """What a member prints, line by line over a pipe: two processes on one screen would write over each other."""

    def __init__(self, pipe: Connection, kind: str) -> None:
        self.pipe, self.kind, self.rest = pipe, kind, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            _tell(self.pipe, self.kind, line)
        return len(text)


def _tell(pipe: Connection, *words: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        pipe.send(words)


def _run_member(config: dict[str, Any], choices: dict[str, str], resume: bool, pipe: Connection | None) -> None:
    """The body of a member's process; its exit status says how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep's own process gets it and tells us by a SIGTERM
    Thread(target=_stop_with_parent, daemon=True).start()
    shown = 0.0

    def tell(sim: Simulation) -> None:
        nonlocal shown
        if pipe is not None and time.monotonic() - shown > TELL_SECONDS:
            shown = time.monotonic()
            _tell(pipe, "progress", done(sim), state(sim))

    if pipe is not None:
        sys.stdout, sys.stderr = _Teller(pipe, "out"), _Teller(pipe, "error")
    try:
        print(ended(Assembly(config, choices).run(tell, resume)), flush=True)
        status = 0
    except Interrupted as interruption:
        status = 128 + interruption.signal
    except (FedsimError, MemoryError) as error:
        print(f"fedsim: {Path(config['out']).name}: {error}", file=sys.stderr, flush=True)
        status = 1
    except Exception:  # a bug in somebody's strategy: shown whole
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _stop_with_parent() -> None:
    """Save the run and stop when the sweep's own process is killed: else the next one would find it still at work."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
