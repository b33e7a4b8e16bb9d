"""Memory for stacks is taken from the system once, not in every round; and garbage is looked for seldom."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
from torch import Tensor

import fedsim
from fedsim.local import Context
from fedsim.simulation.garbage import COLLECTOR, SELDOM
from fedsim.strategies.fedavg import FedAvg
from fedsim.system.faults import Faults
from fedsim.training.memory import SETTINGS, hold_freed

ROUNDS = """
import ctypes, resource, sys
from fedsim.training.memory import hold_freed
held = hold_freed() if sys.argv[1] == "held" else False
c, size = ctypes.CDLL(None), 8_000_000
c.malloc.argtypes, c.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
c.memset.argtypes, c.memset.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
c.free.argtypes = [ctypes.c_void_p]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    stacks = [c.malloc(size) for _ in range(12)]
    for stack in stacks:
        c.memset(stack, 1, size)
    for stack in stacks:
        c.free(stack)
for _ in range(3):
    work()
before = faults()
for _ in range(10):
    work()
print(int(held), (faults() - before) // 10)
"""
"""Twelve stacks of 8 MB each, all freed at once: 23,000 pages of 4 KB."""


def faults(how: str, **variables: str) -> tuple[bool, int]:
    """Whether freed memory is held, and pages asked for in a round."""
    own = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", ROUNDS, how]
    done = subprocess.run(command, env={**own, **variables}, capture_output=True, text=True, check=True)
    held, count = done.stdout.split()
    return held == "1", int(count)


def test_freed_stacks_are_used_again_without_asking_the_system() -> None:
    held, count = faults("held")
    if not held:
        pytest.skip("another C library")
    assert count < 100
    assert faults("not")[1] > 5_000


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        assert faults("held", **{name: "" if name == "GLIBC_TUNABLES" else "131072"})[0] is False
    monkeypatch.setenv(SETTINGS[0], "131072")
    assert not hold_freed()


@pytest.mark.parametrize(("own", "within"), [((700, 10, 10), 5000), ((9000, 10, 10), 9000), ((0, 0, 0), 0)])
def test_a_run_looks_for_garbage_seldom_and_leaves_the_setting_as_it_was(own: tuple[int, ...], within: int) -> None:
    usual, seen = gc.get_threshold(), []
    gc.set_threshold(*own)
    try:
        fedsim.simulate(
            FedAvg(), fedsim.ScheduleOnly(), stop=fedsim.Stop(rounds=1), clients=10, cohort=2,
            observer=lambda sim: seen.append(gc.get_threshold()[0]),
        )  # fmt: skip
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*usual)
    assert set(seen) == {within}


def test_what_the_last_of_several_runs_leaves_is_what_was_there_before_the_first() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    first, second, third = COLLECTOR.seldom(), COLLECTOR.seldom(), COLLECTOR.seldom()
    first.__enter__()
    within = gc.get_threshold()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (gc.get_threshold(), gc.get_freeze_count() > 0) == (within, True)  # one is still at work
    second.__exit__(None, None, None)
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)
    assert within[:2] == tuple(map(max, before, SELDOM))[:2] != before[:2]
    with third:
        gc.set_threshold(1234)
    assert gc.get_threshold()[0] == 1234  # set by somebody else
    gc.set_threshold(*before)


def test_what_the_user_has_frozen_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    try:
        with COLLECTOR.seldom():
            pass
        assert gc.get_freeze_count() >= count - 100  # objects die
    finally:
        gc.unfreeze()


class Raises(fedsim.LocalSGD):
    """Fails on some clients."""

    def finish(self, ctx: Context, x: Tensor) -> dict[str, Tensor]:
        if 0 in ctx.clients:
            raise ValueError("not here")
        return super().finish(ctx, x)


def test_client_code_that_raises_leaves_no_stacks_behind() -> None:
    gc.collect()
    gc.disable()
    try:
        run = fedsim.simulate(
            FedAvg(Raises()), fedsim.Quadratic(), fedsim.System(faults=Faults(on_error="drop")),
            stop=fedsim.Stop(updates=9), clients=4, cohort=4,
        )  # fmt: skip
        assert run.summary["outcomes"]["failed"] == 3
        assert not [each for each in gc.get_objects() if issubclass(type(each), Context)]
    finally:
        gc.enable()
