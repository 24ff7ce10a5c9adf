"""What the host's memory holds of this process."""

import resource
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """Bytes of this process that are in memory now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def resident_peak_bytes() -> int:
    """The most that was in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
