"""All that can be read at a boundary: the allocator's counters, the device and the host."""

from collections.abc import Callable
from dataclasses import dataclass

from wan21.runtime import Memory, Runtime
from wan_sweep.measure.host import resident_bytes

BytesOrUnknown = Callable[[], int | None]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Everything at one instant, in bytes. None: not read here, or not known.

    device_used_bytes counts all processes, process_used_bytes this one with its context and libraries.
    """

    memory: Memory
    device_used_bytes: int | None = None
    process_used_bytes: int | None = None
    host_rss_bytes: int | None = None
    host_pinned_bytes: int | None = None

    @property
    def outside_allocator_bytes(self) -> int | None:
        """What this process holds of the device besides torch's allocator: context, kernels, library buffers."""
        if self.process_used_bytes is None:
            return None
        return max(0, self.process_used_bytes - self.memory.reserved_bytes)


class Gauges:
    """Reads them.

    Args:
        runtime: whose counters.
        process_used: this process's bytes on the device; None where nobody tells.
    """

    def __init__(self, runtime: Runtime, process_used: BytesOrUnknown = lambda: None) -> None:
        self._runtime = runtime
        self._process_used = process_used

    def read(self, *, counters_only: bool = False) -> Reading:
        """Reads the counters, closes their interval, and reads the rest unless only they are asked for."""
        memory = self._runtime.memory()
        self._runtime.reset_memory_peaks()
        if counters_only:
            return Reading(memory=memory)
        return Reading(
            memory=memory,
            device_used_bytes=self._runtime.device_used_bytes(),
            process_used_bytes=self._process_used(),
            host_rss_bytes=resident_bytes(),
            host_pinned_bytes=self._runtime.host_buffer_bytes(),
        )
