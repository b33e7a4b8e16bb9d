"""Finished runs on disk: found, read, put into groups that differ in the seed only, and averaged over seeds."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas
from omegaconf import OmegaConf
from scipy.special import stdtrit

from fedsim.checks import ConfigError, FedsimError

Floats = npt.NDArray[np.floating[Any]]
Warn = Callable[[str], None]

# What a run's numbers do not depend on: where it is written, how it was executed and what it said meanwhile.
# Everything else keeps runs apart; a key is added here only if it cannot change a result.
IGNORED = frozenset({"seed", "out", "overwrite", "pool", "progress", "verbose", "quiet", "checkpoint", "tracker"})
NEEDED = ("round", "time", "up_bytes", "down_bytes")
UNSET = "unset"


class Interval(NamedTuple):
    """A mean over ``n`` seeds and the half-width of its 95 % t-interval (nan for fewer than two seeds)."""

    mean: float
    half: float
    n: int


def t_interval(values: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Mean over the first axis (the seeds) and half-width of its 95 % t-interval, in the unit of ``values``.

    The half-width is t(0.975, n - 1) s / sqrt(n) with s the sample deviation (n - 1 in its denominator); nan for n < 2.
    """
    array = np.asarray(values, dtype=np.float64)
    n = array.shape[0]
    with np.errstate(all="ignore"):  # a diverged seed makes the mean inf or nan, and that is what is shown
        mean = array.mean(axis=0) if n else np.full(array.shape[1:], math.nan)
        if n < 2:
            return mean, np.full_like(mean, math.nan)
        return mean, stdtrit(n - 1, 0.975) * array.std(axis=0, ddof=1) / math.sqrt(n)


