"""The place where a pipeline computes: streams, events, pinned memory, generators, and the allocator's counters.

Nothing else in wan21 calls `torch.cuda`. The pipeline asks the runtime; the measurer reads its counters. A CPU and a
CUDA runtime exist; both give the same names the same meaning:

- allocated: bytes that torch's allocator for the device has handed out and not taken back;
- requested: the same without the allocator's rounding;
- reserved: what the allocator holds from the driver (on a CPU it holds nothing back: reserved equals allocated);
- host buffers: memory that stages weights on the host, pinned on CUDA. On a CPU it is anonymous memory outside torch's
  allocator, so that the two pools can be told apart there too.
"""

import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import RecordScope

from wan21.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The device allocator's counters in bytes, now and at their peak since `Runtime.reset_memory_peaks`."""

    requested_bytes: int
    requested_peak_bytes: int
    allocated_bytes: int
    allocated_peak_bytes: int
    active_bytes: int
    active_peak_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int
    inactive_split_bytes: int
    num_alloc_retries: int
    num_ooms: int


class Runtime(ABC):
    """What differs between a CPU and a GPU."""

    device: torch.device
    is_asynchronous: bool
    """Whether the device works on while the host goes ahead."""

    @abstractmethod
    def generator(self, seed: int) -> torch.Generator:
        """A random generator on the device. CPU and CUDA generators draw different numbers from one seed."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Gives memory that the allocator holds and no tensor uses back to the driver."""

    @abstractmethod
    def memory(self) -> Memory:
        """The allocator's counters. Reading them does not move the peaks."""

    @abstractmethod
    def reset_memory_peaks(self) -> None:
        """Lets the peaks start again from the present values."""

    @abstractmethod
    def device_used_bytes(self) -> int:
        """Bytes in use on the whole device by every process and library; on a CPU, this process's resident bytes."""

    @abstractmethod
    def device_total_bytes(self) -> int:
        """Bytes that the device has."""

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor of host memory from which copies to the device can run beside other work."""

    @abstractmethod
    def host_buffer_bytes(self) -> int:
        """Host memory that live host buffers take, with the allocator's rounding."""

    @abstractmethod
    def side_stream(self) -> "Stream":
        """A stream for copies beside the computation."""


class Stream(ABC):
    """Work in order, beside the current stream. On a CPU everything happens at once and in order anyway."""

    @abstractmethod
    def context(self) -> AbstractContextManager[object]:
        """What is asked for inside runs on this stream."""

    @abstractmethod
    def mark(self) -> "Mark":
        """The point that this stream has reached."""

    @abstractmethod
    def mark_current(self) -> "Mark":
        """The point that the current (computing) stream has reached."""

    @abstractmethod
    def wait(self, mark: "Mark") -> None:
        """What this stream does next waits until the mark has passed."""


class Mark(ABC):
    """A point in a stream."""

    @abstractmethod
    def hold_current(self) -> None:
        """What the current (computing) stream does next waits until this mark has passed."""


class _HostPages:
    """Anonymous memory outside torch's allocators; counts the pages of the buffers that are alive."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def allocate(self, num_bytes: int, pin: Callable[[torch.Tensor], Callable[[], None]] | None = None) -> torch.Tensor:
        pages = mmap.mmap(-1, -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        unpin = pin(buffer) if pin is not None else None
        self.num_bytes += len(pages)
        weakref.finalize(buffer.untyped_storage(), self._release, len(pages), unpin)
        return buffer[:num_bytes]

    def _release(self, num_bytes: int, unpin: Callable[[], None] | None) -> None:
        self.num_bytes -= num_bytes
        if unpin is not None:
            unpin()


def _pin(buffer: torch.Tensor) -> Callable[[], None]:
    """Page-locks host memory; what is returned takes that back."""
    cudart = torch.cuda.cudart()
    address = buffer.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, buffer.numel(), 0))
    return lambda: torch.cuda.check_error(cudart.cudaHostUnregister(address))


class _CudaMark(Mark):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def hold_current(self) -> None:
        torch.cuda.current_stream(None).wait_event(self.event)


class _CudaStream(Stream):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def context(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        return _CudaMark(self._stream.record_event())

    def mark_current(self) -> Mark:
        return _CudaMark(torch.cuda.current_stream(self._device).record_event())

    def wait(self, mark: Mark) -> None:
        if not isinstance(mark, _CudaMark):
            raise TypeError(f"mark={mark!r} was not made by a CUDA stream")
        self._stream.wait_event(mark.event)


class CudaRuntime(Runtime):
    """One CUDA device.

    Args:
        index: which of the visible devices.
        memory_limit_bytes: torch's allocator may take no more than this from the driver; None: all there is.

    Raises:
        UsageError: no such device is visible.
    """

    is_asynchronous = True

    def __init__(self, index: int = 0, *, memory_limit_bytes: int | None = None) -> None:
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"device=cuda:{index} does not exist: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
                "devices; choose device=cpu, or check the driver and CUDA_VISIBLE_DEVICES"
            )
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.cuda.init()
        if memory_limit_bytes is not None:
            share = min(1.0, memory_limit_bytes / self.device_total_bytes())
            torch.cuda.set_per_process_memory_fraction(share, self.device)
        self._host = _HostPages()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> Memory:
        # The nested form costs a tenth of torch.cuda.memory_stats, which flattens and sorts it.
        stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self.device)

        def value(name: str, which: str) -> int:
            return int(stats[name]["all"][which]) if name in stats else 0

        return Memory(
            requested_bytes=value("requested_bytes", "current"),
            requested_peak_bytes=value("requested_bytes", "peak"),
            allocated_bytes=value("allocated_bytes", "current"),
            allocated_peak_bytes=value("allocated_bytes", "peak"),
            active_bytes=value("active_bytes", "current"),
            active_peak_bytes=value("active_bytes", "peak"),
            reserved_bytes=value("reserved_bytes", "current"),
            reserved_peak_bytes=value("reserved_bytes", "peak"),
            inactive_split_bytes=value("inactive_split_bytes", "current"),
            num_alloc_retries=int(stats.get("num_alloc_retries", 0)),
            num_ooms=int(stats.get("num_ooms", 0)),
        )

    def reset_memory_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def device_used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def device_total_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        # Registered pages rather than torch's pinned allocator, which rounds up to a power of two: the 703 MB of a
        # 14B block would take 1 GiB of host memory.
        return self._host.allocate(num_bytes, pin=_pin)

    def host_buffer_bytes(self) -> int:
        return self._host.num_bytes

    def side_stream(self) -> Stream:
        return _CudaStream(self.device)


class _CpuMark(Mark):
    def hold_current(self) -> None:
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
        self._host = _HostPages()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts allocations inside."""
        self._counter.start()
        try:
            yield
        finally:
            self._counter.stop()

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
