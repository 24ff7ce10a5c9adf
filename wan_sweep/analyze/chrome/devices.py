"""What devices did and when they did nothing, as sections."""

from collections.abc import Sequence

import numpy as np

from wan_sweep.analyze.chrome.collect import COPY, FILL, KERNEL
from wan_sweep.analyze.chrome.places import Places
from wan_sweep.analyze.chrome.stalls import BusyClock, Gap, device_stalls, stream_gaps, stream_uses
from wan_sweep.analyze.chrome.trace import Trace
from wan_sweep.analyze.finding import Column, Fact, Section, Value, top_table

NO_DEVICE = (
    "this trace has no device activities: record on a GPU with "
    "torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])"
)


def device_section(trace: Trace, clocks: dict[str, BusyClock], places: Places, top: int) -> Section:
    """How busy the devices were, and why they were not."""
    if not clocks:
        return Section(key="device", title="Device use and stalls", missing=NO_DEVICE)
    facts = [
        fact
        for device, clock in clocks.items()
        for fact in (
            Fact(
                key=f"gpu{device}_span_seconds",
                label=f"GPU {device}, first to last activity",
                value=clock.span,
                unit="seconds",
            ),
            Fact(
                key=f"gpu{device}_busy_pct",
                label="busy",
                value=100 * clock.busy / clock.span if clock.span else None,
                unit="percent",
            ),
            Fact(key=f"gpu{device}_idle_seconds", label="idle", value=clock.idle, unit="seconds"),
        )
    ]
    uses = stream_uses(trace)
    streams = top_table(
        "streams",
        "Streams",
        [
            Column(key="device", title="GPU", rank=6),
            Column(key="stream", title="stream", rank=9),
            Column(key="num_activities", title="activities", unit="count", rank=4),
            Column(key="busy_seconds", title="busy", unit="seconds", rank=9),
            Column(key="idle_seconds", title="idle between", unit="seconds", rank=8),
            Column(key="busy_pct", title="busy share", unit="percent", rank=7),
            Column(key="num_gaps", title="gaps", unit="count", rank=5),
            Column(key="longest_gap_seconds", title="longest gap", unit="seconds", rank=7),
        ],
        [
            (
                use.device,
                use.stream,
                use.num_activities,
                use.busy,
                use.idle,
                100 * use.busy / (use.busy + use.idle) if use.busy else None,
                use.num_gaps,
                use.longest_gap if use.num_gaps else None,
            )
            for use in uses
        ],
        top=top,
    )
    stalls = _gap_rows(device_stalls(trace, clocks, top), places, tells_idle=False)
    tables = [streams, top_table("stalls", "Longest stalls: no stream did anything", _GAP_COLUMNS, stalls, top=top)]
    if len(uses) > 1:
        gaps = _gap_rows(stream_gaps(trace, clocks, top), places, tells_idle=True)
        title = "Longest gaps of the busiest stream, waiting for other streams included"
        tables.append(top_table("gaps", title, _GAP_COLUMNS, gaps, top=top))
    return Section(key="device", title="Device use and stalls", facts=facts, tables=tables)


_GAP_COLUMNS = (
    Column(key="start_seconds", title="at", unit="seconds", rank=5),
    Column(key="seconds", title="gap", unit="seconds", rank=9),
    Column(key="device_idle_seconds", title="device idle", unit="seconds", rank=8),
    Column(key="stream", title="stream", rank=4),
    Column(key="in", title="in", rank=6),
    Column(key="cpu", title="meanwhile on the CPU", rank=9),
    Column(key="cpu_pct", title="of it", unit="percent", rank=7),
    Column(key="after", title="after", rank=1),
    Column(key="before", title="before", rank=2),
)


def _gap_rows(gaps: Sequence[Gap], places: Places, *, tells_idle: bool) -> list[tuple[Value, ...]]:
    return [
        (
            gap.start,
            gap.seconds,
            gap.device_idle if tells_idle else None,
            gap.stream,
            places.moment(gap.start + gap.seconds / 2) or None,
            "what comes next was queued already" if gap.was_queued else gap.cpu,
            None if gap.was_queued else 100 * gap.cpu_share,
            gap.after,
            gap.before,
        )
        for gap in gaps
    ]


def copies_section(trace: Trace, top: int) -> Section:
    """Copies and fills by kind, with their bandwidth."""
    if not len(trace.activities):
        return Section(key="copies", title="Copies", missing=NO_DEVICE)
    activities = trace.activities
    rows: list[tuple[Value, ...]] = []
    is_copy = np.isin(activities.kind, (COPY, FILL))
    for name in np.unique(activities.name[is_copy]):
        chosen = is_copy & (activities.name == name)
        sizes, seconds = activities.num_bytes[chosen], float(activities.duration[chosen].sum())
        total = int(sizes.sum()) if (sizes >= 0).all() else None
        bandwidth = total / seconds if total is not None and seconds > 0 else None
        largest = int(sizes.max()) if total is not None else None
        rows.append((int(chosen.sum()), total, seconds, bandwidth, largest, trace.names[name]))
    if not rows:
        return Section(
            key="copies", title="Copies", missing="this trace has device activities, but no copies among them"
        )
    columns = [
        Column(key="num_copies", title="count", unit="count", rank=6),
        Column(key="copied_bytes", title="bytes", unit="bytes", rank=9),
        Column(key="seconds", title="time", unit="seconds", rank=8),
        Column(key="bytes_per_second", title="bandwidth", unit="bytes_per_second", rank=9),
        Column(key="largest_bytes", title="largest", unit="bytes", rank=3),
        Column(key="kind", title="kind", rank=9),
    ]
    return Section(
        key="copies",
        title="Copies and fills",
        tables=[top_table("copies", "", columns, sorted(rows, key=lambda row: -float(row[2] or 0)), top=top)],
    )


def kernels_section(trace: Trace, top: int) -> Section:
    """Kernels by time."""
    activities = trace.activities
    chosen = activities.kind == KERNEL
    if not chosen.any():
        return Section(key="kernels", title="Kernels", missing=NO_DEVICE)
    durations, names = activities.duration[chosen], activities.name[chosen]
    in_all = float(durations.sum())
    total = np.bincount(names, weights=durations)
    calls = np.bincount(names)
    longest = np.zeros(len(total))
    np.maximum.at(longest, names, durations)
    rows: list[tuple[Value, ...]] = [
        (
            float(total[name]),
            100 * float(total[name]) / in_all if in_all else None,
            int(calls[name]),
            float(total[name]) / int(calls[name]),
            float(longest[name]),
            trace.names[name],
        )
        for name in np.argsort(-total, kind="stable")
        if calls[name]
    ]
    columns = [
        Column(key="seconds", title="time", unit="seconds", rank=9),
        Column(key="pct", title="share", unit="percent", rank=8),
        Column(key="calls", title="calls", unit="count", rank=6),
        Column(key="mean_seconds", title="mean", unit="seconds", rank=5),
        Column(key="longest_seconds", title="longest", unit="seconds", rank=3),
        Column(key="name", title="kernel", rank=9),
    ]
    facts = [
        Fact(key="num_kernels", label="kernels", value=int(chosen.sum()), unit="count"),
        Fact(key="kernel_seconds", label="time in all, streams added up", value=in_all, unit="seconds"),
    ]
    return Section(
        key="kernels", title="Kernels", facts=facts, tables=[top_table("kernels", "", columns, rows, top=top)]
    )
