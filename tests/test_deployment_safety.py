from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from grids import carried, deployed, grid_of

from fedsim.flower import node
from fedsim.flower.devices import real_devices
from fedsim.flower.keeping import COMMITS, COMMITTED, Kept
from fedsim.flower.messages import INTRODUCE, WORK, Order, WireError, arrays, tensors, work_message
from fedsim.local import TensorSpec
from fedsim.rng import Randomness
from fedsim.simulation import engine


def changed(record, **values):
    """A copy of a reply's plain values with others."""
    return ConfigRecord({**record, **values})


def replaced(name, array):
    """What a reply's tensor is replaced by."""
    return lambda content: content["payload"].__setitem__(name, array(content["payload"][name].numpy()))


def npy(array):
    return Array.from_numpy_ndarray(np.asarray(array))


def lying_header(array):
    """The bytes of an array under a header that says there are a million times as many."""
    honest = npy(array)
    text = honest.data.replace(b"'shape': (20,), }      ", b"'shape': (10000000,), }")
    assert len(text) == len(honest.data)
    assert text != honest.data
    return Array(honest.dtype, honest.shape, honest.stype, text)


def pickled(array):
    """An array of objects, whose bytes are a pickle."""
    stream = io.BytesIO()
    np.save(stream, np.array([print] * len(array), dtype=object), allow_pickle=True)
    return Array("object", (len(array),), "numpy.ndarray", stream.getvalue())


def other(**values):
    return lambda content: content.__setitem__("report", changed(content["report"], **values))


ATTACKS = {
    "another shape": (replaced("delta", lambda x: npy(x[:-1])), r"'delta' is \(19,\) torch.float64, expected \(20,\)"),
    "another dtype": (replaced("delta", lambda x: npy(x.astype("f4"))), "expected .* torch.float64"),
    "two dimensions": (replaced("delta", lambda x: npy(x[None])), r"'delta' is \(1, 20\)"),
    "not finite": (replaced("delta", lambda x: npy(x * np.nan)), "'delta' has non-finite values"),
    "infinite": (replaced("delta", lambda x: npy(x + np.array([np.inf] + [0] * 19))), "'delta' has non-finite values"),
    "a lying header": (replaced("delta", lying_header), r"'delta' is \(10000000,\)"),
    "a pickle": (replaced("delta", pickled), "'delta' is of object, which cannot travel"),
    "no array": (replaced("delta", lambda x: Array("float64", (20,), "numpy.ndarray", b"nonsense")), "is no npy array"),
    "cut short": (
        replaced("delta", lambda x: Array("float64", (20,), "numpy.ndarray", npy(x).data[:-8])),
        "'delta' holds 152 bytes",
    ),
    "another library's": (
        replaced("delta", lambda x: Array("float64", (20,), "torch.tensor", npy(x).data)),
        "not a NumPy array",
    ),
    "another name": (
        lambda content: content.__setitem__("payload", ArrayRecord({"model": npy(np.zeros(20))})),
        r"holds \['model'\], expected \['delta'\]",
    ),
    "no payload": (lambda content: content.__delitem__("payload"), "it has no tensors 'payload'"),
    "no report": (lambda content: content.__delitem__("report"), "it has no plain values 'report'"),
    "another task": (other(task=99), "it is about task 99 of client 1"),
    "another client": (other(client=0), r"it is about task \d+ of client 0"),
    "more examples": (other(samples=10**9), "it claims 1000000000 examples"),
    "more steps": (other(steps=10**6), "it claims 1000000 local steps"),
    "negative time": (other(seconds=-1.0), "it claims to have taken -1.0 s"),
    "endless time": (other(seconds=1e300), "it claims to have taken 1e\\+300 s"),
    "time that is no number": (other(seconds=float("nan")), "'report.seconds' is 'nan', expected float"),
    "steps that are no number": (other(steps="1"), "'report.steps' is '1', expected int"),
    "an endless pause": (other(pause=1e300), "make no sense"),
    "another value": (other(extra=1), "'report' holds"),
}


def spoilt(asked):
    """Whether an answer is that of client 1 to a task."""
    return asked.metadata.message_type == WORK and asked.content["order"]["client"] == 1


