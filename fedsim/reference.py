"""``fedsim list`` and ``fedsim run --help``, read from the yaml files, so that they cannot go out of date."""

from __future__ import annotations

from pathlib import Path

from fedsim.checks import ConfigError, nearest
from fedsim.config import choices, config_folder, described, groups

HYDRA_FLAGS = """\
flags
  -m, --multirun        run every combination of comma-separated values: seed=0,1,2 strategy=fedavg,fedbuff
  -j, --jobs N          runs of a sweep at a time; default one per core
  --cfg job             print the composed configuration and stop
  -sc install=bash      print the tab completion script: eval "$(fedsim -sc install=bash)"
"""


def run_help(folder: Path) -> str:
    """The text of ``fedsim run --help``."""
    lines = [
        "usage: fedsim run [-m] [key=value ...]",
        "",
        "Runs one federation in virtual time and writes its records. Groups are chosen by name (strategy=fedbuff),",
        "their settings by dotted key (strategy.buffer_size=20, local.lr=0.05, compute.sigma=1.5).",
        "",
        "keys of a run (default)",
    ]
    lines += _keys(config_folder() / "config.yaml", "")
    lines += ["", "groups (`fedsim list GROUP` shows one)"]
    for group in groups(folder):
        lines.append(f"  {group}=" + "|".join(sorted(choices(group, folder))))
    for group in groups(folder):
        for name, path in sorted(choices(group, folder).items()):
            summary, keys = described(path)
            if group == "experiment":
                lines += ["", f"{group}={name}: {summary}"]
            elif keys:
                lines += ["", f"{group}={name}: {summary}", *_keys(path, f"{group}.")]
    units = "units: times are virtual seconds, bandwidths Mbit/s, sizes bytes; null means not set."
    return "\n".join([*lines, "", units, "", HYDRA_FLAGS])


def show(group: str | None, folder: Path) -> int:
    """Print the choices of one group with their keys, or of all groups."""
    known = list(groups(folder))
    if group is not None and group not in known:
        raise ConfigError(f"{group}: unknown group, {nearest(group, known)}")
    for name in known if group is None else [group]:
        if group is None:
            print(name)
        for choice, path in sorted(choices(name, folder).items()):
            summary, _ = described(path)
            print(f"  {choice:<14} {summary}" if group is None else f"{name}={choice}: {summary}")
            if group is not None:
                print("\n".join([*_keys(path, f"{name}."), ""]))
    return 0


def _keys(path: Path, prefix: str) -> list[str]:
    rows = [(f"{prefix}{key}", default, comment) for key, default, comment in described(path)[1] if key != "_target_"]
    return [f"  {f'{key} ({default})':<34} {comment}".rstrip() for key, default, comment in rows]
