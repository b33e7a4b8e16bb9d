"""A Flower app as it lies in a folder: ``pyproject.toml`` names its components and settings."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.checks import ConfigError, nearest, said
from fedsim.flower.simulated.process_state import importable
from fedsim.flower.simulated.strategy import App, FlowerApp

KINDS = {"serverapp": ServerApp, "clientapp": ClientApp}
"""What an app is made of, by its name in ``[tool.flwr.app.components]``."""

Settings = dict[str, bool | int | float | str]


class AppFolder(App):
    """A Flower app in a folder. Its modules are imported anew for every run, so that none inherits another's state.

    Args:
        path: the folder.
        run_config: values to change in ``[tool.flwr.app.config]``, nested or with dots in their names.

    Raises:
        ConfigError: if it is no Flower app's, or a setting is not one of the app's.
    """

    def __init__(self, path: str, run_config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path).expanduser().resolve()
        self._shown = f"strategy.app={path}"
        about = self._about()
        self.components = self._components(about)
        self.run_config = fused(
            flat(about.get("config", {}), self._shown), flat(run_config or {}, "strategy.run_config")
        )

    @property
    def source_files(self) -> tuple[Path, ...]:  # type: ignore[override]
        """Its Python files and ``pyproject.toml``."""
        return (*sorted(self.path.rglob("*.py")), self.path / "pyproject.toml")

    def load(self) -> tuple[ServerApp, ClientApp]:
        """Import both components.

        Raises:
            ConfigError: if that fails, or one is something else.
        """
        self._unload()
        importlib.invalidate_caches()
        try:
            with importable(str(self.path)):
                return self._component("serverapp"), self._component("clientapp")
        except ConfigError:
            self._unload()
            raise

    def running(self) -> ExitStack:
        """Its modules can be imported while it runs, and are gone afterwards."""
        stack = ExitStack()
        stack.callback(self._unload)
        stack.enter_context(importable(str(self.path)))
        return stack

    def _about(self) -> dict[str, Any]:
        """The table ``[tool.flwr.app]``."""
        file = self.path / "pyproject.toml"
        if not self.path.is_dir():
            raise ConfigError(f"{self._shown}: there is no such folder")
        try:
            project = tomllib.loads(file.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self._shown}: must hold a Flower app, it has no pyproject.toml") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{self._shown}: pyproject.toml cannot be read ({said(error)})") from None
        table: Any = project
        for name in ("tool", "flwr", "app"):
            table = table.get(name, {}) if isinstance(table, dict) else {}
        return table if isinstance(table, dict) else {}

    def _components(self, about: Mapping[str, Any]) -> dict[str, str]:
        named = about.get("components", {})
        for kind in KINDS:
            reference = named.get(kind)
            if reference is None:
                raise ConfigError(f"{self._shown}: pyproject.toml must name a {kind} in [tool.flwr.app.components]")
            if not isinstance(reference, str) or not all(reference.partition(":")):
                raise ConfigError(f"{self._shown}: {kind}={reference} in its pyproject.toml must be module:name")
        return {kind: named[kind] for kind in KINDS}

    def _component(self, kind: str) -> Any:
        reference = self.components[kind]
        module_name, _, name = reference.partition(":")
        shown = f"{self._shown}: {kind}={reference}"
        try:
            found: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{shown} cannot be imported: {type(error).__name__}: {said(error)}") from error
        for part in name.split("."):
            if not hasattr(found, part):
                names = [each for each in vars(found) if not each.startswith("_")]
                raise ConfigError(f"{shown}: there is no '{part}', {nearest(part, names)}")
            found = getattr(found, part)
        if not isinstance(found, KINDS[kind]):
            raise ConfigError(f"{shown}: must be a {KINDS[kind].__name__}, is a {type(found).__name__}")
        return found

    def _unload(self) -> None:
        """Forget its modules, and those of another app with the same names."""
        named = {reference.partition(":")[0].partition(".")[0] for reference in self.components.values()}
        tops = {top for top in named if (self.path / top).is_dir() or (self.path / f"{top}.py").is_file()}
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name.partition(".")[0] in tops or (file and Path(file).is_relative_to(self.path)):
                del sys.modules[name]


def flat(settings: Mapping[str, Any], shown: str, prefix: str = "") -> Settings:
    """Nested settings as one mapping with dots in its names, as Flower flattens them.

    Raises:
        ConfigError: for a value that Flower does not take.
    """
    found: Settings = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, shown, f"{name}.")
        elif isinstance(value, (bool, int, float, str)):
            found[name] = value
        else:
            raise ConfigError(f"{shown}: {name}={value} must be true or false, a number or text")
    return found


def fused(own: Settings, changes: Settings) -> Settings:
    """An app's settings with some of them changed, each to a value of its kind.

    Raises:
        ConfigError: for a setting that the app does not have, or a value of another kind.
    """
    for name, value in changes.items():
        shown = f"strategy.run_config.{name}={value}"
        if name not in own:
            raise ConfigError(f"{shown}: the app has no such setting, {nearest(name, own)}")
        kind = type(own[name])
        if kind is float and type(value) is int:
            changes = {**changes, name: float(value)}
        elif type(value) is not kind:
            names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            raise ConfigError(f"{shown}: must be {names[kind]}")
    return {**own, **changes}


def flower_app(
    app: str,
    run_config: dict[str, Any] | None = None,
    batch_size: int = 32,
    epochs: int = 1,
    local_steps: int | None = None,
    evaluate_cost: float = 1 / 3,
) -> FlowerApp:
    """The strategy of a Flower app in the folder ``app``; the other arguments as for :class:`FlowerApp`.

    Raises:
        ConfigError: if there is none, or an argument is out of range.
    """
    return FlowerApp(AppFolder(app, run_config), batch_size, epochs, local_steps, evaluate_cost)
