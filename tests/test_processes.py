"""Processes of ours: what is started is stopped with everything it has started, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim.checks import Interrupted, SimulationError
from fedsim.flower import processes
from fedsim.flower.processes import Process, Processes, interruptible

WAIT = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
PARENT = """
import subprocess, sys, time
wait = [sys.executable, "-c", "import time; time.sleep(600)"]
near, far = subprocess.Popen(wait), subprocess.Popen(wait, start_new_session=True)
print(near.pid, far.pid, flush=True)
time.sleep(600)
"""
"""A process with a child in its own session and one in another."""


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def python(ours: Processes, code: str, name: str = "child") -> Process:
    return ours.start(name, [sys.executable, "-c", code], os.environ, Path.cwd())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(ours: Processes) -> tuple[Process, list[int]]:
    """A parent and the ids of its two children."""
    parent = python(ours, PARENT, "parent")
    until(lambda: len(parent.tail().split()) == 2)
    return parent, [int(word) for word in parent.tail().split()]


def test_children_are_stopped_too_in_whatever_session_they_are(ours: Processes) -> None:
    parent, children = family(ours)
    assert all(runs(child) for child in children)
    ours.stop()
    assert not any(runs(pid) for pid in (parent.pid, *children))


def test_children_of_a_parent_that_was_killed_are_stopped(ours: Processes) -> None:
    parent, children = family(ours)
    ours.look()
    parent.popen.kill()
    until(lambda: parent.status is not None)
    ours.look()
    assert all(runs(child) for child in children)  # they have lost their parent
    ours.stop()
    assert not any(runs(child) for child in children)


def test_nothing_else_is_touched(ours: Processes) -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT]) as beside:  # a child of this process, as ours are
        started = python(ours, WAIT)
        ours.stop()
        assert not runs(started.pid)
        assert runs(beside.pid)
        beside.kill()


def test_who_does_not_listen_is_killed(ours: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    deaf, polite = python(ours, DEAF, "deaf"), python(ours, WAIT, "polite")
    until(lambda: deaf.tail() == "deaf")
    ours.stop()
    assert (deaf.status, polite.status) == (-signal.SIGKILL, -signal.SIGTERM)


def test_what_cannot_be_killed_is_not_waited_for_without_end(ours: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = python(ours, DEAF)
    until(lambda: deaf.tail() == "deaf")
    with monkeypatch.context() as patched:
        patched.setattr(processes, "LONGEST_STOP_SECONDS", 0.2)
        patched.setattr(psutil.Process, "kill", lambda self: None)  # as if it hung in the kernel
        ours.stop()
    assert deaf.status is None
    deaf.popen.kill()


def test_a_session_that_is_empty_is_forgotten(ours: Processes) -> None:
    # Its number may be somebody else's by the time that we stop.
    ended, waiting = python(ours, "pass", "short"), python(ours, WAIT, "long")
    until(lambda: ended.status == 0)
    ours.look()
    assert ours._sessions == {waiting.pid}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_was_started(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    started: list[Process] = []

    def interrupted() -> None:
        with interruptible(), Processes(tmp_path) as ours:
            started.append(python(ours, WAIT))
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(Interrupted) as raised:
        interrupted()
    assert raised.value.signal == number
    assert started[0].status == -signal.SIGTERM
    assert signal.getsignal(number) is before


def test_a_signal_in_the_middle_of_a_start_stops_what_was_just_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Interrupting(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupting)

    def interrupted() -> None:
        with interruptible(), Processes(tmp_path) as ours:
            python(ours, WAIT)
            python(ours, WAIT, "another")

    try:
        with pytest.raises(Interrupted):
            interrupted()
        assert [pid for pid in started if runs(pid)] == []
        assert len(started) == 1
    finally:
        for pid in filter(runs, started):
            os.kill(pid, signal.SIGKILL)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_come_while_stopping_change_nothing(ours: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    deaf = python(ours, DEAF)
    until(lambda: deaf.tail() == "deaf")
    impatient = subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -INT {os.getpid()}"])
    ours.stop()
    assert deaf.status == -signal.SIGKILL
    assert impatient.wait() == 0


def test_an_error_stops_what_was_started(tmp_path: Path) -> None:
    started: list[Process] = []

    def failing() -> None:
        with Processes(tmp_path) as ours:
            started.append(python(ours, WAIT))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert started[0].status == -signal.SIGTERM


def test_failure_shows_the_end_of_the_log(ours: Processes) -> None:
    failing = python(ours, "print('\\n'.join(f'line {n}' for n in range(40))); raise SystemExit(3)", "setup")
    with pytest.raises(SimulationError, match="setup ended with status 3") as raised:
        ours.finish(failing, 20)
    assert str(raised.value).splitlines()[1:] == [f"line {n}" for n in range(25, 40)]


def test_a_command_that_takes_too_long_is_an_error(ours: Processes) -> None:
    with pytest.raises(SimulationError, match=r"has not ended after 0\.1 s"):
        ours.finish(python(ours, WAIT), 0.1)


def test_how_a_process_died_is_told(ours: Processes) -> None:
    killed = python(ours, WAIT, "supernode 1")
    killed.popen.kill()
    until(lambda: killed.status is not None)
    assert killed.died() == "supernode 1 was killed by SIGKILL"


def test_a_program_that_is_missing_is_named(ours: Processes) -> None:
    with pytest.raises(SimulationError, match="superlink: cannot be started: no-such-program: No such file"):
        ours.start("superlink", ["no-such-program"], os.environ, Path.cwd())


def test_a_ctrl_c_in_the_terminal_does_not_reach_them(ours: Processes) -> None:
    started = python(ours, WAIT)
    assert os.getsid(started.pid) == started.pid != os.getsid(0)
