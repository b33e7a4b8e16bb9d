"""Schedulers, local rules and server momentum in any mixture that the mathematics allows; the others say why not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from support import Given
from torch import Tensor

import fedsim
from fedsim.assemble import Assembly
from fedsim.cli import main
from fedsim.config import choices, compose_run, locate
from fedsim.rng import Randomness
from fedsim.strategies.afa_cd import AfaCd
from fedsim.strategies.afa_cs import AfaCs
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.average_all import AverageAll
from fedsim.strategies.average_participating import AverageParticipating
from fedsim.strategies.fedau import FedAU
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavgm import FedAvgM
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedcompass import FedCompass
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.known_probability import KnownProbability
from fedsim.strategies.scaffold import Scaffold

CONF = Path(__file__).parents[1] / "conf"
NAMES = sorted(choices("strategy", Path(__file__).parent).keys() - {"flower"})  # its parts are the app's own
LOCAL, SERVER = (sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in ("local", "server"))

Vector = NDArray[np.float64]


# ---- every mixture -------------------------------------------------------------------------------------


@cache
def part(group: str, name: str) -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    return node


@pytest.mark.parametrize("name", NAMES)
def test_every_local_rule_and_server_runs_under_a_strategy_or_is_refused_in_one_line(name: str) -> None:
    small = ["clients=4", "cohort=2", "rounds=2", "problem=quadratic", "problem.dimension=3"]
    config, chosen = compose_run([f"strategy={name}", *small], Path(__file__).parent)
    takes_server = "server" in inspect.signature(locate(config["strategy"]["_target_"], "")).parameters
    ran = []
    for local in LOCAL:
        for server in SERVER:
            parts = {"local": part("local", local), "server": part("server", server)}
            mixed = copy.deepcopy({**config, **parts})
            try:
                assembly = Assembly(mixed, {**chosen, "local": local, "server": server})
            except fedsim.ConfigError as error:
                line = str(error)
                assert "\n" not in line
                if server == "plain" or takes_server:
                    assert "local" in line
                    assert local != "sgd"
                elif local == "sgd":
                    assert line.startswith(f"server={server}: ")
                    assert line.endswith(
                        ("makes server steps of its own; leave it plain", "has no server; leave it plain")
                    )
            else:
                assert server == "plain" or takes_server
                done = fedsim.simulate(
                    assembly.strategy, assembly.problem, assembly.system, stop=assembly.stop, clients=4, cohort=2
                )
                assert done.summary["updates"] > 0
                ran.append((local, server))
    assert ("sgd", "plain") in ran
    assert (("sgd", "momentum") in ran) == takes_server


def test_the_command_line_takes_them_by_name_and_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["run", "problem=quadratic", "clients=4", "cohort=2", "rounds=2"]
    mixture = ["strategy=fedcompass", "local=sam", "server=momentum", "server.momentum=0.5"]
    assert main([*small, *mixture, "out=mixed"]) == 0
    written = yaml.safe_load(Path("mixed/config.yaml").read_text())
    assert written["server"]["momentum"] == 0.5
    assert written["local"]["_target_"].endswith("SAM")
    capsys.readouterr()
    refusals = {
        "strategy=fedadam server=momentum": "server=momentum: FedAdam makes server steps of its own; leave it plain",
        "strategy=dfedavg server=momentum": "server=momentum: DFedAvg has no server; leave it plain",
        "strategy=afa_cd local.momentum=0.9": "local.momentum=0.9: a step along a velocity is no gradient",
        "strategy=fedprox local=prox strategy.mu=1": "strategy.mu=1: local.prox=0.01 sets the same penalty",
        "strategy=fedcompass local.steps=3": "local.steps=3: FedCompass gives the steps; leave it null",
        "server=momentum server.momentum=1": "server.momentum=1: must be a number >= 0 and < 1",
    }
    for given, why in refusals.items():
        assert main([*small, *given.split(), "out=refused"]) == 2
        said = capsys.readouterr().err.strip()
        assert why in said
        assert "\n" not in said
    assert not Path("refused").exists()


# ---- momentum on any step ------------------------------------------------------------------------------

SPEEDS = (0.1, 0.0301, 0.0507, 0.0713)
"""Seconds per step, such that no two clients come at one instant."""


class OneHot(fedsim.LocalSGD):
    """What a client sends does not depend on the model: its unit vector."""

    def finish(self, ctx: fedsim.Context, x: Tensor) -> dict[str, Tensor]:
        return {self.sends: torch.eye(x.shape[1], dtype=x.dtype)[torch.from_numpy(ctx.clients)]}


Make = Callable[[fedsim.LocalSGD, fedsim.PlainStep], fedsim.Strategy]

TAKERS: dict[str, Make] = {
    "fedavg": lambda local, server: FedAvg(local, server_lr=0.7, server=server),
    "fedprox": lambda local, server: FedProx(local, server=server),
    "fedbuff": lambda local, server: FedBuff(local, 2, server=server),
    "fedfix": lambda local, server: FedFix(local, 0.3, server=server),
    "async_fedavg": lambda local, server: AsyncFedAvg(local, server=server),
    "afa_cd": lambda local, server: AfaCd(local, server=server),
    "afa_cs": lambda local, server: AfaCs(local, server=server),
    "fedcompass": lambda local, server: FedCompass(local.replace(steps=None), 2, 10, server=server),
    "fedau": lambda local, server: FedAU(local, server=server),
    "average_participating": lambda local, server: AverageParticipating(local, server=server),
    "average_all": lambda local, server: AverageAll(local, server=server),
    "known_probability": lambda local, server: KnownProbability(local, server=server),
    "scaffold": lambda local, server: Scaffold(local, server=server),
}


def trajectory(strategy: fedsim.Strategy, problem: fedsim.Problem | None = None, until: float = 8.0) -> Vector:
    """The models published, ``[versions + 1, 4]``."""
    models: list[Vector] = []

    def look(sim: Any) -> None:
        if sim.version >= len(models):
            assert sim.version == len(models)
            models.append(sim.model.numpy())

    system, stop = fedsim.System(Given(*SPEEDS)), fedsim.Stop(time_limit=until)
    more = {"clients": 4, "cohort": 2, "eval_every": 0, "observer": look}
    fedsim.simulate(strategy, problem or fedsim.Quadratic(4), system, stop=stop, **more)
    return np.array(models)


def test_these_are_all_that_take_a_server() -> None:
    found = [
        name
        for name in NAMES
        if "server" in inspect.signature(locate(part("strategy", name)["_target_"], "")).parameters
    ]
    assert found == sorted(TAKERS)


@pytest.mark.parametrize("name", sorted(set(TAKERS) - {"scaffold"}))  # its steps depend on the model
def test_momentum_adds_up_the_steps_of_any_strategy(name: str) -> None:
    make, rule = TAKERS[name], OneHot(steps=3)
    plain = np.diff(trajectory(make(rule, fedsim.PlainStep())), axis=0)
    heavy = np.diff(trajectory(make(rule, fedsim.Momentum(0.6))), axis=0)
    assert len(plain) == len(heavy) > 8
    velocity = np.zeros(4)
    for step, found in zip(plain, heavy, strict=True):
        velocity = 0.6 * velocity + step
        np.testing.assert_allclose(found, velocity, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TAKERS)
def test_no_momentum_is_the_plain_step_to_the_bit(name: str) -> None:
    make, rule = TAKERS[name], fedsim.LocalSGD(lr=0.05, steps=3)
    plain, without = (trajectory(make(rule, server)) for server in (fedsim.PlainStep(), fedsim.Momentum(0.0)))
    assert (plain == without).all()
    assert (trajectory(make(rule, fedsim.Momentum(0.3)))[2:] != plain[2:]).any()


def test_fedavg_with_momentum_is_fedavgm() -> None:
    rule = fedsim.LocalSGD(lr=0.05, steps=3)
    for rate in (1.0, 0.3):
        mixed = trajectory(FedAvg(rule, server_lr=rate, server=fedsim.Momentum(0.9)))
        own = trajectory(FedAvgM(rule, server_lr=rate, momentum=0.9))
        np.testing.assert_allclose(mixed, own, rtol=1e-12 if rate != 1 else 0)


def test_a_velocity_is_the_servers_own() -> None:
    server = fedsim.Momentum(0.5)
    first = server(torch.ones(2))
    first += 7
    assert server(torch.ones(2)).tolist() == [1.5, 1.5]


# ---- local rules under any scheduler --------------------------------------------------------------------


def bowls() -> tuple[Vector, Vector]:
    problem = fedsim.Quadratic(4)
    problem.prepare(4, Randomness(0))
    return problem.curvature, problem.centres


def sgd(x: Vector, a: Vector, b: Vector) -> Vector:
    gradient: Vector = a * (x - b)
    return gradient


def sam(x: Vector, a: Vector, b: Vector) -> Vector:
    slope = a * (x - b)
    gradient: Vector = a * (x + 0.4 * slope / np.sqrt((slope**2).sum()) - b)
    return gradient


def change(direction: Callable[..., Vector], steps: int, mu: float = 0.0) -> Vector:
    """What each client's steps from 0 come to, ``[4, 4]``, one after the other by hand."""
    ends = []
    for a, b in zip(*bowls(), strict=True):
        x = np.zeros(4)
        for _ in range(steps):
            x = x - 0.05 * (direction(x, a, b) + mu * x)
        ends.append(x)
    return np.array(ends)


