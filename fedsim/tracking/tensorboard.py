"""Metrics for TensorBoard. The package is imported when a run begins, and only if this tracker was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedsim.checks import ConfigError
from fedsim.record import METRIC_COLUMNS
from fedsim.tracking.base import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
"""Where the files go in a run's directory."""


class TensorBoard(Tracker):
    """Writes every metric as a scalar: its step is the round, its "relative" time is virtual time.

    Args:
        folder: where, in a folder named like the run's; None is ``tensorboard`` in the run's directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def check(self, folder: Path | None) -> None:
        """Refuse to begin without the package."""
        if find_spec("tensorboard") is None:
            raise ConfigError("tracker=tensorboard: needs an extra: pip install -c constraints.txt '.[tensorboard]'")

    def begin(self, folder: Path | None, config: Mapping[str, Any], first_round: int) -> None:
        """Open the files; what was written of ``first_round`` and later before is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        name = "run" if folder is None else folder.name
        place = (
            Path(self.folder) / name if self.folder is not None else Path(FOLDER if folder is None else folder / FOLDER)
        )
        self._writer = SummaryWriter(str(place), purge_step=first_round or None)
        if not first_round:
            text = yaml.safe_dump(dict(config), sort_keys=False)
            self._writer.add_text("configuration", f"```\n{text}```", 0, walltime=0.0)

    def evaluated(self, row: Mapping[str, float]) -> None:
        """A scalar for each column: metrics under their names, the rest under ``run/``."""
        assert self._writer is not None
        for name, value in row.items():
            tag = f"run/{name}" if name in METRIC_COLUMNS else name
            # Seconds from the start, so that the relative time that TensorBoard shows is the virtual one.
            self._writer.add_scalar(tag, value, row["round"], walltime=row["time"])
        self._writer.flush()

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
