"""Peers: graphs, mixing matrices, gossip, and the methods against loops written once more without a simulator."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import Given, Scripted

import fedsim
from fedsim.checks import ConfigError
from fedsim.cli import main
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.strategies.dfedavg import DFedAvg
from fedsim.strategies.dfedavgm import DFedAvgM
from fedsim.strategies.dpsgd import DPSGD
from fedsim.strategies.fedavg import FedAvg
from fedsim.system.compute import Constant as ConstantCompute
from fedsim.system.network import Constant, Lognormal
from fedsim.topology import Exponential, Full, Grid, Random, Ring, Topology, metropolis, second_eigenvalue

DRAW = Randomness(0)("graph")
GRAPHS: list[Topology] = [Ring(), Grid(), Exponential(), Full(), Random(4), Random(3), Random(2)]
NAMES = [f"{type(graph).__name__}{getattr(graph, 'degree', '')}" for graph in GRAPHS]


def neighbours(graph: Topology, nodes: int) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in graph.adjacency(nodes, DRAW)]


# ---- graphs and matrices -----------------------------------------------------------------------------


def test_who_is_a_neighbour_of_whom() -> None:
    assert neighbours(Ring(), 5) == [{1, 4}, {0, 2}, {1, 3}, {2, 4}, {0, 3}]
    # 0 1 2 3
    # 4 5 6 7
    # 8 9
    grid = [{1, 4}, {0, 2, 5}, {1, 3, 6}, {2, 7}, {0, 5, 8}, {1, 4, 6, 9}, {2, 5, 7}, {3, 6}, {4, 9}, {5, 8}]
    assert neighbours(Grid(), 10) == grid
    assert neighbours(Exponential(), 16)[0] == {1, 2, 4, 8, 12, 14, 15}
    assert neighbours(Exponential(), 9)[3] == {4, 5, 7, 2, 1, 8}  # + 8 is - 1
    assert neighbours(Full(), 4)[2] == {0, 1, 3}
    for graph in GRAPHS:
        assert neighbours(graph, 1) == [set()]
        assert neighbours(graph, 2) == [{1}, {0}]


def test_random_graphs_are_connected_have_their_degree_and_are_new_at_every_step() -> None:
    for degree in (1, 2, 3, 4, 7):
        steps = [Random(degree).adjacency(50, Randomness(1)("graph", step)) for step in range(20)]
        counts = np.array([graph.sum(axis=1) for graph in steps])
        assert counts.max() <= degree
        assert counts.mean() > 0.9 * degree  # two cycles share an edge now and then
        assert len({graph.tobytes() for graph in steps}) == 20
        if degree > 1:
            walks = [np.linalg.matrix_power(graph + np.eye(50), 50) for graph in steps]
            assert all((each > 0).all() for each in walks)
    assert (Random(1).adjacency(50, DRAW).sum(axis=1) == 1).all()
    odd = Random(1).adjacency(51, DRAW).sum(axis=1)
    assert sorted(odd.tolist()) == [0] + [1] * 50


@pytest.mark.parametrize("graph", GRAPHS, ids=NAMES)
@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 16, 30])
def test_mixing_matrices_are_symmetric_doubly_stochastic_and_positive_on_edges_only(
    graph: Topology, nodes: int
) -> None:
    weights = graph.mixing_matrix(nodes, DRAW).numpy()
    edges = graph.adjacency(nodes, DRAW)
    assert (weights == weights.T).all()
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-15)
    assert (np.diag(weights) > 0).all()
    assert ((weights > 0) == edges | np.eye(nodes, dtype=bool)).all()
    degree = edges.sum(axis=1)
    for i, j in zip(*np.nonzero(edges), strict=True):
        assert weights[i, j] == 1 / (1 + max(degree[i], degree[j]))


def test_second_eigenvalues_in_closed_form() -> None:
    for nodes in (3, 8, 25):
        wave = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(1, nodes) / nodes)
        assert second_eigenvalue(Ring().mixing_matrix(nodes, DRAW)) == pytest.approx(np.abs(wave).max(), abs=1e-12)
    assert second_eigenvalue(Full().mixing_matrix(9, DRAW)) == pytest.approx(0, abs=1e-12)
    k = np.arange(1, 16)  # neighbours of 16 nodes at 1, 2, 4 to both sides, and at 8
    wave = sum(2 * np.cos(2 * np.pi * k * distance / 16) for distance in (1, 2, 4)) + np.cos(np.pi * k)
    assert second_eigenvalue(Exponential().mixing_matrix(16, DRAW)) == pytest.approx(np.abs((1 + wave) / 8).max())
    path = metropolis(np.array([[False, True, False], [True, False, True], [False, True, False]]))
    # rows (2 1 0), (1 1 1), (0 1 2) over 3: eigenvalues 1, 2/3, 0
    assert second_eigenvalue(path) == pytest.approx(2 / 3)
    assert second_eigenvalue(torch.ones(1, 1)) == 0


# ---- gossip ------------------------------------------------------------------------------------------


class Scattered(DFedAvg):
    """Nodes that do not learn, only mix what they are given; every round's models are kept."""

    def __init__(self, models: torch.Tensor, topology: Topology) -> None:
        super().__init__(fedsim.LocalSGD(lr=0.0, steps=1), topology)
        self.given = models
        self.history = [models]

    def start(self, fed: fedsim.Federation) -> None:
        self.models = self.given

    def complete(self, fed: fedsim.Federation, models: torch.Tensor) -> None:
        super().complete(fed, models)
        self.history.append(models)


