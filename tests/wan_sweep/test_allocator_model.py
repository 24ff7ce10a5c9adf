import random
from collections import defaultdict
from itertools import pairwise

import pytest

from wan_sweep.allocator import Allocator, Layout, LayoutError, OutOfMemoryError, Settings
from wan_sweep.units import GIB, KIB, MIB

EXPANDABLE = Settings(expandable_segments=True)


def counters(layout: Layout) -> tuple[int, int, int, int]:
    return layout.requested_bytes, layout.allocated_bytes, layout.reserved_bytes, layout.inactive_split_bytes


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # rounded up to 512; the small pool's segment
        (MIB, MIB, 2 * MIB),  # the largest of the small pool
        (MIB + 1, MIB + 512, 20 * MIB),  # the smallest of the large pool
        (8_519_680, 8_519_680, 20 * MIB),  # the cuBLAS workspace of cards before Hopper
        (10 * MIB, 10 * MIB, 10 * MIB),  # from here on a segment of its own
        (10 * MIB + 512, 10 * MIB + 512, 12 * MIB),  # 1.5 MiB remain, which is more than 1 MiB: split
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # less than 1 MiB would remain: the tail counts as allocated
    ],
)
def test_a_request_is_rounded_and_gets_a_segment_by_its_size(requested: int, allocated: int, reserved: int) -> None:
    allocator = Allocator(Settings())
    allocator.malloc(requested)
    assert (requested, allocated, reserved) == counters(allocator)[:3]


@pytest.mark.parametrize(
    ("requested", "rounded"),
    [
        (4 * KIB, 4 * KIB),  # a power of two stays
        (1000, 1024),  # no more than 512 bytes times the divisions: by 512 as ever
        (5 * KIB + 1, 6 * KIB),  # 4 KiB in 4 parts of 1 KiB
        (MIB + 1, 5 * MIB // 4),
        (2 * MIB + 1, 3 * MIB),  # from 2 MiB on the second interval: 2 parts
        (700 * MIB, 768 * MIB),  # the last interval holds for all larger ones
    ],
)
def test_divisions_round_to_a_fraction_of_a_power_of_two(requested: int, rounded: int) -> None:
    assert rounded == Settings(roundup_divisions=(4, 2, 2)).rounded(requested)


def test_the_smallest_free_block_that_fits_is_taken_and_the_lowest_of_equal_ones() -> None:
    allocator = Allocator(Settings())
    blocks = [allocator.malloc(size * MIB) for size in (40, 20, 30, 20)]
    for block in (blocks[0], blocks[2], blocks[3], blocks[1]):
        allocator.free(block.address)
    assert blocks[1].address == allocator.malloc(19 * MIB + 512 * KIB).address
    assert blocks[3].address == allocator.malloc(20 * MIB).address
    assert blocks[2].address == allocator.malloc(20 * MIB).address


def test_streams_do_not_share_their_blocks() -> None:
    allocator = Allocator(Settings())
    block = allocator.malloc(16 * MIB, stream=1)
    allocator.free(block.address)
    assert block.address != allocator.malloc(16 * MIB, stream=2).address
    assert allocator.reserved_bytes == 32 * MIB


def test_a_freed_block_merges_with_the_free_ones_beside_it_in_its_segment() -> None:
    allocator = Allocator(Settings())
    first, second, third = (allocator.malloc(2 * MIB) for _ in range(3))  # of one segment of 20 MiB
    allocator.free(first.address)
    assert allocator.inactive_split_bytes == 16 * MIB  # 2 in front and 14 behind
    allocator.free(third.address)
    allocator.free(second.address)
    assert allocator.inactive_split_bytes == 0  # the segment is free as a whole, and could go back
    assert [block.num_bytes for block in allocator.blocks()] == [20 * MIB]


def test_emptying_the_cache_gives_back_whole_segments_only() -> None:
    allocator = Allocator(Settings())
    kept, freed, small = allocator.malloc(2 * MIB), allocator.malloc(16 * MIB), allocator.malloc(1)
    allocator.free(freed.address)
    allocator.free(small.address)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept.address)
    allocator.empty_cache()
    assert counters(allocator) == (0, 0, 0, 0)


def test_a_block_that_another_stream_still_uses_is_active_and_not_free() -> None:
    allocator = Allocator(Settings())
    block = allocator.malloc(1000)
    allocator.request_free(block.address)
    assert (allocator.requested_bytes, allocator.allocated_bytes, allocator.active_bytes) == (1000, 0, 1024)
    assert block.address != allocator.malloc(1000).address
    allocator.complete_free(block.address)
    assert block.address == allocator.malloc(1000).address


def test_a_full_capacity_empties_the_cache_once_and_then_fails() -> None:
    allocator = Allocator(Settings(), capacity_bytes=64 * MIB)
    freed = allocator.malloc(32 * MIB)
    allocator.malloc(20 * MIB)
    allocator.free(freed.address)
    allocator.malloc(40 * MIB)  # only once the 32 MiB have gone back
    assert (allocator.num_retries, allocator.reserved_bytes) == (1, 60 * MIB)
    with pytest.raises(OutOfMemoryError, match="16777216 bytes were asked for with 62914560 allocated"):
        allocator.malloc(16 * MIB)
    assert allocator.num_retries == 2


