"""What a Flower strategy reports of its rounds, as rows of ``metrics``: watched from outside, nothing is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result, Strategy

from fedsim.record import METRIC_COLUMNS
from fedsim.simulation import Simulation

TRAIN, CLIENTS, SERVER = "train_", "client_", ""
"""What begins the name of a metric that clients reported of their training, or of their evaluation, each aggregated by
the strategy; and of one that the server app has measured itself."""


class Reports:
    """A row per model: when it was made, and whatever is reported of it before the next one is.

    Args:
        sim: the run.
        every: models between rows; the last model has one in any case, unless 0 says that there are to be none.
    """

    def __init__(self, sim: Simulation, every: int) -> None:
        self.sim, self.every = sim, every
        self._standing = sim.evaluation.standing()
        self._metrics: dict[str, float] = {}

    def new_model(self) -> None:
        """A new model has been published."""
        self.close(last=False)
        version, _, *rest = self.sim.evaluation.standing()
        self._standing, self._metrics = (version, version, *rest), {}

    def add(self, metrics: Mapping[str, Any] | None, prefix: str) -> None:
        """Take in metrics of the current model; of a list each item is one."""
        for name, value in (metrics or {}).items():
            if isinstance(value, list):
                self.add({f"{name}_{position}": each for position, each in enumerate(value)}, prefix)
                continue
            named = name if name.startswith(prefix) else prefix + name
            self._metrics[f"app_{named}" if named in METRIC_COLUMNS else named] = float(value)

    def close(self, last: bool) -> None:
        """Write the row of the current model if one is due."""
        if self.every and (last or self._standing[0] % self.every == 0):
            self.sim.evaluation.report(self._standing, self._metrics)


class Watch:
    """Sees what strategies that run by :meth:`Strategy.start` make of their rounds.

    Args:
        reports: where metrics go.
    """

    def __init__(self, reports: Reports) -> None:
        self.reports = reports
        self.on_model: Callable[[ArrayRecord], None]
        self.watching = False
        """Whether a strategy is at work: then it, and not what it sends, says what the model is."""

    @contextmanager
    def installed(self, on_model: Callable[[ArrayRecord], None]) -> Iterator[None]:
        """Watch every strategy that is started meanwhile.

        Args:
            on_model: called with every model that a strategy begins with or makes.
        """
        start, self.on_model = Strategy.start, on_model

        def watched(strategy: Strategy, *args: Any, **settings: Any) -> Result:
            return self._start(start, strategy, *args, **settings)

        with mock.patch.object(Strategy, "start", watched):
            yield

    def _start(self, start: Callable[..., Result], strategy: Strategy, *args: Any, **settings: Any) -> Result:
        given = inspect.signature(start).bind(strategy, *args, **settings)
        if given.arguments.get("evaluate_fn") is not None:
            given.arguments["evaluate_fn"] = self._seen(given.arguments["evaluate_fn"], self._evaluated)
        self.on_model(given.arguments["initial_arrays"])
        train = self._seen(strategy.aggregate_train, self._trained)
        evaluate = self._seen(strategy.aggregate_evaluate, self._evaluated_by_clients)
        with (
            mock.patch.object(strategy, "aggregate_train", train),
            mock.patch.object(strategy, "aggregate_evaluate", evaluate),
            mock.patch.object(self, "watching", True),
        ):
            return start(*given.args, **given.kwargs)

    def _seen(self, function: Callable[..., Any], see: Callable[[Any], None]) -> Callable[..., Any]:
        def seen(*args: Any, **settings: Any) -> Any:
            made = function(*args, **settings)
            see(made)
            return made

        return seen

    def _evaluated(self, metrics: Any) -> None:
        self.reports.add(metrics, SERVER)

    def _trained(self, made: Any) -> None:
        arrays, metrics = made
        if arrays is not None:
            self.on_model(arrays)
        self.reports.add(metrics, TRAIN)

    def _evaluated_by_clients(self, metrics: Any) -> None:
        self.reports.add(metrics, CLIENTS)
