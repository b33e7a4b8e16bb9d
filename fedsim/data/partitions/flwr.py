"""The partitioners of flwr-datasets itself, for who has that package."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from fedsim.checks import ConfigError, nearest, said
from fedsim.data.partitions.base import Indices, Partition, Table
from fedsim.rng import Randomness

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""What keeps flwr-datasets and the package below it from reporting to anyone; they read it when imported."""


class FlwrDatasets(Partition):
    """Any partitioner of flwr-datasets that goes by label or by natural client.

    It sees a table of its own: the columns ``label`` and, if the data say who made an example, ``client``, in an order
    shuffled by our seed. Nothing is downloaded or written, and telemetry is off.

    Args:
        partitioner: a class of ``flwr_datasets.partitioner``, or a dotted class of one's own.
        settings: arguments of that class. Unless given, ``num_partitions`` is the number of clients, ``partition_by``
            is ``label`` and ``seed`` follows from the run's.
    """

    package = "flwr-datasets"
    """The distribution it comes from."""

    def __init__(self, partitioner: str = "IidPartitioner", settings: Mapping[str, Any] | None = None) -> None:
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"settings={settings}: must be names and values, {{alpha: 0.5}}, or null")
        self.partitioner = str(partitioner)
        self.settings = dict(settings or {})

    def holders(self, table: Table, clients: int, randomness: Randomness) -> Indices:
        """Which client holds each example ``[n]``; -1 for no one."""
        os.environ.update(QUIET)
        try:
            datasets, theirs = import_module("datasets"), import_module("flwr_datasets.partitioner")
        except ImportError:
            raise ConfigError("partition=flwr: needs flwr-datasets: pip install flwr-datasets") from None
        made = self._class(theirs)
        arguments = self._arguments(made, clients, randomness("partition", 1).torch_seed())
        order = randomness("partition", 0).permutation(len(table))
        columns = {"label": table.labels[order], "position": order}
        if table.ids is not None:
            columns["client"] = table.ids[order]
        try:
            partitioner = made(**arguments)
            partitioner.dataset = datasets.Dataset.from_dict(columns)
            loaded = (partitioner.load_partition(part) for part in range(partitioner.num_partitions))
            positions = [np.asarray(part[:]["position"], dtype=np.int64) for part in loaded]
        except Exception as error:  # somebody else's code may raise anything
            raise ConfigError(f"partition.partitioner={self.partitioner}: {said(error)}") from error
        return self._holder(positions, clients, len(table))

    def _class(self, theirs: Any) -> Any:
        """The partitioner's class."""
        module_name, _, name = self.partitioner.rpartition(".")
        try:
            module = import_module(module_name) if module_name else theirs
        except ImportError as error:
            raise ConfigError(f"partition.partitioner={self.partitioner}: {said(error)}") from None
        if not inspect.isclass(getattr(module, name, None)):
            names = [each for each in vars(module) if each.endswith("Partitioner")]
            raise ConfigError(f"partition.partitioner={self.partitioner}: unknown name, {nearest(name, names)}")
        return getattr(module, name)

    def _arguments(self, made: Any, clients: int, seed: int) -> dict[str, Any]:
        """What the partitioner's constructor gets."""
        allowed = inspect.signature(made).parameters
        for key in self.settings:
            if key not in allowed:
                raise ConfigError(
                    f"partition.settings.{key}={self.settings[key]}: unknown key, {nearest(key, allowed)}"
                )
        ours = {"num_partitions": clients, "partition_by": "label", "seed": seed}
        given = {key: value for key, value in ours.items() if key in allowed} | self.settings
        if "distribution_array" in given:  # the one argument that must be an array
            given["distribution_array"] = np.asarray(given["distribution_array"])
        return given

    def _holder(self, positions: list[Indices], clients: int, examples: int) -> Indices:
        """Who holds each example ``[n]``, from what each part holds."""
        where = f"partition.partitioner={self.partitioner}"
        if len(positions) != clients:
            raise ConfigError(f"{where}: makes {len(positions)} parts for clients={clients}")
        holder = np.full(examples, -1, dtype=np.int64)
        for client, part in enumerate(positions):
            if (holder[part] >= 0).any():
                raise ConfigError(f"{where}: gives an example to two clients")
            holder[part] = client
        return holder
