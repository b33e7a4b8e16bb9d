"""Client code that raises: named, and the end of the run or of the task, as the faults model says."""

from __future__ import annotations

import pytest

import fedsim
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import compute, faults, network


class Raising(fedsim.LocalSGD):
    """Clients 3 and 7 raise in their second step."""

    def direction(self, ctx, x, batch):
        if ctx.clients[0] in (3, 7) and ctx.step == 1:
            raise ZeroDivisionError("on purpose")
        return super().direction(ctx, x, batch)


class Measured(Raising):
    measured = True


def raising(rule, on_error, **more):
    slow = network.Constant(down=0.01, up=0.01, latency=0.0)
    system = fedsim.System(compute.Constant(mean=1.0), slow, faults=faults.Faults(on_error=on_error))
    stop = fedsim.Stop(updates=40)
    return fedsim.simulate(FedBuff(rule(steps=3)), fedsim.Quadratic(), system, stop=stop, clients=10, cohort=4, **more)


@pytest.mark.parametrize("rule", [Raising, Measured])
def test_the_error_names_strategy_rule_client_task_and_step(rule):
    with pytest.raises(fedsim.SimulationError) as caught:
        raising(rule, "fail")
    said = str(caught.value)
    assert said.startswith(f"FedBuff: {rule.__name__} raised ZeroDivisionError: on purpose (client ")
    assert "task " in said
    assert "local step 2)" in said


@pytest.mark.parametrize("rule", [Raising, Measured])
def test_dropped_failures_are_lost_before_the_upload_and_change_nothing_else(rule, tmp_path):
    run = raising(rule, "drop", out=tmp_path / "run")
    failed = run.events[run.events.outcome == "failed"]
    assert set(failed.client) == {3, 7}
    assert set(run.events[run.events.client.isin([3, 7])].outcome) <= {"failed", "pending"}
    assert run.summary["outcomes"]["failed"] == len(failed) > 1
    assert run.summary["updates"] == 40
    assert failed.arrived.isna().all()
    assert (failed.up_bytes == 0).all()
    assert (failed.down_bytes == 80).all()
    assert "a task is lost, FedBuff: " in (tmp_path / "run/run.log").read_text()
    # The client is busy until its result would have been there, then free for another task.
    again = run.events[run.events.client == failed.client.iloc[0]]
    assert (again.dispatched.diff().dropna() >= failed.computed.iloc[0] - failed.dispatched.iloc[0]).all()


def test_a_run_in_which_everybody_fails_ends():
    class Hopeless(fedsim.LocalSGD):
        def direction(self, ctx, x, batch):
            raise OSError("nowhere to go")

    with pytest.raises(fedsim.SimulationError, match="were all lost without one result"):
        raising(Hopeless, "drop")
