"""``fedsim doctor``: is this installation whole, and does it keep its promise on this machine?"""

from __future__ import annotations

import os
import platform
from importlib import metadata

from fedsim.checks import FedsimError
from fedsim.version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "hydra-core",
    "omegaconf",
    "matplotlib",
    "ray",
    "rich",
    "safetensors",
)


def main() -> int:
    """Print what was found; 0 if everything works, else 1."""
    import torch

    from fedsim.training.native import instruction_sets, why_not

    print(f"fedsim {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    print(f"cores {os.cpu_count()}, instruction set {torch.backends.cpu.get_cpu_capability()}")
    native = ", ".join(instruction_sets()) or f"not there: {why_not()}"
    print(f"native kernel: {native}")
    checks = (("embedded images", _data), ("same bits for any group size", _same_bits))
    sound = True
    for name, check in checks:
        try:
            verdict = check()
        except (FedsimError, OSError, ValueError) as error:
            verdict, sound = f"FAILED: {error}", False
        print(f"{name}: {verdict}")
    return 0 if sound else 1


def _data() -> str:
    from fedsim.data.sources import Embedded

    data = Embedded().load()
    return f"{len(data.train_y)} training and {len(data.test_y)} test examples"


def _same_bits() -> str:
    """One short run on the embedded images in groups of 1, 3 and 12."""
    from fedsim.app import simulate
    from fedsim.pool import InlinePool
    from fedsim.problems.classification import Classification
    from fedsim.simulation import Stop
    from fedsim.strategy import Asynchronous

    class Mixing(Asynchronous):
        def on_reply(self, fed, reply):  # type: ignore[no-untyped-def]
            fed.publish(fed.model + 0.5 * reply["delta"], used=[reply])

    hashes = {
        simulate(Mixing(), Classification(), pool=InlinePool(group), stop=Stop(updates=24), cohort=12).manifest[
            "model_sha256"
        ]
        for group in (1, 3, 12)
    }
    if len(hashes) > 1:
        raise FedsimError("the same run gave different models in groups of 1, 3 and 12 tasks")
    return f"yes ({hashes.pop()[:12]})"
