"""Sweeps: Hydra's multirun expands and composes, every member runs in a process of its own, several at a time.

A member that fails, or whose process is killed, takes no other one down. A sweep that is run again leaves
complete members alone and goes on with those that were stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import yaml

from fedsim.assemble import Assembly, new_folder
from fedsim.checks import ConfigError, FedsimError, Interrupted
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
from fedsim.identity import config_sha256, differences, identify, parts_of
from fedsim.progress import LiveProgress, ended
from fedsim.record import MARKER, check_free
from fedsim.recording import IDENTITY, begun, is_complete

Composed = tuple[dict[str, Any], dict[str, str]]
"""A configuration and the choices it was made of."""

LONGEST_NAME = 150
"""Longest folder name of a sweep's member, in characters."""

NEW, AFRESH, RESUMED, COMPLETE = "new", "afresh", "resumed", "complete"
"""What becomes of a member: it begins, begins anew in place of what was stopped, goes on, or is left alone."""


def sweep(overrides: Sequence[str], jobs: int | None) -> int:
    """Run every combination.

    Args:
        overrides: Hydra's, with several values for some keys.
        jobs: members that run at a time; None is one per core, or one at all if members bring workers of their own.

    Returns:
        0 if all members are complete, else 1.

    Raises:
        ConfigError: before anything is written, if any member cannot run.
        Interrupted: after a signal, once every running member has saved itself.
    """
    members = expand(overrides)
    varied = [one.partition("=")[0] for one in overrides if len({_value(member, one) for member in members}) > 1]
    if "out" in varied:
        raise ConfigError(f"out={_value(members[0], 'out')}: a sweep has one directory, its members lie in it")
    names = _member_names(members, varied)
    composed = [compose_run(member, Path.cwd()) for member in members]
    given = composed[0][0]["out"]
    folder = None if given is None else Path(str(given))
    if folder is not None:
        names = _names_there(composed, names, folder)
    states = _check_members(composed, names, folder)
    if jobs is None:
        alone = all(choices["pool"] == "inline" for _, choices in composed)
        jobs = _cores() if alone else 1
    running = Sweep(folder or new_folder(), names, states, jobs)
    rest = [each for each in overrides if each.partition("=")[0] != "out"]
    with running:
        place = [f"hydra.sweep.dir={_quoted(running.folder)}", "hydra.sweep.subdir=."]
        hydra_main(["--multirun", *place, *rest], running.member)
    failed = [name for name in names if running.statuses.get(name)]
    if running.interrupted:
        said = f"interrupted; go on with the same command and out={running.folder}"
        raise Interrupted(said, running.interrupted)
    if failed:
        print(f"fedsim: {len(failed)} of {len(names)} runs failed: {', '.join(failed)}", file=sys.stderr)
    skipped = f" ({states.count(COMPLETE)} were complete already)" if COMPLETE in states else ""
    print(f"{len(names) - len(failed)} runs in {running.folder}{skipped}; now: fedsim report {running.folder}")
    return 1 if failed else 0


# ---- running the members ---------------------------------------------------------------------------


