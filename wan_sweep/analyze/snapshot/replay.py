"""Replays the history of a snapshot through the layout of the allocator, which gives the peaks to the byte."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_sweep.allocator import Block, Layout, LayoutError
from wan_sweep.analyze.snapshot.contents import DeviceSnapshot, FinalBlock, device_snapshots
from wan_sweep.analyze.snapshot.standing import Standing, lay_out, walk_back

BEFORE_THE_HISTORY = -1
_MEMORY = ("requested", "allocated", "active", "reserved", "inactive_split")
_SILENT = {"snapshot", "oom"}


class ReplayError(Exception):
    """The history does not fit the state it leads to, so it says nothing about peaks."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The allocator's counters at one moment."""

    requested_bytes: int
    allocated_bytes: int
    active_bytes: int
    reserved_bytes: int
    inactive_split_bytes: int


@dataclass(kw_only=True, slots=True)
class Allocation:
    """One block handed out.

    Attributes:
        born: Number of the entry; BEFORE_THE_HISTORY for one that stood.
        freed: Number of the entry that ended its use; None where it is in use at the end.
        final: For one that stood and is there at the end: what the snapshot says of it.
    """

    address: int
    num_bytes: int
    requested_bytes: int
    born: int
    freed: int | None = None
    final: FinalBlock | None = None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A history and what it did to the memory.

    Attributes:
        peaks: The highest value of each counter.
        peak_index: The entry after which allocated was highest first.
        at_peak: All counters then.
        start: The counters at the beginning.
        at_oom: The entries that report an OOM, and the counters then.
        allocated: Bytes allocated after each entry.
        reserved: Bytes reserved after each entry.
        doubtful_bytes: By how much allocated may be higher than said, because of blocks that stood at the beginning.
        num_differences: Blocks at the end that are not as the snapshot says; 0 shows that the replay is exact.
    """

    snapshot: DeviceSnapshot
    peaks: Counters
    peak_index: int
    at_peak: Counters
    start: Counters
    at_oom: Sequence[tuple[int, Counters]]
    allocated: "array[int]"
    reserved: "array[int]"
    allocations: Sequence[Allocation]
    doubtful_bytes: int
    num_differences: int

    def live_at(self, index: int) -> list[Allocation]:
        """The blocks in use after an entry, the largest first."""
        alive = [one for one in self.allocations if one.born <= index and (one.freed is None or one.freed > index)]
        return sorted(alive, key=lambda one: -one.num_bytes)


def replay_peaks(snapshot: Mapping[str, Any], device: int | None = None) -> dict[str, int]:
    """The peaks, in bytes, that the history of a snapshot leads to: requested, allocated, active and reserved.

    Args:
        snapshot: What torch.cuda.memory._snapshot() returned.
        device: Its index; by default the one with the longest history.

    Raises:
        UnreadableFileError: it is no snapshot.
        ReplayError: it has no such device, or its history does not fit.
    """
    found = [one for one in device_snapshots(snapshot, "the snapshot") if device in {None, one.device}]
    if not found:
        raise ReplayError(f"device={device} has neither segments nor a history in this snapshot")
    peaks = replay(max(found, key=lambda one: len(one.entries))).peaks
    return {
        "requested": peaks.requested_bytes,
        "allocated": peaks.allocated_bytes,
        "active": peaks.active_bytes,
        "reserved": peaks.reserved_bytes,
    }


def replay(snapshot: DeviceSnapshot) -> Replay:
    """Replays one device's history.

    Raises:
        ReplayError: an entry does not fit.
    """
    standing = walk_back(snapshot)
    learned: dict[int, int] = {}
    while True:
        run = _Run(snapshot, standing, learned)
        size = run.carry_out()
        if size is None:
            return run.result()
        # A block that stood turned out to be larger than thought, so what came before counts differently, too.
        learned |= size


class _Run:
    def __init__(self, snapshot: DeviceSnapshot, standing: Standing, learned: Mapping[int, int]) -> None:
        self._snapshot = snapshot
        self._layout, self._doubts = lay_out(standing, snapshot.settings, learned)
        self._doubtful_bytes = sum(self._doubts.values())
        self._in_use: dict[int, Allocation] = {}
        self._allocations: list[Allocation] = []
        for block in self._layout.blocks():
            if block.state != "free":
                one = self._hand_out(block, BEFORE_THE_HISTORY)
                one.final = standing.blocks[block.address].final
                if block.state == "awaiting_free":
                    one.freed = BEFORE_THE_HISTORY
                    del self._in_use[block.address]
        self._start = self._at_peak = _read(self._layout)
        self._peaks = [getattr(self._layout, f"{name}_bytes") for name in _MEMORY]
        self._peak_index = BEFORE_THE_HISTORY
        self._at_oom: list[tuple[int, Counters]] = []
        self._allocated = array("q")
        self._reserved = array("q")

    def carry_out(self) -> dict[int, int] | None:
        """Goes through the history; stops with a block's address and size where it turns out to be larger."""
        layout = self._layout
        for index, entry in enumerate(self._snapshot.entries):
            try:
                self._apply(index, entry)
            except LayoutError as error:
                learned = self._learn(entry)
                if learned is None:
                    raise ReplayError(
                        f"entry {index:,} of the history ({entry['action']}) does not fit the state before it: {error}"
                    ) from error
                return learned
            if layout.allocated_bytes > self._peaks[1]:
                self._peak_index, self._at_peak = index, _read(layout)
            self._peaks = [
                max(peak, getattr(layout, f"{name}_bytes")) for peak, name in zip(self._peaks, _MEMORY, strict=True)
            ]
            self._allocated.append(layout.allocated_bytes)
            self._reserved.append(layout.reserved_bytes)
        return None

    def _apply(self, index: int, entry: Mapping[str, Any]) -> None:
        layout, action = self._layout, entry["action"]
        if action == "alloc":
            self._hand_out(layout.take(entry["addr"], entry["size"]), index)
        elif action == "free_requested":
            layout.request_free(entry["addr"])
            self._in_use.pop(entry["addr"]).freed = index
        elif action == "free_completed":
            layout.complete_free(entry["addr"])
        elif action in {"segment_alloc", "segment_map"}:
            is_expandable = action == "segment_map"
            layout.map(entry["addr"], entry["size"], entry.get("stream", 0), is_expandable=is_expandable)
        elif action in {"segment_free", "segment_unmap"}:
            layout.unmap(entry["addr"], entry["size"])
        elif action == "oom":
            self._at_oom.append((index, _read(layout)))

    def _hand_out(self, block: Block, born: int) -> Allocation:
        one = Allocation(
            address=block.address, num_bytes=block.num_bytes, requested_bytes=block.requested_bytes, born=born
        )
        self._in_use[block.address] = one
        self._allocations.append(one)
        return one

    def _learn(self, entry: Mapping[str, Any]) -> dict[int, int] | None:
        """An allocation from the middle of a free block tells where a block that stood before it really ends."""
        block = self._layout.block_at(entry["addr"]) if entry["action"] == "alloc" else None
        before = self._layout.block_at(block.address - 1) if block is not None and block.state == "free" else None
        if before is None or before.address not in self._doubts or before.state == "free":
            return None
        return {before.address: entry["addr"] - before.address}

    def result(self) -> Replay:
        """What was found, after all entries."""
        said = {(block.address, block.num_bytes) for segment in self._snapshot.segments for block in segment.blocks}
        found = {(block.address, block.num_bytes) for block in self._layout.blocks() if block.state != "free"}
        return Replay(
            snapshot=self._snapshot,
            peaks=Counters(**{f"{name}_bytes": peak for name, peak in zip(_MEMORY, self._peaks, strict=True)}),
            peak_index=self._peak_index,
            at_peak=self._at_peak,
            start=self._start,
            at_oom=self._at_oom,
            allocated=self._allocated,
            reserved=self._reserved,
            allocations=self._allocations,
            doubtful_bytes=self._doubtful_bytes,
            num_differences=len(said ^ found),
        )


def _read(layout: Layout) -> Counters:
    return Counters(**{f"{name}_bytes": getattr(layout, f"{name}_bytes") for name in _MEMORY})
