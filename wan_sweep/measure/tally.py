"""From readings and finished spans to the numbers of a run: peaks, bases, activations, seconds."""

from dataclasses import dataclass, field
from statistics import median

from wan21.events import Span
from wan21.runtime import Memory
from wan_sweep.measure.gauges import Reading
from wan_sweep.measure.host import resident_peak_bytes

WEIGHTS_ARRIVE = ("load", "extend_prompt")
"""Phases that weights come in; what they add is no activation."""

SETTLING_STEPS = 2
"""Steps after which the same memory serves for all others: the first makes room for the solver's history, the second
is the first to use it."""


@dataclass
class Peaks:
    """The highest counters of a stretch, in bytes."""

    requested: int = 0
    allocated: int = 0
    active: int = 0
    reserved: int = 0

    def meet(self, memory: Memory) -> None:
        """Takes an interval's peaks into account."""
        self.requested = max(self.requested, memory.requested_peak_bytes)
        self.allocated = max(self.allocated, memory.allocated_peak_bytes)
        self.active = max(self.active, memory.active_peak_bytes)
        self.reserved = max(self.reserved, memory.reserved_peak_bytes)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A span that has ended: what stood at its start, its peaks, and who was resident when it began. Bytes, seconds."""

    span: Span
    start: Memory
    end: Memory
    peaks: Peaks
    residents: dict[str, int]
    seconds: float


@dataclass
class PhaseTotals:
    """All occurrences of a phase: seconds added up, peaks at their largest."""

    seconds: float = 0.0
    peaks: Peaks = field(default_factory=Peaks)
    activation: int = 0
    residents: dict[str, int] = field(default_factory=dict)


class Tally:
    """Adds up a run.

    Args:
        first: the reading before the first span; what is allocated then are the libraries' workspaces.
    """

    def __init__(self, first: Reading) -> None:
        self.residents: dict[str, int] = {}
        self.warnings: list[dict[str, str]] = []
        self._libraries = first.memory.requested_bytes
        self._whole = Peaks()
        self._base: dict[str, int] = {}
        self._phases: dict[str, PhaseTotals] = {}
        self._steps: list[tuple[float, Peaks]] = []
        self._moved_bytes = self._num_releases = 0
        self._switch_seconds = 0.0
        self._last = first.memory
        self._highest: dict[str, int] = {}
        self.see(first)

    def see(self, reading: Reading) -> None:
        """Takes a reading into account."""
        self._last = reading.memory
        self._whole.meet(reading.memory)
        for name, value in (
            ("memory/peak/device_used_bytes", reading.device_used_bytes),
            ("memory/peak/process_used_bytes", reading.process_used_bytes),
            ("memory/peak/host_pinned_bytes", reading.host_pinned_bytes),
            ("memory/peak/inactive_split_bytes", reading.memory.inactive_split_bytes),
            ("memory/outside_allocator_bytes", reading.outside_allocator_bytes),
        ):
            if value is not None:
                self._highest[name] = max(value, self._highest.get(name, 0))

    def book(self, done: Finished) -> None:
        """Takes a span that ended well into account."""
        span = done.span
        if span.kind == "component":
            self._book_load(done)
        elif span.kind == "release":
            self.residents.pop(span.name, None)
            self._num_releases += 1
            self._switch_seconds += done.seconds
        elif span.kind == "step":
            self._steps.append((done.seconds, done.peaks))
            self._check_settled()
        elif span.kind == "phase":
            self._book_phase(done)

    def _book_load(self, done: Finished) -> None:
        name, expected = done.span.name, done.span.expected_bytes
        arrived = done.end.requested_bytes - done.start.requested_bytes
        self.residents[name] = arrived
        self._base[name] = max(arrived, self._base.get(name, 0))  # a part of it may come for one phase, all for another
        self._moved_bytes += arrived
        self._switch_seconds += done.seconds
        if expected is not None and arrived != expected:
            self.warnings.append(
                {
                    "code": "base_mismatch",
                    "text": f"loading {name} changed the device's requested bytes by {arrived}, but its parameters "
                    f"have {expected}",
                    "advice": "something else came or went during the load; do not trust this base memory",
                }
            )

    def _check_settled(self) -> None:
        """Warns once if a step after the second made the allocator reserve more."""
        settled = max(peaks.reserved for _, peaks in self._steps[:SETTLING_STEPS])
        grown = self._steps[-1][1].reserved - settled
        if grown > 0 and all(warning["code"] != "steps_grow" for warning in self.warnings):
            self.warnings.append(
                {
                    "code": "steps_grow",
                    "text": f"step {len(self._steps)} reserved {grown} bytes more than the first {SETTLING_STEPS}",
                    "advice": "a run of more steps may need more memory than this one; measure it with all its steps",
                }
            )

    def _book_phase(self, done: Finished) -> None:
        is_load = done.span.name in WEIGHTS_ARRIVE
        totals = self._phases.setdefault(done.span.name, PhaseTotals())
        totals.seconds += done.seconds
        arrived = done.end.allocated_bytes - done.start.allocated_bytes if is_load else 0
        activation = done.peaks.allocated - done.start.allocated_bytes - arrived
        totals.activation = max(totals.activation, activation)
        if done.peaks.allocated >= totals.peaks.allocated:
            totals.residents = dict(self.residents) if is_load else done.residents
        for name in ("requested", "allocated", "active", "reserved"):
            setattr(totals.peaks, name, max(getattr(totals.peaks, name), getattr(done.peaks, name)))

    def metrics(self) -> dict[str, int | float]:
        """The numbers so far, by the names of the metrics table; bytes and seconds."""
        numbers: dict[str, int | float] = {f"memory/base/{name}_bytes": size for name, size in self._base.items()}
        if self._libraries:
            numbers["memory/base/libraries_bytes"] = self._libraries
        for name, phase in self._phases.items():
            numbers[f"memory/activation/{name}_bytes"] = phase.activation
            numbers[f"memory/peak/{name}/requested_bytes"] = phase.peaks.requested
            numbers[f"memory/peak/{name}/allocated_bytes"] = phase.peaks.allocated
            numbers[f"memory/peak/{name}/reserved_bytes"] = phase.peaks.reserved
            for component, num_bytes in phase.residents.items():
                numbers[f"memory/resident/{name}/{component}_bytes"] = num_bytes
            numbers[f"time/{name}_s"] = phase.seconds
        return numbers | self._of_the_run() | self._switching() | self._of_steps()

    def _of_the_run(self) -> dict[str, int | float]:
        numbers: dict[str, int | float] = {
            "memory/peak/requested_bytes": self._whole.requested,
            "memory/peak/allocated_bytes": self._whole.allocated,
            "memory/peak/active_bytes": self._whole.active,
            "memory/peak/reserved_bytes": self._whole.reserved,
            **self._highest,
            "memory/peak/host_rss_bytes": resident_peak_bytes(),
            "memory/num_alloc_retries": self._last.num_alloc_retries,
            "memory/num_ooms": self._last.num_ooms,
            "time/total_s": sum(phase.seconds for phase in self._phases.values()),
        }
        if self._whole.reserved:
            unused = self._whole.reserved - self._whole.allocated
            numbers["memory/fragmentation_pct"] = 100 * unused / self._whole.reserved
        return numbers

    def _switching(self) -> dict[str, int | float]:
        """Components that came and went; nothing where all of them stay."""
        if not self._num_releases:
            return {}
        return {
            "memory/switch/moved_bytes": self._moved_bytes,
            "memory/switch/num": self._num_releases,
            "time/switch_s": self._switch_seconds,
        }

    def _of_steps(self) -> dict[str, int | float]:
        if not self._steps:
            return {}
        numbers: dict[str, int | float] = {"time/first_step_s": self._steps[0][0]}
        settled = self._steps[1:]
        if settled:
            peaks = [peak.allocated for _, peak in settled]
            numbers["time/step_s"] = median(seconds for seconds, _ in settled)
            numbers["memory/fluctuation_pct"] = 100 * (max(peaks) - min(peaks)) / max(peaks) if max(peaks) else 0.0
        return numbers

    def series(self) -> dict[str, list[int] | list[float]]:
        """Numbers that come once a step; bytes and seconds."""
        if not self._steps:
            return {}
        return {
            "step/allocated_bytes": [peaks.allocated for _, peaks in self._steps],
            "step/reserved_bytes": [peaks.reserved for _, peaks in self._steps],
            "step/seconds": [seconds for seconds, _ in self._steps],
        }
