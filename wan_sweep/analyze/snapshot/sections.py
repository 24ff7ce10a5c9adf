"""What a memory snapshot says, subject by subject."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.churn import churn_facts
from wan_sweep.analyze.finding import Column, Fact, Section, Table, Value, top_table
from wan_sweep.analyze.snapshot.contents import DeviceSnapshot
from wan_sweep.analyze.snapshot.places import Places, first_part, frame_label
from wan_sweep.analyze.snapshot.replay import Allocation, Replay
from wan_sweep.units import format_bytes

NO_HISTORY = (
    "this snapshot has no history: call torch.cuda.memory._record_memory_history() before the work that is of interest"
)
_MICROSECOND = 1e-6


class Clock:
    """Seconds since the first entry of a history.

    Attributes:
        is_known: Whether each entry has a time.
        all_seconds: When each was written, if that is known.
    """

    def __init__(self, snapshot: DeviceSnapshot) -> None:
        times = [entry["time_us"] for entry in snapshot.entries if "time_us" in entry]
        self.is_known = bool(times) and len(times) == len(snapshot.entries)
        self.all_seconds: npt.NDArray[np.float64] = _MICROSECOND * (np.array(times or [0]) - (times or [0])[0])

    def seconds(self, index: int) -> float | None:
        """When this entry was written; None where the history has no times."""
        return float(self.all_seconds[max(index, 0)]) if self.is_known else None


def overview(snapshots: Sequence[DeviceSnapshot], chosen: DeviceSnapshot, clock: Clock) -> Section:
    """What was recorded."""
    facts = [
        Fact(key="device", label="device", value=f"cuda:{chosen.device}"),
        Fact(key="num_segments", label="segments", value=len(chosen.segments), unit="count"),
        Fact(key="num_entries", label="entries of the history", value=len(chosen.entries), unit="count"),
        Fact(key="span_seconds", label="recorded", value=clock.seconds(len(chosen.entries) - 1), unit="seconds"),
        Fact(key="settings", label="allocator settings", value=chosen.settings_text or "default"),
    ]
    others = [one.device for one in snapshots if one is not chosen]
    notes = [f"The file also holds device {device}, with a shorter history." for device in others]
    return Section(key="overview", title="Recorded", facts=facts, notes=notes)


def memory_section(replay: Replay | None, reason: str, clock: Clock, places: Places | None, top: int) -> Section:
    """Peaks, and what was live at the peak."""
    if replay is None or places is None:
        return Section(key="memory", title="Memory", missing=reason)
    peaks, then, index = replay.peaks, replay.at_peak, replay.peak_index
    unused = then.reserved_bytes - then.allocated_bytes
    has_splits = not replay.snapshot.settings.expandable_segments
    facts = [
        Fact(key="peak_requested_bytes", label="peak requested", value=peaks.requested_bytes, unit="bytes"),
        Fact(key="peak_allocated_bytes", label="peak allocated", value=peaks.allocated_bytes, unit="bytes"),
        Fact(key="peak_active_bytes", label="peak active", value=peaks.active_bytes, unit="bytes"),
        Fact(key="peak_reserved_bytes", label="peak reserved", value=peaks.reserved_bytes, unit="bytes"),
        Fact(key="peak_at_seconds", label="allocated peak at", value=clock.seconds(index), unit="seconds"),
        Fact(key="peak_metadata", label="in", value=places.metadata_at(index) or None),
        Fact(key="peak_frame", label="by", value=places.frame_at(index) or None),
        Fact(key="reserved_at_peak_bytes", label="reserved then", value=then.reserved_bytes, unit="bytes"),
        Fact(key="unused_at_peak_bytes", label="of it not allocated", value=unused, unit="bytes"),
        Fact(
            key="fragmentation_pct",
            label="fragmentation",
            value=100 * unused / then.reserved_bytes if then.reserved_bytes else None,
            unit="percent",
        ),
        Fact(
            key="inactive_split_at_peak_bytes",
            label="inactive splits",
            value=then.inactive_split_bytes if has_splits else None,
            unit="bytes",
        ),
    ]
    live = replay.live_at(index)
    tables = [
        _groups("live_at_peak", "Live at the peak", live, places, top),
        _blocks(live, places, clock, top),
        _sizes(live),
    ]
    return Section(key="memory", title="Memory", facts=facts, tables=tables, notes=_trust(replay))


def _trust(replay: Replay) -> list[str]:
    notes = []
    if not replay.num_differences:
        num_blocks = sum(len(segment.blocks) for segment in replay.snapshot.segments)
        notes.append(
            f"The history was replayed; it ends in exactly the state that the snapshot shows ({num_blocks:,} blocks)."
        )
    if replay.start.reserved_bytes:
        notes.append(
            f"The history begins with {format_bytes(replay.start.allocated_bytes)} allocated and "
            f"{format_bytes(replay.start.reserved_bytes)} reserved: it was switched on late, or is a ring buffer that "
            "lost its beginning. That state was rebuilt by walking back from the final segments; peaks before it are "
            "not in this file."
        )
    if replay.snapshot.settings.expandable_segments:
        notes.append("Inactive splits are not counted with expandable segments.")
    return notes


def _groups(key: str, title: str, live: Sequence[Allocation], places: Places, top: int) -> Table:
    groups: dict[tuple[str, str], list[int]] = {}
    for one in live:
        total = groups.setdefault((places.metadata(one), places.frame(one)), [0, 0, 0])
        total[0] += one.num_bytes
        total[1] += one.requested_bytes
        total[2] += 1
    rows: list[tuple[Value, ...]] = [
        (*total, metadata or None, frame or None) for (metadata, frame), total in groups.items()
    ]
    columns = [
        Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
        Column(key="requested_bytes", title="requested", unit="bytes", rank=3),
        Column(key="num_blocks", title="blocks", unit="count", rank=5),
        Column(key="metadata", title="metadata", rank=8),
        Column(key="frame", title="allocated in", rank=9),
    ]
    is_named = places.has_frames or places.has_metadata
    title += ", by who allocated it" if is_named else "; neither stacks nor metadata were recorded"
    return top_table(key, title, columns, sorted(rows, key=lambda row: -int(row[0] or 0)), top=top)


def _blocks(live: Sequence[Allocation], places: Places, clock: Clock, top: int) -> Table:
    rows: list[tuple[Value, ...]] = [
        (
            one.num_bytes,
            one.requested_bytes,
            clock.seconds(one.born) if one.born >= 0 else None,
            f"{one.address:#x}",
            places.metadata(one) or None,
            places.frame(one) or None,
        )
        for one in live
    ]
    columns = [
        Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
        Column(key="requested_bytes", title="requested", unit="bytes", rank=6),
        Column(key="born_seconds", title="allocated at", unit="seconds", rank=5),
        Column(key="address", title="address", rank=2),
        Column(key="metadata", title="metadata", rank=7),
        Column(key="frame", title="allocated in", rank=8),
    ]
    return top_table("largest_blocks", "The largest blocks at the peak", columns, rows, top=top)


def _sizes(live: Sequence[Allocation]) -> Table:
    classes: dict[int, list[int]] = {}
    for one in live:
        total = classes.setdefault((one.num_bytes - 1).bit_length(), [0, 0])
        total[0] += 1
        total[1] += one.num_bytes
    rows: list[tuple[Value, ...]] = [
        (f"up to {format_bytes(2**power)}", *total) for power, total in sorted(classes.items())
    ]
    columns = [
        Column(key="size", title="size of a block", rank=9),
        Column(key="num_blocks", title="blocks", unit="count", rank=9),
        Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
    ]
    return top_table("sizes", "Blocks at the peak, by size", columns, rows, top=len(rows))


def metadata_section(replay: Replay | None, places: Places | None, top: int) -> Section:
    """The highest values while each text was set; where texts have parts, as in phase/step/block, by the first, too."""
    title = "By metadata"
    if replay is None or places is None or not places.has_metadata:
        missing = (
            'no metadata was set: call torch.cuda.memory._set_memory_metadata("PHASE") while the history is recorded'
        )
        return Section(key="metadata", title=title, missing=missing)
    texts = [places.metadata_at(index) for index in range(len(replay.snapshot.entries))]
    firsts = [first_part(text) for text in texts]
    by_text = sorted(_by_text(replay, texts), key=lambda row: -int(row[1] or 0))
    tables = [top_table("metadata", "The highest", _metadata_columns("metadata"), by_text, top=top)]
    if firsts != texts:
        by_first = _by_text(replay, firsts)
        tables.insert(0, top_table("first_parts", "", _metadata_columns("first part"), by_first, top=len(by_first)))
    return Section(key="metadata", title=title, tables=tables)


def _metadata_columns(title: str) -> list[Column]:
    return [
        Column(key="metadata", title=title, rank=9),
        Column(key="peak_allocated_bytes", title="peak allocated", unit="bytes", rank=9),
        Column(key="peak_reserved_bytes", title="peak reserved", unit="bytes", rank=7),
        Column(key="num_allocations", title="allocations", unit="count", rank=5),
        Column(key="requested_in_all_bytes", title="requested in all", unit="bytes", rank=4),
    ]


def _by_text(replay: Replay, texts: Sequence[str]) -> list[tuple[Value, ...]]:
    """Peaks and allocations by the text that each entry has, in the order of their first use."""
    found: dict[str, list[int]] = {}
    for index, (text, entry) in enumerate(zip(texts, replay.snapshot.entries, strict=True)):
        total = found.setdefault(text, [0, 0, 0, 0])
        total[0] = max(total[0], replay.allocated[index])
        total[1] = max(total[1], replay.reserved[index])
        if entry["action"] == "alloc":
            total[2] += 1
            total[3] += entry["size"]
    return [(text or "(none)", *total) for text, total in found.items()]


def churn_section(replay: Replay | None, reason: str, clock: Clock) -> Section:
    """Allocations that come and go."""
    title = "Allocation churn"
    if replay is None:
        return Section(key="churn", title=title, missing=reason)
    if not clock.is_known:
        return Section(key="churn", title=title, missing="the history has no times: record it with a newer torch")
    born = [one for one in replay.allocations if one.born >= 0]
    times = clock.all_seconds
    lifetime = [np.inf if one.freed is None else times[one.freed] - times[one.born] for one in born]
    facts = churn_facts(
        np.array([one.num_bytes for one in born], dtype=np.int64),
        np.array(lifetime, dtype=np.float64),
        float(times[-1]),
    )
    return Section(key="churn", title=title, facts=facts)


def oom_section(replay: Replay | None, reason: str, clock: Clock, places: Places | None, top: int) -> Section:
    """Requests that could not be served."""
    title = "Out of memory"
    if replay is None or places is None:
        return Section(key="oom", title=title, missing=reason)
    facts = [Fact(key="num_ooms", label="OOMs", value=len(replay.at_oom), unit="count")]
    if not replay.at_oom:
        return Section(key="oom", title=title, facts=facts)
    entries = replay.snapshot.entries
    rows: list[tuple[Value, ...]] = [
        (
            clock.seconds(index),
            entries[index]["size"],
            then.allocated_bytes,
            then.reserved_bytes,
            entries[index].get("device_free"),
            places.metadata_at(index) or None,
            places.frame_at(index) or None,
        )
        for index, then in replay.at_oom
    ]
    columns = [
        Column(key="at_seconds", title="at", unit="seconds", rank=6),
        Column(key="request_bytes", title="request", unit="bytes", rank=9),
        Column(key="allocated_bytes", title="allocated then", unit="bytes", rank=8),
        Column(key="reserved_bytes", title="reserved then", unit="bytes", rank=7),
        Column(key="device_free_bytes", title="free on the device", unit="bytes", rank=5),
        Column(key="metadata", title="metadata", rank=7),
        Column(key="frame", title="requested in", rank=8),
    ]
    live = _groups("live_at_oom", "Live at the first of them", replay.live_at(replay.at_oom[0][0]), places, top)
    return Section(key="oom", title=title, facts=facts, tables=[top_table("ooms", "", columns, rows, top=top), live])


def end_section(snapshot: DeviceSnapshot, top: int) -> Section:
    """The state when the snapshot was taken."""
    if not snapshot.segments:
        return Section(key="end", title="At the end", missing="nothing is reserved when the snapshot is taken")
    reserved = sum(segment.num_bytes for segment in snapshot.segments)
    blocks = [block for segment in snapshot.segments for block in segment.blocks]
    allocated = sum(block.num_bytes for block in blocks if not block.is_awaiting_free)
    waiting = sum(block.num_bytes for block in blocks if block.is_awaiting_free)
    empty = sum(segment.num_bytes for segment in snapshot.segments if not segment.blocks)
    facts = [
        Fact(key="allocated_bytes", label="allocated", value=allocated, unit="bytes"),
        Fact(key="awaiting_free_bytes", label="awaiting their free", value=waiting or None, unit="bytes"),
        Fact(key="reserved_bytes", label="reserved", value=reserved, unit="bytes"),
        Fact(key="empty_segments_bytes", label="in empty segments", value=empty, unit="bytes"),
        Fact(
            key="fragmentation_pct",
            label="reserved and not allocated",
            value=100 * (reserved - allocated) / reserved,
            unit="percent",
        ),
    ]
    by_frame: dict[str, list[int]] = {}
    for block in blocks:
        total = by_frame.setdefault(frame_label(block.frames), [0, 0])
        total[0] += block.num_bytes
        total[1] += 1
    columns = [
        Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
        Column(key="num_blocks", title="blocks", unit="count", rank=5),
        Column(key="frame", title="allocated in", rank=9),
    ]
    rows: list[tuple[Value, ...]] = [(*total, frame or None) for frame, total in by_frame.items()]
    rows.sort(key=lambda row: -int(row[0] or 0))
    return Section(
        key="end",
        title="At the end",
        facts=facts,
        tables=[top_table("live_at_end", "Live at the end, by who allocated it", columns, rows, top=top)],
    )
