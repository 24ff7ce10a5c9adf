"""From the events of a trace to an analysis."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_sweep.analyze.chrome.build import make_trace
from wan_sweep.analyze.chrome.collect import Collector
from wan_sweep.analyze.chrome.collectives import collectives_section, per_step
from wan_sweep.analyze.chrome.costs import Cost
from wan_sweep.analyze.chrome.devices import copies_section, device_section, kernels_section
from wan_sweep.analyze.chrome.drawn import panels
from wan_sweep.analyze.chrome.forest import NONE
from wan_sweep.analyze.chrome.memory import DeviceMemory, main_memory
from wan_sweep.analyze.chrome.places import Places
from wan_sweep.analyze.chrome.sections import churn_section, memory_section, overview, windows_section
from wan_sweep.analyze.chrome.stalls import BusyClock, device_clocks
from wan_sweep.analyze.chrome.trace import Trace
from wan_sweep.analyze.chrome.work import annotations_section, modules_section, operations_section
from wan_sweep.analyze.finding import Analysis, warning
from wan_sweep.analyze.json_stream import JsonFile
from wan_sweep.analyze.source import open_source
from wan_sweep.analyze.wording import duration
from wan_sweep.units import format_bytes

_FEW = 20


def collect(events: Iterable[Any]) -> Collector:
    """Takes all events in."""
    collector = Collector()
    add = collector.add
    for event in events:
        add(event)
    return collector


def exchanged_per_step(path: Path) -> dict[str, float]:
    """What a step of a trace exchanges with other ranks, as metrics of bytes and seconds; empty if nothing.

    Raises:
        UnreadableFileError: the file cannot be read, or is damaged.
    """
    with open_source(path, lambda _: None) as (stream, _):
        file = JsonFile(stream, path)
        found = per_step(make_trace(collect(file.events()), file.header))
    if found is None:
        return {}
    told = {
        "collectives/num_per_step": found.num,
        "collectives/given_per_step_bytes": found.num_bytes,
        "collectives/per_step_s": found.seconds,
        "collectives/exposed_per_step_s": found.exposed_seconds,
    }
    return {name: value for name, value in told.items() if value is not None}


def analyze_trace(collector: Collector, file: JsonFile, path: Path, top: int) -> Analysis:
    """What a trace says.

    Args:
        collector: Its events; it is emptied.
        file: The file that they came from.
        path: Where that is.
        top: How many rows tables have at most.
    """
    trace = make_trace(collector, file.header)
    memories = [DeviceMemory(events, trace.parts) for events in trace.memory]
    memory = main_memory(memories)
    clocks = device_clocks(trace)
    places = Places(trace)
    operations, found = operations_section(trace, memory, top)
    return Analysis(
        kind="chrome_trace",
        title="Chrome trace",
        path=str(path),
        headline=_headline(trace, memory, clocks, places, found),
        sections=[
            overview(trace),
            memory_section(memories, memory, places, top),
            churn_section(trace, memory),
            windows_section(trace, trace.phases, memory, max(top, _FEW), key="phases", example="phase:NAME"),
            windows_section(trace, trace.steps, memory, top, key="steps", example="step:N"),
            operations,
            modules_section(trace, memory, top),
            annotations_section(trace, memory, top),
            device_section(trace, clocks, places, top),
            copies_section(trace, top),
            kernels_section(trace, top),
            collectives_section(trace, top),
        ],
        warnings=_warnings(collector, file, trace),
        panels=panels(trace, memory, clocks, found),
    )


def _headline(
    trace: Trace, memory: DeviceMemory | None, clocks: Mapping[str, BusyClock], places: Places, operations: list[Cost]
) -> list[str]:
    sentences = []
    if memory is not None:
        at_peak = int(memory.events.slice_index[memory.peak_index])
        module = places.module(at_peak)
        where = [places.moment(memory.peak_time), module and f"module {module}", places.operation(at_peak)]
        reserved = memory.reserved_at_peak
        sentences.append(
            f"Peak memory of {memory.device}: {format_bytes(memory.peak_bytes)} allocated"
            + ("" if memory.is_counter else " since the recording began")
            + (f", {format_bytes(reserved)} reserved" if reserved else "")
            + f", at {duration(memory.peak_time)}"
            + ", in " * any(where)
            + ", ".join(filter(None, where))
            + "."
        )
    sentences += [
        f"GPU {device} was busy {100 * clock.busy / clock.span:.1f} % of the {duration(clock.span)} from its first to "
        f"its last activity; idle {duration(clock.idle)}."
        for device, clock in clocks.items()
        if clock.span > 0
    ]
    if operations:
        first = max(operations, key=lambda cost: (cost.device_self, cost.host_self))
        is_on_device = first.device_self > 0
        own = [cost.device_self if is_on_device else cost.host_self for cost in operations]
        place, most = "on devices" if is_on_device else "on the CPU", max(own)
        share = f"{100 * most / sum(own):.0f} %" if most else "none"
        sentences.append(f"The operation with the most time {place}: {first.name}, {share}, {first.calls:,} calls.")
    if not trace.num_events:
        sentences.append("This trace has no events.")
    return sentences


def _warnings(collector: Collector, file: JsonFile, trace: Trace) -> Sequence[Mapping[str, str]]:
    num_lost = int((trace.activities.launch == NONE).sum())
    found = [
        collector.num_malformed
        and warning(
            "malformed_events",
            f"{collector.num_malformed:,} of {collector.num_events:,} events lack what their kind needs and were left "
            "out",
            "numbers may be too small; look at how the file was written",
        ),
        collector.num_unclosed
        and warning(
            "unclosed_slices",
            f"{collector.num_unclosed:,} slices began and never ended; they were left out",
            "stop the recording before the file is written",
        ),
        not file.is_closed
        and warning(
            "open_array",
            "the array of events has no last bracket, which the format allows, but the file may be cut off",
            "compare the end of the recording with the end of the run",
        ),
        trace.out_of_memory
        and warning(
            "out_of_memory",
            f"requests failed for lack of memory: {len(trace.out_of_memory)}, the first at "
            f"{duration(trace.out_of_memory[0])}",
            "a memory snapshot tells what filled the device then",
        ),
        num_lost
        and warning(
            "unknown_launches",
            f"for {num_lost:,} of {len(trace.activities):,} device activities the trace does not say what launched "
            "them; they are in no operation, and in the range of the time at which they ran",
            "record the CPU's activities, too",
        ),
    ]
    return [one for one in found if isinstance(one, Mapping)]
