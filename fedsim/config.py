"""From command-line overrides to objects: Hydra composes, classes' own signatures say what is allowed.

Every group choice is a yaml file with ``_target_`` and the constructor's arguments, so a new method, device
model or problem needs no schema of its own. Whatever is wrong comes out as one :class:`ConfigError` line.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import compress, islice
from math import prod
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.checks import ConfigError, nearest

CONFIG_MODULE = "fedsim.conf"
CONFIG_NAME = "config"

PARTS = (
    "problem", "data", "partition", "model", "local", "strategy", "server", "topology", "compute", "network",
    "availability", "faults",
)  # fmt: skip
"""Groups whose choices become objects."""

GROUPS = (*PARTS, "pool", "checkpoint", "tracker", "experiment")

MOST_MEMBERS = 10_000
"""Runs of a sweep: to put so many together takes an hour."""


# ---- composing -----------------------------------------------------------------------------------


def search_path(folder: Path) -> list[str]:
    """Hydra overrides that make the user's own ``conf/`` under ``folder`` searched after ours."""
    own = folder / "conf"
    # The repository's conf/ is the package's own: do not search it twice.
    if not own.is_dir() or (own / "__init__.py").exists():
        return []
    for group in GROUPS:
        for path in sorted((own / group).glob("*.yaml")):
            _refuse_clash(group, path)
    return [f"hydra.searchpath=['file://{own}']"]


def _refuse_clash(group: str, path: Path) -> None:
    if (config_folder() / group / path.name).exists():
        raise ConfigError(f"{path}: there is a {group}={path.stem} already, give yours another name")


def register_strategies(folder: Path) -> list[str]:
    """Make every ``NAME.yaml`` with a ``_target_`` lying in ``folder`` itself a choice of ``strategy``."""
    names = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            node = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException):
            continue
        if isinstance(node, DictConfig) and "_target_" in node:
            _refuse_clash("strategy", path)
            ConfigStore.instance().store(group="strategy", name=path.stem, node=node)
            names.append(path.stem)
    return names


