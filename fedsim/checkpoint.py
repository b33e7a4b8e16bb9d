"""Checkpoints: one file that holds all of a run that changes, written whole or not at all.

A file is a line of JSON about it, the state as a tree of JSON, and the memory of its arrays and tensors
(:mod:`fedsim.encoding`). It can hold plain values, arrays, the simulator's own records and objects of the classes of
the run's strategy, and nothing else; nothing it says is called.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Any

from fedsim.checks import optional_number, optional_whole, said
from fedsim.encoding import Decoder, Encoder, UnreadableError

logger = logging.getLogger("fedsim")

FORMAT = 5
KEPT = 2
"""Checkpoints kept: the newest, and the one before in case the newest cannot be read."""

OURS = {
    "fedsim.aggregate": "StalenessWeight",
    "fedsim.checks": "TaskError",
    "fedsim.compass": "Compass Group",
    "fedsim.federation": "Reply Task Timer",
    "fedsim.local": "SAM LocalSGD TensorSpec",
    "fedsim.rng": "Randomness",
    "fedsim.server": "Momentum PlainStep",
    "fedsim.simulation.links": "Gossip Letter",
    "fedsim.simulation.tasks": "LiveTask Order",
    "fedsim.strategy": "Round",
    "fedsim.system.faults": "Stage",
    "fedsim.topology": "Exponential Full Grid Random Ring",
    "fedsim.training.base": "Result Work",
    "fedsim.vectors": "Layout",
    "fedsim.wire.quantisation": "Quantiser",
}
"""Classes whose objects any checkpoint may hold, by module."""


class CheckpointSchedule:
    """When a run saves itself; whichever comes first. A run that is interrupted saves itself in any case.

    Args:
        seconds: of the wall clock between checkpoints; None for never.
        events: handled events (arrivals, losses, timers, ...) between checkpoints; None for never.
    """

    def __init__(self, seconds: float | None = 60.0, events: int | None = None) -> None:
        self.seconds = optional_number("seconds", seconds, above=0)
        self.events = optional_whole("events", events, least=1)

    def after(self, clock: float, events: int) -> tuple[float, float]:
        """The clock and the number of handled events at which the next one is due, whichever comes first.

        Args:
            clock: seconds when the last one was made.
            events: handled by then.
        """
        by_clock = math.inf if self.seconds is None else clock + self.seconds
        return by_clock, math.inf if self.events is None else events + self.events


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: the folder, made when the first one is written.
        shared: objects that a snapshot may refer to and that are not saved with it, by name.
        classes_of: objects whose classes, with all others of the same modules, a snapshot may hold: the strategy, say.
    """

    def __init__(self, path: Path, shared: Mapping[str, Any], classes_of: Iterable[Any]) -> None:
        self.path = path
        self.shared = dict(shared)
        self.modules = _modules(classes_of)

    def write(self, state: Any, about: Mapping[str, Any]) -> Path:
        """Save ``state``; the file is there whole or not at all, and all but the last ``KEPT`` go.

        Raises:
            UnreadableError: if ``state`` holds something that could not be read back.
        """
        tree, blocks = self.encode(state)
        sizes = {"format": FORMAT, "tree": len(tree), "blocks": [len(block) for block in blocks]}
        self.path.mkdir(exist_ok=True)
        number = max((int(path.name.rpartition("-")[2]) for path in self._files()), default=0) + 1
        path = self.path / f"checkpoint-{number:06d}"
        draft = path.with_name(f".{path.name}.draft")
        with open(draft, "wb") as file:
            file.write(json.dumps({**sizes, "sha256": _sha256(tree, blocks), **about}).encode() + b"\n")
            file.writelines([tree, *blocks])
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(self.path)
        for old in self._files()[:-KEPT]:
            old.unlink()
        return path

    def encode(self, state: Any) -> tuple[bytes, list[bytes]]:
        """The tree of a state as JSON, and its memory.

        Raises:
            UnreadableError: if it holds something that could not be read back.
        """
        encoder = Encoder(self._find, self.shared)
        try:
            return json.dumps(encoder.encode(state)).encode(), encoder.blocks
        except UnreadableError:
            raise
        except Exception as error:  # whatever a user's object does when it is looked at
            raise UnreadableError(f"cannot be saved: {said(error)}") from None

    def newest(self) -> tuple[dict[str, Any], Any] | None:
        """What is known about the newest checkpoint that can be read, and its state; None if there is none.

        Raises:
            UnreadableError: if there are checkpoints and none can be read.
        """
        problem: UnreadableError | None = None
        for path in reversed(self._files()):
            try:
                return self._read(path)
            except UnreadableError as error:
                logger.warning("%s: %s", path, error)
                problem = UnreadableError(f"{path}: {error}")
        if problem is not None:
            raise problem
        return None

    def clear(self) -> None:
        """Delete the drafts a killed run left."""
        for draft in self.path.glob(".*.draft"):
            draft.unlink()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name))

    def _read(self, path: Path) -> tuple[dict[str, Any], Any]:
        try:
            with open(path, "rb") as file:
                about = json.loads(file.readline())
                if about["format"] != FORMAT:
                    raise UnreadableError(f"has format {about['format']}, this fedsim reads {FORMAT}")
                lengths = [about["tree"], *about["blocks"]]
                if min(lengths) < 0 or file.tell() + sum(lengths) != path.stat().st_size:
                    raise UnreadableError("is damaged")
                tree, *blocks = [file.read(length) for length in lengths]
            if _sha256(tree, blocks) != about["sha256"]:
                raise UnreadableError("is damaged")
            return about, Decoder(self._find, self.shared, blocks).decode(json.loads(tree))
        except UnreadableError:
            raise
        except Exception as error:  # whatever bytes can bring about
            raise UnreadableError(f"cannot be read: {type(error).__name__}: {said(error)}") from None

    def _find(self, module: str, name: str) -> type:
        """The class of that name.

        Raises:
            UnreadableError: unless a checkpoint may hold its objects.
        """
        ours = name in OURS.get(module, "").split()
        if ours or self._is_theirs(module):
            found: Any = sys.modules.get(module)
            for part in name.split("."):
                found = getattr(found, part, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise UnreadableError(f"holds a {module}.{name}, which no checkpoint may hold")

    def _is_theirs(self, module: str) -> bool:
        """Whether a module is that of a class the run is made of, or a user's that lies beside it."""
        if module in self.modules:
            return True
        if module.partition(".")[0] == "fedsim" or is_foreign(module):
            return False
        users = [each for each in self.modules if each.partition(".")[0] != "fedsim"]
        if module not in sys.modules and any(_lies_beside(module, each) for each in users):
            import_module(module)  # a helper that the strategy imports later than at its beginning
        return any(belong_together(module, each) for each in users)


def _sha256(tree: bytes, blocks: Iterable[bytes]) -> str:
    """Hash of all that follows the first line of a file."""
    total = hashlib.sha256(tree)
    for block in blocks:
        total.update(block)
    return total.hexdigest()


def _modules(objects: Iterable[Any]) -> set[str]:
    """The modules of these objects' classes and of what they derive from, the standard library's and torch's apart."""
    modules = {each.__module__ for one in objects for each in type(one).__mro__}
    return {name for name in modules if name == "__main__" or not is_foreign(name)}


def is_foreign(module: str) -> bool:
    """Whether a module is of the standard library, torch or NumPy."""
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names or package in ("torch", "numpy")


def belong_together(one: str, other: str) -> bool:
    """Whether two modules, none of them fedsim's, are of one package, or files of a user's that lie side by side."""
    if one.partition(".")[0] == other.partition(".")[0]:
        return True
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (one, other)]
    folders = [os.path.dirname(file) for file in files if file]
    return len(folders) == 2 and folders[0] == folders[1] and not folders[0].endswith("-packages")


def _lies_beside(module: str, other: str) -> bool:
    """Whether a module that is not loaded is a file beside the loaded one."""
    spec = None if "." in module else util.find_spec(module)
    file = getattr(sys.modules.get(other), "__file__", None)
    return bool(spec and spec.origin and file and os.path.dirname(spec.origin) == os.path.dirname(file))


def sync_folder(path: Path) -> None:
    """Make renames within a folder last, even if the machine stops."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
