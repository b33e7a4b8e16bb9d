"""FedAU: weights for clients that take part as often as they please (Wang, Ji 2024, arXiv 2306.03401).

Objective   min_x 1 / N sum_n F_n(x), whoever takes part how often; nobody knows the probabilities p_n
Client n    in round t, if it takes part: I steps of local SGD from x^t; Delta_n = x_I - x^t
Server      x^{t+1} = x^t + eta_g / N sum_{n takes part} omega_n^t Delta_n: divided by N, not by how many take part
            omega_n^t is the mean length of the intervals between n's rounds that ended before t, cut into pieces of at
            most K rounds; 1 before the first one. With probability p in every round its mean is (1 - (1 - p)^K) / p: 1
            for K = 1, 1 / p and no bias for K without bound.
State       none on clients (three numbers each, which the server keeps here), d on the server
Traffic     1 d down, 1 d up per client and round
Defaults    K = 50, as the paper recommends; eta_g = 1. Everybody who is online takes part (``selection=online``).
Departures  the server counts the intervals, clients send no weights. A round is one of the server's, those included in
            which nobody was online when it looked; a client takes part if its result is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedsim import Federation, LocalSGD, PlainStep, Reply, Synchronous, number, optional_whole, weighted_sum


class IntervalWeights:
    """The estimates omega_n of 1 / p_n.

    Args:
        clients: how many there are.
        cutoff: K, the most rounds of one piece of an interval; None does not cut.
    """

    def __init__(self, clients: int, cutoff: int | None) -> None:
        self.cutoff = cutoff
        self.omega = np.ones(clients)
        self.pieces = np.zeros(clients, dtype=np.int64)
        self.last = np.full(clients, -1, dtype=np.int64)

    def take_part(self, client: int, round: int) -> float:
        """omega_n^t of a client that takes part in round t, numbered from 0; each of its rounds once, in order."""
        interval = round - int(self.last[client])
        cuts = 0 if self.cutoff is None else (interval - 1) // self.cutoff
        self._count(client, self.cutoff or 0, cuts)  # these were over before this round
        omega = float(self.omega[client])
        self._count(client, interval - cuts * (self.cutoff or 0), 1)  # and this one counts from the next round on
        self.last[client] = round
        return omega

    def _count(self, client: int, length: int, pieces: int) -> None:
        """omega <- (M omega + m S) / (M + m), M <- M + m for m pieces of S rounds."""
        if pieces:
            known = self.pieces[client]
            self.omega[client] = (known * self.omega[client] + pieces * length) / (known + pieces)
            self.pieces[client] = known + pieces


class FedAU(Synchronous):
    """Whoever is there takes part, and counts for more the longer the intervals were in which it did not."""

    def __init__(
        self,
        local: LocalSGD | None = None,
        cutoff: int | None = 50,
        server_lr: float = 1.0,
        deadline: float | None = None,
        selection: str = "online",
        stragglers: str = "cancel",
        server: PlainStep | None = None,
    ) -> None:
        super().__init__(local, deadline=deadline, selection=selection, stragglers=stragglers, server=server)
        self.cutoff = optional_whole("cutoff", cutoff, least=1)
        self.server_lr = number("server_lr", server_lr, above=0)

    def start(self, fed: Federation) -> None:
        """omega_n = 1."""
        self.weights = IntervalWeights(fed.clients, self.cutoff)

    def aggregate(self, fed: Federation, replies: Sequence[Reply]) -> Tensor:
        """x^t + eta_g / N sum_n omega_n^t Delta_n."""
        omega = [self.weights.take_part(reply.client, self.round.number - 1) for reply in replies]
        step = weighted_sum([reply["delta"] for reply in replies], [each / fed.clients for each in omega])
        return fed.model + self.server(self.server_lr * step)
