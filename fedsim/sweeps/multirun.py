"""Hydra's own multirun, for its sweepers and for shell completion, and the file that it leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim.config import CONFIG_MODULE, CONFIG_NAME, register_strategies, search_path


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


def leave_multirun(folder: Path, overrides: Sequence[str]) -> None:
    """Write ``multirun.yaml``, which Hydra leaves in the folder of a sweep: what was asked for, and by which Hydra."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    own = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={quoted(folder)}", "hydra.sweep.subdir=.", *search_path(Path.cwd())]
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, job_name="fedsim", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(CONFIG_NAME, [*own, *overrides], RunMode.MULTIRUN)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "multirun.yaml")


def quoted(path: Path) -> str:
    """A path as Hydra reads it back, whatever it holds."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${") + "'"
