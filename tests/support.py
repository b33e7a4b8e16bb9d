"""Devices and strategies the tests script by hand."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

import fedsim
from fedsim.data import Iid, NpzFile
from fedsim.kernel import to_ns
from fedsim.problems.models import Logistic
from fedsim.rng import Draw, Randomness
from fedsim.system import availability, compute
from fedsim.training import Work


class Scripted(availability.Availability):
    """Presence by a script of (seconds, client, online)."""

    def __init__(self, *script: tuple[float, int, bool], absent: tuple[int, ...] = ()) -> None:
        self.script, self.absent = sorted(script), list(absent)

    def prepare(self, clients: int, randomness: Randomness) -> None:
        self._online = np.ones(clients, dtype=np.bool_)
        self._online[self.absent] = False
        self.left = [(to_ns(at), client, online) for at, client, online in self.script]

    def next_change(self) -> int | None:
        return self.left[0][0] if self.left else None

    def advance(self, now: int) -> availability.Change:
        before = self._online.copy()
        while self.left and self.left[0][0] <= now:
            _, client, online = self.left.pop(0)
            self._online[client] = online
        return np.flatnonzero(self._online & ~before), np.flatnonzero(before & ~self._online)


class Given(compute.Compute):
    """Seconds per step as listed."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def speeds(self, clients: int, draw: Draw) -> NDArray[np.float64]:
        return np.array(self.seconds, dtype=np.float64)


ONE_STEP = fedsim.LocalSGD(steps=1)


class Hooks(fedsim.Strategy):
    """A strategy made of functions, for tests only: ``Hooks(start=lambda self, fed: ...)``."""

    def __init__(self, local=ONE_STEP, **handlers):
        super().__init__(local)
        self.handlers, self.log = handlers, []

    def call(self, name, fed, *what):
        if name in self.handlers:
            self.handlers[name](self, fed, *what)

    def start(self, fed):
        self.call("start", fed)

    def on_reply(self, fed, reply):
        self.call("on_reply", fed, reply)

    def settle(self, fed):
        self.call("settle", fed)

    def on_timer(self, fed, timer):
        self.call("on_timer", fed, timer)

    def on_lost(self, fed, task, why):
        self.call("on_lost", fed, task, why)

    def on_online(self, fed, client):
        self.call("on_online", fed, client)

    def on_message(self, fed, src, dst, payload, tag):
        self.call("on_message", fed, src, dst)

    def message(self, fed, task):
        return self.handlers["message"](self, fed, task) if "message" in self.handlers else {}

    def views(self, fed):
        return self.handlers["views"](self, fed) if "views" in self.handlers else super().views(fed)


def simulate(strategy, stop=None, problem=None, **more):
    system = fedsim.System(
        more.pop("compute", compute.Constant(mean=1.0)),
        more.pop("network", None),
        more.pop("availability", None),
        more.pop("faults", None),
    )
    return fedsim.simulate(strategy, problem or fedsim.ScheduleOnly(1000), system, stop=stop, **more)


def apply(self, fed, reply):
    """An ``on_reply`` that takes every result and leaves the model as it is."""
    fed.publish(fed.model, used=[reply])


def tiny(tmp_path, examples, clients):
    """Classification with ``examples`` training examples, dealt out to ``clients`` clients."""
    rng = np.random.default_rng(3)
    np.savez(
        tmp_path / "tiny.npz",
        x_train=rng.normal(size=(examples, 4)).astype(np.float32),
        y_train=np.arange(examples) % 2,
        x_test=rng.normal(size=(6, 4)).astype(np.float32),
        y_test=np.arange(6) % 2,
    )
    return fedsim.Classification(NpzFile(str(tmp_path / "tiny.npz")), Logistic(), Iid(), validation=0.0)


def checked(result):
    """A result, or what client code raised instead of it."""
    if result.error is not None:
        raise result.error
    return result


# ---- pools without a run -----------------------------------------------------------------------------


def quadratic() -> fedsim.Problem:
    """A small problem of ten clients."""
    problem = fedsim.Quadratic()
    problem.prepare(10, Randomness(0))
    return problem


def work(task: int, **tensors: dict[str, torch.Tensor]) -> Work:
    """A task of it, of one step of the job ``main``."""
    message, state = tensors.get("message", {}), tensors.get("state", {})
    return Work(task, task, 0, "main", torch.ones(10), message, state, 0.1, 1)


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def opened_files() -> int:
    """How many files this process has open, apart from what only waits to be collected."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
