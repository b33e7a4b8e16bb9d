"""Hydra's own multirun: it expands, composes, and hands over every member."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim.config import CONFIG_MODULE, CONFIG_NAME, GROUPS, register_strategies, search_path


def hydra_main(arguments: Sequence[str], task: Callable[[Any], Any]) -> None:
    """Hand over to Hydra's own main, for multirun and shell completion; ``task(config)`` is called for each member."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    folder = Path.cwd()
    register_strategies(folder)
    GlobalHydra.instance().clear()
    flags = [each for each in arguments if each.startswith("-")]
    # Overrides must come last: everything after the first one is taken for an override.
    sys.argv = ["fedsim", *flags, *search_path(folder), *[each for each in arguments if each not in flags]]

    def called(config: Any) -> Any:  # Hydra insists on a function that it can look into
        return task(config)

    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(called)()


def quoted(path: Path) -> str:
    """A path as Hydra reads it back, whatever it holds."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${") + "'"


def chosen_in(job: Any) -> dict[str, str]:
    """The choice in every group, from Hydra's own part of a configuration."""
    return {
        str(group): str(choice)
        for group, choice in job.runtime.choices.items()
        if group in GROUPS and choice is not None and choice != "null"
    }