def simulate(strategy: fedsim.Strategy, nodes: int, rounds: int, **more: Any) -> fedsim.Run:
    compute = more.pop("compute", ConstantCompute(mean=1.0))
    system = fedsim.System(compute, more.pop("network", None), more.pop("availability", None))
    problem = more.pop("problem", None) or fedsim.Quadratic(5)
    return fedsim.simulate(strategy, problem, system, stop=fedsim.Stop(rounds=rounds), clients=nodes, **more)


@pytest.mark.parametrize("graph", GRAPHS, ids=NAMES)
def test_gossip_keeps_the_mean_and_contracts_at_the_second_eigenvalue(graph: Topology) -> None:
    nodes, rounds = 20, 12
    weights = [graph.mixing_matrix(nodes, Randomness(0)("strategy: topology", step)) for step in range(rounds)]
    # The slowest direction of the first matrix: it shrinks by exactly the second eigenvalue in the first step.
    values, vectors = torch.linalg.eigh(weights[0])
    slowest = vectors[:, int(values[:-1].abs().argmax())]
    models = 3.0 + slowest[:, None] * torch.arange(1.0, 6.0, dtype=torch.float64)
    strategy = Scattered(models, graph)
    simulate(strategy, nodes, rounds, eval_every=0)
    assert len(strategy.history) == rounds + 1
    apart = [float((each - each.mean(dim=0)).norm()) for each in strategy.history]
    assert apart[1] / apart[0] == pytest.approx(second_eigenvalue(weights[0]), abs=1e-12)
    for step, (before, after) in enumerate(pairwise(apart)):
        assert after <= second_eigenvalue(weights[step]) * before + 1e-12
    expected = models
    for matrix, found in zip(weights, strategy.history[1:], strict=True):
        expected = matrix @ expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.mean(dim=0), models.mean(dim=0), rtol=0, atol=1e-12)


def test_the_mean_is_kept_while_nodes_come_and_go() -> None:
    models = torch.from_numpy(Randomness(3)("models").normal((8, 5)))
    strategy = Scattered(models, Grid())
    presence = Scripted((1.5, 2, False), (2.5, 7, False), (4.5, 2, True), absent=(0,))
    simulate(strategy, 8, 8, availability=presence)
    for found in strategy.history:
        torch.testing.assert_close(found.mean(dim=0), models.mean(dim=0), rtol=0, atol=1e-12)
        assert torch.equal(found[0], models[0])  # never there
    assert not torch.equal(strategy.history[1][2], models[2])
    assert torch.equal(strategy.history[3][2], strategy.history[2][2])  # away from 1.5 s to 4.5 s


# ---- the methods, once more --------------------------------------------------------------------------


