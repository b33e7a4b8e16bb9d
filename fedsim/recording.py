"""Writes a run's records while it goes on, and its identity at the end."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fedsim.record import RunDirectory
from fedsim.simulation import Simulation
from fedsim.version import __version__

if TYPE_CHECKING:
    import pandas as pd

LOCKED = ("torch", "numpy", "pandas", "pyarrow", "hydra-core", "omegaconf", "safetensors", "scipy", "matplotlib")
"""Distributions whose versions are part of a run's identity."""

NOT_IDENTITY = ("out", "overwrite")
"""Configuration keys that say where a run goes, not what it is."""

logger = logging.getLogger("fedsim")


@dataclass(frozen=True)
class Run:
    """What a run leaves: tables as pandas, the model by parameter name, and what it was."""

    metrics: pd.DataFrame
    events: pd.DataFrame
    links: pd.DataFrame
    clients: pd.DataFrame
    model: dict[str, Tensor]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    path: Path | None


class Recording:
    """The records of one run.

    Args:
        out: the run's directory, or a function that makes one; None writes nothing and keeps the tables in
            memory only.
        overwrite: replace a run in ``out``.
        config: the resolved configuration, plain values.
        labels: names of the parts, for the manifest.

    Raises:
        ConfigError: if ``out`` exists and may not be replaced.
    """

    def __init__(
        self,
        out: str | Path | Callable[[], Path] | None,
        overwrite: bool,
        config: Mapping[str, Any],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.config = dict(config)
        self.labels = dict(labels or {})
        self.began = time.time()
        self._flushed = self.began
        self._handler: logging.Handler | None = None
        self.directory = None if out is None else RunDirectory(out() if callable(out) else out, overwrite)
        if self.directory is not None:
            self.config["out"] = str(self.directory.path)
            self.directory.write_text("config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            self._handler = logging.FileHandler(self.directory.path / "run.log")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(self._handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
            logger.info("run begins: fedsim %s, seed %s", __version__, self.config.get("seed"))

    def tick(self, sim: Simulation) -> None:
        """Write what has been closed since, every few seconds."""
        if self.directory is not None and time.time() - self._flushed > RunDirectory.FLUSH_SECONDS:
            self._flush(sim)

    def _flush(self, sim: Simulation) -> None:
        assert self.directory is not None
        self.directory.write_log("metrics", sim.evaluation.log)  # short, and a view may add a column late
        self.directory.flush("events", sim.tasks.log)
        if sim.links.log.rows:
            self.directory.flush("links", sim.links.log)
        self._flushed = time.time()

    def fail(self, sim: Simulation, error: BaseException) -> None:
        """Keep what there is of a run that could not go on."""
        sim.close(getattr(error, "task", None))
        if self.directory is not None:
            self._flush(sim)
            logger.error("run failed at %.6g s: %s: %s", sim.now, type(error).__name__, error)
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
            logger.info("run ends: %s at %.6g s of virtual time", sim.stopped, sim.now)
            self.directory.write_json("manifest.json", manifest)
        self.close()
        import pandas as pd

        return Run(
            metrics=sim.evaluation.log.frame(),
            events=sim.tasks.log.frame(),
            links=sim.links.log.frame(),
            clients=pd.DataFrame(clients),
            model=model,
            summary=summary,
            manifest=manifest,
            path=None if self.directory is None else self.directory.path,
        )

    def _manifest(self, sim: Simulation, pool: Mapping[str, Any]) -> dict[str, Any]:
        groups = [row[sim.tasks.log.columns_at("group")] for row in sim.tasks.log.rows if row is not None]
        trained = np.array([size for size in groups if size > 0])
        reached = {"min": 0, "mean": 0.0, "max": 0}
        if len(trained):
            # Each group is counted once: a group of g tasks stands in g rows.
            mean = len(trained) / float((1.0 / trained).sum())
            reached = {"min": int(trained.min()), "mean": round(mean, 3), "max": int(trained.max())}
        identity = {key: value for key, value in self.config.items() if key not in NOT_IDENTITY}
        return {
            "fedsim": __version__,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in LOCKED},
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "seed": self.config.get("seed"),
            "strategy": self.labels.get("strategy", type(sim.strategy).__name__.lower()),
            "problem": self.labels.get("problem", type(sim.problem).__name__.lower()),
            "choices": self.labels,
            "config_sha256": hashlib.sha256(yaml.safe_dump(identity, sort_keys=True).encode()).hexdigest(),
            "model_sha256": model_sha256(sim),
            "events_sha256": sim.tasks.log.sha256(),
            "clock": "virtual",
            "wall_seconds": round(time.time() - self.began, 3),
            "pool": dict(pool),
            "group_sizes": reached,
        }


def model_sha256(sim: Simulation) -> str:
    """Hash of the model's dtype, size and bytes."""
    total = hashlib.sha256(f"{sim.layout.dtype}:{sim.layout.size}\n".encode())
    total.update(sim.current.contiguous().numpy().tobytes())
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
    """Columns about clients: data, device and participation. Bandwidths in bytes per second, inf for none."""
    applied, tasks = np.zeros(sim.clients, dtype=np.int64), np.zeros(sim.clients, dtype=np.int64)
    who, how = sim.tasks.log.columns_at("client"), sim.tasks.log.columns_at("outcome")
    for row in sim.tasks.log.rows:
        if row is not None:
            tasks[row[who]] += 1
            applied[row[who]] += row[how] == "applied"
    return {
        "client": np.arange(sim.clients),
        **sim.problem.client_table(),
        "seconds_per_step": sim.system.compute.seconds_per_step,
        "down_bytes_per_second": sim.system.network.down_bytes_per_second,
        "up_bytes_per_second": sim.system.network.up_bytes_per_second,
        "tasks": tasks,
        "applied": applied,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
