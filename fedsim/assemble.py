"""A run from its resolved configuration: every part built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fedsim.app import Observer, check_target, simulate
from fedsim.checks import ConfigError, flag, nearest, whole
from fedsim.config import GROUPS, PARTS, build
from fedsim.pool import Pool
from fedsim.problems.base import Problem
from fedsim.record import check_free
from fedsim.recording import Run
from fedsim.simulation import Stop
from fedsim.strategy import Strategy
from fedsim.system import System

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
    "out",
    "overwrite",
)
"""Keys of a run beside its groups."""


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
                raise ConfigError(f"{key}={value}: unknown key, {nearest(key, (*RUN_KEYS, *PARTS, 'pool'))}")
        for key in (*RUN_KEYS, *PARTS, "pool"):
            if key not in config:
                raise ConfigError(f"{key}: must be given")
        whole("seed", config["seed"])
        clients = whole("clients", config["clients"], least=1)
        whole("cohort", config["cohort"], least=1)
        whole("eval_every", config["eval_every"])
        self.stop = Stop(config["rounds"], config["time_limit"], config["updates"], config["bytes"], config["target"])
        self.overwrite = flag("overwrite", config["overwrite"])
        parts = {name: build(config[name], name) for name in ("data", "partition", "model", "local")}
        self.problem: Problem = build(
            config["problem"], "problem", data=parts["data"], partition=parts["partition"], model=parts["model"]
        )
        self.strategy: Strategy = build(config["strategy"], "strategy", local=parts["local"])
        system = {name: build(config[name], name) for name in ("compute", "network", "availability", "faults")}
        self.system = System(**system)
        self.pool: Pool = build(config["pool"], "pool")
        self.config = dict(config)
        if not isinstance(self.problem, Problem):
            raise ConfigError(f"problem={self.choices.get('problem')}: {type(self.problem).__name__} is no Problem")
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy={self.choices.get('strategy')}: {type(self.strategy).__name__} is no Strategy")
        for rule in self.strategy.jobs.values():
            rule.check(clients)
        if self.stop.target is not None:
            check_target(self.problem, self.stop.target, config["eval_every"])
        self.out = Path(str(config["out"])) if config["out"] is not None else None

    def check_out(self) -> None:
        """Refuse an ``out`` that may not be written to.

        Raises:
            ConfigError: naming ``out``.
        """
        if self.out is not None:
            check_free(self.out, self.overwrite)

    def run(self, observer: Observer | None = None, default_out: Path | None = None) -> Run:
        """Run it and write its records to ``out``, or to ``default_out`` if that is not set."""
        out = self.out or default_out or new_folder()
        return simulate(
            self.strategy,
            self.problem,
            self.system,
            self.pool,
            self.stop,
            self.config["seed"],
            clients=self.config["clients"],
            cohort=self.config["cohort"],
            eval_every=self.config["eval_every"],
            out=out,
            overwrite=self.overwrite,
            config={**self.config, "out": str(out)},
            labels=self.choices,
            observer=observer,
        )


def new_folder() -> Path:
    """``runs/<date>_<time>``, with a number behind it if that is taken."""
    base = Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    path = base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}_{number}")
    return path