class Bowls:
    """The same quadratics in numpy."""

    def __init__(self, nodes: int) -> None:
        problem = fedsim.Quadratic(5)
        problem.prepare(nodes, Randomness(0))
        self.a, self.b, self.zero = problem.curvature, problem.centres, np.zeros((nodes, 5))

    def slope(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every node's gradient at its own row."""
        return self.a * (x - self.b)


def matrix(graph: Topology, nodes: int, step: int) -> NDArray[np.float64]:
    return graph.mixing_matrix(nodes, Randomness(0)("strategy: topology", step)).numpy()


@pytest.mark.parametrize("graph", GRAPHS, ids=NAMES)
def test_the_three_methods_equal_plain_loops(graph: Topology) -> None:
    nodes, rounds, eta, theta = 9, 7, 0.2, 0.8
    bowls = Bowls(nodes)
    dpsgd, dfedavg, dfedavgm = bowls.zero, bowls.zero, bowls.zero
    for t in range(rounds):
        w = matrix(graph, nodes, t)
        dpsgd = w @ dpsgd - eta * bowls.slope(dpsgd)
        y = dfedavg
        for _ in range(4):
            y = y - eta * bowls.slope(y)
        dfedavg = w @ y
        y, last = dfedavgm, dfedavgm
        for _ in range(4):
            y, last = y - eta * bowls.slope(y) + theta * (y - last), y
        dfedavgm = w @ y
    four = fedsim.LocalSGD(lr=eta, steps=4)
    for strategy, expected in (
        (DPSGD(fedsim.LocalSGD(lr=eta), graph), dpsgd),
        (DFedAvg(four, graph), dfedavg),
        (DFedAvgM(four, graph, momentum=theta), dfedavgm),
    ):
        run = simulate(strategy, nodes, rounds, compute=Given(*range(1, 10)))
        np.testing.assert_allclose(strategy.models, expected, atol=1e-12)
        np.testing.assert_allclose(run.model["x"], expected.mean(axis=0), atol=1e-12)
        assert run.summary["version"] == run.summary["round"] == rounds
        assert run.summary["updates"] == rounds * nodes


def test_on_the_full_graph_dfedavg_is_fedavg() -> None:
    rule = fedsim.LocalSGD(lr=0.2, steps=3, momentum=0.5)
    peers = simulate(DFedAvg(rule, Full()), 12, 15)
    server = simulate(FedAvg(rule, "uniform"), 12, 15, cohort=12)
    torch.testing.assert_close(peers.model["x"], server.model["x"], rtol=1e-12, atol=1e-12)


def test_without_momentum_dfedavgm_is_dfedavg_to_the_bit() -> None:
    rule = fedsim.LocalSGD(lr=0.2, steps=3)
    one, other = (simulate(method, 10, 10) for method in (DFedAvg(rule), DFedAvgM(rule, momentum=0.0)))
    assert torch.equal(one.model["x"], other.model["x"])


def test_dpsgd_comes_to_its_fixed_point_which_nears_the_optimum_as_its_rate_falls() -> None:
    nodes, eta = 5, 0.1
    bowls, strategy = Bowls(nodes), DPSGD(fedsim.LocalSGD(lr=eta), Ring())
    run = simulate(strategy, nodes, 400, eval_every=100)
    # Its fixed point: (I - W) x + eta grad(x) = 0, one linear system per coordinate.
    w = matrix(Ring(), nodes, 0)
    for j in range(5):
        fixed = np.linalg.solve(np.eye(nodes) - w + eta * np.diag(bowls.a[:, j]), eta * bowls.a[:, j] * bowls.b[:, j])
        np.testing.assert_allclose(strategy.models[:, j], fixed, atol=1e-6)
    finer = simulate(DPSGD(fedsim.LocalSGD(lr=eta / 4), Ring()), nodes, 800, eval_every=400)
    assert finer.metrics.distance.iloc[-1] < 0.1 * run.metrics.distance.iloc[-1]


# ---- time and bytes ----------------------------------------------------------------------------------


def test_every_directed_edge_carries_one_model_per_round_and_nothing_else_travels() -> None:
    for graph, degree in ((Ring(), 2), (Full(), 9), (Exponential(), 6), (Grid(), 2.6)):
        for method in (DPSGD, DFedAvg, DFedAvgM):
            run = simulate(method(fedsim.LocalSGD(lr=0.1), graph), 10, 3)
            assert run.summary["up_bytes"] == 3 * 10 * degree * 5 * 8
            assert run.summary["down_bytes"] == 0
            links = run.links[run.links.arrived.notna()]  # D-PSGD's next step has just begun when the run ends
            assert (links.bytes == 40).all()
            assert len(links) == 3 * 10 * degree
            assert (run.events[["up_bytes", "down_bytes"]] == 0).all(axis=None)


def test_a_round_of_dfedavg_is_the_slowest_node_and_then_the_slowest_link() -> None:
    # 40 bytes at 0.32 kbit/s up take a second, plus a quarter of latency.
    network = Constant(down=1.0, up=0.00032, latency=0.25)
    compute = Given(0.5, 2.0, 1.0)
    run = simulate(DFedAvg(fedsim.LocalSGD(steps=1)), 3, 4, compute=compute, network=network)
    assert run.metrics.time.tolist() == [0.0, 3.25, 6.5, 9.75, 13.0]
    assert sorted(run.links.sent.unique()) == [2.0, 5.25, 8.5, 11.75]
    together = simulate(DPSGD(topology=Ring()), 3, 4, compute=compute, network=network)
    assert together.metrics.time.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]  # links are faster than the slowest node
    slow = Constant(down=1.0, up=0.00008, latency=0.25)
    together = simulate(DPSGD(topology=Ring()), 3, 4, compute=compute, network=slow)
    assert together.metrics.time.tolist() == [0.0, 4.25, 8.5, 12.75, 17.0]


