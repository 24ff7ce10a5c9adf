"""What stands in the device's memory, replayed from allocations and frees in the order of time.

Knows neither torch nor the profiler: events are plain values, so that a made-up list gives a live set that can be
worked out by hand. Times are nanoseconds, all sizes bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ALLOCATING = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        *("resize_", "resize_as_"),
    )
)
"""Operations that do nothing but allocate."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the run something happens; what does not apply is empty.

    Attributes:
        phase: of the pipeline; empty between phases.
        step: of the denoising.
        block: index of the transformer block.
        module: qualified name below the component, such as "blocks.1.self_attn.q".
        component: whose module it is, or which is being loaded.
        is_loading: whether the component is on its way to the device.
    """

    phase: str = ""
    step: int | None = None
    block: int | None = None
    module: str = ""
    component: str = ""
    is_loading: bool = False


NOWHERE = Place()


@dataclass(kw_only=True, eq=False, slots=True)
class Allocation:
    """An event, and the record of what became of it: shapes, names and the end come later than the memory.

    Attributes:
        operation: that allocated it; empty outside of any.
        operation_end: when that operation was over.
        shape: of the first tensor in this memory that an operation read; None until then.
        dtype: of that tensor, such as "bfloat16".
        weights_of: the component whose weights these are; empty for all else.
        parameter: its qualified name.
        born, died: numbers of the events that began and ended it.
        is_freed_inside: whether it went before its own operation was over.
        is_kept: whether it outlasted the phase that it was made in, unread.
    """

    time: int
    address: int
    num_bytes: int
    place: Place = NOWHERE
    operation: str = ""
    operation_end: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    weights_of: str = ""
    parameter: str | None = None
    born: int = 0
    died: int | None = None
    is_freed_inside: bool = False
    is_kept: bool = False

    @property
    def is_named(self) -> bool:
        """Whether anything says what it is."""
        return bool(self.weights_of or self.parameter or self.place.component or self.place.module or self.operation)

    @property
    def is_workspace(self) -> bool:
        """Whether a kernel took it for itself: no operation ever got it as a tensor, and the program never let it go.

        It went before its operation was over (scratch), or outlasted the phase and stays for good (what cuBLAS keeps).
        An output that nobody read goes when the program drops it, and is none.
        """
        is_of_a_kernel = self.operation != "" and self.operation not in ALLOCATING
        stays = self.is_kept and self.died is None
        return is_of_a_kernel and self.shape is None and (self.is_freed_inside or stays)

    def is_live_after(self, event: int) -> bool:
        """Whether it stood after the event of this number."""
        return self.born <= event and (self.died is None or self.died > event)


@dataclass(frozen=True, slots=True)
class Free:
    """Memory at this address goes back."""

    time: int
    address: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Use:
    """An operation reads a tensor whose storage begins at this address."""

    time: int
    address: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that failed; `num_bytes` is None where nothing says how much was asked for."""

    time: int
    num_bytes: int | None
    place: Place = NOWHERE
    operation: str = ""


