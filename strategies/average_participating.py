"""Average-participating: the mean over those who take part, a baseline of FedAU (arXiv 2306.03401).

Objective   sum_n w_n F_n(x) with weights that grow with how often n takes part: 1 / N sum_n F_n only if all do alike
Client n    in round t, if it takes part: local SGD from x^t; Delta_n = x_I - x^t
Server      x^{t+1} = x^t + eta_g / |S| sum_{n in S} Delta_n, S those who take part
State       none on clients, d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    eta_g = 1. Everybody who is online takes part (``selection=online``).
Departures  none. It is FedAvg with uniform weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim import Federation, LocalSGD, PlainStep, Reply, Synchronous, mean_update, number


class AverageParticipating(Synchronous):
    """Whoever is there takes part, and all of those count alike."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        server_lr: float = 1.0,
        deadline: float | None = None,
        selection: str = "online",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, deadline=deadline, selection=selection, stragglers=stragglers, server=server)
        self.server_lr = number("server_lr", server_lr, above=0)

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """x^t + eta_g / |S| sum_{n in S} Delta_n."""
        return fed.model + self.server(self.server_lr * mean_update(replies, "uniform"))
