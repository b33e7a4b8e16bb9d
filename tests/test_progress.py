"""How far a run is, as it says itself and as it is seen from outside."""

from __future__ import annotations

import pytest

import fedsim
from fedsim import progress
from fedsim.flower import following
from fedsim.strategies.fedavg import FedAvg


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({"rounds": 10, "time_limit": None, "updates": 40, "bytes": None}, 0.5),
        ({"rounds": 10, "time_limit": 4.0, "updates": 40, "bytes": None}, 0.75),
        ({"rounds": 10, "time_limit": 4.0, "updates": 40, "bytes": 1000}, 0.9),
        ({"rounds": None, "time_limit": None, "updates": 19, "bytes": None}, 1.0),
        ({"rounds": None, "time_limit": None, "updates": None, "bytes": None}, 0.0),
    ],
)
def test_the_nearest_limit_says_how_far_a_run_is(limits: dict[str, float | None], share: float) -> None:
    row = {"round": 3, "time": 3.0, "updates": 20, "up_bytes": 300, "down_bytes": 600}
    assert following.done(row, limits) == share


def test_a_run_is_as_far_from_outside_as_it_says_itself() -> None:
    said: dict[int, float] = {}

    def note(sim: fedsim.Federation) -> None:
        said[sim.round] = progress.done(sim)

    stop = fedsim.Stop(rounds=8, updates=25)
    run = fedsim.simulate(FedAvg(), fedsim.Quadratic(), stop=stop, clients=10, cohort=4, observer=note)
    seen = {int(row["round"]): following.done(row, vars(stop)) for _, row in run.metrics.iterrows()}
    assert seen[3] == 12 / 25
    assert {round: said[round] for round in seen if round} == {round: share for round, share in seen.items() if round}