def test_malicious_results_are_rejected_counted_and_shown_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOGGED_WARNINGS", 1000)
    attacks = list(ATTACKS.values())
    grid = grid_of(tmp_path, "rounds=null", "eval_every=0", f"updates={3 * len(attacks)}")

    def tamper(asked, reply):
        if spoilt(asked):
            attacks[asked.content["order"]["nth"]][0](reply.content)
        return reply

    grid.tamper = tamper
    run = deployed(grid)
    mine = run.events[run.events["client"] == 1]
    assert mine["outcome"].tolist()[: len(attacks)] == ["rejected"] * len(attacks)
    assert run.summary["outcomes"]["rejected"] == len(attacks)
    log = (tmp_path / "out" / "run.log").read_text().splitlines()
    lines = [line for line in log if "rejected the result of client 1" in line]
    for name, (_, said), line in zip(ATTACKS, attacks, lines, strict=True):
        assert re.search(said, line), (name, line)

    (tmp_path / "honest").mkdir()
    honest = grid_of(
        tmp_path / "honest", "rounds=null", "eval_every=0", f"updates={2 * len(attacks)}", wait_seconds=1.0
    )
    honest.remove(1001)
    without = deployed(honest)
    assert without.summary["version"] == run.summary["version"] == len(attacks)
    assert torch.equal(run.model["x"], without.model["x"])


def test_a_node_cannot_answer_for_another(tmp_path):
    grid = grid_of(tmp_path, "rounds=1")

    def tamper(asked, reply):
        if spoilt(asked):
            reply.metadata.__dict__["_src_node_id"] = 1000
        return reply

    grid.tamper = tamper
    run = deployed(grid)
    assert run.events["outcome"].tolist()[:3] == ["applied", "rejected", "applied"]
    assert "node 1000 has answered for node 1001" in (tmp_path / "out" / "run.log").read_text()


LIES = {
    "examples": ({"samples": 500}, "client 1 says it holds 500 examples, the partition gives it 13"),
    "no examples": ({"samples": -1}, "client 1 says it holds -1 examples"),
    "model": ({"parameters": 21}, "its model has 21 parameters, the server's 20"),
    "speed": ({"seconds_per_gradient": -1.0}, "it measured -1.0 s per gradient"),
    "no speed": ({"seconds_per_gradient": 1e300}, "it measured 1e+300 s per gradient"),
    "kind": ({"samples": 13.0}, "'introduction.samples' is '13.0', expected int"),
}


def test_what_is_expected_of_the_slowest_node_is_a_time():
    _, _, measured = real_devices(2, Randomness(0))
    measured.meet(0, 1e9)
    assert (measured.expected(np.array([0, 1]), 10**6) > 0).all()


@pytest.mark.parametrize("lie", LIES)
def test_a_node_cannot_gain_weight_by_what_it_says_of_itself(tmp_path, lie):
    values, said = LIES[lie]
    grid = grid_of(tmp_path, "rounds=1", wait_seconds=1.0)

    def tamper(asked, reply):
        if asked.metadata.message_type == INTRODUCE and asked.metadata.dst_node_id == 1001:
            reply.content["introduction"] = changed(reply.content["introduction"], **values)
        return reply

    grid.tamper = tamper
    run = deployed(grid)
    assert set(run.events["client"]) == {0, 2}
    assert f"node 1001 is not taken: {said}" in (tmp_path / "out" / "run.log").read_text()


def asked_of(grid, order, start, told=None):
    """What node 1000 says to a task."""
    message = work_message(1000, order, start, told or {}, 60.0)
    message.metadata.__dict__["_message_id"] = "1"
    held = grid.nodes[1000]
    return node.work(carried(message), Context(1, 1000, held.config, held.state, grid.run_config))


HONEST = Order(task=0, client=0, nth=0, job="train", lr=0.1, steps=2, accepted=(), undecided=())


@pytest.mark.parametrize(
    ("order", "start", "told", "said"),
    [
        ({"client": 1}, None, {}, "the task is for client 1, this node is client 0"),
        ({"job": "dig"}, None, {}, r"there is no job 'dig', this node's are \['train'\]"),
        ({"steps": 10**12}, None, {}, "steps 1000000000000 and rate 0.1 make no sense"),
        ({"steps": -1}, None, {}, "make no sense"),
        ({"nth": -1}, None, {}, "make no sense"),
        ({"lr": -1.0}, None, {}, "make no sense"),
        ({"lr": float("inf")}, None, {}, "'order.lr' is 'inf', expected float"),
        ({}, torch.zeros(19, dtype=torch.float64), {}, r"'start' is \(19,\)"),
        ({}, torch.zeros(20), {}, "'start' is .* torch.float32, expected"),
        ({}, torch.full((20,), torch.nan, dtype=torch.float64), {}, "'start' has non-finite values"),
        ({}, None, {"c": torch.tensor([torch.inf])}, "'c' has non-finite values"),
    ],
)
def test_a_node_refuses_a_task_that_makes_no_sense(tmp_path, order, start, told, said):
    grid = grid_of(tmp_path)
    start = torch.zeros(20, dtype=torch.float64) if start is None else start
    asked = Order(**{**HONEST.__dict__, **order})
    reply = asked_of(grid, asked, start, told)
    assert reply.has_error()
    assert re.search(said, reply.error.reason), reply.error.reason
    assert not grid.nodes[1000].state
    honest = asked_of(grid, HONEST, torch.zeros(20, dtype=torch.float64))
    assert honest.content["report"]["steps"] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)])
