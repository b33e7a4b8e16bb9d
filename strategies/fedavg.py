"""FedAvg: federated averaging (McMahan et al. 2017, arXiv 1602.05629).

Objective   min_x sum_i p_i F_i(x), p_i = n_i / n (``samples``) or 1 / N (``uniform``)
Client i    x_0 = x^t; x_{k+1} = x_k - eta_l g_i(x_k); Delta_i = x_K - x^t
Server      x^{t+1} = x^t + eta_g * sum_{i in S} w_i Delta_i,
            w_i = n_i / sum_{j in S} n_j (``samples``) or 1 / |S| (``uniform``)
State       none on clients, d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    eta_g = 1 and sample weights, as in the paper. Research simulators mostly average uniformly, which
            changes the objective to the plain mean over clients.
Departures  none
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim import Federation, LocalSGD, PlainStep, Reply, Synchronous, mean_update, number, one_of


class FedAvg(Synchronous):
    """Synchronous rounds; the server adds the weighted mean of the clients' updates."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        weighting: str = "samples",
        server_lr: float = 1.0,
        over_selection: float = 1.0,
        deadline: float | None = None,
        selection: str = "fixed",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, over_selection, deadline, selection, stragglers, server)
        self.weighting = one_of("weighting", weighting, ("samples", "uniform"))
        self.server_lr = number("server_lr", server_lr, above=0)

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """x^t + eta_g * sum_i w_i Delta_i."""
        return fed.model + self.server(self.server_lr * mean_update(replies, self.weighting))
