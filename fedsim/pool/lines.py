"""Lines to the workers of the driver's own machine: a word passes in a tenth of the time that a call of Ray's takes.

A line is two pipes. Their ends are found like regions are, and close with the process that holds them, so whoever is
left hears of it. What is large does not travel through a line but in a region.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LENGTH = struct.Struct("<Q")
"""How a word begins: with the bytes that follow."""


class Ends(NamedTuple):
    """Where a worker finds its ends of a line, as the driver holds them open."""

    questions: str
    answers: str


class Ticket:
    """Stands for an answer that is to come through a line."""


class Line:
    """The driver's end.

    Raises:
        OSError: if there can be no more files.
    """

    def __init__(self) -> None:
        self._files: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._files)
        for _ in range(2):
            self._files += os.pipe()
        far_questions, self._questions, self._answers, far_answers = self._files
        self._far = far_questions, far_answers
        """The worker's, until it has opened them itself."""
        self.tickets: deque[Ticket] = deque()
        """For the answers that are to come, in their order."""
        self.takes = True
        """Whether questions can still be asked."""
        self.is_open = False
        """Whether the worker holds its ends: then its death is heard here."""
        self.has_ended = False
        """Whether there is nothing more to hear."""

    @property
    def ends(self) -> Ends:
        """Where the worker finds its own."""
        return Ends(*(f"/proc/{os.getpid()}/fd/{file}" for file in self._far))

    def fileno(self) -> int:
        """What can be read from when there is something to hear."""
        return self._answers

    def ask(self, word: Any) -> Ticket:
        """Send a small word; that nobody is there any more will be heard like an answer."""
        ticket = Ticket()
        self.tickets.append(ticket)
        try:
            _write(self._questions, word)
        except BrokenPipeError:
            self.takes = False
        return ticket

    def take(self) -> tuple[Ticket, Any] | None:
        """Take in what there is to hear: an answer, or None for a worker that has opened the line, or left it."""
        try:
            word = _read(self._answers)
        except EOFError:
            self.takes, self.is_open, self.has_ended = False, False, True
            return None
        if not self.is_open:
            self.is_open = True
            self._drop(self._far)
            return None
        return self.tickets.popleft(), word

    def hang_up(self) -> None:
        """Ask no more: the worker answers what it has been asked, and leaves the line."""
        if self.takes:
            self.takes = False
            self._drop([self._questions])

    def close(self) -> None:
        """Leave the line, whatever is still to come."""
        self.takes, self.is_open, self.has_ended = False, False, True
        self._close()

    def _drop(self, files: Sequence[int]) -> None:
        for file in files:
            self._files.remove(file)
            os.close(file)


def heard(lines: Sequence[Line], timeout: float) -> list[Line]:
    """Those lines with something to hear, as soon as there is one, or after so many seconds."""
    poll, by_file = select.poll(), {line.fileno(): line for line in lines}
    for file in by_file:
        poll.register(file, select.POLLIN)
    return [by_file[file] for file, _ in poll.poll(1000.0 * timeout)]


def serve(ends: Ends, answer: Callable[[Any], Any]) -> None:
    """The worker's end: answer word after word, until the driver hangs up or is gone."""
    with open(ends.questions, "rb", buffering=0) as questions, open(ends.answers, "wb", buffering=0) as answers:
        word: Any = None  # that the line is open
        while _got_through(answers.fileno(), word):
            try:
                asked = _read(questions.fileno())
            except EOFError:
                return
            word = answer(asked)


def _got_through(file: int, word: Any) -> bool:
    try:
        _write(file, word)
    except BrokenPipeError:
        return False
    return True


def _write(file: int, word: Any) -> None:
    text = pickle.dumps(word)
    rest = memoryview(LENGTH.pack(len(text)) + text)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read(file: int) -> Any:
    (size,) = LENGTH.unpack(_exactly(file, LENGTH.size))
    return pickle.loads(_exactly(file, size))


def _exactly(file: int, size: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: if whoever wrote them left before.
    """
    parts = []
    while size:
        parts.append(os.read(file, size))
        if not parts[-1]:
            raise EOFError
        size -= len(parts[-1])
    return b"".join(parts)


def _close_all(files: list[int]) -> None:
    while files:
        os.close(files.pop())
