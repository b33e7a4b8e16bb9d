"""A run from its resolved configuration: every part built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsim.app import MOST_CLIENTS, Observer, check_client_evaluation, check_target, simulate
from fedsim.checkpoint import CheckpointSchedule
from fedsim.checks import ConfigError, flag, nearest, whole
from fedsim.config import GROUPS, PARTS, build, default_settings
from fedsim.pool import Pool
from fedsim.problems.base import Problem
from fedsim.record import check_free
from fedsim.recording import Run
from fedsim.rng import Randomness
from fedsim.server import PlainStep
from fedsim.simulation import Stop
from fedsim.strategy import Strategy
from fedsim.system import System
from fedsim.tracking import Tracker

RUN_KEYS = (
    "seed",
    "clients",
    "cohort",
    "rounds",
    "time_limit",
    "updates",
    "bytes",
    "target",
    "eval_every",
    "client_eval_every",
    "out",
    "overwrite",
)
"""Keys of a run beside its groups."""


BROUGHT = ("problem", "data", "partition", "model", "local", "topology")
"""Groups that a strategy with a problem of its own leaves no place for."""


class Assembly:
    """The parts of one run, built from a configuration.

    Args:
        config: resolved, as :func:`fedsim.config.compose_run` gives it.
        choices: the choice made in each group.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """

    def __init__(self, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
        self.choices = dict(choices)
        for key, value in config.items():
            if key not in RUN_KEYS and key not in GROUPS:
                raise ConfigError(f"{key}={value}: unknown key, {nearest(key, (*RUN_KEYS, *GROUPS))}")
        for key in (*RUN_KEYS, *PARTS, "pool", "checkpoint", "tracker"):
            if key not in config:
                raise ConfigError(f"{key}: must be given")
        self.seed = whole("seed", config["seed"])
        self.clients = whole("clients", config["clients"], least=1, most=MOST_CLIENTS)
        self.cohort = whole("cohort", config["cohort"], least=1)
        self.eval_every = whole("eval_every", config["eval_every"])
        self.client_eval_every = whole("client_eval_every", config["client_eval_every"])
        self.stop = Stop(config["rounds"], config["time_limit"], config["updates"], config["bytes"], config["target"])
        self.overwrite = flag("overwrite", config["overwrite"])
        parts = {
            name: build(config[name], name) for name in ("data", "partition", "model", "local", "server", "topology")
        }
        self.strategy: Strategy = build(
            config["strategy"],
            "strategy",
            local=parts["local"],
            server=parts["server"],
            topology=parts["topology"],
        )
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy={self.choices.get('strategy')}: {type(self.strategy).__name__} is no Strategy")
        own = self.strategy.own_problem()
        if own is not None:
            self._leave_out(config)
        self.problem: Problem = own or build(
            config["problem"], "problem", data=parts["data"], partition=parts["partition"], model=parts["model"]
        )
        system = {name: build(config[name], name) for name in ("compute", "network", "availability", "faults")}
        self.system = System(**system)
        self.pool: Pool = build(config["pool"], "pool")
        self.checkpoint: CheckpointSchedule = build(config["checkpoint"], "checkpoint")
        self.tracker: Tracker = build(config["tracker"], "tracker")
        self.config = dict(config)
        if not isinstance(self.problem, Problem):
            raise ConfigError(f"problem={self.choices.get('problem')}: {type(self.problem).__name__} is no Problem")
        if type(parts["server"]) is not PlainStep and self.strategy.server is not parts["server"]:
            name, why = type(self.strategy).__name__, self.strategy.steps_by
            raise ConfigError(f"server={self.choices.get('server')}: {name} {why}; leave it plain")
        self.strategy.check(self.clients)
        if self.stop.target is not None:
            check_target(self.problem, self.stop.target, self.eval_every)
        check_client_evaluation(self.problem, self.client_eval_every, self.eval_every)
        self.out = Path(str(config["out"])) if config["out"] is not None else None
        if not isinstance(self.tracker, Tracker):
            raise ConfigError(f"tracker={self.choices.get('tracker')}: {type(self.tracker).__name__} is no Tracker")
        self.tracker.check(self.out)

    def _leave_out(self, config: Mapping[str, Any]) -> None:
        """Refuse settings of what the strategy brings along: nobody would look at them."""
        strategy = self.choices.get("strategy")
        for group in BROUGHT:
            if config[group] != default_settings(group):
                choice = self.choices.get(group)
                raise ConfigError(f"{group}={choice}: strategy={strategy} brings its own; leave out {group}")
            self.choices.pop(group, None)

    def prepare(self) -> None:
        """Load the data and spread it, for a look whether that works.

        Raises:
            ConfigError: naming what does not fit.
        """
        self.problem.prepare(self.clients, Randomness(self.seed))

    def check_out(self) -> None:
        """Refuse an ``out`` that may not be written to.

        Raises:
            ConfigError: naming ``out``.
        """
        if self.out is not None:
            check_free(self.out, self.overwrite)

    def run(self, observer: Observer | None = None, resume: bool = False, allow_changes: bool = False) -> Run:
        """Run it and write its records to ``out``, or to a new folder under ``runs`` if that is not set.

        Args:
            observer: called at the end of every instant.
            resume: go on with the run that was stopped in ``out``.
            allow_changes: even if code or versions have changed since.
        """
        return simulate(
            self.strategy,
            self.problem,
            self.system,
            self.pool,
            self.stop,
            self.seed,
            clients=self.clients,
            cohort=self.cohort,
            eval_every=self.eval_every,
            client_eval_every=self.client_eval_every,
            out=self.out or new_folder,
            overwrite=self.overwrite,
            resume=resume,
            allow_changes=allow_changes,
            checkpoint=self.checkpoint,
            config=self.config,
            labels=self.choices,
            observer=observer,
            tracker=self.tracker,
        )


def new_folder() -> Path:
    """Make ``runs/<date>_<time>``, with a number behind it if somebody else has that one."""
    base = Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number, path = 1, base
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        except OSError as error:
            raise ConfigError(f"out={path}: cannot be written: {error.strerror}") from None
        else:
            return path
