"""Memory that the driver shares with the workers of its own machine: tensors need no way through Ray's object store.

A region is used over and over, so after a few groups its pages are there and nothing is left but to copy. Its file has
no name: it is gone with the last process that has it open, whoever is killed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import secrets
import weakref
from importlib import import_module
from typing import Any, NamedTuple

from fedsim.vectors import ALIGNED

GROWTH = 2**20
"""Bytes; regions grow in steps of it."""


class Address(NamedTuple):
    """Where another process of this machine finds a region."""

    path: str
    """The file as the process that made the region holds it open."""
    name: str
    """What the path must lead to: on another machine there may be something else."""

    def is_what(self, link: str) -> bool:
        """Whether a link in /proc is one to the region."""
        return os.readlink(link) == f"/memfd:{self.name} (deleted)"

    def leads_there(self) -> bool:
        """Whether this process can reach the region."""
        try:
            return self.is_what(self.path) and os.access(self.path, os.R_OK | os.W_OK)
        except OSError:
            return False


class Letter(NamedTuple):
    """Where a value lies in a region, and small whatever the value is."""

    address: Address
    begin: int
    """Where its contents begin: a pickle without the arrays, and beginning and size of each array."""
    size: int
    """Bytes of the contents."""


class Region:
    """Memory shared by two processes, which use it in turn.

    Args:
        file: its descriptor, owned from now on.
        address: where others find it.
    """

    def __init__(self, file: int, address: Address) -> None:
        self.address = address
        self._file, self._memory = file, memoryview(b"")
        weakref.finalize(self, os.close, file)

    @classmethod
    def create(cls) -> Region:
        """A new one, empty.

        Raises:
            OSError: if this system has no such memory, or no more of it.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("no memory without a name here")
        name = f"fedsim-{secrets.token_hex(8)}"
        file = os.memfd_create(name)
        return cls(file, Address(f"/proc/{os.getpid()}/fd/{file}", name))

    @classmethod
    def attach(cls, address: Address) -> Region:
        """Another process's.

        Raises:
            OSError: if it cannot be reached from here, or is not there any more.
        """
        file = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        if not address.is_what(f"/proc/self/fd/{file}"):
            os.close(file)
            raise FileNotFoundError(f"{address.path}: is another file by now")
        return cls(file, address)

    def seal(self, value: Any) -> Letter:
        """Put a value here, over whatever was here before: its arrays first, then the rest.

        Raises:
            OSError: if there is not enough memory.
        """
        buffers: list[pickle.PickleBuffer] = []
        cloudpickle: Any = import_module("ray.cloudpickle")
        text = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        raw, places, end = [buffer.raw() for buffer in buffers], [], 0
        for each in raw:
            places.append((end, each.nbytes))
            end += -(-each.nbytes // ALIGNED) * ALIGNED
        contents = pickle.dumps((text, places))
        memory = self._room(end + len(contents))
        for (begin, size), each in zip(places, raw, strict=True):
            memory[begin : begin + size] = each
        memory[end : end + len(contents)] = contents
        return Letter(self.address, end, len(contents))

    def unsealed(self, letter: Letter) -> Any:
        """The value of a letter; its arrays are views, good until something else is put here."""
        memory = self._room(letter.begin + letter.size)
        text, places = pickle.loads(memory[letter.begin :][: letter.size])
        return pickle.loads(text, buffers=[memory[begin : begin + size] for begin, size in places])

    def _room(self, size: int) -> memoryview:
        """At least so many bytes of it, mapped here; it never shrinks, for the other process may have mapped it all."""
        if len(self._memory) < size:
            length = os.fstat(self._file).st_size
            if length < size:
                length = -(-size // GROWTH) * GROWTH
                os.posix_fallocate(self._file, 0, length)  # what is not there is said now, and no page is missing later
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._memory = memoryview(mmap.mmap(self._file, length, flags=flags))
        return self._memory
