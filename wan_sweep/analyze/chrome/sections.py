"""What a trace says of memory, phases and steps, as sections."""

from collections.abc import Sequence

import numpy as np

from wan_sweep.analyze.chrome.forest import NONE
from wan_sweep.analyze.chrome.memory import DeviceMemory
from wan_sweep.analyze.chrome.places import Places
from wan_sweep.analyze.chrome.trace import Trace, Windows
from wan_sweep.analyze.churn import churn_facts
from wan_sweep.analyze.finding import Column, Fact, Section, Table, Value, top_table
from wan_sweep.analyze.wording import duration
from wan_sweep.units import format_bytes

NO_MEMORY = "this trace has no memory events: record with torch.profiler.profile(profile_memory=True)"
NO_RANGES = 'this trace has no ranges named {}: put them into the code with torch.profiler.record_function("{}")'


def overview(trace: Trace) -> Section:
    """What was recorded."""
    header = trace.header
    devices = header.get("deviceProperties")
    names = (
        [str(one["name"]) for one in devices if isinstance(one, dict) and "name" in one]
        if isinstance(devices, list)
        else []
    )
    switches = [key for key in ("profile_memory", "record_shapes", "with_stack", "with_modules") if header.get(key)]
    facts = [
        Fact(key="num_events", label="events", value=trace.num_events, unit="count"),
        Fact(key="span_seconds", label="recorded", value=trace.parts.seconds, unit="seconds"),
        Fact(key="num_threads", label="threads", value=trace.num_threads, unit="count"),
        Fact(key="num_streams", label="device streams", value=len(np.unique(trace.activities.stream)), unit="count"),
    ]
    if names:
        facts.append(Fact(key="devices", label="devices", value=", ".join(names)))
    if switches:
        facts.append(Fact(key="recorded_with", label="recorded with", value=", ".join(switches)))
    distributed = header.get("distributedInfo")
    if isinstance(distributed, dict) and "rank" in distributed:
        rank = f"{distributed['rank']} of {distributed.get('world_size', '?')}"
        facts.append(Fact(key="rank", label="rank", value=rank))
    notes = []
    if len(trace.parts) > 1:
        facts.append(Fact(key="num_parts", label="recordings", value=len(trace.parts), unit="count"))
        notes.append(
            f"The file holds {len(trace.parts)} recordings within {duration(trace.span)}. Times count from the first; "
            "the pauses between them are neither stalls nor idle time."
        )
    return Section(key="overview", title="Recorded", facts=facts, notes=notes)


def memory_section(memories: Sequence[DeviceMemory], memory: DeviceMemory | None, places: Places, top: int) -> Section:
    """The peak of the main device and what was live then; the peaks of the others."""
    if memory is None:
        return Section(key="memory", title="Memory", missing=NO_MEMORY)
    at_peak = int(memory.events.slice_index[memory.peak_index])
    facts = [
        Fact(key="device", label="device", value=memory.device),
        Fact(key="peak_allocated_bytes", label="peak allocated", value=memory.peak_bytes, unit="bytes"),
        Fact(key="peak_at_seconds", label="at", value=memory.peak_time, unit="seconds"),
        Fact(key="peak_in", label="in", value=places.moment(memory.peak_time) or None),
        Fact(key="peak_module", label="module", value=places.module(at_peak) or None),
        Fact(key="peak_operation", label="operation", value=places.operation(at_peak) or None),
    ]
    if memory.standing_bytes is not None:
        facts.append(Fact(key="standing_bytes", label="stood at the start", value=memory.standing_bytes, unit="bytes"))
    notes = [_source(memory)]
    reserved = memory.reserved_at_peak
    if reserved is not None:
        unused = reserved - memory.peak_bytes
        facts += [
            Fact(key="peak_reserved_bytes", label="peak reserved", value=memory.reserved_peak, unit="bytes"),
            Fact(key="reserved_at_peak_bytes", label="reserved at the peak", value=reserved, unit="bytes"),
            Fact(key="unused_at_peak_bytes", label="reserved, not allocated", value=unused, unit="bytes"),
            Fact(key="fragmentation_pct", label="fragmentation", value=100 * unused / reserved, unit="percent"),
        ]
        notes.append("Inactive splits are not in a trace; a memory snapshot holds them.")
    else:
        notes.append(f"Fragmentation: the events of {memory.device} do not say what is reserved.")
    notes += [
        f"{other.device}: peak {format_bytes(other.peak_bytes)}"
        + ("" if other.is_counter else " above what stood when the recording began")
        + f", at {duration(other.peak_time)}."
        for other in memories
        if other is not memory
    ]
    return Section(key="memory", title="Memory", facts=facts, tables=[_live(memory, places, top)], notes=notes)


