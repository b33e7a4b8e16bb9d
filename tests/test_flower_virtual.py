"""A Flower Grid over the simulator: virtual time, replies and errors, and what nodes keep."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flower_apps import answering, arrays, asker, flower, starting, to
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from support import Given, Scripted

import fedsim
from fedsim.checks import TaskError
from fedsim.flower.simulated.clients import FIRST_NODE
from fedsim.system import faults, network

UNAVAILABLE, RAISED, EXPIRED = 5, 2, 3
"""Flower's codes of errors."""


def moments(run):
    return run.events.set_index("task").arrived.to_dict()


# ---- time ----------------------------------------------------------------------------------------


def test_a_message_takes_download_steps_and_upload():
    def main(grid):
        grid.send_and_receive(messages=[to(0), to(1, kind="evaluate"), to(2, kind="query")])

    app = answering(examples=100)
    app.query()(lambda message, context: Message(RecordDict({"x": arrays(x=np.zeros(7))}), reply_to=message))
    link = network.Constant(down=8e-6, up=4e-6, latency=0.5)  # 1 byte a second down, 0.5 up
    run = flower(main, app, system={"network": link}, costs={"batch_size": 30, "epochs": 3, "evaluate_cost": 0.3})
    # 32 bytes down; 3 epochs of 4 batches, or 0.3 * 4 rounded up; 32 bytes up, none, or 56.
    assert moments(run) == {0: 32.5 + 12 + 64.5, 1: 32.5 + 2 + 0.5, 2: 32.5 + 0 + 0.5 + 112}
    assert run.events.steps.tolist() == [12, 2, 0]
    assert run.events.samples.tolist() == [300, 0, 0]
    assert run.events.down_bytes.tolist() == [32, 32, 32]
    assert run.events.up_bytes.tolist() == [32, 0, 56]
    assert run.summary["down_bytes"] + run.summary["up_bytes"] == 96 + 88


def test_given_local_steps_count_whatever_the_client_reports():
    client = ClientApp()

    @client.train()
    def _(message, context):
        return Message(RecordDict(), reply_to=message)

    run = flower(lambda grid: grid.send_and_receive(messages=[to(0)]), client, costs={"local_steps": 7})
    assert moments(run) == {0: 7.0}


def test_without_local_steps_clients_must_report_their_examples():
    client = ClientApp()

    @client.train()
    def _(message, context):
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(fedsim.SimulationError, match=r"strategy.local_steps=null: must be given.*'num-examples'"):
        flower(lambda grid: grid.send_and_receive(messages=[to(0)]), client)


def test_replies_come_in_order_of_arrival():
    seen = []

    def main(grid):
        seen.extend(asker(each) for each in grid.send_and_receive(messages=[to(client) for client in (3, 0, 2, 1)]))

    flower(main, system={"compute": Given(5.0, 1.0, 3.0, 1.0)})
    assert seen == [1, 3, 2, 0]


def test_who_waits_for_a_time_only_leaves_late_replies_behind():
    seen = []

    def main(grid):
        for timeout in (3.0, 3.0, None):
            replies = grid.send_and_receive(messages=[to(0), to(1)], timeout=timeout)
            seen.append((grid.sim.now, [asker(each) for each in replies]))

    run = flower(main, system={"compute": Given(1.0, 4.0, 1.0, 1.0)})
    # Client 1 needs 4 s for each message and begins one when it is done with the one before: at 0, 4 and 8 s.
    assert seen == [(3.0, [0]), (6.0, [0]), (12.0, [0, 1])]
    client = run.events[run.events.client == 1]
    assert client.dispatched.tolist() == [0.0, 4.0, 8.0]
    assert client.outcome.tolist() == ["late", "late", "applied"]


def test_a_reply_that_comes_just_at_the_end_of_the_wait_is_there():
    seen = []

    def main(grid):
        seen.extend(asker(each) for each in grid.send_and_receive(messages=[to(0), to(1)], timeout=4.0))

    flower(main, system={"compute": Given(4.0, 4.000000001, 1.0, 1.0)})
    assert seen == [0]


def test_an_asynchronous_server_gets_replies_as_they_arrive_and_sends_more():
    seen = []

    def main(grid):
        waiting = set(grid.push_messages([to(client) for client in range(3)]))
        while len(seen) < 7:
            for reply in grid.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                seen.append((asker(reply), grid.sim.now))
                waiting.update(grid.push_messages([to(asker(reply))]))
            time.sleep(0.25)

    run = flower(main, system={"compute": Given(1.0, 2.5, 10.0, 1.0)})
    # Polled every quarter of a second; sent off again then.
    assert seen == [(0, 1.0), (0, 2.0), (1, 2.5), (0, 3.0), (0, 4.0), (0, 5.0), (1, 5.0)]
    assert run.summary["outcomes"] == {"applied": 7, "pending": 3}


