"""SCAFFOLD-M: control variates and the mean local step together (Cheng et al. 2024, arXiv 2306.16504, Algorithm 2).

Objective   min_x 1 / N sum_i F_i(x)
Client i    x_0 = x^t;  x_{k+1} = x_k - eta (beta (g_i(x_k) - c_i + c) + (1 - beta) g^t), K_i steps;
            Delta_i = x_K - x^t;  c_i^+ = 1 / K_i sum_k g_i(x_k)
Server      g^{t+1} = - sum_{i in S} Delta_i / (eta sum_{i in S} K_i);  c <- c + 1 / N sum_{i in S} (c_i^+ - c_i);
            x^{t+1} = x^t - gamma g^{t+1},  gamma = eta_g eta (mean of K_i),  that is x^t + eta_g / |S| sum_i Delta_i
State       d on every client that has taken part (c_i), 3 d on the server (x, c, g); all but x begin at 0
Traffic     2 d down (x, beta c + (1 - beta) g), 2 d up (Delta_i, c_i^+ - c_i) per client and round. The server could
            work the second one out if it held a copy of every c_i.
Defaults    beta = 0.1, as in released code of FedCM (arXiv 2106.10874); the paper tunes it. eta_g = 1.
Departures  clients may make different numbers of steps; the paper's gamma is given by eta_g. Local momentum, weight
            decay and proximal term are refused: each would come back with g in every round. With beta = 1 it is
            SCAFFOLD.
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
    Reply,
    Synchronous,
    Task,
    mean_direction,
    mean_update,
    number,
    weighted_sum,
)


@dataclass
class ScaffoldMomentumSteps(ControlVariateSGD):
    """Corrected local steps that go on in the direction of all clients' last ones.

    Args:
        beta: weight of the client's own corrected gradient.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = number("beta", self.beta, above=0, most=1)
        self.refuse_own("momentum", "weight_decay", "prox")

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """beta (g_i(x) - c_i) + (beta c + (1 - beta) g^t)."""
        return self.beta * (self.counted_gradient(ctx, x, batch) - ctx.state["control"]) + ctx.message["correction"]


class ScaffoldMomentum(Synchronous):
    """SCAFFOLD with the server's direction in every local step."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        beta: float = 0.1,
        server_lr: float = 1.0,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        rule = ScaffoldMomentumSteps.around(local, beta=beta)
        super().__init__(rule, over_selection, deadline, selection, stragglers)
        self.beta = rule.beta
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """c = 0, g^0 = 0."""
        self.control = fed.layout.zeros()
        self.momentum = fed.layout.zeros()

    def message(self, fed: Federation, task: Task) -> dict[str, Tensor]:
        """beta c + (1 - beta) g^t."""
        return {"correction": self.beta * self.control + (1 - self.beta) * self.momentum}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """g^{t+1} = the mean local step;  c <- c + 1 / N sum_i (c_i^+ - c_i);  x^t + eta_g mean_i Delta_i."""
        changes = [reply["control_change"] for reply in replies]
        self.momentum = mean_direction(replies, self.rate)
        self.control = self.control + weighted_sum(changes, [1 / fed.clients] * len(changes))
        return fed.model + self.server_lr * mean_update(replies, "uniform")
