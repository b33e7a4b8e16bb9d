"""One run from its parts to its records: what ``fedsim run`` and the Python interface share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedsim.checks import ConfigError, number, whole
from fedsim.pool import InlinePool, Pool
from fedsim.problems.base import Problem
from fedsim.record import check_free
from fedsim.recording import Recording, Run
from fedsim.rng import Randomness
from fedsim.simulation import Simulation, Stop
from fedsim.strategy import Strategy
from fedsim.system import System

Observer = Callable[[Simulation], None]

__all__ = ["Run", "simulate"]

MOST_CLIENTS = 10**8


def simulate(
    strategy: Strategy,
    problem: Problem | None = None,
    system: System | None = None,
    pool: Pool | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    *,
    clients: int = 100,
    cohort: int = 10,
    eval_every: int = 1,
    out: str | Path | Callable[[], Path] | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    observer: Observer | None = None,
) -> Run:
    """Run one federation in virtual time.

    Args:
        strategy: the method; a strategy object serves one run.
        problem: what is learnt; the embedded Fashion-MNIST images and an MLP unless given.
        system: devices, network, presence and faults; equal devices without a network unless given.
        pool: where training runs; this process unless given.
        stop: when the run is over; 100 rounds unless given.
        seed: of all randomness, 0 or more.
        clients: how many clients there are.
        cohort: results that make a round, at most ``clients`` (more are cut down to it).
        eval_every: rounds between evaluations; 0 never evaluates.
        out: directory to write the records to, or a function that makes one; nothing is written unless given.
        overwrite: replace a run in ``out``.
        config: what to write as ``config.yaml``; what can be said of the arguments unless given.
        labels: names of the parts for the manifest, such as ``{"strategy": "fedavg"}``; class names unless given.
        observer: called with the simulation at the end of every instant.

    Raises:
        ConfigError: if something handed in is wrong; nothing has been written then.
        SimulationError: if the run cannot go on; what was recorded so far is in ``out``.
    """
    if problem is None:
        from fedsim.problems.classification import Classification

        problem = Classification()
    system, pool, stop = system or System(), pool or InlinePool(), stop or Stop(rounds=100)
    with _one_thread():
        sim = _assemble(strategy, problem, system, pool, stop, seed, clients, cohort, eval_every)
        described = _describe(sim, seed) if config is None else config
        if isinstance(out, (str, Path)):
            check_free(Path(out), overwrite)
        pool.open(problem, strategy.jobs, sim.randomness)  # before anything is written: there may be no cluster
        try:
            recording = Recording(out, overwrite, described, labels)
            return _recorded(sim, recording, observer)
        finally:
            pool.close()


def _recorded(sim: Simulation, recording: Recording, observer: Observer | None) -> Run:
    observers = [recording.tick] if observer is None else [recording.tick, observer]
    sim.strategy.__dict__["_served"] = True  # not an attribute of the class: subclasses need not call super().__init__
    try:
        sim.run(observers)
    except BaseException as error:
        recording.fail(sim, error)
        raise
    return recording.finish(sim, {"name": sim.pool.name, "group": getattr(sim.pool, "group", None)})


def _assemble(
    strategy: Strategy,
    problem: Problem,
    system: System,
    pool: Pool,
    stop: Stop,
    seed: int,
    clients: int,
    cohort: int,
    eval_every: int,
) -> Simulation:
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy={strategy!r}: must be a fedsim.Strategy object")
    if getattr(strategy, "_served", False):
        raise ConfigError("strategy: this object has served a run already and holds its state; make a new one")
    clients = whole("clients", clients, least=1, most=MOST_CLIENTS)
    cohort = whole("cohort", cohort, least=1)
    eval_every = whole("eval_every", eval_every)
    randomness = Randomness(whole("seed", seed))
    problem.prepare(clients, randomness)
    system.prepare(clients, randomness)
    for rule in strategy.jobs.values():
        rule.check(clients)
    if stop.target is not None:
        check_target(problem, stop.target, eval_every)
    return Simulation(strategy, problem, system, pool, stop, randomness, min(cohort, clients), eval_every)


def check_target(problem: Problem, target: float, eval_every: int) -> None:
    """Refuse a target that the problem cannot be held against.

    Raises:
        ConfigError: naming ``target``.
    """
    if problem.target_metric is None:
        raise ConfigError(f"target={target}: this problem has no validation metric to reach it on")
    if not eval_every:
        raise ConfigError(f"target={target}: needs evaluations, but eval_every=0 makes none")
    if problem.target_metric[1] == "above":
        number("target", target, above=0, most=1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread while a run lasts: more would change sums, and are slower on small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _describe(sim: Simulation, seed: int) -> dict[str, Any]:
    """A configuration for runs that were put together in Python: classes and their plain settings."""
    system = sim.system
    parts = {
        "strategy": sim.strategy,
        "problem": sim.problem,
        "compute": system.compute,
        "network": system.network,
        "availability": system.availability,
        "faults": system.faults,
        "stop": sim.limits,
    }
    return {
        "seed": seed,
        "clients": sim.clients,
        "cohort": sim.cohort,
        "eval_every": sim.evaluation.every,
        **{name: _plain(part) for name, part in parts.items()},
        "local": {name: _plain(rule) for name, rule in sim.strategy.jobs.items()},
    }


def _plain(part: Any) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None)))
    }
    return {"_target_": f"{type(part).__module__}.{type(part).__qualname__}", **settings}
