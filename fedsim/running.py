"""``fedsim run``: one run, or a sweep by Hydra's own multirun."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

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
Composed = tuple[dict[str, Any], dict[str, str]]
"""A configuration and the choices it was made of."""

LONGEST_NAME = 150
"""Longest folder name of a sweep's member, in characters."""


def main(arguments: Sequence[str]) -> int:
    """Run what the overrides say.

    Raises:
        ConfigError: before anything is written, if any member of the sweep cannot run.
    """
    given, multirun, show = list(arguments), False, False
    overrides: list[str] = []
    while given:
        word = given.pop(0)
        if word in ("-h", "--help"):
            from fedsim.reference import run_help

            print(run_help(Path.cwd()))
            return 0
        if word in MULTIRUN:
            multirun = True
        elif word == "--cfg":
            if (given.pop(0) if given else "") != "job":
                raise ConfigError("--cfg: must be followed by job")
            show = True
        elif word.startswith("-"):
            raise ConfigError(f"{word}: unknown flag, {nearest(word, (*MULTIRUN, '--cfg', '--help'))}")
        else:
            overrides.append(word)
    if multirun and show:
        raise ConfigError("--cfg: shows one configuration, not a sweep; leave out -m")
    if multirun:
        return _sweep(overrides)
    return _show(overrides) if show else _single(overrides)


def _compose_single(overrides: list[str]) -> Composed:
    for each in overrides:
        if len(expand([each])) > 1:
            raise ConfigError(f"{each}: several values are a sweep, add -m")
    return compose_run(overrides, Path.cwd())


def _show(overrides: list[str]) -> int:
    print(yaml.safe_dump(_compose_single(overrides)[0], sort_keys=False), end="")
    return 0


def _single(overrides: list[str]) -> int:
    print(_ended(_observed(Assembly(*_compose_single(overrides)))))
    return 0


def _observed(assembly: Assembly, title: str = "") -> Run:
    with LiveProgress(title or assembly.choices.get("strategy", "run")) as progress:
        return assembly.run(progress)


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
            run = _observed(Assembly(values, choices), f"[{number + 1}/{len(self.names)}] {name}")
            print(_ended(run), flush=True)
        except FedsimError as error:
            self.failed.append(name)
            print(f"fedsim: {name}: {error}", file=sys.stderr, flush=True)
        except Exception:  # a bug in somebody's strategy: shown whole, and the others go on
            self.failed.append(name)
            traceback.print_exc()


def _sweep(overrides: list[str]) -> int:
    members = expand(overrides)
    varied = [one.partition("=")[0] for one in overrides if len({_value(member, one) for member in members}) > 1]
    if "out" in varied:
        raise ConfigError(f"out={_value(members[0], 'out')}: a sweep has one directory, its members lie in it")
    names = _member_names(members, varied)
    composed = [compose_run(member, Path.cwd()) for member in members]
    folder = composed[0][0]["out"]
    _check_members(composed, names, None if folder is None else Path(str(folder)))
    sweep = _Sweep(new_folder() if folder is None else Path(str(folder)), names)
    rest = [each for each in overrides if each.partition("=")[0] != "out"]
    _hydra(["--multirun", f"hydra.sweep.dir={_quoted(sweep.folder)}", "hydra.sweep.subdir=.", *rest], sweep)
    if sweep.failed:
        print(f"fedsim: {len(sweep.failed)} of {len(names)} runs failed: {', '.join(sweep.failed)}", file=sys.stderr)
    print(f"{len(names) - len(sweep.failed)} runs in {sweep.folder}; now: fedsim report {sweep.folder}")
    return 1 if sweep.failed else 0


def _check_members(composed: list[Composed], names: list[str], folder: Path | None) -> None:
    """Build every member, and load every data set once, before anything is written.

    Raises:
        ConfigError: if a member cannot run.
    """
    if folder is not None and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise ConfigError(f"out={folder}: is not a directory")
    log = None if folder is None else folder / "multirun.yaml"
    if log is not None and log.exists() and not composed[0][0]["overwrite"]:
        raise ConfigError(f"out={folder}: holds the {log.name} of a sweep, give another directory or overwrite=true")
    seen = set()
    for (config, choices), name in zip(composed, names, strict=True):
        assembly = Assembly({**config, "out": None if folder is None else str(folder / name)}, choices)
        assembly.check_out()
        data = repr([config[key] for key in ("problem", "data", "partition", "model", "clients")])
        if data not in seen:
            seen.add(data)
            assembly.prepare()


def _quoted(path: Path) -> str:
    """A path as Hydra reads it back, whatever it holds."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${") + "'"


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
                short = "" if key in GROUPS else key.rpartition(".")[2]
                parts.append(short + ("" if not short or value[:1].isdigit() else "-") + value)
        name = "".join(each if each.isalnum() or each in "._-+," else "-" for each in "_".join(parts))[:LONGEST_NAME]
        names.append(name if name and name not in names else f"{name}~{number}".lstrip("~"))
    return names


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
            raise ConfigError(f"{' '.join(flags)}: see fedsim run --help")
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
