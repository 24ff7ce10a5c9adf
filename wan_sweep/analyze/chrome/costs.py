"""What operations, modules and annotations cost: time on the CPU, time on devices, bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.chrome.forest import NONE, Bools, Floats, Indices
from wan_sweep.analyze.chrome.memory import DeviceMemory
from wan_sweep.analyze.chrome.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Cost:
    """All calls of one name, or of one name in one phase.

    Self is without what lies inside others of its kind; in totals, a call inside one of the same name counts once.
    Seconds on devices are those of what was launched, several streams added up.
    """

    name: str
    phase: str
    calls: int
    host_self: float
    host_total: float
    device_self: float
    device_total: float
    allocated_self: int
    allocated_total: int
    live_at_peak: int


def costs(
    trace: Trace,
    members: Bools,
    memory: DeviceMemory | None,
    *,
    launching: Bools,
    allocating: Bools,
    is_by_phase: bool = False,
) -> list[Cost]:
    """What each name costs.

    Args:
        trace: The trace.
        members: The slices that are summed up by name.
        memory: The device whose allocations are meant, if any.
        launching: Those of them that launches are put down to.
        allocating: Those of them that allocations are put down to.
        is_by_phase: Whether the same name in another phase is another thing, as blocks of another network are.
    """
    forest = trace.forest
    if not members.any():
        return []
    around = forest.above(forest.nearest(members))
    inside = members & (around != NONE)
    host_self = np.where(members, forest.duration, 0.0)
    np.subtract.at(host_self, around[inside], forest.duration[inside])

    device = _put_down(forest.nearest(launching), trace.activities.launch, trace.activities.duration)
    allocated = live = np.zeros(len(forest))
    if memory is not None:
        carrier = forest.nearest(allocating)
        born = memory.is_allocation
        allocated = _put_down(carrier, memory.events.slice_index[born], memory.events.num_bytes[born])
        alive = memory.live_at_peak
        live = _put_down(carrier, memory.events.slice_index[alive], memory.events.num_bytes[alive])

    phases = ["", *dict.fromkeys(trace.phases.labels)]
    phase = _phase_of(trace, phases) if is_by_phase else np.zeros(len(forest), dtype=np.int64)
    groups, group = np.unique(phase * len(trace.names) + forest.name, return_inverse=True)

    def by_name(values: Floats, chosen: Bools) -> Floats:
        return _sums(group[chosen], values[chosen], len(groups))

    first = members & forest.is_first
    columns = [
        by_name(np.ones(len(forest)), members),
        by_name(host_self, members),
        by_name(forest.duration, first),
        by_name(device, members),
        by_name(forest.summed_up(device), first),
        by_name(allocated, members),
        by_name(forest.summed_up(allocated), first),
        by_name(live, members),
    ]
    return [
        Cost(
            name=trace.label(int(groups[place]) % len(trace.names)),
            phase=phases[int(groups[place]) // len(trace.names)],
            calls=int(columns[0][place]),
            host_self=float(columns[1][place]),
            host_total=float(columns[2][place]),
            device_self=float(columns[3][place]),
            device_total=float(columns[4][place]),
            allocated_self=int(columns[5][place]),
            allocated_total=int(columns[6][place]),
            live_at_peak=int(columns[7][place]),
        )
        for place in np.flatnonzero(columns[0]).tolist()
    ]


def _phase_of(trace: Trace, phases: Sequence[str]) -> Indices:
    """For each slice the place in this list of the phase that it began in."""
    places = np.array([0, *(phases.index(label) for label in trace.phases.labels)], dtype=np.int64)
    return places[trace.phases.at(trace.forest.start) + 1]


def _put_down(carrier: Indices, at: Indices, values: npt.NDArray[Any]) -> Floats:
    """Sums values that happened in slices, by the carrier of each slice."""
    owner = np.where(at == NONE, NONE, carrier[at])
    known = owner != NONE
    return _sums(owner[known], values[known], len(carrier))


def _sums(numbers: Indices, values: npt.NDArray[Any], length: int) -> Floats:
    """The sum of the values of each number; a float64 holds bytes exactly up to 8 PiB."""
    return np.bincount(numbers, weights=values, minlength=length).astype(np.float64)
