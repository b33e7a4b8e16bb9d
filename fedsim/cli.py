"""The command line: ``fedsim run | resume | deploy | report | plot | list | traces | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.checks import ConfigError, FedsimError, Interrupted
from fedsim.version import __version__

EPILOG = """\
examples:
  fedsim run                                        first curve: FedAvg on the embedded images
  fedsim run strategy=fedbuff rounds=60 seed=1      another method, another seed
  fedsim run -m strategy=fedavg,fedbuff seed=0,1,2  a sweep
  fedsim resume runs/2026-01-31_12-00-00            go on with a run that was stopped
  fedsim report runs/2026-01-31_12-00-00            table and figure of a sweep
  fedsim plot timeline runs/2026-01-31_12-00-00     one figure: what the clients did when
  fedsim deploy strategy=fedbuff rounds=2 --local 2  the same on Flower, with processes on this machine
  fedsim run --help                                 every group, key and unit
"""

TRACES = """\
examples:
  fedsim traces fedscale --capacity client_device_capacity --behaviour client_behave_trace --unpickle --out phones
  fedsim traces flash --speeds speed_distri.json --states state_traces.json --out phones
  fedsim run compute=trace compute.path=phones availability=trace availability.path=phones

a trace of your own is a folder with two parquet tables:
  devices.parquet    device, and what was measured of: seconds_per_step (s), down, up (Mbit/s), period (s)
  presence.parquet   device, online, offline: a row per span online, in seconds from 0 to the device's period,
                     after which all of it begins anew; goes with the column period
each client is one of the devices, drawn by the seed: the same one for compute, network and availability
"""

PLOTS = """\
figures of all groups (runs that differ in the seed only are a group: mean and 95 % band)
  time             a metric against virtual time
  rounds           a metric against rounds
  updates          a metric against client results received
  bytes            a metric against traffic, up plus down
  staleness        how stale the applied results were
  client_accuracy  final accuracy on the clients' own examples (problem.client_test=0.2)
  consensus        how far the models of peers are from their mean

figures with a panel for each group
  timeline         what each client does when, and the server's versions; the group's first run
  participation    results applied from each client in the course of time
  partition        training examples of each class at each client; the group's first run
  topology         which peers have talked to each other; the group's first run

