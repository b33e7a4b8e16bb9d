"""The members of a sweep before they run: their names, and what there is of each already."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fedsim.assemble import Assembly
from fedsim.checks import ConfigError
from fedsim.config import GROUPS
from fedsim.identity import config_sha256, differences, identify, parts_of
from fedsim.record import MARKER, check_free
from fedsim.recording import IDENTITY, begun, is_complete

Composed = tuple[dict[str, Any], dict[str, str]]
"""A configuration and the choices it was made of."""

LONGEST_NAME = 150
"""Longest folder name of a sweep's member, in characters."""

NEW, AFRESH, RESUMED, COMPLETE = "new", "afresh", "resumed", "complete"
"""What becomes of a member: it begins, begins anew in place of what was stopped, goes on, or is left alone."""


def check_members(composed: Iterable[Composed], names: list[str], folder: Path | None) -> list[str]:
    """Build every member, load every data set once, and see what there is of each member already.

    Raises:
        ConfigError: if a member cannot run.
    """
    if folder is not None and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise ConfigError(f"out={folder}: is not a directory")
    if folder is not None and not _is_hydras(folder / "multirun.yaml"):
        raise ConfigError(f"out={folder}: its multirun.yaml is no sweep's of Hydra, give another directory")
    seen, states = set(), []
    for (config, choices), name in zip(composed, names, strict=True):
        assembly = Assembly({**config, "out": None if folder is None else str(folder / name)}, choices)
        states.append(NEW if assembly.out is None else state_of(assembly, assembly.out))
        if states[-1] == NEW:
            assembly.check_out()
        data = repr([config[key] for key in ("problem", "data", "partition", "model", "clients")])
        if data not in seen:
            seen.add(data)
            assembly.prepare()
    return states


def state_of(assembly: Assembly, path: Path) -> str:
    """What becomes of a member whose directory may be there already."""
    if assembly.overwrite or not (path / MARKER).is_file():
        return NEW
    parts = parts_of(assembly.strategy, assembly.problem, assembly.system)
    identity = identify(assembly.config, assembly.choices, parts, assembly.pool.identity())
    if is_complete(path):
        state, before = COMPLETE, json.loads((path / "manifest.json").read_text())
    else:
        try:
            state, before = RESUMED, begun(path)
        except ConfigError:  # stopped before it had begun
            return _afresh(path)
    if before["config_sha256"] != identity["config_sha256"]:
        raise ConfigError(f"out={path}: holds a run of another configuration, give another directory or overwrite=true")
    changed = differences(before, identity)
    if state == RESUMED and (changed or assembly.strategy.unsaved is not None):
        return _afresh(path)
    if changed:
        print(f"fedsim: {path}: complete, but made by something else ({'; '.join(changed)})", file=sys.stderr)
    return state


def names_there(composed: list[Composed], names: list[str], folder: Path) -> list[str]:
    """The members' names, those kept that an earlier sweep into this folder gave to the same configurations."""
    there = hashes_in(folder)
    kept = [there.get(config_sha256(config), name) for (config, _), name in zip(composed, names, strict=True)]
    return [name if kept.count(name) == 1 else own for name, own in zip(kept, names, strict=True)]


def hashes_in(folder: Path) -> dict[str, str]:
    """The names of the runs in a folder by the hashes of their configurations."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob(f"*/{MARKER}")):
        for identity in (path.parent / "manifest.json", path.parent / "checkpoint" / IDENTITY):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                found.setdefault(json.loads(identity.read_text())["config_sha256"], path.parent.name)
    return found


def _is_hydras(path: Path) -> bool:
    """Whether a file may be written anew by Hydra: it is its own, or not there."""
    try:
        return "hydra" in (yaml.safe_load(path.read_text()) or {})
    except FileNotFoundError:
        return True
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError):
        return False


def _afresh(path: Path) -> str:
    check_free(path, overwrite=True)
    return AFRESH


def value(member: list[str], override: str) -> str:
    """What a member gives to the key of ``override``; empty if it does not name it."""
    key = override.partition("=")[0]
    return next((one.partition("=")[2] for one in member if one.partition("=")[0] == key), "")


def member_names(members: list[list[str]], varied: list[str]) -> list[str]:
    """Folder names such as ``fedbuff_seed1``. No ``=``: pandas would take it for a partition of a table."""
    names: list[str] = []
    for number, member in enumerate(members):
        parts = []
        for one in member:
            key, _, value = one.partition("=")
            if key in varied:
                short = "" if key in GROUPS else key.rpartition(".")[2]
                parts.append(short + ("" if not short or value[:1].isdigit() else "-") + value)
        name = "".join(each if each.isalnum() or each in "._-+," else "-" for each in "_".join(parts))[:LONGEST_NAME]
        names.append(name if name and name not in names else f"{name}~{number}".lstrip("~"))
    return names
