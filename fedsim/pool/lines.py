"""Lines to the workers of the driver's own machine: trips take a third of what they take by calls of Ray's.

A line is two pipes. Their ends are found like regions are, and close with the process that holds them, so whoever is
left hears of it. What is large does not travel through a line but in a region.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import stat
import struct
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LENGTH = struct.Struct("<Q")
"""How a word begins: with the bytes that follow."""

GOODBYE = "goodbye"
"""Said by a driver that hangs up: pipes do not tell as long as a child of its holds them, too."""


class End(NamedTuple):
    """Where a worker finds one of its ends of a line."""

    path: str
    """The pipe as the driver holds it open."""
    inode: int
    """What the path must lead to: the driver may have left the line by now, and opened something else."""

    @classmethod
    def of(cls, file: int) -> End:
        """Of a pipe of this process."""
        return cls(f"/proc/{os.getpid()}/fd/{file}", os.fstat(file).st_ino)

    def open(self, flags: int) -> int:
        """A descriptor of this process.

        Raises:
            OSError: if the pipe is not there any more.
        """
        file = os.open(self.path, flags | os.O_CLOEXEC)
        found = os.fstat(file)
        if not stat.S_ISFIFO(found.st_mode) or found.st_ino != self.inode:
            os.close(file)
            raise FileNotFoundError(f"{self.path}: is another file by now")
        return file


class Ends(NamedTuple):
    """Where a worker finds both."""

    questions: End
    answers: End


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
        self.was_open = False
        """Whether the worker has ever held its ends."""
        self.has_ended = False
        """Whether there is nothing more to hear."""

    @property
    def ends(self) -> Ends:
        """Where the worker finds its own."""
        return Ends(*map(End.of, self._far))

    @property
    def is_open(self) -> bool:
        """Whether the worker holds its ends, so that its death is heard here."""
        return self.was_open and not self.has_ended

    def fileno(self) -> int:
        """What can be read from when there is something to hear."""
        return self._answers

    def ask(self, word: Any) -> Ticket:
        """Send a small word; that nobody is there any more will be heard like an answer."""
        ticket = Ticket()
        self.tickets.append(ticket)
        self._say(word)
        return ticket

    def take(self) -> tuple[Ticket, Any] | None:
        """Take in what there is to hear: an answer, or None for a worker that has opened the line, or left it."""
        try:
            word = _read(self._answers)
        except EOFError:
            self.takes, self.has_ended = False, True
            return None
        if not self.was_open:
            self.was_open = True
            self._drop(self._far)
            return None
        return self.tickets.popleft(), word

    def hang_up(self) -> None:
        """Ask no more: the worker answers what it has been asked, and leaves the line."""
        if self.takes:
            self._say(GOODBYE)
            self.takes = False

    def close(self) -> None:
        """Leave the line, whatever is still to come."""
        self.takes, self.has_ended = False, True
        self._close()

    def _say(self, word: Any) -> None:
        # Whatever this process does otherwise when a pipe breaks, this one's end is heard.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            _write(self._questions, word)
        except BrokenPipeError:
            self.takes = False
            signal.sigtimedwait({signal.SIGPIPE}, 0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

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
    """The worker's end: answer word after word, until the driver hangs up or is gone.

    Raises:
        OSError: if the line is not there any more.
    """
    own = os.getpid()
    with (
        os.fdopen(ends.questions.open(os.O_RDONLY), "rb", buffering=0) as questions,
        os.fdopen(ends.answers.open(os.O_WRONLY), "wb", buffering=0) as answers,
    ):
        word: Any = None  # that the line is open
        while _got_through(answers.fileno(), word):
            try:
                asked = _read(questions.fileno())
            except EOFError:
                return
            if asked == GOODBYE:
                return
            try:
                word = answer(asked)
            finally:
                if os.getpid() != own:  # a child that was forked in there has no say here
                    os._exit(0)


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
