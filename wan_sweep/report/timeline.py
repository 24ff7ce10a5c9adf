"""Memory over the time of one job: levels at the boundaries, peaks between them. Numbers only; others draw them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wan_sweep.errors import RecordError
from wan_sweep.memory_events import read_memory_events
from wan_sweep.record import RECORD_FILE, load_record
from wan_sweep.report.sheet import COMPONENTS, LIBRARIES
from wan_sweep.store import MEMORY_EVENTS_FILE

_VISIBLE_SHARE = 0.004


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A phase on the clock; seconds since the start."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """A component that came to the device or left it.

    Args:
        component: its name.
        is_arrival: whether it came.
        start: when, in seconds since the start.
        end: until when.
        num_bytes: what came or left.
        seconds: how long it took, as the measurer counts.
    """

    component: str
    is_arrival: bool
    start: float
    end: float
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The interval in which the most was allocated.

    Args:
        num_bytes: the peak.
        start: when the interval began, in seconds since the start.
        end: when it ended.
        phase: what was going on; empty between phases.
        spans: the open spans inside the phase, outermost first, such as "step 2 of 50" and "block 1".
        weights: bytes of each component then, libraries included.
    """

    num_bytes: int
    start: float
    end: float
    phase: str
    spans: tuple[str, ...]
    weights: Mapping[str, int]

    @property
    def place(self) -> str:
        """Where it is, in words, such as "denoise, step 2 of 50"."""
        return ", ".join((self.phase or "between phases", *self.spans))


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One value per boundary in each series; bytes, and seconds since the start.

    Args:
        number: of the job.
        name: of the job's folder.
        device: where it ran.
        is_estimate: whether nothing ran, and each time is the least possible.
        rank: which of several ranks it is of; None where there is one.
        trouble: outcome and reason of a job that was not ok; empty otherwise.
        times: of the boundaries.
        allocated: at the boundaries.
        peaks: highest allocated since the boundary before.
        reserved: highest reserved since the boundary before.
        weights: bytes of each component at the boundaries; libraries are what stood before the first phase.
        phases: by time.
        moves: by time.
        peak: the highest interval.
    """

    number: int
    name: str
    device: str
    is_estimate: bool
    rank: int | None
    trouble: str
    times: tuple[float, ...]
    allocated: tuple[int, ...]
    peaks: tuple[int, ...]
    reserved: tuple[int, ...]
    weights: Mapping[str, tuple[int, ...]]
    phases: tuple[Stretch, ...]
    moves: tuple[Move, ...]
    peak: Moment

    @cached_property
    def seconds(self) -> float:
        """How long it is."""
        return self.times[-1] - self.times[0]

    def envelope(self) -> list[tuple[float, float, int]]:
        """Return begin, end and peak of each interval, without the dips that are too short to be seen."""
        least = _VISIBLE_SHARE * self.seconds
        found: list[tuple[float, float, int]] = []
        for start, end, peak in zip(self.times, self.times[1:], self.peaks[1:], strict=False):
            before = found[-1] if found else (start, start, 0)
            if found and end - start < least and peak <= before[2]:
                found[-1] = (before[0], end, before[2])
            elif found and before[1] - before[0] < least and before[2] <= peak:
                found[-1] = (before[0], end, peak)
            else:
                found.append((start, end, peak))
        return found

    @property
    def clock(self) -> str:
        """What its times are, for an axis."""
        return "at the least [s], as nothing ran" if self.is_estimate else "[s]"

    @property
    def has_reserve(self) -> bool:
        """Whether the allocator held more than was allocated; on a CPU it does not."""
        return any(reserved > peak for reserved, peak in zip(self.reserved, self.peaks, strict=True))


def read_timeline(job_folder: Path) -> Timeline | None:
    """Return the timeline of a job; None where it left no memory_events.json, or one without events.

    Raises:
        RecordError: the file cannot be read, or something is missing in it; the message names it.
    """
    path = job_folder / MEMORY_EVENTS_FILE
    if not path.exists():
        return None
    document = read_memory_events(path)
    try:
        return _timeline(document, document["events"], _trouble(job_folder)) if document["events"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is incomplete: {error} is missing or of another type") from error


def _trouble(job_folder: Path) -> str:
    """Return what became of a job that was not ok; nothing while it has no record."""
    record = load_record(job_folder) if (job_folder / RECORD_FILE).exists() else None
    if record is None or record.outcome in {"ok", "skipped"}:
        return ""
    reason = " ".join(record.reason.split())
    says_so = reason.lower().startswith("out of memory")
    return f"{reason[:1].upper()}{reason[1:]}" if says_so else f"{record.outcome}: {reason}"


def _timeline(document: Mapping[str, Any], found: Sequence[Mapping[str, Any]], trouble: str) -> Timeline:
    started = found[0]["elapsed_s"]  # the measurer's clock runs before the first span
    events = [{**event, "elapsed_s": event["elapsed_s"] - started} for event in found]
    weights = _weights(events)
    return Timeline(
        number=document["job"]["number"],
        name=document["job"]["name"],
        device=document["device"],
        is_estimate=document.get("mode") == "estimate",
        rank=document["rank"] if document.get("num_ranks", 1) > 1 else None,
        trouble=trouble,
        times=tuple(event["elapsed_s"] for event in events),
        allocated=tuple(event["allocated_bytes"] for event in events),
        peaks=tuple(event["interval"]["allocated_peak_bytes"] for event in events),
        reserved=tuple(event["interval"]["reserved_peak_bytes"] for event in events),
        weights=weights,
        phases=tuple(_phases(events)),
        moves=tuple(_moves(events)),
        peak=_peak(events, weights),
    )


def _weights(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Return each component's bytes over time, and first those of the libraries, which stand before the first phase.

    Where components are said to be there and less than their bytes is allocated, they have gone without a word.
    """
    standing = events[0]["allocated_bytes"] - sum(events[0]["residents"].values())
    names = sorted({name for event in events for name in event["residents"]}, key=_order)
    found: dict[str, list[int]] = {name: [] for name in (*([LIBRARIES] if standing > 0 else []), *names)}
    for event in events:
        is_there = sum(event["residents"].values()) <= event["allocated_bytes"]
        held = event["residents"] if is_there else {}
        for name in names:
            found[name].append(held.get(name, 0))
        if LIBRARIES in found:
            found[LIBRARIES].append(min(standing, event["allocated_bytes"] - sum(held.values())))
    return {name: tuple(series) for name, series in found.items()}


