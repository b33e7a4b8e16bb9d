"""Lines between the driver and its workers: words in their order, and an end that is heard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import opened_files

from fedsim.pool.lines import End, Ends, Line, Ticket, heard, serve


def answers(line: Line, count: int) -> list[tuple[Ticket, Any]]:
    """The next so many, in ten seconds."""
    found: list[tuple[Ticket, Any]] = []
    until = time.monotonic() + 10
    while len(found) < count and time.monotonic() < until:
        found += [said for each in heard([line], 0.1) if (said := each.take()) is not None]
    return found


def until_ended(line: Line) -> list[tuple[Ticket, Any]]:
    found = []
    while not line.has_ended:
        assert heard([line], 10.0) == [line], "nothing heard"
        said = line.take()
        found += [] if said is None else [said]
    return found


def served(line: Line, answer: Callable[[Any], Any]) -> threading.Thread:
    thread = threading.Thread(target=serve, args=(line.ends, answer))
    thread.start()
    return thread


def test_answers_come_in_the_order_of_the_questions_however_long_they_are() -> None:
    before, line = opened_files(), Line()
    assert not line.is_open
    asked = [line.ask(("early", 1)), line.ask("x")]  # before anybody is there
    thread = served(line, lambda word: [word] * 10**5)
    asked.append(line.ask(3.5))
    assert list(line.tickets) == asked
    got = answers(line, 3)
    assert line.is_open
    assert [ticket for ticket, _ in got] == asked
    assert [word for _, word in got] == [[each] * 10**5 for each in (("early", 1), "x", 3.5)]
    assert not line.tickets
    line.close()
    thread.join(10)
    assert not thread.is_alive()
    del line
    assert opened_files() == before


def test_who_hangs_up_still_hears_the_answers_to_what_was_asked() -> None:
    line, go_on = Line(), threading.Event()

    def slowly(word: int) -> int:
        go_on.wait(10)
        return -word

    thread = served(line, slowly)
    asked = [line.ask(1), line.ask(2)]
    line.hang_up()
    line.hang_up()
    assert not line.takes
    go_on.set()
    assert until_ended(line) == [(asked[0], -1), (asked[1], -2)]
    thread.join(10)
    assert not thread.is_alive()


def test_what_an_answer_raises_ends_the_line_and_goes_to_whoever_serves() -> None:
    line, raised = Line(), []

    def fail(word: Any) -> None:
        raise BrokenPipeError(word)  # of the caller's own

    def serving() -> None:
        try:
            serve(line.ends, fail)
        except BrokenPipeError as error:
            raised.append(error.args)

    thread = threading.Thread(target=serving)
    thread.start()
    line.ask("this")
    assert until_ended(line) == []
    assert len(line.tickets) == 1
    thread.join(10)
    assert raised == [("this",)]


CHILD = """
import json, sys
from fedsim.pool.lines import End, Ends, serve

serve(Ends(*(End(*end) for end in json.loads(sys.argv[1]))), lambda word: word)
"""


def test_a_death_at_the_other_end_is_heard_and_asking_on_is_no_error() -> None:
    before, line = opened_files(), Line()
    with subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(line.ends)]) as child:
        line.ask(1)
        assert [word for _, word in answers(line, 1)] == [1]
        assert heard([line], 0.0) == []
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        last = line.ask(2)
        assert until_ended(line) == []
        assert not line.takes
        assert not line.is_open
        assert list(line.tickets) == [last]
    line.close()
    line.close()
    assert opened_files() == before


def test_a_worker_is_free_when_the_driver_is_gone() -> None:
    parent = """
import json, subprocess, sys
from fedsim.pool.lines import Line

line = Line()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], json.dumps(line.ends)])
line.ask(1)
while line.take() is None:
    pass
print(child.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        assert running(child)
        driver.kill()
    until = time.monotonic() + 10
    while running(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not running(child)


def running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_has_taken_the_place_of_a_line_is_left_alone(tmp_path: Path) -> None:
    line = Line()
    ends = line.ends
    line.close()
    with ExitStack() as stack:
        files = [stack.enter_context(open(tmp_path / str(number), "w+")) for number in range(4)]
        assert {file.fileno() for file in files} >= {int(end.path.rpartition("/")[2]) for end in ends}
        for file in files:
            file.write("held")
            file.flush()
        with pytest.raises(FileNotFoundError, match="is another file by now"):
            serve(ends, print)
        other = Line()  # a pipe, too, but another one
        with pytest.raises(FileNotFoundError, match="is another file by now"):
            serve(Ends(*(End(mine.path, gone.inode) for mine, gone in zip(other.ends, ends, strict=True))), print)
        other.close()
    assert [(tmp_path / str(number)).read_text() for number in range(4)] == ["held"] * 4


def test_ends_that_are_not_there_are_an_error_and_leave_no_file() -> None:
    before = opened_files()
    line = Line()
    with pytest.raises(FileNotFoundError):
        serve(Ends(line.ends.questions, End("/proc/0/fd/1", 0)), print)
    line.close()
    assert opened_files() == before


def test_a_child_of_the_driver_that_holds_the_line_hides_no_goodbye() -> None:
    line = Line()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        thread = served(line, str)
        asked = line.ask(1)
        assert answers(line, 1) == [(asked, "1")]
        line.hang_up()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


FORKING = """
import json, os, sys
from fedsim.pool.lines import End, Ends, serve

def answer(word):
    if word == "fork" and not os.fork():
        raise SystemExit
    return word

serve(Ends(*(End(*end) for end in json.loads(sys.argv[1]))), answer)
"""


def test_a_child_that_an_answer_forks_has_no_say() -> None:
    line = Line()
    with subprocess.Popen([sys.executable, "-c", FORKING, json.dumps(line.ends)]) as worker:
        asked = [line.ask(word) for word in ("one", "fork", "three")]
        got = answers(line, 3)
        time.sleep(0.3)
        assert heard([line], 0.0) == []
        assert got == list(zip(asked, ["one", "fork", "three"], strict=True))
        line.hang_up()
        assert worker.wait(10) == 0


def test_who_lets_broken_pipes_kill_it_is_not_killed_by_a_dead_worker() -> None:
    text = """
import signal
from fedsim.pool.lines import Line

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
line = Line()
line._drop(line._far)  # as if a worker had held them
line.ask(1)
print(line.takes, signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.sigpending())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "set()", "set()"]