RULES = {
    "prox": (fedsim.LocalSGD(lr=0.05, prox=2.0), lambda steps: change(sgd, steps, 2.0)),
    "sam": (fedsim.SAM(lr=0.05, rho=0.4), lambda steps: change(sam, steps)),
}


@pytest.mark.parametrize("kind", RULES)
def test_fedcompass_and_fedbuff_schedule_other_local_rules(kind: str) -> None:
    rule, expected = RULES[kind]
    plain = change(sgd, 6)
    assert np.abs(expected(6) - plain).max() > 0.05
    seconds = [6 * each * (2 if kind == "sam" else 1) for each in SPEEDS]  # a sharpness-aware step takes two gradients
    # A client's first update counts 1/4 at once, and the two fastest start from 0.
    strategy = FedCompass(rule, 6, 6, weighting="uniform", server_lr=1.0, staleness="constant")
    news = np.diff(trajectory(strategy, until=seconds[2] + 1e-6), axis=0)
    np.testing.assert_allclose(news[:2], expected(6)[[1, 2]] / 4, rtol=1e-12)
    buffered = FedBuff(rule.replace(steps=6), 4, staleness="constant", concurrency=4)
    models = trajectory(buffered, until=seconds[3] + 1e-6)
    # Until client 3 has come client 1 has come twice.
    np.testing.assert_allclose(models[1], expected(6)[[1, 2, 1, 3]].mean(axis=0), rtol=1e-12)


