"""Segments cut into blocks, driven by addresses: what a recording says happened, or what `Allocator` chose."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from wan_sweep.allocator.rules import SMALL_SEGMENT_BYTES, Settings

State = Literal["free", "allocated", "awaiting_free"]


@dataclass(eq=False, kw_only=True, slots=True)
class Segment:
    """Memory from the driver, or a range of addresses into which it is mapped."""

    address: int
    num_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool
    active_bytes: int = 0

    @property
    def split_bytes(self) -> int:
        """Rule 10: what is free but cannot go back to the driver."""
        return self.num_bytes - self.active_bytes if self.active_bytes and not self.is_expandable else 0


@dataclass(eq=False, kw_only=True, slots=True)
class Block:
    """A piece of a segment."""

    address: int
    num_bytes: int
    segment: Segment
    state: State = "free"
    requested_bytes: int = 0

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.num_bytes


class LayoutError(ValueError):
    """An operation does not fit the layout: what it names is not there, or not free."""


class Layout:
    """Segments, their blocks, and the counters, all in bytes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self.active_bytes = 0
        self.reserved_bytes = 0
        self.inactive_split_bytes = 0
        self._ranges: dict[tuple[int, bool], Segment] = {}
        self._blocks: dict[int, Block] = {}
        self._addresses: list[int] = []

    def blocks(self) -> Iterator[Block]:
        """All blocks by address."""
        return (self._blocks[address] for address in self._addresses)

    def block(self, address: int, state: State) -> Block:
        """The block that begins at this address.

        Raises:
            LayoutError: there is none, or it is in another state.
        """
        block = self._blocks.get(address)
        if block is None or block.state != state:
            raise LayoutError(f"no {state} block begins at address {address:#x}")
        return block

    def block_at(self, address: int) -> Block | None:
        """The block that holds this address, if any does."""
        block = self._at_or_before(address)
        return block if block is not None and address < block.end else None

    def map(self, address: int, num_bytes: int, stream: int, *, is_expandable: bool) -> Block:
        """Adds memory from the driver; returns the free block that it is part of.

        Raises:
            LayoutError: there is memory already.
        """
        before = self._at_or_before(address + num_bytes - 1)
        if before is not None and before.end > address:
            raise LayoutError(f"there is memory at address {before.address:#x} already")
        is_small = num_bytes == SMALL_SEGMENT_BYTES  # no segment and no page of a large pool is that small
        segment = self._ranges.get((stream, is_small)) if is_expandable else None
        if segment is None:
            segment = Segment(
                address=address, num_bytes=0, stream=stream, is_small=is_small, is_expandable=is_expandable
            )
            if is_expandable:
                self._ranges[stream, is_small] = segment
        segment.num_bytes += num_bytes
        self.reserved_bytes += num_bytes
        block = Block(address=address, num_bytes=num_bytes, segment=segment)
        self._add(block)
        return self._merge(block)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Gives memory back to the driver.

        Raises:
            LayoutError: it is not free, or not there.
        """
        block = self.block_at(address)
        if block is None or block.state != "free" or block.end < address + num_bytes:
            raise LayoutError(f"the {num_bytes} bytes at address {address:#x} are not free")
        self._remove(block)
        segment, end = block.segment, address + num_bytes
        for start, stop in ((block.address, address), (end, block.end)):
            if start < stop:
                self._add(Block(address=start, num_bytes=stop - start, segment=segment))
        segment.num_bytes -= num_bytes
        self.reserved_bytes -= num_bytes

    def take(self, address: int, requested_bytes: int, *, num_bytes: int | None = None) -> Block:
        """Hands out the free block at this address, or its front.

        Args:
            address: Where it begins.
            requested_bytes: What was asked for.
            num_bytes: The size of the block, where it is known; by default rule 4 says it.

        Raises:
            LayoutError: no free block begins there, or it is too small.
        """
        block = self.block(address, "free")
        if num_bytes is None:
            num_bytes = self.settings.rounded(requested_bytes)
            if not self.settings.splits(block.num_bytes, num_bytes):
                num_bytes = max(num_bytes, block.num_bytes)
        if block.num_bytes < num_bytes:
            raise LayoutError(f"the free block at address {address:#x} has {block.num_bytes} bytes, not {num_bytes}")
        self._remove(block)
        if block.num_bytes > num_bytes:
            rest = Block(address=address + num_bytes, num_bytes=block.num_bytes - num_bytes, segment=block.segment)
            block.num_bytes = num_bytes
            self._add(rest)
        block.state, block.requested_bytes = "allocated", requested_bytes
        self._add(block)
        self.requested_bytes += requested_bytes
        self.allocated_bytes += block.num_bytes
        self._activate(block.segment, block.num_bytes)
        return block

    def request_free(self, address: int) -> Block:
        """Ends the use of a block, which stays active until the free is completed (rule 9)."""
        block = self.block(address, "allocated")
        block.state = "awaiting_free"
        self.allocated_bytes -= block.num_bytes
        return block

    def complete_free(self, address: int) -> Block:
        """Makes a block free after its free was requested; returns the free block that it is part of now."""
        block = self.block(address, "awaiting_free")
        self._remove(block)
        self.requested_bytes -= block.requested_bytes
        self._activate(block.segment, -block.num_bytes)
        block.state, block.requested_bytes = "free", 0
        self._add(block)
        return self._merge(block)

    def _activate(self, segment: Segment, num_bytes: int) -> None:
        self.inactive_split_bytes -= segment.split_bytes
        segment.active_bytes += num_bytes
        self.active_bytes += num_bytes
        self.inactive_split_bytes += segment.split_bytes

    def _at_or_before(self, address: int) -> Block | None:
        index = bisect_right(self._addresses, address) - 1
        return self._blocks[self._addresses[index]] if index >= 0 else None

    def _add(self, block: Block) -> None:
        self._blocks[block.address] = block
        insort(self._addresses, block.address)

    def _remove(self, block: Block) -> None:
        del self._blocks[block.address]
        del self._addresses[bisect_left(self._addresses, block.address)]

    def _merge(self, block: Block) -> Block:
        """Rule 6."""
        before, after = self._at_or_before(block.address - 1), self._blocks.get(block.end)
        for neighbour in (before, after):
            if (
                neighbour is not None
                and neighbour.state == "free"
                and neighbour.segment is block.segment
                and (neighbour.end == block.address or block.end == neighbour.address)
            ):
                self._remove(block)
                self._remove(neighbour)
                block.address = min(block.address, neighbour.address)
                block.num_bytes += neighbour.num_bytes
                self._add(block)
        return block
