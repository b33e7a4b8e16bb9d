"""Flower's strategies and ours are the same mathematics, and take the same virtual time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from examined import points
from flower_apps import SameSteps, flower, starting
from flwr.serverapp.strategy import FedAdam as FlowersFedAdam
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg

import fedsim
from fedsim.data import Dirichlet
from fedsim.rng import Randomness
from fedsim.strategies.fedadam import FedAdam
from fedsim.strategies.fedavg import FedAvg
from fedsim.system import compute, faults, network

CLIENTS, ROUNDS, SEED = 6, 4, 5
LOCAL = {"lr": 0.3, "batch_size": 7, "epochs": 2}
DATA = points(n=240, classes=4)


def devices():
    return {
        "compute": compute.Lognormal(mean=0.2, sigma=1.0, jitter=0.3),
        "network": network.Lognormal(down=0.01, up=0.003, latency=0.02),
    }


def problem():
    return fedsim.LogisticRegression(DATA, Dirichlet(alpha=1.0))


def ours(strategy, **parts):
    system = fedsim.System(**{**devices(), **parts})
    stop = fedsim.Stop(rounds=ROUNDS)
    return fedsim.simulate(strategy, problem(), system, stop=stop, seed=SEED, clients=CLIENTS, cohort=CLIENTS)


def theirs(strategy, **parts):
    made = problem()
    made.prepare(CLIENTS, Randomness(SEED))
    first = {name: each.numpy() for name, each in made.layout.split(made.initial()).items()}
    return flower(
        starting(strategy, ROUNDS, first),
        SameSteps(made, SEED, **LOCAL).app(),
        system={**devices(), **parts},
        costs={"batch_size": LOCAL["batch_size"], "epochs": LOCAL["epochs"]},
        seed=SEED,
        clients=CLIENTS,
    )


def everybody(kind, **settings):
    return lambda: kind(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS, **settings)


def decided(run):
    """What happened to all tasks but those of the round that our run had begun when it was over."""
    return run.events[run.events.outcome != "pending"].drop(columns=["tag", "group"]).reset_index(drop=True)


def distance(one, other):
    assert one.model.keys() == other.model.keys()
    return max(float((one.model[name] - other.model[name]).abs().max()) for name in one.model)


def moved(run):
    return max(float(each.abs().max()) for each in run.model.values())  # it begins at zero


@pytest.fixture(scope="module")
def fedavg_runs():
    return ours(FedAvg(fedsim.LocalSGD(**LOCAL))), theirs(everybody(FlowersFedAvg))


def test_flowers_fedavg_makes_our_fedavgs_model(fedavg_runs):
    own, flowers = fedavg_runs
    assert moved(own) > 0.1
    assert distance(own, flowers) < 1e-12


def test_every_task_of_flowers_fedavg_takes_the_time_and_the_bytes_of_ours(fedavg_runs):
    own, flowers = map(decided, fedavg_runs)
    assert len(own) == CLIENTS * ROUNDS
    assert own.arrived.nunique() == len(own)
    pd.testing.assert_frame_equal(own, flowers, check_dtype=False, check_exact=True)


def test_rows_of_metrics_stand_at_the_same_times_and_bytes(fedavg_runs):
    columns = ["version", "round", "time", "updates", "samples", "up_bytes", "down_bytes"]
    own, flowers = (run.metrics[columns] for run in fedavg_runs)
    assert own.time.iloc[-1] > 0
    assert own.equals(flowers)


def test_lost_clients_are_left_out_alike():
    lossy = {"faults": faults.Faults(dropout=0.4, when="any", detect=0.5)}
    own, flowers = ours(FedAvg(fedsim.LocalSGD(**LOCAL)), **lossy), theirs(everybody(FlowersFedAvg), **lossy)
    own, flowers = decided(own), decided(flowers)
    assert (flowers.outcome == "dropped").sum() > 3
    assert len(own) > len(flowers)  # ours ends when four cohorts of results are there, theirs after four rounds
    pd.testing.assert_frame_equal(own.head(len(flowers)), flowers, check_dtype=False, check_exact=True)


SETTINGS = {"server_lr": 0.05, "tau": 1e-3}
THEIR_SETTINGS = {"eta": 0.05, "tau": 1e-3}


def test_flowers_fedadam_is_ours_where_neither_moment_is_kept():
    own = ours(FedAdam(fedsim.LocalSGD(**LOCAL), beta1=0.0, beta2=0.0, **SETTINGS))
    flowers = theirs(everybody(FlowersFedAdam, beta_1=0.0, beta_2=0.0, **THEIR_SETTINGS))
    assert moved(own) > 0.1
    assert distance(own, flowers) < 1e-9


class AsFlowersFedAdam(FedAdam):
    """Ours with what Flower has differently: v = 0 at first, and Adam's bias correction, one round ahead."""

    def aggregate(self, fed, replies):
        if self.second is None:
            self.second = torch.zeros_like(fed.model)
            self.eta, self.calls = self.server_lr, 0
        self.calls += 1
        power = self.calls + 1
        self.server_lr = self.eta * np.sqrt(1 - self.beta2**power) / (1 - self.beta1**power)
        return super().aggregate(fed, replies)


def test_flowers_fedadam_differs_from_ours_in_its_first_v_and_its_bias_correction_alone():
    settings = {"beta1": 0.9, "beta2": 0.99, **SETTINGS}
    flowers = theirs(everybody(FlowersFedAdam, beta_1=0.9, beta_2=0.99, **THEIR_SETTINGS))
    alike = ours(AsFlowersFedAdam(fedsim.LocalSGD(**LOCAL), **settings))
    own = ours(FedAdam(fedsim.LocalSGD(**LOCAL), **settings))
    assert distance(alike, flowers) < 1e-9
    assert distance(own, flowers) > 1e-3
