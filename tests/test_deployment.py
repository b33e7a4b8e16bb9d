from __future__ import annotations

import numpy as np
import pytest

import fedsim
from fedsim.assemble import Assembly
from fedsim.flower.configuration import read_run_config
from tests.grids import deployed, grid_of
from tests.support import Given

SAME = ["client", "job", "tag", "dispatched", "arrived", "version", "applied_version", "steps", "samples",
        "down_bytes", "up_bytes", "outcome"]  # fmt: skip


def assembled(grid):
    held = read_run_config(grid.run_config)
    return Assembly({**held.config, "out": None}, held.choices)


def simulated(grid, speeds):
    parts = assembled(grid)
    system = fedsim.System(Given(*speeds))
    return fedsim.simulate(
        parts.strategy, parts.problem, system, stop=parts.stop, clients=parts.clients, cohort=parts.cohort
    )


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold_m"])
def test_two_rounds_on_nodes_give_the_simulated_model(tmp_path, strategy):
    grid = grid_of(tmp_path, f"strategy={strategy}")
    run = deployed(grid)
    prediction = simulated(grid, (1.0, 1.0, 1.0))
    assert run.summary["version"] == prediction.summary["version"] == 2
    assert difference(run.model, prediction.model) <= 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=fedavg", "cohort=2", "rounds=5"],
        ["strategy=fedavg", "cohort=2", "rounds=5", "strategy.over_selection=1.5", "strategy.stragglers=late"],
        ["strategy=fedavg", "rounds=4", "strategy.deadline=30"],
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
    assert run.metrics["accuracy"].tolist() == pytest.approx(prediction.metrics["accuracy"].tolist(), abs=1e-6)
