"""What tests share of a configuration is what Hydra composes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from shared_choices import sharing

from fedsim.checks import ConfigError
from fedsim.config import chosen, plain


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("fedsim.conf", version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def by_hydra(overrides: Sequence[str], given: Sequence[str]) -> DictConfig:
    return copy.deepcopy(composed(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=scaffold_m", "problem=quadratic", "topology=random"],
        ["model=cnn", "server=momentum", "pool=ray"],
        ["experiment=first", "strategy=fedbuff"],
        ["strategy=fedavg", "strategy=fedasync"],
        ["hydra.verbose=true", "local=sam"],
    ],
)
def test_shared_choices_are_what_hydra_makes_of_them(overrides: list[str]) -> None:
    shared, expected = sharing(by_hydra), by_hydra(overrides, ())
    for _ in range(2):  # from nothing, and from what is there then
        config = shared(overrides, ())
        assert list(config) == list(expected)
        assert plain(config) == plain(expected)
        assert chosen(config.hydra.runtime.choices) == chosen(expected.hydra.runtime.choices)
        assert OmegaConf.is_struct(config) == OmegaConf.is_struct(expected)
        OmegaConf.update(config, "local.lr", 17.0)


def test_what_is_wrong_is_said_by_whoever_composes() -> None:
    def refusing(overrides: Sequence[str], given: Sequence[str]) -> DictConfig:
        if "model=nope" in overrides:
            raise ConfigError("model=nope: unknown name")
        return by_hydra(overrides, given)

    with pytest.raises(ConfigError, match=r"^model=nope: unknown name$"):
        sharing(refusing)(["local=sam", "model=nope"], [])


def test_most_choices_change_their_own_group_only() -> None:
    asked: list[tuple[str, ...]] = []

    def counting(overrides: Sequence[str], given: Sequence[str]) -> DictConfig:
        asked.append(tuple(overrides))
        return by_hydra(overrides, given)

    shared = sharing(counting)
    for pair in (["local=sam", "server=momentum"], ["pool=ray", "server=momentum"], ["local=sam", "pool=ray"]):
        shared(pair, pair)
    assert asked == [(), ("local=sam",), ("server=momentum",), ("pool=ray",)]
