"""Problems that are a torch module: what it takes to train many clients' models as one stack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.vectors import Layout


@dataclass(frozen=True)
class Network:
    """A problem ``f_i(x) = mean over examples of cross_entropy(module(example; x), class)``, drawing nothing."""

    module: nn.Module
    """From examples ``[n, ...]`` to logits ``[n, classes]``, in training; not to be changed."""
    layout: Layout
    """Of its trainable parameters in a flat vector."""
    inputs: Tensor
    """All examples ``[n, ...]``."""
    targets: Tensor
    """``[n]``: their classes."""
    rows: Callable[[NDArray[np.int64]], Tensor]
    """``[examples]``: where in ``inputs`` the examples that clients ``[k]`` train on lie, client by client."""
    precision: str = "float32"
    """Of forward passes: ``float32`` (as the parameters are) or ``bfloat16`` (autocast)."""
