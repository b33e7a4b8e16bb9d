"""AFA-CS: anarchic federated averaging, cross-silo, with a memory (Yang et al. 2022, arXiv 2108.09875).

Objective   min_x 1/N sum_i F_i(x), over the N clients that have examples
Client i    whenever it likes, takes x_mu, runs any number K of local steps x_{k+1} = x_k - eta_l g_i(x_k), and returns
            their mean gradient G_i = 1/K sum_k g_i(x_k) = (x_mu - x_K) / (eta_l K)
Server      a table with the latest G_j of every client, zero at first; results overwrite their client's, and at every
            m-th arrival  x <- x - eta / N sum_j G_j, the sum over the whole table
State       none on clients, (N + 2) d on the server (x, the table, its sum)
Traffic     1 d down, 1 d up per update
Defaults    K uniform from 1 to 20 in every task, no pause, m the run's cohort. eta is the rate of a gradient: FedAvg
            with server rate eta_g corresponds to eta_g eta_l K. With 0.3 the embedded images are learnt steadily by 100
            clients that all work all the time; with 1, which is FedAvg's, only by few. The paper's theory wants eta_l
            in 1/sqrt(T) and eta in sqrt(N K) / sqrt(T).
Departures  none known, there is no public code. The paper takes it that everybody has reported within a bounded time.
            Until then those who have not count as zero here and the sum is divided by N all the same, so the first
            steps are short and nobody is waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim import Anarchic, Federation, LocalSGD, PlainStep, Reply, number, optional_whole


class AfaCs(Anarchic):
    """Clients come as they like; the server follows the mean of everybody's latest mean gradient."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        server_lr: float = 0.3,
        buffer_size: int | None = None,
        most_steps: int = 20,
        pause: float = 0.0,
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, most_steps, pause, server)
        self.server_lr = number("server_lr", server_lr, above=0)
        self.buffer_size = optional_whole("buffer_size", buffer_size, least=1)
        self.G: dict[int, Tensor] = {}
        self.arrived: list[Reply] = []

    def start(self, fed: Federation) -> None:
        """Every G_j is zero."""
        super().start(fed)
        self.N = int((fed.samples > 0).sum())
        # In double precision: what a million exchanges round off must not stay in the sum.
        self.sum = torch.zeros(fed.layout.size, dtype=torch.float64)

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Overwrite G_i; at the m-th arrival x <- x - eta / N sum_j G_j."""
        new, old = reply["gradient"], self.G.get(reply.client)
        self.sum += new if old is None else new.double() - old
        self.G[reply.client] = new
        self.arrived.append(reply)
        if len(self.arrived) >= (self.buffer_size or fed.cohort):
            gradient = (self.sum / self.N).to(new.dtype)
            fed.publish(fed.model + self.server(-self.server_lr * gradient), used=self.arrived)
            self.arrived = []
