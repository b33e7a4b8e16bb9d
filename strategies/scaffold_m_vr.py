"""SCAFFOLD-M-VR: SCAFFOLD-M with a variance-reduced momentum (Cheng et al. 2024, arXiv 2306.16504, Algorithm 4).

Objective   min_x 1 / N sum_i F_i(x)
Client i    x_0 = x^t;  x_{k+1} = x_k - eta (g_i(x_k; b) - beta (c_i - c) + (1 - beta) (g^t - g_i(x^{t-1}; b))),
            K_i steps, both gradients of a step over one mini-batch b (STORM);
            Delta_i = x_K - x^t;  c_i^+ = 1 / K_i sum_k g_i(x_k; b)
Server      g^{t+1} = - sum_{i in S} Delta_i / (eta sum_{i in S} K_i);  c <- c + 1 / N sum_{i in S} (c_i^+ - c_i);
            x^{t+1} = x^t - gamma g^{t+1},  gamma = eta_g eta (mean of K_i),  that is x^t + eta_g / |S| sum_i Delta_i
State       d on every client that has taken part (c_i), 3 d on the server (x, c, g) and gamma; all but x begin at 0,
            x^{-1} = x^0
Traffic     3 d and a number down (x, g, c, gamma: x^{t-1} = x^t + gamma g^t), 2 d up (Delta_i, c_i^+ - c_i) per client
            and round
Defaults    beta = 0.5; the paper tunes it. Steps are as long as FedAvg's, and with little of beta they need a smaller
            rate: on the images 0.1 was unstable at eta = 0.1. eta_g = 1.
Departures  g^0 = 0, where the theory takes the gradient of a first batch. Clients may make different numbers of steps;
            the paper's gamma is given by eta_g. Local momentum, weight decay and proximal term are refused: each would
            come back with g in every round. A step takes two gradients, on the virtual clock, too. With
            beta = 1 it is SCAFFOLD.
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
class ScaffoldReducedVarianceSteps(ControlVariateSGD):
    """Corrected local steps whose noise is taken off by another gradient over the same mini-batch.

    Args:
        beta: share of the noise that stays, and weight of the control variates.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = number("beta", self.beta, above=0, most=1)
        self.refuse_own("momentum", "weight_decay", "prox")

    def begin(self, ctx: Context) -> None:
        """x^{t-1} = x^t + gamma g^t."""
        super().begin(ctx)
        self.previous = ctx.point().addcmul_(ctx.message["gamma"], ctx.message["momentum"])

    @property
    def gradients_per_step(self) -> int:
        """One at x and one at the server's last model."""
        return 2 * super().gradients_per_step

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """g_i(x; b) - beta (c_i - c) + (1 - beta) (g^t - g_i(x^{t-1}; b))."""
        drift = ctx.state["control"] - ctx.message["control"]
        correction = ctx.message["momentum"] - super().direction(ctx, self.previous, batch)
        return self.counted_gradient(ctx, x, batch) - self.beta * drift + (1 - self.beta) * correction


class ScaffoldMomentumVR(Synchronous):
    """SCAFFOLD with the server's direction in every local step, corrected for where it was taken."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        beta: float = 0.5,
        server_lr: float = 1.0,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        rule = ScaffoldReducedVarianceSteps.around(local, beta=beta)
        super().__init__(rule, over_selection, deadline, selection, stragglers)
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """c = 0, g^0 = 0, x^{-1} = x^0."""
        self.control = fed.layout.zeros()
        self.momentum = fed.layout.zeros()
        self.gamma = self.momentum.new_zeros(1)

    def message(self, fed: Federation, task: Task) -> dict[str, Tensor]:
        """c, g^t, and the gamma that led to x^t."""
        return {"control": self.control, "momentum": self.momentum, "gamma": self.gamma}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """g^{t+1} = the mean local step;  c <- c + 1 / N sum_i (c_i^+ - c_i);  x^t + eta_g mean_i Delta_i."""
        changes = [reply["control_change"] for reply in replies]
        steps = sum(reply.task.steps for reply in replies) / len(replies)
        self.momentum = mean_direction(replies, self.rate)
        self.gamma = self.gamma.new_full((1,), self.server_lr * self.rate * steps)
        self.control = self.control + weighted_sum(changes, [1 / fed.clients] * len(changes))
        return fed.model + self.server_lr * mean_update(replies, "uniform")
