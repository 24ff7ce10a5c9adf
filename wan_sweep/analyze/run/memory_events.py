"""memory_events.json: the counters of a job at every boundary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wan_sweep.analyze.finding import Analysis, Column, Fact, Section, Value, top_table, warning
from wan_sweep.analyze.panels import Bars, Line, Panel, Stretch, Timeline
from wan_sweep.analyze.run.boundaries import Event, Interval, RunSpan, read_boundaries
from wan_sweep.analyze.source import UnreadableFileError
from wan_sweep.analyze.wording import duration
from wan_sweep.units import format_bytes

_FROM_A_TRACE = "memory_events.json holds counters at boundaries; record with trace=true and analyze the trace"
_FROM_ATTRIBUTION = "memory_events.json names no {}; record with profile_memory=true and analyze attribution.json"
_FROM_SNAPSHOT = (
    "memory_events.json counts no single allocation; record with profile_memory=true and analyze snapshot.pickle"
)


def analyze_memory_events(content: Mapping[str, Any], path: Path, top: int) -> Analysis:
    """What the counters of a job say.

    Raises:
        UnreadableFileError: an event lacks something.
    """
    events: Sequence[Event] = content["events"]
    try:
        spans, intervals = read_boundaries(events)
        peak = max(intervals, key=lambda interval: interval.peaks["allocated"], default=None)
        return Analysis(
            kind="memory_events",
            title="Memory events of a job",
            path=str(path),
            headline=_headline(peak),
            sections=[
                _overview(content, events),
                _memory(events, intervals, peak),
                _spans("phases", "Phases", "phase", spans),
                _spans("steps", "Steps", "step", spans, top=top),
                _blocks(spans, top),
                _switches(spans),
                Section(key="operations", title="Operations", missing=_FROM_ATTRIBUTION.format("operations")),
                Section(key="modules", title="Modules", missing=_FROM_ATTRIBUTION.format("modules")),
                Section(key="churn", title="Allocation churn", missing=_FROM_SNAPSHOT),
                Section(key="device", title="Device use and stalls", missing=_FROM_A_TRACE),
                Section(key="kernels", title="Kernels", missing=_FROM_A_TRACE),
            ],
            warnings=_warnings(events, spans),
            panels=_panels(events, spans, intervals, peak),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UnreadableFileError(
            f"{path} is not a complete memory_events.json: {error!r}; make it again from the job's events.jsonl"
        ) from error


def _headline(peak: Interval | None) -> list[str]:
    if peak is None:
        return ["No event was recorded: the job ended before its first phase."]
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in _parts(peak) if size)
    when = f"between {duration(peak.start)} and {duration(peak.end)}, in {peak.place or 'no phase'}"
    return [f"Peak: {format_bytes(peak.peaks['allocated'])} allocated, {when}.", f"Of it: {parts}."]


def _parts(peak: Interval) -> list[tuple[str, int]]:
    """What is allocated at most in an interval: the weights that stood when it began, and the rest."""
    weights = [(f"{name} weights", size) for name, size in peak.residents.items()]
    loading = next((span.name for span in peak.inside if span.kind == "component"), None)
    rest = "activations and all else" if loading is None else f"{loading} weights on their way, and buffers"
    return [*weights, (rest, peak.peaks["allocated"] - sum(peak.residents.values()))]


def _overview(content: Mapping[str, Any], events: Sequence[Event]) -> Section:
    job = content.get("job") or {}
    facts = [
        Fact(key="job", label="job", value=job.get("name")),
        Fact(key="device", label="device", value=content.get("device")),
        Fact(key="started_at", label="started", value=content.get("started_at")),
        Fact(key="num_events", label="events", value=len(events), unit="count"),
        Fact(key="span_seconds", label="recorded", value=events[-1]["elapsed_s"] if events else None, unit="seconds"),
    ]
    return Section(key="overview", title="Recorded", facts=facts)


def _most(events: Sequence[Event], name: str) -> int | None:
    values = [int(event[name]) for event in events if event.get(name) is not None]
    return max(values, default=None)


def _memory(events: Sequence[Event], intervals: Sequence[Interval], peak: Interval | None) -> Section:
    if peak is None:
        return Section(key="memory", title="Memory", missing="no event was recorded")
    most = {name: max(interval.peaks[name] for interval in intervals) for name in peak.peaks}
    outside = [
        event["process_used_bytes"] - event["reserved_bytes"]
        for event in events
        if event.get("process_used_bytes") is not None
    ]
    facts = [
        *(Fact(key=f"peak_{name}_bytes", label=f"peak {name}", value=most[name], unit="bytes") for name in most),
        Fact(key="peak_from_seconds", label="allocated peak from", value=peak.start, unit="seconds"),
        Fact(key="peak_to_seconds", label="to", value=peak.end, unit="seconds"),
        Fact(key="peak_in", label="in", value=peak.place or None),
        Fact(
            key="fragmentation_pct",
            label="fragmentation",
            value=100 * (most["reserved"] - most["allocated"]) / most["reserved"] if most["reserved"] else None,
            unit="percent",
        ),
        *(
            Fact(key=f"peak_{name}", label=label, value=_most(events, name), unit="bytes")
            for name, label in (
                ("inactive_split_bytes", "inactive splits, at most"),
                ("device_used_bytes", "device used"),
                ("process_used_bytes", "by this process"),
            )
        ),
        Fact(
            key="outside_allocator_bytes",
            label="outside torch's allocator",
            value=max(outside, default=None),
            unit="bytes",
        ),
        Fact(key="peak_host_rss_bytes", label="host resident", value=_most(events, "host_rss_bytes"), unit="bytes"),
        Fact(key="peak_host_pinned_bytes", label="host pinned", value=_most(events, "host_pinned_bytes"), unit="bytes"),
        Fact(
            key="num_alloc_retries", label="allocation retries", value=_most(events, "num_alloc_retries"), unit="count"
        ),
        Fact(key="num_ooms", label="OOMs", value=_most(events, "num_ooms"), unit="count"),
    ]
    allocated = peak.peaks["allocated"]
    rows: list[tuple[Value, ...]] = [
        (size, 100 * size / allocated if allocated else None, name) for name, size in _parts(peak)
    ]
    columns = [
        Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
        Column(key="pct", title="share", unit="percent", rank=8),
        Column(key="part", title="part", rank=9),
    ]
    table = top_table(
        "live_at_peak", "Live at the peak", columns, sorted(rows, key=lambda row: -int(row[0] or 0)), top=len(rows)
    )
    notes = ["Weights are those that stood when the stretch with the peak began."]
    return Section(key="memory", title="Memory", facts=facts, tables=[table], notes=notes)


_SPAN_COLUMNS = (
    Column(key="name", title="name", rank=9),
    Column(key="start_seconds", title="start", unit="seconds", rank=3),
    Column(key="seconds", title="time", unit="seconds", rank=8),
    Column(key="peak_requested_bytes", title="peak requested", unit="bytes", rank=4),
    Column(key="peak_allocated_bytes", title="peak allocated", unit="bytes", rank=9),
    Column(key="peak_reserved_bytes", title="peak reserved", unit="bytes", rank=7),
    Column(key="above_start_bytes", title="above its start", unit="bytes", rank=6),
)


def _row(span: RunSpan) -> tuple[Value, ...]:
    peaks = (span.peaks["requested"], span.peaks["allocated"], span.peaks["reserved"])
    return (span.label, span.start, span.seconds, *peaks, span.peaks["allocated"] - span.allocated_at_start)


def _spans(key: str, title: str, kind: str, spans: Sequence[RunSpan], *, top: int | None = None) -> Section:
    chosen = [span for span in spans if span.kind == kind]
    if not chosen:
        return Section(key=key, title=title, missing=f"the job recorded no {kind}")
    peaks = [span.peaks["allocated"] for span in chosen]
    seconds = [span.seconds for span in chosen if span.seconds is not None]
    facts = [Fact(key=f"num_{key}", label=key, value=len(chosen), unit="count")]
    if seconds:
        facts.append(Fact(key="median_seconds", label="median time", value=float(np.median(seconds)), unit="seconds"))
    highest = chosen[int(np.argmax(peaks))].label
    facts.append(Fact(key="highest", label="highest peak in", value=highest))
    table = top_table(key, "", _SPAN_COLUMNS, [_row(span) for span in chosen], top=len(chosen) if top is None else top)
    return Section(key=key, title=title, facts=facts, tables=[table])


def _blocks(spans: Sequence[RunSpan], top: int) -> Section:
    chosen = [span for span in spans if span.kind == "block"]
    if not chosen:
        missing = "blocks were not listened to; record with block_events=true"
        return Section(key="blocks", title="Blocks", missing=missing)
    highest: dict[tuple[str | None, str, int | None], RunSpan] = {}
    for span in chosen:
        place = (span.phase, span.name, span.index)
        if place not in highest or span.peaks["allocated"] > highest[place].peaks["allocated"]:
            highest[place] = span
    found = sorted(highest.values(), key=lambda span: -span.peaks["allocated"])
    rows: list[tuple[Value, ...]] = [
        (span.phase, span.name, span.index, span.peaks["allocated"], span.peaks["allocated"] - span.allocated_at_start)
        for span in found
    ]
    columns = [
        Column(key="phase", title="phase", rank=7),
        Column(key="name", title="name", rank=6),
        Column(key="index", title="block", unit="count", rank=9),
        Column(key="peak_allocated_bytes", title="peak allocated", unit="bytes", rank=9),
        Column(key="above_start_bytes", title="above its start", unit="bytes", rank=8),
    ]
    table = top_table("blocks", "The highest of all forwards", columns, rows, top=top)
    return Section(key="blocks", title="Blocks", tables=[table])


def _switches(spans: Sequence[RunSpan]) -> Section:
    chosen = [span for span in spans if span.kind in {"component", "release"}]
    if not chosen:
        return Section(key="copies", title="Loads and releases", missing="the job loaded no component")
    rows: list[tuple[Value, ...]] = [
        (
            span.name,
            "load" if span.kind == "component" else "release",
            span.start,
            span.moved_bytes,
            span.seconds,
            span.moved_bytes / span.seconds if span.moved_bytes and span.seconds and span.kind == "component" else None,
        )
        for span in chosen
    ]
    columns = [
        Column(key="component", title="component", rank=9),
        Column(key="what", title="what", rank=8),
        Column(key="start_seconds", title="at", unit="seconds", rank=4),
        Column(key="moved_bytes", title="moved", unit="bytes", rank=9),
        Column(key="seconds", title="time", unit="seconds", rank=8),
        Column(key="bytes_per_second", title="speed", unit="bytes_per_second", rank=7),
    ]
    notes = ["The speed of a load holds reading or making the weights, too; a trace shows the copies by themselves."]
    table = top_table("copies", "", columns, rows, top=len(rows))
    return Section(key="copies", title="Loads and releases", tables=[table], notes=notes)


def _warnings(events: Sequence[Event], spans: Sequence[RunSpan]) -> list[Mapping[str, str]]:
    found = []
    if _most(events, "num_alloc_retries"):
        found.append(
            warning(
                "alloc_retries",
                "the allocator emptied its cache to serve a request, so the reserved peak is capped by the card",
                "do not compare reserved with other jobs; allocated holds",
            )
        )
    left_open = [span.label for span in spans if span.end is None]
    if left_open:
        found.append(
            warning(
                "unfinished",
                f"the run ended inside {', '.join(left_open)}; its peaks are those until then",
                "the job's record says how it ended",
            )
        )
    return found


def _panels(
    events: Sequence[Event], spans: Sequence[RunSpan], intervals: Sequence[Interval], peak: Interval | None
) -> list[Panel]:
    if peak is None:
        return []
    starts = [interval.start for interval in intervals]
    times = [float(event["elapsed_s"]) for event in events]
    components = list(dict.fromkeys(name for event in events for name in event["residents"]))
    layers = [(name, [float(event["residents"].get(name, 0)) for event in events]) for name in components]
    stretches = [
        Stretch(label=span.name, start=span.start, end=span.end if span.end is not None else times[-1])
        for span in spans
        if span.kind == "phase"
    ]
    lines = [
        Line(
            label=name,
            times=[*starts, times[-1]],
            values=[*(interval.peaks[name] for interval in intervals), events[-1][f"{name}_bytes"]],
        )
        for name in ("allocated", "reserved")
    ]
    if list(lines[0].values) == list(lines[1].values):
        del lines[1]  # on a CPU nothing is reserved beyond what is allocated
    bars = [(span.label, float(span.peaks["allocated"])) for span in spans if span.kind == "phase"]
    return [
        Timeline(
            title="Memory of the device, highest between each two events",
            limits=(0.0, times[-1] or 1.0),
            unit="bytes",
            lines=lines,
            layer_times=times,
            layers=layers,
            stretches=stretches,
            peak=((peak.start + peak.end) / 2, peak.peaks["allocated"]),
        ),
        Bars(title="Peak allocated by phase", unit="bytes", bars=bars),
    ]
