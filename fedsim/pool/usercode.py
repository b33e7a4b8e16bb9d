"""Sending objects to workers together with classes that no worker could import: from a notebook or a user's folder."""

from __future__ import annotations

import pickle
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.checks import ConfigError


def pickled_with_user_code(value: Any) -> bytes:
    """Pickle ``value``, and by value the classes whose modules lie outside every installed package.

    Raises:
        ConfigError: if something in it cannot be pickled.
    """
    cloudpickle: Any = import_module("ray.cloudpickle")
    # By their own names, for a module may stand in sys.modules under several.
    ours = list({module.__name__: module for module in list(sys.modules.values()) if _is_users(module)}.values())
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        data: bytes = cloudpickle.dumps(value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(f"pool=ray: the problem or a local rule cannot be sent to workers: {error}") from None
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
    return data


def _is_users(module: ModuleType) -> bool:
    """Whether a module lies outside every installed package: no worker elsewhere has it."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__" or module.__name__.partition(".")[0] == "fedsim":
        return False
    path = Path(file).resolve()
    roots = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return path.suffix == ".py" and not any(path.is_relative_to(Path(root).resolve()) for root in roots)
