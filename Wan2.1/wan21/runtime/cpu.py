"""The CPU, seen as a device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._C._profiler import RecordScope

from wan21.runtime.base import Mark, Memory, Runtime, Stream
from wan21.runtime.host import HostPages


class _CpuMark(Mark):
    def hold_current(self) -> None:
        """Nothing to wait for."""

    def wait(self) -> None:
        """Nothing to wait for."""


class _CpuStream(Stream):
    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Mark:
        return _CpuMark()

    def mark_current(self) -> Mark:
        return _CpuMark()

    def wait(self, mark: Mark) -> None:
        """Nothing to wait for."""


_profiler: Any = torch.autograd  # its part of the profiler is there in all versions, and missing from the stubs


class _AllocationCounter:
    """Counts what torch's CPU allocator hands out, exactly, from the profiler's allocation events.

    The profiler runs between two readings and keeps its events until the next one, so a reading costs time in
    proportion to the allocations since the last (some 4 us each); the measurer takes that out of its times. The
    profiler's core is driven directly: its public face turns every event into a Python object, which takes 50 times as
    long, and cannot leave operations out. A dispatch mode would be simpler still and is not used: it changes what
    operations do (docs/memory.md).
    """

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._is_on = False

    def start(self) -> None:
        config = torch.autograd.profiler.profile(profile_memory=True).config()
        activities = {torch.profiler.ProfilerActivity.CPU}
        _profiler._prepare_profiler(config, activities)  # noqa: SLF001
        _profiler._enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # noqa: SLF001
        self._is_on = True

    def read(self) -> None:
        """Counts all events since the last reading."""
        if self._is_on:
            self.stop()
            self.start()

    def stop(self) -> None:
        """Ends the counting."""
        if not self._is_on:
            return
        self._is_on = False
        events = _profiler._disable_profiler().events()  # noqa: SLF001
        memory_events = [event for event in events if event.name() == "[memory]"]
        memory_events.sort(key=lambda event: event.start_ns())  # stable: events of one instant stay in their order
        for event in memory_events:
            num_bytes = event.nbytes()
            self.current += num_bytes
            self.peak = max(self.peak, self.current)


class CpuRuntime(Runtime):
    """The CPU, seen as a device.

    Counting begins with `counting()`; outside of it the counters stand still, so that a plain run pays nothing.
    """

    is_asynchronous = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._counter = _AllocationCounter()
        self._host = HostPages()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts allocations inside."""
        self._counter.start()
        try:
            yield
        finally:
            self._counter.stop()

    def facts(self) -> dict[str, str]:
        return {"device": "cpu", "num_threads": str(torch.get_num_threads())}

    def warm_up(self) -> None:
        """Nothing starts late on a CPU that would count."""

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        """The CPU has always done what was asked."""

    def empty_cache(self) -> None:
        """Torch's CPU allocator keeps nothing."""

    def memory(self) -> Memory:
        self._counter.read()
        now, peak = self._counter.current, self._counter.peak
        return Memory(
            requested_bytes=now,
            requested_peak_bytes=peak,
            allocated_bytes=now,
            allocated_peak_bytes=peak,
            active_bytes=now,
            active_peak_bytes=peak,
            reserved_bytes=now,
            reserved_peak_bytes=peak,
            inactive_split_bytes=0,
            num_alloc_retries=0,
            num_ooms=0,
        )

    def reset_memory_peaks(self) -> None:
        self._counter.peak = self._counter.current

    def device_used_bytes(self) -> int:
        import psutil

        return int(psutil.Process().memory_info().rss)

    def device_total_bytes(self) -> int:
        import psutil

        return int(psutil.virtual_memory().total)

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return self._host.allocate(num_bytes)

    def host_buffer_bytes(self) -> int:
        return self._host.num_bytes

    def side_stream(self) -> Stream:
        return _CpuStream()
