"""Sharpness-aware local steps: against loops by hand, under any strategy, and what they cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from support import Given
from test_local import SEED, batches_of, classification, curve, quadratic, train
from test_reductions import ByAutograd, flat, hashes, small
from torch import nn
from torch.nn.functional import cross_entropy

import fedsim
from fedsim import SAM, ConfigError, LocalSGD, Stop, System, simulate
from fedsim.cli import main
from fedsim.pool import InlinePool
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedprox import FedProx
from fedsim.system.compute import Constant, Lognormal


@pytest.mark.parametrize(("momentum", "weight_decay", "rho"), [(0.0, 0.0, 0.3), (0.9, 0.01, 0.3), (0.0, 0.0, 5.0)])
def test_both_gradients_are_of_one_batch_and_one_norm_spans_all_parameters(
    momentum: float, weight_decay: float, rho: float
) -> None:
    problem = classification(4, 11)
    rule = SAM(lr=0.3, batch_size=4, momentum=momentum, weight_decay=weight_decay, rho=rho)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    assert isinstance(problem.model, nn.Module)
    module.load_state_dict(problem.model.state_dict())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3, momentum=momentum, weight_decay=weight_decay)
    x, y = problem.examples(1)

    def slopes(batch: torch.Tensor) -> list[torch.Tensor]:
        optimiser.zero_grad()
        cross_entropy(module(x[batch]), y[batch]).backward()
        return [each.grad.clone() for each in module.parameters() if each.grad is not None]

    for step, batch in enumerate(batches_of(1, 2, 11, 4, 7)):
        up = slopes(batch)
        length = float(torch.cat([each.flatten() for each in up]).norm())
        with torch.no_grad():
            for parameter, each in zip(module.parameters(), up, strict=True):
                parameter += rho * each / length
        slopes(batch)
        with torch.no_grad():
            for parameter, each in zip(module.parameters(), up, strict=True):
                parameter -= rho * each / length
        optimiser.step()
        expected = torch.cat([each.detach().reshape(-1) for each in module.parameters()])
        got = problem.initial() + train(rule, problem, 1, step + 1, nth=2).payload["delta"]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_on_a_bowl_the_step_follows_the_closed_form_and_clipping_and_prox_come_after_it() -> None:
    problem = quadratic()
    a, b = curve(problem)
    start = torch.full((4,), 4.0, dtype=torch.float64)
    x = start
    for _ in range(3):
        slope = a * (x - b)
        slope = a * (x + 0.7 * slope / slope.norm() - b)
        slope = slope * min(1.0, 2.0 / float(slope.norm()))
        x = x - 0.1 * (slope + 0.2 * (x - start))
    rule = SAM(lr=0.1, rho=0.7, clip=2.0, prox=0.2).replace(sends="model")
    torch.testing.assert_close(train(rule, problem, 0, 3, start=start).payload["model"], x, rtol=1e-12, atol=0)


def test_where_the_gradient_is_zero_nothing_moves() -> None:
    problem = quadratic()
    _, b = curve(problem)
    for rho in (0.05, 1e6):
        assert torch.equal(train(SAM(rho=rho), problem, 0, 3, start=b).payload["delta"], torch.zeros_like(b))


def test_without_an_ascent_step_it_is_sgd_to_the_bit() -> None:
    runs = [
        simulate(FedBuff(rule), fedsim.Quadratic(), System(Lognormal(jitter=0.3)), stop=Stop(rounds=5), clients=8)
        for rule in (LocalSGD(steps=3), SAM(steps=3, rho=0.0), SAM(steps=3, rho=0.1))
    ]
    assert hashes(runs[0]) == hashes(runs[1])
    assert hashes(runs[0])[1] != hashes(runs[2])[1]
    assert float((flat(runs[0]) - flat(runs[2])).norm()) > 1e-3


# ---- in company ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FedAvg, FedBuff, FedProx, AsyncFedAvg])
def test_any_strategy_takes_it_and_no_grouping_shows(strategy: Any) -> None:
    def run(problem: fedsim.Problem, group: int | None) -> fedsim.Run:
        rule, system = SAM(lr=0.1, rho=0.2, steps=4, momentum=0.5), System(Lognormal(jitter=0.3))
        pool = InlinePool(group=group)
        return simulate(strategy(rule), problem, system, pool, Stop(rounds=4), SEED, clients=8, cohort=4)

    stacked, one_by_one, by_autograd = run(small(), 8), run(small(), 1), run(small(kind=ByAutograd), 8)
    assert hashes(stacked) == hashes(one_by_one)
    assert hashes(stacked)[1] == hashes(by_autograd)[1]
    torch.testing.assert_close(flat(stacked), flat(by_autograd), rtol=1e-4, atol=1e-5)


def test_a_step_costs_the_time_of_two_gradients() -> None:
    for seconds in (Constant(1.0), Given(*[1.0] * 4)):
        for cohort in (1, 4):  # one task at a time is planned in another way
            runs = [
                simulate(
                    FedAvg(rule), fedsim.Quadratic(), System(seconds), stop=Stop(rounds=2), clients=4, cohort=cohort
                )
                for rule in (LocalSGD(steps=3), SAM(steps=3))
            ]
            assert [run.metrics.time.tolist() for run in runs] == [[0.0, 3.0, 6.0], [0.0, 6.0, 12.0]]
            assert all((run.events.steps == 3).all() for run in runs)
            assert runs[0].events.samples.tolist() == runs[1].events.samples.tolist()  # each is worked through once


def test_weights_made_of_expected_times_know_what_a_step_costs() -> None:
    def weights(*rules: LocalSGD) -> list[list[float]]:
        made = []
        for rule in rules:
            strategy = AsyncFedAvg(rule)
            # A message takes 1 s each way, so that twice the work is not twice the time.
            network = fedsim.system.network.Constant(down=1e3, up=1e3, latency=1.0)
            system = System(Given(1.0, 2.0, 5.0), network)
            simulate(strategy, fedsim.Quadratic(), system, stop=Stop(updates=1), clients=3, cohort=1)
            made.append(strategy.d)
        return made

    twice, sharp = weights(LocalSGD(steps=6), SAM(steps=3))
    assert twice == sharp


# ---- mistakes ------------------------------------------------------------------------------------


class Own(LocalSGD):
    def direction(self, ctx: Any, x: Any, batch: Any) -> Any:
        return ctx.grad(x, batch)


def test_only_a_plain_rule_becomes_one_with_ascent_steps() -> None:
    rule = LocalSGD(lr=0.3, steps=4, clip=2.0, keep=True).replace(sends="model")
    made = SAM.of(rule, 0.2)
    assert {**asdict(rule), "rho": 0.2} == asdict(made)
    assert SAM.of(made, 0.2) == made
    assert asdict(SAM.of(None, 0.1)) == {**asdict(LocalSGD()), "rho": 0.1}
    with pytest.raises(ConfigError, match=r"^rho=0.1: local.rho=0.2 sets the same"):
        SAM.of(made, 0.1)
    with pytest.raises(ConfigError, match=r"^local._target_=test_sam.Own: this strategy takes ascent steps"):
        SAM.of(Own(), 0.1)
    with pytest.raises(ConfigError, match=r"^rho=-1: must be a number >= 0"):
        SAM(rho=-1)


def test_from_the_command_line_under_an_asynchronous_server(tmp_path: Any, capsys: Any) -> None:
    small = ["problem=quadratic", "clients=6", "cohort=2", "rounds=3", f"out={tmp_path / 'run'}"]
    assert main(["run", "strategy=fedbuff", "local=sam", "local.rho=0.1", *small]) == 0
    capsys.readouterr()
    assert main(["run", "local=sam", "local.rho=-0.5"]) == 2
    assert capsys.readouterr().err.strip() == "fedsim: local.rho=-0.5: must be a number >= 0"
