"""Evaluation of a strategy's views, off the critical path: it costs no virtual time and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import SimulationError
from fedsim.record import METRIC_COLUMNS, Log

if TYPE_CHECKING:
    from fedsim.problems.base import Problem
    from fedsim.simulation.engine import Simulation

Columns = dict[str, NDArray[np.float64]]
"""Values by name, one for each client or node, ``[n]``."""

PREFIXES = {"test": "", "validation": "val_"}
"""What begins the name of a metric on each part of the examples."""


class Evaluation:
    """When to evaluate, and the log of it.

    Args:
        every: rounds between evaluations; 0 never.
        client_every: rounds between evaluations on the clients' own examples, each made together with the first
            evaluation that comes then; 0 never.
    """

    def __init__(self, sim: Simulation, every: int, client_every: int = 0) -> None:
        self.sim = sim
        self.every, self.client_every = every, client_every
        self.log = Log(METRIC_COLUMNS)
        self.latest: dict[str, float] = {}
        self._put_off: tuple[dict[str, Tensor], tuple[Any, ...]] | None = None
        """The views of an evaluation that has been put off, and how its row begins."""
        self.due: float = 0 if every else math.inf
        """The round of the next evaluation."""
        self._next_clients = 0
        self._taken: tuple[int, int, int] | None = None
        self._clients_taken: tuple[int, int, int] | None = None
        self._per_client: tuple[tuple[int, int, int], Columns] | None = None

    def leave_off(self) -> int:
        """Evaluate nothing from now on: somebody else writes the rows. Return how many rounds lay between them."""
        every, self.every, self.due = self.every, 0, math.inf
        return every

    def at_round(self, round: int) -> None:
        """The evaluation that is due in ``round``; the next one is due when ``every`` rounds have passed."""
        self.due = (round // self.every + 1) * self.every
        clients = bool(self.client_every) and round >= self._next_clients
        if clients:
            self._next_clients = (round // self.client_every + 1) * self.client_every
        self._take(clients)

    def final(self) -> None:
        """Evaluate the end of the run, on the clients' own examples too if ever, unless that has just been done."""
        self.catch_up()
        clients, moment = bool(self.client_every), self._moment()
        if not self.every or (self._taken == moment and (not clients or self._clients_taken == moment)):
            return
        if self._taken == moment:
            self.log.pop()  # one row for one moment: the new one says the same and more
        self._take(clients)

    def per_client(self) -> Columns:
        """How the model does on each client's own examples now, ``[clients]`` for each metric; none if none are kept.

        ``loss, accuracy`` (test) and ``val_loss, val_accuracy`` of the view ``"global"``, or of the model where there
        is no such vector; the same with ``own_`` before the name for the clients' own models, once there are any.
        NaN for a client that keeps no examples, or has no model of its own.
        """
        moment = self._moment()
        if self._per_client is None or self._per_client[0] != moment:
            self._per_client = (moment, _per_client(self.sim) if self.sim.problem.client_parts else {})
        return self._per_client[1]

    def reached(self, target: float) -> bool:
        """Whether the newest evaluation meets the target on the problem's target metric."""
        metric = self.sim.problem.target_metric
        if metric is None or not self.latest:
            return False
        name, side = metric
        if name not in self.latest:
            raise SimulationError(
                f"target={target}: the strategy's views give no '{name}'; call the one it is judged by \"global\""
            )
        return self.latest[name] >= target if side == "above" else self.latest[name] <= target

    def snapshot(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, the whole log included: it is short."""
        self.catch_up()
        log = {"columns": self.log.columns, "rows": self.log.rows()}
        due = {"next": self.due, "next_clients": self._next_clients}
        return {"latest": self.latest, "taken": self._taken, "clients_taken": self._clients_taken, **due, **log}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Become what :meth:`snapshot` saw."""
        self.latest, self._taken, self._clients_taken = (
            snapshot[name] for name in ("latest", "taken", "clients_taken")
        )
        self.due, self._next_clients = snapshot["next"], snapshot["next_clients"]
        self.log.columns = snapshot["columns"]
        self.log.load([], snapshot["rows"])

    def _moment(self) -> tuple[int, int, int]:
        return self.sim.kernel.now, self.sim.updates, self.sim.version

    def standing(self) -> tuple[Any, ...]:
        """How a row of metrics begins now."""
        sim = self.sim
        down, up = sim.bytes_moved()
        return sim.version, sim.round, sim.now, sim.updates, sim.samples_done, up, down

    def report(self, standing: tuple[Any, ...], metrics: Mapping[str, float]) -> None:
        """Add a row of metrics that somebody else has measured, of the moment that ``standing`` was taken."""
        self.latest = dict(metrics)
        for name in self.latest:
            self.log.columns.setdefault(name, "float64")
        values = [self.latest.get(name) for name in list(self.log.columns)[len(METRIC_COLUMNS) :]]
        self.log.append((*standing, *values))

    def _take(self, clients: bool) -> None:
        """Evaluate the views as they are now: at once, or while workers train, if nobody asks before."""
        self.catch_up()
        sim, begin = self.sim, self.standing()
        views = dict(sim.strategy.views(sim))
        self._taken = self._moment()
        may_wait = sim.pool.trains_beside and sim.limits.target is None and not clients
        if may_wait and all(vectors.ndim == 1 for vectors in views.values()):
            self._put_off = ({name: vector.clone() for name, vector in views.items()}, begin)
            return
        per_client = _of_clients(self.per_client()) if clients else {}
        if clients:
            self._clients_taken = self._taken
        self._evaluate(views, begin, per_client)

    def catch_up(self) -> None:
        """Make the evaluation that has been put off, if there is one."""
        if self._put_off is not None:
            put_off, self._put_off = self._put_off, None
            self._evaluate(*put_off, {})

    def _evaluate(self, views: Mapping[str, Tensor], begin: tuple[Any, ...], per_client: dict[str, float]) -> None:
        problem, metrics = self.sim.problem, dict[str, float]()
        for view, vectors in views.items():
            prefix = "" if view == "global" else f"{view}_"
            if vectors.ndim == 1:
                found = {prefix + name: float(value) for name, value in problem.evaluate(vectors).items()}
            else:
                found = _of_nodes(problem, prefix, vectors)
                found["consensus" if view == "nodes" else f"{view}_consensus"] = consensus(vectors)
            metrics.update(found)
        metrics.update(per_client)
        self.report(begin, metrics)


def consensus(nodes: Tensor) -> float:
    """``mean_i ||x_i - mean||^2`` of models ``[k, d]``: how far the nodes are from agreeing."""
    mean = nodes.mean(dim=0, dtype=torch.float64)
    return float(sum((each - mean).square().sum() for each in nodes) / len(nodes))


def _of_nodes(problem: Problem, prefix: str, nodes: Tensor) -> dict[str, float]:
    """Metrics of models ``[k, d]``, each evaluated by itself."""
    rows = [problem.evaluate(each) for each in nodes]
    return _summary({prefix + name: np.array([row[name] for row in rows]) for name in rows[0]})


def _per_client(sim: Simulation) -> Columns:
    problem, everybody = sim.problem, np.arange(sim.clients)
    model = sim.strategy.views(sim).get("global", sim.current)
    model = model if model.ndim == 1 else sim.current
    columns: Columns = {}
    for part in problem.client_parts:
        for name, values in problem.evaluate_clients(model, everybody, part).items():
            columns[PREFIXES[part] + name] = values
    for client, own in sorted(sim.strategy.own_models(sim).items()):
        for part in problem.client_parts:
            for name, values in problem.evaluate_clients(own, np.array([client]), part).items():
                column = columns.setdefault(f"own_{PREFIXES[part]}{name}", np.full(sim.clients, np.nan))
                column[client] = values[0]
    return columns


def _of_clients(columns: Columns) -> dict[str, float]:
    """Metrics over the clients that keep examples; one without a model of its own counts with the global one."""
    values: Columns = {}
    for name, column in columns.items():
        metric = name.rpartition("_")[2]
        shared = name.removeprefix("own_")
        # A loss is NaN where a model has diverged too; an accuracy only where there is nothing to evaluate.
        known = ~np.isnan(columns[name.removesuffix(metric) + "accuracy"])
        keeps = ~np.isnan(columns[shared.removesuffix(metric) + "accuracy"])
        column = np.where(known, column, columns[shared])
        values[f"{'own_' if shared != name else ''}client_{shared}"] = column[keeps]
    return _summary(values)


def _summary(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The mean of each; of accuracies the standard deviation and the mean of the lowest tenth (rounded up) too."""
    metrics: dict[str, float] = {}
    for name, values in columns.items():
        metrics[name] = float(values.mean())
        if name.endswith("accuracy"):
            worst = np.sort(values)[: -(-len(values) // 10)]
            metrics |= {f"{name}_std": float(values.std()), f"{name}_worst": float(worst.mean())}
    return metrics