def test_blocks_from_max_split_size_on_serve_no_smaller_request() -> None:
    allocator = Allocator(Settings(max_split_bytes=64 * MIB))
    block = allocator.malloc(82 * MIB)
    allocator.free(block.address)
    assert allocator.malloc(32 * MIB).address != block.address
    whole = allocator.malloc(64 * MIB)  # less than 20 MiB larger, and kept whole
    assert (whole.address, whole.num_bytes) == (block.address, 82 * MIB)


def test_a_request_from_max_split_size_on_refuses_a_much_larger_block() -> None:
    allocator = Allocator(Settings(max_split_bytes=64 * MIB))
    block = allocator.malloc(84 * MIB)  # 20 MiB larger than what follows
    allocator.free(block.address)
    assert allocator.malloc(64 * MIB).address != block.address


def test_with_max_split_size_just_enough_large_blocks_go_back_when_memory_is_short() -> None:
    allocator = Allocator(Settings(max_split_bytes=64 * MIB), capacity_bytes=300 * MIB)
    sizes = (64, 84, 130)
    for block in [allocator.malloc(size * MIB) for size in sizes]:
        allocator.free(block.address)
    allocator.malloc(110 * MIB)  # 130 is 20 MiB larger; giving that one back suffices
    assert allocator.reserved_bytes == (64 + 84 + 110) * MIB
    assert allocator.num_retries == 0


def test_an_expandable_range_grows_by_pages_behind_its_free_end() -> None:
    allocator = Allocator(EXPANDABLE, device_bytes=GIB)
    first = allocator.malloc(15 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    second = allocator.malloc(30 * MIB)  # begins in the 5 MiB that are left, so 25 MiB more are needed: 2 pages
    assert (first.end, 60 * MIB) == (second.address, allocator.reserved_bytes)
    allocator.malloc(1)  # the small pool is another range, of pages of 2 MiB
    assert allocator.reserved_bytes == 62 * MIB


def test_emptying_the_cache_unmaps_whole_free_pages_and_growing_fills_the_lowest_hole() -> None:
    allocator = Allocator(EXPANDABLE, device_bytes=GIB)
    first, second, third = (allocator.malloc(size * MIB) for size in (50, 40, 10))  # 100 MiB, 5 pages
    allocator.free(first.address)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 60 * MIB  # the pages 0 and 1 were free as a whole, page 2 only in part
    again = allocator.malloc(30 * MIB)
    assert first.address == again.address  # 40 MiB are mapped in front of the 10 that had stayed
    assert allocator.reserved_bytes == 100 * MIB
    assert second.end == third.address


def test_a_replayed_layout_refuses_what_does_not_fit() -> None:
    layout = Layout(Settings())
    layout.map(0, 2 * MIB, 0, is_expandable=False)
    layout.take(0, 512)
    with pytest.raises(LayoutError, match="no free block begins at address 0x0"):
        layout.take(0, 512)
    with pytest.raises(LayoutError, match="there is memory"):
        layout.map(MIB, 2 * MIB, 0, is_expandable=False)
    with pytest.raises(LayoutError, match="are not free"):
        layout.unmap(0, 2 * MIB)
    with pytest.raises(LayoutError, match="no awaiting_free block"):
        layout.complete_free(0)
    with pytest.raises(LayoutError, match="has 2096640 bytes, not 4194304"):
        layout.take(512, 4 * MIB)


SETTINGS = (
    Settings(),
    EXPANDABLE,
    Settings(max_split_bytes=32 * MIB),
    Settings(roundup_divisions=(8,)),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "expandable", "max_split", "roundup"])
@pytest.mark.parametrize("seed", range(3))
def test_counters_and_blocks_agree_through_random_work(settings: Settings, seed: int) -> None:
    chance = random.Random(seed)
    allocator = Allocator(settings, capacity_bytes=3 * GIB, device_bytes=8 * GIB)
    live: list[int] = []
    for step in range(700):
        if live and chance.random() < 0.5:
            allocator.free(live.pop(chance.randrange(len(live))))
        else:
            try:
                live.append(allocator.malloc(int(2 ** chance.uniform(4, 27)), stream=chance.randrange(2)).address)
            except OutOfMemoryError:
                live, dropped = live[10:], live[:10]
                for address in dropped:
                    allocator.free(address)
        if chance.random() < 0.01:
            allocator.empty_cache()
        if step % 50 == 0:
            check(allocator)
    for address in live:
        allocator.free(address)
    check(allocator)
    allocator.empty_cache()
    assert counters(allocator) == (0, 0, 0, 0)


def check(layout: Layout) -> None:
    """Blocks do not overlap, no two free ones of a segment touch, and the sums are what the counters say."""
    blocks = list(layout.blocks())
    by_segment = defaultdict(int)
    for block, following in pairwise(blocks):
        assert block.end <= following.address
        is_one_segment = block.segment is following.segment and block.end == following.address
        assert not (is_one_segment and block.state == following.state == "free")
    for block in blocks:
        by_segment[id(block.segment)] += block.num_bytes
        assert by_segment[id(block.segment)] <= block.segment.num_bytes
    taken = [block for block in blocks if block.state != "free"]
    splits = sum(
        block.num_bytes
        for block in blocks
        if block.state == "free" and block.segment.active_bytes and not block.segment.is_expandable
    )
    expected = (
        sum(block.requested_bytes for block in taken),
        sum(block.num_bytes for block in taken),
        sum(block.num_bytes for block in blocks),
        splits,
    )
    assert expected == counters(layout)
