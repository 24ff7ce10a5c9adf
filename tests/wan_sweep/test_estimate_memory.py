"""Counters and live sets of the device that is not there, with made-up holdings."""

from dataclasses import replace

import pytest
import torch

from wan_sweep.allocator import Allocator, Settings
from wan_sweep.estimate.memory import DeviceMemory, Event, Holding, Place
from wan_sweep.units import MIB


def memory_of(capacity_bytes: int | None = None) -> DeviceMemory:
    return DeviceMemory(Allocator(Settings(), capacity_bytes=capacity_bytes))


def holding(num_bytes: int, operation: str = "aten.empty", place: Place | None = None) -> Holding:
    return Holding(num_bytes=num_bytes, operation=operation, place=place or Place())


def test_64_mib_read_as_64_mib_until_they_go() -> None:
    memory = memory_of()
    number = memory.take(holding(64 * MIB))
    counters = memory.memory()
    assert (counters.requested_bytes, counters.allocated_bytes, counters.reserved_bytes) == (64 * MIB,) * 3
    memory.give(number)
    counters = memory.memory()
    assert (counters.requested_bytes, counters.allocated_bytes) == (0, 0)
    assert (counters.requested_peak_bytes, counters.reserved_bytes) == (64 * MIB, 64 * MIB)
    memory.empty_cache()
    assert memory.memory().reserved_bytes == 0


def test_peaks_start_again_from_what_stands() -> None:
    memory = memory_of()
    memory.take(holding(2 * MIB))
    memory.give(memory.take(holding(100 * MIB)))
    memory.reset_peaks()
    assert memory.memory().requested_peak_bytes == 2 * MIB
    assert memory.memory().reserved_peak_bytes == memory.memory().reserved_bytes


def test_each_phase_keeps_the_live_set_of_its_highest_point() -> None:
    memory = memory_of()
    with memory.at(Place(phase="load", component="dit")):
        weight = memory.take(holding(8 * MIB, "weight", memory.place))
    with memory.at(Place(phase="denoise")):
        low = memory.take(holding(MIB, "low", memory.place))
        high = memory.take(holding(4 * MIB, "high", memory.place))
        memory.give(low)
        memory.give(high)
        memory.take(holding(2 * MIB, "later", memory.place))
    with memory.at(Place(phase="decode")):
        memory.give(weight)
    peaks = memory.peaks()
    assert [one.operation for one in peaks["load"].holdings] == ["weight"]
    assert [one.operation for one in peaks["denoise"].holdings] == ["weight", "low", "high"]
    assert peaks["denoise"].operation == "high"
    assert peaks["denoise"].allocated_bytes == 13 * MIB
    # A phase that takes nothing peaks at what it found.
    assert [one.operation for one in peaks["decode"].holdings] == ["weight", "later"]


def test_what_does_not_fit_is_refused_in_the_words_of_torch_and_counted() -> None:
    memory = memory_of(capacity_bytes=32 * MIB)
    memory.take(holding(24 * MIB))
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 16.0 MiB"):
        memory.take(holding(16 * MIB))
    assert memory.memory().num_ooms == 1
    assert memory.memory().num_alloc_retries == 1
    assert memory.memory().requested_bytes == 24 * MIB


def test_what_a_kernel_may_take_moves_the_upper_end_and_no_counter() -> None:
    memory = memory_of()
    with memory.at(Place(phase="decode")):
        memory.take(holding(4 * MIB))
        memory.consider(3 * MIB)
        memory.consider(MIB)
    assert memory.possible_peaks()["decode"] == 7 * MIB
    assert memory.memory().requested_peak_bytes == 4 * MIB


def test_events_that_are_repeated_count_like_the_first_time_and_have_their_own_place() -> None:
    memory = memory_of()
    events: list[Event] = []
    memory.listeners.append(events.append)
    with memory.at(Place(phase="denoise", block=0)):
        memory.give(memory.take(holding(5 * MIB, "hidden", memory.place)))
    memory.listeners.clear()
    memory.take(holding(30 * MIB))
    memory.reset_peaks()
    with memory.at(Place(phase="denoise", block=1)):
        memory.repeat(events)
    assert memory.memory().requested_peak_bytes == 35 * MIB
    assert memory.memory().requested_bytes == 30 * MIB
    assert [one.place.block for one in memory.peaks()["denoise"].holdings] == [None, 1]


def test_a_repetition_that_is_known_raises_the_peaks_as_if_it_were_gone_through() -> None:
    memory = memory_of()
    events: list[Event] = []
    memory.listeners.append(events.append)
    memory.give(memory.take(holding(5 * MIB)))
    memory.listeners.clear()
    memory.take(holding(30 * MIB))
    settled = memory.repeat(events, memory.repeat(events))
    memory.reset_peaks()
    heard: list[Event] = []
    memory.listeners.append(heard.append)
    again = memory.repeat(events, settled)
    assert heard == []  # nothing had to be done
    assert again == settled
    assert memory.memory().requested_peak_bytes == 35 * MIB
    # Elsewhere in memory the same events have to be gone through.
    memory.take(holding(7 * MIB))
    heard.clear()
    assert memory.repeat(events, settled) != settled
    assert len(heard) == 2
    assert memory.memory().requested_peak_bytes == 42 * MIB


def test_a_holding_says_where_its_size_comes_from() -> None:
    exact = holding(1)
    assert exact.basis == "exact"
    assert replace(exact, basis="guess").basis == "guess"
