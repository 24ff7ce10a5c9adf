"""The exact measurer: reads the allocator's counters at each boundary and keeps the peaks of nested spans.

The allocator has one peak register. At every boundary it is read and reset, and what it held counts for all spans that
were open during the interval; so the peak of a phase, of each step and of each block come out exact from one register
(docs/memory.md). Times exclude what the reading itself costs.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from wan21.events import Span
from wan21.runtime import Memory, Runtime
from wan_sweep.measure.gauges import BytesOrUnknown, Gauges, Reading
from wan_sweep.measure.tally import Finished, Peaks, Tally


class Sink(Protocol):
    """Takes events as they happen."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Keeps one event; an urgent one, and all before it, is on disk by the time it returns."""


@dataclass
class Frame:
    """An open span: what stood at its start and the peaks since."""

    span: Span
    start: Memory
    residents: dict[str, int]
    peaks: Peaks = field(default_factory=Peaks)
    started: float = 0.0
    own_seconds_before: float = 0.0


class Recorder:
    """Listens to a pipeline and measures it.

    Args:
        runtime: whose counters are read.
        sink: gets an event at the beginning and at the end of every span.
        wants_blocks: whether to listen to blocks as well.
        process_used: this process's bytes on the device, context included; None where nobody tells.
    """

    def __init__(
        self,
        runtime: Runtime,
        sink: Sink,
        *,
        wants_blocks: bool = False,
        process_used: BytesOrUnknown = lambda: None,
    ) -> None:
        self.wants_blocks = wants_blocks
        self.failed_at: dict[str, Any] | None = None
        self._runtime = runtime
        self._gauges = Gauges(runtime, process_used)
        self._sink = sink
        self._open: list[Frame] = []
        self._own_seconds = 0.0
        self._began = time.time()
        self._tally = Tally(self._gauges.read())

    @property
    def warnings(self) -> list[dict[str, str]]:
        """What makes a number doubtful."""
        return self._tally.warnings

    def metrics(self) -> dict[str, int | float]:
        """The numbers of the run so far, by the names of the metrics table; bytes and seconds."""
        return self._tally.metrics()

    def series(self) -> dict[str, list[int] | list[float]]:
        """Numbers that come once a step; bytes and seconds."""
        return self._tally.series()

    def forget_components(self) -> None:
        """Told once the pipeline is gone, which takes what it still held with it, without a release."""
        self._tally.residents.clear()

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Measures a span. An exception is noted with the innermost spans around it, and passes through.

        One that does not come as far as a span around it was dealt with in there, and the measuring goes on. That a
        release ends well says nothing: components leave while the exception is on its way, too.
        """
        frame = self._begin(span)
        try:
            yield
        except BaseException:
            self._note_failure()
            raise
        else:
            if span.kind != "release":
                self.failed_at = None
        finally:
            self._end(frame)

    def _begin(self, span: Span) -> Frame:
        self._wait(span)  # before the clock starts: work that is queued belongs to the spans around
        began = time.perf_counter()
        reading = self._boundary(span)
        frame = Frame(span, reading.memory, dict(self._tally.residents))
        self._open.append(frame)
        self._sink.write(self._event("begin", span, reading), is_urgent=span.kind != "block")
        self._book_own(span, time.perf_counter() - began)
        frame.own_seconds_before = self._own_seconds
        frame.started = time.perf_counter()
        return frame

    def _end(self, frame: Frame) -> None:
        span = frame.span
        self._wait(span)
        ended = time.perf_counter()
        seconds = ended - frame.started - (self._own_seconds - frame.own_seconds_before)
        reading = self._boundary(span)
        event = self._event("end", span, reading) | self._results(frame, reading.memory, seconds)
        self._open.remove(frame)
        if self.failed_at is None or span.kind == "release":
            self._tally.book(
                Finished(
                    span=span,
                    start=frame.start,
                    end=reading.memory,
                    peaks=frame.peaks,
                    residents=frame.residents,
                    seconds=seconds,
                )
            )
        event["residents"] = dict(self._tally.residents)
        self._sink.write(event, is_urgent=span.kind != "block")
        self._book_own(span, time.perf_counter() - ended)

    def _is_waited_for(self, span: Span) -> bool:
        """Whether times at this span's boundaries are the device's: blocks do not stop a GPU."""
        return span.kind != "block" or not self._runtime.is_asynchronous

    def _wait(self, span: Span) -> None:
        if self.failed_at is None and self._is_waited_for(span):
            self._runtime.synchronize()

    def _book_own(self, span: Span, seconds: float) -> None:
        """Takes what a reading cost out of the times around it, unless the device worked on meanwhile."""
        if self._is_waited_for(span):
            self._own_seconds += seconds

    def _boundary(self, span: Span) -> Reading:
        """Closes an interval: its peaks go to all open spans, and a new one starts."""
        reading = self._gauges.read(counters_only=span.kind == "block")
        for frame in self._open:
            frame.peaks.meet(reading.memory)
        self._tally.see(reading)
        return reading

    def _note_failure(self) -> None:
        if self.failed_at is not None:
            return
        self.failed_at = {frame.span.kind: frame.span.name for frame in self._open if frame.span.index is None}
        for frame in self._open:
            if frame.span.index is not None:
                self.failed_at[frame.span.kind] = frame.span.index
                if frame.span.total is not None:
                    self.failed_at[f"num_{frame.span.kind}s"] = frame.span.total
        self.failed_at["resident_components_bytes"] = dict(self._tally.residents)
        with contextlib.suppress(MemoryError):  # reading costs host memory, which may be what has run out
            self.failed_at["allocated_bytes"] = self._runtime.memory().allocated_bytes

    def _event(self, event: str, span: Span, reading: Reading) -> dict[str, Any]:
        """A boundary as it is kept (docs/memory.md, memory_events.json)."""
        now, memory = time.time(), reading.memory
        phases = [frame.span.name for frame in self._open if frame.span.kind == "phase"]
        return {
            "name": span.name,
            "kind": span.kind,
            "event": event,
            "index": span.index,
            "total": span.total,
            "phase": span.name if span.kind == "phase" else next(iter(phases), None),
            "time": now,
            "elapsed_s": now - self._began,
            "requested_bytes": memory.requested_bytes,
            "allocated_bytes": memory.allocated_bytes,
            "active_bytes": memory.active_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "inactive_split_bytes": memory.inactive_split_bytes,
            "num_alloc_retries": memory.num_alloc_retries,
            "num_ooms": memory.num_ooms,
            "interval": {
                "requested_peak_bytes": memory.requested_peak_bytes,
                "allocated_peak_bytes": memory.allocated_peak_bytes,
                "active_peak_bytes": memory.active_peak_bytes,
                "reserved_peak_bytes": memory.reserved_peak_bytes,
            },
            "device_used_bytes": reading.device_used_bytes,
            "process_used_bytes": reading.process_used_bytes,
            "host_rss_bytes": reading.host_rss_bytes,
            "host_pinned_bytes": reading.host_pinned_bytes,
            "residents": dict(self._tally.residents),
        }

    def _results(self, frame: Frame, memory: Memory, seconds: float) -> dict[str, Any]:
        """What is known of a span when it ends."""
        span = frame.span
        results: dict[str, Any] = {
            "seconds": seconds if self._is_waited_for(span) else None,
            "span": {
                "requested_peak_bytes": frame.peaks.requested,
                "allocated_peak_bytes": frame.peaks.allocated,
                "reserved_peak_bytes": frame.peaks.reserved,
            },
        }
        if span.kind in {"component", "release"}:
            results["moved_bytes"] = abs(memory.requested_bytes - frame.start.requested_bytes)
        return results
