"""The device's memory as an estimate keeps it: torch's allocator as a model, its peak registers, and who holds what."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from wan21.runtime import Memory
from wan_sweep.allocator import Allocator, OutOfMemoryError
from wan_sweep.units import format_bytes

Basis = Literal["exact", "rule", "table", "guess"]
"""Where a size comes from: a tensor that torch itself sized; a rule in the sources of torch or a library; a
measurement on such a card; or none of these."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the run something happens; what does not apply is empty."""

    phase: str = ""
    component: str = ""
    step: int | None = None
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """A piece of memory that is in use.

    Attributes:
        operation: that asked for it.
        shape, dtype: of the tensor; None for what a kernel takes for itself.
    """

    num_bytes: int
    operation: str
    place: Place
    basis: Basis = "exact"
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Take:
    """An event: a holding begins. It has a number, by which its end names it."""

    number: int
    stream: int
    holding: Holding


@dataclass(frozen=True, slots=True)
class Give:
    """An event: the holding of this number ends."""

    number: int


@dataclass(frozen=True, slots=True)
class Consider:
    """An event: a kernel may take so much more just now."""

    num_bytes: int


Event = Take | Give | Consider


@dataclass(frozen=True, slots=True)
class Moment:
    """What stood at a peak."""

    allocated_bytes: int
    place: Place
    operation: str
    holdings: tuple[Holding, ...]


Counters = tuple[int, int, int, int]
"""Requested, allocated, active and reserved bytes."""

Layout = tuple[tuple[int, int, str], ...]
"""Address, size and state of every block of the allocator: all that decides what it does next."""


def _larger(one: Counters, other: Counters) -> Counters:
    return tuple(map(max, one, other))  # type: ignore[return-value] # as many as both have


@dataclass(frozen=True, slots=True)
class Repetition:
    """What came of going through events again: the allocator before and after, and the peaks."""

    before: Layout
    after: Layout
    peaks: Counters


