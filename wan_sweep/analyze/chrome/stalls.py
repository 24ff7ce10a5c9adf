"""When streams had nothing to do, and what the CPU did meanwhile."""

from dataclasses import dataclass

import numpy as np

from wan_sweep.analyze.chrome.collect import ANNOTATION, PYTHON
from wan_sweep.analyze.chrome.forest import NONE, Floats, Indices
from wan_sweep.analyze.chrome.trace import Parts, Trace


@dataclass(frozen=True, kw_only=True)
class StreamUse:
    """One stream from its first to its last activity, in seconds; idle is the time between activities."""

    device: str
    stream: str
    num_activities: int
    busy: float
    idle: float
    num_gaps: int
    longest_gap: float


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A time in which a stream did nothing, in seconds.

    Attributes:
        device_idle: Seconds of it in which no stream of the device did anything.
        after: Name of the activity before it.
        before: Name of the activity that ended it.
        cpu: What the thread that launched that activity did most of the time.
        cpu_share: The part of the time that it did so.
        was_queued: Whether the activity had been launched before the gap began, so that it is not the CPU's doing.
    """

    stream: str
    start: float
    seconds: float
    device_idle: float
    after: str
    before: str
    cpu: str
    cpu_share: float
    was_queued: bool


def busy_intervals(start: Floats, end: Floats) -> tuple[Floats, Floats]:
    """The times in which at least one of these activities ran, as intervals that do not touch."""
    order = np.argsort(start, kind="stable")
    start, reached = start[order], np.maximum.accumulate(end[order])
    is_new = np.ones(len(start), dtype=np.bool_)
    is_new[1:] = start[1:] > reached[:-1]
    firsts = np.flatnonzero(is_new)
    return start[firsts], reached[np.append(firsts[1:], len(start)) - 1] if len(start) else reached


class BusyClock:
    """How long a device, or a stream, was busy, and how long it did nothing between two activities.

    Attributes:
        gaps: Seconds of each time in which it did nothing; pauses of the recording are none.
    """

    def __init__(self, start: Floats, end: Floats, parts: Parts) -> None:
        self.starts, self.ends = busy_intervals(start, end)
        is_recorded = parts.number(self.starts[1:]) == parts.number(self.starts[:-1])
        self.gaps: Floats = (self.starts[1:] - self.ends[:-1])[is_recorded]
        sums = np.cumsum(self.ends - self.starts)
        self._times = np.stack([self.starts, self.ends], axis=1).ravel()
        self._busy = np.stack([sums - (self.ends - self.starts), sums], axis=1).ravel()

    @property
    def busy(self) -> float:
        """All busy seconds."""
        return float(self._busy[-1])

    @property
    def idle(self) -> float:
        """All seconds of the gaps."""
        return float(self.gaps.sum())

    @property
    def span(self) -> float:
        """From the first beginning to the last end, pauses of the recording left out."""
        return self.busy + self.idle

    def between(self, start: Floats, end: Floats) -> Floats:
        """Busy seconds in each of these times."""
        return np.interp(end, self._times, self._busy) - np.interp(start, self._times, self._busy)


def device_clocks(trace: Trace) -> dict[str, BusyClock]:
    """A clock for each device that did something."""
    activities, devices = trace.activities, _device_of(trace)
    return {
        device: BusyClock(activities.start[devices == device], activities.end[devices == device], trace.parts)
        for device in sorted(set(devices))
    }


def stream_uses(trace: Trace) -> list[StreamUse]:
    """How busy each stream was, the busiest first."""
    activities = trace.activities
    uses = []
    for stream, (device, number) in enumerate(trace.streams):
        first, last = np.searchsorted(activities.stream, [stream, stream + 1])
        if first == last:
            continue
        clock = BusyClock(activities.start[first:last], activities.end[first:last], trace.parts)
        uses.append(
            StreamUse(
                device=str(device),
                stream=str(number),
                num_activities=int(last - first),
                busy=clock.busy,
                idle=clock.idle,
                num_gaps=len(clock.gaps),
                longest_gap=float(clock.gaps.max(initial=0.0)),
            )
        )
    return sorted(uses, key=lambda use: -use.busy)


def device_stalls(trace: Trace, clocks: dict[str, BusyClock], top: int) -> list[Gap]:
    """The longest times in which no stream of a device did anything."""
    devices = _device_of(trace)
    groups = [np.flatnonzero(devices == device) for device in clocks]
    return _longest(trace, groups, clocks, top)


def stream_gaps(trace: Trace, clocks: dict[str, BusyClock], top: int) -> list[Gap]:
    """The longest gaps of the stream of each device that worked most: its stalls, and its waiting for other streams."""
    uses = stream_uses(trace)
    numbers = {(str(device), str(stream)): number for number, (device, stream) in enumerate(trace.streams)}
    busiest = {use.device: numbers[use.device, use.stream] for use in reversed(uses)}
    groups = [np.flatnonzero(trace.activities.stream == number) for number in busiest.values()]
    return _longest(trace, groups, clocks, top)


def _device_of(trace: Trace) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    names = np.array([str(device) for device, _ in trace.streams], dtype=object)
    return names[trace.activities.stream] if len(trace.activities) else names[:0]


def _longest(trace: Trace, groups: list[Indices], clocks: dict[str, BusyClock], top: int) -> list[Gap]:
    activities = trace.activities
    found: list[tuple[float, int, int]] = []  # seconds, activities before and after
    for group in groups:
        order = group[np.argsort(activities.start[group], kind="stable")]
        starts, ends = activities.start[order], activities.end[order]
        reached = np.maximum.accumulate(ends)
        last = np.maximum.accumulate(np.where(ends >= reached, np.arange(len(order)), 0))
        is_recorded = trace.parts.number(starts[1:]) == trace.parts.number(starts[:-1])
        length = np.where(is_recorded, starts[1:] - reached[:-1], 0.0)
        longest = np.argsort(-length, kind="stable")[:top]
        found += [
            (float(length[place]), int(order[last[place]]), int(order[place + 1]))
            for place in longest[length[longest] > 0]
        ]
    found.sort(key=lambda gap: -gap[0])
    return [_explained(trace, clocks, *gap) for gap in found[:top]]


def _explained(trace: Trace, clocks: dict[str, BusyClock], length: float, before: int, after: int) -> Gap:
    activities, forest = trace.activities, trace.forest
    end = float(activities.start[after])
    start = end - length
    launch = int(activities.launch[after])
    cpu, share = _cpu_during(trace, launch, start, end)
    device, stream = trace.streams[int(activities.stream[after])]
    busy = float(clocks[str(device)].between(np.array([start]), np.array([end]))[0])
    return Gap(
        stream=str(stream),
        start=start,
        seconds=length,
        device_idle=length - busy,
        after=trace.names[int(activities.name[before])],
        before=trace.names[int(activities.name[after])],
        cpu=cpu,
        cpu_share=share,
        was_queued=launch != NONE and float(forest.end[launch]) <= start,
    )


def _cpu_during(trace: Trace, launch: int, start: float, end: float) -> tuple[str, float]:
    """What the launching thread did most of the time, by its innermost slices, and for which part of the time."""
    forest = trace.forest
    if launch == NONE:
        return "unknown: the trace does not say who launched what came next", 0.0
    lane = int(forest.lane[launch])
    first, last = np.searchsorted(forest.lane, [lane, lane + 1])
    begun = first + np.searchsorted(forest.start[first:last], [start, end], side="left")
    open_before = list(forest.around(int(forest.at(np.array([lane]), np.array([start]))[0])))
    inside = np.unique(np.concatenate([np.arange(*begun), np.array(open_before, dtype=np.int64)]))
    overlap = np.maximum(np.minimum(forest.end[inside], end) - np.maximum(forest.start[inside], start), 0.0)
    own = overlap.copy()
    place = np.searchsorted(inside, forest.parent[inside])
    has_parent = forest.parent[inside] != NONE
    np.subtract.at(own, place[has_parent], overlap[has_parent])
    uncovered = end - start - float(overlap[~has_parent].sum())
    by_name = np.bincount(forest.name[inside], weights=own) if len(inside) else np.zeros(1)
    most = int(np.argmax(by_name))
    if uncovered >= by_name[most]:
        return "nothing that was recorded", uncovered / (end - start)
    is_python = np.isin(forest.kind[inside][forest.name[inside] == most], (ANNOTATION, PYTHON)).all()
    return trace.names[most] + (", outside operations" if is_python else ""), float(by_name[most]) / (end - start)