Event = Allocation | Free | Use | Refusal


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What stood at one instant.

    Attributes:
        allocated_bytes: in all.
        before_bytes: of them, what stood before the replay began and nothing is known of.
        allocations: the rest, one by one; what becomes known of them later is in there too.
        place: where the run was.
        operation: what was allocating.
        request_bytes: what was asked for and refused.
    """

    allocated_bytes: int
    before_bytes: int
    allocations: list[Allocation]
    place: Place
    operation: str = ""
    request_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Mark:
    """An instant during a replay, from which a moment can be made once the replay is over."""

    allocated_bytes: int
    event: int
    before_bytes: int
    place: Place
    operation: str = ""
    request_bytes: int | None = None


@dataclass
class LiveSet:
    """Replays events and remembers the live set at each phase's highest point, to the event.

    Of equal heights the first counts. An interval's start counts too, so a phase that allocates nothing peaks at what
    it found.

    Attributes:
        before_bytes: what stood before the first event; frees of unknown addresses are taken from it.
        allocated_bytes: what stands now.
        highest: of the whole run; None before the first replay.
        phases: the highest of each phase, by its name.
        refused: at the last request that failed.
    """

    before_bytes: int = 0
    allocated_bytes: int = 0
    highest: Moment | None = None
    phases: dict[str, Moment] = field(default_factory=dict)
    refused: Moment | None = None
    _live: dict[int, Allocation] = field(default_factory=dict)
    _num_events: int = 0

    def __post_init__(self) -> None:
        self.allocated_bytes = self.before_bytes

    def standing(self) -> Iterable[Allocation]:
        """All that is known to stand now."""
        return self._live.values()

    def at(self, address: int) -> Allocation | None:
        """What stands at this address now."""
        return self._live.get(address)

    def settle(self) -> None:
        """Notes what nobody has read by now: call it where a phase has come to its end, or before the first."""
        for allocation in self._live.values():
            allocation.is_kept = allocation.shape is None

    def replay(self, events: Sequence[Event], place: Place) -> None:
        """Goes through the events of an interval, in the order of time.

        Args:
            events: all since the last replay.
            place: where the run was in that time; its phase gets the interval's highest point.
        """
        candidates = list(self._live.values())
        peak = _Mark(self.allocated_bytes, self._num_events, self.before_bytes, place)
        refusal: _Mark | None = None
        for event in events:
            self._num_events += 1
            if isinstance(event, Use):
                self._use(event)
            elif isinstance(event, Free):
                self._free(event)
            elif isinstance(event, Allocation):
                candidates.append(event)
                self._allocate(event)
                if self.allocated_bytes > peak.allocated_bytes:
                    peak = self._mark(event.place, event.operation)
            else:
                refusal = self._mark(event.place, event.operation, event.num_bytes)
        if self.highest is None or peak.allocated_bytes > self.highest.allocated_bytes:
            self.highest = _moment(peak, candidates)
        before = self.phases.get(place.phase)
        if place.phase and (before is None or peak.allocated_bytes > before.allocated_bytes):
            self.phases[place.phase] = _moment(peak, candidates)
        if refusal is not None:
            self.refused = _moment(refusal, candidates)

    def now(self, place: Place, request_bytes: int | None = None) -> Moment:
        """What stands now."""
        return _moment(self._mark(place, "", request_bytes), list(self._live.values()))

    def _mark(self, place: Place, operation: str, request_bytes: int | None = None) -> _Mark:
        return _Mark(self.allocated_bytes, self._num_events, self.before_bytes, place, operation, request_bytes)

    def _allocate(self, allocation: Allocation) -> None:
        lost = self._live.get(allocation.address)
        if lost is not None:  # its free was not heard of: it can no longer be there
            self._end(lost)
        allocation.born = self._num_events
        self._live[allocation.address] = allocation
        self.allocated_bytes += allocation.num_bytes

    def _free(self, free: Free) -> None:
        allocation = self._live.pop(free.address, None)
        if allocation is None:
            from_before = min(free.num_bytes, self.before_bytes)
            self.before_bytes -= from_before
            self.allocated_bytes -= from_before
            return
        allocation.is_freed_inside = free.time <= allocation.operation_end
        self._end(allocation)

    def _end(self, allocation: Allocation) -> None:
        allocation.died = self._num_events
        self.allocated_bytes -= allocation.num_bytes

    def _use(self, use: Use) -> None:
        allocation = self._live.get(use.address)
        if allocation is not None and allocation.shape is None:
            allocation.shape, allocation.dtype = use.shape, use.dtype


def _moment(mark: _Mark, candidates: list[Allocation]) -> Moment:
    return Moment(
        allocated_bytes=mark.allocated_bytes,
        before_bytes=mark.before_bytes,
        allocations=[allocation for allocation in candidates if allocation.is_live_after(mark.event)],
        place=mark.place,
        operation=mark.operation,
        request_bytes=mark.request_bytes,
    )
