"""Writes a run's records while it goes on, and its identity at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fedsim.checkpoint import CheckpointFolder, CheckpointSchedule
from fedsim.checks import ConfigError, FedsimError, SimulationError, said
from fedsim.encoding import UnreadableError
from fedsim.record import MARKER, Log, RunDirectory
from fedsim.simulation import Simulation
from fedsim.version import __version__

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("fedsim")

IDENTITY = "identity.json"
"""What a run is, in its ``checkpoint`` folder from the beginning; at the end it becomes part of the manifest."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a run leaves: tables, made pandas when first asked for, the model by parameter name, and what it was."""

    logs: Mapping[str, Log] = field(repr=False)
    """``metrics``, ``events`` and ``links``."""
    client_columns: Mapping[str, Any] = field(repr=False)
    model: dict[str, Tensor]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    path: Path | None

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row per evaluation."""
        return self.logs["metrics"].frame()

    @cached_property
    def events(self) -> pd.DataFrame:
        """A row per task."""
        return self.logs["events"].frame()

    @cached_property
    def links(self) -> pd.DataFrame:
        """A row per message between nodes."""
        return self.logs["links"].frame()

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row per client."""
        import pandas as pd

        return pd.DataFrame(dict(self.client_columns))


class Recording:
    """The records of one run.

    Args:
        directory: where they are written; None keeps the tables in memory only.
        config: the resolved configuration, plain values.
        identity: what :func:`fedsim.identity.identify` says.
        schedule: when the run saves itself.
    """

    def __init__(
        self,
        directory: RunDirectory | None,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        schedule: CheckpointSchedule,
    ) -> None:
        self.directory, self.identity, self.schedule = directory, dict(identity), schedule
        self.config = dict(config)
        self.began = self._flushed = time.monotonic()
        self._due = schedule.after(self.began, 0)
        """The clock and the number of handled events at which the run saves itself."""
        self._handler: logging.Handler | None = None
        self._looked, self._savable = False, True
        if directory is not None:
            self.config["out"] = str(directory.path)
            self._handler = logging.FileHandler(directory.path / "run.log")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(self._handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)

    # ---- begin, or go on ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Write what the run is."""
        if self.directory is not None:
            # config.yaml is the last: where it is, the run has begun and can be resumed.
            self.directory.write_json(f"checkpoint/{IDENTITY}", self.identity)
            self.directory.write_text("config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            logger.info("run begins: fedsim %s, seed %s", __version__, self.config.get("seed"))

    def go_on(self, sim: Simulation) -> None:
        """Put ``sim`` to where the newest checkpoint left it, or to the beginning if there is none.

        Raises:
            FedsimError: if there are checkpoints and none can be read, or tables are damaged.
        """
        assert self.directory is not None
        folder = _checkpoints(self.directory, sim)
        folder.clear()
        found = folder.newest()
        if found is None:
            self.directory.cut_back({}, {})
            logger.info("run resumed: nothing had been saved, it begins anew")
        else:
            try:
                self._restore(self.directory, sim, *found)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise FedsimError(f"{folder.path}: the checkpoint is not one of this run ({said(error)})") from error
            logger.info("run resumed at %.6g s of virtual time, %d updates", sim.now, sim.updates)
        self._due = self.schedule.after(time.monotonic(), sim.kernel.handled)
        # What has changed since is what the rest of the run is made with.
        self.directory.write_json(f"checkpoint/{IDENTITY}", self.identity)

    def _restore(self, directory: RunDirectory, sim: Simulation, about: dict[str, Any], state: Any) -> None:
        parts, rows = about["parts"], {"events": state["tasks"]["rows"], "links": state["links"]["rows"]}
        logs = {name: directory.read_back(name, parts.get(name, 0), rows[name]) for name in rows}
        sim.restore(state, logs["events"], logs["links"])
        directory.cut_back(parts, rows)
        self.began -= about["wall_seconds"]

    # ---- while it goes on --------------------------------------------------------------------------

    def tick(self, sim: Simulation) -> None:
        """Write what has been closed since, every few seconds, and save the run when that is due."""
        if self.directory is None:
            return
        if not self._looked:
            self._look(sim)
        now, due = time.monotonic(), self._due
        if now >= due[0] or sim.kernel.handled >= due[1]:
            self.save(sim)
        elif now - self._flushed > RunDirectory.FLUSH_SECONDS:
            self._flush(sim)

    def _look(self, sim: Simulation) -> None:
        """See at the beginning whether the run can be saved at all, so that nobody counts on it in vain."""
        assert self.directory is not None
        self._looked = True
        if sim.strategy.unsaved is not None:
            self._cannot(sim.strategy.unsaved)
            return
        try:
            _checkpoints(self.directory, sim).encode(sim.snapshot())
        except UnreadableError as error:
            self._cannot(f"its state {error}")

    def _cannot(self, why: str) -> None:
        self._savable, self._due = False, (math.inf, math.inf)
        logger.warning("this run cannot be saved and resumed: %s", why)

    def save(self, sim: Simulation) -> bool:
        """Write a checkpoint, between two instants; False if the run cannot be saved, which is told once."""
        if self.directory is None:
            return False
        sim.evaluation.catch_up()
        self._flush(sim)
        if not self._savable:
            return False
        about = {
            "parts": self.directory.parts,
            "time": sim.now,
            "updates": sim.updates,
            "wall_seconds": round(time.monotonic() - self.began, 3),
        }
        try:
            _checkpoints(self.directory, sim).write(sim.snapshot(), about)
        except UnreadableError as error:
            self._cannot(f"its state {error}")
        except OSError as error:
            raise self._unwritable(error) from error
        else:
            self._due = self.schedule.after(time.monotonic(), sim.kernel.handled)
        return self._savable

    def _flush(self, sim: Simulation) -> None:
        assert self.directory is not None
        try:
            self.directory.write_log("metrics", sim.evaluation.log)  # short, and a view may add a column late
            self.directory.flush("events", sim.tasks.log)
            if len(sim.links.log):
                self.directory.flush("links", sim.links.log)
        except OSError as error:
            raise self._unwritable(error) from error
        self._flushed = time.monotonic()

    def _unwritable(self, error: OSError) -> SimulationError:
        assert self.directory is not None
        how = f"when that is mended, go on with: {self._how_to_go_on()}"
        return SimulationError(f"{self.directory.path}: cannot be written ({said(error)}); {how}")

    def _how_to_go_on(self) -> str:
        assert self.directory is not None
        return f"fedsim resume {shlex.quote(str(self.directory.path))}"

    # ---- its end -----------------------------------------------------------------------------------

    def interrupt(self, sim: Simulation) -> str:
        """Save the run because it has been told to stop; a line on how to go on."""
        assert self.directory is not None
        text = f"interrupted at {sim.now:.6g} s of {sim.clock} time"
        if self.save(sim):
            text += f" and saved; go on with: {self._how_to_go_on()}"
        else:
            text += f"; it cannot be saved, see {self.directory.path / 'run.log'}"
        logger.warning("run %s", text)
        self.close()
        return text

    def fail(self, sim: Simulation, error: BaseException) -> None:
        """Keep what there is of a run that could not go on."""
        with contextlib.suppress(Exception):  # what failed may be the evaluation, or what it evaluates
            sim.evaluation.catch_up()
        sim.close(getattr(error, "task", None))
        if self.directory is not None:
            logger.error("run failed at %.6g s: %s: %s", sim.now, type(error).__name__, said(error))
            with contextlib.suppress(SimulationError):  # what failed may be the writing itself
                self._flush(sim)
        self.close()

    def close(self) -> None:
        """Let go of ``run.log`` and of the directory."""
        if self._handler is not None:
            logger.removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if self.directory is not None:
            self.directory.close()

    def finish(self, sim: Simulation, pool: Mapping[str, Any]) -> Run:
        """Write everything and give it back."""
        summary = summarise(sim)
        manifest = self._manifest(sim, pool)
        clients = client_table(sim)
        model = {name: tensor.contiguous() for name, tensor in sim.layout.split(sim.model).items()}
        if self.directory is not None:
            from safetensors.torch import save_file

            self._flush(sim)
            self.directory.write_table("clients", clients)
            draft = self.directory.path / ".model.draft"
            save_file({name: tensor.clone() for name, tensor in model.items()}, draft)
            draft.replace(self.directory.path / "model.safetensors")
            self.directory.write_json("summary.json", summary)
            logger.info("run ends: %s at %.6g s of %s time", sim.stopped, sim.now, sim.clock)
            self.directory.write_json("manifest.json", manifest)
            shutil.rmtree(self.directory.path / "checkpoint")  # there is nothing left to go on with
        self.close()
        return Run(
            logs={"metrics": sim.evaluation.log, "events": sim.tasks.log, "links": sim.links.log},
            client_columns=clients,
            model=model,
            summary=summary,
            manifest=manifest,
            path=None if self.directory is None else self.directory.path,
        )

    def _manifest(self, sim: Simulation, pool: Mapping[str, Any]) -> dict[str, Any]:
        groups = sim.tasks.log.table().column("group").to_numpy()
        trained = groups[groups > 0]
        reached = {"min": 0, "mean": 0.0, "max": 0}
        if len(trained):
            # Each group is counted once: a group of g tasks stands in g rows.
            mean = len(trained) / float((1.0 / trained).sum())
            reached = {"min": int(trained.min()), "mean": round(mean, 3), "max": int(trained.max())}
        seconds = time.monotonic() - self.began
        labels = self.identity["choices"]
        return {
            **self.identity,
            "strategy": labels.get("strategy", type(sim.strategy).__name__.lower()),
            "problem": labels.get("problem", type(sim.problem).__name__.lower()),
            "model_sha256": model_sha256(sim),
            "events_sha256": sim.tasks.log.sha256(),
            "clock": sim.clock,
            "wall_seconds": round(seconds, 3),
            "tasks_per_second": round(len(sim.tasks.log) / seconds, 1),
            "peak_memory_bytes": _peak_memory(),
            "pool": dict(pool),
            "group_sizes": reached,
        }


def begun(path: Path) -> dict[str, Any]:
    """The identity of the unfinished run in ``path``.

    Raises:
        ConfigError: if there is none.
    """
    if not path.exists():
        raise ConfigError(f"{path}: does not exist")
    if (path / "multirun.yaml").exists() and not (path / MARKER).exists():
        raise ConfigError(f"{path}: is a sweep; run the same `fedsim run -m ... out={path}` again to go on with it")
    if not (path / MARKER).is_file():
        raise ConfigError(f"{path}: is not a run's directory (it has no {MARKER})")
    if is_complete(path):
        raise ConfigError(f"{path}: this run is complete")
    try:
        (path / "config.yaml").stat()
        identity: dict[str, Any] = json.loads((path / "checkpoint" / IDENTITY).read_text())
        if not isinstance(identity["versions"], dict) or not identity["config_sha256"]:
            raise TypeError
        return {"choices": {}, **identity}
    except OSError:
        raise ConfigError(f"{path}: was stopped before it had begun; run it again with overwrite=true") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{path / 'checkpoint' / IDENTITY}: is damaged; run it again with overwrite=true") from None


def is_complete(path: Path) -> bool:
    """Whether a run's directory holds a complete run: its manifest is written last."""
    try:
        return "model_sha256" in json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _checkpoints(directory: RunDirectory, sim: Simulation) -> CheckpointFolder:
    shared = {
        "federation": sim,
        "strategy": sim.strategy,
        "problem": sim.problem,
        "system": sim.system,
        "pool": sim.pool,
    }
    classes_of = [sim.strategy, sim.strategy.server, *sim.strategy.jobs.values(), sim.system.availability]
    return CheckpointFolder(directory.path / "checkpoint", shared, classes_of)


def _peak_memory() -> int:
    """Most bytes this process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def model_sha256(sim: Simulation) -> str:
    """Hash of the model's dtype, size and bytes."""
    total = hashlib.sha256(f"{sim.layout.dtype}:{sim.layout.size}\n".encode())
    total.update(sim.current.contiguous().view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return total.hexdigest()


def summarise(sim: Simulation) -> dict[str, Any]:
    """How a run ended, in plain values."""
    down, up = sim.bytes_moved()
    applied = sim.tasks.outcomes["applied"]
    return {
        "stopped": sim.stopped,
        "time": sim.now,
        "version": sim.version,
        "round": sim.round,
        "updates": sim.updates,
        "samples": sim.samples_done,
        "down_bytes": down,
        "up_bytes": up,
        "mean_staleness": sim.staleness_sum / applied if applied else None,
        "outcomes": dict(sorted(sim.tasks.outcomes.items())),
        "metrics": {name: _finite(value) for name, value in sim.evaluation.latest.items()},
    }


def client_table(sim: Simulation) -> dict[str, Any]:
    """Columns about clients: data, device, participation, and the metrics on their own examples if they keep any.

    Bandwidths in bytes per second, inf for none.
    """
    import pyarrow.compute as pc

    log = sim.tasks.log.table()
    who, applied = log.column("client").to_numpy(), pc.equal(log.column("outcome"), "applied").to_numpy()
    return {
        "client": np.arange(sim.clients),
        **sim.problem.client_table(),
        "seconds_per_step": sim.system.compute.seconds_per_step,
        "down_bytes_per_second": sim.system.network.down_bytes_per_second,
        "up_bytes_per_second": sim.system.network.up_bytes_per_second,
        "tasks": np.bincount(who, minlength=sim.clients),
        "applied": np.bincount(who[applied], minlength=sim.clients),
        **sim.evaluation.per_client(),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
