"""What a run is: configuration, seed, versions, instruction set and code. Two runs that agree have the same hashes."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from fedsim.checkpoint import belong_together, is_foreign
from fedsim.version import __version__

LOCKED = ("torch", "numpy", "pandas", "pyarrow", "hydra-core", "omegaconf", "safetensors", "scipy", "matplotlib")
"""Distributions whose versions are part of a run's identity."""

NOT_IDENTITY = ("out", "overwrite", "pool", "checkpoint", "tracker")
"""Configuration keys that say where a run goes and how it is executed, not what it is."""


def identify(
    config: Mapping[str, Any],
    labels: Mapping[str, str],
    parts: Iterable[Any],
    execution: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The identity of a run about to begin, in plain values.

    Args:
        config: the resolved configuration.
        labels: the choice made in each group; empty for runs put together in Python.
        parts: the objects of the run, whose code counts.
        execution: what of its execution shows in the bits: the kernel on a CPU, device and group on a GPU.
    """
    parts = list(parts)
    return {
        "fedsim": __version__,
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in (*LOCKED, *_packages(parts))},
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "code_sha256": code_sha256(parts),
        "config_sha256": config_sha256(config),
        "seed": config.get("seed"),
        "choices": dict(labels),
        **({"execution": dict(execution)} if execution else {}),
    }


def parts_of(strategy: Any, problem: Any, system: Any) -> list[Any]:
    """The objects of a run whose code makes its results."""
    made_of = [getattr(problem, name, None) for name in ("data", "model", "partition")]
    devices = [system.compute, system.network, system.availability, system.faults]
    return [strategy, *strategy.jobs.values(), problem, *made_of, *devices]


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of a configuration, without the keys of ``NOT_IDENTITY``."""
    identity = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    return hashlib.sha256(yaml.safe_dump(identity, sort_keys=True).encode()).hexdigest()


def code_sha256(parts: Iterable[Any]) -> str:
    """Hash of fedsim's source files, of those that define the classes of ``parts``, and of modules beside these.

    A part may name further ``source_files``: what it loads later.
    """
    total, parts = hashlib.sha256(_own_code()), list(parts)
    made_of = {each.__module__ for one in parts for each in type(one).__mro__ if _is_users(each.__module__)}
    users = {
        name for name in list(sys.modules) if _is_users(name) and any(belong_together(name, one) for one in made_of)
    }
    for path in sorted({path for one in parts for path in getattr(one, "source_files", ())}):
        total.update(f"{path.name}\n".encode())
        total.update(path.read_bytes())
    for name in sorted(users):
        total.update(f"{name}\n".encode())
        total.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return total.hexdigest()


@lru_cache(maxsize=1)  # what this process runs is what lay there when it began, whatever is edited meanwhile
def _own_code() -> bytes:
    """Hash of fedsim's own source files, by their places within the package."""
    package = Path(__file__).parent
    # Strategies lie beside the package in a checkout, and inside it once installed; so do the configurations.
    strategies = package / "strategies" if (package / "strategies").is_dir() else package.parent / "strategies"
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py") if path.parent.name != "conf"}
    files |= {path.relative_to(package).as_posix(): path for path in package.glob("training/native/*.[ch]")}
    files |= {f"strategies/{path.name}": path for path in strategies.glob("*.py")}
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        total.update(f"{name}\n".encode())
        total.update(path.read_bytes())
    return total.digest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What has changed between two identities apart from the configuration, such as ``torch 2.12.0 -> 2.13.0``."""
    plain = ("fedsim", "python", "instruction_set", "machine")
    flat = [
        {**{key: each.get(key) for key in plain}, **each.get("execution", {}), **each["versions"]}
        for each in (old, new)
    ]
    names = dict.fromkeys([*flat[0], *flat[1]])
    pairs = [(name, flat[0].get(name), flat[1].get(name)) for name in names]
    changed = [f"{name} {before} -> {now}" for name, before, now in pairs if before != now]
    if old.get("code_sha256") != new.get("code_sha256"):
        changed.append("the code of fedsim or of the run's own classes")
    return changed


def _is_users(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    ours = module.partition(".")[0] == "fedsim"
    return file is not None and file.endswith(".py") and not ours and (module == "__main__" or not is_foreign(module))


def _packages(parts: Iterable[Any]) -> list[str]:
    """The distributions that parts name in their attribute ``package``: those their data or rules come from."""
    return sorted({str(each.package) for each in parts if isinstance(getattr(each, "package", None), str)})


@lru_cache  # as of the code: what this process has imported, whatever is installed meanwhile
def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
