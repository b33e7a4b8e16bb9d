"""One run that can be begun, killed and resumed: as a module for the tests, as a script that kills itself.

``python resumable.py OUT STRATEGY random SEED`` begins the run in a forked child, kills the child's whole process
group with SIGKILL after a random while, resumes in a new child, and so on until the run is complete.
``python resumable.py OUT STRATEGY write CALL...`` kills at the CALL-th rename of a file instead: in mid-write, once
in each of the runs ``OUT/CALL``.
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
        STRATEGIES[strategy](fedsim.LocalSGD(momentum=0.9, steps=4, lr=0.05)),
        fedsim.Classification(IMAGES, Logistic()),
        fedsim.System(Lognormal(jitter=0.4), Constant(down=2.0, up=0.5), Markov(), Faults(dropout=0.1, when="any")),
        stop=fedsim.Stop(rounds=60),
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


def ended(pid: int, options: int = 0) -> bool:
    """Whether a child is complete; False if it was killed or, with ``WNOHANG``, is still at work."""
    done, status = os.waitpid(pid, options)
    if not done:
        return False
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed")
    return os.WIFEXITED(status)


def killed_at_random(out: Path, strategy: str, seed: int, seconds: float) -> int:
    """How often the run, of so many seconds, was killed before it was complete."""
    chance, kills = random.Random(seed), 0
    while True:
        pid = child(strategy, out)
        time.sleep(chance.uniform(0.01, 0.2) * seconds * 1.03**kills)  # so that it ends however busy the machine is
        if ended(pid, os.WNOHANG):
            return kills
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        if ended(pid):
            return kills
        kills += 1
        if (out / "manifest.json").exists():  # killed after all was written
            return kills


def main(out: Path, strategy: str, how: str, *numbers: str) -> None:
    simulate("fedavg", None, checkpoint=None)  # everything imported and warm before the first fork
    if how == "random":
        began = time.monotonic()
        simulate(strategy, None, checkpoint=None)
        print(killed_at_random(out, strategy, int(numbers[0]), time.monotonic() - began))
        return
    for call in numbers:
        if ended(child(strategy, out / call, int(call))):
            raise SystemExit(f"there is no {call}-th rename")
        ended(child(strategy, out / call))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