@dataclass
class Sweep:
    """The members of a sweep while they run.

    Attributes:
        statuses: exit status of each member that has ended, by name.
        interrupted: the signal that told the sweep to stop; 0 so far.
    """

    folder: Path
    names: list[str]
    states: list[str]
    jobs: int
    statuses: dict[str, int] = field(default_factory=dict)
    interrupted: int = 0
    _running: list[tuple[str, BaseProcess]] = field(default_factory=list)
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Sweep:
        self._before = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._running:
                self._wait()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def member(self, config: Any) -> None:
        """Hydra's task function: starts one member as soon as there is room for it."""
        from hydra.core.hydra_config import HydraConfig

        job = HydraConfig.get()
        number = int(job.job.num)
        name, state = self.names[number], self.states[number]
        while len(self._running) >= self.jobs:
            self._wait()
        if self.interrupted or state == COMPLETE:
            return
        choices = {str(group): str(choice) for group, choice in job.runtime.choices.items() if group in GROUPS}
        values = {**plain(config), "out": str(self.folder / name)}
        if state == AFRESH:
            values["overwrite"] = True
        title = f"[{number + 1}/{len(self.names)}] {name}"
        # A fresh process for each: one that is killed, for the memory it takes say, is the only one to go.
        context = get_context("forkserver")
        context.set_forkserver_preload(["fedsim.sweeps"])
        process = context.Process(target=_run_member, args=(values, choices, title, state == RESUMED, self.jobs == 1))
        process.start()
        self._running.append((name, process))
        if self.interrupted:  # while it was being started
            process.terminate()

    def _wait(self) -> None:
        """Take in the members that have ended; at least one, unless a signal comes first."""
        connection.wait([process.sentinel for _, process in self._running], timeout=1.0)
        ended_now = [(name, process) for name, process in self._running if not process.is_alive()]
        self._running = [member for member in self._running if member not in ended_now]
        for name, process in ended_now:
            process.join()
            status = process.exitcode or 0
            self.statuses[name] = abs(status)
            if status < 0 and not self.interrupted:
                print(f"fedsim: {name}: its process was killed ({signal.strsignal(-status)})", file=sys.stderr)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Tell every running member to save itself; a second signal stops them at once."""
        self.interrupted = number
        for _, process in self._running:
            process.terminate()


def _run_member(config: dict[str, Any], choices: dict[str, str], title: str, resume: bool, alone: bool) -> None:
    """The body of a member's process; its exit status says how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep's own process gets it and tells us by a SIGTERM
    Thread(target=_stop_with_parent, daemon=True).start()
    try:
        with LiveProgress(title if alone else None) as progress:
            run = Assembly(config, choices).run(progress, resume)
        print(ended(run), flush=True)
        status = 0
    except Interrupted as interruption:
        status = 128 + interruption.signal
    except (FedsimError, MemoryError) as error:
        print(f"fedsim: {Path(config['out']).name}: {error}", file=sys.stderr, flush=True)
        status = 1
    except Exception:  # a bug in somebody's strategy: shown whole
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _stop_with_parent() -> None:
    """Save the run and stop when the sweep's own process is killed: else the next one would find it still at work."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def hydra_main(arguments: list[str], task: Any) -> None:
    """Hand over to Hydra's own main, for multirun and shell completion; ``task(config)`` is called for each member."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    folder = Path.cwd()
    register_strategies(folder)
    GlobalHydra.instance().clear()
    flags = [each for each in arguments if each.startswith("-")]
    # Overrides must come last: everything after the first one is taken for an override.
    sys.argv = ["fedsim", *flags, *search_path(folder), *[each for each in arguments if each not in flags]]

    def called(config: Any) -> None:  # Hydra insists on a function that it can look into
        task(config)

    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(called)()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- before anything is written --------------------------------------------------------------------


def _check_members(composed: list[Composed], names: list[str], folder: Path | None) -> list[str]:
    """Build every member, load every data set once, and see what there is of each member already.

    Raises:
        ConfigError: if a member cannot run.
    """
    if folder is not None and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise ConfigError(f"out={folder}: is not a directory")
    if folder is not None and not _is_hydras(folder / "multirun.yaml"):
        raise ConfigError(f"out={folder}: its multirun.yaml is no sweep's of Hydra, give another directory")
    seen, states = set(), []
    for (config, choices), name in zip(composed, names, strict=True):
        assembly = Assembly({**config, "out": None if folder is None else str(folder / name)}, choices)
        states.append(NEW if assembly.out is None else _state(assembly, assembly.out))
        if states[-1] == NEW:
            assembly.check_out()
        data = repr([config[key] for key in ("problem", "data", "partition", "model", "clients")])
        if data not in seen:
            seen.add(data)
            assembly.prepare()
    return states


def _state(assembly: Assembly, path: Path) -> str:
    """What becomes of a member whose directory may be there already."""
    if assembly.overwrite or not (path / MARKER).is_file():
        return NEW
    parts = parts_of(assembly.strategy, assembly.problem, assembly.system)
    identity = identify(assembly.config, assembly.choices, parts)
    if is_complete(path):
        state, before = COMPLETE, json.loads((path / "manifest.json").read_text())
    else:
        try:
            state, before = RESUMED, begun(path)
        except ConfigError:  # stopped before it had begun
            return _afresh(path)
    if before["config_sha256"] != identity["config_sha256"]:
        raise ConfigError(f"out={path}: holds a run of another configuration, give another directory or overwrite=true")
    changed = differences(before, identity)
    if state == RESUMED and (changed or assembly.strategy.unsaved is not None):
        return _afresh(path)
    if changed:
        print(f"fedsim: {path}: complete, but made by something else ({'; '.join(changed)})", file=sys.stderr)
    return state


def _names_there(composed: list[Composed], names: list[str], folder: Path) -> list[str]:
    """The members' names, those kept that an earlier sweep into this folder gave to the same configurations."""
    there: dict[str, str] = {}
    for path in sorted(folder.glob(f"*/{MARKER}")):
        for identity in (path.parent / "manifest.json", path.parent / "checkpoint" / IDENTITY):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                there.setdefault(json.loads(identity.read_text())["config_sha256"], path.parent.name)
    kept = [there.get(config_sha256(config), name) for (config, _), name in zip(composed, names, strict=True)]
    return [name if kept.count(name) == 1 else own for name, own in zip(kept, names, strict=True)]


def _is_hydras(path: Path) -> bool:
    """Whether a file may be written anew by Hydra: it is its own, or not there."""
    try:
        return "hydra" in (yaml.safe_load(path.read_text()) or {})
    except FileNotFoundError:
        return True
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError):
        return False


def _afresh(path: Path) -> str:
    check_free(path, overwrite=True)
    return AFRESH


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
