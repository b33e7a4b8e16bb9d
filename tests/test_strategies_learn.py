"""Every strategy learns real images: no error of sign, unit or weight survives this."""

from __future__ import annotations

import pytest

from fedsim import Classification, Stop, Strategy, System, simulate
from fedsim.data.partitions import Dirichlet
from fedsim.strategies.fedadagrad import FedAdagrad
from fedsim.strategies.fedadam import FedAdam
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavgm import FedAvgM
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.fedyogi import FedYogi
from fedsim.system.compute import Lognormal

SYNCHRONOUS = [FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad]


@pytest.mark.parametrize("method", [*SYNCHRONOUS, FedAsync, FedBuff])
def test_seventy_percent_of_the_test_images_are_right_within_sixty_rounds(method: type[Strategy]) -> None:
    problem = Classification(partition=Dirichlet(0.3))  # the embedded images and an MLP
    # Unequal speeds, so that asynchronous updates are really stale. The run ends early, by validation data alone.
    stop = Stop(rounds=60, target=0.75)
    run = simulate(method(), problem, System(compute=Lognormal()), stop=stop, clients=100, cohort=10, eval_every=5)
    assert run.summary["round"] <= 60
    assert run.metrics.accuracy.iloc[0] < 0.3
    assert run.metrics.accuracy.iloc[-1] >= 0.7
    assert (run.summary["mean_staleness"] == 0) == (method in SYNCHRONOUS)
