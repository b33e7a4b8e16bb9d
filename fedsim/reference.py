"""``fedsim list`` and ``fedsim run --help``, read from the yaml files, so that they cannot go out of date.

The table of strategies is read from their docstrings as well.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from fedsim.checks import ConfigError, nearest, one_of
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


def show(group: str | None, folder: Path, format: str = "plain") -> int:
    """Print the choices of one group with their keys, or of all groups; strategies also as a Markdown table."""
    known = list(groups(folder))
    if group is not None and group not in known:
        raise ConfigError(f"{group}: unknown group, {nearest(group, known)}")
    if one_of("format", format, ("plain", "markdown")) == "markdown":
        if group != "strategy":
            raise ConfigError(f"format=markdown: only `fedsim list strategy` has a table, not {group or 'all groups'}")
        print(strategy_table(folder), end="")
        return 0
    for name in known if group is None else [group]:
        if group is None:
            print(name)
        for choice, path in sorted(choices(name, folder).items()):
            summary, _ = described(path)
            print(f"  {choice:<14} {summary}" if group is None else f"{name}={choice}: {summary}")
            if group is not None:
                print("\n".join([*_keys(path, f"{name}."), ""]))
    return 0


def strategy_table(folder: Path) -> str:
    """All strategies as a Markdown table: paper and traffic from their docstrings, the rest from their yaml files.

    Nothing of a strategy is run for it. Traffic is in vectors of the model's size.
    """
    lines = ["| `strategy=` | what it is | paper | vectors that travel |", "|---|---|---|---|"]
    for name, path in sorted(choices("strategy", folder).items()):
        what, authors = re.fullmatch(r"(.*?)(?: \(([^()]* \d{4})\))?", described(path)[0]).groups()  # type: ignore[union-attr]
        docstring = _docstring(path)
        arxiv = re.search(r"arXiv:?\s+(\d{4}\.\d{4,5})", docstring.partition("\n\n")[0])
        paper = f"[{authors or arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else authors or ""
        lines.append(f"| `{name}` | {what} | {paper} | {_traffic(docstring)} |")
    return "\n".join(lines) + "\n"


def _docstring(path: Path) -> str:
    """Of the module that a yaml file's ``_target_`` lies in, without importing it; empty where it cannot be found."""
    found = re.search(r"^_target_: *([\w.]+)\.\w+", path.read_text(), re.M)
    try:
        spec = find_spec(found[1]) if found else None
        return (ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text())) or "") if spec else ""
    except (ImportError, OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _traffic(docstring: str) -> str:
    """The first statement after ``Traffic``, without what is in parentheses."""
    found = re.search(r"^Traffic +(.*(?:\n +.*)*)", docstring, re.M)
    if not found:
        return ""
    text = re.sub(r" \([^()]*(?:\([^()]*\)[^()]*)*\)", "", re.sub(r"\s+", " ", found[1]))
    return re.split(r"[;.](?: |$)", text)[0].strip()


def _keys(path: Path, prefix: str) -> list[str]:
    rows = [(f"{prefix}{key}", default, comment) for key, default, comment in described(path)[1] if key != "_target_"]
    return [f"  {f'{key} ({default})':<34} {comment}".rstrip() for key, default, comment in rows]
