"""How much memory was in use when, and by what, from the allocation events of a trace."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from wan_sweep.analyze.chrome.collect import UNKNOWN
from wan_sweep.analyze.chrome.forest import Bools, Floats, Indices, Ints
from wan_sweep.analyze.chrome.trace import MemoryEvents, Parts, Windows


class DeviceMemory:
    """The memory of one device.

    A trace may hold several recordings; what happened in the pauses between them is not known. So a free ends only an
    allocation of the same recording.

    Attributes:
        is_counter: Whether the level is the allocator's own count. The CPU's field of that name drifts, so there, and
            where a trace has none, the level is the sum of the allocations since the recording began.
        level: Bytes allocated after each event.
    """

    def __init__(self, events: MemoryEvents, parts: Parts) -> None:
        self.events = events
        self.device = events.device
        self.is_allocation: Bools = events.num_bytes > 0
        self.is_counter = events.device != "cpu" and bool((events.total_allocated != UNKNOWN).all())
        self._part = parts.number(events.time)
        self.level: Ints = events.total_allocated if self.is_counter else self._summed()

    def _summed(self) -> Ints:
        level = np.cumsum(self.events.num_bytes)
        firsts = np.searchsorted(self._part, self._part, side="left")
        return level - (level - self.events.num_bytes)[firsts]

    @cached_property
    def peak_index(self) -> int:
        """The event at which the level is highest."""
        return int(np.argmax(self.level))

    @property
    def peak_bytes(self) -> int:
        """The highest level; where it is a sum, above what stood at the beginning."""
        return int(self.level[self.peak_index])

    @property
    def peak_time(self) -> float:
        """When it was reached first."""
        return float(self.events.time[self.peak_index])

    @property
    def reserved_at_peak(self) -> int | None:
        """What the allocator held then; None where the trace does not say."""
        reserved = int(self.events.total_reserved[self.peak_index])
        return reserved if reserved > 0 else None

    @property
    def reserved_peak(self) -> int | None:
        """The most that the allocator held; None where the trace does not say."""
        reserved = int(self.events.total_reserved.max())
        return reserved if reserved > 0 else None

    @property
    def standing_bytes(self) -> int | None:
        """What stood when the recording began; None where the level is a sum, which does not know."""
        return int(self.level[0] - self.events.num_bytes[0]) if self.is_counter else None

    @cached_property
    def _freed_by(self) -> Ints:
        """For each allocation the index of the event that freed it; the number of events where none did."""
        freed_by = np.full(len(self.events), len(self.events), dtype=np.int64)
        open_at: dict[int, int] = {}
        part = None
        columns = zip(self.events.address.data, self.events.num_bytes.data, self._part.data, strict=True)
        for index, (address, num_bytes, number) in enumerate(columns):
            if number != part:
                part = number
                open_at.clear()
            born = open_at.pop(address, None)
            if born is not None:
                freed_by[born] = index
            if num_bytes > 0:
                open_at[address] = index
        return freed_by

    @property
    def lifetime(self) -> Floats:
        """Seconds that each allocation lived; infinite where no free was recorded."""
        times = np.append(self.events.time, np.inf)
        return (times[self._freed_by] - self.events.time)[self.is_allocation]

    @cached_property
    def live_at_peak(self) -> Indices:
        """The allocations that were alive at the peak, of those in the same recording."""
        peak = self.peak_index
        is_here = self.is_allocation & (self._part == self._part[peak]) & (self._freed_by > peak)
        return np.flatnonzero(is_here[: peak + 1])

    def within(self, windows: Windows) -> list[tuple[int, int, int]]:
        """For each range: the highest level in it, the number of its allocations, and their bytes."""
        first = np.searchsorted(self.events.time, windows.start, side="left")
        last = np.searchsorted(self.events.time, windows.end, side="right")
        found = []
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            before = int(
                self.level[start] - self.events.num_bytes[start] if start < len(self.level) else self.level[-1]
            )
            born = self.events.num_bytes[start:stop][self.is_allocation[start:stop]]
            found.append((int(self.level[start:stop].max(initial=before)), len(born), int(born.sum())))
        return found


def main_memory(found: Sequence[DeviceMemory]) -> DeviceMemory | None:
    """The device that most is about: an accelerator if there is one, of several the one with the most events."""
    return max(found, key=lambda memory: (memory.device != "cpu", len(memory.events)), default=None)
