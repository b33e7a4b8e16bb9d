"""``fedsim run`` and ``fedsim resume``: one run, or a sweep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsim.assemble import Assembly
from fedsim.checks import ConfigError, nearest, whole
from fedsim.config import compose_single
from fedsim.progress import LiveProgress, ended
from fedsim.recording import begun, is_complete
from fedsim.sweeps import hydra_main, sweep

COMMANDS = ("run", "resume", "deploy", "report", "plot", "list", "traces", "doctor")
MULTIRUN = ("-m", "--multirun")
JOBS = ("-j", "--jobs")

HOW = ("pool", "checkpoint", "tracker")
"""Groups that say how a run is executed and not what it is."""


def main(arguments: Sequence[str]) -> int:
    """Run what the overrides say.

    Raises:
        ConfigError: before anything is written, if any member of the sweep cannot run.
    """
    given, multirun, show = list(arguments), False, False
    jobs: int | None = None
    overrides: list[str] = []
    while given:
        word = given.pop(0)
        word, equals, value = word.partition("=") if word.startswith("--jobs=") else (word, "", "")
        if equals:
            given.insert(0, value)
        if word in ("-h", "--help"):
            from fedsim.reference import run_help

            print(run_help(Path.cwd()))
            return 0
        if word in MULTIRUN:
            multirun = True
        elif word in JOBS:
            jobs = whole(word, _number(given.pop(0) if given else ""), least=1)
        elif word == "--cfg":
            if (given.pop(0) if given else "") != "job":
                raise ConfigError("--cfg: must be followed by job")
            show = True
        elif word.startswith("-"):
            raise ConfigError(f"{word}: unknown flag, {nearest(word, (*MULTIRUN, *JOBS, '--cfg', '--help'))}")
        else:
            overrides.append(in_full(word))
    if multirun and show:
        raise ConfigError("--cfg: shows one configuration, not a sweep; leave out -m")
    if jobs is not None and not multirun:
        raise ConfigError(f"--jobs={jobs}: is for sweeps, add -m")
    if multirun:
        return sweep(overrides, jobs)
    return _show(overrides) if show else _single(overrides)


def in_full(word: str) -> str:
    """What is short for another override: a Flower app's folder and settings, which are not known beforehand."""
    if word.startswith("app="):
        return f"strategy.{word}"
    return f"++{word}" if word.startswith("strategy.run_config.") else word


def _show(overrides: list[str]) -> int:
    print(yaml.safe_dump(compose_single(overrides, Path.cwd(), "add -m")[0], sort_keys=False), end="")
    return 0


def _single(overrides: list[str]) -> int:
    assembly = Assembly(*compose_single(overrides, Path.cwd(), "add -m"))
    with LiveProgress(assembly.choices.get("strategy", "run")) as progress:
        run = assembly.run(progress)
    print(ended(run))
    return 0


def resume(directory: str, overrides: Sequence[str], allow_changes: bool) -> int:
    """Go on with a run that was stopped.

    Args:
        directory: of the run.
        overrides: of ``pool``, ``checkpoint`` and ``tracker`` only: how it is executed may change, what it is may not.
            A group that is touched is as the command line says, with the defaults of its choice.
        allow_changes: even if code or versions have changed since.

    Raises:
        ConfigError: if there is nothing to go on with.
    """
    path = Path(directory)
    if is_complete(path):
        print(f"{path}: this run is complete already")
        return 0
    identity = begun(path)
    if not identity["choices"]:
        raise ConfigError(
            f"{path}: was begun in Python; call fedsim.simulate(..., resume=True) with the same arguments"
        )
    config, choices = _begun_with(path), identity["choices"]
    for each in overrides:
        if each.partition("=")[0].partition(".")[0] not in HOW:
            raise ConfigError(f"{each}: a run is resumed as it was begun; only {', '.join(HOW)} may change")
    if overrides:
        kept = [
            f"{group}={choices[group]}" for group in HOW if group in choices and f"{group}=" not in "".join(overrides)
        ]
        composed = compose_single([*kept, *overrides], Path.cwd(), "which is no way to resume a run")[0]
        config |= {group: composed[group] for group in HOW if any(each.startswith(group) for each in overrides)}
    assembly = Assembly({**config, "out": str(path)}, choices)
    with LiveProgress(choices.get("strategy", "run")) as progress:
        run = assembly.run(progress, resume=True, allow_changes=allow_changes)
    print(ended(run))
    return 0


def _begun_with(path: Path) -> dict[str, Any]:
    """The configuration of a run."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.yaml'}: is damaged; run it again with overwrite=true")
    return config


def _number(word: str) -> Any:
    return int(word) if word.isdigit() else word


def complete(arguments: Sequence[str]) -> int:
    """Tab completion: Hydra's own, for what follows ``fedsim run``."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split(" ")
    if any(each.startswith("query") for each in arguments):
        if len(words) <= 2:
            print("\n".join(name for name in COMMANDS if name.startswith(words[-1])))
            return 0
        if words[1] != "run":
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    hydra_main(list(arguments), _nothing)
    return 0


def _nothing(config: Any) -> None:
    raise ConfigError("see fedsim run --help")
