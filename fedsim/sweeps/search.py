"""``hydra/sweeper=optuna``: a sweep whose values Optuna chooses, trial after trial, by what the trials before reached.

What is judged: the best value of the problem's validation metric in the course of a run (the largest ``val_accuracy``,
or the smallest ``distance`` where an optimum is known), or, with ``target=...``, the virtual seconds to the target. A
trial that fails, diverges or never reaches the target gets the worst value there is. Test metrics are never looked at.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.assemble import Assembly, new_folder
from fedsim.checks import ConfigError, Interrupted
from fedsim.config import chosen, compose_runs, plain, swept_values
from fedsim.identity import config_sha256
from fedsim.sweeps.index import Index
from fedsim.sweeps.members import COMPLETE, Composed, check_members, hashes_in, member_names, state_of
from fedsim.sweeps.multirun import hydra_main, quoted
from fedsim.sweeps.processes import Member, Sweep, tell_failed

EXTRA = "pip install -c constraints.txt '.[optuna]'"
UNTRIED = ("seed", "out", "overwrite", "target")
"""Keys that no trial may choose: they say what is compared, not what is tried."""
TRIALS = 20
"""Trials unless told; the plugin's default."""
RESULTS = "optimization_results.yaml"


def search(overrides: Sequence[str], jobs: int | None) -> int:
    """Let Optuna choose the values of everything that has several.

    Args:
        overrides: Hydra's; ``local.lr=interval(0.01,0.3)``, ``tag(log,interval(...))``, ``choice(...)``, ``range(...)``
            and lists are what may be chosen. ``hydra.sweeper.n_trials`` says how many trials.
        jobs: trials chosen and run together; one at a time unless given. The choice depends on it.

    Returns:
        0 if all trials are complete, else 1.

    Raises:
        ConfigError: before anything is written, if the search cannot be made.
        Interrupted: after a signal, once every running trial has saved itself.
    """
    if not _is_installed():
        raise ConfigError(f"hydra/sweeper=optuna: needs an extra: {EXTRA}")
    given = dict(one.partition("=")[::2] for one in overrides)
    own = [one for one in overrides if not one.startswith("hydra")]
    tried = swept_values(own)
    for key in UNTRIED:
        if key in tried:
            raise ConfigError(f"{key}={given[key]}: must be one value, Optuna would choose among several")
    if not tried:
        raise ConfigError("hydra/sweeper=optuna: nothing to choose; write local.lr=interval(0.01,0.3), say")
    composed = list(compose_runs(probes(own), Path.cwd()))
    config = composed[0][0]
    folder = None if config["out"] is None else Path(str(config["out"]))
    _check(composed, folder)
    aim = Objective.of(Assembly(*composed[0]))
    jobs = jobs or 1
    settings = {
        "hydra.sweeper.direction": aim.direction,
        "hydra.sweeper.n_jobs": str(jobs),
        # Chosen by the seed too, so that the same command comes to the same trials and finds them complete.
        "hydra.sweeper.sampler.seed": str(config["seed"]),
    }
    if given.get("hydra/sweeper/sampler") == "grid":
        del settings["hydra.sweeper.sampler.seed"]
    if given.get("hydra.sweeper.direction", aim.direction) != aim.direction:
        raise ConfigError(f"hydra.sweeper.direction={given['hydra.sweeper.direction']}: must be {aim.direction}: {aim}")
    settings = {key: value for key, value in settings.items() if key not in given}
    folder = folder or new_folder()
    kept = [one for one in overrides if one.partition("=")[0] != "out"]
    place = [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweep.subdir=."]
    trials = given.get("hydra.sweeper.n_trials", "")
    expected = int(trials) if trials.isdigit() else TRIALS
    index = Index(folder, own)
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    with Sweep(folder, jobs, index, expected) as running:
        found = Trials(running, aim, list(tried))
        hydra_main(["--multirun", *place, *kept, *(f"{key}={value}" for key, value in settings.items())], found.begin)
    if running.interrupted:
        raise Interrupted(f"interrupted; go on with the same command and out={folder}", running.interrupted)
    return found.tell()


class Objective:
    """What a trial is judged by.

    Args:
        column: of ``metrics``.
        rising: whether more is better.
        target: judge by the time to it instead.
    """

    def __init__(self, column: str, rising: bool, target: float | None) -> None:
        self.column, self.rising, self.target = column, rising, target

    @classmethod
    def of(cls, assembly: Assembly) -> Objective:
        """The objective of a configuration.

        Raises:
            ConfigError: if its problem has no validation metric, or is never evaluated.
        """
        metric = assembly.problem.target_metric
        if metric is None or not assembly.eval_every:
            why = "this problem has no validation metric" if metric is None else "eval_every=0 evaluates nothing"
            raise ConfigError(f"hydra/sweeper=optuna: nothing to judge a trial by, {why}")
        return cls(metric[0], metric[1] == "above", assembly.stop.target)

    @property
    def direction(self) -> str:
        """``maximize`` or ``minimize``, as Optuna says it."""
        return "maximize" if self.rising and self.target is None else "minimize"

    @property
    def worst(self) -> float:
        """What a trial is worth that came to nothing."""
        return -math.inf if self.direction == "maximize" else math.inf

    def __str__(self) -> str:
        if self.target is not None:
            return f"virtual seconds to {self.column} {self.target:g}"
        return f"{'largest' if self.rising else 'smallest'} {self.column}"

    def value(self, path: Path) -> float:
        """What the complete run in ``path`` is worth."""
        if self.target is not None:
            summary = json.loads((path / "summary.json").read_text())
            return float(summary["time"]) if summary["stopped"] == "target" else self.worst
        import pyarrow.parquet as pq

        values = pq.read_table(path / "metrics.parquet", columns=[self.column]).column(0).to_numpy()
        known = values[np.isfinite(values)]
        if not known.size:
            return self.worst
        return float(known.max() if self.rising else known.min())


class Trials:
    """The trials of a search, by the hash of their configuration: Optuna may ask for the same one twice.

    Args:
        running: where they run.
        objective: what they are judged by.
        keys: what is chosen.
    """

    def __init__(self, running: Sweep, objective: Objective, keys: Sequence[str]) -> None:
        self.running, self.objective, self.keys = running, objective, keys
        self.names = hashes_in(running.folder)
        self.values: dict[str, float] = {}
        self.about: dict[str, str] = {}

    def begin(self, config: Any) -> Pending:
        """Hydra's task function: start a trial as soon as there is room for it; its value comes later."""
        from hydra.core.hydra_config import HydraConfig

        job, values = HydraConfig.get(), plain(config)
        overrides = [str(each) for each in job.overrides.task]
        name = self._name(config_sha256(values), overrides)
        if name not in self.about:
            choices = chosen(job.runtime.choices)
            self.about[name] = ", ".join(one for one in overrides if one.partition("=")[0] in self.keys)
            path = self.running.folder / name
            state = state_of(Assembly({**values, "out": str(path)}, choices), path)
            self.running.index.add(name, values, choices, "complete" if state == COMPLETE else "waiting")
            if state != COMPLETE:
                self.running.start(Member(name, values, choices, state))
        self.running.heed()
        return Pending(self, name)

    def value(self, name: str) -> float:
        """Wait for a trial and judge it."""
        status = self.running.wait_for(name)
        self.running.heed()
        if name not in self.values:
            worth = self.objective.worst if status else self.objective.value(self.running.folder / name)
            self.values[name] = worth
            self.running.index.judge(name, worth)
        return self.values[name]

    def tell(self) -> int:
        """Say how it went; 1 if any trial failed, else 0."""
        failed = [name for name in self.about if self.running.statuses.get(name)]
        tell_failed(failed, len(self.about))
        folder = self.running.folder
        print(f"{len(self.about)} trials in {folder}, judged by {self.objective}; see index.csv and {RESULTS}")
        if self.values:
            pick = max if self.objective.direction == "maximize" else min
            best = pick(self.values, key=lambda name: self.values[name])
            if not math.isfinite(self.values[best]):  # there is no best among those that all came to nothing
                print("best: none, no trial came to anything")
                return 1 if failed else 0
            print(f"best: {self.about[best]}, {self.values[best]:.6g} ({folder / best})")
        return 1 if failed else 0

    def _name(self, sha256: str, overrides: list[str]) -> str:
        if sha256 not in self.names:
            (name,) = member_names([overrides], list(self.keys))
            taken, number, free = set(self.names.values()), 2, name
            while free in taken:  # the same values, and something else that differs
                free, number = f"{name}~{number}", number + 1
            self.names[sha256] = free
        return self.names[sha256]


class Pending:
    """A trial's value, which is there when somebody makes a number of it: until then others are started beside it."""

    def __init__(self, trials: Trials, name: str) -> None:
        self.trials, self.name = trials, name

    def __float__(self) -> float:
        return self.trials.value(self.name)


def _is_installed() -> bool:
    try:
        return find_spec("optuna") is not None and find_spec("hydra_plugins.hydra_optuna_sweeper") is not None
    except ModuleNotFoundError:  # Hydra has no plugins at all
        return False


def probes(overrides: Sequence[str]) -> list[list[str]]:
    """Configurations that stand for all that may be chosen: each value or both ends, beside the first of all others.

    Raises:
        ConfigError: if an override cannot be read.
    """
    tried = swept_values(overrides)
    fixed = [one for one in overrides if one.partition("=")[0] not in tried]
    first = {key: values[0] for key, values in tried.items()}
    chosen = [first, *({**first, key: value} for key, values in tried.items() for value in values[1:])]
    return [[*fixed, *(f"{key}={value}" for key, value in each.items())] for each in chosen]


def _check(composed: list[Composed], folder: Path | None) -> None:
    """Build every probe and load its data.

    Raises:
        ConfigError: if a trial could not run.
    """
    check_members([({**config, "out": None}, choices) for config, choices in composed], [""] * len(composed), None)
    if folder is not None and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise ConfigError(f"out={folder}: is not a directory")
