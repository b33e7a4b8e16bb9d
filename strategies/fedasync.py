"""FedAsync: asynchronous federated optimisation (Xie, Koyejo, Gupta 2019, arXiv 1903.03934).

Objective   min_x sum_i p_i F_i(x), p_i the share of arrivals that client i makes
Client i    from x_tau: minimise F_i(x) + rho / 2 ||x - x_tau||^2 by local SGD; returns x_new
Server      at every arrival, u = t - tau versions late:
            alpha_t = alpha * s(u);  x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new
            s(u) = 1 (``constant``), (u + 1)^-a (``polynomial``), 1 if u <= b else 1 / (a (u - b) + 1) (``hinge``)
State       none on clients, d on the server
Traffic     1 d down, 1 d up per update
Defaults    alpha 0.6, rho 0.005, polynomial with a = 0.5 (the paper's; its hinge has a = 10, b = 4)
Departures  staleness is not sampled, it is what the virtual clock makes it; a finished client is replaced by a
            random idle one so that ``concurrency`` tasks are always in flight; updates older than
            ``max_staleness`` are refused if that is set.
"""

from __future__ import annotations

from fedsim import Asynchronous, ConfigError, Federation, LocalSGD, Reply, StalenessWeight, number, optional_whole


class FedAsync(Asynchronous):
    """Every arrival moves the model towards the client's, the less the staler it is."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        alpha: float = 0.6,
        rho: float = 0.005,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
        max_staleness: int | None = None,
        concurrency: int | None = None,
    ) -> None:
        local = local if local is not None else LocalSGD()
        if local.prox not in (0.0, rho):
            raise ConfigError(f"rho={rho}: local.prox={local.prox} sets the same penalty; give strategy.rho alone")
        super().__init__(local.replace(prox=number("rho", rho, least=0), sends="model"), concurrency)
        self.alpha = number("alpha", alpha, above=0, most=1)
        self.staleness_weight = StalenessWeight(staleness, staleness_a, staleness_b)
        self.max_staleness = optional_whole("max_staleness", max_staleness)

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new."""
        staleness = fed.staleness(reply)
        if self.max_staleness is not None and staleness > self.max_staleness:
            fed.reject(reply, "stale")
            return
        alpha_t = self.alpha * self.staleness_weight(staleness)
        fed.publish((1 - alpha_t) * fed.model + alpha_t * reply["model"], used=[reply])
