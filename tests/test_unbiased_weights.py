"""Servers that never wait, and whose mean weights are those of the objective all the same (arXiv 2206.10189)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import Given, Scripted
from torch import Tensor

import fedsim
from fedsim.kernel import whole_periods
from fedsim.rng import Randomness
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedfix import FedFix
from fedsim.system.network import Constant

SAMPLES = np.array([30, 10, 25, 5, 20, 10])
SECONDS = (1.0, 0.2, 0.5, 0.73, 0.37, 0.61)
"""Of a task of one step."""

SHARES = {"samples": SAMPLES / SAMPLES.sum(), "uniform": np.full(6, 1 / 6)}


class Uneven(fedsim.Quadratic):
    """Bowls whose clients count for different numbers of examples."""

    def prepare(self, clients: int, randomness: Randomness) -> None:
        super().prepare(clients, randomness)
        self.samples = SAMPLES[:clients]


class Untrained(Uneven):
    """For rules that need no gradients."""

    trains = False


class OneHot(fedsim.LocalSGD):
    """Client i's update is the i-th unit vector: the model then holds the sum of every client's weights."""

    def finish(self, ctx: fedsim.Context, x: Tensor) -> dict[str, Tensor]:
        return {"delta": torch.eye(x.shape[1], dtype=x.dtype)[torch.from_numpy(ctx.clients)]}


def run(strategy: fedsim.Strategy, clients: int = 6, time_limit: float = 120.0, **more: Any) -> fedsim.Run:
    system = fedsim.System(Given(*SECONDS[:clients]), more.pop("network", None), more.pop("availability", None))
    stop = fedsim.Stop(time_limit=time_limit)
    more = {"eval_every": 0, "cohort": 3} | more
    problem = more.pop("problem", Uneven)(clients)
    return fedsim.simulate(strategy, problem, system, stop=stop, clients=clients, **more)


def mean_weights(strategy: fedsim.Strategy, steps: float | None = None, **more: Any) -> NDArray[np.float64]:
    """E[omega_i] per step of the server, over 120 tasks of the slowest client."""
    result = run(strategy, problem=Untrained, **more)
    weights: NDArray[np.float64] = result.model["x"].numpy() / (result.summary["version"] if steps is None else steps)
    return weights


# ---- E[omega_i] = p_i --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_the_mean_weight_of_a_client_is_its_share_in_the_objective(weighting: str) -> None:
    rule = OneHot(steps=1)
    share = SHARES[weighting]
    for period in (0.2, 0.5, 0.8):
        # A step at which nobody has come is a step all the same; the one at 120 s is made.
        weights = mean_weights(FedFix(rule, period, weighting), steps=120.0 // period)
        np.testing.assert_allclose(weights, share, rtol=0.01)
    np.testing.assert_allclose(mean_weights(AsyncFedAvg(rule, weighting)), share, rtol=0.01)
    for size in (2, 5):
        buffered = FedBuff(rule, size, weighting, staleness="constant")
        np.testing.assert_allclose(mean_weights(buffered), share, rtol=0.01)


def test_without_the_weights_fast_clients_count_for_more() -> None:
    """The control: that the test above can fail."""
    equal = FedBuff(OneHot(steps=1), 2, staleness="constant", concurrency=6)
    pace = 1 / np.array(SECONDS)
    np.testing.assert_allclose(mean_weights(equal), pace / pace.sum(), rtol=0.01)


def test_link_time_counts_as_time_of_the_client() -> None:
    # 48 bytes at 4.8 kB/s down and half of that up: 10 + 20 ms, and a second's latency each way.
    network = Constant(down=0.0384, up=0.0192, latency=1.0)
    weights = mean_weights(AsyncFedAvg(OneHot(steps=1)), network=network, time_limit=500.0)
    np.testing.assert_allclose(weights, SHARES["samples"], rtol=0.01)
    unaware = 1 / (np.array(SECONDS) + 2.03)  # what the clients' paces really are
    np.testing.assert_allclose(AsyncFedAvgWeights(network), SHARES["samples"] / unaware * unaware.sum(), rtol=1e-9)


def AsyncFedAvgWeights(network: Constant) -> list[float]:  # noqa: N802
    strategy = AsyncFedAvg(OneHot(steps=1))
    run(strategy, network=network, time_limit=0.1)
    return strategy.d


def test_clients_without_examples_are_not_asked_and_take_nothing_from_the_others() -> None:
    class Empty(Untrained):
        def prepare(self, clients: int, randomness: Randomness) -> None:
            super().prepare(clients, randomness)
            self.samples = SAMPLES * (np.arange(6) != 1)  # the fastest one

    def weights(strategy: fedsim.Strategy) -> NDArray[np.float64]:
        system = fedsim.System(Given(*SECONDS))
        stop = fedsim.Stop(time_limit=120.0)
        done = fedsim.simulate(strategy, Empty(6), system, stop=stop, clients=6, cohort=3, eval_every=0)
        assert 1 not in set(done.events.client)
        return done.model["x"].numpy() / done.summary["version"]

    rule, share = OneHot(steps=1), SAMPLES * (np.arange(6) != 1) / 90
    for weighting, wanted in (("samples", share), ("uniform", (share > 0) / 5)):
        np.testing.assert_allclose(weights(FedFix(rule, 0.5, weighting)), wanted, rtol=0.01)
        np.testing.assert_allclose(weights(AsyncFedAvg(rule, weighting)), wanted, rtol=0.01)
        np.testing.assert_allclose(weights(FedBuff(rule, 2, weighting, staleness="constant")), wanted, rtol=0.01)


# ---- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("period", [1.0, 1.7])
def test_fedfix_whose_step_is_at_least_the_slowest_time_is_fedavg_to_the_bit(weighting: str, period: float) -> None:
    rule = fedsim.LocalSGD(lr=0.1, steps=1, momentum=0.5)
    fixed = run(FedFix(rule, period, weighting), time_limit=20 * period)
    problem, system = Uneven(6), fedsim.System(Given(*SECONDS))
    stop = fedsim.Stop(rounds=20)
    plain = fedsim.simulate(FedAvg(rule, weighting), problem, system, stop=stop, clients=6, cohort=6)
    assert fixed.summary["version"] == plain.summary["version"] == 20
    assert torch.equal(fixed.model["x"], plain.model["x"])


def test_fedfix_with_tiny_steps_is_asynchronous_fedavg() -> None:
    """Times that are whole numbers of steps: nobody waits, and d_i / (sum_j 1 / tau_j Dt) is the other's weight."""
    rule = fedsim.LocalSGD(lr=0.02, steps=1)
    pace = (1 / np.array(SECONDS)).sum()
    fixed = run(FedFix(rule, 0.01, server_lr=0.01 * pace), time_limit=30.0)
    free = run(AsyncFedAvg(rule), time_limit=30.0)
    assert fixed.summary["updates"] == free.summary["updates"]
    np.testing.assert_allclose(fixed.model["x"], free.model["x"], rtol=1e-9)


