"""FedAvg-M-VR: FedAvg-M with a variance-reduced momentum (Cheng et al. 2024, arXiv 2306.16504, Algorithm 3).

Objective   min_x 1 / N sum_i F_i(x)
Client i    x_0 = x^t;  x_{k+1} = x_k - eta (g_i(x_k; b) + (1 - beta) (g^t - g_i(x^{t-1}; b))), K_i steps, both
            gradients of a step over one mini-batch b (STORM);  Delta_i = x_K - x^t
Server      g^{t+1} = - sum_{i in S} Delta_i / (eta sum_{i in S} K_i);
            x^{t+1} = x^t - gamma g^{t+1},  gamma = eta_g eta (mean of K_i),  that is x^t + eta_g / |S| sum_i Delta_i
State       none on clients, 2 d on the server (x, g) and gamma; g^0 = 0, x^{-1} = x^0
Traffic     2 d and a number down (x, g, gamma: x^{t-1} = x^t + gamma g^t), 1 d up per client and round
Defaults    beta = 0.5; the paper tunes it. Steps are as long as FedAvg's, and with little of beta they need a smaller
            rate: on the images 0.1 was unstable at eta = 0.1. eta_g = 1.
Departures  g^0 = 0, where the theory takes the gradient of a first batch. Clients may make different numbers of steps;
            the paper's gamma is given by eta_g. Local momentum, weight decay and proximal term are refused: each would
            come back with g in every round. A step takes two gradients, on the virtual clock, too. With
            beta = 1 it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim import Context, Federation, LocalSGD, Reply, Synchronous, Task, mean_direction, mean_update, number


@dataclass
class ReducedVarianceSteps(LocalSGD):
    """Local steps along a gradient whose noise is taken off by another one over the same mini-batch.

    Args:
        beta: share of the noise that stays.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = number("beta", self.beta, above=0, most=1)
        self.refuse_own("momentum", "weight_decay", "prox")

    def begin(self, ctx: Context) -> None:
        """x^{t-1} = x^t + gamma g^t."""
        self.previous = ctx.point().addcmul_(ctx.message["gamma"], ctx.message["momentum"])

    @property
    def gradients_per_step(self) -> int:
        """One at x and one at the server's last model."""
        return 2 * super().gradients_per_step

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """g_i(x; b) + (1 - beta) (g^t - g_i(x^{t-1}; b))."""
        correction = ctx.message["momentum"] - super().direction(ctx, self.previous, batch)
        return super().direction(ctx, x, batch) + (1 - self.beta) * correction


class FedAvgMomentumVR(Synchronous):
    """FedAvg with the server's direction in every local step, corrected for where it was taken."""

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
        rule = ReducedVarianceSteps.around(local, beta=beta)
        super().__init__(rule, over_selection, deadline, selection, stragglers)
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """g^0 = 0, x^{-1} = x^0."""
        self.momentum = fed.layout.zeros()
        self.gamma = self.momentum.new_zeros(1)

    def message(self, fed: Federation, task: Task) -> dict[str, Tensor]:
        """g^t, and the gamma that led to x^t."""
        return {"momentum": self.momentum, "gamma": self.gamma}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """g^{t+1} = the mean local step;  gamma = eta_g eta (mean of K_i);  x^t + eta_g mean_i Delta_i."""
        steps = sum(reply.task.steps for reply in replies) / len(replies)
        self.momentum = mean_direction(replies, self.rate)
        self.gamma = self.gamma.new_full((1,), self.server_lr * self.rate * steps)
        return fed.model + self.server_lr * mean_update(replies, "uniform")