def test_polling_without_a_wait_moves_time_to_the_next_event():
    seen = []

    def main(grid):
        waiting = grid.push_messages([to(0), to(1)])
        for _ in range(100):
            seen.extend((asker(each), grid.sim.now) for each in grid.pull_messages(waiting))

    flower(main, system={"compute": Given(1e3, 3e4, 1.0, 1.0)})
    assert seen == [(0, 1e3), (1, 3e4)]


def test_a_server_that_waits_for_nodes_waits_in_virtual_time():
    began = time.monotonic()
    presence = Scripted((100.5, 2, True), (400.5, 3, True), absent=(2, 3))
    strategy = starting(lambda: FedAvg(min_available_nodes=4, fraction_evaluate=0.0), rounds=1)
    run = flower(strategy, system={"availability": presence})
    assert run.events.dispatched.tolist() == [401.0] * 2
    assert time.monotonic() - began < 60


def test_a_server_that_wants_more_nodes_than_there_are_is_told_so():
    with pytest.raises(fedsim.SimulationError, match="does it want more nodes than there are clients"):
        flower(starting(lambda: FedAvg(min_available_nodes=5)))


# ---- what goes wrong -----------------------------------------------------------------------------


def asked_all(**parts):
    seen = {}

    def main(grid):
        for reply in grid.send_and_receive(messages=[to(client) for client in range(4)]):
            seen[asker(reply)] = (reply.error.code if reply.has_error() else None), grid.sim.now

    return flower(main, parts.pop("client", None), system=parts), seen


def test_a_node_that_is_offline_is_unavailable():
    run, seen = asked_all(availability=Scripted(absent=(1,)))
    assert {client: code for client, (code, _) in seen.items()} == {0: None, 1: UNAVAILABLE, 2: None, 3: None}
    assert run.events.outcome.tolist() == ["applied", "dropped", "applied", "applied"]


def test_nodes_that_are_offline_are_not_among_those_of_the_grid():
    seen = []

    def main(grid):
        seen.append([node - FIRST_NODE for node in grid.get_node_ids()])
        time.sleep(2)
        seen.append([node.node_id - FIRST_NODE for node in grid.get_nodes()])

    flower(main, system={"availability": Scripted((1.0, 1, True), (1.5, 0, False), absent=(1, 3))})
    assert seen == [[0, 2], [1, 2]]


def test_a_node_that_leaves_at_work_is_unavailable():
    leaving = Scripted((0.5, 2, False))
    run, seen = asked_all(availability=leaving, faults=faults.Faults(on_offline="lose", detect=3.0))
    assert seen[2] == (UNAVAILABLE, 3.5)
    assert run.events.outcome[2] == "interrupted"


def test_a_node_that_drops_out_is_unavailable_once_that_is_noticed():
    run, seen = asked_all(faults=faults.Faults(dropout=1.0, when="after", detect=2.0))
    assert set(seen.values()) == {(UNAVAILABLE, 3.0)}
    assert run.summary["outcomes"] == {"dropped": 4}


def failing(client_id, error):
    def work(message, context):
        if context.node_config["partition-id"] == client_id:
            raise error
        return message.content["arrays"]

    return answering(work=work)


def test_a_client_app_that_raises_loses_its_task_if_the_faults_say_so():
    run, seen = asked_all(client=failing(1, ZeroDivisionError("none")), faults=faults.Faults(on_error="drop"))
    assert {client: code for client, (code, _) in seen.items()} == {0: None, 1: RAISED, 2: None, 3: None}
    assert run.events.outcome[1] == "failed"


@pytest.mark.parametrize("error", [ZeroDivisionError("no examples"), SystemExit("no examples")])
def test_a_client_app_that_raises_ends_the_run_even_if_the_server_app_catches_it(error):
    def main(grid):
        for _ in range(3):
            try:
                grid.send_and_receive(messages=[to(0), to(1)])
            except Exception:
                continue

    name = f"{type(error).__name__}: no examples"
    with pytest.raises(TaskError, match=rf"the client app raised {name} \(client 1, task 1, 'train'\)"):
        flower(main, failing(1, error))


@pytest.mark.parametrize("made", [None, "a message", to])
def test_a_client_app_must_return_a_reply(made):
    client = ClientApp()
    client.train()(lambda message, context: made(0) if callable(made) else made)
    with pytest.raises(TaskError, match=r"instead of a Message|no reply to the one"):
        flower(lambda grid: grid.send_and_receive(messages=[to(0)]), client)