def compose_run(overrides: Sequence[str], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of one run, resolved to plain values, and the choice made in every group.

    Raises:
        ConfigError: for anything Hydra or OmegaConf refuses.
    """
    return next(compose_runs([overrides], folder))


def compose_runs(members: Iterable[Sequence[str]], folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """As :func:`compose_run` for each of several runs; those with the same choices are composed once.

    Raises:
        ConfigError: for anything Hydra or OmegaConf refuses.
    """
    extra = search_path(folder)
    register_strategies(folder)
    plain_keys = {str(key) for key in OmegaConf.load(config_folder() / f"{CONFIG_NAME}.yaml")} - {"defaults", "hydra"}
    composed: dict[tuple[str, ...], DictConfig] = {}
    for member in members:
        given = [*extra, *member]
        try:
            # No value has a say in what is chosen: Hydra, too, sets them after it has put the choices together.
            parsed = OverridesParser.create().parse_overrides(list(member))
            keys = [one.key_or_group for one in parsed]
            sets = [key in plain_keys or ("." in key and not key.startswith("hydra.")) for key in keys]
            choice = tuple(one for one, value in zip(member, sets, strict=True) if not value)
            if choice not in composed:
                composed[choice] = _composed([*extra, *choice], given)
            config = copy.deepcopy(composed[choice])
            ConfigLoaderImpl._apply_overrides_to_config(list(compress(parsed, sets)), config)
        except (HydraException, OmegaConfBaseException):
            config = _composed(given, given)  # which says what is wrong
        yield plain(config), chosen(config.hydra.runtime.choices)


def chosen(choices: Mapping[Any, Any]) -> dict[str, str]:
    """The choice in each of our groups that has one, from Hydra's ``hydra.runtime.choices``."""
    return {
        str(group): str(choice)
        for group, choice in choices.items()
        if group in GROUPS and choice is not None and choice != "null"
    }


def compose_single(overrides: Sequence[str], folder: Path, instead: str) -> tuple[dict[str, Any], dict[str, str]]:
    """As :func:`compose_run`, for one run only.

    Raises:
        ConfigError: for several values too, with what to do ``instead``.
    """
    for each in overrides:
        if len(expand(spelt_out([each], folder))) > 1:
            raise ConfigError(f"{each}: several values are a sweep, {instead}")
    return compose_run(overrides, folder)


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain, resolved values, without Hydra's own part.

    Raises:
        ConfigError: if a value is missing or cannot be resolved.
    """
    try:
        kept = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        values = OmegaConf.to_container(kept, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(values, dict)
    missing = _missing(values)
    if missing:
        raise ConfigError(f"{missing}: must be given")
    return {str(key): value for key, value in values.items()}


def _composed(overrides: Sequence[str], given: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    _refuse_nameless(given)
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            return compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=True)
    except MissingConfigException as error:
        raise ConfigError(_unknown_choice(error)) from None
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: cannot be read as key=value") from None
    except ConfigCompositionException as error:
        raise ConfigError(_bad_override(error, given)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None


def _refuse_nameless(overrides: Sequence[str]) -> None:
    """Refuse a group, or what has no name, that is set to nothing, a number or a list: Hydra would fall over it."""
    for one in overrides:
        try:
            parsed = OverridesParser.create().parse_override(one)
        except (OverrideParseException, HydraException):
            continue  # composing says what is wrong with it
        group, value = parsed.key_or_group, parsed.value()
        nameless = not isinstance(value, str) and not parsed.is_delete() and not parsed.is_sweep_override()
        if nameless and group in ("", "hydra"):
            raise ConfigError(f"{one}: cannot be read as key=value")
        if group in GROUPS and nameless:
            allowed = ", ".join(sorted(choices(group, Path.cwd())))
            raise ConfigError(f"{one}: must be the name of one choice, allowed: {allowed}")


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if not group or error.options is None:
        return _one_line(error)
    return f"{group}={name}: unknown name, {nearest(name, error.options)}"


def _bad_override(error: Exception, given: Sequence[str]) -> str:
    """Name the key and the nearest one that exists, from the configuration without value overrides."""
    text = f"{error}\n{error.__cause__ or ''}"
    found = re.search(r"full_key: (\S+)", text) or re.search(r"(?:override|append to config\.?) '([^']+)'", text)
    if not found:
        return _one_line(error)
    key = found.group(1)
    shown = next((one.lstrip("+~") for one in given if f"{one.lstrip('+~')}.".startswith((f"{key}=", f"{key}."))), key)
    parent, _, last = key.rpartition(".")
    groups_only = [one for one in given if one.partition("=")[0] in (*GROUPS, "hydra.searchpath")]
    try:
        config = _composed(groups_only, groups_only)
        node = OmegaConf.select(config, parent) if parent else config
    except (ConfigError, OmegaConfBaseException):
        return f"{shown}: unknown key"
    if node is None:
        return f"{shown}: unknown key, {nearest(parent, _names(config))}"
    if not isinstance(node, DictConfig):
        return f"{shown}: {parent} is one value, it has no keys"
    if last in node:
        return f"{shown}: {_one_line(error.__cause__ or error)}"
    return f"{shown}: unknown key, {nearest(last, _names(node))}"


def _names(node: DictConfig) -> list[str]:
    return [str(name) for name in node if name not in ("_target_", "hydra")]


def _missing(values: Any, path: str = "") -> str | None:
    if isinstance(values, dict):
        return next((found for key, each in values.items() if (found := _missing(each, f"{path}.{key}"))), None)
    return path.lstrip(".") if values == "???" else None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    text = lines[0] if lines else type(error).__name__
    return f"{keys[0]}: {text}" if keys else text


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The members of a sweep, each as its own overrides, in Hydra's order.

    Raises:
        ConfigError: if an override cannot be read, or one has no value at all.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: cannot be read as key=value") from None
    swept = [each for each in parsed if each.is_sweep_override()]
    try:
        counts = [sum(1 for _ in islice(each.sweep_string_iterator(), MOST_MEMBERS + 1)) for each in swept]
        too_many = prod(counts) > MOST_MEMBERS
        batches = [] if too_many else BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, AssertionError, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: cannot be swept ({_one_line(error)}); list the values") from None
    for each, count in zip(swept, counts, strict=True):
        if not count:
            raise ConfigError(f"{each.input_line}: the range is empty")
    if too_many:
        given = " ".join(str(each.input_line) for each in swept)
        raise ConfigError(f"{given}: a sweep has at most {MOST_MEMBERS:,} runs, give fewer values")
    return [list(member) for batch in batches for member in batch]


def spelt_out(overrides: Sequence[str], folder: Path) -> list[str]:
    """The overrides, with the choices that each ``GROUP=glob(...)`` matches in its place: ``GROUP=one,other``.

    Raises:
        ConfigError: if one cannot be read, is of something without choices, or matches none of them.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: cannot be read as key=value") from None
    found = []
    for text, each in zip(overrides, parsed, strict=True):
        pattern, group = each.value(), each.key_or_group
        among = isinstance(pattern, ChoiceSweep) and any(isinstance(one, Glob) for one in pattern.list)
        if not among and not isinstance(pattern, Glob):
            found.append(text)
            continue
        if group not in GROUPS:
            raise ConfigError(f"{text}: glob is for groups of choices, {nearest(group, GROUPS)}")
        if among:
            raise ConfigError(f"{text}: glob stands alone, several patterns are {group}=glob([one*,other*])")
        names = sorted(choices(group, folder))
        matching = pattern.filter(names)
        if not matching:
            raise ConfigError(f"{text}: matches no choice, allowed: {', '.join(names)}")
        found.append(f"{text.partition('=')[0]}={','.join(matching)}")
    return found


def swept_values(overrides: Sequence[str]) -> dict[str, list[str]]:
    """What each key with several values may be, as texts: every one of a list, both ends of a range or interval.

    Raises:
        ConfigError: if an override cannot be read.
    """
    try:
        parsed = [
            each for each in OverridesParser.create().parse_overrides(list(overrides)) if each.is_sweep_override()
        ]
    except OverrideParseException as error:
        raise ConfigError(f"{error.override}: cannot be read as key=value") from None
    found = {}
    for each in parsed:
        value = each.value()
        if isinstance(value, IntervalSweep):
            found[each.get_key_element()] = [str(value.start), str(value.end)]
        else:
            texts = list(each.sweep_string_iterator())
            found[each.get_key_element()] = (
                texts if each.is_choice_sweep() else list(dict.fromkeys(texts[:: len(texts) - 1 or 1]))
            )
    return found


# ---- building ------------------------------------------------------------------------------------


def build(node: Any, path: str, **objects: Any) -> Any:
    """Call a node's ``_target_`` with the node's other keys and those of ``objects`` it has parameters for.

    Args:
        node: a mapping with ``_target_``.
        path: the node's key, put before what is wrong.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{path}={node}: must be one of the choices that `fedsim list {path}` shows")
    target = locate(str(node["_target_"]), f"{path}._target_")
    parameters = inspect.signature(target).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # a name that is imported for type checkers only
        hints = {}
    settings = {str(key): value for key, value in node.items() if key != "_target_"}
    for key, value in settings.items():
        if key not in parameters and not takes_all:
            allowed = [name for name in parameters if name not in objects]
            raise ConfigError(f"{path}.{key}={value}: unknown key, {nearest(key, allowed)}")
        if key in hints:
            settings[key] = fit(f"{path}.{key}", value, hints[key])
    given = {name: each for name, each in objects.items() if name in parameters}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in settings
        and name not in given
    ]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: must be given")
    try:
        return target(**settings, **given)
    except ConfigError as error:
        elsewhere = str(error).partition(".")[0] in GROUPS  # a strategy may find fault with its local rule
        raise ConfigError(str(error) if elsewhere else f"{path}.{error}") from None


def locate(dotted: str, key: str) -> Any:
    """The class or function of a dotted name.

    Raises:
        ConfigError: naming ``key`` if there is no such module or name.
    """
    module_name, _, name = dotted.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key}={dotted}: must be module.Name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(f"{key}={dotted}: there is no module '{error.name}'") from None
        raise ConfigError(f"{key}={dotted}: {module_name} needs a module '{error.name}'") from None
    except SyntaxError as error:
        where = f"{Path(error.filename or module_name).name} line {error.lineno}"
        raise ConfigError(f"{key}={dotted}: {where}: {error.msg}") from None
    except ImportError as error:
        raise ConfigError(f"{key}={dotted}: {_one_line(error)}") from None
    if not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(f"{key}={dotted}: {module_name} has no '{name}', {nearest(name, names)}")
    return getattr(module, name)


def fit(key: str, value: Any, hint: Any) -> Any:
    """``value`` if it is what ``hint`` wants (a whole number where a float is due is fine).

    Only plain types are judged: int, float, bool, str, None, lists and unions of these.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    options = _options(hint)
    if options is None:
        return value
    if isinstance(value, ListConfig):
        value = list(value)
    for option in options:
        if _matches(value, option):
            return value
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return value
    if int in options and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    wanted = " or ".join(_NAMES[option] if option in _NAMES else f"a list of {_inner(option)}" for option in options)
    raise ConfigError(f"{key}={value}: must be {wanted}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", type(None): "null"}


def _options(hint: Any) -> list[Any] | None:
    parts = list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    known = all(part in (int, float, bool, str, type(None)) or typing.get_origin(part) is list for part in parts)
    return parts if known else None


def _matches(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is list:
        inner = typing.get_args(option)[0]
        return isinstance(value, list) and all(_matches(each, inner) for each in value)
    if option in (int, float):
        return isinstance(value, option) and not isinstance(value, bool)
    return isinstance(value, option)


def _inner(option: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "names"}.get(typing.get_args(option)[0], "values")


# ---- what there is, from the yaml files themselves -------------------------------------------------


def described(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """A yaml file's first comment, and (key, default, comment) of its top-level keys."""
    summary, keys = "", []
    for line in path.read_text().splitlines():
        if line.startswith("#") and not summary and not line.startswith("# @"):
            summary = line.lstrip("# ").strip()
        found = re.match(r"([A-Za-z]\w*): (.*?)(?:\s+# (.*))?$", line)
        if found:
            keys.append((found[1], found[2].strip(), found[3] or ""))
    return summary, keys


def config_folder() -> Path:
    """Where our yaml files lie."""
    return Path(str(import_module(CONFIG_MODULE).__file__)).parent


def default_settings(group: str) -> Any:
    """The settings of a group's default choice, as they are when nobody changes them."""
    defaults = OmegaConf.load(config_folder() / f"{CONFIG_NAME}.yaml").defaults
    choice = next(each[group] for each in defaults if isinstance(each, DictConfig) and group in each)
    return OmegaConf.to_container(OmegaConf.load(config_folder() / group / f"{choice}.yaml"))


def choices(group: str, folder: Path) -> dict[str, Path]:
    """The choices of a group and their files: ours, then the user's own under ``folder``."""
    found = {path.stem: path for path in sorted((config_folder() / group).glob("*.yaml"))}
    if search_path(folder):
        found |= {path.stem: path for path in sorted((folder / "conf" / group).glob("*.yaml"))}
    if group == "strategy":
        found |= {name: folder / f"{name}.yaml" for name in register_strategies(folder)}
    return found


def groups(folder: Path) -> Iterable[str]:
    """All group names that have choices."""
    return [group for group in GROUPS if choices(group, folder)]
