"""One task planned alone, one client picked alone: the same bits as in arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.pool import InlinePool
from fedsim.rng import Randomness
from fedsim.simulation.tasks import LiveTask, Order, Status, plan
from fedsim.simulation.traffic import Traffic
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import System, availability, compute, faults, network, single

CLIENTS = 40
NETWORKS = [
    network.NoNetwork,
    network.Constant,
    network.Lognormal,
    network.Mobile,
    lambda: network.Constant(1e-9, 1e-20),
]
JITTERS = {"lognormal": 100.0, "exponential": 1.0, "normal": 0.3}
sizes = st.integers(0, 10**15)


@given(
    net=st.sampled_from(NETWORKS),
    law=st.sampled_from(sorted(JITTERS)),
    share=st.floats(0, 1),
    fate=st.tuples(st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from(["before", "during", "after", "any"])),
    seed=st.integers(0, 2**40),
    tasks=st.lists(
        st.tuples(st.integers(0, CLIENTS - 1), st.integers(0, 10**6), st.integers(0, 10**9), sizes, sizes), min_size=1
    ),
)
@settings(max_examples=200, deadline=None)
def test_a_task_alone_takes_what_it_takes_among_others(
    net: Any, law: str, share: float, fate: tuple[float, str], seed: int, tasks: list[tuple[int, ...]]
) -> None:
    system = System(compute.Lognormal(jitter=share * JITTERS[law], jitter_law=law), net(), faults=faults.Faults(*fate))
    system.prepare(CLIENTS, Randomness(seed))
    assert single.applies(system)
    columns = system.spans(*np.array(tasks, dtype=np.int64).T)
    together = list(zip(*(column.tolist() for column in columns), strict=True))
    assert [system.spans_of_one(*task) for task in tasks] == together


@given(st.integers(0, 2**64 - 1), st.integers(0, 50), st.integers(1, 2**53))
@settings(deadline=None)
def test_the_nth_number_of_a_key_is_the_nth_of_many(seed: int, n: int, high: int) -> None:
    draw = Randomness(seed)("any", n)
    assert draw.nth_uniform(n) == draw.uniform(n + 1)[n]
    assert draw.nth_normal(n) == draw.normal(n + 1)[n]
    assert draw.nth_integer(high, n) == draw.integers(high, n + 1)[n]


class Doubled(network.Constant):
    """A network of a user's own."""

    def down(self, clients: Any, nbytes: Any) -> Any:
        return 2 * super().down(clients, nbytes)


class Halved(compute.Constant):
    """Speeds of a user's own."""

    def durations(self, clients: Any, steps: Any, nth: Any) -> Any:
        return super().durations(clients, steps, nth) // 2


class Certain(faults.Faults):
    """Faults of a user's own."""

    def draw(self, clients: Any, nth: Any) -> Any:
        return np.full(len(clients), 3, dtype=np.int8), np.ones(len(clients))


@pytest.mark.parametrize("own", [System(network=Doubled()), System(Halved()), System(faults=Certain())])
def test_models_of_a_users_own_are_asked_for_a_single_task_too(own: System) -> None:
    own.prepare(CLIENTS, Randomness(0))
    asked = (3, 0, 5, 10**6, 10**6)
    assert own.spans_of_one(*asked) == tuple(column.item() for column in own.spans(*np.array([asked]).T))
    usual = System(network=network.Constant() if isinstance(own.network, Doubled) else None)
    usual.prepare(CLIENTS, Randomness(0))
    assert own.spans_of_one(*asked) != usual.spans_of_one(*asked)


