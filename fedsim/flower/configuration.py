"""The one value of a Flower run's configuration that holds all of fedsim's: read by the server and by every node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedsim.checks import ConfigError, nearest, seconds, whole

KEY = "fedsim"
"""Of the run configuration: a JSON string, for a run configuration holds flat plain values only."""

LOADER = "loader"
"""Of the run configuration: ``package.module:function`` that loads a node's own data; empty for the partition."""


@dataclass(frozen=True)
class Settings:
    """What a deployment has and a simulation has not.

    Args:
        wait_seconds: so long the server waits for all clients before it begins with those that are there, for the
            first one before it gives up, and for anything to happen when nothing does.
        poll_seconds: between two looks at what has come.
        ttl_seconds: after which nobody waits for the answer to a message.
        most_samples: examples that a node with data of its own may say it holds.
    """

    wait_seconds: float = 300.0
    poll_seconds: float = 0.2
    ttl_seconds: float = 3600.0
    most_samples: int = 1_000_000

    def __post_init__(self) -> None:
        plain = {
            "wait_seconds": seconds("wait_seconds", self.wait_seconds, least=0),
            "poll_seconds": seconds("poll_seconds", self.poll_seconds, above=0),
            "ttl_seconds": seconds("ttl_seconds", self.ttl_seconds, above=0),
            "most_samples": whole("most_samples", self.most_samples, least=1),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Configuration:
    """What the server and its nodes are told of a run.

    Attributes:
        config: resolved, as :func:`fedsim.config.compose_run` gives it; ``out`` is a path at the server.
        choices: the choice made in each group.
        settings: of the deployment.
        loader: ``package.module:function`` of the nodes' own data; empty if they hold the configured partition.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    settings: Settings = Settings()
    loader: str = ""

    def run_config(self) -> dict[str, str]:
        """The keys of a Flower run's configuration."""
        held = {"config": self.config, "choices": self.choices, "deployment": asdict(self.settings)}
        return {KEY: json.dumps(held), LOADER: self.loader}


def run_config(
    config: Mapping[str, Any], choices: Mapping[str, str], loader: str = "", **settings: Any
) -> dict[str, str]:
    """The keys of a Flower run's configuration for a resolved configuration of fedsim.

    Args:
        config: as :func:`fedsim.config.compose_run` gives it; ``out`` should be absolute, for the server's process
            begins in a folder of its own.
        choices: the choice made in each group.
        loader: see :class:`Configuration`.
        settings: of :class:`Settings`, where they differ from the defaults.

    Raises:
        ConfigError: for a setting that there is not, or a wrong value.
    """
    return Configuration(dict(config), dict(choices), _settings(settings), loader).run_config()


def read_run_config(given: Mapping[str, Any]) -> Configuration:
    """What a Flower run's configuration says.

    Raises:
        ConfigError: if it holds no configuration of fedsim.
    """
    text, loader = given.get(KEY), given.get(LOADER, "")
    if not isinstance(text, str):
        raise ConfigError(f"{KEY}: the run configuration must hold this key, a JSON string; `fedsim deploy` makes it")
    try:
        held = json.loads(text)
        config, choices = dict(held["config"]), dict(held["choices"])
        settings = dict(held.get("deployment", {}))
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{KEY}={text[:40]}: must be a JSON object with config and choices") from None
    if not isinstance(loader, str):
        raise ConfigError(f"{LOADER}={loader}: must be package.module:function, or empty")
    return Configuration(config, choices, _settings(settings), loader)


def _settings(given: Mapping[str, Any]) -> Settings:
    names = [each.name for each in fields(Settings)]
    for key, value in given.items():
        if key not in names:
            raise ConfigError(f"{key}={value}: unknown setting of a deployment, {nearest(key, names)}")
    return Settings(**given)