def test_a_step_at_which_nobody_waits_costs_nothing() -> None:
    """A million steps of the server, of which those count at which somebody has come."""
    rule = fedsim.LocalSGD(lr=0.02, steps=1)
    pace = (1 / np.array(SECONDS)).sum()
    fixed = run(FedFix(rule, 1e-5, server_lr=1e-5 * pace), time_limit=10.0)
    free = run(AsyncFedAvg(rule), time_limit=10.0)
    np.testing.assert_allclose(fixed.model["x"], free.model["x"], rtol=1e-9)


@pytest.mark.parametrize("method", [AsyncFedAvg, FedFix])
def test_the_servers_rate_scales_every_step(method: Any) -> None:
    whole, half = (run(method(OneHot(steps=1), server_lr=rate), time_limit=9.0) for rate in (1.0, 0.5))
    np.testing.assert_allclose(half.model["x"], whole.model["x"] / 2, rtol=1e-12)
    assert whole.model["x"].min() > 0


def test_the_default_period_leaves_out_who_has_no_data() -> None:
    class Two(Untrained):
        def prepare(self, clients: int, randomness: Randomness) -> None:
            super().prepare(clients, randomness)
            self.samples = np.array([0, 30, 20])  # the slowest has nothing

    strategy = FedFix(OneHot(steps=1))
    run(strategy, clients=3, time_limit=1.0, problem=Two)
    assert strategy.Dt == 0.25


# ---- by hand -----------------------------------------------------------------------------------------


def test_fedfix_steps_at_whole_periods_and_who_has_come_restarts_there() -> None:
    result = run(FedFix(OneHot(steps=1), 0.5), clients=3, time_limit=2.6)
    events = result.events
    begun = {client: events[events.client == client].dispatched.tolist() for client in range(3)}
    # 1.0 s: there at every second step, and at that very moment; 0.2 s waits for 0.5; 0.5 s never waits.
    assert begun == {0: [0.0, 1.0, 2.0], 1: [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], 2: [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]}
    share = SAMPLES[:3] / 65
    np.testing.assert_allclose(result.model["x"], [2 * 2 * share[0], 5 * share[1], 5 * share[2]], rtol=1e-12)
    assert result.summary["version"] == 5
    applied = events[events.outcome == "applied"]
    assert applied.groupby("client").staleness.apply(list).to_dict() == {0: [1, 1], 1: [0] * 5, 2: [0] * 5}


def test_periods_are_counted_in_whole_nanoseconds() -> None:
    assert 2.1 / 0.3 > 7
    assert whole_periods(np.array([2.1, 2.1 + 1e-9, 0.3, 1e-9]), 0.3).tolist() == [7, 8, 1, 1]
    strategy = FedFix(OneHot(steps=7), 0.3)  # seven steps of 0.3 s
    fedsim.simulate(
        strategy,
        Uneven(1),
        fedsim.System(Given(0.3)),
        stop=fedsim.Stop(time_limit=5),
        clients=1,
        cohort=1,
        eval_every=0,
    )
    assert strategy.d == [7.0]


def test_fedfix_without_a_period_steps_at_half_the_slowest_time() -> None:
    strategy = FedFix(OneHot(steps=1))
    run(strategy, time_limit=1.0)
    assert strategy.Dt == 0.5


def test_who_comes_online_between_two_steps_begins_at_the_next() -> None:
    presence = Scripted((0.7, 1, True), absent=(1,))
    events = run(FedFix(OneHot(steps=1), 0.5), clients=2, time_limit=1.6, availability=presence).events
    assert events[events.client == 1].dispatched.tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, "staleness=constant, got staleness=polynomial"),
        ({"staleness": "constant", "max_staleness": 3}, "max_staleness=null, got max_staleness=3"),
        ({"staleness": "constant", "concurrency": 5}, "concurrency=null, got concurrency=5"),
    ],
)
def test_unbiased_weights_and_what_would_bias_them_are_refused_together(settings: dict[str, Any], needed: str) -> None:
    with pytest.raises(fedsim.ConfigError, match=needed):
        FedBuff(weighting="uniform", **settings)
