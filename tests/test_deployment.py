from __future__ import annotations

import pytest

from fedsim.assemble import Assembly
from fedsim.flower.configuration import read_run_config
from tests.grids import deployed, grid_of


def simulated(grid, out):
    held = read_run_config(grid.run_config)
    return Assembly({**held.config, "out": str(out)}, held.choices).run()


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold_m"])
def test_two_rounds_on_nodes_give_the_simulated_model(tmp_path, strategy):
    grid = grid_of(tmp_path, f"strategy={strategy}")
    run = deployed(grid)
    prediction = simulated(grid, tmp_path / "simulated")
    assert run.summary["version"] == prediction.summary["version"] == 2
    assert difference(run.model, prediction.model) <= 1e-6
