from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from grids import IMAGES, deployed, grid_of
from support import Given

import fedsim
from fedsim.assemble import Assembly
from fedsim.config import choices
from fedsim.flower.configuration import read_run_config
from fedsim.flower.keeping import Kept
from fedsim.flower.messages import INTRODUCE, WORK

SAME = ["client", "job", "tag", "dispatched", "arrived", "version", "applied_version", "steps", "samples",
        "down_bytes", "up_bytes", "outcome"]  # fmt: skip


def assembled(grid):
    held = read_run_config(grid.run_config)
    return Assembly({**held.config, "out": None}, held.choices)


def simulated(grid, speeds, observer=None):
    parts = assembled(grid)
    system = fedsim.System(Given(*speeds))
    return fedsim.simulate(
        parts.strategy, parts.problem, system, stop=parts.stop, clients=parts.clients, cohort=parts.cohort,
        observer=observer,
    )  # fmt: skip


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold_m"])
def test_two_rounds_on_nodes_give_the_simulated_model(tmp_path, strategy):
    grid = grid_of(tmp_path, *IMAGES, f"strategy={strategy}")
    run = deployed(grid)
    prediction = simulated(grid, (1.0, 1.0, 1.0))
    assert run.summary["version"] == prediction.summary["version"] == 2
    assert difference(run.model, prediction.model) <= 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=fedavg", "cohort=2", "rounds=5"],
        ["strategy=fedavg", "cohort=2", "rounds=5", "strategy.over_selection=1.5", "strategy.stragglers=late"],
        ["strategy=fedavg", "rounds=4", "strategy.deadline=5", "local.steps=6"],
        ["strategy=scaffold_m", "cohort=2", "rounds=5"],
        ["strategy=scaffold_m", "cohort=2", "rounds=5", "strategy.over_selection=1.5", "strategy.stragglers=late"],
        ["strategy=scaffold", "rounds=3"],
        ["strategy=fedau", "rounds=3"],
        ["strategy=fedbuff", "cohort=2", "rounds=6"],
        ["strategy=fedbuff", "cohort=2", "rounds=6", "strategy.max_staleness=0"],
        ["strategy=fedasync", "cohort=2", "rounds=6"],
        ["strategy=afa_cs", "cohort=2", "rounds=6", "strategy.pause=3"],
        ["strategy=afa_cd", "cohort=2", "rounds=6"],
        ["strategy=fedadmm", "cohort=2", "rounds=4"],
        ["strategy=fedcompass", "cohort=2", "rounds=8", "strategy.least_steps=4", "strategy.most_steps=20"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_deployment_whose_nodes_are_as_fast_as_predicted_is_the_simulation(tmp_path, overrides):
    speeds = (0.25, 0.625, 1.125)
    grid = grid_of(tmp_path, *overrides, speeds=speeds)
    run, prediction = deployed(grid), simulated(grid, speeds)
    ours, theirs = (each.events[SAME].sort_values(["dispatched", "client"]) for each in (run, prediction))
    assert len(ours) == len(theirs)
    for column in SAME:
        if ours[column].dtype.kind == "f":
            np.testing.assert_allclose(ours[column], theirs[column], atol=1e-6, err_msg=column)
        else:
            assert ours[column].tolist() == theirs[column].tolist(), column
    assert difference(run.model, prediction.model) <= 1e-6
    assert run.metrics["distance"].tolist() == pytest.approx(prediction.metrics["distance"].tolist(), rel=1e-6)


UNBIASED = ["strategy=fedbuff", "strategy.weighting=samples", "strategy.staleness=constant"]


def unlike_the_simulation(name):
    """Whether a strategy is refused, or weighs by speeds: predicted ones there, measured ones here."""
    return name in ("known_probability", "rerce_clu", "fedfix", "async_fedavg", "dpsgd", "flower") or name.startswith(
        "dfed"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [each for each in sorted(choices("strategy", Path())) if not unlike_the_simulation(each)]
)
def test_every_strategy_that_can_be_deployed_is_its_simulation(tmp_path, name):
    speeds, steps = (0.25, 0.625, 1.125), []
    if name == "fedcompass":
        steps = ["strategy.least_steps=4", "strategy.most_steps=20"]
    grid = grid_of(tmp_path, f"strategy={name}", "cohort=2", "rounds=6", *steps, speeds=speeds)
    run, prediction = deployed(grid), simulated(grid, speeds)
    assert run.summary["outcomes"] == prediction.summary["outcomes"]
    assert difference(run.model, prediction.model) <= 1e-6


@pytest.mark.parametrize(
    "overrides", [["strategy=fedfix", "strategy.period=0.7071"], ["strategy=async_fedavg"], UNBIASED], ids=" ".join
)
def test_weights_by_speed_use_what_the_nodes_have_measured(tmp_path, overrides):
    speeds = (0.25, 0.625, 1.125)
    grid = grid_of(tmp_path, *overrides, "cohort=2", "rounds=6", speeds=speeds)

    def measured(asked, reply):
        if asked.metadata.message_type == INTRODUCE:
            said = reply.content["introduction"]
            said["seconds_per_gradient"] = speeds[said["client"]]
        return reply

    grid.tamper = measured
    run, prediction = deployed(grid), simulated(grid, speeds)
    assert run.events["arrived"].dropna().tolist() == pytest.approx(prediction.events["arrived"].dropna().tolist())
    assert difference(run.model, prediction.model) <= 1e-6


def test_what_clients_keep_at_their_nodes_is_what_they_keep_in_the_simulation(tmp_path):
    # A buffered result is used while its client is at work on the next one, which began without what it had made.
    speeds = (0.25, 0.625, 1.125)
    grid = grid_of(tmp_path, "strategy=fedbuff", "cohort=2", "rounds=6", "local.keep=true", speeds=speeds)
    seen, theirs = [], {}
    run = deployed(grid, observer=lambda deployment: seen.append(deployment))
    simulated(grid, speeds, observer=lambda sim: theirs.update(sim.kept("own")))
    assert set(theirs) == {0, 1, 2}
    for client, own in theirs.items():
        kept, member = Kept(grid.nodes[1000 + client].state), seen[-1].pool.members[client]
        kept.decide(member.accepted, member.undecided)
        assert torch.allclose(kept.committed()["own"], own, rtol=0, atol=1e-9)
        orders = [each.content["order"] for each in grid.pushed if each.metadata.message_type == WORK]
        told = [task for order in orders if order["client"] == client for task in order["accepted"]]
        used = run.events[(run.events["client"] == client) & (run.events["outcome"] == "applied")]
        assert set(told) | set(member.accepted) == set(used["task"])
