"""SCAFFOLD: control variates take the clients' drift out of their steps (Karimireddy et al. 2020, arXiv 1910.06378).

Objective   min_x 1 / N sum_i F_i(x)
Client i    y_0 = x^t;  y_{k+1} = y_k - eta_l (g_i(y_k) - c_i + c), K_i steps;  Delta_i = y_K - x^t
            option I    c_i^+ = grad F_i(x^t), one pass over all its data
            option II   c_i^+ = c_i - c + (x^t - y_K) / (K_i eta_l), which is 1 / K_i sum_k g_i(y_k)
Server      x^{t+1} = x^t + eta_g / |S| sum_{i in S} Delta_i;  c <- c + 1 / N sum_{i in S} (c_i^+ - c_i)
            then c_i <- c_i^+ for i in S, so c is always the mean of all c_i
State       d on every client that has taken part (c_i), 2 d on the server (x, c); all c_i and c begin at 0
Traffic     2 d down (x, c), 2 d up (Delta_i, c_i^+ - c_i) per client and round. With option II the server could
            work the second one out if it held a copy of every c_i.
Defaults    option II, eta_g = 1, as in the paper's experiments
Departures  option II takes the mean of the gradients itself, which stays right with momentum, weight decay, clipping or
            a proximal term in the local steps; these come after the correction. Clients count alike in the mean,
            whatever data they hold. The virtual clock does not count option I's pass over the data. A client's c_i
            changes only if its result was used: who is late or lost keeps the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim import (
    Context,
    ControlVariateSGD,
    Federation,
    LocalSGD,
    PlainStep,
    Reply,
    Synchronous,
    Task,
    mean_update,
    number,
    one_of,
    weighted_sum,
)


@dataclass
class ScaffoldSteps(ControlVariateSGD):
    """Local steps along the corrected gradient.

    Args:
        option: ``"I"`` or ``"II"``, how a client's control variate is made.
    """

    option: str = "II"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.option = one_of("option", self.option, ("I", "II"))

    def begin(self, ctx: Context) -> None:
        """Option I: the whole gradient at the server's model."""
        super().begin(ctx)
        if self.option == "I":
            self.at_server_model = ctx.grad(ctx.start)

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """g_i(y) - c_i + c."""
        return self.counted_gradient(ctx, x, batch) - ctx.state["control"] + ctx.message["control"]

    def new_control(self, ctx: Context) -> Tensor:
        """c_i^+ by the option chosen."""
        return self.at_server_model if self.option == "I" else super().new_control(ctx)


class Scaffold(Synchronous):
    """FedAvg whose clients correct every step by what they know of the others' gradients."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        option: str = "II",
        server_lr: float = 1.0,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        rule = ScaffoldSteps.around(local, option=option)
        super().__init__(rule, over_selection, deadline, selection, stragglers, server=server)
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """c = 0."""
        self.control = fed.layout.zeros()

    def message(self, fed: Federation, task: Task) -> dict[str, Tensor]:
        """c."""
        return {"control": self.control}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """c <- c + 1 / N sum_i (c_i^+ - c_i);  x^t + eta_g mean_i Delta_i."""
        changes = [reply["control_change"] for reply in replies]
        self.control = self.control + weighted_sum(changes, [1 / fed.clients] * len(changes))
        return fed.model + self.server(self.server_lr * mean_update(replies, "uniform"))
