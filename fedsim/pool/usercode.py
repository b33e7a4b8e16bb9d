"""Sending objects to workers together with classes that no worker could import: from a notebook or a user's folder.

Large tensors and arrays travel beside the pickle, so that no copy of all data is made within it.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import ConfigError

LARGE = 2**16
"""Bytes from which on a tensor or an array travels by itself."""

Bytes: TypeAlias = NDArray[np.uint8]


def pickled_with_user_code(value: Any) -> list[Bytes]:
    """Pickle ``value``, and by value the classes whose modules lie outside every installed package.

    Returns:
        The pickle, and then the memory of each large tensor and array in it, which may be shared with ``value``.

    Raises:
        ConfigError: if something in it cannot be pickled.
    """
    cloudpickle: Any = import_module("ray.cloudpickle")
    # By their own names, for a module may stand in sys.modules under several.
    roots = _installed()
    ours = list({each.__name__: each for each in list(sys.modules.values()) if _is_users(each, roots)}.values())
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    file, buffers = io.BytesIO(), list[Bytes]()
    try:
        _pickler(cloudpickle, file, buffers).dump(value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ConfigError(f"pool=ray: the problem or a local rule cannot be sent to workers: {error}") from None
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
    return [np.frombuffer(file.getbuffer(), dtype=np.uint8), *buffers]


def unpickled(parts: Sequence[Bytes]) -> Any:
    """What :func:`pickled_with_user_code` was given, in memory of its own, which may be written to."""
    code, *buffers = parts
    own = [torch.empty(len(each), dtype=torch.uint8).numpy() for each in buffers]  # begins where new tensors do
    for mine, each in zip(own, buffers, strict=True):
        np.copyto(mine, each)
    return pickle.loads(code.tobytes(), buffers=own)


def _pickler(cloudpickle: Any, file: io.BytesIO, buffers: list[Bytes]) -> Any:
    """One that puts what is large into ``buffers``."""

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Whether to leave it within the pickle."""
        raw = buffer.raw()
        if raw.nbytes >= LARGE:
            buffers.append(np.frombuffer(raw, dtype=np.uint8))
        return raw.nbytes < LARGE

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if type(value) is Tensor and _is_plain(value):
                return _as_tensor, (value.detach().view(torch.uint8).numpy(), value.dtype)
            return super().reducer_override(value)

    return Pickler(file, protocol=5, buffer_callback=keep)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is large and nothing but its values, which lie densely in main memory."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
    return dense and tensor.nbytes >= LARGE and not (tensor.requires_grad or tensor.is_complex())


def _as_tensor(memory: Bytes, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(memory).view(dtype)


def _installed() -> list[Path]:
    """Where packages lie that workers have, too."""
    # Environments may lie on one another: packages of the lower one are on the path, outside the prefix.
    packages = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [Path(root).resolve() for root in (sys.prefix, sys.base_prefix, sys.exec_prefix, *packages)]


def _is_users(module: ModuleType, installed: Sequence[Path]) -> bool:
    """Whether a module lies outside every installed package: no worker elsewhere has it."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__" or module.__name__.partition(".")[0] == "fedsim":
        return False
    path = Path(file).resolve()
    return path.suffix == ".py" and not any(path.is_relative_to(root) for root in installed)
