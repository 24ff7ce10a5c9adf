"""Takes the events of a trace one by one into compact columns, a few dozen bytes each, so that millions fit.

Times are microseconds from the first event read. Text is kept once and named by number.
"""

import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from wan_sweep.analyze.checked import finite
from wan_sweep.analyze.chrome.messages import GLOO, given_bytes

OP, ANNOTATION, RUNTIME, PYTHON, OVERHEAD = range(5)
_ON_DEVICE, _ON_DEVICE_ANNOTATION, _IGNORED = range(5, 8)

# Categories of today's traces, and those of torch before 1.12. Unknown ones are operations.
_CATEGORIES = {
    "cpu_op": OP,
    "operator": OP,
    "user_annotation": ANNOTATION,
    "cuda_runtime": RUNTIME,
    "cuda_driver": RUNTIME,
    "runtime": RUNTIME,
    "python_function": PYTHON,
    "overhead": OVERHEAD,
    "kernel": _ON_DEVICE,
    "gpu_memcpy": _ON_DEVICE,
    "memcpy": _ON_DEVICE,
    "gpu_memset": _ON_DEVICE,
    "memset": _ON_DEVICE,
    "gpu_user_annotation": _ON_DEVICE_ANNOTATION,
    "trace": _IGNORED,
    "cuda_sync": _IGNORED,
    "cuda_profiler_range": _IGNORED,
}
KERNEL, COPY, FILL = range(3)
_ACTIVITIES = {"gpu_memcpy": COPY, "memcpy": COPY, "gpu_memset": FILL, "memset": FILL}
_FLOWS = {"ac2g", "async_cpu_to_gpu", "async_gpu"}
_DEVICE_TYPES = {0: "cpu", 1: "cuda", 12: "xpu", 13: "mps"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

UNKNOWN = -1


class Numbers:
    """Gives each value a number, in the order in which they are first seen."""

    def __init__(self) -> None:
        self._number_of: dict[Any, int] = {}

    def number(self, value: object) -> int:
        """The number of this value."""
        return self._number_of.setdefault(value, len(self._number_of))

    def values(self) -> list[Any]:
        """The values by number."""
        return list(self._number_of)


@dataclass
class SliceColumns:
    """What happened on the CPU and lasted."""

    start: "array[float]" = field(default_factory=lambda: array("d"))
    duration: "array[float]" = field(default_factory=lambda: array("d"))
    name: "array[int]" = field(default_factory=lambda: array("i"))
    kind: "array[int]" = field(default_factory=lambda: array("b"))
    lane: "array[int]" = field(default_factory=lambda: array("i"))
    correlation: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class ActivityColumns:
    """What a device did: kernels, copies, fills."""

    start: "array[float]" = field(default_factory=lambda: array("d"))
    duration: "array[float]" = field(default_factory=lambda: array("d"))
    name: "array[int]" = field(default_factory=lambda: array("i"))
    kind: "array[int]" = field(default_factory=lambda: array("b"))
    stream: "array[int]" = field(default_factory=lambda: array("i"))
    lane: "array[int]" = field(default_factory=lambda: array("i"))
    correlation: "array[int]" = field(default_factory=lambda: array("q"))
    num_bytes: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class ExchangeColumns:
    """Collectives on the CPU: what this rank gives to others."""

    start: "array[float]" = field(default_factory=lambda: array("d"))
    duration: "array[float]" = field(default_factory=lambda: array("d"))
    name: "array[int]" = field(default_factory=lambda: array("i"))
    num_bytes: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class MemoryColumns:
    """Allocations, with positive bytes, and frees, with negative ones."""

    time: "array[float]" = field(default_factory=lambda: array("d"))
    lane: "array[int]" = field(default_factory=lambda: array("i"))
    device: "array[int]" = field(default_factory=lambda: array("i"))
    address: "array[int]" = field(default_factory=lambda: array("Q"))
    num_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    total_allocated: "array[int]" = field(default_factory=lambda: array("q"))
    total_reserved: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass
class FlowColumns:
    """Ends of arrows from a launching call to what it launched."""

    number: "array[int]" = field(default_factory=lambda: array("q"))
    lane: "array[int]" = field(default_factory=lambda: array("i"))
    time: "array[float]" = field(default_factory=lambda: array("d"))


class Collector:
    """Sorts events into columns.

    Attributes:
        recordings: Beginning and end of each run of the profiler, where the trace says so.
        num_events: All that were given.
        num_malformed: Events without what their kind needs; they are left out.
        num_unclosed: Slices that began and never ended; they are left out, too.
    """

    def __init__(self) -> None:
        self.names = Numbers()
        self.lanes = Numbers()
        self.streams = Numbers()
        self.devices = Numbers()
        self.slices = SliceColumns()
        self.activities = ActivityColumns()
        self.device_annotations = SliceColumns()
        self.exchanges = ExchangeColumns()
        self.memory = MemoryColumns()
        self.flow_starts = FlowColumns()
        self.flow_ends = FlowColumns()
        self.recordings: list[tuple[float, float]] = []
        self.out_of_memory: list[float] = []
        self.num_events = 0
        self.num_malformed = 0
        self.origin: float | None = None
        self._open: dict[int, list[int]] = {}
        self._add: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "X": self._add_complete,
            "B": self._begin,
            "E": self._end,
            "i": self._add_instant,
            "I": self._add_instant,
            "s": self._add_flow_start,
            "f": self._add_flow_end,
        }

    def add(self, event: Any) -> None:  # noqa: ANN401 # an event is whatever the file says
        """Takes one event; what is no event is counted as malformed."""
        self.num_events += 1
        try:
            add = self._add.get(event["ph"])
            if add is not None:
                add(event)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            self.num_malformed += 1
            self._drop_half_added()

    def _drop_half_added(self) -> None:
        on_devices = (self.activities, self.device_annotations)
        others = (self.exchanges, self.memory, self.flow_starts, self.flow_ends)
        for group in (self.slices, *on_devices, *others):
            columns = [getattr(group, column.name) for column in fields(group)]
            length = min(map(len, columns))
            for column in columns:
                del column[length:]

    @property
    def num_unclosed(self) -> int:
        """Slices that have begun and not ended."""
        return sum(map(len, self._open.values()))

    def _time(self, event: Mapping[str, Any]) -> float:
        time = finite(event["ts"])
        if self.origin is None:
            self.origin = time
        return time - self.origin

    def _lane(self, event: Mapping[str, Any]) -> int:
        return self.lanes.number((event.get("pid"), event.get("tid")))

    def _name(self, event: Mapping[str, Any]) -> int:
        name = event["name"]
        # Addresses of objects would make a name of each call.
        return self.names.number(_ADDRESS.sub("", name) if " at 0x" in name else name)

    def _add_complete(self, event: Mapping[str, Any]) -> None:
        category = event.get("cat", "")
        kind = _CATEGORIES.get(category)
        if kind is None:
            kind = _CATEGORIES.get(category.lower(), RUNTIME if category.endswith("_runtime") else OP)
        if kind < _ON_DEVICE:
            self._add_slice(self.slices, event, kind)
            if kind == ANNOTATION and event["name"].startswith(GLOO):
                self._add_exchange(event)
        elif kind == _ON_DEVICE:
            self._add_activity(event, _ACTIVITIES.get(category.lower(), KERNEL))
        elif kind == _ON_DEVICE_ANNOTATION:
            self._add_slice(self.device_annotations, event, ANNOTATION)
        elif event["name"].startswith("PyTorch Profiler"):
            start = self._time(event)
            self.recordings.append((start, start + finite(event["dur"])))

    def _add_slice(self, columns: SliceColumns, event: Mapping[str, Any], kind: int) -> None:
        start, duration, name = self._time(event), finite(event.get("dur", 0.0)), self._name(event)
        lane = self._lane(event)
        correlation = UNKNOWN
        if kind == RUNTIME:
            correlation = int((event.get("args") or {}).get("correlation", UNKNOWN))
        columns.start.append(start)
        columns.duration.append(duration)
        columns.name.append(name)
        columns.kind.append(kind)
        columns.lane.append(lane)
        columns.correlation.append(correlation)

    def _add_exchange(self, event: Mapping[str, Any]) -> None:
        start, duration, name = self._time(event), finite(event["dur"]), self._name(event)
        given = given_bytes(event["name"], event.get("args") or {})
        self.exchanges.start.append(start)
        self.exchanges.duration.append(duration)
        self.exchanges.name.append(name)
        self.exchanges.num_bytes.append(UNKNOWN if given is None else given)

    def _begin(self, event: Mapping[str, Any]) -> None:
        self._add_slice(self.slices, event, _CATEGORIES.get(event.get("cat", ""), OP) % _ON_DEVICE)
        self.slices.duration[-1] = UNKNOWN
        self._open.setdefault(self.slices.lane[-1], []).append(len(self.slices.start) - 1)

    def _end(self, event: Mapping[str, Any]) -> None:
        begun = self._open.get(self._lane(event))
        if not begun:
            self.num_malformed += 1
            return
        index = begun.pop()
        self.slices.duration[index] = self._time(event) - self.slices.start[index]

    def _add_activity(self, event: Mapping[str, Any], kind: int) -> None:
        details = event.get("args") or {}
        start, duration, name = self._time(event), finite(event["dur"]), self._name(event)
        device, stream = details.get("device", event.get("pid")), details.get("stream", event.get("tid"))
        given = given_bytes(event["name"], details) if kind == KERNEL else None
        num_bytes = int(details.get("bytes", UNKNOWN)) if given is None else given
        correlation = int(details.get("correlation", UNKNOWN))
        columns = self.activities
        columns.start.append(start)
        columns.duration.append(duration)
        columns.name.append(name)
        columns.kind.append(kind)
        columns.stream.append(self.streams.number((device, stream)))
        columns.lane.append(self._lane(event))
        columns.correlation.append(correlation)
        columns.num_bytes.append(num_bytes)

    def _add_instant(self, event: Mapping[str, Any]) -> None:
        if event["name"] == "[memory]":
            details = event["args"]
            time, num_bytes, address = self._time(event), int(details["Bytes"]), int(details["Addr"])
            totals = int(details.get("Total Allocated", UNKNOWN)), int(details.get("Total Reserved", UNKNOWN))
            kind = _DEVICE_TYPES.get(details["Device Type"], f"device type {details['Device Type']}")
            device = kind if kind == "cpu" else f"{kind}:{details.get('Device Id', 0)}"
            columns = self.memory
            columns.time.append(time)
            columns.lane.append(self._lane(event))
            columns.device.append(self.devices.number(device))
            columns.address.append(address & (2**64 - 1))
            columns.num_bytes.append(num_bytes)
            columns.total_allocated.append(totals[0])
            columns.total_reserved.append(totals[1])
        elif event["name"] == "[OutOfMemory]":
            self.out_of_memory.append(self._time(event))

    def _add_flow_start(self, event: Mapping[str, Any]) -> None:
        self._add_flow(self.flow_starts, event)

    def _add_flow_end(self, event: Mapping[str, Any]) -> None:
        self._add_flow(self.flow_ends, event)

    def _add_flow(self, columns: FlowColumns, event: Mapping[str, Any]) -> None:
        if event.get("cat") in _FLOWS:
            number, time = int(event["id"]), self._time(event)
            columns.number.append(number)
            columns.lane.append(self._lane(event))
            columns.time.append(time)
