"""AFA-CD: anarchic federated averaging, cross-device (Yang et al. 2022, arXiv 2108.09875).

Objective   min_x 1/N sum_i F_i(x), as far as all clients come equally often: client i counts by its share of arrivals
Client i    whenever it likes, takes x_mu, runs any number K of local steps x_{k+1} = x_k - eta_l g_i(x_k), and returns
            their mean gradient G_i = 1/K sum_k g_i(x_k) = (x_mu - x_K) / (eta_l K)
Server      at every m-th arrival, with M the m results since the last step:  x <- x - eta / m sum_{i in M} G_i
State       none on clients, 2 d on the server (the sum; this file keeps the m replies, which is the same sum)
Traffic     1 d down, 1 d up per update
Defaults    K uniform from 1 to 20 in every task, no pause, m the run's cohort. eta is the rate of a gradient: FedAvg
            with server rate eta_g corresponds to eta_g eta_l K. With 0.3 the embedded images are learnt steadily by 100
            clients that all work all the time; with 1, which is FedAvg's, only by few. The paper's theory wants eta_l
            in 1/sqrt(T) and eta in sqrt(m K) / sqrt(T).
Departures  none known, there is no public code. The arrival bias stays however small the rates: it is the method's. A
            fast client may have several of the m places.
"""

from __future__ import annotations

from fedsim import Anarchic, Federation, LocalSGD, PlainStep, Reply, mean, number, optional_whole


class AfaCd(Anarchic):
    """Clients come as they like; the server follows the mean of every ``buffer_size`` mean gradients."""

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
        self.arrived: list[Reply] = []

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """At the m-th arrival x <- x - eta / m sum_i G_i."""
        self.arrived.append(reply)
        if len(self.arrived) >= (self.buffer_size or fed.cohort):
            gradient = mean([each["gradient"] for each in self.arrived])
            fed.publish(fed.model + self.server(-self.server_lr * gradient), used=self.arrived)
            self.arrived = []
