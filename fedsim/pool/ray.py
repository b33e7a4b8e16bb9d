"""The Ray pool: resident workers on one machine or a cluster, with the same bits as the inline pool.

Workers hold the data, the model code and scratch memory, and nothing that changes: a worker that dies is
restarted by Ray and its group trained again. A start vector or message is put into the object store once, is
shared by reference, and leaves it when no task needs it any more.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.checks import ConfigError, SimulationError, number, optional_whole
from fedsim.local import LocalSGD
from fedsim.pool.base import Pool, group_size
from fedsim.pool.worker import Parcel, Worker
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import Result, Work

logger = logging.getLogger("fedsim")

QUEUED = 2
"""Groups handed to a worker at a time: one in training, one on the way."""

RETRIES = 5
"""Deaths of its worker that a group survives: client code that always kills it must not be tried for ever."""

CONNECT_SECONDS = 5.0
"""How long a cluster's head may take to accept a connection."""

PATIENCE = 120.0
"""Seconds without any result after which the log says that the workers are being waited for."""


@dataclass(slots=True, eq=False)
class Group:
    """Tasks trained together by one worker."""

    works: list[Work]
    worker: int = -1
    kept: list[Tensor] = field(default_factory=list)
    """The shared tensors it needs."""


class RayPool(Pool):
    """Trains in resident Ray actors, one thread each.

    Args:
        workers: how many; None takes the cores of this machine, or of the cluster joined.
        address: of a running cluster to join (``"auto"`` finds it); None starts a Ray of its own and stops it.
        gpus_per_worker: fraction of a GPU each worker reserves.
        group: most tasks to train together; None cuts what waits evenly among the workers. Never shows in the
            results.
    """

    name = "ray"

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        group: int | None = None,
    ) -> None:
        self.workers = optional_whole("workers", workers, least=1, most=4096)
        self.address = address
        self.gpus_per_worker = number("gpus_per_worker", gpus_per_worker, least=0, most=8)
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ConfigError(f"gpus_per_worker={gpus_per_worker}: must be a fraction of one GPU or a whole number")
        self.group = optional_whole("group", group, least=1)
        self.restarts = 0
        """Workers that died and came back."""
        self._ray: Any = None
        self._started = False
        self._shared: Any = None
        self._actors: list[Any] = []
        self._processes: list[int] = []
        self._load: list[int] = []
        self._queue: deque[Group] = deque()
        self._running: dict[Any, Group] = {}
        self._results: dict[int, Result] = {}
        self._due: set[int] = set()
        """Tasks whose result is still to come and will be asked for."""
        self._stored: dict[int, tuple[Tensor, Any, int]] = {}
        """Tensors in the object store by identity: the tensor, its reference, how many groups still need it."""

    # ---- start and stop --------------------------------------------------------------------------

    def open(self, problem: Problem, jobs: Mapping[str, LocalSGD], randomness: Randomness) -> None:
        """Start or join Ray and hand every worker a copy of what the tasks share.

        Raises:
            ConfigError: if there is no cluster at ``address``, or it has too few cores.
        """
        if self._ray is not None:
            raise ConfigError("pool: this pool is in use by another run; give every run its own")
        self._ray = _import_ray()
        try:
            self._start(self._ray)
            self._employ(self._ray, _pickled_with_user_code((problem, dict(jobs), randomness)))
        except BaseException:
            self.close()
            raise

    def _employ(self, ray: Any, code: bytes) -> None:
        """Start the workers."""
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = self.workers or max(1, cores)
        if count > cores:
            raise ConfigError(f"pool.workers={count}: the Ray it runs on has {cores} cores")
        gpus = ray.cluster_resources().get("GPU", 0)
        if count * self.gpus_per_worker > gpus:
            needed = f"{count} workers need {count * self.gpus_per_worker:g} GPUs"
            raise ConfigError(f"pool.gpus_per_worker={self.gpus_per_worker:g}: {needed}, Ray has {gpus:g}")
        self._shared = ray.put(np.frombuffer(code, dtype=np.uint8))
        actor = ray.remote(Worker).options(
            num_cpus=1, num_gpus=self.gpus_per_worker, max_restarts=-1, max_task_retries=RETRIES
        )
        self._actors = [actor.remote() for _ in range(count)]
        self._processes, self._load = [0] * count, [0] * count

    def _start(self, ray: Any) -> None:
        if ray.is_initialized():  # somebody's own, in a notebook say: used, and left running
            self._started = False
            return
        if self.address not in (None, "auto"):
            _refuse_silent(str(self.address))
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self.address is None:
                cores = max(self.workers or 0, os.cpu_count() or 1)
                ray.init(address="local", num_cpus=cores, **quiet)
            else:
                ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).partition("\n")[0]
            raise ConfigError(f"pool.address={self.address}: no Ray there ({first})") from None
        self._started = True

    def close(self) -> None:
        """Stop the workers, and Ray if this pool started or joined it."""
        ray, self._ray = self._ray, None
        if ray is None:
            return
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._shared = [], None
        self._queue.clear()
        self._running.clear()
        self._results.clear()
        self._due.clear()
        self._stored.clear()
        if self._started:
            ray.shutdown()
            self._started = False

    # ---- work ------------------------------------------------------------------------------------

    def submit(self, works: Sequence[Work]) -> None:
        """Cut into groups and hand them out, the longest first."""
        self._due.update(work.task for work in works)
        size = self.group or group_size(len(works), len(self._actors))
        ordered = sorted(works, key=lambda work: (-work.steps, work.task))
        # Dealt like cards, so that groups are about equally long.
        count = -(-len(ordered) // size) if ordered else 0
        for first in range(count):
            group = Group(ordered[first::count])
            group.kept = _shared_tensors(group.works)
            for tensor in group.kept:
                self._store(tensor)
            self._queue.append(group)
        self._hand_out()

    def result(self, task: int) -> Result:
        """Wait for a task's result.

        Raises:
            TaskError: if client code raised.
            SimulationError: if a worker ran out of memory or cannot be started.
        """
        while task not in self._results:
            self._wait()
        return self._results.pop(task).checked()

    def forget(self, task: int) -> None:
        """Drop the result, or what will come of it."""
        self._due.discard(task)
        self._results.pop(task, None)

    def _hand_out(self) -> None:
        while self._queue:
            worker = min(range(len(self._actors)), key=lambda each: (self._load[each], each))
            if self._load[worker] >= QUEUED:
                return
            group = self._queue.popleft()
            group.worker = worker
            self._load[worker] += 1
            slots = {id(tensor): slot for slot, tensor in enumerate(group.kept)}
            parcels = [_parcel(work, slots) for work in group.works]
            references = [self._stored[id(tensor)][1] for tensor in group.kept]
            self._running[self._actors[worker].train.remote(parcels, self._shared, *references)] = group

    def _wait(self) -> None:
        """Take in one finished group."""
        if not self._running:
            raise SimulationError("the Ray pool was asked for the result of a task it never got")
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=PATIENCE)
        if not ready:
            logger.warning("no result from %d Ray workers for %.0f s, still waiting", len(self._actors), PATIENCE)
            return
        group = self._running.pop(ready[0])
        self._load[group.worker] -= 1
        try:
            answer = self._ray.get(ready[0], timeout=PATIENCE)
        except self._ray.exceptions.OutOfMemoryError:
            fewer = max(1, len(group.works) // 2)
            raise SimulationError(
                f"a Ray worker ran out of memory training {len(group.works)} tasks together: try pool.group={fewer}"
            ) from None
        except self._ray.exceptions.RayError as error:
            first = str(error).partition("\n")[0]
            raise SimulationError(f"Ray worker {group.worker} failed: {type(error).__name__}: {first}") from error
        self._take(group, answer)
        self._hand_out()

    def _take(self, group: Group, answer: Any) -> None:
        process, results = answer
        if self._processes[group.worker] not in (0, process):
            self.restarts += 1
            logger.warning("Ray worker %d died and was restarted; its tasks were trained again", group.worker)
        self._processes[group.worker] = process
        for tensor in group.kept:
            self._release(tensor)
        for work, result in zip(group.works, results.unpacked([work.task for work in group.works]), strict=True):
            if work.task in self._due:
                self._due.discard(work.task)
                self._results[work.task] = result

    # ---- the object store ------------------------------------------------------------------------

    def _store(self, tensor: Tensor) -> None:
        held = self._stored.get(id(tensor))
        if held is None:
            self._stored[id(tensor)] = (tensor, self._ray.put(tensor.detach().numpy()), 1)
        else:
            self._stored[id(tensor)] = (tensor, held[1], held[2] + 1)

    def _release(self, tensor: Tensor) -> None:
        _, reference, users = self._stored[id(tensor)]
        if users == 1:
            del self._stored[id(tensor)]
        else:
            self._stored[id(tensor)] = (tensor, reference, users - 1)


def _refuse_silent(address: str) -> None:
    """Ray itself would wait for minutes where nobody answers.

    Raises:
        ConfigError: if nobody does.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"pool.address={address}: no Ray there ({error}), give auto or host:port") from None


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def _shared_tensors(works: Sequence[Work]) -> list[Tensor]:
    """Each start vector and message tensor once, in order of first use."""
    found: dict[int, Tensor] = {}
    for work in works:
        for tensor in (work.start, *work.message.values()):
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _parcel(work: Work, slots: Mapping[int, int]) -> Parcel:
    rest = replace(work, start=torch.empty(0), message={})
    return Parcel(rest, slots[id(work.start)], {name: slots[id(each)] for name, each in work.message.items()})


def _pickled_with_user_code(value: Any) -> bytes:
    """Pickle ``value`` together with classes that workers could not import: from a notebook or a user's folder."""
    cloudpickle: Any = import_module("ray.cloudpickle")
    ours = [module for module in list(sys.modules.values()) if _is_users(module)]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        data: bytes = cloudpickle.dumps(value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(f"pool=ray: the problem or a local rule cannot be sent to workers: {error}") from None
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
    return data


def _is_users(module: ModuleType) -> bool:
    """Whether a module lies outside every installed package: no worker elsewhere has it."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__" or module.__name__.partition(".")[0] == "fedsim":
        return False
    path = Path(file).resolve()
    roots = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return path.suffix == ".py" and not any(path.is_relative_to(Path(root).resolve()) for root in roots)
