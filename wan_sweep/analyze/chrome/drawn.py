"""What of a trace is drawn. Pauses between recordings are cut out of the time axis."""

from collections.abc import Mapping, Sequence

import numpy as np

from wan_sweep.analyze.chrome.costs import Cost
from wan_sweep.analyze.chrome.memory import DeviceMemory
from wan_sweep.analyze.chrome.stalls import BusyClock
from wan_sweep.analyze.chrome.trace import Trace
from wan_sweep.analyze.panels import Bars, Line, Panel, Stretch, Timeline

_NUM_BUCKETS = 240
_NUM_BARS = 10


def panels(
    trace: Trace, memory: DeviceMemory | None, clocks: Mapping[str, BusyClock], operations: Sequence[Cost]
) -> list[Panel]:
    """Memory and device use over time, and the operations that took the most time."""
    found: list[Panel] = []
    cut = "" if len(trace.parts) == 1 else f"; {len(trace.parts)} recordings, pauses left out"
    limits = (0.0, trace.parts.seconds or 1.0)
    stretches = _stretches(trace)
    if memory is not None:
        times = trace.parts.without_pauses(memory.events.time)
        lines = [Line(label="allocated", times=times, values=memory.level)]
        if memory.reserved_peak is not None:
            lines.append(Line(label="reserved", times=times, values=memory.events.total_reserved))
        found.append(
            Timeline(
                title=f"Memory of {memory.device}{cut}",
                limits=limits,
                unit="bytes",
                lines=lines,
                stretches=stretches,
                peak=(float(times[memory.peak_index]), memory.peak_bytes),
            )
        )
    if clocks:
        edges = np.linspace(0.0, limits[1], _NUM_BUCKETS + 1)
        found.append(
            Timeline(
                title=f"Share of the time that a GPU was busy{cut}",
                limits=limits,
                unit="share",
                lines=[_share(trace, device, clock, edges) for device, clock in clocks.items()],
                stretches=stretches,
            )
        )
    is_on_device = any(cost.device_self for cost in operations)
    own = [(cost.name, cost.device_self if is_on_device else cost.host_self) for cost in operations]
    if own:
        title = f"Operations by their own time {'on devices' if is_on_device else 'on the CPU'}"
        found.append(Bars(title=title, unit="seconds", bars=sorted(own, key=lambda bar: -bar[1])[:_NUM_BARS]))
    return found


def _share(trace: Trace, device: str, clock: BusyClock, edges: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Line:
    """How much of each bucket a device was busy."""
    starts, ends = trace.parts.without_pauses(clock.starts), trace.parts.without_pauses(clock.ends)
    times = np.stack([starts, ends], axis=1).ravel()
    sums = np.cumsum(ends - starts)
    busy = np.stack([sums - (ends - starts), sums], axis=1).ravel()
    by_edge = np.interp(edges, times, busy, left=0.0)
    return Line(label=f"GPU {device}", times=edges[:-1], values=np.diff(by_edge) / np.diff(edges))


def _stretches(trace: Trace) -> list[Stretch]:
    """The phases, or else the steps."""
    windows = trace.phases or trace.steps
    starts, ends = trace.parts.without_pauses(windows.start), trace.parts.without_pauses(windows.end)
    return [
        Stretch(label=label, start=float(start), end=float(end))
        for label, start, end in zip(windows.labels, starts, ends, strict=True)
    ]
