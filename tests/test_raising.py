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


# ---- what is wrong in other ways -------------------------------------------------------------------


class Unspeakable(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError("bad str")


def finishing(what):
    class Finishing(fedsim.LocalSGD):
        def finish(self, ctx, x):
            if ctx.clients[0] == 3:
                return what(x)
            return super().finish(ctx, x)

    return Finishing


def unspeakable(x):
    raise Unspeakable


WRONG = {
    "none": (lambda x: None, "TypeError: the payload must be a dict of tensors, is a NoneType"),
    "list": (lambda x: [x], "TypeError: the payload must be a dict of tensors, is a list"),
    "number": (lambda x: {"delta": 3.0}, "n = 1 here, 'delta' is float"),
    "0-d": (lambda x: {"delta": x.sum()}, "n = 1 here, 'delta' is []"),
    "no stack": (lambda x: {"delta": x[0]}, "n = 1 here, 'delta' is [10]"),
    "unspeakable": (unspeakable, "raised Unspeakable: Unspeakable (client 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_whatever_client_code_gives_back_the_error_names_the_client(case):
    what, expected = WRONG[case]
    with pytest.raises(fedsim.SimulationError) as caught:
        raising(finishing(what), "fail")
    assert expected in str(caught.value)
    assert "(client 3, task " in str(caught.value)
    assert set(raising(finishing(what), "drop").events.query("outcome == 'failed'").client) == {3}


def test_a_lack_of_memory_ends_the_run_whatever_the_policy():
    # How much there is depends on the machine and on the group, and results must not.
    def hungry(x):
        raise MemoryError

    with pytest.raises(fedsim.SimulationError, match=r"Finishing raised MemoryError: out of memory.*client 3"):
        raising(finishing(hungry), "drop")


def test_what_a_rule_writes_to_itself_reaches_no_other_task():
    class Counting(fedsim.LocalSGD):
        count = 0

        def finish(self, ctx, x):
            self.count = self.count + 1
            return {"delta": x - ctx.start + self.count}

    class Always(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": x - ctx.start + 1}

    assert raising(Counting, "fail").manifest["model_sha256"] == raising(Always, "fail").manifest["model_sha256"]
