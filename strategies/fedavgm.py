"""FedAvgM: server momentum on the mean update (Hsu, Qi, Brown 2019, arXiv 1909.06335).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    local SGD from x^t; Delta_i = x_K - x^t
Server      v <- beta v + sum_{i in S} w_i Delta_i, v = 0 at first, no dampening;  x^{t+1} = x^t + eta_g v
State       none on clients, 2 d on the server (x, v)
Traffic     1 d down, 1 d up per client and round
Defaults    beta = 0.9, eta_g = 1, sample weights (the paper's). In the long run a constant Delta moves the model by
            eta_g / (1 - beta) Delta per round: lower eta_g with a larger beta.
Departures  none. Not the FedAvg-M of arXiv 2306.16504, whose momentum is mixed in on the clients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim import Federation, LocalSGD, Reply, Synchronous, mean_update, number, one_of


class FedAvgM(Synchronous):
    """Heavy-ball momentum on the server."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        weighting: str = "samples",
        server_lr: float = 1.0,
        momentum: float = 0.9,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
    ) -> None:
        super().__init__(local, over_selection, deadline, selection, stragglers)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)
        self.momentum = number("momentum", momentum, least=0, below=1)
        self.velocity: Tensor | float = 0.0

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """v <- beta v + Delta; x <- x + eta_g v."""
        self.velocity = self.momentum * self.velocity + mean_update(replies, self.weighting)
        return fed.model + self.server_lr * self.velocity