def _order(component: str) -> tuple[int, str]:
    return (COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS), component)


def _phases(events: Sequence[Mapping[str, Any]]) -> list[Stretch]:
    """Return the phases; one that a killed job left open lasts until its last event."""
    found: list[Stretch] = []
    begun: dict[str, float] = {}
    for event in events:
        if event["kind"] != "phase":
            continue
        if event["event"] == "begin":
            begun[event["name"]] = event["elapsed_s"]
        elif event["name"] in begun:
            found.append(Stretch(name=event["name"], start=begun.pop(event["name"]), end=event["elapsed_s"]))
    end = events[-1]["elapsed_s"]
    return found + [Stretch(name=name, start=start, end=end) for name, start in begun.items()]


def _moves(events: Sequence[Mapping[str, Any]]) -> list[Move]:
    begun: dict[tuple[str, str], float] = {}
    found = []
    for event in events:
        if event["kind"] not in {"component", "release"}:
            continue
        key = (event["kind"], event["name"])
        if event["event"] == "begin":
            begun[key] = event["elapsed_s"]
        elif event.get("moved_bytes"):
            found.append(
                Move(
                    component=event["name"],
                    is_arrival=event["kind"] == "component",
                    start=begun[key],
                    end=event["elapsed_s"],
                    num_bytes=event["moved_bytes"],
                    seconds=event["seconds"],
                )
            )
    return found


def _peak(events: Sequence[Mapping[str, Any]], weights: Mapping[str, Sequence[int]]) -> Moment:
    """Return the first interval with the highest peak, and the spans that were open then."""
    place = max(range(len(events)), key=lambda index: events[index]["interval"]["allocated_peak_bytes"])
    before = max(place - 1, 0)
    open_spans: list[Mapping[str, Any]] = []
    for event in events[:place]:
        if event["event"] == "begin":
            open_spans.append(event)
        elif open_spans:
            open_spans.pop()
    return Moment(
        num_bytes=events[place]["interval"]["allocated_peak_bytes"],
        start=events[before]["elapsed_s"],
        end=events[place]["elapsed_s"],
        phase=next((span["name"] for span in open_spans if span["kind"] == "phase"), ""),
        spans=tuple(_span_words(span) for span in open_spans if span["kind"] != "phase" and span["total"] != 1),
        weights={name: series[before] for name, series in weights.items() if series[before]},
    )


def _span_words(span: Mapping[str, Any]) -> str:
    """Return a span as a reader counts: "step 2 of 50", "block 1", "t5"."""
    if span["index"] is None:
        return str(span["name"])
    if span["kind"] == "block":
        return f"block {span['index']}"  # as it is called in the names of its weights
    total = f" of {span['total']}" if span["total"] else ""
    return f"{span['kind']} {span['index'] + 1}{total}"
