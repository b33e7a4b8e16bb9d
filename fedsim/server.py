"""What a server makes of the step that the clients' results ask for.

A strategy whose server adds a step to the model publishes ``fed.model + self.server(step)`` and takes ``server`` in its
constructor; what is chosen as ``server=...`` is then handed to it.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.checks import number


class PlainStep:
    """The model moves by the step itself. Others derive from this and may remember what has been."""

    def __call__(self, step: Tensor) -> Tensor:
        """What to add to the model, ``[d]``, called once for each model published.

        Args:
            step: ``[d]`` what the strategy alone would add, its rate included.
        """
        return step


class Momentum(PlainStep):
    """Heavy-ball momentum: ``v <- momentum v + step`` with ``v = 0`` at first, and the model moves by ``v``.

    A constant step moves the model by ``1 / (1 - momentum)`` times as much in the long run: lower the server's rate.

    Args:
        momentum: in [0, 1); 0 is :class:`PlainStep`.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = number("momentum", momentum, least=0, below=1)
        self.velocity: Tensor | float = 0.0

    def __call__(self, step: Tensor) -> Tensor:
        """``v``, for the strategy to keep."""
        self.velocity = self.momentum * self.velocity + step
        return self.velocity.clone()
