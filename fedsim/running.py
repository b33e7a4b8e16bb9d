"""``fedsim run``: one run, or a sweep by Hydra's own multirun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.assemble import Assembly, new_folder
from fedsim.checks import ConfigError, FedsimError, nearest
from fedsim.config import (
    CONFIG_MODULE,
    CONFIG_NAME,
    GROUPS,
    compose_run,
    expand,
    plain,
    register_strategies,
    search_path,
)
from fedsim.progress import LiveProgress, headline, megabytes, seconds
from fedsim.recording import Run

MULTIRUN = ("-m", "--multirun")
HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p", "--shell-completion", "-sc")
"""Flags of Hydra's own that are handed on."""

LONGEST_NAME = 150
"""Longest folder name of a sweep's member, in characters."""


def main(arguments: Sequence[str]) -> int:
    """Run what the overrides say.

    Raises:
        ConfigError: before anything is written, if any member of the sweep cannot run.
    """
    overrides = [each for each in arguments if not each.startswith("-")]
    flags = [each for each in arguments if each.startswith("-")]
    if "-h" in flags or "--help" in flags:
        from fedsim.reference import run_help

        print(run_help(Path.cwd()))
        return 0
    for each in flags:
        if each.partition("=")[0] not in (*MULTIRUN, *HYDRA_FLAGS):
            raise ConfigError(f"{each}: unknown flag, {nearest(each, (*MULTIRUN, *HYDRA_FLAGS, '--help'))}")
    if any(each not in MULTIRUN for each in flags):
        return _hydra(list(arguments))
    return _sweep(overrides) if flags else _single(overrides)


def _single(overrides: list[str]) -> int:
    config, choices = compose_run(overrides, Path.cwd())
    assembly = Assembly(config, choices)
    print(_ended(_observed(assembly, None)))
    return 0


def _observed(assembly: Assembly, default_out: Path | None, title: str = "") -> Run:
    with LiveProgress(title or assembly.choices.get("strategy", "run")) as progress:
        return assembly.run(progress, default_out)


def _ended(run: Run) -> str:
    """One line about a finished run."""
    summary = run.summary
    parts = [
        f"stopped by {summary['stopped']} at {seconds(summary['time'])} of virtual time",
        f"{summary['updates']} updates",
        megabytes(summary["down_bytes"] + summary["up_bytes"]),
    ]
    parts += [f"{name} {summary['metrics'][name]:.4g}" for name in headline(summary["metrics"])]
    if summary["outcomes"].get("rejected"):
        parts.append(f"{summary['outcomes']['rejected']} updates REJECTED, see run.log")
    return f"{run.path}: " + ", ".join(parts)


# ---- sweeps --------------------------------------------------------------------------------------


class _Sweep:
    """What the members of a sweep share."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names
        self.failed: list[str] = []

    def member(self, config: Any) -> None:
        """Hydra's task function: one member; what fails is told and does not stop the others."""
        from hydra.core.hydra_config import HydraConfig

        job = HydraConfig.get()
        number = int(job.job.num)
        name = self.names[number]
        choices = {str(group): str(choice) for group, choice in job.runtime.choices.items() if group in GROUPS}
        values = {**plain(config), "out": str(self.folder / name)}
        try:
            run = _observed(Assembly(values, choices), None, f"[{number + 1}/{len(self.names)}] {name}")
            print(_ended(run), flush=True)
        except FedsimError as error:
            self.failed.append(name)
            print(f"fedsim: {name}: {error}", file=sys.stderr, flush=True)


def _sweep(overrides: list[str]) -> int:
    members = [[each for each in member if not each.startswith("hydra.")] for member in expand(overrides)]
    varied = [one.partition("=")[0] for one in overrides if len({_value(member, one) for member in members}) > 1]
    names = _member_names(members, varied)
    folder = _sweep_folder(overrides)
    for member, name in zip(members, names, strict=True):
        config, choices = compose_run([each for each in member if not each.startswith("out=")], Path.cwd())
        config["out"] = str(folder / name)
        Assembly(config, choices).check_out()
    sweep = _Sweep(folder, names)
    rest = [each for each in overrides if not each.startswith("out=")]
    _hydra(["--multirun", f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=.", *rest], sweep)
    if sweep.failed:
        print(f"fedsim: {len(sweep.failed)} of {len(names)} runs failed: {', '.join(sweep.failed)}", file=sys.stderr)
    print(f"{len(names) - len(sweep.failed)} runs in {folder}; now: fedsim report {folder}")
    return 1 if sweep.failed else 0


def _value(member: list[str], override: str) -> str:
    key = override.partition("=")[0]
    return next((one.partition("=")[2] for one in member if one.partition("=")[0] == key), "")


def _member_names(members: list[list[str]], varied: list[str]) -> list[str]:
    """Folder names such as ``fedbuff_seed1``. No ``=``: pandas would take it for a partition of a table."""
    names: list[str] = []
    for number, member in enumerate(members):
        parts = []
        for one in member:
            key, _, value = one.partition("=")
            if key in varied:
                parts.append(value if key in GROUPS else key.rpartition(".")[2] + value)
        name = "".join(each if each.isalnum() or each in "._-+," else "-" for each in "_".join(parts))[:LONGEST_NAME]
        names.append(name if name and name not in names else f"{name}~{number}".lstrip("~"))
    return names


def _sweep_folder(overrides: list[str]) -> Path:
    given = [each.partition("=")[2] for each in overrides if each.startswith("out=")]
    return Path(given[-1]) if given and given[-1] != "null" else new_folder()


def _hydra(arguments: list[str], sweep: _Sweep | None = None) -> int:
    """Hand over to Hydra's own main: multirun, --cfg, --info, shell completion."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    folder = Path.cwd()
    register_strategies(folder)
    GlobalHydra.instance().clear()
    flags = [each for each in arguments if each.startswith("-")]
    # Overrides must come last: everything after the first one is taken for an override.
    sys.argv = ["fedsim", *flags, *search_path(folder), *[each for each in arguments if each not in flags]]

    def task(config: Any) -> None:
        if sweep is None:
            raise ConfigError(f"flags {flags}: see fedsim run --help")
        sweep.member(config)

    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(task)()
    return 0


def complete(arguments: Sequence[str]) -> int:
    """Tab completion: Hydra's own, for what follows ``fedsim run``."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split(" ")
    if any(each.startswith("query") for each in arguments):
        if len(words) <= 2:
            print("\n".join(name for name in ("run", "report", "list", "doctor") if name.startswith(words[-1])))
            return 0
        if words[1] != "run":
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return _hydra(list(arguments))
