"""Which address a request gets: best fit, growth, and what happens when the memory is used up."""

from bisect import bisect_left, insort

from wan_sweep.allocator.layout import Block, Layout, Segment
from wan_sweep.allocator.rules import (
    MAX_NON_SPLIT_ROUNDING_BYTES,
    SEGMENT_MULTIPLE_BYTES,
    SMALL_REQUEST_BYTES,
    Settings,
    page_bytes,
    round_up,
    segment_bytes,
)
from wan_sweep.units import GIB


class OutOfMemoryError(Exception):
    """The request fits neither into what is reserved nor into what may be reserved besides."""


class Allocator(Layout):
    """Chooses addresses as PyTorch does.

    Args:
        settings: Of the allocator.
        capacity_bytes: The most that may be reserved; None: whatever is asked for.
        device_bytes: The memory of the device, on which the ranges of expandable segments depend.
    """

    def __init__(self, settings: Settings, *, capacity_bytes: int | None = None, device_bytes: int = 80 * GIB) -> None:
        super().__init__(settings)
        self.num_retries = 0
        self._capacity_bytes = capacity_bytes
        self._device_bytes = device_bytes
        self._free: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        self._next_address = 1 << 40

    @property
    def is_limited(self) -> bool:
        """Whether there is a most that may be reserved."""
        return self._capacity_bytes is not None

    def malloc(self, requested_bytes: int, stream: int = 0) -> Block:
        """Serves a request of at least one byte (rules 1 to 8).

        Raises:
            OutOfMemoryError: it cannot be served, even after the cache was emptied.
        """
        rounded = self.settings.rounded(requested_bytes)
        is_small = rounded <= SMALL_REQUEST_BYTES
        address = self._best_fit(stream, rounded, is_small=is_small)
        if address is None:
            address = self._reserve(stream, rounded, is_small=is_small)
        if address is None and self._release_oversize(stream, rounded):
            address = self._reserve(stream, rounded, is_small=is_small)
        if address is None:
            self.num_retries += 1
            self.empty_cache()
            address = self._reserve(stream, rounded, is_small=is_small)
        if address is None:
            raise OutOfMemoryError(
                f"{requested_bytes} bytes were asked for with {self.allocated_bytes} allocated, {self.reserved_bytes} "
                f"reserved and a capacity of {self._capacity_bytes}"
            )
        return self.take(address, requested_bytes)

    def free(self, address: int) -> None:
        """Ends the use of a block that no other stream uses."""
        self.request_free(address)
        self.complete_free(address)

    def empty_cache(self) -> None:
        """Gives to the driver what can go back (rules 6 and 8)."""
        for block in [block for block in self.blocks() if block.state == "free"]:
            segment = block.segment
            if not segment.is_expandable:
                if block.num_bytes == segment.num_bytes:
                    self.unmap(block.address, block.num_bytes)
                continue
            page = page_bytes(is_small=segment.is_small)
            start = segment.address + round_up(block.address - segment.address, page)
            stop = segment.address + (block.end - segment.address) // page * page
            if start < stop:
                self.unmap(start, stop - start)

    def _best_fit(self, stream: int, rounded: int, *, is_small: bool) -> int | None:
        free = self._free.get((stream, is_small), [])
        index = bisect_left(free, (rounded, 0))
        if index == len(free):
            return None
        if self.settings.expandable_segments:
            while index + 1 < len(free) and self._reach(free[index + 1][1]) < self._reach(free[index][1]):
                index += 1
        num_bytes, address = free[index]
        if self.settings.is_oversize(rounded):
            return address if num_bytes < rounded + MAX_NON_SPLIT_ROUNDING_BYTES else None
        return None if self.settings.is_oversize(num_bytes) else address

    def _reach(self, address: int) -> int:
        """The size that the block at this address could grow to (rule 8)."""
        block = self._blocks[address]
        return block.num_bytes + self._hole_bytes(block.segment, block.end)

    def _hole_bytes(self, segment: Segment, address: int) -> int:
        """How far it is from here to the next block of an expandable segment, or to its end."""
        index = bisect_left(self._addresses, address)
        end = segment.address + self._range_bytes(is_small=segment.is_small)
        return (min(self._addresses[index], end) if index < len(self._addresses) else end) - address

    def _range_bytes(self, *, is_small: bool) -> int:
        return round_up(self._device_bytes * 9 // 8, page_bytes(is_small=is_small))

    def _may_reserve(self, num_bytes: int) -> bool:
        return self._capacity_bytes is None or self.reserved_bytes + num_bytes <= self._capacity_bytes

    def _reserve(self, stream: int, rounded: int, *, is_small: bool) -> int | None:
        """Gets memory from the driver; returns the address of a free block that is large enough, or None."""
        num_bytes = segment_bytes(rounded)
        if not self._may_reserve(num_bytes):
            return None
        if self.settings.expandable_segments:
            return self._grow(stream, rounded, is_small=is_small)
        address = self._next_address
        self._next_address += num_bytes + SEGMENT_MULTIPLE_BYTES
        self.map(address, num_bytes, stream, is_expandable=False)
        return address

    def _grow(self, stream: int, rounded: int, *, is_small: bool) -> int | None:
        """Rule 8: maps pages into the first place that has room, and returns its address."""
        segment = self._range(stream, is_small=is_small)
        address = self._room(segment, rounded)
        while address is not None:
            block = self._blocks.get(address)
            have = 0 if block is None else block.num_bytes
            if have >= rounded:
                break
            missing = min(rounded - have, self._hole_bytes(segment, address + have))
            num_bytes = round_up(missing, page_bytes(is_small=is_small))
            self.map(address + have, num_bytes, stream, is_expandable=True)
        return address

    def _range(self, stream: int, *, is_small: bool) -> Segment:
        segment = self._ranges.get((stream, is_small))
        if segment is None:
            segment = Segment(
                address=self._next_address, num_bytes=0, stream=stream, is_small=is_small, is_expandable=True
            )
            self._ranges[stream, is_small] = segment
            self._next_address += self._range_bytes(is_small=is_small) + SEGMENT_MULTIPLE_BYTES
        return segment

    def _room(self, segment: Segment, rounded: int) -> int | None:
        """The lowest address from which that many bytes are free or unmapped, not all of them mapped."""
        end = segment.address + self._range_bytes(is_small=segment.is_small)
        addresses = self._addresses[bisect_left(self._addresses, segment.address) : bisect_left(self._addresses, end)]
        start = position = segment.address
        has_hole = False
        for address in [*addresses, end]:
            has_hole = has_hole or address > position
            if has_hole and address - start >= rounded:
                return start
            if address < end:
                block = self._blocks[address]
                position = block.end
                if block.state != "free":
                    start, has_hole = position, False
        return None

    def _release_oversize(self, stream: int, rounded: int) -> bool:
        """Rule 7: gives back one free block that is large enough, or several that are together."""
        if self.settings.max_split_bytes is None or self.settings.expandable_segments:
            return False
        wanted = max(rounded, self.settings.max_split_bytes)
        free = self._free.get((stream, False), [])
        index = bisect_left(free, (wanted, 0))
        if index < len(free):
            chosen = [free[index]]
        else:
            chosen = []
            for entry in reversed(free):
                if sum(size for size, _ in chosen) >= wanted or not self.settings.is_oversize(entry[0]):
                    break
                chosen.append(entry)
        for num_bytes, address in chosen:
            self.unmap(address, num_bytes)
        return sum(size for size, _ in chosen) >= wanted

    def _add(self, block: Block) -> None:
        super()._add(block)
        if block.state == "free":
            pool = (block.segment.stream, block.segment.is_small)
            insort(self._free.setdefault(pool, []), (block.num_bytes, block.address))

    def _remove(self, block: Block) -> None:
        super()._remove(block)
        if block.state == "free":
            free = self._free[block.segment.stream, block.segment.is_small]
            del free[bisect_left(free, (block.num_bytes, block.address))]
