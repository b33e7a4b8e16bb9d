"""One run from its parts to its records: what ``fedsim run`` and the Python interface share."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch

from fedsim.checkpoint import CheckpointSchedule
from fedsim.checks import ConfigError, Interrupted, number, whole
from fedsim.identity import differences, identify, parts_of
from fedsim.interrupts import Interrupts
from fedsim.pool import InlinePool, Pool
from fedsim.problems.base import Problem
from fedsim.record import RunDirectory, check_free
from fedsim.recording import Recording, Run, begun
from fedsim.rng import Randomness
from fedsim.simulation import Simulation, Stop
from fedsim.strategy import Strategy
from fedsim.system import System
from fedsim.tracking import Tracker, Tracking

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
    client_eval_every: int = 0,
    out: str | Path | Callable[[], Path] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
    checkpoint: CheckpointSchedule | None = None,
    config: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    observer: Observer | None = None,
    tracker: Tracker | None = None,
) -> Run:
    """Run one federation in virtual time.

    Args:
        strategy: the method; a strategy object serves one run.
        problem: what is learnt; the embedded Fashion-MNIST images and an MLP unless given, or what the strategy brings.
        system: devices, network, presence and faults; equal devices without a network unless given.
        pool: where training runs; this process unless given.
        stop: when the run is over; 100 rounds unless given.
        seed: of all randomness, 0 or more.
        clients: how many clients there are.
        cohort: results that make a round, at most ``clients`` (more are cut down to it).
        eval_every: rounds between evaluations; 0 never evaluates.
        client_eval_every: rounds between evaluations on the examples that clients keep apart (``client_accuracy``),
            at most one with each evaluation and one at the end; 0 never.
        out: directory to write the records to, or a function that makes one; nothing is written unless given.
        overwrite: replace a run in ``out``.
        resume: go on with the run in ``out``, which was stopped, from its last checkpoint; the other arguments must
            be those it was begun with.
        allow_changes: resume although the code or the versions of libraries have changed since.
        checkpoint: when to save the run, if ``out`` is given; every minute unless given. A run with ``out`` that
            gets a SIGINT or SIGTERM saves itself before it stops.
        config: what to write as ``config.yaml``; what can be said of the arguments unless given.
        labels: names of the parts for the manifest, such as ``{"strategy": "fedavg"}``; class names unless given.
        observer: called with the simulation at the end of every instant.
        tracker: told of every evaluation; nobody unless given.

    Raises:
        ConfigError: if something handed in is wrong; nothing has been written then.
        SimulationError: if the run cannot go on; what was recorded so far is in ``out``.
        Interrupted: after a signal; a KeyboardInterrupt.
    """
    if isinstance(strategy, Strategy):
        check_resume_possible(strategy, out, resume)
        problem = problem or strategy.own_problem()
    if problem is None:
        from fedsim.problems.classification import Classification

        problem = Classification()
    system, pool, stop = system or System(), pool or InlinePool(), stop or Stop(rounds=100)
    tracking = Tracking(tracker or Tracker())
    tracking.tracker.check(Path(out) if isinstance(out, (str, Path)) else None)
    with one_thread():
        sim = _assemble(strategy, problem, system, pool, stop, seed, clients, cohort, eval_every, client_eval_every)
        strategy.check_federation(sim)
        described = _describe(sim, seed) if config is None else config
        identity = identify(described, labels or {}, parts_of(strategy, problem, system), pool.identity())
        if resume:
            identity = check_resumable(out, identity, allow_changes)
        elif isinstance(out, (str, Path)):
            check_free(Path(out), overwrite)
        pool.open(problem, strategy.jobs, sim.randomness)  # before anything is written: there may be no cluster
        try:
            directory = directory_for(out, overwrite, resume)
            recording = Recording(directory, described, identity, checkpoint or CheckpointSchedule())
            return recorded(sim, recording, tracking, observer, resume)
        finally:
            pool.close()


def directory_for(
    out: str | Path | Callable[[], Path] | None, overwrite: bool, resume: bool = False
) -> RunDirectory | None:
    """Where a run is written to, made or opened; arguments as for :func:`simulate`.

    Raises:
        ConfigError: if it may not be written to, or there is nothing to go on with.
    """
    if out is None:
        return None
    path = out() if callable(out) else out
    if not resume:
        return RunDirectory.create(path, overwrite)
    directory = RunDirectory.reopen(path)
    try:
        begun(directory.path)  # once more, now that nobody else can write: it may have been completed meanwhile
    except BaseException:
        directory.close()
        raise
    return directory


def recorded(
    sim: Simulation,
    recording: Recording,
    tracking: Tracking,
    observer: Observer | None = None,
    resume: bool = False,
) -> Run:
    """Run ``sim`` to its end, whatever that is, and keep its records.

    Raises:
        SimulationError: if the run cannot go on; what was recorded so far has been written.
        Interrupted: after a signal; a KeyboardInterrupt.
    """
    observers = [recording.tick, tracking.tick, *([] if observer is None else [observer])]
    try:
        if resume:
            recording.go_on(sim)
        else:
            recording.begin()
    except BaseException:
        recording.close()
        raise
    tracking.begin(sim, None if recording.directory is None else recording.directory.path, recording.config)
    sim.strategy.__dict__["_served"] = True  # not an attribute of the class: subclasses need not call super().__init__
    with Interrupts() if recording.directory is not None else contextlib.nullcontext() as interrupts:
        try:
            sim.run(observers if interrupts is None else [*observers, interrupts.check])
        except Interrupted as interruption:
            text = recording.interrupt(sim)
            tracking.end(sim, None)
            raise Interrupted(text, interruption.signal) from None
        except BaseException as error:
            recording.fail(sim, error)
            tracking.end(sim, None)
            raise
        run = recording.finish(sim, {"name": sim.pool.name, "group": getattr(sim.pool, "group", None)})
        tracking.end(sim, run.summary)
        return run


def check_resume_possible(strategy: Strategy, out: Any, resume: bool) -> None:
    """Refuse to resume a run of a strategy that cannot be saved.

    Raises:
        ConfigError: saying why not, and what to do instead.
    """
    if resume and strategy.unsaved is not None:
        raise ConfigError(f"{out}: cannot be resumed, {strategy.unsaved}; run it again with overwrite=true")


def check_resumable(out: Any, identity: Mapping[str, Any], allow_changes: bool) -> dict[str, Any]:
    """Refuse to resume what is no unfinished run of this identity, and give the identity to go on with.

    Raises:
        ConfigError: saying what has changed.
    """
    if not isinstance(out, (str, Path)):
        raise ConfigError(f"out={out}: resume needs the directory of the run that was stopped")
    before = begun(Path(out))
    if before["config_sha256"] != identity["config_sha256"]:
        raise ConfigError(f"out={out}: holds a run of another configuration, see its config.yaml")
    changed = differences(before, identity)
    if changed and not allow_changes:
        kernel, now = (each.get("execution", {}).get("kernel") for each in (before, identity))
        same = f"give it pool.kernel={kernel} as before; " if kernel and now and kernel != now else ""
        raise ConfigError(
            f"{out}: was begun with something else ({'; '.join(changed)}), so its results may not be reproducible; "
            f"{same}to go on nevertheless: fedsim resume --allow-changes"
        )
    return {**identity, "changed_on_resume": [*before.get("changed_on_resume", []), *changed]}


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
    client_eval_every: int,
) -> Simulation:
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy={strategy!r}: must be a fedsim.Strategy object")
    if getattr(strategy, "_served", False):
        raise ConfigError("strategy: this object has served a run already and holds its state; make a new one")
    clients = whole("clients", clients, least=1, most=MOST_CLIENTS)
    cohort = whole("cohort", cohort, least=1)
    eval_every = whole("eval_every", eval_every)
    client_eval_every = whole("client_eval_every", client_eval_every)
    check_client_evaluation(problem, client_eval_every, eval_every)
    randomness = Randomness(whole("seed", seed))
    problem.prepare(clients, randomness)
    system.prepare(clients, randomness, problem.class_counts)
    strategy.check(clients)
    if stop.target is not None:
        check_target(problem, stop.target, eval_every)
    results = clients if strategy.everybody else min(cohort, clients)
    return Simulation(strategy, problem, system, pool, stop, randomness, results, eval_every, client_eval_every)


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


def check_client_evaluation(problem: Problem, client_eval_every: int, eval_every: int) -> None:
    """Refuse evaluations on the clients' own examples where there cannot be any.

    Raises:
        ConfigError: naming ``client_eval_every``.
    """
    if client_eval_every and not problem.client_parts:
        raise ConfigError(
            f"client_eval_every={client_eval_every}: must be 0, no client keeps examples apart; "
            "problem.client_test=0.2 of classification makes them"
        )
    if client_eval_every and not eval_every:
        raise ConfigError(f"client_eval_every={client_eval_every}: must be 0, eval_every=0 makes no evaluations")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
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
        "client_eval_every": sim.evaluation.client_every,
        **{name: _plain(part) for name, part in parts.items()},
        "local": {name: _plain(rule) for name, rule in sim.strategy.jobs.items()},
    }


def _plain(part: Any) -> Any:
    """A part's settings as values that YAML can hold; arrays and weights that were handed in as hashes."""
    if isinstance(part, (bool, int, float, str, type(None))):
        return part
    if isinstance(part, (list, tuple)):
        return [_plain(each) for each in part]
    if isinstance(part, Mapping):
        return {str(key): _plain(each) for key, each in part.items()}
    if isinstance(part, np.ndarray):
        return {"sha256": hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()}
    if isinstance(part, torch.Tensor):
        return _plain(part.detach().cpu().contiguous().view(torch.uint8).numpy() if part.ndim else part.item())
    kind = part if isinstance(part, (type, FunctionType)) else type(part)
    name = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(part, torch.nn.Module):
        return {**name, "weights": _plain(part.state_dict())}
    if kind is part:
        return name
    wanted = inspect.signature(type(part).__init__).parameters
    held = {key: each for key, each in sorted(getattr(part, "__dict__", {}).items()) if not key.startswith("_")}
    return {**name, **{key: _plain(each) for key, each in held.items() if key in wanted or _is_setting(each)}}


def _is_setting(value: Any) -> bool:
    """Whether an attribute is a plain value or an object of ours that holds such; arrays are made, not set."""
    return isinstance(value, (bool, int, float, str, type(None))) or type(value).__module__.startswith("fedsim.")
