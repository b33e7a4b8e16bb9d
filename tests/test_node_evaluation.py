"""Many models at once: stacks of models, nodes' own models, and what a diverged one does to the means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from examined import by_hand, prepared, problem
from support import simulate

import fedsim
from fedsim.data import Dirichlet
from fedsim.strategies.dfedavg import DFedAvg
from fedsim.strategies.dpsgd import DPSGD
from fedsim.strategies.fedavg import FedAvg


class Nodes(FedAvg):
    """Shows a stack of models beside the global one."""

    def __init__(self, name, nodes):
        super().__init__(fedsim.LocalSGD(lr=0.1))
        self.name, self.nodes = name, nodes

    def views(self, fed):
        return {"global": fed.model, self.name: self.nodes}


@pytest.mark.parametrize(("name", "label"), [("nodes", "consensus"), ("edges", "edges_consensus")])
def test_a_stack_of_models_is_evaluated_row_by_row(name, label):
    nodes = torch.from_numpy(np.random.default_rng(1).normal(size=(13, 35))).float()
    made = problem()
    run = simulate(Nodes(name, nodes), fedsim.Stop(rounds=1), made, clients=8, cohort=2)
    rows = pd.DataFrame([made.evaluate(each) for each in nodes])
    last = run.metrics.iloc[-1]
    for metric in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert last[f"{name}_{metric}"] == pytest.approx(rows[metric].mean(), rel=1e-12)
    for metric in ("accuracy", "val_accuracy"):
        assert last[f"{name}_{metric}_std"] == pytest.approx(rows[metric].std(ddof=0), rel=1e-9)
        assert last[f"{name}_{metric}_worst"] == pytest.approx(rows[metric].nsmallest(2).mean(), rel=1e-12)
    assert f"{name}_loss_std" not in last
    assert last[label] == pytest.approx(((nodes - nodes.mean(dim=0)) ** 2).sum(dim=1).mean().item(), rel=1e-5)
    assert last.accuracy == made.evaluate(made.layout.join(run.model))["accuracy"]


def test_consensus_of_points_on_a_line_has_a_closed_form():
    # x_i = (i, ..., i) in d dimensions, i = 0 .. k-1: d (k^2 - 1) / 12.
    nodes = torch.arange(7.0, dtype=torch.float64)[:, None].repeat(1, 10)
    run = simulate(Nodes("nodes", nodes), fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=7, cohort=7)
    assert run.metrics.consensus.tolist() == [pytest.approx(10 * 48 / 12, rel=1e-14)] * 2
    equal = simulate(Nodes("nodes", nodes[:1].repeat(5, 1)), fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=7)
    assert equal.metrics.consensus.tolist() == [0.0, 0.0]


def test_a_strategy_may_say_what_the_clients_own_models_are_and_need_no_global_one():
    models = torch.from_numpy(np.random.default_rng(2).normal(size=(8, 35))).float()

    class Peers(Nodes):
        def views(self, fed):
            return {"nodes": self.nodes}

        def own_models(self, fed):
            return {client: self.nodes[client] for client in range(7)}

    run = simulate(
        Peers("nodes", models),
        fedsim.Stop(rounds=1),
        problem(client_test=0.3),
        clients=8,
        cohort=2,
        client_eval_every=1,
    )
    made = prepared(8, client_test=0.3)
    for client in range(8):
        accuracy = by_hand(made, models[client], client, "test")[1] if client < 7 else np.nan
        assert run.clients.own_accuracy[client] == pytest.approx(accuracy, nan_ok=True)
    final = made.layout.join(run.model)
    assert run.clients.accuracy.tolist() == [by_hand(made, final, client, "test")[1] for client in range(8)]
    assert {"nodes_accuracy", "consensus", "client_accuracy", "own_client_accuracy"} <= set(run.metrics)


# ---- peers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DFedAvg, DPSGD])
def test_the_nodes_of_peers_are_what_is_evaluated_beside_their_mean(method):
    strategy, made = method(fedsim.LocalSGD(lr=0.3, batch_size=5)), problem(client_test=0.3)
    run = simulate(strategy, fedsim.Stop(rounds=4), made, clients=9, client_eval_every=2)
    nodes, last = strategy.models, run.metrics.iloc[-1]
    rows = pd.DataFrame([made.evaluate(each) for each in nodes])
    assert rows.accuracy.nunique() > 1
    assert last.nodes_accuracy == pytest.approx(rows.accuracy.mean(), rel=1e-12)
    assert last.nodes_accuracy_worst == pytest.approx(rows.accuracy.min(), rel=1e-12)
    assert last.consensus == pytest.approx(float(((nodes - nodes.mean(dim=0)) ** 2).sum(dim=1).mean()), rel=1e-5)
    assert last.consensus > 0
    torch.testing.assert_close(made.layout.join(run.model), nodes.mean(dim=0))
    for client in range(9):
        own = by_hand(made, nodes[client], client, "test")[1]
        assert run.clients.own_accuracy[client] == pytest.approx(own, nan_ok=True)


def test_dpsgd_takes_one_step_per_round_however_many_batches_there_are():
    run = simulate(DPSGD(fedsim.LocalSGD(lr=0.3, batch_size=5)), fedsim.Stop(rounds=3), problem(), clients=9)
    assert (prepared(9).samples > 5).any()
    assert set(run.events.steps) == {1}


# ---- what cannot be averaged -------------------------------------------------------------------------


def test_a_client_whose_model_has_diverged_is_not_left_out_of_the_mean():
    class Burst(FedAvg):
        def own_models(self, fed):
            return {2: torch.full((fed.layout.size,), torch.nan)}

    made = problem(Dirichlet(alpha=0.1, minimum=0), client_test=0.3)
    run = simulate(Burst(), fedsim.Stop(rounds=1), made, clients=20, cohort=2, client_eval_every=1)
    last = run.metrics.iloc[-1]
    assert (run.clients.test_samples == 0).any()  # these are left out
    assert run.clients.test_samples[2] > 0
    assert np.isnan(last.own_client_loss)
    assert last.client_loss == pytest.approx(run.clients.loss.mean(), rel=1e-12)
    counted = run.clients.accuracy.where(run.clients.index != 2, run.clients.own_accuracy).dropna()
    assert last.own_client_accuracy == pytest.approx(counted.mean(), rel=1e-12)
