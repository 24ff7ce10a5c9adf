"""Waits until a job's device memory is back with the driver, so that the next job starts from the same baseline."""

import time
from collections.abc import Callable, Mapping, Sequence

from wan_sweep.units import MIB, format_bytes, format_seconds

# Drivers give memory back in pages, and other processes breathe.
TOLERANCE_BYTES = 64 * MIB
LIMIT_S = 30.0


def wait_for_baseline(
    baseline: Sequence[int],
    read: Callable[[], Sequence[int]],
    *,
    limit_s: float = LIMIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Mapping[str, str] | None:
    """Returns when no device holds more than before the job; or, after the limit, a warning.

    Args:
        baseline: Bytes in use on each device before the job; empty where there is none.
        read: Reads the same now.
        limit_s: How long to wait.
        sleep: Waits between two readings.
    """
    deadline = time.monotonic() + limit_s
    while baseline:
        excess = max(now - before for now, before in zip(read(), baseline, strict=True))
        if excess <= TOLERANCE_BYTES:
            return None
        if time.monotonic() >= deadline:
            return {
                "code": "device_not_at_baseline",
                "text": f"{format_seconds(limit_s)} after the job the device still holds "
                f"{format_bytes(excess)} more than before it.",
                "advice": "Another process took memory, or one of the job's is stuck; look at nvidia-smi.",
            }
        sleep(0.2)
    return None
