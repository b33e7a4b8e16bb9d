"""Configurations for tests, put together from choices that Hydra has composed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

from omegaconf import DictConfig, open_dict

from fedsim.config import GROUPS, config_folder

Compose = Callable[[Sequence[str], Sequence[str]], DictConfig]


def sharing(compose: Compose) -> Compose:
    """As ``compose`` does it, a quarter of a second for each call, but every choice of ours is composed once only.

    A choice may stand in for a composition if it changes nothing but its own group's key of the default
    configuration. What tests bring themselves, values and all that is wrong goes to ``compose``.
    """
    ours = {group: {path.stem for path in (config_folder() / group).glob("*.yaml")} for group in GROUPS}

    @cache
    def whole(*choices: str) -> DictConfig:
        return compose(choices, choices)

    @cache
    def alone(group: str, name: str) -> Any:
        """The node of a choice; None if it changes anything else."""
        default, chosen = whole(), whole(f"{group}={name}")
        same = all(default.get(key) == chosen.get(key) for key in {*default, *chosen} - {group, "hydra"})
        return chosen[group] if same and group in default else None

    @wraps(compose)
    def shared(overrides: Sequence[str], given: Sequence[str]) -> DictConfig:
        named = [tuple(one.split("=", 1)) for one in overrides if "=" in one]
        groups = [group for group, _ in named]
        known = all(name in ours.get(group, ()) for group, name in named)
        if not known or len(named) < len(overrides) or len(set(groups)) < len(groups):
            return compose(overrides, given)
        nodes = [alone(group, name) for group, name in named]
        if any(node is None for node in nodes):
            return copy.deepcopy(whole(*overrides))
        config = copy.deepcopy(whole())
        with open_dict(config):
            for (group, name), node in zip(named, nodes, strict=True):
                config[group] = copy.deepcopy(node)
                config.hydra.runtime.choices[group] = name
        return config

    return shared
