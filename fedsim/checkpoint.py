"""Checkpoints: one file that holds all of a run that changes, written whole or not at all.

A file is a line of JSON about it, the tensors in safetensors' format, and a pickle of everything else, which
is read back by an unpickler that knows plain values, numpy arrays, the simulator's own records and the
classes of the run's strategy, and nothing else: no function can be called by what a file says.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedsim.checks import FedsimError, optional_number, optional_whole

logger = logging.getLogger("fedsim")

FORMAT = 1
KEPT = 2
"""Checkpoints kept: the newest, and the one before in case the newest cannot be read."""

PLAIN = {
    "builtins": "bool bytearray complex dict float frozenset int list set slice str tuple range",
    "collections": "Counter OrderedDict defaultdict deque",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy._core.numeric": "_frombuffer",
    "torch": "Size device",
    "fedsim.aggregate": "StalenessWeight",
    "fedsim.checks": "TaskError",
    "fedsim.federation": "Reply Task Timer",
    "fedsim.local": "LocalSGD TensorSpec",
    "fedsim.rng": "Randomness",
    "fedsim.simulation.links": "Gossip Letter",
    "fedsim.simulation.tasks": "LiveTask Status",
    "fedsim.strategy": "Round",
    "fedsim.system.faults": "Stage",
    "fedsim.training.base": "Result Work",
    "fedsim.vectors": "Layout",
}
"""What any checkpoint may name, by module."""


class CheckpointSchedule:
    """When a run saves itself; whichever comes first. A run that is interrupted saves itself in any case.

    Args:
        seconds: of the wall clock between checkpoints; None for never.
        events: handled events (arrivals, losses, timers, ...) between checkpoints; None for never.
    """

    def __init__(self, seconds: float | None = 60.0, events: int | None = None) -> None:
        self.seconds = optional_number("seconds", seconds, above=0)
        self.events = optional_whole("events", events, least=1)

    def due(self, seconds: float, events: int) -> bool:
        """Whether so much has passed since the last one."""
        by_clock = self.seconds is not None and seconds >= self.seconds
        return by_clock or (self.events is not None and events >= self.events)


class UnreadableError(FedsimError):
    """A checkpoint that is damaged, or that names what it may not."""


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
        self.path.mkdir(exist_ok=True)
        data, packed = self._encode(state)
        sizes = {"format": FORMAT, "tensors": len(packed), "state": len(data)}
        digest = hashlib.sha256(packed + data).hexdigest()
        numbers = [_number(path) for path in self._files()]
        name = f"checkpoint-{max(numbers, default=0) + 1:06d}"
        draft = self.path / f".{name}.draft"
        with open(draft, "wb") as file:
            file.write(json.dumps({**sizes, "sha256": digest, **about}).encode() + b"\n")
            file.write(packed)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path = self.path / name
        os.replace(draft, path)
        sync_folder(self.path)
        for old in self._files()[:-KEPT]:
            old.unlink()
        return path

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

    # ---- one file --------------------------------------------------------------------------------

    def _encode(self, state: Any) -> tuple[bytes, bytes]:
        """The pickle, and the tensors."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, self.shared, self._allowed)
        try:
            pickler.dump(state)
            packed = safetensors.torch.save(pickler.tensors)
        except UnreadableError:
            raise
        except Exception as error:  # whatever a user's object does when it is pickled
            raise UnreadableError(f"cannot be pickled: {_first_line(error)}") from None
        return buffer.getvalue(), packed

    def _read(self, path: Path) -> tuple[dict[str, Any], Any]:
        try:
            with open(path, "rb") as file:
                about = json.loads(file.readline())
                packed, data = file.read(about["tensors"]), file.read(about["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableError(f"cannot be read ({_first_line(error)})") from None
        if about.get("format") != FORMAT:
            raise UnreadableError(f"has format {about.get('format')}, this fedsim reads {FORMAT}")
        if hashlib.sha256(packed + data).hexdigest() != about.get("sha256"):
            raise UnreadableError("is damaged")
        tensors = safetensors.torch.load(packed)
        try:
            return about, _Unpickler(io.BytesIO(data), tensors, self.shared, self._allowed).load()
        except UnreadableError:
            raise
        except Exception as error:  # whatever bytes can bring about
            raise UnreadableError(f"cannot be read ({_first_line(error)})") from None

    def _allowed(self, module: str, name: str) -> Any:
        """The class that a pickle names.

        Raises:
            UnreadableError: unless it is one that a checkpoint may hold.
        """
        found = _lookup(module, name)
        if name in PLAIN.get(module, "").split() or isinstance(found, torch.dtype):
            return found
        if isinstance(found, type) and found.__module__ == module and self._is_theirs(module):
            return found
        raise UnreadableError(f"holds {module}.{name}, which no checkpoint may hold")

    def _is_theirs(self, module: str) -> bool:
        """Whether a module is that of a class the run is made of, or a user's that lies beside it."""
        if module in self.modules:
            return True
        if module.partition(".")[0] == "fedsim" or _is_foreign(module):
            return False
        users = [each for each in self.modules if each.partition(".")[0] != "fedsim"]
        return any(_belong_together(module, each) for each in users)


class _Pickler(pickle.Pickler):
    """Puts tensors aside, each once, refers to shared objects by name, and refuses what could not be read back."""

    def __init__(self, file: io.BytesIO, shared: Mapping[str, Any], allowed: Callable[[str, str], Any]) -> None:
        super().__init__(file, protocol=5)
        self._allowed = allowed
        self.tensors: dict[str, Tensor] = {}
        self._names = {id(each): name for name, each in shared.items()}
        self._aside: dict[int, tuple[str, Tensor]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if type(obj) is not Tensor:
                raise pickle.PicklingError(f"holds a {type(obj).__name__}; keep plain tensors")
            if id(obj) not in self._aside:
                name = str(len(self.tensors))
                self.tensors[name] = obj.detach().clone(memory_format=torch.contiguous_format)
                self._aside[id(obj)] = (name, obj)  # held, so that its id is not given to another
            return ("tensor", self._aside[id(obj)][0])
        shared = self._names.get(id(obj))
        return None if shared is None else ("shared", shared)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
            self._allowed(pickle.whichmodule(obj, obj.__qualname__), obj.__qualname__)  # type: ignore[attr-defined]
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, tensors: dict[str, Tensor], shared: dict[str, Any], allowed: Callable[[str, str], Any]
    ) -> None:
        super().__init__(file)
        self._tables = {"tensor": tensors, "shared": shared}
        self._allowed = allowed

    def persistent_load(self, pid: Any) -> Any:
        kind, name = pid
        return self._tables[kind][name]

    def find_class(self, module: str, name: str) -> Any:
        return self._allowed(module, name)


def _lookup(module: str, name: str) -> Any:
    """What a module that is loaded already has under ``name``; nothing is imported."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise UnreadableError(f"holds {module}.{name}, which is not there")
    return found


def _modules(objects: Iterable[Any]) -> set[str]:
    """The modules of these objects' classes and of what they derive from, the standard library's and torch's apart."""
    modules = {each.__module__ for one in objects for each in type(one).__mro__}
    return {name for name in modules if name == "__main__" or not _is_foreign(name)}


def _is_foreign(module: str) -> bool:
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names or package in ("torch", "numpy")


def _belong_together(one: str, other: str) -> bool:
    """Whether two modules, none of them fedsim's, are of one package, or files of a user's that lie side by side."""
    if one.partition(".")[0] == other.partition(".")[0]:
        return True
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (one, other)]
    folders = [os.path.dirname(file) for file in files if file]
    return len(folders) == 2 and folders[0] == folders[1] and not folders[0].endswith("-packages")


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def sync_folder(path: Path) -> None:
    """Make renames within a folder last, even if the machine stops."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
