"""Makes arrays of what was collected: nests, sorts and connects it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.chrome.collect import (
    ANNOTATION,
    OP,
    OVERHEAD,
    PYTHON,
    RUNTIME,
    UNKNOWN,
    Collector,
    FlowColumns,
    SliceColumns,
)
from wan_sweep.analyze.chrome.forest import NONE, Floats, Forest, Indices, Ints, plant
from wan_sweep.analyze.chrome.trace import Activities, MemoryEvents, OnCpu, Parts, Trace, Windows, range_label, role

if TYPE_CHECKING:
    from array import array

_SECONDS_PER_MICROSECOND = 1e-6

# Which of two slices with equal times is around the other: Python, annotation, operation, call of the runtime.
_OUTER_FIRST = np.zeros(5, dtype=np.int8)
_OUTER_FIRST[[PYTHON, ANNOTATION, OP, RUNTIME, OVERHEAD]] = range(5)


def make_trace(collector: Collector, header: Mapping[str, Any]) -> Trace:
    """Nests, sorts and connects what was collected."""
    names = [str(name) for name in collector.names.values()]
    roles = [role(name) for name in names]
    origin, last = _limits(collector)
    forest = _forest(collector.slices, origin)
    collector.slices = SliceColumns()  # the forest holds a copy; of millions of slices one is enough
    windows = _Windows(forest, roles)
    span = _SECONDS_PER_MICROSECOND * (last - origin)
    return Trace(
        header=header,
        parts=_parts(collector, origin, span),
        names=names,
        roles=roles,
        forest=forest,
        activities=_activities(collector, forest, origin),
        exchanges=_exchanges(collector, origin),
        streams=collector.streams.values(),
        memory=_memory(collector, forest, origin),
        phases=windows.of("phase"),
        steps=windows.of("step") or windows.of("profiler_step"),
        out_of_memory=[_SECONDS_PER_MICROSECOND * (time - origin) for time in sorted(collector.out_of_memory)],
        num_threads=len(np.unique(forest.lane)),
        num_events=collector.num_events,
        span=span,
    )


def _parts(collector: Collector, origin: float, span: float) -> Parts:
    """The runs of the profiler; one over everything if the trace names fewer than two, or if they overlap."""
    limits = _SECONDS_PER_MICROSECOND * (np.array(sorted(collector.recordings)).reshape(-1, 2) - origin)
    if len(limits) < 2 or (limits[1:, 0] < limits[:-1, 1]).any():
        limits = np.array([[0.0, span]])
    return Parts(start=limits[:, 0], end=limits[:, 1])


def _limits(collector: Collector) -> tuple[float, float]:
    """When the first event began and the last one ended."""
    starts = [collector.slices.start, collector.activities.start, collector.memory.time]
    ends = [
        _column(columns.start) + np.maximum(_column(columns.duration), 0.0)
        for columns in (collector.slices, collector.activities)
    ]
    firsts = [_column(values).min() for values in starts if len(values)]
    lasts = [values.max() for values in [*ends, _column(collector.memory.time)] if len(values)]
    return float(min(firsts, default=0.0)), float(max(lasts, default=0.0))


def _column(values: "array[Any]") -> npt.NDArray[Any]:
    """An array without a copy."""
    return np.frombuffer(values, dtype=values.typecode) if len(values) else np.zeros(0, dtype=values.typecode)


def _forest(columns: SliceColumns, origin: float) -> Forest:
    is_whole = _column(columns.duration) >= 0.0
    return plant(
        start=_SECONDS_PER_MICROSECOND * (_column(columns.start)[is_whole] - origin),
        duration=_SECONDS_PER_MICROSECOND * _column(columns.duration)[is_whole],
        name=_column(columns.name)[is_whole],
        kind=_column(columns.kind)[is_whole],
        lane=_column(columns.lane)[is_whole],
        correlation=_column(columns.correlation)[is_whole],
        outer_first=_OUTER_FIRST,
    )


class _Windows:
    def __init__(self, forest: Forest, roles: Sequence[tuple[str, str]]) -> None:
        self._forest = forest
        self._roles = roles

    def of(self, wanted: str) -> Windows:
        labels = {
            number: range_label(found, rest) for number, (found, rest) in enumerate(self._roles) if found == wanted
        }
        chosen = np.flatnonzero(np.isin(self._forest.name, list(labels)))
        chosen = chosen[np.argsort(self._forest.start[chosen], kind="stable")]
        return Windows(
            start=self._forest.start[chosen],
            end=self._forest.end[chosen],
            labels=[labels[int(name)] for name in self._forest.name[chosen]],
        )


def _activities(collector: Collector, forest: Forest, origin: float) -> Activities:
    columns = collector.activities
    starts = _column(columns.start)
    order = np.lexsort((starts, _column(columns.stream)))
    times = starts[order]
    start = _SECONDS_PER_MICROSECOND * (times - origin)
    lane = _column(columns.lane)[order]
    launch = _launches_by_correlation(forest, _column(columns.correlation)[order])
    if (launch == NONE).any():
        by_flow = _launches_by_flow(collector, forest, lane, times, origin)
        launch = np.where(launch == NONE, by_flow, launch)
    if (launch == NONE).any():
        by_annotation = _launches_by_annotation(collector.device_annotations, forest, lane, start, origin)
        launch = np.where(launch == NONE, by_annotation, launch)
    return Activities(
        start=start,
        end=start + _SECONDS_PER_MICROSECOND * np.maximum(_column(columns.duration)[order], 0.0),
        name=_column(columns.name)[order],
        kind=_column(columns.kind)[order],
        stream=_column(columns.stream)[order],
        num_bytes=_column(columns.num_bytes)[order],
        launch=launch,
        asked_at=np.where(launch == NONE, start, forest.start[launch] if len(forest) else start),
    )


def _exchanges(collector: Collector, origin: float) -> OnCpu:
    columns = collector.exchanges
    start = _SECONDS_PER_MICROSECOND * (_column(columns.start) - origin)
    return OnCpu(
        start=start,
        end=start + _SECONDS_PER_MICROSECOND * np.maximum(_column(columns.duration), 0.0),
        name=_column(columns.name),
        num_bytes=_column(columns.num_bytes),
    )


def _launches_by_correlation(forest: Forest, wanted: Ints) -> Indices:
    """The calls of the runtime that carry the number of the activity."""
    calls = np.flatnonzero(forest.correlation != UNKNOWN)
    calls = calls[np.argsort(forest.correlation[calls], kind="stable")]
    return _look_up(wanted, forest.correlation[calls], calls)


def _look_up(wanted: npt.NDArray[Any], keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> Indices:
    """For each wanted key the value beside the same key among sorted ones; NONE where it is not there."""
    if not len(keys):
        return np.full(len(wanted), NONE, dtype=np.int32)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[place] == wanted) & (wanted != UNKNOWN), values[place], NONE).astype(np.int32)


def _launches_by_flow(collector: Collector, forest: Forest, lane: Indices, times: Floats, origin: float) -> Indices:
    """The slices at the other end of the arrows that point to the activities."""
    number_of = {(thread, time): number for number, thread, time in zip(*_flow(collector.flow_ends), strict=True)}
    numbers = np.array(
        [number_of.get(key, UNKNOWN) for key in zip(lane.tolist(), times.tolist(), strict=True)], dtype=np.int64
    )
    number, thread, time = _flow(collector.flow_starts)
    order = np.argsort(number, kind="stable")
    launched_from = forest.at(thread[order], _SECONDS_PER_MICROSECOND * (time[order] - origin))
    return _look_up(numbers, number[order], launched_from)


def _flow(columns: FlowColumns) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    return _column(columns.number), _column(columns.lane), _column(columns.time)


def _launches_by_annotation(
    columns: SliceColumns, forest: Forest, lane: Indices, start: Floats, origin: float
) -> Indices:
    """The annotations of the CPU, named as the one of the device around each activity, that began last before it."""
    around = _forest(columns, origin)
    inside = around.at(lane, start)
    names = np.where(inside == NONE, NONE, around.name[inside] if len(around) else NONE)
    launch = np.full(len(start), NONE, dtype=np.int32)
    for name in np.unique(names[names != NONE]):
        same = np.flatnonzero((forest.name == name) & (forest.kind == ANNOTATION))
        same = same[np.argsort(forest.start[same], kind="stable")]
        chosen = np.flatnonzero(names == name)
        before = np.searchsorted(forest.start[same], start[chosen], side="right") - 1
        if len(same):
            launch[chosen] = np.where(before >= 0, same[before], NONE)
    return launch


def _memory(collector: Collector, forest: Forest, origin: float) -> list[MemoryEvents]:
    columns = collector.memory
    times = _SECONDS_PER_MICROSECOND * (_column(columns.time) - origin)
    device = _column(columns.device)
    found = []
    for number, name in enumerate(collector.devices.values()):
        chosen = np.flatnonzero(device == number)
        if not len(chosen):
            continue  # its only events were malformed
        chosen = chosen[np.argsort(times[chosen], kind="stable")]
        found.append(
            MemoryEvents(
                device=name,
                time=times[chosen],
                address=_column(columns.address)[chosen],
                num_bytes=_column(columns.num_bytes)[chosen],
                total_allocated=_column(columns.total_allocated)[chosen],
                total_reserved=_column(columns.total_reserved)[chosen],
                slice_index=forest.at(_column(columns.lane)[chosen], times[chosen]),
            )
        )
    return found
