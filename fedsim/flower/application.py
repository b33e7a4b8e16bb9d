"""The Flower app of a deployment: fedsim's own, or somebody's, whose ``pyproject.toml`` is looked at first."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedsim.checks import ConfigError
from fedsim.flower.configuration import KEY, LOADER

PROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedsim-deployment"
version = "1.0.0"
description = "A federated run of fedsim on Flower"
license = "Apache-2.0"
dependencies = ["fedsim-ray"]

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "fedsim.flower.server_app:app"
clientapp = "fedsim.flower.client_app:app"

[tool.flwr.app.config]
{KEY} = ""
{LOADER} = ""
"""
"""``pyproject.toml`` of an app that consists of nothing else: both halves are in the installed fedsim."""


def write_app(folder: Path) -> Path:
    """Make fedsim's own app in ``folder``, and return it."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    return folder


def check_app(folder: Path) -> Path:
    """Return somebody's app, as an absolute path.

    Raises:
        ConfigError: naming ``--app``, if it is none or does not take fedsim's configuration.
    """
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--app={folder}: cannot be read: {path.name}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--app={folder}: {path.name} cannot be read ({error})") from None
    if not {"serverapp", "clientapp"} <= _table(project, "components").keys():
        raise ConfigError(
            f"--app={folder}: {path.name} must name both serverapp and clientapp in [tool.flwr.app.components]"
        )
    missing = [key for key in (KEY, LOADER) if not isinstance(_table(project, "config").get(key), str)]
    if missing:
        raise ConfigError(f'--app={folder}: {path.name} must have {missing[0]} = "" in [tool.flwr.app.config]')
    return folder.resolve()


def _table(project: dict[str, Any], name: str) -> dict[str, Any]:
    """The table ``[tool.flwr.app.NAME]``, empty if there is none."""
    table: Any = project
    for each in ("tool", "flwr", "app", name):
        table = table.get(each) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}
