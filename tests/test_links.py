"""What travels between nodes: times, bytes and rows of single messages and of gossip steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import Scripted

import fedsim
from fedsim import SERVER
from fedsim.kernel import NS, to_ns
from fedsim.system import compute, network

# 0.008 Mbit/s down and 0.004 up are 1000 and 500 bytes a second.
SLOW = {"down": 0.008, "up": 0.004, "latency": 0.5}


class Bandwidths(network.Network):
    """Bytes per second as listed."""

    def __init__(self, down, up, latency=0.0):
        super().__init__(latency)
        self.listed = np.array(down, dtype=np.float64), np.array(up, dtype=np.float64)

    def prepare(self, clients, randomness):
        self.down_bytes_per_second, self.up_bytes_per_second = self.listed


def assert_ledger(run):
    """Link bytes count as up; events, links, summary and the last metrics agree."""
    up = int(run.events.up_bytes.sum()) + int(run.links.bytes.sum())
    assert up == run.summary["up_bytes"] == run.metrics.up_bytes.iloc[-1]
    assert int(run.events.down_bytes.sum()) == run.summary["down_bytes"] == run.metrics.down_bytes.iloc[-1]


# ---- one message ---------------------------------------------------------------------------------


class Postman(fedsim.Strategy):
    """Sends letters at 0 (or at ``at``) and writes down what arrives when."""

    def __init__(self, *letters, at=0.0, until=100.0):
        super().__init__()
        self.letters, self.at, self.until = letters, at, until
        self.got = []

    def start(self, fed):
        fed.timer(self.at, "send")
        fed.timer(self.until, "end")

    def on_timer(self, fed, timer):
        if timer.tag == "end":
            fed.stop("end")
            return
        for src, dst, tensors in self.letters:
            fed.send(src, dst, f"{src} to {dst}", **tensors)

    def on_message(self, fed, src, dst, payload, tag):
        self.got.append((fed.now, src, dst, tag, {name: each.tolist() for name, each in payload.items()}))


def post(strategy, net=None, presence=None, clients=4):
    system = fedsim.System(network=net or network.Constant(**SLOW), availability=presence)
    stop = fedsim.Stop(time_limit=1000.0)
    return fedsim.simulate(strategy, fedsim.Quadratic(dimension=3), system, stop=stop, clients=clients)


SIZES = {
    "float64": (torch.zeros(5, dtype=torch.float64), 40),
    "float32": (torch.zeros(4, 5), 80),
    "int8": (torch.zeros(500, dtype=torch.int8), 500),
    "a model": (torch.zeros(3, dtype=torch.float64), 24),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("src", "dst", "rate"), [(SERVER, 2, 1000), (1, SERVER, 500), (1, 2, 500)])
def test_a_message_arrives_after_latency_and_bytes_over_the_slower_end(src, dst, rate, size):
    tensor, nbytes = SIZES[size]
    strategy = Postman((src, dst, {"x": tensor}), at=2.0)
    run = post(strategy)
    arrives = (to_ns(2.5) + round(nbytes / rate * NS)) / NS
    assert [(at, one, other) for at, one, other, *_ in strategy.got] == [(arrives, src, dst)]
    assert run.links.to_dict("records") == [
        {"src": src, "dst": dst, "sent": 2.0, "arrived": arrives, "bytes": nbytes, "tag": f"{src} to {dst}"}
    ]
    assert_ledger(run)


def test_a_message_of_several_tensors_costs_their_sum():
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float64), "c": torch.tensor([True, False])}
    strategy = Postman((0, 1, tensors))
    run = post(strategy)
    assert run.links.bytes.tolist() == [12 + 32 + 2]
    assert strategy.got[0][4] == {"a": [0.0, 1.0, 2.0], "b": [[1.0, 1.0]] * 2, "c": [True, False]}


def test_between_peers_the_slower_of_up_and_down_decides():
    net = Bandwidths(down=[10.0, 40.0, 5.0], up=[20.0, 80.0, 30.0])
    x = torch.zeros(5, dtype=torch.float64)  # 40 bytes
    strategy = Postman((0, 1, {"x": x}), (1, 0, {"x": x}), (2, 1, {"x": x}), (1, 2, {"x": x}))
    post(strategy, net, clients=3)
    # 0 to 1: 20 up, 40 down; 1 to 0: 80 and 10; 2 to 1: 30 and 40; 1 to 2: 80 and 5.
    assert [(at, src, dst) for at, src, dst, *_ in strategy.got] == [
        (round(40 / 30 * NS) / NS, 2, 1),
        (2.0, 0, 1),
        (4.0, 1, 0),
        (8.0, 1, 2),
    ]


def test_messages_of_one_instant_come_by_receiver_then_sender():
    x = torch.zeros(1)
    strategy = Postman((2, 1, {"x": x}), (0, 1, {"x": x}), (3, 0, {"x": x}), (1, SERVER, {"x": x}))
    post(strategy)
    assert [(dst, src) for _, src, dst, *_ in strategy.got] == [(SERVER, 1), (0, 3), (1, 0), (1, 2)]


def test_without_a_network_a_message_takes_a_nanosecond():
    strategy = Postman((0, 1, {"x": torch.zeros(9)}))
    post(strategy, network.NoNetwork())
    assert [at for at, *_ in strategy.got] == [1e-9]


@pytest.mark.parametrize(("back", "delivered"), [(0.5, True), (0.58, False), (0.6, False)])
def test_a_message_to_a_node_that_is_offline_when_it_arrives_is_not_delivered(back, delivered):
    # 40 bytes at 500 a second and half a second of latency: there at 0.58; presence changes after messages.
    presence = Scripted((back, 1, True), absent=[1])
    strategy = Postman((0, 1, {"x": torch.zeros(5, dtype=torch.float64)}))
    run = post(strategy, presence=presence)
    assert len(strategy.got) == delivered
    assert run.links.arrived.notna().tolist() == [delivered]
    assert run.links.bytes.tolist() == [40]  # sent it was
    assert_ledger(run)


def test_the_server_is_always_there():
    strategy = Postman((0, SERVER, {"x": torch.zeros(1)}))
    post(strategy, presence=Scripted((0.1, 0, False)))
    assert len(strategy.got) == 1


def test_a_node_cannot_send_to_itself():
    with pytest.raises(ValueError, match="itself"):
        post(Postman((2, 2, {"x": torch.zeros(1)})))


def test_a_message_under_way_at_the_end_has_a_row_like_any_other():
    strategy = Postman((0, 1, {"x": torch.zeros(500, dtype=torch.float64)}), until=3.0)  # 8.5 s
    run = post(strategy)
    assert strategy.got == []
    assert run.links[["src", "dst", "sent"]].to_numpy().tolist() == [[0, 1, 0.0]]
    assert run.links.arrived.isna().all()
    assert_ledger(run)


# ---- gossip --------------------------------------------------------------------------------------


def ring(n, own=0.5):
    """The doubly stochastic matrix of a ring: ``own`` to oneself, the rest to both neighbours alike."""
    eye = torch.eye(n, dtype=torch.float64)
    return own * eye + (1 - own) / 2 * (eye.roll(1, 0) + eye.roll(-1, 0))


class Mixer(fedsim.Strategy):
    """Gossips ``steps`` times over a matrix and keeps every result."""

    def __init__(self, vectors, matrix, steps=1):
        super().__init__()
        self.vectors, self.matrix, self.steps = vectors, matrix, steps
        self.seen = []

    def start(self, fed):
        fed.timer(0.0)

    def on_timer(self, fed, timer):
        fed.exchange(self.vectors, self.matrix, "step 1")

    def on_exchange(self, fed, vectors, tag):
        self.seen.append((fed.now, tag, vectors.clone()))
        if len(self.seen) == self.steps:
            fed.stop("mixed")
        else:
            fed.exchange(vectors, self.matrix, f"step {len(self.seen) + 1}")


def mix(strategy, net=None, presence=None):
    n, d = strategy.vectors.shape
    system = fedsim.System(network=net, availability=presence)
    stop = fedsim.Stop(time_limit=1e6)
    return fedsim.simulate(strategy, fedsim.Quadratic(dimension=d), system, stop=stop, clients=n, cohort=n)


def random_vectors(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_exchange_is_the_matrix_times_the_vectors_and_keeps_the_mean():
    x, matrix = random_vectors(7, 5), ring(7, own=0.4)
    strategy = Mixer(x.clone(), matrix.clone(), steps=30)
    mix(strategy)
    expected = x.numpy()
    for _, _, mixed in strategy.seen:
        expected = np.stack([sum(matrix[i, j].item() * expected[j] for j in range(7)) for i in range(7)])
        assert np.abs(mixed.numpy() - expected).max() < 1e-12
        assert (mixed.mean(dim=0) - x.mean(dim=0)).abs().max() < 1e-12
    # The second eigenvalue of this ring is 0.4 + 0.6 cos(2 pi / 7): the spread shrinks at least as fast.
    rate = 0.4 + 0.6 * np.cos(2 * np.pi / 7)
    spread = (strategy.seen[-1][2] - x.mean(dim=0)).norm() / (x - x.mean(dim=0)).norm()
    assert spread <= rate**30 * (1 + 1e-9)


def test_a_row_stochastic_matrix_is_used_as_it_is_and_not_transposed():
    x = random_vectors(3, 2)
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64)
    strategy = Mixer(x, matrix)
    run = mix(strategy)
    assert torch.allclose(strategy.seen[0][2], matrix @ x, rtol=0, atol=1e-15)
    # Entry [i, j] is a message from j to i.
    assert sorted(zip(run.links.src, run.links.dst, strict=True)) == [(0, 2), (1, 0), (1, 2)]


def test_a_gossip_step_lasts_as_long_as_its_slowest_link_and_has_a_row_per_directed_edge():
    # 24 bytes each; ring 0-1-2-3. Rates of the slower end, bytes a second:
    down, up = [4.0, 8.0, 24.0, 12.0], [24.0, 6.0, 24.0, 3.0]
    strategy = Mixer(random_vectors(4, 3), ring(4), steps=2)
    run = mix(strategy, Bandwidths(down, up, latency=0.25))
    took = {(i, j): 0.25 + 24 / min(up[i], down[j]) for i in range(4) for j in ((i + 1) % 4, (i - 1) % 4)}
    slowest = max(took.values())
    assert slowest == 8.25  # from 3
    assert [(at, tag) for at, tag, _ in strategy.seen] == [(slowest, "step 1"), (2 * slowest, "step 2")]
    rows = run.links
    assert len(rows) == 16
    assert set(rows.bytes) == {24}
    for number, step in enumerate(("step 1", "step 2")):
        own = rows[rows.tag == step]
        assert set(own.sent) == {number * slowest}
        found = {(row.src, row.dst): row.arrived - row.sent for row in own.itertuples()}
        assert found == {edge: pytest.approx(took[edge], abs=2e-9) for edge in took}
    assert run.summary["up_bytes"] == 16 * 24
    assert_ledger(run)


def test_offline_nodes_keep_their_vector_and_the_mean_is_kept_too():
    x = random_vectors(6, 4)
    strategy = Mixer(x, ring(6), steps=1)
    run = mix(strategy, presence=Scripted((1e9, 0, False), absent=[2, 5]))
    mixed = strategy.seen[0][2]
    assert torch.equal(mixed[[2, 5]], x[[2, 5]])
    # 0-1 and 3-4 are left; the weight of a missing neighbour stays with oneself.
    for one, other in ((0, 1), (3, 4)):
        assert torch.allclose(mixed[one], 0.75 * x[one] + 0.25 * x[other], rtol=0, atol=1e-15)
        assert torch.allclose(mixed[other], 0.75 * x[other] + 0.25 * x[one], rtol=0, atol=1e-15)
    assert (mixed.mean(dim=0) - x.mean(dim=0)).abs().max() < 1e-12
    assert sorted(zip(run.links.src, run.links.dst, strict=True)) == [(0, 1), (1, 0), (3, 4), (4, 3)]


@pytest.mark.parametrize("absent", [[], [1], [0, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_rows_sum_to_one_whoever_is_away(absent):
    strategy = Mixer(torch.ones(6, 2, dtype=torch.float64), ring(6, own=0.3))
    mix(strategy, presence=Scripted((1e9, 0, False), absent=absent))
    assert torch.allclose(strategy.seen[0][2], torch.ones(6, 2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_node_that_leaves_during_a_step_is_mixed_with_what_was_sent():
    x = random_vectors(3, 2)
    strategy = Mixer(x, ring(3))
    mix(strategy, network.Constant(**SLOW), Scripted((0.1, 1, False)))
    assert torch.allclose(strategy.seen[0][2], ring(3) @ x, rtol=0, atol=1e-15)


def test_vectors_and_matrix_may_be_written_to_after_the_exchange_began():
    x, matrix = random_vectors(4, 2), ring(4)
    expected = matrix @ x

    class Careless(Mixer):
        def on_timer(self, fed, timer):
            super().on_timer(fed, timer)
            self.vectors.fill_(9.0)
            self.matrix.fill_(9.0)

    strategy = Careless(x, matrix)
    mix(strategy)
    assert torch.allclose(strategy.seen[0][2], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("wrong", ["vectors", "matrix"])
def test_wrong_shapes_are_refused(wrong):
    class Wrong(Mixer):
        def on_timer(self, fed, timer):
            vectors, matrix = self.vectors, self.matrix
            fed.exchange(vectors[:-1] if wrong == "vectors" else vectors, matrix[:-1] if wrong == "matrix" else matrix)

    with pytest.raises(ValueError, match=r"exchange needs vectors \[4, 2\] and a mixing matrix \[4, 4\]"):
        mix(Wrong(random_vectors(4, 2), ring(4)))


# ---- peers ---------------------------------------------------------------------------------------


class Peers(fedsim.Strategy):
    """Decentralised SGD: every node takes local steps from its own vector, then one gossip step mixes them."""

    def __init__(self, local, matrix):
        super().__init__(local)
        self.matrix = matrix
        self.replies = []

    def start(self, fed):
        self.nodes = fed.model.repeat(fed.clients, 1)
        fed.dispatch(range(fed.clients), start=self.nodes, local=True)

    def on_reply(self, fed, reply):
        self.replies.append(reply)

    def settle(self, fed):
        if len(self.replies) == fed.clients:
            for reply in self.replies:
                self.nodes[reply.client] += reply["delta"]
            fed.publish(self.nodes.mean(dim=0), used=self.replies)
            self.replies = []
            fed.exchange(self.nodes, self.matrix, fed.version)

    def on_exchange(self, fed, vectors, tag):
        self.nodes = vectors
        fed.dispatch(range(fed.clients), start=self.nodes, local=True)

    def views(self, fed):
        return {"global": fed.model, "first": self.nodes[0] if fed.version else fed.model}


def peers(lr, rounds, n=6, d=4):
    problem = fedsim.Quadratic(dimension=d, low=1.0, high=1.0)  # equal bowls: the optimum is the mean of the centres
    strategy = Peers(fedsim.LocalSGD(lr=lr, steps=1), ring(n))
    system = fedsim.System(compute.Constant(mean=2.0), network.Constant(**SLOW))
    run = fedsim.simulate(strategy, problem, system, stop=fedsim.Stop(rounds=rounds), clients=n, cohort=n)
    return run, strategy, problem


def test_peers_follow_decentralised_sgd_to_the_last_digit():
    run, strategy, problem = peers(lr=0.1, rounds=25)
    x, matrix = np.zeros((6, 4)), ring(6).numpy()
    for step in range(25):
        x = x - 0.1 * (x - problem.centres)
        if step < 24:
            x = matrix @ x
    assert np.abs(strategy.nodes.numpy() - x).max() < 1e-12
    # Equal curvatures and a doubly stochastic matrix: the mean goes to the optimum as (1 - lr)^t.
    gap = 0.9**25 * np.abs(problem.optimum)
    assert np.abs(np.abs(run.model["x"].numpy() - problem.optimum) - gap).max() < 1e-12
    assert np.allclose(run.metrics.distance, 0.9 ** (2 * np.arange(26)) * (problem.optimum**2).sum(), rtol=1e-9)


@pytest.mark.parametrize(("lr", "rounds"), [(0.2, 80), (0.05, 320)])
def test_peers_settle_as_close_to_consensus_as_the_rate_allows(lr, rounds):
    _, strategy, problem = peers(lr, rounds)
    # After the local step y = (1 - lr) W y + lr b, so y = lr (I - (1 - lr) W)^-1 b, reached as (1 - lr)^t.
    matrix = ring(6).numpy()
    fixed = lr * np.linalg.solve(np.eye(6) - (1 - lr) * matrix, problem.centres)
    assert np.abs(strategy.nodes.numpy() - fixed).max() < 3 * (1 - lr) ** rounds * np.abs(problem.centres).max()
    # What the nodes disagree in has eigenvalues of W of at most 0.5 + 0.5 cos(2 pi / 6) = 3 / 4.
    apart = np.linalg.norm(strategy.nodes.numpy() - problem.optimum)
    assert apart < lr / (1 - (1 - lr) * 0.75) * np.linalg.norm(problem.centres - problem.optimum)


def test_a_peers_round_lasts_its_work_and_its_exchange_and_only_the_exchange_moves_bytes():
    run, _, _ = peers(lr=0.1, rounds=5)
    exchange = 0.5 + 4 * 8 / 500
    assert run.metrics.time.tolist() == pytest.approx(
        [0.0, *(2.0 * k + exchange * (k - 1) for k in range(1, 6))], abs=1e-8
    )
    assert set(run.events.down_bytes) == set(run.events.up_bytes) == {0}
    assert (run.events.started == run.events.dispatched).all()
    arrived = run.links.arrived.notna()
    assert set(run.links.bytes[arrived]) == {32}
    assert set(run.links.bytes[~arrived]) == {0}  # the exchange that begins as the run ends
    assert len(run.links) == 5 * 12  # the last exchange has just been sent
    assert (run.links[run.links.tag == "5"].sent == run.summary["time"]).all()
    assert_ledger(run)


def test_what_has_not_arrived_when_the_run_ends_has_no_time_of_arrival():
    run, _, _ = peers(lr=0.1, rounds=2)
    assert run.links.arrived[run.links.tag == "2"].isna().all()
    assert run.links.arrived.max() <= run.summary["time"]


class Holder(fedsim.Strategy):
    """One task of each kind: as usual, with the start vector already there, and with nothing to travel."""

    def message(self, fed, task):
        return {"hint": torch.zeros(5, dtype=torch.float32)}

    def start(self, fed):
        fed.dispatch(0)
        fed.dispatch(1, held=True)
        fed.dispatch(2, local=True)
        fed.dispatch(3, held=True, local=True)

    def on_reply(self, fed, reply):
        fed.publish(fed.model, used=[reply])


def test_local_moves_nothing_and_held_only_the_message_down():
    run = fedsim.simulate(
        Holder(fedsim.LocalSGD(steps=1)),
        fedsim.Quadratic(dimension=10),
        fedsim.System(compute.Constant(mean=2.0), network.Constant(**SLOW)),
        stop=fedsim.Stop(updates=4),
        clients=4,
    )
    assert run.events.down_bytes.tolist() == [80 + 20, 20, 0, 0]
    assert run.events.up_bytes.tolist() == [80, 80, 0, 0]
    assert run.events.started.tolist() == pytest.approx([0.5 + 0.1, 0.5 + 0.02, 0.0, 0.0], abs=1e-9)
    upload = 0.5 + 80 / 500
    assert run.events.arrived.tolist() == pytest.approx([2.6 + upload, 2.52 + upload, 2.0, 2.0], abs=1e-9)
    assert_ledger(run)