class Picking(fedsim.Strategy):
    """Picks one client and then, of the same draw, several; nobody is dispatched in between."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[int], list[int]]] = []

    def settle(self, fed: Any) -> None:
        for _ in range(60):
            number = fed._picks
            one = fed.pick(1).tolist()
            fed._picks = number
            draw, tries = fed.randomness("pick by trial", number + 1), 12
            tried = draw.integers(fed.clients, tries).tolist()
            idle = set(fed.idle().tolist())
            self.seen.append((one, [each for each in tried if each in idle][:1]))
            fed._picks = number + 1
            if fed.in_flight < 20 and one:
                fed.dispatch(one)

    def on_reply(self, fed: Any, reply: Any) -> None:
        fed.publish(fed.model, used=[reply])


def test_one_client_is_picked_as_the_first_of_those_tried_that_is_idle() -> None:
    strategy = Picking()
    presence = availability.Bernoulli(p=0.4, slot=1.0)
    stop = fedsim.Stop(updates=50)
    fedsim.simulate(strategy, fedsim.ScheduleOnly(), System(availability=presence), stop=stop, clients=CLIENTS)
    found = [(one, first) for one, first in strategy.seen if first]
    assert len(found) > 90
    assert all(one == first for one, first in found)


@given(st.integers(0, 2**32), st.sampled_from(NETWORKS[:4]))
@settings(max_examples=60, deadline=None)
def test_the_ledger_holds_what_each_task_has_moved(seed: int, net: Any) -> None:
    system, chance = System(network=net()), np.random.default_rng(seed)
    system.prepare(CLIENTS, Randomness(seed))
    traffic, tasks = Traffic(system), []
    order = Order("train", None, 0, False, False, None)
    now = 0
    for number in range(12):
        task = LiveTask(number, number, order, 1, None)
        task.down_bytes, task.up_bytes = (int(each) for each in chance.integers(0, 10**6, 2))
        plan([task], system, now)
        if chance.random() < 0.3:
            task.ended = int(chance.integers(now + 1, task.arrived + 1))
        traffic.begin(task)
        tasks.append(task)
        now = int(chance.integers(now, task.arrived + 2))
        for each in tasks:
            if each.status == Status.RUNNING and each.ended is None and each.arrived <= now:
                each.status = Status.ARRIVED
                traffic.arrive(each)
            elif each.status == Status.RUNNING and chance.random() < 0.2:
                each.ended = each.seen_until(now)
                each.status = Status.DECIDED
                traffic.cut(each, each.moved(now, system))
        moved = [each.moved(now, system) for each in tasks]
        assert traffic.total(now) == (sum(down for down, _ in moved), sum(up for _, up in moved))
        copy = Traffic(system)
        copy.restore(traffic.snapshot(), tasks)
        assert copy.total(now) == traffic.total(now)


class Listening(FedBuff):
    """Writes to what it gets, as a strategy may."""

    def on_reply(self, fed: Any, reply: Any) -> None:
        assert list(reply.payload) == ["delta"]
        reply.payload["note"] = torch.ones(3)
        super().on_reply(fed, reply)


@pytest.mark.parametrize("strategy", [lambda: Listening(), lambda: FedAvg(over_selection=1.5)])
def test_nothing_is_handed_to_the_pool_where_there_is_nothing_to_train(strategy: Any) -> None:
    class Refusing(InlinePool):
        def submit(self, works: Any) -> None:
            raise AssertionError(works)

    run = fedsim.simulate(strategy(), fedsim.ScheduleOnly(), pool=Refusing(), stop=fedsim.Stop(rounds=5))
    assert run.summary["outcomes"]["applied"] >= 40
    assert (run.events.group == 0).all()


def test_a_rule_of_ones_own_runs_where_there_is_nothing_to_train() -> None:
    class Saying(fedsim.LocalSGD):
        def finish(self, ctx: Any, x: Any) -> Any:
            said.extend(ctx.clients.tolist())
            return super().finish(ctx, x)

    said: list[int] = []
    run = fedsim.simulate(FedAvg(Saying()), fedsim.ScheduleOnly(), stop=fedsim.Stop(rounds=2), clients=30)
    assert sorted(said) == sorted(run.events.client[run.events.outcome == "applied"])
