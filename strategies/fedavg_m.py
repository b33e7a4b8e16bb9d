"""FedAvg-M: the mean of all local steps is mixed into the next ones (Cheng et al. 2024, arXiv 2306.16504, Algorithm 1).

Objective   min_x 1 / N sum_i F_i(x)
Client i    x_0 = x^t;  x_{k+1} = x_k - eta (beta g_i(x_k) + (1 - beta) g^t), K_i steps;  Delta_i = x_K - x^t
Server      g^{t+1} = - sum_{i in S} Delta_i / (eta sum_{i in S} K_i), the clients' mean step, momentum included;
            x^{t+1} = x^t - gamma g^{t+1},  gamma = eta_g eta (mean of K_i),  that is x^t + eta_g / |S| sum_i Delta_i
State       none on clients, 2 d on the server (x, g); g^0 = 0
Traffic     2 d down (x, g), 1 d up per client and round
Defaults    beta = 0.1, as in released code of FedCM (arXiv 2106.10874), which is the same method; the paper tunes it.
            eta_g = 1.
Departures  clients may make different numbers of steps; the paper's gamma is given by eta_g. Local momentum, weight
            decay and proximal term are refused: each would come back with g in every round. Not the server momentum of
            FedAvgM (arXiv 1909.06335). With beta = 1 it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim import Context, Federation, LocalSGD, Reply, Synchronous, Task, mean_direction, mean_update, number


@dataclass
class MomentumSteps(LocalSGD):
    """Local steps that go on in the direction of all clients' last ones.

    Args:
        beta: weight of the client's own gradient.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = number("beta", self.beta, above=0, most=1)
        self.refuse_own("momentum", "weight_decay", "prox")

    def direction(self, ctx: Context, x: Tensor, batch: Any) -> Tensor:
        """beta g_i(x) + (1 - beta) g^t."""
        return self.beta * super().direction(ctx, x, batch) + (1 - self.beta) * ctx.message["momentum"]


class FedAvgMomentum(Synchronous):
    """FedAvg with the server's direction in every local step."""

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
        rule = MomentumSteps.around(local, beta=beta)
        super().__init__(rule, over_selection, deadline, selection, stragglers)
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """g^0 = 0."""
        self.momentum = fed.layout.zeros()

    def message(self, fed: Federation, task: Task) -> dict[str, Tensor]:
        """g^t."""
        return {"momentum": self.momentum}

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """g^{t+1} = the mean local step;  x^t + eta_g mean_i Delta_i."""
        self.momentum = mean_direction(replies, self.rate)
        return fed.model + self.server_lr * mean_update(replies, "uniform")
