"""The ``ClientApp`` of a deployment: ``fedsim.flower.client_app:app``."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("introduce")
def introduce(message: Message, context: Context) -> Message:
    """Say who this node is."""
    from fedsim.flower import node  # torch comes with it

    return node.introduce(message, context)


@app.train("work")
def work(message: Message, context: Context) -> Message:
    """Do one task."""
    from fedsim.flower import node

    return node.work(message, context)
