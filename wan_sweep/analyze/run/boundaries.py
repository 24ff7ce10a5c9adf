"""The boundaries of a run: nested spans, and the highest values between each two events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wan_sweep.analyze.checked import finite, whole

Event = Mapping[str, Any]
_PEAKS = ("requested", "allocated", "active", "reserved")


@dataclass(kw_only=True)
class RunSpan:
    """One phase, component load, release, step, video or block.

    Attributes:
        end: Seconds since the first event; None where the run ended inside it.
        seconds: How long it took; None for blocks of a GPU, which are not waited for.
        peaks: The highest values inside it.
        moved_bytes: Weights that arrived or left.
    """

    kind: str
    name: str
    index: int | None
    phase: str | None
    start: float
    allocated_at_start: int
    end: float | None = None
    seconds: float | None = None
    moved_bytes: int | None = None
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_PEAKS, 0))

    @property
    def label(self) -> str:
        """Its name, with its number where it has one."""
        return self.name if self.index is None else f"{self.kind} {self.index}"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The time between two events.

    Attributes:
        peaks: The highest values in it.
        inside: What was open, from the outside in.
        residents: Weights on the device when it began, in bytes by component.
    """

    start: float
    end: float
    peaks: Mapping[str, int]
    inside: Sequence[RunSpan]
    residents: Mapping[str, int]

    @property
    def place(self) -> str:
        """The innermost spans by name; empty between phases."""
        return ", ".join(span.label for span in self.inside)


def read_boundaries(events: Sequence[Event]) -> tuple[list[RunSpan], list[Interval]]:
    """Spans in the order in which they began, and intervals by time.

    Raises:
        KeyError, TypeError, ValueError: an event lacks something.
    """
    spans: list[RunSpan] = []
    intervals: list[Interval] = []
    inside: list[RunSpan] = []
    before = 0.0
    residents: Mapping[str, int] = {}
    for event in events:
        now = finite(event["elapsed_s"])
        peaks = {name: whole(event["interval"][f"{name}_peak_bytes"]) for name in _PEAKS}
        intervals.append(Interval(start=before, end=now, peaks=peaks, inside=tuple(inside), residents=residents))
        for span in inside:
            span.peaks = {name: max(span.peaks[name], peaks[name]) for name in _PEAKS}
        if event["event"] == "begin":
            begun = RunSpan(
                kind=event["kind"],
                name=event["name"],
                index=event["index"],
                phase=event["phase"],
                start=now,
                allocated_at_start=whole(event["allocated_bytes"]),
            )
            begun.peaks = {name: whole(event[f"{name}_bytes"]) for name in _PEAKS}
            spans.append(begun)
            inside.append(begun)
        else:
            _end(inside, event, now)
        before, residents = now, {str(name): whole(size) for name, size in event["residents"].items()}
    return spans, intervals


def _end(inside: list[RunSpan], event: Event, now: float) -> None:
    """Closes the innermost span of this name, and what was left open inside it."""
    wanted = (event["kind"], event["name"], event["index"])
    while inside:
        span = inside.pop()
        if (span.kind, span.name, span.index) == wanted:
            span.end, span.seconds, span.moved_bytes = now, event.get("seconds"), event.get("moved_bytes")
            return
    raise ValueError(f"{event['kind']} {event['name']} ends without having begun")
