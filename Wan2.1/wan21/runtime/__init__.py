"""The place where a pipeline computes: streams, events, pinned memory, generators, and the allocator's counters.

Nothing else in wan21 calls `torch.cuda`. The pipeline asks the runtime; the measurer reads its counters. A CPU and a
CUDA runtime exist; both give the same names the same meaning:

- allocated: bytes that torch's allocator for the device has handed out and not taken back;
- requested: the same without the allocator's rounding;
- reserved: what the allocator holds from the driver (on a CPU it holds nothing back: reserved equals allocated);
- host buffers: memory that stages weights on the host, pinned on CUDA. On a CPU it is anonymous memory outside torch's
  allocator, so that the two pools can be told apart there too.
"""

import torch

from wan21.errors import UsageError
from wan21.runtime.base import Mark, Memory, Runtime, Stream
from wan21.runtime.cpu import CpuRuntime
from wan21.runtime.cuda import CudaRuntime
from wan21.waiting import whole_pages

__all__ = [
    "CpuRuntime",
    "CudaRuntime",
    "Mark",
    "Memory",
    "Runtime",
    "Stream",
    "default_device",
    "make_runtime",
    "whole_pages",
]


def make_runtime(device: str, *, memory_limit_bytes: int | None = None) -> Runtime:
    """The runtime for "cuda" (the first visible device), "cuda:N" or "cpu".

    Raises:
        UsageError: the device is unknown or not there, or a limit is asked of the CPU's allocator, which has none.
    """
    if device == "cpu":
        if memory_limit_bytes is not None:
            raise UsageError(
                f"memory_limit_bytes={memory_limit_bytes} cannot be on device=cpu: torch's allocator there takes no "
                "limit; limit the process instead"
            )
        return CpuRuntime()
    name, _, index = device.partition(":")
    if name != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"device={device} is not known; choose cuda, cuda:N or cpu")
    return CudaRuntime(int(index or 0), memory_limit_bytes=memory_limit_bytes)


def default_device() -> str:
    """The GPU where torch sees one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