examples:
  fedsim plot time runs/mine                                    runs/mine/figures/time.png and .pdf
  fedsim plot bytes runs/mine --metric loss --width 5.5
  fedsim plot timeline runs/mine/fedbuff_seed0 --out timeline.pdf
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a run that failed, 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # the user's own strategies; last, so that nothing of ours is shadowed
    try:
        return _command(given)
    except ConfigError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return 2
    except FedsimError as error:
        print(f"fedsim: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"fedsim: out of memory {error}".rstrip(), file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(f"fedsim: {interruption}", file=sys.stderr)
        return 128 + interruption.signal
    except KeyboardInterrupt:
        print("fedsim: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fedsim list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(given: list[str]) -> int:
    if given and given[0] == "run":
        from fedsim import running

        return running.main(given[1:])
    if given and given[0] in ("-sc", "--shell-completion"):
        from fedsim import running

        return running.complete(given)
    if given and given[0] == "resume":  # argparse takes no flag between a list's words
        given = sorted(given, key=lambda word: word == "--allow-changes")
    options = _parse(given)
    if options.command == "report":
        from fedsim.report import command as report

        return report.main(
            options.directories,
            format=options.format,
            out=options.out,
            target=report.levels(options.target),
            metric=options.metric,
            baseline=options.baseline,
            html=options.html,
        )
    if options.command == "plot":
        from fedsim.plots import command

        return command.main(
            options.name, options.directories, out=options.out, metric=options.metric, width=options.width
        )
    if options.command == "resume":
        from fedsim import running

        return running.resume(options.directory, options.overrides, options.allow_changes)
    if options.command == "deploy":
        from fedsim import deploy

        return deploy.main(options)
    if options.command == "list":
        from fedsim import reference

        return reference.show(options.group, Path.cwd(), options.format)
    if options.command == "traces":
        return _traces(options)
    if options.command == "doctor":
        from fedsim import doctor

        return doctor.main()
    _parser().print_help()
    return 0


def _parse(given: list[str]) -> argparse.Namespace:
    if given and given[0] == "deploy":  # its flags may stand between the words of its list, and it is slow to import
        from fedsim import deploy

        parser = _Parser(prog="fedsim deploy", allow_abbrev=False)
        deploy.add_arguments(parser)
        return parser.parse_intermixed_args(given[1:], argparse.Namespace(command="deploy"))
    return _parser().parse_args(given)


def _traces(options: argparse.Namespace) -> int:
    from fedsim import convert

    if options.source == "fedscale":
        return convert.fedscale(
            options.capacity, options.behaviour, options.out, options.unpickle, options.batch_size, options.overwrite
        )
    return convert.flash(options.speeds, options.states, options.out, options.overwrite)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedsim",
        description="Federated learning in virtual time: asynchronous, parallel, reproducible to the bit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedsim {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("run", help="run one configuration, or a sweep with -m", add_help=False)
    resume = commands.add_parser("resume", help="go on with a run that was stopped", allow_abbrev=False)
    resume.add_argument("directory", metavar="DIR", help="the run's directory")
    resume.add_argument("overrides", nargs="*", metavar="pool=...", help="another pool or checkpoint schedule")
    resume.add_argument("--allow-changes", action="store_true", help="even if code or versions have changed since")
    commands.add_parser("deploy", help="run one configuration on Flower: here, or on machines of one's own")
    report = commands.add_parser("report", help="table and figure of finished runs")
    report.add_argument("directories", nargs="+", metavar="DIR", help="a run, or a folder with runs below it")
    report.add_argument("--format", default="rich", help="rich (default), markdown or csv")
    report.add_argument("--out", help="folder for the figure and the tables")
    report.add_argument(
        "--target",
        action="append",
        metavar="LEVEL,...",
        help="level to reach, or several (0.6,0.7); default the runs' own, else chosen from the data",
    )
    report.add_argument("--metric", help="metric to report; default accuracy, distance or loss")
    report.add_argument(
        "--baseline", metavar="GROUP", help="hold the other groups against this one, seed by seed (fedavg, say)"
    )
    report.add_argument("--html", action="store_true", help="write report.html too: one page with tables and figures")
    _add_plot(commands)
    listing = commands.add_parser("list", help="what can be chosen: all groups, or one")
    listing.add_argument("group", nargs="?", help="a group, such as strategy or compute")
    listing.add_argument("--format", default="plain", help="plain (default), or markdown: a table of the strategies")
    _add_traces(commands)
    commands.add_parser("doctor", help="check this installation and machine")
    return parser


def _add_plot(commands: argparse._SubParsersAction[_Parser]) -> None:
    plot = commands.add_parser(
        "plot",
        help="one figure of finished runs, such as a timeline of the clients",
        description="Draw one figure of finished runs, as PNG and PDF, one column of a paper wide.",
        epilog=PLOTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plot.add_argument("name", metavar="NAME", help="which figure, see below")
    plot.add_argument("directories", nargs="+", metavar="DIR", help="a run, or a folder with runs below it")
    plot.add_argument("--out", metavar="FILE", help=".png, .pdf or .svg; default DIR/figures/NAME.png and .pdf")
    plot.add_argument("--metric", help="column to draw; default accuracy, distance or loss")
    plot.add_argument("--width", type=float, default=3.3, metavar="INCHES", help="3.3 (default) or 5.5, say")


def _add_traces(commands: argparse._SubParsersAction[_Parser]) -> None:
    traces = commands.add_parser(
        "traces",
        help="make a trace of devices out of FedScale's or FLASH's files",
        description="Make a trace of devices out of the files of another simulator, for compute, network, availability",
        epilog=TRACES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = traces.add_subparsers(dest="source", metavar="SOURCE", required=True, parser_class=_Parser)
    fedscale = sources.add_parser("fedscale", help="FedScale's client_device_capacity and client_behave_trace")
    fedscale.add_argument("--capacity", metavar="FILE", help="speeds and bandwidths: client_device_capacity")
    fedscale.add_argument("--behaviour", metavar="FILE", help="presence: client_behave_trace")
    fedscale.add_argument(
        "--unpickle", action="store_true", help="read these pickles; whatever is not plain data is refused even then"
    )
    fedscale.add_argument(
        "--batch-size", type=int, default=10, metavar="N", help="samples per local step (10): 3 N times their ms each"
    )
    flash = sources.add_parser("flash", help="FLASH's speed_distri.json and state_traces.json")
    flash.add_argument("--speeds", metavar="FILE", help="bandwidths: models/speed_distri.json")
    flash.add_argument("--states", metavar="FILE", help="presence: data/state_traces.json")
    for source in (fedscale, flash):
        source.add_argument("--out", metavar="DIR", required=True, help="folder of the trace to make")
        source.add_argument("--overwrite", action="store_true", help="replace a trace that is there")


class _Parser(argparse.ArgumentParser):
    """Argparse with one line instead of the usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message)


if __name__ == "__main__":
    sys.exit(main())
