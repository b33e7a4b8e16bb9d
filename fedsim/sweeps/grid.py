"""``fedsim run -m``: every combination of the values given, or those that a sweeper chooses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedsim.assemble import new_folder
from fedsim.checks import ConfigError, Interrupted, one_of
from fedsim.config import compose_runs, expand, spelt_out
from fedsim.progress import LiveProgress
from fedsim.sweeps.index import Index
from fedsim.sweeps.members import COMPLETE, check_members, member_names, names_there, value
from fedsim.sweeps.multirun import leave_multirun
from fedsim.sweeps.processes import Member, Sweep, tell_failed

SWEEPER = "hydra/sweeper"
HYDRAS = {SWEEPER: ("basic", "optuna"), "hydra/launcher": ("basic",)}
"""What may be chosen of Hydra's own: processes are ours, so another launcher has nothing to launch."""


def sweep(overrides: Sequence[str], jobs: int | None) -> int:
    """Run every combination, or what Optuna chooses with ``hydra/sweeper=optuna``.

    Args:
        overrides: Hydra's, with several values for some keys.
        jobs: members that run at a time; None is one per core, or one at all if members bring workers of their own.

    Returns:
        0 if all members are complete, else 1.

    Raises:
        ConfigError: before anything is written, if any member cannot run.
        Interrupted: after a signal, once every running member has saved itself.
    """
    overrides = spelt_out(overrides, Path.cwd())
    given = dict(one.partition("=")[::2] for one in overrides)
    for key in HYDRAS.keys() & given.keys():
        one_of(key, given[key], HYDRAS[key])
    if given.get(SWEEPER) == "optuna":
        from fedsim.sweeps.search import search

        return search(overrides, jobs)
    members = expand(overrides)
    varied = [one.partition("=")[0] for one in overrides if len({value(member, one) for member in members}) > 1]
    if "out" in varied:
        raise ConfigError(f"out={value(members[0], 'out')}: a sweep has one directory, its members lie in it")
    names = member_names(members, varied)
    with LiveProgress(f"sweep of {len(members)}") as progress:
        composed = list(compose_runs(progress.through(members, "composing"), Path.cwd()))
        out = composed[0][0]["out"]
        folder = None if out is None else Path(str(out))
        if folder is not None:
            names = names_there(composed, names, folder)
        states = check_members(progress.through(composed, "checking"), names, folder)
    jobs = jobs or at_a_time([choices for _, choices in composed])
    folder = folder or new_folder()
    index = Index(folder, overrides)
    for name, state, (config, choices) in zip(names, states, composed, strict=True):
        index.add(name, config, choices, "complete" if state == COMPLETE else "waiting")
    leave_multirun(folder, [each for each in overrides if each.partition("=")[0] != "out"])
    with Sweep(folder, jobs, index, len(names) - states.count(COMPLETE)) as running:
        for name, state, (config, choices) in zip(names, states, composed, strict=True):
            if state != COMPLETE:
                running.start(Member(name, config, choices, state))
    if running.interrupted:
        raise Interrupted(f"interrupted; go on with the same command and out={folder}", running.interrupted)
    failed = [name for name in names if running.statuses.get(name)]
    tell_failed(failed, len(names))
    skipped = f" ({states.count(COMPLETE)} were complete already)" if COMPLETE in states else ""
    print(f"{len(names) - len(failed)} runs in {folder}{skipped}; now: fedsim report {folder}")
    return 1 if failed else 0


def at_a_time(choices: Sequence[dict[str, str]]) -> int:
    """Members to run at a time unless told: one per core, or one at all if any brings workers of its own."""
    if any(each["pool"] != "inline" for each in choices):
        return 1
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
