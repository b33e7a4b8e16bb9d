"""What a process and all its descendants use, from Linux's /proc and processor clocks."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")


def tree(root: int) -> list[int]:
    """``root`` and the ids of all its descendants; empty if there is no such process."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                # Name and state come before; a name may hold spaces, so what counts begins behind its bracket.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            children[parent].append(int(entry.name))
    found = [root] if (PROC / str(root)).exists() else []
    for each in found:
        found += children[each]
    return found


def cpu_seconds(processes: list[int]) -> float:
    """Processor seconds that these processes have used in all their threads.

    From their processor clocks, which count nanoseconds; the ticks in /proc are 10 ms long.
    """
    total = 0.0
    for process in processes:
        try:
            total += time.clock_gettime(_clock_of(process))
        except OSError:  # it has ended meanwhile
            continue
    return total


def _clock_of(process: int) -> int:
    """The number of another process's processor clock: clock_getcpuclockid(3), which Python does not have.

    The number is part of Linux's interface to programs: the id inverted, above two bits for the kind of clock (2: time
    on the processor) and one that is set for a single thread.
    """
    return (~process << 3) | 2


def memory_bytes(processes: list[int]) -> int:
    """Memory these processes hold now; what several share counts for each with its part (PSS)."""
    total = 0
    for process in processes:
        try:
            lines = (PROC / str(process) / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended meanwhile
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def peak_bytes() -> int:
    """Most memory this process has held until now. Not getrusage's: that begins with its parent's."""
    for line in (PROC / "self" / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("there is no VmHWM in /proc/self/status")
