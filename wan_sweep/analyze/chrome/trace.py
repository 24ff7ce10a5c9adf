"""A trace as arrays: slices nested by thread, device activities with the calls that launched them, memory events.

Times are seconds from the earliest event.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.chrome.collect import OP
from wan_sweep.analyze.chrome.forest import NONE, Bools, Floats, Forest, Indices, Ints

_RANGE = re.compile(r"(phase|component|release|step|video|block|module):(.+)", re.DOTALL)
_PROFILER_STEP = re.compile(r"ProfilerStep#\d+")
_ALLOCATES = re.compile(r"aten::(new_)?empty(_like|_strided|_permuted|_quantized)?|aten::resize_?")
_NN_MODULE = re.compile(r"nn\.Module: (.+)")


def role(name: str) -> tuple[str, str]:
    """What kind of range a name says, and what is left of the name: ("step", "3") for "step:3"."""
    if match := _RANGE.fullmatch(name):
        return match[1], match[2]
    if _PROFILER_STEP.fullmatch(name):
        return "profiler_step", name
    if match := _NN_MODULE.fullmatch(name):
        return "nn_module", match[1]
    return "", name


def range_label(found: str, rest: str) -> str:
    """A range as people call it: "block 3", "release dit"; modules, phases and other names stand for themselves."""
    return f"{found} {rest}" if found in {"component", "release", "step", "video", "block"} else rest


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The ranges of one role, whatever their thread: the phases, or the steps."""

    start: Floats
    end: Floats
    labels: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, times: Floats) -> Indices:
        """For each time the number of the range that was open; NONE between ranges."""
        found = (np.searchsorted(self.start, times, side="right") - 1).astype(np.int32)
        if not len(self):
            return found
        return np.where((found != NONE) & (self.end[found] >= times), found, np.int32(NONE))

    def label(self, time: float) -> str | None:
        """The range that was open at this time."""
        found = int(self.at(np.array([time]))[0])
        return None if found == NONE else self.labels[found]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The recordings that a file holds, with pauses between them of which it knows nothing; most files hold one."""

    start: Floats
    end: Floats

    def __len__(self) -> int:
        return len(self.start)

    @property
    def seconds(self) -> float:
        """How long they are together."""
        return float((self.end - self.start).sum())

    def number(self, times: Floats) -> Indices:
        """In or after which recording each time is."""
        return np.maximum(np.searchsorted(self.start, times, side="right") - 1, 0)

    def without_pauses(self, times: Floats) -> Floats:
        """How many seconds had been recorded by each time."""
        number = self.number(times)
        before = np.concatenate([[0.0], np.cumsum(self.end - self.start)])[number]
        return before + np.clip(times, self.start[number], self.end[number]) - self.start[number]


@dataclass(frozen=True, kw_only=True)
class Activities:
    """What devices did, sorted by stream and time.

    Attributes:
        launch: Index of the slice that launched each; NONE where the trace does not say.
        asked_at: When that slice began; where the trace does not say, when the activity began.
    """

    start: Floats
    end: Floats
    name: Indices
    kind: Indices
    stream: Indices
    num_bytes: Ints
    launch: Indices
    asked_at: Floats

    def __len__(self) -> int:
        return len(self.start)

    @property
    def duration(self) -> Floats:
        """How long each took."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class OnCpu:
    """Collectives on the CPU, in the order of the file; what this rank gives to others, UNKNOWN where nobody says."""

    start: Floats
    end: Floats
    name: Indices
    num_bytes: Ints


@dataclass(frozen=True, kw_only=True)
class MemoryEvents:
    """Allocations (positive bytes) and frees (negative ones) of one device, sorted by time.

    Attributes:
        slice_index: The innermost slice around each; NONE outside all.
        total_allocated: What the allocator said to have handed out then; UNKNOWN where it said nothing.
    """

    device: str
    time: Floats
    address: npt.NDArray[np.uint64]
    num_bytes: Ints
    total_allocated: Ints
    total_reserved: Ints
    slice_index: Indices

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One trace.

    Attributes:
        header: What the file says beside its events.
        names: Text by number.
        roles: Role of each name, and what is left of it.
        span: Seconds from the first to the last event.
    """

    header: Mapping[str, Any]
    parts: Parts
    names: Sequence[str]
    roles: Sequence[tuple[str, str]]
    forest: Forest
    activities: Activities
    exchanges: OnCpu
    streams: Sequence[tuple[Any, Any]]
    memory: Sequence[MemoryEvents]
    phases: Windows
    steps: Windows
    out_of_memory: Sequence[float]
    num_threads: int
    num_events: int
    span: float

    def has_role(self, *roles: str) -> Bools:
        """Which slices have one of these roles."""
        wanted = np.array([found in roles for found, _ in self.roles], dtype=np.bool_)
        return wanted[self.forest.name] if len(wanted) else np.zeros(0, dtype=np.bool_)

    def label(self, name: int) -> str:
        """What a range of this name is called."""
        return range_label(*self.roles[name])

    def wants_memory(self) -> Bools:
        """The operations that allocations are put down to: aten::empty and its like only where nobody called them."""
        is_operation = self.is_kind(OP)
        allocates = np.array([_ALLOCATES.fullmatch(name) is not None for name in self.names], dtype=np.bool_)
        wanting: Bools = is_operation & ~allocates[self.forest.name] if len(allocates) else is_operation
        is_alone: Bools = is_operation & (self.forest.nearest(wanting) == NONE)
        return wanting | is_alone

    def is_kind(self, *kinds: int) -> Bools:
        """Which slices are of one of these kinds."""
        return np.isin(self.forest.kind, kinds)
