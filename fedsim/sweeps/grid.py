"""``fedsim run -m``: every combination of the values given, or those that a sweeper chooses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.assemble import new_folder
from fedsim.checks import ConfigError, Interrupted, one_of
from fedsim.config import compose_run, expand, plain
from fedsim.sweeps.index import Index
from fedsim.sweeps.members import COMPLETE, check_members, member_names, names_there, value
from fedsim.sweeps.multirun import chosen_in, hydra_main, quoted
from fedsim.sweeps.processes import Member, Sweep, tell_failed

SWEEPER = "hydra/sweeper"
SWEEPERS = ("basic", "optuna")


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
    chosen = [one.partition("=")[2] for one in overrides if one.partition("=")[0] == SWEEPER]
    if chosen and one_of(SWEEPER, chosen[-1], SWEEPERS) == "optuna":
        from fedsim.sweeps.search import search

        return search(overrides, jobs)
    members = expand(overrides)
    varied = [one.partition("=")[0] for one in overrides if len({value(member, one) for member in members}) > 1]
    if "out" in varied:
        raise ConfigError(f"out={value(members[0], 'out')}: a sweep has one directory, its members lie in it")
    names = member_names(members, varied)
    composed = [compose_run(member, Path.cwd()) for member in members]
    given = composed[0][0]["out"]
    folder = None if given is None else Path(str(given))
    if folder is not None:
        names = names_there(composed, names, folder)
    states = check_members(composed, names, folder)
    jobs = jobs or at_a_time([choices for _, choices in composed])
    folder = folder or new_folder()
    index = Index(folder, overrides)
    for name, state, (config, choices) in zip(names, states, composed, strict=True):
        index.add(name, config, choices, "complete" if state == COMPLETE else "waiting")
    rest = [each for each in overrides if each.partition("=")[0] != "out"]
    with Sweep(folder, jobs, index, len(names) - states.count(COMPLETE)) as running:

        def member(config: Any) -> None:
            """Hydra's task function: starts one member as soon as there is room for it."""
            from hydra.core.hydra_config import HydraConfig

            running.heed()  # else Hydra would compose all the others before it ends
            job = HydraConfig.get()
            number = int(job.job.num)
            if states[number] != COMPLETE:
                running.start(Member(names[number], plain(config), chosen_in(job), states[number]))

        place = [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweep.subdir=."]
        hydra_main(["--multirun", *place, *rest], member)
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
