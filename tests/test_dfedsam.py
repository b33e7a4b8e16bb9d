"""DFedSAM and its several gossip steps: against loops by hand, W^Q, DFedAvg, and the ledger of what travels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support import Given, Scripted
from test_peers import DRAW, GRAPHS, NAMES, Bowls, matrix, simulate

import fedsim
from fedsim import SAM, ConfigError, LocalSGD
from fedsim.rng import Randomness
from fedsim.strategies.dfedavg import DFedAvg
from fedsim.strategies.dfedsam import DFedSAM
from fedsim.strategies.dfedsam_mgs import DFedSAMMGS
from fedsim.strategies.fedavg import FedAvg
from fedsim.system.network import Constant
from fedsim.topology import Exponential, Full, Grid, Ring, Topology, second_eigenvalue


@pytest.mark.parametrize("graph", GRAPHS, ids=NAMES)
@pytest.mark.parametrize("gossip", [1, 3])
def test_both_equal_a_plain_loop_whose_mixing_is_w_to_the_q(graph: Topology, gossip: int) -> None:
    nodes, rounds, eta, rho = 9, 6, 0.2, 0.4
    bowls = Bowls(nodes)
    x = bowls.zero
    for t in range(rounds):
        for _ in range(4):
            slope = bowls.slope(x)
            x = x - eta * bowls.slope(x + rho * slope / np.linalg.norm(slope, axis=1, keepdims=True))
        x = np.linalg.matrix_power(matrix(graph, nodes, t), gossip) @ x
    four = LocalSGD(lr=eta, steps=4)
    methods: list[Any] = [DFedSAMMGS(four, graph, rho, gossip)]
    if gossip == 1:
        methods.append(DFedSAM(four, graph, rho))
    for strategy in methods:
        run = simulate(strategy, nodes, rounds, compute=Given(*range(1, 10)))
        np.testing.assert_allclose(strategy.models, x, atol=1e-12)
        np.testing.assert_allclose(run.model["x"], x.mean(axis=0), atol=1e-12)
        assert run.summary["version"] == run.summary["round"] == rounds


def test_without_ascent_and_with_one_gossip_step_both_are_dfedavg_to_the_bit() -> None:
    network = Constant(down=1.0, up=0.001, latency=0.1)
    for topology in (Ring(), Full()):
        rule = LocalSGD(lr=0.2, steps=3, momentum=0.5)
        runs = [
            simulate(method, 10, 8, network=network)
            for method in (DFedAvg(rule, topology), DFedSAM(rule, topology, 0.0), DFedSAMMGS(rule, topology, 0.0, 1))
        ]
        for run in runs[1:]:
            assert torch.equal(run.model["x"], runs[0].model["x"])
            assert run.manifest["events_sha256"] == runs[0].manifest["events_sha256"]
            assert run.links.equals(runs[0].links)


def test_on_the_full_graph_dfedsam_is_fedavg_of_sharpness_aware_clients() -> None:
    peers = simulate(DFedSAM(LocalSGD(lr=0.2, steps=3), Full(), 0.3), 12, 15)
    server = simulate(FedAvg(SAM(lr=0.2, steps=3, rho=0.3), "uniform"), 12, 15, cohort=12)
    torch.testing.assert_close(peers.model["x"], server.model["x"], rtol=1e-12, atol=1e-12)
    assert peers.metrics.time.iloc[-1] == pytest.approx(server.metrics.time.iloc[-1], abs=1e-6)


class Still(DFedSAMMGS):
    """Nodes that do not learn, only mix what they are given."""

    def __init__(self, models: torch.Tensor, topology: Topology, gossip: int) -> None:
        super().__init__(LocalSGD(lr=0.0, steps=1), topology, gossip=gossip)
        self.given = models
        self.history: list[torch.Tensor] = []

    def start(self, fed: fedsim.Federation) -> None:
        self.models = self.given

    def complete(self, fed: fedsim.Federation, models: torch.Tensor) -> None:
        super().complete(fed, models)
        self.history.append(models)


@pytest.mark.parametrize("gossip", [1, 2, 4])
def test_a_round_contracts_by_the_second_eigenvalue_to_the_q(gossip: int) -> None:
    weights = Ring().mixing_matrix(12, DRAW)
    values, vectors = torch.linalg.eigh(weights)
    slowest = vectors[:, int(values[:-1].abs().argmax())]
    strategy = Still(2.0 + slowest[:, None] * torch.arange(1.0, 6.0, dtype=torch.float64), Ring(), gossip)
    simulate(strategy, 12, 3, eval_every=0)
    apart = [float((each - each.mean(dim=0)).norm()) for each in (strategy.given, *strategy.history)]
    for before, after in pairwise(apart):
        assert after / before == pytest.approx(second_eigenvalue(weights) ** gossip, rel=1e-10)


def test_the_mean_is_kept_when_a_node_leaves_between_two_gossip_steps() -> None:
    models = torch.from_numpy(Randomness(3)("models").normal((8, 5)))
    network = Constant(down=1e3, up=1e3, latency=1.0)
    strategy = Still(models, Grid(), 3)
    # Training takes 2 s (two gradients), every gossip step one: node 2 leaves in the second of the second round.
    simulate(strategy, 8, 3, availability=Scripted((8.5, 2, False)), network=network)
    for found in strategy.history:
        torch.testing.assert_close(found.mean(dim=0), models.mean(dim=0), rtol=0, atol=1e-12)
    first, then = strategy.history[0], strategy.history[1]
    weights = Grid().mixing_matrix(8, DRAW)
    torch.testing.assert_close((weights @ weights @ first)[2], then[2])
    assert torch.equal(strategy.history[2][2], then[2])


# ---- time and bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("graph", "degree"), [(Ring(), 2), (Full(), 9), (Exponential(), 6), (Grid(), 2.6)])
@pytest.mark.parametrize("gossip", [1, 4])
def test_every_directed_edge_carries_q_models_per_round(graph: Topology, degree: float, gossip: int) -> None:
    run = simulate(DFedSAMMGS(LocalSGD(lr=0.1), graph, gossip=gossip), 10, 3)
    assert run.summary["up_bytes"] == 3 * gossip * 10 * degree * 5 * 8
    assert run.summary["down_bytes"] == 0
    assert (run.events[["up_bytes", "down_bytes"]] == 0).all(axis=None)
    edges = run.links.groupby(["src", "dst"])
    assert len(edges) == 10 * degree
    assert (edges.bytes.sum() == 3 * gossip * 40).all()
    assert (edges.sent.nunique() == 3 * gossip).all()  # one after the other


def test_a_round_is_two_gradients_per_step_of_the_slowest_node_and_then_q_links() -> None:
    # 40 bytes at 0.32 kbit/s up take a second, plus a quarter of latency: 1.25 s for every gossip step.
    network = Constant(down=1.0, up=0.00032, latency=0.25)
    run = simulate(DFedSAMMGS(LocalSGD(steps=1), gossip=3), 3, 2, compute=Given(0.5, 2.0, 1.0), network=network)
    assert run.metrics.time.tolist() == [0.0, 4 + 3.75, 2 * (4 + 3.75)]
    assert sorted(run.links.sent.unique()) == [4.0, 5.25, 6.5, 11.75, 13.0, 14.25]


# ---- mistakes ----------------------------------------------------------------------------------------


def test_settings_that_contradict_the_method_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^rho=0\.01: local\.rho=0\.05 sets the same"):
        DFedSAM(SAM())
    with pytest.raises(ConfigError, match=r"^gossip=0: must be a whole number from 1 to 1000000"):
        DFedSAMMGS(gossip=0)
    with pytest.raises(ConfigError, match=r"^rho=-1: must be a number >= 0"):
        DFedSAMMGS(rho=-1)
