"""From a memory snapshot to an analysis."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_sweep.analyze.finding import Analysis, warning
from wan_sweep.analyze.panels import Bars, Line, Panel, Stretch, Timeline
from wan_sweep.analyze.snapshot.contents import DeviceSnapshot, device_snapshots
from wan_sweep.analyze.snapshot.places import Places, first_part
from wan_sweep.analyze.snapshot.replay import Replay, ReplayError, replay
from wan_sweep.analyze.snapshot.sections import (
    NO_HISTORY,
    Clock,
    churn_section,
    end_section,
    memory_section,
    metadata_section,
    oom_section,
    overview,
)
from wan_sweep.analyze.wording import duration
from wan_sweep.units import format_bytes

_NUM_BARS = 10
_MOST_STRETCHES = 40


def analyze_snapshot(raw: Mapping[str, Any], path: Path, top: int) -> Analysis:
    """What a snapshot says of the device with the longest history.

    Raises:
        UnreadableFileError: it is not built as a snapshot is.
    """
    snapshots = device_snapshots(raw, str(path))
    if not snapshots:
        return Analysis(
            kind="memory_snapshot",
            title="Memory snapshot",
            path=str(path),
            headline=["This snapshot is of an allocator that was never used: no segments and no history."],
            sections=[],
        )
    chosen = max(snapshots, key=lambda one: (len(one.entries), len(one.segments)))
    replayed, reason = _replay(chosen)
    places = Places(replayed) if replayed is not None else None
    clock = Clock(chosen)
    return Analysis(
        kind="memory_snapshot",
        title="Memory snapshot",
        path=str(path),
        headline=_headline(replayed, places, clock),
        sections=[
            overview(snapshots, chosen, clock),
            memory_section(replayed, reason, clock, places, top),
            metadata_section(replayed, places, top),
            oom_section(replayed, reason, clock, places, top),
            churn_section(replayed, reason, clock),
            end_section(chosen, top),
        ],
        warnings=_warnings(chosen, replayed, reason),
        panels=_panels(replayed, places, clock),
    )


def _replay(snapshot: DeviceSnapshot) -> tuple[Replay | None, str]:
    if not snapshot.entries:
        return None, NO_HISTORY
    try:
        return replay(snapshot), ""
    except ReplayError as error:
        return None, f"the history cannot be replayed: {error}"


def _headline(replayed: Replay | None, places: Places | None, clock: Clock) -> list[str]:
    if replayed is None or places is None:
        return []
    peaks, then, index = replayed.peaks, replayed.at_peak, replayed.peak_index
    seconds = clock.seconds(index)
    where = [
        "" if seconds is None else f"at {duration(seconds)}",
        places.metadata_at(index) and f"in {places.metadata_at(index)}",
        places.frame_at(index) and f"by {places.frame_at(index)}",
    ]
    sentences = [
        f"Peak: {format_bytes(peaks.allocated_bytes)} allocated ({format_bytes(then.requested_bytes)} requested, "
        f"{format_bytes(then.reserved_bytes)} reserved)" + "".join(f", {place}" for place in where if place) + ".",
        f"Reserved at most: {format_bytes(peaks.reserved_bytes)}.",
    ]
    if replayed.at_oom:
        first, then = replayed.at_oom[0]
        sentences.append(
            f"Requests that failed for lack of memory: {len(replayed.at_oom)}; the first of "
            f"{format_bytes(replayed.snapshot.entries[first]['size'])} with {format_bytes(then.allocated_bytes)} "
            f"allocated and {format_bytes(then.reserved_bytes)} reserved."
        )
    return sentences


def _warnings(snapshot: DeviceSnapshot, replayed: Replay | None, reason: str) -> list[Mapping[str, str]]:
    found = []
    if replayed is None and snapshot.entries:
        found.append(
            warning(
                "no_replay", reason, "peaks are unknown; record the whole history, with a max_entries that holds it"
            )
        )
    if replayed is not None and replayed.num_differences:
        found.append(
            warning(
                "replay_differs",
                f"the replay ends with {replayed.num_differences:,} blocks that are not as the snapshot says",
                "allocated is not exact; this version of torch may follow other rules",
            )
        )
    if replayed is not None and replayed.doubtful_bytes:
        found.append(
            warning(
                "doubtful_blocks",
                "of some blocks that stood when the history begins only the requested size is known, since they were "
                f"freed in it: allocated may be up to {format_bytes(replayed.doubtful_bytes)} higher than said",
                "switch the history on before the first allocation, with a max_entries that holds all of it",
            )
        )
    return found


def _panels(replayed: Replay | None, places: Places | None, clock: Clock) -> list[Panel]:
    if replayed is None or places is None:
        return []
    panels: list[Panel] = []
    if clock.is_known:
        times = clock.all_seconds
        panels.append(
            Timeline(
                title="Memory, from the replayed history",
                limits=(0.0, float(times[-1]) or 1.0),
                unit="bytes",
                lines=[
                    Line(label="allocated", times=times, values=replayed.allocated),
                    Line(label="reserved", times=times, values=replayed.reserved),
                ],
                stretches=_stretches(replayed, places, clock),
                peak=(clock.seconds(replayed.peak_index) or 0.0, replayed.peaks.allocated_bytes),
            )
        )
    groups: dict[str, int] = {}
    live = replayed.live_at(replayed.peak_index)
    for one in live:
        label = "  ".join(filter(None, (places.metadata(one), places.frame(one)))) or "(neither stack nor metadata)"
        groups[label] = groups.get(label, 0) + one.num_bytes
    bars = sorted(groups.items(), key=lambda bar: -bar[1])[:_NUM_BARS]
    if len(bars) == 1:
        bars = [(f"{one.address:#x}", one.num_bytes) for one in live[:_NUM_BARS]]
    if bars:
        panels.append(Bars(title="Live at the peak", unit="bytes", bars=bars))
    return panels


def _stretches(replayed: Replay, places: Places, clock: Clock) -> list[Stretch]:
    """Times whose metadata begins alike, if they are few enough to be named."""
    if not places.has_metadata:
        return []
    found: list[Stretch] = []
    for index in range(len(replayed.snapshot.entries)):
        label, now = first_part(places.metadata_at(index)), clock.seconds(index) or 0.0
        if found and found[-1].label == label:
            found[-1] = Stretch(label=label, start=found[-1].start, end=now)
        else:
            found.append(Stretch(label=label, start=now, end=now))
    return [one for one in found if one.label] if len(found) <= _MOST_STRETCHES else []