def test_a_server_app_that_raises_ends_the_run_with_a_line():
    def main(grid):
        raise ValueError("rounds are odd\nand more")

    with pytest.raises(fedsim.SimulationError, match=r"^the server app raised ValueError: rounds are odd$"):
        flower(main)


def test_a_message_outlives_its_time_in_a_queue_or_at_work():
    seen = []

    def main(grid):
        for reply in grid.send_and_receive(messages=[to(0, ttl=9.0), to(0, ttl=5.0), to(0, ttl=100.0), to(1, ttl=2.0)]):
            code = reply.error.code if reply.has_error() else None
            seen.append((reply.metadata.reply_to_message_id, code, grid.sim.now))

    flower(main, system={"compute": Given(6.0, 6.0, 6.0, 6.0)})
    # All are handed over together, in the order in which they came: at 2, 6, 6 and 12 s.
    assert seen == [(f"message-{n}", code, 12.0) for n, code in ((4, EXPIRED), (1, None), (2, EXPIRED), (3, None))]


def test_threads_of_the_server_app_have_no_grid():
    seen = []

    def ask(grid):
        try:
            grid.get_node_ids()
        except RuntimeError as error:
            seen.append(str(error))

    def main(grid):
        thread = threading.Thread(target=ask, args=[grid])
        thread.start()
        thread.join()

    flower(main)
    assert seen == ["in virtual time the Grid serves the thread that the server app was called in, only"]


def test_a_server_app_of_the_past_is_refused():
    with pytest.raises(fedsim.ConfigError, match=r"its ServerApp must have a main"):
        flower(ServerApp(server_fn=lambda context: None))


def test_there_are_no_other_nodes_than_clients():
    with pytest.raises(fedsim.SimulationError, match="there is no node 1000000004"):
        flower(lambda grid: grid.push_messages([to(4)]))


# ---- what is kept, and what is shared ------------------------------------------------------------


def counting():
    """A ClientApp whose model is how often it has been asked."""

    def work(message, context):
        mine = context.state.metric_records.setdefault("mine", MetricRecord({"times": 0}))
        mine["times"] += 1
        return arrays(x=np.full(4, mine["times"]))

    return answering(work=work)


def test_a_node_keeps_its_state_and_a_lost_task_leaves_none():
    seen = []

    def main(grid):
        for _ in range(4):
            for reply in grid.send_and_receive(messages=[to(0)], timeout=None):
                seen.append(None if reply.has_error() else reply.content["arrays"]["x"].numpy()[0])
            time.sleep(1)

    leaving = Scripted((2.5, 0, False), (3.0, 0, True))
    flower(main, counting(), system={"availability": leaving, "faults": faults.Faults(on_offline="lose")})
    assert seen == [1, None, 2, 3]


def test_what_the_server_changes_after_a_push_does_not_reach_the_client():
    seen = []

    def work(message, context):
        seen.append((message.content["config"]["lr"], message.content["arrays"]["x"].numpy()[0]))
        return message.content["arrays"]

    def main(grid):
        content = RecordDict({"arrays": arrays(x=np.zeros(1)), "config": ConfigRecord({"lr": 0.5})})
        names = grid.push_messages([to(0, content)])
        content["config"]["lr"], content["arrays"]["x"] = 7.0, Array(np.ones(1))
        time.sleep(5)
        assert len(grid.pull_messages(names)) == 1

    flower(main, answering(work=work))
    assert seen == [(0.5, 0.0)]


def test_clients_that_change_what_they_got_do_not_change_it_for_others():
    seen = []

    def work(message, context):
        seen.append(message.content["config"]["lr"])
        message.content["config"]["lr"] = -1.0
        return message.content["arrays"]

    def main(grid):
        content = RecordDict({"arrays": arrays(x=np.zeros(1)), "config": ConfigRecord({"lr": 0.5})})
        grid.send_and_receive(messages=[to(client, content) for client in range(4)])

    flower(main, answering(work=work))
    assert seen == [0.5] * 4


def test_a_context_says_who_the_node_is_and_what_the_settings_are():
    seen = []

    def work(message, context):
        seen.append((context.node_id - FIRST_NODE, context.node_config, dict(context.run_config)))
        context.run_config["lr"] = 9
        return message.content["arrays"]

    flower(lambda grid: grid.send_and_receive(messages=[to(2), to(3)]), answering(work=work), run_config={"lr": 1})
    assert seen == [(n, {"partition-id": n, "num-partitions": 4}, {"lr": 1}) for n in (2, 3)]
