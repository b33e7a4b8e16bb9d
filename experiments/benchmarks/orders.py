"""The contestant's end of the pipe: it is told how many rounds to run and answers when it has. No fedsim, no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Orders:
    """Reads orders from standard input and answers on what was standard output.

    From now on all that anybody prints goes to standard error, so that no library can spoil an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def rounds(self, model: Callable[[], NDArray[Any]]) -> int:
        """Wait for the next order to train and give its number of rounds; 0 is the end.

        Args:
            model: gives the present model as a vector ``[d]``, for orders to save it.
        """
        for line in sys.stdin:
            order = json.loads(line)
            if "save" in order:
                np.save(order["save"], model())
                self.answer()
            else:
                return int(order["rounds"])
        return 0

    def answer(self, **facts: Any) -> None:
        """Say that an order has been carried out, and what is known of it."""
        print(json.dumps(facts), file=self._answers, flush=True)
