"""The strategy that is a whole Flower app: its server app drives the run, its client app answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.checks import ConfigError, SimulationError, said
from fedsim.federation import Federation, Reply, Task
from fedsim.flower.simulated.clients import AnswerMessage, AppProblem, Cost, Nodes
from fedsim.flower.simulated.grid import RunOverError, VirtualGrid
from fedsim.flower.simulated.internals import RUN, SERVER_NODE, has_main, server_identity
from fedsim.flower.simulated.metrics import Reports, Watch
from fedsim.flower.simulated.process_state import flower_log, seeded
from fedsim.pool import InlinePool
from fedsim.problems.base import Problem
from fedsim.simulation import Simulation
from fedsim.strategy import Strategy

logger = logging.getLogger("fedsim")

STOPPED = "app"
"""What a run says that ended because its server app did."""


class App:
    """A Flower app: server, clients and their settings.

    Args:
        server: a ServerApp with a ``main``.
        client: a ClientApp.
        run_config: what both find as ``context.run_config``.
    """

    source_files: tuple[Path, ...] = ()
    """The files that are its code, as far as they are known."""

    def __init__(self, server: ServerApp, client: ClientApp, run_config: Mapping[str, Any] | None = None) -> None:
        self.server, self.client = server, client
        self.run_config = dict(run_config or {})

    def load(self) -> tuple[ServerApp, ClientApp]:
        """Server and client.

        Raises:
            ConfigError: if they cannot be had.
        """
        return self.server, self.client

    def running(self) -> ExitStack:
        """What must hold while the app runs: nothing."""
        return ExitStack()


class FlowerApp(Strategy):
    """Runs a Flower app unchanged: any strategy of ``flwr.serverapp.strategy``, or a loop of the app's own.

    A round is a model that the server app has made; its rounds are its own to count, and ``Stop(rounds=)`` only ends
    a run before it begins one more than those. Replies are ``applied`` with the next model after they were handed over.

    Args:
        app: the app.
        batch_size: examples in a local step.
        epochs: passes over a client's examples in a training message.
        local_steps: of a training message, whatever the client reports; None counts by what it reports.
        evaluate_cost: what a step of evaluation costs, in training steps.

    Raises:
        ConfigError: if an argument is out of range.
    """

    everybody = True
    steps_by = "leaves the server's steps to the app"
    unsaved = "a Flower server app waits in the middle of its own code, which cannot be saved"
    package: ClassVar[str] = "flwr"

    def __init__(
        self,
        app: App,
        batch_size: int = 32,
        epochs: int = 1,
        local_steps: int | None = None,
        evaluate_cost: float = 1 / 3,
    ) -> None:
        super().__init__(AnswerMessage())
        self.jobs = dict.fromkeys(("train", "evaluate", "query"), self.jobs["train"])
        self.app = app
        self.cost = Cost(batch_size, epochs, local_steps, evaluate_cost)
        self._nodes = Nodes(app.run_config, self.cost)
        self._grid: VirtualGrid | None = None
        self._server: ServerApp
        self._eval_every = 0

    @property
    def source_files(self) -> tuple[Path, ...]:
        """The app's code."""
        return self.app.source_files

    def own_problem(self) -> Problem:
        """What the app learns."""
        return AppProblem(self._nodes)

    def check_federation(self, fed: Federation) -> None:
        """Load the app.

        Raises:
            ConfigError: if it cannot be loaded, or the run is not one for it.
        """
        if not isinstance(fed, Simulation):
            raise ConfigError("strategy: a Flower app runs in the simulator; deployed it needs no fedsim")
        if not isinstance(fed.problem, AppProblem):
            raise ConfigError(f"problem={type(fed.problem).__name__}: a Flower app brings its own; leave it out")
        if not isinstance(fed.pool, InlinePool):
            raise ConfigError(f"pool={fed.pool.name}: a Flower app runs in this process; use pool=inline")
        with seeded(fed.randomness("flower app: load")):  # modules may draw while they are imported
            self._server, self._nodes.client_app = self.app.load()
        if not has_main(self._server):
            raise ConfigError("strategy.app: its ServerApp must have a main, `@app.main()`; server_fn is Flower's past")

    def start(self, fed: Federation) -> None:
        """Rows of metrics are what the app reports, when it does."""
        assert isinstance(fed, Simulation)
        self._eval_every = fed.evaluation.leave_off()

    def drive(self, fed: Federation, advance: Callable[[], bool]) -> None:
        """Call the server app; the run is over when it returns.

        Raises:
            SimulationError: if it raises.
        """
        assert isinstance(fed, Simulation)
        reports = Reports(fed, self._eval_every)
        watch = Watch(reports)
        grid = self._grid = VirtualGrid(fed, self._nodes, advance, watch)
        with self.app.running() as stack:
            stack.enter_context(flower_log(logger))
            stack.enter_context(server_identity())
            stack.enter_context(grid.virtual_sleep.installed())
            stack.enter_context(watch.installed(grid.new_model))
            stack.enter_context(seeded(fed.randomness("flower app: server")))
            try:
                self._serve(grid)
            finally:
                grid.close()
                reports.close(last=True)
        if fed.stopped is not None:
            logger.warning("stopped by %s before the server app had ended", fed.stopped)
        fed.stop(STOPPED)

    def _serve(self, grid: VirtualGrid) -> None:
        """Call the server app; return when it does, or when the run is over."""
        try:
            self._server(grid, Context(RUN, SERVER_NODE, {}, RecordDict(), dict(self._nodes.run_config)))
        except RunOverError:
            return
        except (Exception, SystemExit) as error:
            if grid.broken is None:
                raise SimulationError(f"the server app raised {type(error).__name__}: {said(error)}") from error
        if grid.broken is not None and not isinstance(grid.broken, RunOverError):
            raise grid.broken  # the app may have caught it

    def rounds(self, fed: Federation) -> int:
        """How many models had been made when the newest round of training began; all of them at the end."""
        return 0 if self._grid is None else self._grid.rounds

    def on_reply(self, fed: Federation, reply: Reply) -> None:
        """Hand it to the grid."""
        assert self._grid is not None
        self._grid.deliver(reply)

    def on_lost(self, fed: Federation, task: Task, why: str) -> None:
        """Tell the grid."""
        assert self._grid is not None
        self._grid.lose(task, why)

    def settle(self, fed: Federation) -> None:
        """Let messages that were pushed leave."""
        assert self._grid is not None
        self._grid.dispatch()
