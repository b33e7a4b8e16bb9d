"""Test and validation examples that clients keep apart from those they train on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import ConfigError
from fedsim.rng import Randomness

PARTS = ("test", "validation")
"""What a client may keep apart, in the order it is taken."""


class ClientSplit:
    """Which of its own examples each client trains on, and which it keeps for validation and test.

    A client with ``n >= 3`` examples keeps ``max(1, floor(share * n))`` of them for each part that is asked for,
    and one at least for training: at shares near 0.5 validation gives way. A client with fewer keeps none apart. How
    many is known without looking at an example; which ones is keyed by (seed, client) and drawn when asked for.

    Attributes:
        training: ``[clients]``, how many examples each client trains on.
        kept: ``[clients]`` for each part, how many examples each client keeps for it.

    Args:
        held: ``[clients]``, how many examples each client holds.
        shares: of each part, 0 to 0.5; 0 keeps none.
        randomness: where the draws come from, keyed by ``("client split", client)``.

    Raises:
        ConfigError: if no client holds enough.
    """

    def __init__(self, held: NDArray[np.int64], shares: Mapping[str, float], randomness: Randomness) -> None:
        self._held, self._randomness = held, randomness
        self.training = held
        self.kept: dict[str, NDArray[np.int64]] = {}
        for part in PARTS:
            # 0.29 of 100 examples are 29, as a product of floats 28.999999999999996.
            wanted = np.maximum(np.floor(shares[part] * held + 1e-9), shares[part] > 0).astype(np.int64)
            self.kept[part] = np.where(held >= 3, np.minimum(wanted, self.training - 1), 0)
            self.training = self.training - self.kept[part]
            if shares[part] and not self.kept[part].any():
                raise ConfigError(
                    f"problem.client_{part}={shares[part]}: no client holds the 3 training examples it takes to keep "
                    "some apart"
                )

    def positions(self, client: int, part: str) -> NDArray[np.int64]:
        """Where among its own examples, ``0 .. held - 1``, those of one part lie, ascending.

        Args:
            client: whose.
            part: ``"test"``, ``"validation"`` or ``"training"``.
        """
        order = self._randomness("client split", client).permutation(int(self._held[client]))
        # From both ends, so that what is kept for test is the same whether there is a validation part or not.
        test, validation = int(self.kept["test"][client]), len(order) - int(self.kept["validation"][client])
        ends = {"test": (0, test), "training": (test, validation), "validation": (validation, len(order))}
        return np.sort(order[slice(*ends[part])])
