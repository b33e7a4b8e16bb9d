"""A run of a Flower app is a function of its configuration and seed, and leaves the process as it was."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flower_apps import answering, drawing, flower, starting, to
from flwr.app import Error, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedTrimmedAvg, Krum, Strategy, strategy_utils
from flwr.supercore.task_identity import TaskIdentity

import fedsim
from fedsim.flower.simulated import internals
from fedsim.flower.simulated.process_state import seeded
from fedsim.rng import Randomness
from fedsim.system import availability, compute, faults

STRATEGIES = {
    "FedAvg": lambda: FedAvg(fraction_train=0.5, fraction_evaluate=0.3),
    "FedAdam": lambda: FedAdam(fraction_train=0.5, fraction_evaluate=0.3),
    "Krum": lambda: Krum(fraction_train=0.5, fraction_evaluate=0.3, num_malicious_nodes=1),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_train=0.5, fraction_evaluate=0.3, beta=0.2),
}


def run_of(name, seed=3):
    system = {
        "compute": compute.Lognormal(mean=0.2, jitter=0.2),
        "availability": availability.Markov(up=20.0, down=2.0, slot=1.0),
        "faults": faults.Faults(dropout=0.1, when="any"),
    }
    main = starting(STRATEGIES[name], 4, evaluate_fn=lambda n, x: MetricRecord({"x0": float(x["x"].numpy()[0])}))
    return flower(main, drawing(), system=system, seed=seed, clients=12)


def hashes(name):
    run = run_of(name)
    return {**{key: run.manifest[key] for key in ("model_sha256", "events_sha256")}, "x0": run.metrics.x0.tolist()}


@pytest.fixture(scope="module")
def elsewhere():
    """The same runs in a process of its own whose strings hash differently."""
    code = "import json, test_flower_reproducible as t; print(json.dumps({n: t.hashes(n) for n in t.STRATEGIES}))"
    settings = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_is_the_same_again_and_in_another_process(name, elsewhere):
    random.seed(time.time())
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(32))
    here = hashes(name)
    assert here == hashes(name)
    assert here == elsewhere[name]
    assert len(set(here["x0"])) == 5  # it moves at all


def test_another_seed_makes_another_run():
    assert run_of("FedAvg").manifest["model_sha256"] != run_of("FedAvg", seed=4).manifest["model_sha256"]


def test_strategies_make_models_of_their_own():
    assert len({hashes(name)["model_sha256"] for name in STRATEGIES}) == len(STRATEGIES)


def test_what_clients_draw_does_not_move_what_the_server_draws():
    def drawn(count):
        seen = []

        def work(message, context):
            for _ in range(count):
                random.random(), np.random.rand(), torch.rand(1)
            return message.content["arrays"]

        def main(grid):
            for _ in range(3):
                grid.send_and_receive(messages=[to(0)])
                seen.append((random.random(), np.random.rand(), torch.rand(1).item()))

        flower(main, answering(work=work))
        return seen

    assert drawn(0) == drawn(5)
    assert len(set(drawn(0))) == 3


def test_every_task_of_a_client_draws_anew_whoever_else_is_asked():
    seen = {}

    def work(message, context):
        client = context.node_config["partition-id"]
        seen.setdefault(client, []).append((random.random(), np.random.rand(), torch.rand(1).item()))
        return message.content["arrays"]

    def main(*rounds):
        return lambda grid: [grid.send_and_receive(messages=[to(client) for client in each]) for each in rounds]

    flower(main([0, 1], [1]), answering(work=work))
    first, seen = seen, {}
    assert len({*first[0], *first[1]}) == 3
    flower(main([1], [2, 0, 1]), answering(work=work))
    assert (seen[0], seen[1]) == (first[0], first[1])


def states():
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "sleep": (time.sleep, strategy_utils.sleep),
        "start": Strategy.start,
        "identity": [getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id")],
        "log": (logging.getLogger("flwr").handlers[:], logging.getLogger("flwr").propagate),
        "path": sys.path[:],
    }


def breaking(message, context):
    raise ValueError("here")


@pytest.mark.parametrize("work", [None, breaking])
def test_the_process_is_left_as_it_was(work):
    kept = []
    before = states()
    main = starting(lambda: kept.append(FedAvg()) or kept[-1], 2, evaluate_fn=lambda n, x: None)
    if work is None:
        flower(main, answering())
        assert not vars(kept[0]).keys() & {"aggregate_train", "aggregate_evaluate"}
    else:
        with pytest.raises(fedsim.SimulationError):
            flower(main, answering(work=work))
    assert states() == before


def test_clients_really_sleep():
    def work(message, context):
        time.sleep(0.05)
        return message.content["arrays"]

    began = time.monotonic()
    run = flower(lambda grid: grid.send_and_receive(messages=[to(0)]), answering(work=work))
    assert time.monotonic() - began >= 0.05
    assert run.summary["time"] == 1.0


def test_seeds_are_lent_and_given_back_when_code_raises():
    before = states()
    with pytest.raises(ValueError, match="here"), seeded(Randomness(0)("a")):
        breaking(random.random(), torch.rand(2))
    assert states() == before


# ---- what is touched of Flower beside its public interface -----------------------------------------


def test_flower_keeps_ids_where_we_set_them(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):  # grids of other tests may have set them
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="not set"):
        to(0)
    with internals.server_identity():
        message = to(5)
    internals.name_message(message, "mine")
    assert (message.metadata.message_id, message.metadata.src_node_id, message.metadata.run_id) == ("mine", 1, 1)
    reply = Message(Error(code=0), reply_to=message)
    assert (reply.metadata.reply_to_message_id, reply.metadata.dst_node_id) == ("mine", 1)


def test_a_flower_that_keeps_ids_elsewhere_is_refused():
    class Metadata:
        message_id = ""

    class Changed:
        metadata = Metadata()

    with pytest.raises(fedsim.SimulationError, match=r"keeps message ids elsewhere; fedsim is tested with flwr 1\.41"):
        internals.name_message(Changed(), "mine")


def test_flowers_strategies_wait_by_the_sleep_we_replace():
    assert strategy_utils.sleep is time.sleep
    waits = []

    class NoNodes(Grid):
        def get_node_ids(self):
            return [1] if waits else []

        set_run = run = create_message = push_messages = pull_messages = send_and_receive = None

    with internals.strategies_sleep(waits.append):
        strategy_utils.sample_nodes(NoNodes(), 1, 1)
    assert waits == [1]


def test_errors_have_flowers_codes():
    from flwr.common.constant import ErrorCode

    with internals.server_identity():
        message = to(5)
    made = {why: internals.error_reply(why, message).error.code for why in internals.ERRORS}
    unavailable = dict.fromkeys(("offline", "dropped", "interrupted"), ErrorCode.NODE_UNAVAILABLE)
    assert made == {
        **unavailable,
        "failed": ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        "deadline": ErrorCode.MESSAGE_UNAVAILABLE,
    }
    assert (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE) == (
        2,
        3,
        5,
    )
