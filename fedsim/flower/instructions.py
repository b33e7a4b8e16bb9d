"""A deployment on machines of one's own: a folder with all its files, and the commands to paste, machine by machine."""

from __future__ import annotations

import ipaddress
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedsim.flower import commands
from fedsim.flower.application import write_app
from fedsim.flower.certificates import NodeKey, ServerFiles, issue_node_key, issue_server
from fedsim.flower.commands import Superlink

NODE_PORT = 9094
"""The first supernode's port on its own machine; supernode i takes the i-th after it, should they share one."""


def write_deployment(
    folder: Path, link: Superlink, app: Path | None, run_config: Mapping[str, str], clients: int, encrypted: bool,
    out: Path,
) -> str:  # fmt: skip
    """Write the files of a deployment into ``folder``, which must not exist, and return the commands to paste.

    Whatever comes in between, there is no half of them.

    The superlink begins in the folder where we are, as a run would: paths in the configuration mean the same.

    Args:
        folder: where to; an absolute path.
        link: where the nodes reach the superlink.
        app: the app's folder; None for fedsim's own.
        run_config: what the app is given.
        clients: how many supernodes there are to be.
        encrypted: TLS with an authority of its own, and nodes that prove who they are.
        out: where the run's records will be.
    """
    folder.mkdir(parents=True)
    try:
        folder.chmod(0o700)
        link, keys = _identities(folder, link, clients) if encrypted else (link, [])
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(commands.connection(link))
        (folder / "run.toml").write_text(commands.settings(run_config))
        app = app or write_app(folder / "app")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return "\n".join(_lines(folder, link, app, clients, keys, out)) + "\n"


def _identities(folder: Path, link: Superlink, clients: int) -> tuple[Superlink, list[NodeKey]]:
    """The superlink with a certificate, and a key for every node."""
    (folder / "nodes").mkdir()
    files = issue_server(folder, [link.host])
    return Superlink(link.host, link.port, files), [
        issue_node_key(folder / "nodes", f"node-{node}") for node in range(clients)
    ]


def _lines(folder: Path, link: Superlink, app: Path, clients: int, keys: list[NodeKey], out: Path) -> list[str]:
    here = [commands.shown(["cd", str(Path.cwd())]), _export(folder / "home")]
    near = _relative(link)
    lines = ["# 1. The superlink, on this machine; it serves until you stop it with Ctrl-C"]
    lines += [*here, commands.shown(commands.superlink(near, _listen(link.host)))]
    lines += ["", "# 2. In another terminal of this machine"]
    lines += here
    if keys:
        lines += ["# the nodes that may join, once", *_registrations(folder, keys)]
    lines += ["", *_node(folder, link, clients, keys)]
    lines += ["", "# 4. The run, in the second terminal, when the nodes are connected"]
    lines.append(f"# its records go to {_near(out.absolute())}")
    lines.append(commands.shown(commands.run(_near(app), _near(folder / "run.toml"))))
    return lines


def _export(home: Path) -> str:
    """Sets the environment, with Flower's own folder seen from the one where one is, if it lies there."""
    near = _near(home)
    shown = shlex.quote(str(near))
    flwr_home = f"FLWR_HOME={shown}" if near.is_absolute() else f"FLWR_HOME=$PWD/{shown}"
    return " ".join(["export", flwr_home, *(f"{name}={value}" for name, value in commands.QUIET.items())])


def _registrations(folder: Path, keys: list[NodeKey]) -> list[str]:
    if len(keys) <= 4:
        return [commands.shown(commands.register(NodeKey(_near(key.private), _near(key.public)))) for key in keys]
    command = commands.shown(commands.register(NodeKey(Path("KEY"), Path("KEY")))).replace("KEY", '"$key"')
    nodes = commands.shown([str(_near(folder / "nodes"))])
    return [f"for key in {nodes}/*.pub; do {command}; done"]


def _node(folder: Path, link: Superlink, clients: int, keys: list[NodeKey]) -> list[str]:
    """The commands for supernode 0, and what differs for the others."""
    key, files = None, link.files
    lines = ["# 3. On the machine of supernode 0, which holds part 0 of the data and has fedsim installed"]
    if files is not None:
        copied = f"{folder / files.authority.name} and {keys[0].private}"
        lines.append(f"# with copies of {copied} in the folder where you are")
        files = ServerFiles(Path(files.authority.name), Path(files.certificate.name), Path(files.key.name))
        key = NodeKey(Path(keys[0].private.name), Path(keys[0].public.name))
    lines.append(_export(Path.cwd() / "fedsim-node-0"))
    lines.append(commands.shown(commands.supernode(Superlink(link.host, link.port, files), 0, clients, NODE_PORT, key)))
    if clients > 1:
        others = "supernode 1" if clients == 2 else f"supernodes 1 to {clients - 1}"
        differs = ["its own FLWR_HOME and partition-id", *(["its own key"] if key else [])]
        port = f"--port {NODE_PORT + 1}" if clients == 2 else f"its own --port, {NODE_PORT + 1} and so on,"
        lines.append(f"# {others}: the same with {', '.join(differs)}, and {port} on the same machine")
    return lines


def _relative(link: Superlink) -> Superlink:
    if link.files is None:
        return link
    files = (link.files.authority, link.files.certificate, link.files.key)
    return Superlink(link.host, link.port, ServerFiles(*(_near(path) for path in files)))


def _near(path: Path) -> Path:
    """A path from the folder where we are, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _listen(host: str) -> str:
    """The address to listen on so that ``host`` is reached: loopback alone, or every interface."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "0.0.0.0"
    if address.is_loopback:
        return host
    return "::" if address.version == 6 else "0.0.0.0"
