"""All that is touched of Flower beside its public interface, in one place: a test says when Flower changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import strategy_utils
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.checks import SimulationError

RUN = 1
"""The id of the one run there is."""

SERVER_NODE = 1
"""The server's id among Flower's nodes."""

ERRORS = {
    "offline": (ErrorCode.NODE_UNAVAILABLE, "the node is offline"),
    "dropped": (ErrorCode.NODE_UNAVAILABLE, "the node dropped out"),
    "interrupted": (ErrorCode.NODE_UNAVAILABLE, "the node went offline while it worked"),
    "failed": (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the client app raised an exception"),
    "deadline": (ErrorCode.MESSAGE_UNAVAILABLE, "the message's time to live is over"),
}
"""Flower's code and a reason for each way to lose a task."""


def error_reply(why: str, message: Message) -> Message:
    """The reply of Flower's kind to a message that nobody will answer.

    Args:
        why: the task was lost, a key of ``ERRORS``.
        message: what was asked.
    """
    code, reason = ERRORS[why]
    return Message(Error(code=code, reason=f"Error: {reason}"), reply_to=message)


def name_message(message: Message, name: str) -> None:
    """Give a message its id, which Flower leaves to its own server.

    Raises:
        SimulationError: if this version of Flower keeps ids elsewhere.
    """
    message.metadata.__dict__["_message_id"] = name
    if message.metadata.message_id != name:
        raise SimulationError("this version of flwr keeps message ids elsewhere; fedsim is tested with flwr 1.41")


@contextmanager
def server_identity() -> Iterator[None]:
    """Make messages that this process creates the server's, as Flower's own processes do once at their start."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SERVER_NODE
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def strategies_sleep(sleep: Callable[[float], None]) -> Iterator[None]:
    """Let Flower's strategies wait by ``sleep`` where they wait for nodes to connect."""
    with mock.patch.object(strategy_utils, "sleep", sleep):
        yield


def has_main(server: ServerApp) -> bool:
    """Whether a server app is one of the Message API: those of before bring threads that wait by a real clock."""
    return getattr(server, "_main", None) is not None


def empty_run() -> Run:
    """The run as a grid shows it: an id, and nothing that needs a server."""
    return Run.create_empty(RUN)