def test_tensors_arrive_as_they_were_sent(dtype, shape):
    sent = (torch.arange(24)[: int(np.prod(shape))].reshape(shape) * 3).to(dtype)
    content = RecordDict({"payload": arrays({"x": sent})})
    got = tensors(content, "payload", {"x": TensorSpec(shape, dtype)})["x"]
    assert got.dtype == dtype
    assert got.shape == shape
    assert torch.equal(got, sent)


def test_a_fortran_array_arrives_in_the_order_of_its_items():
    content = RecordDict({"payload": ArrayRecord({"x": npy(np.asfortranarray(np.arange(6.0).reshape(2, 3)))})})
    assert torch.equal(tensors(content, "payload")["x"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


def test_what_cannot_travel_is_said():
    with pytest.raises(WireError, match="tensors of bfloat16 cannot travel"):
        arrays({"x": torch.zeros(2, dtype=torch.bfloat16)})


def kept_state(grid, client):
    records = grid.nodes[1000 + client].state
    return tensors(records, COMMITTED) if COMMITTED in records else {}


def test_a_node_commits_what_was_accepted_in_that_order_and_drops_what_was_not():
    records = RecordDict()
    kept = Kept(records)
    for task in range(5):
        kept.put(task, {"control": torch.tensor([float(task)]), f"own{task}": torch.tensor([1.0])})
    kept.decide(accepted=(3, 1), undecided=(4,))
    assert kept.committed()["control"].item() == 1.0
    assert set(kept.committed()) == {"control", "own3", "own1"}
    kept.decide(accepted=(3, 1, 4), undecided=())  # told again, for it did not answer
    assert kept.committed()["control"].item() == 4.0
    kept.decide(accepted=(0, 2), undecided=())
    assert kept.committed()["control"].item() == 4.0
    assert kept.commits() == 3
    assert set(records) == {COMMITTED, COMMITS}


def test_a_node_that_has_lost_what_it_kept_is_shown_once(tmp_path):
    grid = grid_of(tmp_path, "strategy=scaffold", "rounds=5", "local.steps=4", speeds=(0.1, 0.1, 0.1))
    grid.clock.later(1.5, lambda: setattr(grid.nodes[1000], "state", RecordDict()))
    deployed(grid)
    log = (tmp_path / "out" / "run.log").read_text()
    assert log.count("has lost what it kept") == log.count("client 0 has lost what it kept between tasks") == 1


@pytest.mark.parametrize("away", [False, True], ids=["always there", "away for a while"])
def test_control_variates_at_the_nodes_sum_to_the_servers(tmp_path, away):
    # Late results are refused and one answer is malicious: neither may show in a node's control variate.
    grid = grid_of(
        tmp_path, "strategy=scaffold", "cohort=2", "rounds=9", "strategy.over_selection=1.5",
        "strategy.stragglers=late", "local.steps=4", speeds=(0.1, 0.15, 0.17),
    )  # fmt: skip
    seen = []

    def tamper(asked, reply):
        if spoilt(asked) and asked.content["order"]["nth"] == 3:
            reply.content["report"] = changed(reply.content["report"], samples=10**6)
        return reply

    def look(deployment):
        seen[:] = [deployment]

    grid.tamper = tamper
    if away:
        node = grid.nodes[1000]
        grid.clock.later(2.05, lambda: grid.remove(1000))
        grid.clock.later(2.9, lambda: grid.nodes.__setitem__(1000, node))
    run = deployed(grid, observer=look)
    assert "another node than before" not in (tmp_path / "out" / "run.log").read_text()
    assert ("interrupted" in set(run.events["outcome"])) == away
    assert {"late", "rejected", "applied"} <= set(run.events["outcome"])
    total = torch.zeros(20, dtype=torch.float64)
    for client in range(3):
        kept = Kept(grid.nodes[1000 + client].state)
        member = seen[0].pool.members[client]
        kept.decide(member.accepted, member.undecided)
        total += kept.committed().get("control", torch.zeros(20))
    assert total.abs().max() > 0
    torch.testing.assert_close(total / 3, seen[0].strategy.control, rtol=0, atol=1e-12)
