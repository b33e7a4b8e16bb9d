"""A few clients picked, a few tasks planned, one by one: what arrays give, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.record import Log
from fedsim.rng import Randomness
from fedsim.simulation import engine
from fedsim.simulation.tasks import LiveTask, Order, plan
from fedsim.strategies.fedavg import FedAvg
from fedsim.system import System, availability, compute, faults, network

CLIENTS = 200


class Picking(fedsim.Strategy):
    """Picks cohorts of every size from 1 to 16, and keeps the clients at work for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.picked: list[list[int]] = []

    def settle(self, fed: Any) -> None:
        if fed.in_flight < 100:
            chosen = fed.pick(1 + len(self.picked) % 16)
            self.picked.append(chosen.tolist())
            fed.dispatch(chosen)

    def on_reply(self, fed: Any, reply: Any) -> None:
        fed.publish(fed.model, used=[reply])


def picked(few: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr(engine, "FEW_PICKS", few)
    strategy, presence = Picking(), availability.Bernoulli(p=0.6, slot=1.0)
    system = System(compute.Lognormal(), availability=presence)
    fedsim.simulate(strategy, fedsim.ScheduleOnly(), system, stop=fedsim.Stop(updates=600), clients=CLIENTS)
    return strategy.picked


def test_clients_picked_one_by_one_are_those_picked_by_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    found = picked(16, monkeypatch)
    assert found == picked(0, monkeypatch)
    assert {len(each) for each in found} == set(range(1, 17))
    assert all(each == sorted(set(each)) for each in found)


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 16),
    jitter=st.sampled_from([0.0, 0.5]),
    dropout=st.sampled_from([0.0, 0.5]),
    local=st.lists(st.booleans(), min_size=16, max_size=16),
)
@settings(max_examples=60, deadline=None)
def test_tasks_planned_one_by_one_get_the_times_of_arrays(
    seed: int, count: int, jitter: float, dropout: float, local: list[bool]
) -> None:
    system = System(compute.Lognormal(jitter=jitter), network.Lognormal(), faults=faults.Faults(dropout, "any"))
    system.prepare(CLIENTS, Randomness(seed))
    assert system.few == 16
    planned = []
    for system.few in (16, 1):
        tasks = []
        for number in range(count):
            task = LiveTask(number, 3 * number, Order("train", None, 5, local[number], False, None), 4 + number, None)
            task.nth, task.down_bytes, task.up_bytes = number, 1000 * number, 10**6
            tasks.append(task)
        plan(tasks, system, 5)
        planned.append([{**vars(task), "order": None} for task in tasks])
    if count > 1:
        assert planned[0] == planned[1]
    assert all(task["arrived"] > 5 for task in planned[0])


def test_models_of_a_users_own_are_asked_for_all_tasks_at_once() -> None:
    class Own(network.Constant):
        def up(self, clients: Any, nbytes: Any) -> Any:
            return super().up(clients, nbytes) * len(clients)

    system = System(network=Own())
    system.prepare(CLIENTS, Randomness(0))
    assert system.few == 1


def test_small_cohorts_leave_the_records_that_arrays_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for few in (16, 0):
        monkeypatch.setattr(engine, "FEW_PICKS", few)
        monkeypatch.setattr("fedsim.system.single.FEW", max(few, 1))
        system = System(compute.Lognormal(jitter=0.2), network.Lognormal(), faults=faults.Faults(dropout=0.1))
        stop = fedsim.Stop(rounds=20)
        run = fedsim.simulate(FedAvg(), fedsim.ScheduleOnly(), system, stop=stop, clients=CLIENTS, cohort=10)
        hashes.add(run.manifest["events_sha256"])
    assert len(hashes) == 1


VALUES = {
    "int64": st.sampled_from([None, 0, 1, 2**62]),
    "float64": st.sampled_from([None, 0.0, -0.0, 1.5]),
    "string": st.sampled_from([None, "", "a"]),
}


@given(st.lists(st.tuples(*VALUES.values()), max_size=4), st.integers(1, 3))
@settings(deadline=None)
def test_columns_of_one_value_are_the_columns_of_their_values(rows: list[tuple[Any, ...]], copies: int) -> None:
    log = Log({name: name for name in VALUES})
    rows = rows * copies
    for row in rows:
        log.append(row)
    table = log.table()
    types = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
    assert table.num_rows == len(rows)
    for place, (name, kind) in enumerate(types.items()):
        expected = pa.chunked_array([pa.array([row[place] for row in rows], type=kind)])
        assert table.column(name).equals(expected)
        if name == "float64":
            signs = [None if each is None else np.signbit(each) for each in table.column(name).to_pylist()]
            assert signs == [None if row[place] is None else np.signbit(row[place]) for row in rows]
