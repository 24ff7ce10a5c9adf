"""Why a job did not come to its end: memory that ran out, or anything else."""

import errno
import re
import time
from typing import Any

from wan_sweep.units import GIB, KIB, MIB, format_bytes

UNITS = {"bytes": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}
SAYS_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|STATUS_ALLOC_FAILED")
FOR_WANT_OF_MEMORY = re.compile(r"could not create a primitive|Resource temporarily unavailable")
"""What libraries say when a limited process gets no memory for a kernel or a thread."""
FROM_PEERS = re.compile(
    r"gloo|NCCL|nccl|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe|client socket|Timed out waiting"
)
"""What libraries say when another rank is gone or does not answer; torch gives some of it classes of their own."""
DISTRIBUTED_ERRORS = frozenset({"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"})
LONGEST_MESSAGE = 4000
LONGEST_REASON = 300


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # torch's own class is a RuntimeError; asking for it would import torch, perhaps where that is what has failed.
    return isinstance(error, RuntimeError) and SAYS_OUT_OF_MEMORY.search(str(error)) is not None


def is_from_peers(error: BaseException) -> bool:
    """Whether an error says that other ranks are gone or silent, so that its cause is to be looked for there."""
    classes = {kind.__name__ for kind in type(error).__mro__}
    is_of_kind = isinstance(error, RuntimeError | ConnectionError)
    return bool(classes & DISTRIBUTED_ERRORS) or (is_of_kind and FROM_PEERS.search(str(error)) is not None)


def request_bytes(message: str) -> int | None:
    """How much an out-of-memory error of torch says was asked for; None if it does not say."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMG]iB)", message)
    return int(float(found[1].rstrip(".")) * UNITS[found[2]]) if found else None


def place(failed_at: dict[str, Any]) -> str:
    """Where it happened, such as "denoise, step 3 of 4"."""
    words = [str(failed_at["phase"])] if "phase" in failed_at else []
    if "component" in failed_at:
        words.append(str(failed_at["component"]))
    if "step" in failed_at:
        words.append(f"step {failed_at['step'] + 1} of {failed_at['num_steps']}")
    if "block" in failed_at:
        words.append(f"block {failed_at['block']}")
    return ", ".join(words)


def explain(error: BaseException, failed_at: dict[str, Any] | None, limit_bytes: int | None) -> dict[str, Any]:
    """Outcome, reason and failure of a job that ended with this error.

    Args:
        error: what was raised.
        failed_at: the spans around it and what stood on the device then, if it came that far.
        limit_bytes: the job's memory limit, if it has one.
    """
    message = str(error).strip()
    failure: dict[str, Any] = {"message": message[:LONGEST_MESSAGE], "time": time.time(), **(failed_at or {})}
    where = place(failed_at or {})
    is_limited_out = limit_bytes is not None and FOR_WANT_OF_MEMORY.search(message) is not None
    if not (is_out_of_memory(error) or is_limited_out):
        first_line = next(iter(message.splitlines()), "")
        reason = f"{type(error).__name__}{f' in {where}' if where else ''}: {first_line}"
        failure["is_from_peers"] = is_from_peers(error)
        return {"outcome": "failed", "reason": reason[:LONGEST_REASON], "failure": failure}
    reason = f"out of memory{f' in {where}' if where else ''}"
    asked = failure["request_bytes"] = request_bytes(message)
    if asked is not None:
        reason += f": {format_bytes(asked)} more were asked for"
    if failure.get("allocated_bytes"):
        reason += f" with {format_bytes(failure['allocated_bytes'])} allocated"
    if limit_bytes is not None:
        reason += f" and a limit of {format_bytes(limit_bytes)}"
    return {"outcome": "oom", "reason": reason, "failure": failure}