def over_seeds(values: Sequence[float]) -> Interval:
    """:func:`t_interval` of one number per seed."""
    mean, half = t_interval(values)
    return Interval(float(mean), float(half), len(values))


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One finished run: its directory, configuration and manifest; its tables are read when first asked for."""

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def seed(self) -> Any:
        """The seed in the configuration, else the one in the manifest."""
        return self.config.get("seed", self.manifest.get("seed"))

    @property
    def clock(self) -> str:
        """``virtual`` or ``wall``: what the seconds in the tables are."""
        return str(self.manifest.get("clock", "virtual"))

    @cached_property
    def metrics(self) -> pandas.DataFrame:
        """A row per evaluation, in the order of time; seconds and bytes. Raises :class:`FedsimError` if unreadable."""
        table = _read_table(self.path / "metrics.parquet")
        missing = [name for name in NEEDED if name not in table.columns]
        if missing or table.empty:
            what = f"lacks the columns {', '.join(missing)}" if missing else "has no rows"
            raise FedsimError(f"{self.path / 'metrics.parquet'}: {what}")
        return table.sort_values("time", kind="stable", ignore_index=True)

    @cached_property
    def events(self) -> pandas.DataFrame:
        """A row per task; seconds and bytes. Raises :class:`FedsimError` if unreadable."""
        return _read_table(self.path / "events.parquet")

    @cached_property
    def clients(self) -> pandas.DataFrame:
        """A row per client. Raises :class:`FedsimError` if unreadable."""
        return _read_table(self.path / "clients.parquet")

    @cached_property
    def links(self) -> pandas.DataFrame:
        """A row per message between nodes; empty for methods without. Raises :class:`FedsimError` if unreadable."""
        path = self.path / "links.parquet"
        return _read_table(path) if path.exists() else pandas.DataFrame({"src": [], "dst": []})

    def column(self, name: str) -> Floats:
        """One column of ``metrics`` as it was stored; ``bytes`` is up plus down."""
        if name == "bytes":
            return self.column("up_bytes") + self.column("down_bytes")
        values: Floats = self.metrics[name].to_numpy()
        return values

    def measures(self, name: str) -> bool:
        """Whether ``metrics`` has a column ``name`` of numbers with at least one value in it."""
        if name not in self.metrics.columns or not pandas.api.types.is_numeric_dtype(self.metrics[name]):
            return False
        return bool(self.metrics[name].notna().any())


def say(line: str) -> None:
    """Print one line on the standard error stream."""
    print(f"fedsim report: {line}", file=sys.stderr)


def load(directories: Iterable[str | os.PathLike[str]], warn: Warn = say) -> list[RunRecord]:
    """Every finished run in ``directories`` and below them, each once, in the order of the arguments, then of paths.

    Unfinished runs (a configuration without a manifest) are counted and named in one line, runs whose
    manifest or configuration cannot be read in a line each. Raises :class:`ConfigError` if a directory does not exist.
    """
    finished, unfinished = _find(directories)
    if unfinished:
        count = f"{len(unfinished)} unfinished run{'s' if len(unfinished) > 1 else ''}"
        warn(f"{count} left out (no manifest.json): {', '.join(str(path) for path in unfinished)}")
    runs = []
    for path in finished:
        try:
            runs.append(RunRecord(path, _read_config(path / "config.yaml"), _read_json(path / "manifest.json")))
        except FedsimError as error:
            warn(f"run left out: {error}")
    return runs


def common_folder(directories: Sequence[str]) -> Path | None:
    """Where files about runs go: the first directory if it holds runs, else the folder of all arguments, if any."""
    first = Path(directories[0])
    if not (first / "manifest.json").exists():
        return first
    common = Path(os.path.commonpath([os.path.abspath(each) for each in directories]))
    # Further up lies what the user did not name: not a place to leave files in.
    inside = {Path(os.path.abspath(first)): first, Path(os.path.abspath(first)).parent: first.parent}
    return inside.get(common)


def readable(runs: Iterable[RunRecord], warn: Warn = say) -> list[RunRecord]:
    """The runs whose metrics can be read; a line for each of the others."""
    kept = []
    for run in runs:
        try:
            _ = run.metrics
        except FedsimError as error:
            warn(f"run left out: {error}")
        else:
            kept.append(run)
    return kept


def group(runs: Iterable[RunRecord], warn: Warn = say) -> dict[str, list[RunRecord]]:
    """Groups of runs that differ in nothing but the seed (and :data:`IGNORED`), by label, in the order of labels.

    A label holds what differs between the groups, as short as it can be. Of a (configuration, seed) that
    occurs twice the first is kept. ``warn`` hears of that, and of runs made by several versions or codes or on several
    instruction sets or machines, where equal seeds need not give equal bits.
    """
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        members = found.setdefault(json.dumps(_settings(run), sort_keys=True, default=str), [])
        twin = next((other for other in members if other.seed == run.seed), None)
        if twin is None:
            members.append(run)
            continue
        hashes = ("model_sha256", "events_sha256")
        unlike = [name for name in hashes if twin.manifest.get(name) != run.manifest.get(name)]
        differ = f", though they differ in {' and '.join(unlike)}" if unlike else ""
        warn(f"same configuration and seed {run.seed} twice: {twin.path} kept, {run.path} left out{differ}")
    labels = _labels([members[0] for members in found.values()])
    groups = dict(zip(labels, found.values(), strict=True))
    for line in _unlike(groups):
        warn(line)
    return {label: groups[label] for label in sorted(groups, key=_natural)}


def distinctions(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[str, str]]:
    """What tells each group from the others, as its label says it: settings such as ``partition.alpha`` and values."""
    firsts = [members[0] for members in groups.values()]
    settings = [_settings(run) for run in firsts]
    parts = [_distinct(run, own, settings) for run, own in zip(firsts, settings, strict=True)]
    return dict(zip(groups, parts, strict=True))


def configuration_differences(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, list[str]]:
    """Every setting in which groups differ, dotted, with its value in each group in their order."""
    settings = [_settings(members[0]) for members in groups.values()]
    keys = dict.fromkeys(key for own in settings for key in own)
    return {
        key: [_text(own, key) for own in settings] for key in keys if len({_value(own, key) for own in settings}) > 1
    }


def strategy_name(run: RunRecord) -> str:
    """The short name of a run's strategy, or an empty string where there is none."""
    return _short("strategy", _settings(run), run) if "strategy" in run.config else ""


