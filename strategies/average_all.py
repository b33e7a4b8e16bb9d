"""Average-all: those who do not take part count as updates of 0, a baseline of FedAU (arXiv 2306.03401).

Objective   1 / N sum_n p_n F_n(x), p_n the probability that n takes part: biased towards those who often do
Client n    in round t, if it takes part: local SGD from x^t; Delta_n = x_I - x^t
Server      x^{t+1} = x^t + eta_g / N sum_{n takes part} Delta_n
State       none on clients, d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    eta_g = 1, with which few participants make small steps: the paper tunes it to 10 where a tenth takes part.
            Everybody who is online takes part (``selection=online``).
Departures  none. It is FedAU with K = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedsim import Federation, LocalSGD, PlainStep, Reply, Synchronous, number, weighted_sum


class AverageAll(Synchronous):
    """Whoever is there takes part, and the sum of the updates is divided by the number of all clients."""

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
        """x^t + eta_g / N sum_n Delta_n."""
        step = weighted_sum([reply["delta"] for reply in replies], [1 / fed.clients] * len(replies))
        return fed.model + self.server(self.server_lr * step)
