"""A Flower grid in the process of a test: nodes are contexts, and time is the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedsim.config import compose_run
from fedsim.flower.client_app import app
from fedsim.flower.configuration import read_run_config, run_config
from fedsim.flower.messages import WORK

NODE_UNAVAILABLE = 5


class Ticks:
    """A clock that goes only while somebody sleeps, who is woken when something happens."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.at: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        end = self.seconds + seconds
        self.seconds = min([end, *(at for at, _ in self.at)])
        due = [each for each in self.at if each[0] <= self.seconds]
        self.at = [each for each in self.at if each[0] > self.seconds]
        for _, what in due:
            what()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Call ``what`` when so many seconds have passed."""
        self.at.append((self.seconds + seconds, what))


@dataclass
class OneNode:
    """A node: what it was started with, and how many seconds it takes for a local step."""

    config: dict[str, Any]
    per_step: float = 0.0
    state: RecordDict = field(default_factory=RecordDict)


class TestGrid(Grid):
    """Nodes in this process, by id; their messages go through Flower's own serialisation."""

    __test__ = False

    def __init__(self, run_config: dict[str, Any], clock: Ticks, client_app: ClientApp = app) -> None:
        self.run_config, self.clock, self.client_app = run_config, clock, client_app
        self.nodes: dict[int, OneNode] = {}
        self.asked: dict[str, tuple[Message, float]] = {}
        self.pushed: list[Message] = []
        self.tamper: Callable[[Message, Message], Message] = lambda asked, reply: reply
        self._count = 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def add(self, node: int, per_step: float = 0.0, **config: Any) -> None:
        """Start a node."""
        self.nodes[node] = OneNode({key.replace("_", "-"): value for key, value in config.items()}, per_step)

    def remove(self, node: int) -> None:
        """Kill a node."""
        del self.nodes[node]

    # ---- Grid ----------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._count += 1
            name = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(message)
            took = self._takes(message)
            self.asked[name] = (message, self.clock() + took)
            if took:
                self.clock.later(took, lambda: None)
            ids.append(name)
        return ids

    def _takes(self, message: Message) -> float:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None or message.metadata.message_type != WORK:
            return 0.0
        return node.per_step * message.content["order"]["steps"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            if name not in self.asked:
                continue
            message, due = self.asked[name]
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is None:
                replies.append(Message(Error(NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message))
                del self.asked[name]
            elif due <= self.clock():
                del self.asked[name]
                replies.append(self.tamper(message, carried(self._answer(node, carried(message)))))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def _answer(self, node: OneNode, message: Message) -> Message:
        context = Context(1, message.metadata.dst_node_id, node.config, node.state, self.run_config)
        try:
            return self.client_app(message, context)
        except Exception as error:  # as a SuperNode does
            return Message(
                Error(2, f"Traceback (most recent call last):\n{type(error).__name__}: {error}"), reply_to=message
            )


def carried(message: Message) -> Message:
    """What comes out of Flower's serialisation at the other end."""
    objects = get_all_nested_objects(message)
    contents = {name: each.deflate() for name, each in objects.items()}
    other = inflate_object_from_contents(message.object_id, contents)
    other.metadata.__dict__["_message_id"] = message.metadata.message_id
    return other


SMALL = ("problem=least_squares", "clients=3", "cohort=3", "rounds=2", "local.batch_size=50", "local.lr=0.01",
         "network=none")  # fmt: skip
IMAGES = ("problem=classification", "problem.validation=0.02", "model.hidden=[8]", "partition=iid")


@lru_cache
def composed(*overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A small configuration; Hydra takes longer than the run."""
    return compose_run([*SMALL, *overrides], Path(__file__).parent)


def grid_of(
    tmp_path: Any, *overrides: str, speeds: tuple[float, ...] = (0.0, 0.0, 0.0), loader: str = "", **settings: Any
) -> TestGrid:
    """A grid for a small configuration, with a node of each speed (seconds per step), numbered from 1000."""
    config, choices = composed(*overrides)
    config = {**config, "out": str(tmp_path / "out")}
    grid = TestGrid(run_config(config, choices, loader, **{"poll_seconds": 0.1, **settings}), Ticks())
    for client, per_step in enumerate(speeds):
        grid.add(1000 + client, per_step, partition_id=client, num_partitions=len(speeds))
    return grid


def deployed(grid: TestGrid, **more: Any) -> Any:
    """The records of a deployment on a grid."""
    from fedsim.flower.deploying import deploy

    return deploy(grid, read_run_config(grid.run_config), clock=grid.clock, sleep=grid.clock.sleep, **more)