def _source(memory: DeviceMemory) -> str:
    if memory.is_counter:
        return "Allocated is the allocator's own count (the field Total Allocated)."
    reason = "drifts on the CPU" if memory.device == "cpu" else "is not in every event"
    return (
        "Allocated is the sum of the allocations since the recording began, without what stood before; the field Total "
        f"Allocated was not used, since it {reason}."
    )


def _live(memory: DeviceMemory, places: Places, top: int) -> Table:
    """What was live at the peak, equal places together."""
    groups: dict[tuple[str, str, str], tuple[int, int]] = {}
    for index in memory.live_at_peak:
        inside = int(memory.events.slice_index[index])
        place = (
            places.operation(inside) or "outside operations",
            places.module(inside),
            places.moment(float(memory.events.time[index])),
        )
        num_bytes, number = groups.get(place, (0, 0))
        groups[place] = num_bytes + int(memory.events.num_bytes[index]), number + 1
    rows: list[tuple[Value, ...]] = [
        (num_bytes, number, operation, module or None, moment or None)
        for (operation, module, moment), (num_bytes, number) in groups.items()
    ]
    unnamed = memory.peak_bytes - sum(num_bytes for num_bytes, _ in groups.values())
    if memory.is_counter and unnamed > 0:
        rows.append((unnamed, None, "allocated before the recording", None, None))
    return top_table(
        "live_at_peak",
        "Live at the peak, by where it was allocated",
        [
            Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
            Column(key="num_allocations", title="count", unit="count", rank=2),
            Column(key="operation", title="operation", rank=9),
            Column(key="module", title="module", rank=6),
            Column(key="in", title="in", rank=4),
        ],
        sorted(rows, key=lambda row: -int(row[0] or 0)),
        top=top,
    )


def churn_section(trace: Trace, memory: DeviceMemory | None) -> Section:
    """Allocations that come and go."""
    if memory is None:
        return Section(key="churn", title="Allocation churn", missing=NO_MEMORY)
    born = memory.is_allocation
    within = memory.within(trace.steps)
    per_step = (
        (sum(number for _, number, _ in within) / len(within), sum(size for *_, size in within) / len(within))
        if within
        else None
    )
    facts = churn_facts(memory.events.num_bytes[born], memory.lifetime, trace.parts.seconds, per_step)
    return Section(
        key="churn", title="Allocation churn", facts=[Fact(key="device", label="device", value=memory.device), *facts]
    )


_WINDOW_COLUMNS = (
    Column(key="name", title="name", rank=9),
    Column(key="start_seconds", title="start", unit="seconds", rank=3),
    Column(key="seconds", title="time on the CPU", unit="seconds", rank=8),
    Column(key="device_seconds", title="time on devices", unit="seconds", rank=7),
    Column(key="peak_allocated_bytes", title="peak allocated", unit="bytes", rank=8),
    Column(key="num_allocations", title="allocations", unit="count", rank=4),
    Column(key="allocated_bytes", title="allocated in all", unit="bytes", rank=5),
)


def windows_section(
    trace: Trace, windows: Windows, memory: DeviceMemory | None, top: int, *, key: str, example: str
) -> Section:
    """A row for each phase, or for each step, in the order of time."""
    title = key.capitalize()
    if not len(windows):
        return Section(key=key, title=title, missing=NO_RANGES.format(example, example))
    activities = trace.activities
    inside = windows.at(activities.asked_at)
    is_inside = inside != NONE
    busy = np.bincount(inside[is_inside], weights=activities.duration[is_inside], minlength=len(windows))
    levels = memory.within(windows) if memory is not None else [(None, None, None)] * len(windows)
    seconds = windows.end - windows.start
    rows: list[tuple[Value, ...]] = [
        (
            label,
            float(windows.start[index]),
            float(seconds[index]),
            float(busy[index]) if len(activities) else None,
            *levels[index],
        )
        for index, label in enumerate(windows.labels)
    ]
    highest = max(range(len(rows)), key=lambda index: levels[index][0] or 0)
    facts = [
        Fact(key=f"num_{key}", label=key, value=len(windows), unit="count"),
        Fact(key="median_seconds", label="median time on the CPU", value=float(np.median(seconds)), unit="seconds"),
        Fact(key="longest", label="longest", value=windows.labels[int(np.argmax(seconds))]),
        Fact(key="highest", label="highest peak", value=windows.labels[highest] if memory is not None else None),
    ]
    note = "Time on devices is that of all streams added up, of what was launched in the range."
    return Section(
        key=key,
        title=title,
        facts=facts,
        tables=[top_table(key, "", _WINDOW_COLUMNS, rows, top=top)],
        notes=[note] if len(activities) else [],
    )