class DeviceMemory:
    """Counts like torch.cuda, and remembers the live set at the highest point of each phase.

    Attributes:
        place: where the run is; `at` changes it.
        stream: on which the run is.
        listeners: get every event.
        storages: the number of the holding of each tensor's storage that is alive, by where torch keeps it.
        unknown_operations: kernels of others, of which only the results are counted.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.place = Place()
        self.stream = 0
        self.listeners: list[Callable[[Event], None]] = []
        self.storages: dict[int, int] = {}
        self.unknown_operations: set[str] = set()
        self._allocator = allocator
        self._holdings: dict[int, Holding] = {}
        self._addresses: dict[int, int] = {}
        self._num_taken = 0
        self._num_ooms = 0
        self._peaks = (0, 0, 0, 0)
        self._highest: dict[str, int] = {}
        self._possible: dict[str, int] = {}
        self._moments: dict[str, Moment] = {}
        self._unsaved: tuple[Place, str] | None = None
        self._last_layout: Layout | None = None
        self._label: Holding | None = None

    @property
    def is_limited(self) -> bool:
        """Whether it may be used up."""
        return self._allocator.is_limited

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """What is taken inside is labelled with this place."""
        outer = self.place
        self._move(place)
        try:
            yield
        finally:
            self._move(outer)

    def _move(self, place: Place) -> None:
        self._save_moment()
        self.place = place
        self._note_height("")

    def take(self, holding: Holding) -> int:
        """Begins a holding; returns its number.

        Raises:
            torch.OutOfMemoryError: there is no room, with the words that torch has for it.
        """
        allocator = self._allocator
        self._last_layout = None
        holding, self._label = self._label or holding, None
        try:
            block = allocator.malloc(holding.num_bytes, self.stream)
        except OutOfMemoryError as error:
            self._num_ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {format_bytes(holding.num_bytes)}. {error}"
            ) from error
        self._num_taken += 1
        number = self._num_taken
        self._addresses[number] = block.address
        self._holdings[number] = holding
        self._peaks = _larger(self._peaks, self._counters())
        self._note_height(holding.operation)
        for listener in self.listeners:
            listener(Take(number, self.stream, holding))
        return number

    def give(self, number: int) -> None:
        """Ends a holding."""
        self._save_moment()
        self._last_layout = None
        self._allocator.free(self._addresses.pop(number))
        del self._holdings[number]
        for listener in self.listeners:
            listener(Give(number))

    def rename(self, numbers: Mapping[int, int]) -> None:
        """Gives holdings other numbers: those of holdings that have ended."""
        self._addresses = {numbers.get(number, number): value for number, value in self._addresses.items()}
        self._holdings = {numbers.get(number, number): value for number, value in self._holdings.items()}

    def _note_height(self, operation: str) -> None:
        allocated, phase = self._allocator.allocated_bytes, self.place.phase
        if allocated > self._highest.get(phase, 0):
            self._highest[phase] = allocated
            self._unsaved = (self.place, operation)

    def _save_moment(self) -> None:
        """Keeps the live set of a new highest point; called before anything in it goes."""
        if self._unsaved is None:
            return
        place, operation = self._unsaved
        self._unsaved = None
        holdings = tuple(self._holdings.values())
        self._moments[place.phase] = Moment(self._highest[place.phase], place, operation, holdings)

    def peaks(self) -> dict[str, Moment]:
        """The highest point of each phase so far, by its name."""
        self._save_moment()
        return dict(self._moments)

    def consider(self, num_bytes: int) -> None:
        """Notes that a kernel may take so much more just now."""
        if not num_bytes:
            return
        for listener in self.listeners:
            listener(Consider(num_bytes))
        possible = self._allocator.allocated_bytes + num_bytes
        phase = self.place.phase
        self._possible[phase] = max(possible, self._possible.get(phase, 0))

    def possible_peaks(self) -> dict[str, int]:
        """The most that may have been allocated in each phase, were all that was considered true."""
        return {phase: max(peak, self._possible.get(phase, 0)) for phase, peak in self._highest.items()}

    def repeat(self, events: Sequence[Event], known: Repetition | None = None) -> Repetition:
        """Goes through events again that leave nothing behind.

        Args:
            events: every holding that they begin, they end.
            known: what came of the last time. If it left the allocator as it had found it, and it is so again, then
                the same will come of it: nothing needs to be done but to raise the peaks.
        """
        layout = self._layout()
        is_settled = known is not None and known.before == known.after == layout
        if known is not None and is_settled and known.peaks[1] <= self._highest.get(self.place.phase, 0):
            self._peaks = _larger(self._peaks, known.peaks)
            return known
        outer_peaks, self._peaks = self._peaks, (0, 0, 0, 0)
        try:
            self.go_through(events)
            return Repetition(layout, self._layout(), self._peaks)
        finally:
            self._peaks = _larger(self._peaks, outer_peaks)

    def go_through(self, events: Sequence[Event], tensors: Mapping[int, Callable[[], None]] | None = None) -> None:
        """Takes and gives what events say, at the present place.

        Args:
            events: holdings that end in them begin in them.
            tensors: for those holdings that do not end, by their numbers: what makes the tensor that each is of, and so
                takes it.
        """
        outer_stream = self.stream
        numbers: dict[int, int] = {}
        try:
            for event in events:
                if isinstance(event, Give):
                    self.give(numbers.pop(event.number))
                    continue
                if isinstance(event, Consider):
                    self.consider(event.num_bytes)
                    continue
                self.stream = event.stream
                holding = replace(event.holding, place=self.place)
                if tensors is not None and event.number in tensors:
                    self._label = holding  # whatever operation makes the tensor now
                    tensors[event.number]()
                else:
                    numbers[event.number] = self.take(holding)
        finally:
            self.stream = outer_stream

    def _layout(self) -> Layout:
        if self._last_layout is None:
            blocks = self._allocator.blocks()
            self._last_layout = tuple((block.address, block.num_bytes, block.state) for block in blocks)
        return self._last_layout

    def empty_cache(self) -> None:
        """Gives what is free to the driver."""
        self._last_layout = None
        self._allocator.empty_cache()

    def memory(self) -> Memory:
        """The counters."""
        allocator = self._allocator
        requested, allocated, active, reserved = self._peaks
        return Memory(
            requested_bytes=allocator.requested_bytes,
            requested_peak_bytes=requested,
            allocated_bytes=allocator.allocated_bytes,
            allocated_peak_bytes=allocated,
            active_bytes=allocator.active_bytes,
            active_peak_bytes=active,
            reserved_bytes=allocator.reserved_bytes,
            reserved_peak_bytes=reserved,
            inactive_split_bytes=allocator.inactive_split_bytes,
            num_alloc_retries=allocator.num_retries,
            num_ooms=self._num_ooms,
        )

    def reset_peaks(self) -> None:
        """Lets the peaks start again from the present values."""
        self._peaks = self._counters()

    def _counters(self) -> Counters:
        allocator = self._allocator
        return (
            allocator.requested_bytes,
            allocator.allocated_bytes,
            allocator.active_bytes,
            allocator.reserved_bytes,
        )