def test_afa_sends_the_mean_of_whatever_its_steps_follow() -> None:
    for kind in RULES:
        rule, expected = RULES[kind]
        moved = trajectory(AfaCd(rule.replace(steps=5), 1.0, 1), until=0.4)[1]
        np.testing.assert_allclose(moved, expected(5)[1] / (0.05 * 5), rtol=1e-12)  # client 1 is the fastest


# ---- the scheduler under another aggregation --------------------------------------------------------------


class Medians(fedsim.Strategy):
    """Groups by :class:`fedsim.Compass`, of whose updates the model follows the median."""

    def __init__(self, local: fedsim.LocalSGD | None = None) -> None:
        super().__init__(local)
        self.compass = fedsim.Compass(5, 25)
        self.waiting: list[fedsim.Reply] = []

    def start(self, fed: fedsim.Federation) -> None:
        self.send(fed, range(fed.clients))

    def send(self, fed: fedsim.Federation, clients: Any) -> None:
        for client in clients:
            steps, group, latest = self.compass.assign(client, fed.now)
            if latest is not None:
                fed.timer(latest, group)
            fed.dispatch(client, steps=steps, tag=group)

    def on_reply(self, fed: fedsim.Federation, reply: fedsim.Reply) -> None:
        arrival = self.compass.arrive(reply.client, fed.now)
        self.waiting.append(reply)
        if arrival.kind != "on time":
            self.send(fed, [reply.client])
        if arrival.complete:
            self.aggregate(fed, arrival.group)

    def on_timer(self, fed: fedsim.Federation, timer: fedsim.Timer) -> None:
        if self.compass.expire(timer.tag):
            self.aggregate(fed, timer.tag)

    def aggregate(self, fed: fedsim.Federation, group: Any) -> None:
        median = torch.stack([each["delta"] for each in self.waiting]).median(dim=0).values
        fed.publish(fed.model + median, used=self.waiting)
        self.waiting = []
        self.send(fed, self.compass.disband(group))


class StoppedError(Exception):
    pass


def test_the_scheduler_drives_another_rule_of_aggregation_and_is_saved_with_it(tmp_path: Path) -> None:
    def run(**more: Any) -> fedsim.Run:
        system, stop = fedsim.System(Given(*SPEEDS)), fedsim.Stop(time_limit=30.0)
        often = fedsim.CheckpointSchedule(events=1)
        rule = fedsim.LocalSGD(lr=0.05)
        return fedsim.simulate(
            Medians(rule), fedsim.Quadratic(4), system, stop=stop, clients=4, cohort=4, checkpoint=often, **more
        )

    def stop(sim: Any) -> None:
        if sim.version == 4:
            raise StoppedError

    whole = run()
    rows = whole.events.sort_values("task").tail(4)
    assert len(set(rows.tag)) == 1  # all in one group in the end
    assert rows.steps.max() == 25
    with pytest.raises(StoppedError):
        run(out=tmp_path / "run", observer=stop)
    resumed = run(out=tmp_path / "run", resume=True)
    assert resumed.manifest["model_sha256"] == whole.manifest["model_sha256"]
    assert resumed.manifest["events_sha256"] == whole.manifest["events_sha256"]
