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
from statistics import median
from typing import Any, Protocol

from wan21.events import Span
from wan21.runtime import Memory, Runtime
from wan_sweep.measure.host import resident_bytes, resident_peak_bytes


class Sink(Protocol):
    """Takes events as they happen."""

    def write(self, event: dict[str, Any]) -> None:
        """Keeps one event, on disk by the time it returns."""


@dataclass
class Frame:
    """An open span: what stood at its start and the peaks since. Bytes."""

    span: Span
    start: Memory
    started: float
    own_seconds_before: float
    requested_peak: int = 0
    allocated_peak: int = 0
    reserved_peak: int = 0
    residents: dict[str, int] = field(default_factory=dict)

    def meet(self, memory: Memory) -> None:
        """Takes an interval's peaks into account."""
        self.requested_peak = max(self.requested_peak, memory.requested_peak_bytes)
        self.allocated_peak = max(self.allocated_peak, memory.allocated_peak_bytes)
        self.reserved_peak = max(self.reserved_peak, memory.reserved_peak_bytes)


@dataclass
class PhaseTotals:
    """All occurrences of a phase: seconds added up, peaks at their largest. Bytes and seconds."""

    seconds: float = 0.0
    allocated_peak: int = 0
    reserved_peak: int = 0
    activation: int = 0
    residents: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Listens to a pipeline and measures it.

    Args:
        runtime: whose counters are read.
        sink: gets an event at the beginning and at the end of every span.
        wants_blocks: whether to listen to blocks as well.
    """

    def __init__(self, runtime: Runtime, sink: Sink, *, wants_blocks: bool = False) -> None:
        self.wants_blocks = wants_blocks
        self.warnings: list[dict[str, str]] = []
        self.failed_at: dict[str, Any] | None = None
        self._runtime = runtime
        self._sink = sink
        self._open: list[Frame] = []
        self._own_seconds = 0.0
        self._base: dict[str, int] = {}
        self._residents: dict[str, int] = {}
        self._phases: dict[str, PhaseTotals] = {}
        self._steps: list[tuple[float, int, int]] = []
        self._whole_requested = self._whole_allocated = self._whole_reserved = 0
        self._device_used_peak = runtime.device_used_bytes()
        self._host_pinned_peak = 0
        self._last: Memory | None = None

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Measures a span. An exception is noted with the innermost spans around it, and passes through."""
        frame = self._begin(span)
        try:
            yield
        except BaseException:
            self._note_failure()
            raise
        finally:
            self._end(frame)

    def _begin(self, span: Span) -> Frame:
        self._wait(span)  # before the clock starts: work that is queued belongs to the spans around
        began = time.perf_counter()
        memory = self._boundary(span)
        frame = Frame(span, memory, 0.0, 0.0, residents=dict(self._residents))
        self._open.append(frame)
        self._write("begin", span, memory)
        self._book_own(span, time.perf_counter() - began)
        frame.own_seconds_before = self._own_seconds
        frame.started = time.perf_counter()
        return frame

    def _end(self, frame: Frame) -> None:
        self._wait(frame.span)
        ended = time.perf_counter()
        seconds = ended - frame.started - (self._own_seconds - frame.own_seconds_before)
        memory = self._boundary(frame.span)
        self._open.remove(frame)
        if self.failed_at is None:
            self._book(frame, memory, seconds)
        self._write("end", frame.span, memory, seconds=seconds, frame=frame)
        self._book_own(frame.span, time.perf_counter() - ended)

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

    def _boundary(self, span: Span) -> Memory:
        """Closes an interval: its peaks go to all open spans, and a new one starts."""
        memory = self._runtime.memory()
        self._runtime.reset_memory_peaks()
        for frame in self._open:
            frame.meet(memory)
        self._whole_requested = max(self._whole_requested, memory.requested_peak_bytes)
        self._whole_allocated = max(self._whole_allocated, memory.allocated_peak_bytes)
        self._whole_reserved = max(self._whole_reserved, memory.reserved_peak_bytes)
        if span.kind != "block":
            self._device_used_peak = max(self._device_used_peak, self._runtime.device_used_bytes())
            self._host_pinned_peak = max(self._host_pinned_peak, self._runtime.host_buffer_bytes())
        self._last = memory
        return memory

    def _book(self, frame: Frame, memory: Memory, seconds: float) -> None:
        span = frame.span
        if span.kind == "component":
            arrived = memory.requested_bytes - frame.start.requested_bytes
            self._base[span.name] = self._residents[span.name] = arrived
            if span.expected_bytes is not None and arrived != span.expected_bytes:
                self.warnings.append(
                    {
                        "code": "base_mismatch",
                        "text": f"loading {span.name} changed the device's requested bytes by {arrived}, but its "
                        f"parameters have {span.expected_bytes}",
                        "advice": "something else came or went during the load; do not trust this base memory",
                    }
                )
        elif span.kind == "release":
            self._residents.pop(span.name, None)
        elif span.kind == "step":
            self._steps.append((seconds, frame.allocated_peak, frame.reserved_peak))
        elif span.kind == "phase":
            totals = self._phases.setdefault(span.name, PhaseTotals())
            totals.seconds += seconds
            totals.reserved_peak = max(totals.reserved_peak, frame.reserved_peak)
            arrived = 0 if span.name != "load" else memory.allocated_bytes - frame.start.allocated_bytes
            activation = frame.allocated_peak - frame.start.allocated_bytes - arrived
            totals.activation = max(totals.activation, activation)
            if frame.allocated_peak >= totals.allocated_peak:
                totals.allocated_peak = frame.allocated_peak
                totals.residents = dict(self._residents) if span.name == "load" else frame.residents

    def _note_failure(self) -> None:
        if self.failed_at is not None:
            return
        self.failed_at = {frame.span.kind: frame.span.name for frame in self._open if frame.span.index is None}
        for frame in self._open:
            if frame.span.index is not None:
                self.failed_at[frame.span.kind] = frame.span.index
                if frame.span.total is not None:
                    self.failed_at[f"num_{frame.span.kind}s"] = frame.span.total
        self.failed_at["resident_components_bytes"] = dict(self._residents)
        with contextlib.suppress(MemoryError):  # reading costs host memory, which may be what has run out
            self.failed_at["allocated_bytes"] = self._runtime.memory().allocated_bytes

    def _write(
        self, event: str, span: Span, memory: Memory, *, seconds: float | None = None, frame: Frame | None = None
    ) -> None:
        line: dict[str, Any] = {
            "time": time.time(),
            "event": event,
            "kind": span.kind,
            "name": span.name,
            "index": span.index,
            "total": span.total,
            "requested_bytes": memory.requested_bytes,
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
        }
        if frame is not None:
            line |= {
                "seconds": seconds if self._is_waited_for(span) else None,
                "requested_peak_bytes": frame.requested_peak,
                "allocated_peak_bytes": frame.allocated_peak,
                "reserved_peak_bytes": frame.reserved_peak,
            }
        if span.kind != "block":
            line |= {
                "device_used_bytes": self._runtime.device_used_bytes(),
                "host_rss_bytes": resident_bytes(),
                "host_pinned_bytes": self._runtime.host_buffer_bytes(),
            }
        self._sink.write(line)

    def metrics(self) -> dict[str, int | float]:
        """The numbers of the run so far, by the names of the metrics table; bytes and seconds."""
        numbers: dict[str, int | float] = {}
        for name, num_bytes in self._base.items():
            numbers[f"memory/base/{name}_bytes"] = num_bytes
        for name, phase in self._phases.items():
            numbers[f"memory/activation/{name}_bytes"] = phase.activation
            numbers[f"memory/peak/{name}/allocated_bytes"] = phase.allocated_peak
            numbers[f"memory/peak/{name}/reserved_bytes"] = phase.reserved_peak
            for component, num_bytes in phase.residents.items():
                numbers[f"memory/resident/{name}/{component}_bytes"] = num_bytes
            numbers[f"time/{name}_s"] = phase.seconds
        numbers |= {
            "memory/peak/requested_bytes": self._whole_requested,
            "memory/peak/allocated_bytes": self._whole_allocated,
            "memory/peak/reserved_bytes": self._whole_reserved,
            "memory/peak/device_used_bytes": self._device_used_peak,
            "memory/peak/host_rss_bytes": resident_peak_bytes(),
            "memory/peak/host_pinned_bytes": self._host_pinned_peak,
            "time/total_s": sum(phase.seconds for phase in self._phases.values()),
        }
        if self._whole_reserved:
            unused = self._whole_reserved - self._whole_allocated
            numbers["memory/fragmentation_pct"] = 100 * unused / self._whole_reserved
        if self._last is not None:
            numbers["memory/num_alloc_retries"] = self._last.num_alloc_retries
        if self._steps:
            seconds = [step[0] for step in self._steps]
            numbers["time/first_step_s"] = seconds[0]
            if len(seconds) > 1:
                numbers["time/step_s"] = median(seconds[1:])
        return numbers

    def series(self) -> dict[str, list[int] | list[float]]:
        """Numbers that come once a step; bytes and seconds."""
        if not self._steps:
            return {}
        seconds, allocated, reserved = (list(column) for column in zip(*self._steps, strict=True))
        return {"step/allocated_bytes": allocated, "step/reserved_bytes": reserved, "step/seconds": seconds}
