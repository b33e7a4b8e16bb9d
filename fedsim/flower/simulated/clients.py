"""The nodes of a federation: each answers messages with the ClientApp, and keeps its Context from one to the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError, SimulationError, TaskError, number, optional_whole, said, whole
from fedsim.flower.simulated.arrays import ByteLayout, message_bytes
from fedsim.flower.simulated.internals import RUN
from fedsim.flower.simulated.process_state import seeded
from fedsim.local import MOST, LocalSGD, TensorSpec
from fedsim.rng import Randomness
from fedsim.training import Result, SelfTrained, Sizes, Trainer, Work
from fedsim.vectors import Layout

FIRST_NODE = 10**9
"""Client ``i`` is Flower's node ``FIRST_NODE + i``: the number shows who it is, and is not the server's."""

EXAMPLES = "num-examples"
"""What clients report their number of examples as, in Flower's own strategies and templates."""


@dataclass
class AnswerMessage(LocalSGD):
    """The client's half: whatever the ClientApp does with a message. How long that takes shows in its reply."""

    measured = True

    def local_steps(self, clients: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Unknown before the reply is there: 0, ``[k]``."""
        return np.zeros(len(clients), dtype=np.int64)

    def payload_spec(self, layout: Layout) -> dict[str, TensorSpec]:
        """No tensors: the reply is Flower's."""
        return {}


class Cost:
    """How many local steps a message costs its client, from what the reply says.

    A training message costs ``local_steps`` or, without that, ``epochs * ceil(num-examples / batch_size)``. An
    evaluation costs ``ceil(evaluate_cost * ceil(num-examples / batch_size))``, nothing if it reports no number and
    ``local_steps`` is given. Queries cost nothing.

    Args:
        batch_size: examples in a local step.
        epochs: passes over a client's examples in a training message.
        local_steps: of a training message, whatever the client reports.
        evaluate_cost: what a step of evaluation costs, in training steps: a forward pass is about a third of them.
    """

    def __init__(
        self, batch_size: int = 32, epochs: int = 1, local_steps: int | None = None, evaluate_cost: float = 1 / 3
    ) -> None:
        self.batch_size = whole("batch_size", batch_size, least=1, most=MOST)
        self.epochs = whole("epochs", epochs, least=1, most=10**6)
        self.local_steps = optional_whole("local_steps", local_steps, most=MOST)
        self.evaluate_cost = number("evaluate_cost", evaluate_cost, least=0, most=1000)

    def of(self, reply: Message) -> tuple[int, int]:
        """Local steps of the message that ``reply`` answers, and training examples worked through.

        Raises:
            SimulationError: if the reply had to say how many examples the client has, and does not.
        """
        kind = reply.metadata.message_type.partition(".")[0]
        if kind not in ("train", "evaluate") or reply.has_error():
            return 0, 0
        examples = _reported_examples(reply)
        if examples is None and self.local_steps is None:
            raise SimulationError(
                f"strategy.local_steps=null: must be given, a client's reply to '{kind}' reports no '{EXAMPLES}' to "
                "count its steps by"
            )
        examples = examples or 0
        batches = -(-examples // self.batch_size)
        if kind == "evaluate":
            return math.ceil(round(self.evaluate_cost * batches, 9)), 0
        steps = self.epochs * batches if self.local_steps is None else self.local_steps
        return steps, self.epochs * examples


def _reported_examples(reply: Message) -> int | None:
    found = [record[EXAMPLES] for record in reply.content.metric_records.values() if EXAMPLES in record]
    if not found or isinstance(found[0], list) or not 0 <= found[0] <= MOST:
        return None
    return round(found[0])


class Nodes:
    """All clients of a run.

    Args:
        run_config: the app's settings.
        cost: how many local steps a message costs.
    """

    def __init__(self, run_config: Mapping[str, Any], cost: Cost) -> None:
        self.run_config, self.cost = dict(run_config), cost
        self.client_app: ClientApp
        """Set before the first message."""
        self.clients = 0
        self.asked: dict[int, Message] = {}
        """What each task under way is to answer, by its id."""
        self.answered: dict[int, tuple[Message, RecordDict]] = {}
        """By task: the reply, and the client's state after it."""
        self.examples: dict[int, int] = {}
        """Training examples worked through in its newest training task, by client."""
        self._states: dict[int, RecordDict] = {}

    def context(self, client: int) -> Context:
        """What the ClientApp is told of where it runs, with a copy of what it kept there."""
        return Context(
            run_id=RUN,
            node_id=FIRST_NODE + client,
            node_config={"partition-id": client, "num-partitions": self.clients},
            state=copy.deepcopy(self._states.get(client, RecordDict())),
            run_config=dict(self.run_config),
        )

    def answer(self, work: Work, randomness: Randomness) -> Result:
        """Let a client work on a task's message, with global seeds of its own.

        Its state is kept once the reply arrives: a task that is lost leaves no trace.
        """
        message = self.asked[work.task]
        down = message_bytes(message)
        context = self.context(work.client)
        try:
            with seeded(randomness("flower client", work.client, work.nth)):
                reply = self.client_app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"it returned a {type(reply).__name__} instead of a Message")
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("it returned a Message that is no reply to the one it got")
            reply = copy.deepcopy(reply)  # what the client keeps of it, it may go on changing
        except (Exception, SystemExit) as error:
            return Result({}, {}, 0, error=self._failure(work, error), sizes=Sizes(0, down, 0))
        steps, examples = self.cost.of(reply)
        if work.job == "train":
            self.examples[work.client] = examples
        self.answered[work.task] = reply, context.state
        return Result({}, {}, steps, finite=True, sizes=Sizes(examples, down, message_bytes(reply)))

    def _failure(self, work: Work, error: BaseException) -> TaskError:
        fatal = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        text = (
            f"the client app raised {type(error).__name__}: {said(error)} "
            f"(client {work.client}, task {work.task}, '{work.job}')"
        )
        failure = TaskError(text, work.task, fatal)
        failure.__cause__ = error
        return failure

    def collect(self, task: int, client: int) -> Message:
        """The reply of a task that has arrived; what its client keeps is kept from now on."""
        del self.asked[task]
        reply, self._states[client] = self.answered.pop(task)
        return reply

    def forget(self, task: int) -> Message:
        """What a lost task was asked; it leaves no trace."""
        self.answered.pop(task, None)
        return self.asked.pop(task)


class AppTrainer(Trainer):
    """Lets nodes answer, one after another."""

    def __init__(self, nodes: Nodes, randomness: Randomness) -> None:
        self.nodes, self.randomness = nodes, randomness

    def train(self, group: Sequence[Work]) -> list[Result]:
        """The results of a group: sizes and steps; replies lie with the nodes."""
        return [self.nodes.answer(work, self.randomness) for work in group]


class AppProblem(SelfTrained):
    """What an app learns is its own affair: nothing of it is known here but its clients' replies.

    Args:
        nodes: the clients.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.layout = ByteLayout()

    def prepare(self, clients: int, randomness: Randomness) -> None:
        """Tell the nodes how many they are."""
        self.clients = self._nodes.clients = clients
        self.samples = np.ones(clients, dtype=np.int64)  # that each has some

    def initial(self) -> Tensor:
        """Nothing: the app brings its model at its first message."""
        return self.layout.zeros()

    def gradient(self, x: Tensor, client: int, batch: Tensor | None, noise: int) -> Tensor:
        """There is none to be had.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("problem: a Flower app has no gradients to give, only its own strategies can learn it")

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Nothing: metrics are what the app reports."""
        return {}

    def trainer(self, randomness: Randomness, device: torch.device) -> AppTrainer:
        """The nodes.

        Raises:
            ConfigError: if the device is none of ours to choose.
        """
        if device.type != "cpu":
            raise ConfigError(f"device={device.type}: a Flower app chooses its own device; leave pool.device=cpu")
        return AppTrainer(self._nodes, randomness)

    def client_table(self) -> dict[str, NDArray[Any]]:
        """``samples``: training examples of each client's newest training message; 0 if there was none."""
        held = [self._nodes.examples.get(client, 0) for client in range(self.clients)]
        return {"samples": np.array(held, dtype=np.int64)}
