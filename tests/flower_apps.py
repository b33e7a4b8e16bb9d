"""Flower apps the tests are made of: ordinary ServerApps and ClientApps."""

from __future__ import annotations

import random

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import fedsim
from fedsim.flower.simulated import App, FlowerApp
from fedsim.flower.simulated.clients import FIRST_NODE
from fedsim.rng import Randomness
from fedsim.system import compute


def arrays(**named):
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in named.items()})


def serving(main):
    """A ServerApp of a function of the grid alone."""
    app = ServerApp()

    @app.main()
    def _(grid, context):
        main(grid)

    return app


def starting(strategy, rounds=3, first=None, **settings):
    """A ServerApp that runs one of Flower's strategies; ``strategy()`` makes it, for it keeps state."""
    first = {"x": np.zeros(4)} if first is None else first

    def main(grid):
        strategy().start(grid=grid, initial_arrays=arrays(**first), num_rounds=rounds, **settings)

    return serving(main)


def answering(examples=32, work=None):
    """A ClientApp that sends back what it got plus 1, or what ``work(message, context)`` makes of the arrays."""
    app = ClientApp()

    @app.train()
    def _(message, context):
        if work is None:
            made = arrays(**{name: each.numpy() + 1 for name, each in message.content["arrays"].items()})
        else:
            made = work(message, context)
        metrics = MetricRecord({"num-examples": examples, "train_loss": float(context.node_config["partition-id"])})
        return Message(RecordDict({"arrays": made, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def _(message, context):
        x = message.content["arrays"]["x"].numpy()
        metrics = MetricRecord({"num-examples": examples, "acc": float(x.mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def drawing():
    """A ClientApp that draws from all three global generators, and remembers how often it was asked."""

    def work(message, context):
        state = context.state.metric_records.setdefault("mine", MetricRecord({"times": 0}))
        state["times"] += 1
        shift = random.gauss(0, 1) + np.random.normal(size=4) + torch.randn(4).numpy()
        return arrays(x=message.content["arrays"]["x"].numpy() + shift / state["times"])

    return answering(work=work)


def to(client, content=None, kind="train", **settings):
    """A message to a client, with a model of four numbers unless told otherwise."""
    content = RecordDict({"arrays": arrays(x=np.zeros(4)), "config": ConfigRecord()}) if content is None else content
    return Message(content, FIRST_NODE + client, kind, **settings)


def asker(message):
    return message.metadata.src_node_id - FIRST_NODE


def flower(server, client=None, stop=None, system=None, run_config=None, costs=None, **more):
    """A run of an app on devices that take 1 s a step unless told otherwise; ``server`` may be a function of a grid."""
    server = server if isinstance(server, ServerApp) else serving(server)
    strategy = FlowerApp(App(server, client or answering(), run_config), **(costs or {}))
    parts = {"compute": compute.Constant(mean=1.0), **(system or {})}
    return fedsim.simulate(
        strategy, system=fedsim.System(**parts), stop=stop or fedsim.Stop(rounds=100), **{"clients": 4, **more}
    )


class SameSteps:
    """A ClientApp's ``work`` that takes the same local steps on the same batches as fedsim's clients, on its own.

    Args:
        problem: prepared as fedsim's own run prepares it; gives gradients and sample counts only.
    """

    def __init__(self, problem, seed, lr, batch_size, epochs):
        self.problem, self.randomness = problem, Randomness(seed)
        self.lr, self.batch_size, self.epochs = lr, batch_size, epochs

    def __call__(self, message, context):
        client = context.node_config["partition-id"]
        counts = context.state.metric_records.setdefault("tasks", MetricRecord({"begun": 0}))
        nth, counts["begun"] = counts["begun"], counts["begun"] + 1
        model = message.content["arrays"]
        x = self.problem.layout.join({name: torch.from_numpy(each.numpy().copy()) for name, each in model.items()})
        for epoch in range(self.epochs):
            order = self.randomness("batches", client, nth, epoch).permutation(int(self.problem.samples[client]))
            for batch in torch.from_numpy(order).split(self.batch_size):
                x -= self.lr * self.problem.gradient(x, client, batch, 0)
        return arrays(**{name: each.numpy() for name, each in self.problem.layout.split(x).items()})

    def app(self):
        app = ClientApp()

        @app.train()
        def _(message, context):
            held = int(self.problem.samples[context.node_config["partition-id"]])
            content = {"arrays": self(message, context), "metrics": MetricRecord({"num-examples": held})}
            return Message(RecordDict(content), reply_to=message)

        return app
