"""A node's half of a deployment: the same local rule, trained as a stack of one on the node's own data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from torch import Tensor

from fedsim.assemble import Assembly
from fedsim.checks import ConfigError, FedsimError, number, seconds, whole
from fedsim.flower.configuration import read_run_config, run_config
from fedsim.flower.keeping import Kept
from fedsim.flower.loading import own_problem, prepared
from fedsim.flower.messages import (
    RAISED,
    Greeting,
    Introduction,
    Order,
    Report,
    WireError,
    arrays,
    content_of,
    tensors,
)
from fedsim.local import MOST, LocalSGD, TensorSpec
from fedsim.problems.base import Problem
from fedsim.rng import Randomness
from fedsim.training import Trainer, Work, trainer_for
from fedsim.vectors import all_finite
from fedsim.version import __version__

PROBE = "probe"
"""The job by which a node measures how fast it is."""

Answer = Callable[[Message, Context], RecordDict]


@dataclass(frozen=True)
class Learner:
    """What a node trains with: the same for all of its tasks."""

    problem: Problem
    jobs: Mapping[str, LocalSGD]
    trainer: Trainer
    seed: int


def introduce(message: Message, context: Context) -> Message:
    """Say who this node is, what it holds and how fast it is."""
    return _answered(_introduce, message, context)


def work(message: Message, context: Context) -> Message:
    """Do one task."""
    return _answered(_work, message, context)


def _answered(answer: Answer, message: Message, context: Context) -> Message:
    """The answer, or one line on why there is none: a node must not fall over what it was sent."""
    try:
        return Message(answer(message, context), reply_to=message)
    except FedsimError as error:
        return Message(Error(RAISED, str(error)), reply_to=message)


def _introduce(message: Message, context: Context) -> RecordDict:
    greeting = Greeting.read(content_of(message), "greeting")
    config = context.node_config
    client = whole("partition-id", config.get("partition-id", greeting.client))
    clients = whole("num-partitions", config.get("num-partitions", greeting.clients), least=1)
    if client >= greeting.clients:  # there is nothing to look at: the server will say what is wrong
        return RecordDict({"introduction": Introduction(client, clients, 0, 0, 0.0, 0.0, -1, __version__).record()})
    learner = _learner(context, client)
    said = Introduction(
        client,
        clients,
        int(learner.problem.samples[client]),
        learner.problem.layout.size,
        _seconds_per_gradient(learner, client),
        *_intentions(config),
        __version__,
    )
    return RecordDict({"introduction": said.record()})


def _work(message: Message, context: Context) -> RecordDict:
    content = content_of(message)
    order = Order.read(content, "order")
    own = context.node_config.get("partition-id")
    if order.client < 0 or (own is not None and order.client != own):
        raise WireError(f"the task is for client {order.client}, this node is client {own}")
    learner = _learner(context, order.client)
    start, told = _checked(content, order, learner)
    kept = Kept(context.state)
    kept.decide(order.accepted, order.undecided)
    rule = learner.jobs[order.job]
    held = {**_first_state(learner), **kept.committed()}
    state = {name: tensor for name, tensor in held.items() if name not in rule.unread}
    begun = time.perf_counter()
    asked = Work(order.task, order.client, order.nth, order.job, start, told, state, order.lr, order.steps)
    result = learner.trainer.train([asked])[0]
    took = time.perf_counter() - begun
    if result.error is not None:
        raise result.error
    kept.put(order.task, result.state)
    samples = int(learner.problem.samples[order.client])
    said = (took, kept.commits(), *_intentions(context.node_config))
    report = Report(order.task, order.client, result.steps, samples, *said)
    return RecordDict({"report": report.record(), "payload": arrays(result.payload)})


def _checked(content: RecordDict, order: Order, learner: Learner) -> tuple[Tensor, dict[str, Tensor]]:
    """The tensors of a task that makes sense.

    Raises:
        WireError: if it does not.
    """
    layout = learner.problem.layout
    if order.job not in learner.jobs:
        raise WireError(f"there is no job '{order.job[:40]}', this node's are {sorted(learner.jobs)}")
    if order.task < 0 or order.nth < 0 or not 0 <= order.steps <= MOST or order.lr < 0:
        raise WireError(f"task {order.task}, nth {order.nth}, steps {order.steps} and rate {order.lr} make no sense")
    start = tensors(content, "start", {"start": TensorSpec((layout.size,), layout.dtype)})["start"]
    told = tensors(content, "message")
    for name, tensor in {"start": start, **told}.items():
        if not all_finite(tensor):
            raise WireError(f"'{name}' has non-finite values")
    return start, told


def _first_state(learner: Learner) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for rule in learner.jobs.values():
        state.update(rule.initial_state(learner.problem.layout))
    return state


def _intentions(config: Mapping[str, Any]) -> tuple[float, int]:
    """When the node will be ready for another task, in seconds, and how many steps it will make then (-1: as told)."""
    pause = seconds("pause", config.get("pause", 0.0), least=0)
    return pause, whole("steps", config.get("steps", -1), least=-1, most=MOST)


def _learner(context: Context, client: int) -> Learner:
    """Made once in a process."""
    held = read_run_config(context.run_config)
    told = run_config({**held.config, "out": None}, held.choices, held.loader)  # where it is written is no matter here
    own = tuple(sorted(context.node_config.items())) if held.loader else ()
    return _make(tuple(sorted(told.items())), own, client if held.loader else -1)


@lru_cache(maxsize=8)
def _make(told: tuple[tuple[str, str], ...], node_config: tuple[tuple[str, Any], ...], client: int) -> Learner:
    held = read_run_config(dict(told))
    assembly = Assembly(held.config, held.choices)
    problem = assembly.problem
    if held.loader:
        problem = own_problem(problem, held.loader, client, dict(node_config))
    problem = prepared(problem, assembly.clients, assembly.seed)
    if client >= 0 and int(problem.samples[client]) != int(problem.samples.sum()):
        raise ConfigError(f"loader={held.loader}: all examples of its Problem must be client {client}'s")
    jobs = copy.deepcopy(dict(assembly.strategy.jobs))
    trainer = trainer_for(problem, jobs, Randomness(assembly.seed))
    return Learner(problem, jobs, trainer, assembly.seed)


def _seconds_per_gradient(learner: Learner, client: int) -> float:
    """Measured on a few plain steps, after one that makes what is made once."""
    if not learner.problem.samples[client]:
        return 0.0
    batch_size = next(iter(learner.jobs.values())).batch_size
    jobs = {PROBE: LocalSGD(batch_size=batch_size)}
    trainer = trainer_for(learner.problem, jobs, Randomness(learner.seed))
    begun = 0.0
    for steps in (1, 3):
        begun = time.perf_counter()
        trainer.train([Work(0, client, 0, PROBE, learner.problem.initial(), {}, {}, 0.0, steps)])
    return number("seconds", (time.perf_counter() - begun) / 3, least=0)