def test_a_link_runs_at_the_slower_of_its_ends() -> None:
    network = Lognormal(down=0.001, up=0.001)
    run = simulate(DFedAvg(fedsim.LocalSGD(lr=0.1), Full()), 6, 1, network=network)
    network.prepare(6, Randomness(0))
    for edge in run.links.itertuples():
        pace = min(network.up_bytes_per_second[edge.src], network.down_bytes_per_second[edge.dst])
        assert edge.arrived - edge.sent == pytest.approx(0.05 + 40 / pace, abs=2e-9)


# ---- presence, losses, mistakes ----------------------------------------------------------------------


def test_a_node_whose_work_is_lost_mixes_what_it_has() -> None:
    class Unlucky(fedsim.system.Faults):
        def draw(self, clients: Any, nth: Any) -> Any:
            stage, fraction = super().draw(clients, nth)
            stage[clients == 2] = fedsim.system.Stage.DURING
            return stage, fraction

    for method in (DFedAvg, DPSGD):
        strategy = method(fedsim.LocalSGD(lr=0.2, steps=1), Ring())
        system = fedsim.System(ConstantCompute(mean=1.0), faults=Unlucky())
        fedsim.simulate(strategy, fedsim.Quadratic(5), system, stop=fedsim.Stop(rounds=5), clients=6)
        bowls = Bowls(6)
        x, there = bowls.zero, (np.arange(6) != 2)[:, None]
        for t in range(5):
            step = 0.2 * bowls.slope(x) * there
            w = matrix(Ring(), 6, t)
            x = w @ x - step if method is DPSGD else w @ (x - step)
        np.testing.assert_allclose(strategy.models, x, atol=1e-12)


def test_peers_wait_while_nobody_is_there() -> None:
    presence = Scripted((5.0, 0, True), (5.0, 1, True), absent=(0, 1))
    run = simulate(DPSGD(topology=Ring()), 2, 2, availability=presence)
    assert run.metrics.time.tolist() == [0.0, 6.0, 7.0]


def test_the_cohort_of_peers_is_everybody(tmp_path: Any) -> None:
    seen: list[int] = []
    fedsim.simulate(
        DFedAvg(fedsim.LocalSGD(lr=0.1)),
        fedsim.Quadratic(5),
        stop=fedsim.Stop(rounds=2),
        clients=7,
        cohort=3,
        observer=lambda sim: seen.append(sim.cohort) if isinstance(sim, Simulation) else None,
    )
    assert set(seen) == {7}


def test_settings_that_contradict_the_method_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"local\.steps=3: D-PSGD makes one local step per round"):
        DPSGD(fedsim.LocalSGD(steps=3))
    with pytest.raises(ConfigError, match=r"momentum=0\.9: local\.momentum=0\.5 sets the same"):
        DFedAvgM(fedsim.LocalSGD(momentum=0.5))
    with pytest.raises(ConfigError, match="degree=0: must be a whole number >= 1"):
        Random(0)


def test_mistakes_on_the_command_line_name_the_key(capsys: Any) -> None:
    for arguments, line in (
        ("strategy=dpsgd local.steps=3", "fedsim: local.steps=3: D-PSGD makes one local step per round; leave it out"),
        (
            "strategy=dfedavg topology=random topology.degree=2000000000 clients=10",
            "fedsim: topology.degree=2000000000: must be below clients=10, or take topology=full",
        ),
    ):
        assert main(["run", *arguments.split()]) == 2
        assert capsys.readouterr().err.strip() == line
