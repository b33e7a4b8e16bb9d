"""Known probability: unbiased weights by who knows the probabilities, a baseline of FedAU (arXiv 2306.03401).

Objective   min_x 1 / N sum_n F_n(x)
Client n    in round t, if it takes part: local SGD from x^t; Delta_n = x_I - x^t
Server      x^{t+1} = x^t + eta_g / N sum_{n takes part} Delta_n / p_n, p_n the probability that n takes part in a round
State       none on clients, d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    eta_g = 1. Everybody who is online takes part (``selection=online``); p_n is the share of time n is online,
            as the presence model knows it. Where cohorts are binomial it is that times q / (1 - (1 - q)^k),
            q = cohort / N, with k clients to be had: an empty cohort is drawn again.
Departures  none. Losses other than absence (drop-outs, deadlines) are not in p_n unless ``probability`` has them in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedsim import ConfigError, Federation, LocalSGD, PlainStep, Reply, Synchronous, number, one_of, weighted_sum


class KnownProbability(Synchronous):
    """Whoever is there takes part, and counts in inverse proportion to the probability of that."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        probability: float | list[float] | None = None,
        server_lr: float = 1.0,
        deadline: float | None = None,
        selection: str = "online",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        # In cohorts of fixed size the probabilities depend on who else is there.
        selection = one_of("selection", selection, ("online", "binomial"))
        super().__init__(local, deadline=deadline, selection=selection, stragglers=stragglers, server=server)
        given = probability if probability is None or isinstance(probability, list) else [probability]
        self.probability = given and [number("probability", each, above=0, most=1) for each in given]
        self.server_lr = number("server_lr", server_lr, above=0)

    def check(self, clients: int) -> None:
        """Refuse a list of another length."""
        super().check(clients)
        if self.probability is not None and len(self.probability) not in (1, clients):
            count = len(self.probability)
            raise ConfigError(
                f"strategy.probability: {count} numbers for {clients} clients; give one, or one per client"
            )

    def check_federation(self, fed: Federation) -> None:
        """Refuse to go without probabilities that nobody knows."""
        if self.probability is None and fed.presence is None:
            raise ConfigError("strategy.probability=null: must be given, this presence model does not know it")

    def start(self, fed: Federation) -> None:
        """p_n."""
        known = fed.presence if self.probability is None else self.probability
        assert known is not None
        self.p = np.broadcast_to(known, (fed.clients,)).copy()

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """x^t + eta_g / N sum_n Delta_n / p_n."""
        chance = self.round.chance if self.probability is None else 1.0
        weights = [1 / (fed.clients * self.p[reply.client] * chance) for reply in replies]
        return fed.model + self.server(self.server_lr * weighted_sum([reply["delta"] for reply in replies], weights))
