"""``fedsim deploy``: the same run on Flower, as commands for machines of one's own or as processes on this one."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.assemble import Assembly, new_folder
from fedsim.checks import ConfigError, Interrupted, whole
from fedsim.config import compose_single
from fedsim.flower.application import check_app, write_app
from fedsim.flower.certificates import check_host
from fedsim.flower.commands import Superlink
from fedsim.flower.configuration import LOADER, run_config
from fedsim.flower.deployment import check_deployable
from fedsim.flower.following import FollowedRun, read_ended
from fedsim.flower.instructions import write_deployment
from fedsim.flower.local import LocalFederation
from fedsim.flower.processes import interruptible
from fedsim.progress import LiveProgress, ended

MOST_LOCAL = 64
"""Most supernodes on this machine: each is two processes of about 150 MB, and a third while it works."""

SETTING = "deployment."
"""Begins the overrides that are about a deployment alone; what there is says ``fedsim.flower.configuration``."""

ONE_RUN = "and a deployment is one run"

PORT = 8000
"""Flower's own for a superlink."""

DESCRIPTION = """\
Run a configuration on Flower. Without --local it writes a folder with everything a deployment needs and prints the
commands to paste: superlink, supernodes, run. With --local N it runs one superlink and N supernodes on this machine,
waits for the end of the run, and stops them.
"""

EPILOG = """\
examples:
  fedsim deploy strategy=fedavg rounds=2 --local 2 --tls          all of it here, encrypted
  fedsim deploy clients=2 --host server.example.org --tls         commands for three machines
  fedsim deploy clients=2 --app my_app                            an app of your own
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fedsim deploy``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for fedsim run")
    parser.add_argument("--local", type=int, metavar="N", help="run it here, with N supernodes; each is a client")
    parser.add_argument(
        "--tls", action="store_true", help="encrypt, with certificates made now; nodes prove who they are"
    )
    parser.add_argument(
        "--app", type=Path, metavar="DIR", help="a Flower app of your own, such as experiments/flower_app"
    )
    parser.add_argument("--loader", metavar="module:function", help="loads a node's own data; default the app's")
    parser.add_argument("--host", metavar="NAME", help="where the nodes reach the superlink (127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="P", help=f"of the superlink ({PORT}; with --local a free one)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write certificates and files (./deployment)"
    )


def main(options: argparse.Namespace) -> int:
    """Deploy what the options say.

    Raises:
        ConfigError: if something handed in is wrong; nothing is written and nothing started then.
        SimulationError: if the run cannot begin or go on.
        Interrupted: after a signal; everything that was started is stopped then.
    """
    overrides, local = [each for each in options.overrides if not each.startswith(SETTING)], options.local
    if "strategy=flower" in overrides:
        raise ConfigError("strategy=flower: a Flower app needs no fedsim to be deployed: flwr run DIR")
    app = None if options.app is None else check_app(options.app)
    if options.loader and not re.fullmatch(r"[\w.]+:\w+", options.loader):
        raise ConfigError(f"--loader={options.loader}: must be package.module:function")
    if local is None:
        return _print(_checked(*compose_single(overrides, Path.cwd(), ONE_RUN)), app, options)
    whole("--local", local, least=1, most=MOST_LOCAL)
    for name in ("host", "port", "folder"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}={getattr(options, name)}: is for deployments on several machines, not --local")
    config, choices = compose_single([f"clients={local}", *overrides], Path.cwd(), ONE_RUN)
    if config["clients"] != local:
        raise ConfigError(f"clients={config['clients']}: each supernode is a client, so leave it out with --local")
    return _run_here(_checked(config, choices), app, local, options)


def _checked(config: dict[str, Any], choices: dict[str, str]) -> Assembly:
    """The parts of a run, if the server will be able to run it.

    Raises:
        ConfigError: naming what is wrong.
    """
    assembly = Assembly(config, choices)
    assembly.check_out()
    assembly.prepare()
    check_deployable(assembly.strategy, assembly.problem)
    return assembly


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """What the overrides say of the deployment itself, read as Hydra reads the others."""
    pairs = [each.removeprefix(SETTING).partition("=") for each in overrides if each.startswith(SETTING)]
    try:
        return {key: OmegaConf.from_dotlist([f"value={value}"])["value"] for key, _, value in pairs}
    except (yaml.YAMLError, OmegaConfBaseException):
        words = " ".join(f"{SETTING}{key}={value}" for key, _, value in pairs)
        raise ConfigError(f"{words}: cannot be read as key=value") from None


def _given(assembly: Assembly, out: Path, options: argparse.Namespace) -> dict[str, str]:
    config: dict[str, Any] = {**assembly.config, "out": str(out.absolute())}
    settings = _settings(options.overrides)
    try:
        given = run_config(config, assembly.choices, options.loader or "", **settings)
    except ConfigError as error:
        raise ConfigError(f"{SETTING}{error}") from None
    if options.loader is None:
        del given[LOADER]  # the app's own stands
    return given


# ---- on machines of one's own ----------------------------------------------------------------------


def _print(assembly: Assembly, app: Path | None, options: argparse.Namespace) -> int:
    host = check_host("--host", "127.0.0.1" if options.host is None else options.host)
    port = whole("--port", PORT if options.port is None else options.port, least=1, most=65535)
    folder = (options.folder or Path("deployment")).absolute()
    if folder.exists():
        raise ConfigError(f"--folder={folder}: exists already, give another")
    out = assembly.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        with interruptible():
            given = _given(assembly, out, options)
            link = Superlink(host, port)
            text = write_deployment(folder, link, app, given, assembly.clients, options.tls, out)
    except Interrupted as interruption:
        raise Interrupted(f"{interruption}: nothing is written", interruption.signal) from None
    except OSError as error:
        raise ConfigError(f"--folder={folder}: cannot be written: {error.strerror}") from None
    print(text, end="")
    return 0


# ---- on this machine -------------------------------------------------------------------------------


def _run_here(assembly: Assembly, app: Path | None, nodes: int, options: argparse.Namespace) -> int:
    _given(assembly, Path(), options)  # whatever is wrong with it, before a folder is made
    out = assembly.out or new_folder()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="fedsim-") as folder,
            LiveProgress(assembly.choices.get("strategy", "run")) as progress,
            interruptible(),
            LocalFederation(Path(folder), nodes, assembly.clients, options.tls, progress.say) as federation,
        ):
            federation.start()
            following = FollowedRun(out, assembly.config, progress.say, progress.show if progress.live else None)
            try:
                federation.run(app or write_app(Path(folder) / "app"), _given(assembly, out, options), following)
            finally:
                federation.keep_logs(following)
    except Interrupted as interruption:
        raise Interrupted(f"{interruption}: superlink and supernodes are stopped", interruption.signal) from None
    finally:
        if assembly.out is None:
            with contextlib.suppress(OSError):
                out.rmdir()  # if nothing has been written
    print(ended(read_ended(out)))
    return 0
