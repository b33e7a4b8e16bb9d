"""One run that can be begun, killed and resumed: as a module for the tests, as a script that kills itself.

``python resumable.py OUT STRATEGY SEED`` begins the run in a forked child, kills the child's whole process group
with SIGKILL after a random while, resumes in a new child, and so on until the run is complete.
``python resumable.py OUT STRATEGY CALL write`` kills at the CALL-th rename of a file instead: in mid-write.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import fedsim
from fedsim.data import Embedded
from fedsim.problems.models import Logistic
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.system.availability import Markov
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.system.network import Constant

IMAGES = Embedded().load()

STRATEGIES: dict[str, Any] = {
    "fedavg": lambda local: FedAvg(local, over_selection=1.3, deadline=60.0),
    "fedbuff": lambda local: FedBuff(local, buffer_size=4, max_staleness=9),
}


def simulate(strategy: str, out: Path | None, **more: Any) -> fedsim.Run:
    return fedsim.simulate(
        STRATEGIES[strategy](fedsim.LocalSGD(momentum=0.9, steps=8, lr=0.05)),
        fedsim.Classification(IMAGES, Logistic()),
        fedsim.System(Lognormal(jitter=0.4), Constant(down=2.0, up=0.5), Markov(), Faults(dropout=0.1, when="any")),
        stop=fedsim.Stop(rounds=120),
        clients=25,
        cohort=8,
        eval_every=5,
        out=out,
        checkpoint=more.pop("checkpoint", fedsim.CheckpointSchedule(seconds=None, events=60)),
        **more,
    )


def kill_at_rename(call: int) -> None:
    """From now on this process kills its group in place of its ``call``-th rename."""
    rename, left = os.replace, [call]

    def replace(*places: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.killpg(0, signal.SIGKILL)
        rename(*places, **more)

    os.replace = replace  # type: ignore[assignment]


def begun(out: Path) -> bool:
    return (out / "config.yaml").exists()


def child(strategy: str, out: Path, call: int = 0) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if call:
            kill_at_rename(call)
        simulate(strategy, out, resume=begun(out), overwrite=not begun(out))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(out: Path, strategy: str, number: int, in_writes: bool) -> int:
    """How often the run was killed before it was complete."""
    chance, kills = random.Random(number), 0
    while True:
        done = 0
        pid = child(strategy, out, number if in_writes and not kills else 0)
        if not in_writes:
            time.sleep(chance.uniform(0.02, 0.7))
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                    os.killpg(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
        if not done:
            _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(f"the run failed after {kills} kills")
            return kills
        kills += 1


if __name__ == "__main__":
    simulate("fedavg", None, checkpoint=None)  # everything imported and warm before the first fork
    print(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), len(sys.argv) > 4))
