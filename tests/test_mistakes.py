"""Mistakes of a strategy or a rule: each has a clear error, and none reaches what others work from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import Hooks, apply, simulate, tiny

import fedsim
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system import compute, network

EVERY_STRATEGY = [FedAvg, FedAsync, FedBuff]


# ---- mistakes of a strategy ----------------------------------------------------------------------

BAD_DISPATCHES = {
    "busy": (lambda fed: (fed.dispatch(1), fed.dispatch(1)), "client 1 has a task already"),
    "twice in one call": (lambda fed: fed.dispatch([0, 2, 0]), "client 0 has a task already"),
    "unknown client": (lambda fed: fed.dispatch([0, 4]), "clients are 0 to 3"),
    "server": (lambda fed: fed.dispatch(fedsim.SERVER), "clients are 0 to 3"),
    "unknown job": (lambda fed: fed.dispatch(0, job="tune"), "no job 'tune'"),
    "negative steps": (lambda fed: fed.dispatch(0, steps=-1), "steps=-1"),
    "steps for others": (lambda fed: fed.dispatch([0, 1], steps=[1, 2, 3]), "shape|broadcast"),
    "wrong start": (lambda fed: fed.dispatch([0, 1], start=torch.zeros(3, 10)), "start has shape"),
    "unknown task": (lambda fed: fed.cancel(17), "task 17 is not in flight"),
    "timer in the past": (lambda fed: fed.timer(-1.0), "already"),
    "unknown node": (lambda fed: fed.send(0, 9, x=torch.zeros(1)), "no node 9"),
}


@pytest.mark.parametrize("mistake", BAD_DISPATCHES)
def test_a_wrong_request_is_refused(mistake):
    act, expected = BAD_DISPATCHES[mistake]
    with pytest.raises(ValueError, match=expected):
        simulate(Hooks(start=lambda self, fed: act(fed)), fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=4)


def test_a_refused_dispatch_leaves_no_trace():
    def start(self, fed):
        with pytest.raises(ValueError, match="client 1 has a task"):
            fed.dispatch([0, 1, 1])
        assert (fed.in_flight, fed.busy.any()) == (0, False)
        fed.dispatch([0, 1])

    run = simulate(Hooks(start=start, on_reply=apply), fedsim.Stop(updates=2), clients=2)
    assert run.events.task.tolist() == [0, 1]


BAD_REPLIES = {
    "used twice": (lambda fed, r: (fed.publish(fed.model, [r]), fed.publish(fed.model, [r])), "used or rejected"),
    "used twice at once": (lambda fed, r: fed.publish(fed.model, [r, r]), "used or rejected"),
    "used and rejected": (lambda fed, r: (fed.publish(fed.model, [r]), fed.reject(r, "no")), "used or rejected"),
    "rejected and used": (lambda fed, r: (fed.reject(r, "no"), fed.publish(fed.model, [r])), "used or rejected"),
    "cancelled": (lambda fed, r: fed.cancel(r.task.id), "not in flight"),
    "wrong shape": (lambda fed, r: fed.publish(fed.model[:-1], [r]), r"shape \(9,\), needs \[10\]"),
    "not a number": (lambda fed, r: fed.publish(fed.model * torch.nan, [r]), "non-finite"),
    "infinite": (lambda fed, r: fed.publish(fed.model + torch.inf, [r]), "non-finite"),
}


@pytest.mark.parametrize("mistake", BAD_REPLIES)
def test_a_wrong_use_of_a_reply_is_refused(mistake):
    act, expected = BAD_REPLIES[mistake]
    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=lambda self, fed, reply: act(fed, reply))
    with pytest.raises((ValueError, fedsim.SimulationError), match=expected):
        simulate(strategy, fedsim.Stop(rounds=2), fedsim.Quadratic(), clients=4, cohort=1)


def test_a_model_that_only_overflows_in_its_own_precision_is_refused(tmp_path):
    def on_reply(self, fed, reply):
        fed.publish(torch.full((fed.layout.size,), 1e300, dtype=torch.float64), used=[reply])

    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=on_reply)
    with pytest.raises((ValueError, fedsim.SimulationError), match="non-finite"):
        simulate(strategy, fedsim.Stop(updates=1), tiny(tmp_path, 5, 2), clients=2)


def test_publishing_from_nothing_makes_no_version():
    def on_reply(self, fed, reply):
        fed.publish(fed.model + 1, used=[])
        self.log.append((fed.version, fed.model.sum().item()))
        fed.reject(reply, "no need")

    strategy = Hooks(start=lambda self, fed: fed.dispatch(0), on_reply=on_reply)
    run = simulate(strategy, fedsim.Stop(updates=1), fedsim.Quadratic(), clients=1)
    assert strategy.log == [(0, 0.0)]
    assert run.events.outcome.tolist() == ["rejected"]


# ---- mistakes of a rule --------------------------------------------------------------------------


class Sick(fedsim.LocalSGD):
    """Client 1 sends something else than it should."""

    how = staticmethod(lambda payload: payload)

    def finish(self, ctx, x):
        payload = super().finish(ctx, x)
        return type(self).how(payload) if ctx.clients[0] == 1 else payload


SICKNESSES = {
    "nan": lambda payload: {"delta": payload["delta"] * torch.nan},
    "one infinity": lambda payload: {"delta": payload["delta"].index_fill(1, torch.tensor([3]), torch.inf)},
    "too short": lambda payload: {"delta": payload["delta"][:, :-1]},
    "float32": lambda payload: {"delta": payload["delta"].float()},
    "another name": lambda payload: {"gradient": payload["delta"]},
    "nothing": lambda payload: {},
    "too much": lambda payload: {**payload, "extra": payload["delta"]},
}


@pytest.mark.parametrize("sickness", SICKNESSES)
def test_a_malformed_result_is_rejected_counted_and_never_averaged(sickness):
    class Ill(Sick):
        how = staticmethod(SICKNESSES[sickness])

    class Listener(FedAvg):
        def __init__(self, local):
            super().__init__(local, "uniform")
            self.heard = []

        def on_lost(self, fed, task, why):
            super().on_lost(fed, task, why)
            self.heard.append((fed.now, task.client, why))

    strategy, problem = Listener(Ill(lr=0.1, steps=1)), fedsim.Quadratic()
    run = simulate(strategy, fedsim.Stop(rounds=2), problem, clients=3, cohort=3)
    assert run.summary["outcomes"] == {"applied": 4, "pending": 3, "rejected": 2}
    assert strategy.heard == [(1.0, 1, "rejected"), (2.0, 1, "rejected")]
    assert run.summary["updates"] == 6  # it was received: a run of sick clients ends
    x = torch.zeros(10, dtype=torch.float64)
    for _ in range(2):
        x = x - 0.1 * (problem.gradient(x, 0, None, 0) + problem.gradient(x, 2, None, 0)) / 2
    assert torch.allclose(run.model["x"], x, rtol=0, atol=1e-14)


def test_a_run_of_nothing_but_sick_clients_ends():
    class Hopeless(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": x * torch.nan}

    for kind in (FedAvg, FedBuff):
        run = simulate(kind(Hopeless(steps=1)), fedsim.Stop(rounds=3), fedsim.Quadratic(), clients=6, cohort=2)
        assert run.summary["outcomes"]["rejected"] == 6
        assert run.summary["version"] == 0


def test_a_rule_that_raises_is_named_with_client_task_and_step():
    class Clumsy(fedsim.LocalSGD):
        def direction(self, ctx, x, batch):
            if ctx.clients[0] == 2 and ctx.step == 3:
                raise KeyError("momentum")
            return super().direction(ctx, x, batch)

    expected = r"Clumsy raised KeyError: 'momentum' \(client 2, task 2, job 'train', local step 4\)"
    with pytest.raises(fedsim.SimulationError, match=expected):
        simulate(FedAvg(Clumsy(steps=5)), fedsim.Stop(rounds=2), fedsim.Quadratic(), clients=3, cohort=3)


# ---- a strategy that writes to whatever it gets its hands on -------------------------------------


class Pulled(fedsim.LocalSGD):
    """Uses its message, and writes to all it was handed when it is done with it."""

    def direction(self, ctx, x, batch):
        return super().direction(ctx, x, batch) - ctx.message["pull"]

    def finish(self, ctx, x):
        payload = {"delta": x - ctx.start}
        ctx.start.fill_(77.0)
        ctx.message["pull"].fill_(77.0)
        return payload


class Tidy(fedsim.Strategy):
    """Asynchronous; starts half of its tasks from a vector of its own, and sends one along."""

    vandal = False

    def __init__(self):
        super().__init__(Pulled(lr=0.1, steps=2))
        self.pull = torch.ones(10, dtype=torch.float64)

    def message(self, fed, task):
        return {"pull": self.pull}

    def on_reply(self, fed, reply):
        base, delta = fed.model, reply["delta"]
        new = base + 0.5 * delta
        fed.publish(new, used=[reply])
        fed.send(0, 1, x=new)
        self.spoil(base, delta, new, reply.payload["delta"])

    def on_message(self, fed, src, dst, payload, tag):
        self.heard = payload["x"].sum().item()

    def settle(self, fed):
        idle = fed.idle()
        vector = fed.model * 0.9
        if len(idle):
            fed.dispatch(idle[:1], start=vector)
            fed.dispatch(idle[1:])
        self.spoil(vector, fed.model)
        self.pull = torch.full((10,), 1.0 + fed.version, dtype=torch.float64)
        if self.vandal and len(idle):
            fed.timer(fed.now + 1e-9, "spoil what has just been sent")

    def on_timer(self, fed, timer):
        self.sent = self.pull
        self.pull = self.pull.clone()
        self.spoil(self.sent)

    def views(self, fed):
        return {"global": fed.model}

    def spoil(self, *tensors):
        if self.vandal:
            for tensor in tensors:
                tensor.fill_(1e6)


class Vandal(Tidy):
    vandal = True

    def start(self, fed):
        for array in (fed.samples, fed.busy, fed.online):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0


def test_a_strategy_that_writes_to_what_it_was_handed_changes_nothing():
    def run(strategy):
        return simulate(
            strategy,
            fedsim.Stop(updates=60),
            fedsim.Quadratic(),
            compute=compute.Lognormal(),
            network=network.Constant(down=0.01, latency=0.001),
            clients=6,
            cohort=6,
        )

    tidy, vandal = run(Tidy()), run(Vandal())
    assert tidy.manifest["events_sha256"] == vandal.manifest["events_sha256"]
    assert tidy.manifest["model_sha256"] == vandal.manifest["model_sha256"]
    assert torch.isfinite(tidy.model["x"]).all()


def test_one_buffer_filled_anew_for_every_message_reaches_every_client_as_it_was():
    class Reusing(Hooks):
        def message(self, fed, task):
            self.buffer = getattr(self, "buffer", torch.zeros(1, dtype=torch.float64))
            self.buffer.fill_(task.client)
            return {"number": self.buffer}

    class Echo(fedsim.LocalSGD):
        def payload_spec(self, layout):
            return {"number": fedsim.TensorSpec((1,), torch.float64)}

        def finish(self, ctx, x):
            return {"number": ctx.message["number"]}

    strategy = Reusing(
        Echo(steps=1),
        start=lambda self, fed: fed.dispatch([0, 1, 2]),
        on_reply=lambda self, fed, reply: self.log.append((reply.client, reply["number"].item())),
    )
    simulate(strategy, fedsim.Stop(updates=3), fedsim.Quadratic(), clients=3)
    assert strategy.log == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_message_sent_is_the_message_as_it_was_when_sent():
    letter = torch.ones(3)

    def start(self, fed):
        fed.send(fedsim.SERVER, 0, x=letter)
        letter.fill_(5.0)

    class Reader(Hooks):
        def on_message(self, fed, src, dst, payload, tag):
            self.log.append(payload["x"].tolist())
            fed.stop("read")

    strategy = Reader(start=start)
    simulate(strategy, fedsim.Stop(rounds=1), fedsim.Quadratic(), clients=2)
    assert strategy.log == [[1.0, 1.0, 1.0]]


def test_starting_vectors_are_one_for_all_or_one_each():
    starts = torch.arange(30, dtype=torch.float64).reshape(3, 10)

    class Echo(fedsim.LocalSGD):
        def finish(self, ctx, x):
            return {"delta": ctx.start}

    def start(self, fed):
        fed.dispatch([2, 0, 1], start=starts)
        fed.dispatch([3, 4], start=starts[1])
        starts.fill_(-1.0)

    expected = {2: 0.0, 0: 10.0, 1: 20.0, 3: 10.0, 4: 10.0}
    strategy = Hooks(
        Echo(steps=1), start=start, on_reply=lambda self, fed, r: self.log.append((r.client, r["delta"][0].item()))
    )
    simulate(strategy, fedsim.Stop(updates=5), fedsim.Quadratic(), clients=5)
    assert dict(strategy.log) == expected


@pytest.mark.parametrize("kind", EVERY_STRATEGY)
def test_local_rules_cannot_spoil_each_others_start(kind):
    class Rough(fedsim.LocalSGD):
        def run(self, ctx):
            payload = super().run(ctx)
            payload = {name: tensor.clone() for name, tensor in payload.items()}
            ctx.start.fill_(1e9)
            return payload

    runs = [
        simulate(kind(rule(lr=0.1)), fedsim.Stop(rounds=5), fedsim.Quadratic(), clients=8, cohort=4)
        for rule in (fedsim.LocalSGD, Rough)
    ]
    assert runs[0].manifest["model_sha256"] == runs[1].manifest["model_sha256"]


class Numbered(fedsim.LocalSGD):
    """Sends back the number it was sent."""

    def finish(self, ctx, x):
        return {"delta": 0 * x + ctx.message["number"]}


@pytest.mark.parametrize("way", ["numpy", "data"])
def test_message_buffers_changed_behind_torchs_back_reach_every_client_as_they_were(way):
    buffer = np.zeros(1)
    tensor = torch.from_numpy(buffer)

    def message(self, fed, task):
        if way == "numpy":
            buffer[0] = task.client
        else:
            tensor.data.fill_(task.client)
        return {"number": tensor}

    def on_reply(self, fed, reply):
        assert set(reply["delta"].tolist()) == {float(reply.client)}
        self.log.append(reply.client)

    strategy = Hooks(
        Numbered(steps=1), start=lambda self, fed: fed.dispatch(range(15)), message=message, on_reply=on_reply
    )
    simulate(strategy, fedsim.Stop(updates=15), problem=fedsim.Quadratic(), clients=15, cohort=15)
    assert sorted(strategy.log) == list(range(15))