def _find(directories: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[Path]]:
    finished: dict[Path, Path] = {}  # by resolved path: arguments may overlap
    unfinished: dict[Path, Path] = {}
    for directory in directories:
        if not os.path.isdir(directory):
            raise ConfigError(f"{os.fspath(directory)}: no such directory")
        for folder, below, files in os.walk(directory):
            # Hydra keeps a config.yaml in .hydra, which is no run; tables and checkpoints hold none either.
            below[:] = sorted(name for name in below if not name.startswith(".") and not name.endswith(".parquet"))
            path = Path(folder)
            if "manifest.json" in files:
                finished.setdefault(path.resolve(), path)
            elif "config.yaml" in files and not _is_source(path / "config.yaml"):
                unfinished.setdefault(path.resolve(), path)
    return list(finished.values()), list(unfinished.values())


def _is_source(path: Path) -> bool:
    """Whether a config.yaml is one that Hydra composes from, which a resolved one never is."""
    try:
        return any(line.startswith("defaults:") for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return False


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        # OmegaConf and not yaml alone: yaml 1.1 takes 1e-3 for text.
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise FedsimError(f"{path}: {_reason(error)}") from error
    if not isinstance(config, dict):
        raise FedsimError(f"{path}: not a mapping")
    return {str(key): value for key, value in config.items()}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedsimError(f"{path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise FedsimError(f"{path}: not a mapping")
    return content


def _read_table(path: Path) -> pandas.DataFrame:
    try:
        # Partitioning off: a folder named seed=3 above the table is a Hydra job, not a column.
        return pandas.read_parquet(path, engine="pyarrow", partitioning=None)
    except Exception as error:  # pyarrow raises many kinds for a damaged file, all of them meaning the same here
        raise FedsimError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"cannot be read ({lines[0] if lines else type(error).__name__})"


def _unlike(groups: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """A line for all in which runs of one group were made by something else, and for all in which groups were."""
    lines = []
    for label, members in groups.items():
        made = [_made_by(run) for run in members]
        for name in dict.fromkeys(name for each in made for name in each):
            seen = sorted({str(each.get(name)) for each in made})
            if len(seen) > 1:
                lines.append(f"group {label}: runs differ in {name} ({', '.join(seen)})")
    firsts = {label: _made_by(members[0]) for label, members in groups.items()}
    told = {line.partition(" differ in ")[2].rpartition(" (")[0] for line in lines}
    for name in dict.fromkeys(name for each in firsts.values() for name in each):
        # The code of somebody's own strategy is another one, of course.
        having = {label: made for label, made in firsts.items() if name != "code" or _is_ours(groups[label][0])}
        seen = sorted({str(each.get(name)) for each in having.values()})
        if len(seen) > 1 and name not in told:
            lines.append(f"groups differ in {name} ({', '.join(seen)})")
    return lines


def _made_by(run: RunRecord) -> dict[str, Any]:
    """Versions, machine and code (eight digits of its hash) that a run was made by, as far as its manifest says."""
    manifest = run.manifest
    versions = manifest.get("versions")
    plain = {name: manifest[name] for name in ("fedsim", "python", "machine") if name in manifest}
    made = plain | (dict(versions) if isinstance(versions, Mapping) else {})
    made["instruction set"] = manifest.get("instruction_set")
    execution = manifest.get("execution")
    made["kernel"] = execution.get("kernel") if isinstance(execution, Mapping) else None
    return made | ({"code": str(manifest["code_sha256"])[:8]} if "code_sha256" in manifest else {})


def _is_ours(run: RunRecord) -> bool:
    targets = [str(value) for key, value in _settings(run).items() if key.rpartition(".")[2] == "_target_"]
    return all(target.startswith("fedsim.") for target in targets)


def _settings(run: RunRecord) -> dict[str, Any]:
    """Everything that tells one group from another: dotted keys and plain values."""
    kept = {key: value for key, value in run.config.items() if key not in IGNORED}
    return _flat(kept) | {"clock": run.clock}


def _flat(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        leaves |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: _plain(value)}
    return leaves


def _plain(value: Any) -> Any:
    """The same value for the same setting: 1.0 is 1."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _labels(firsts: Sequence[RunRecord]) -> list[str]:
    """One label per group, given a run of each; unlike groups get unlike labels."""
    settings = [_settings(run) for run in firsts]
    labels: list[str] = []
    for run, own in zip(firsts, settings, strict=True):
        label = _label(run, own, settings) or strategy_name(run) or "all runs"
        count = 2
        while label in labels:  # two classes of one name
            label, count = f"{label.removesuffix(f' #{count - 1}')} #{count}", count + 1
        labels.append(label)
    return labels


def _label(run: RunRecord, own: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> str:
    parts = _distinct(run, own, settings)
    head = [parts.pop("strategy")] if "strategy" in parts else []
    return ", ".join([*head, *(f"{entry.removeprefix('strategy.')}={shown}" for entry, shown in parts.items())])


def _distinct(run: RunRecord, own: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What differs from other groups. Inside an object only groups with that kind of object are compared.

    FedBuff's buffer size says nothing beside FedAvg, which has none; beside another FedBuff it tells them apart.
    """
    parts = {}
    keys = {key: None for each in settings for key in each}  # a set that keeps the order of the files
    objects = {key.removesuffix("._target_") for key in keys if key.endswith("._target_")}
    for entry in dict.fromkeys(_entry(key, objects) for key in keys):
        above = [prefix for prefix in _prefixes(entry) if prefix in objects]
        peers = [other for other in settings if all(_kind(own, each) == _kind(other, each) for each in above)]
        compare = _kind if entry in objects else _value
        if not all(compare(other, entry) == compare(own, entry) for other in peers):
            parts[entry] = _short(entry, own, run) if entry in objects else _text(own, entry)
    return parts


def _entry(key: str, objects: set[str]) -> str:
    """``strategy`` for ``strategy._target_`` and ``strategy.name``, which together are one choice; else the key."""
    parent, _, last = key.rpartition(".")
    return parent if parent in objects and last in ("_target_", "name") else key


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _value(own: Mapping[str, Any], key: str) -> Any:
    return json.dumps(own[key], default=str) if key in own else UNSET


def _kind(own: Mapping[str, Any], entry: str) -> Any:
    """What kind of object stands at ``entry``: its class, its name, or the plain value that replaces it."""
    return [_value(own, key) for key in (f"{entry}._target_", f"{entry}.name", entry)]


def _short(entry: str, own: Mapping[str, Any], run: RunRecord) -> str:
    """The readable name of the object at ``entry``: the name it was chosen by, else its class in lower case."""
    chosen = own.get(f"{entry}.name", own.get(entry))
    if chosen is None and entry == "strategy":
        chosen = run.manifest.get("strategy")
        chosen = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    name = chosen if isinstance(chosen, str) and chosen else str(own.get(f"{entry}._target_", "none"))
    return name.partition("(")[0].rpartition(".")[2].lower()


def _text(own: Mapping[str, Any], key: str) -> str:
    if key not in own:
        return UNSET
    return own[key] if isinstance(own[key], str) else json.dumps(own[key], default=str)


def _natural(label: str) -> list[tuple[int, float, str]]:
    """Sorts 2 before 10, and 0.05 before 0.5."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", label)
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]
