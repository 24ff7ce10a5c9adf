"""Traces: torch's profiler over chosen stretches of a run, in one file that Perfetto and TensorBoard open.

Recorded are loads, encoders and releases, each whole; of denoising, after a step of waiting and one of warming up,
three steps; and the first video of decode. Every stretch is a run of the profiler of its own, the three steps together
one, so that the device does not drain between them. Their events go into one file as soon as they are there: people
see the run on one axis, and neither memory nor disk holds more than one stretch besides. The profiler can also pause
(`toggle_collection_dynamic`), but then keeps everything to the end, and nobody knows how much that is.

The size has to be bounded: three steps of t2v-14B at 1280*720 would take several GiB, since the number of operations
grows with the video. So the warm-up step is not only for warming up: its first blocks are recorded, measured and thrown
away. From that follows how many steps fit, or how many blocks where not even one step does. A stretch that would still
be too large is left out. The result says what was left out, and why.

Recording shapes holds references to tensors, and all recording costs time: a trace shows what happens when, while
peaks and times to be compared are those of a run without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from wan21.events import Span
from wan21.runtime import Runtime
from wan_sweep.measure.trace_file import TraceFile
from wan_sweep.units import GIB, format_bytes

WAIT_STEPS, WARM_UP_STEPS, ACTIVE_STEPS = 1, 1, 3
FIRST_ACTIVE_STEP = WAIT_STEPS + WARM_UP_STEPS
WHOLE_PHASES = ("load", "encode_text", "encode_image")
WARM_UP_BLOCKS = 2
"""How many blocks are measured: the first alone would carry all that comes before it."""
STEPS_SHARE = 0.75
"""How much of the room steps may take by the measure of those blocks; the rest is for what differs, and for decode."""


@dataclass(eq=False)
class _OpenSpan:
    """A span that the pipeline is in, and its range in the trace while that is recorded."""

    span: Span
    range: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        index = self.span.index
        return f"{self.span.kind}:{self.span.name if index is None else index}"

    def begin_range(self) -> None:
        self.range.enter_context(record_function(self.name))


@dataclass
class _Stretch:
    """What is being recorded, since which span, and which steps it holds so far."""

    profiler: profile
    first: Span
    phase: str | None
    steps: list[int] = field(default_factory=list)

    @property
    def is_warm_up(self) -> bool:
        return self.first.kind == "step" and (self.first.index or 0) < FIRST_ACTIVE_STEP


class Tracer:
    """Listens to a pipeline and records a trace; for a pass of its own.

    Every span in a recorded stretch is a range there, such as "phase:denoise", "step:3", "block:7", "video:0",
    "component:t5" or "release:t5". The run needs `num_steps` denoising steps.

    Args:
        runtime: where the pipeline computes. With CUDA, what the device does is recorded as well.
        folder: where `trace_rank<rank>.pt.trace.json.gz` goes; TensorBoard knows traces by this ending.
        rank: of this process.
        with_stack: whether to record Python's calls, too, which makes the file larger and the run slower.
        max_bytes: most that the file may hold, uncompressed.
    """

    wants_blocks = True

    def __init__(
        self, runtime: Runtime, folder: Path, rank: int = 0, *, with_stack: bool = False, max_bytes: int = GIB
    ) -> None:
        self._runtime = runtime
        self._with_stack = with_stack
        self._max_bytes = max_bytes
        path = folder / f"trace_rank{rank}.pt.trace.json.gz"
        self._file = TraceFile(path, max_bytes=max_bytes, title=f"rank {rank}")
        self._open: list[_OpenSpan] = []
        self._stretch: _Stretch | None = None
        self._active = range(FIRST_ACTIVE_STEP, self.num_steps)
        self._num_blocks = 0  # ended since the last step began
        self._most_blocks = WARM_UP_BLOCKS
        self._block_bytes = 0
        self._phases: list[str] = []
        self._steps: list[int] = []
        self._stopped: list[str] = []
        self._has_failed = False

    @property
    def num_steps(self) -> int:
        """Denoising steps that the schedule needs."""
        return FIRST_ACTIVE_STEP + ACTIVE_STEPS

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Surrounds the run. When it is left the file is there, also after an exception, which passes through.

        Raises:
            OSError: the file cannot be written.
        """
        with self._profiler():
            pass  # its first start imports modules and sets up the device, which belongs in no stretch
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        self._file.close()

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Records a span where it lies in a stretch that is wanted."""
        entry = self._enter(span)
        try:
            yield
        except GeneratorExit:  # a loop over blocks is given up; the reason is on its way to the span around it
            raise
        except BaseException as error:
            self._fail(error)
            raise
        self._leave(entry)

    def result(self) -> dict[str, Any]:
        """What the file holds: sizes in bytes, number of events, phases, whole steps; and why not more."""
        path = self._file.path
        is_there = self._file.num_events > 0 and path.exists()
        return {
            "files": [path.name] if is_there else [],
            "bytes": path.stat().st_size if is_there else 0,
            "uncompressed_bytes": self._file.uncompressed_bytes,
            "num_events": self._file.num_events,
            "phases": self._phases if is_there else [],
            "steps": self._steps if is_there else [],
            "stopped": "; ".join(self._stopped),
        }

    def _enter(self, span: Span) -> _OpenSpan:
        entry = _OpenSpan(span)
        self._open.append(entry)
        if span.kind == "step":
            if span.index == FIRST_ACTIVE_STEP:
                self._plan(self._num_blocks)
            self._num_blocks = 0
        if self._stretch is not None:
            entry.begin_range()
        elif self._begins_stretch(span):
            self._start(span)
        return entry

    def _leave(self, entry: _OpenSpan) -> None:
        while self._open[-1] is not entry:  # a block whose loop was given up
            self._open.pop().range.close()
        self._open.pop().range.close()
        if entry.span.kind == "block":
            self._num_blocks += 1
        if self._stretch is not None:
            if entry.span.kind == "step" and entry.span.index is not None:
                self._stretch.steps.append(entry.span.index)
            if self._ends_stretch(entry.span, self._stretch):
                self._stop(self._stretch)

    def _begins_stretch(self, span: Span) -> bool:
        if self._has_failed:
            return False
        if span.kind == "phase":
            return span.name in WHOLE_PHASES
        if span.kind == "step":
            return span.index in range(WAIT_STEPS, self._active.stop)
        return span.kind == "release" or (span.kind == "video" and span.index == 0)

    def _ends_stretch(self, span: Span, stretch: _Stretch) -> bool:
        if stretch.first.kind != "step":
            return span is stretch.first
        if span.kind == "block":
            return self._num_blocks == self._most_blocks
        is_last_step = span.kind == "step" and span.index == self._active.stop - 1
        return stretch.is_warm_up or is_last_step or span.kind == "phase"

    def _plan(self, blocks_per_step: int) -> None:
        """Chooses the steps that will be recorded, or how many blocks of the first if it is too large."""
        self._most_blocks = 0
        step_bytes, room_bytes = blocks_per_step * self._block_bytes, int(STEPS_SHARE * self._file.room_bytes)
        if step_bytes * ACTIVE_STEPS <= room_bytes:
            return
        num_steps = room_bytes // step_bytes
        what = f"{num_steps} of {ACTIVE_STEPS} steps"
        if num_steps == 0:
            self._most_blocks = max(1, room_bytes // self._block_bytes)
            what = f"{self._most_blocks} of the {blocks_per_step} blocks of step {FIRST_ACTIVE_STEP}"
        self._active = range(FIRST_ACTIVE_STEP, FIRST_ACTIVE_STEP + max(1, num_steps))
        self._stopped.append(
            f"{what}: a step takes about {format_bytes(step_bytes)}, and a trace may have "
            f"{format_bytes(self._max_bytes)}; a smaller size or fewer frames give a smaller one"
        )

    def _profiler(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        return profile(activities=activities, record_shapes=True, profile_memory=True, with_stack=self._with_stack)

    def _start(self, span: Span) -> None:
        self._runtime.synchronize()  # what is still running belongs to no range of this stretch
        profiler = self._profiler()
        phase = next((entry.span.name for entry in self._open if entry.span.kind == "phase"), None)
        self._stretch = _Stretch(profiler, span, phase)
        profiler.start()
        for entry in self._open:
            entry.begin_range()

    def _stop(self, stretch: _Stretch) -> None:
        self._stretch = None
        for entry in reversed(self._open):
            entry.range.close()
        stretch.profiler.stop()
        part = self._file.path.with_name(f".{self._file.path.name}.stretch.json")
        try:
            stretch.profiler.export_chrome_trace(str(part))
            if stretch.is_warm_up:
                self._block_bytes = part.stat().st_size // max(1, self._num_blocks)
            else:
                self._keep(stretch, part)
        finally:
            part.unlink(missing_ok=True)

    def _keep(self, stretch: _Stretch, part: Path) -> None:
        if not self._file.append(part):
            what = stretch.phase or f"{stretch.first.kind} of {stretch.first.name}"
            self._stopped.append(
                f"no {what}: it takes {format_bytes(part.stat().st_size)}, and of the "
                f"{format_bytes(self._max_bytes)} that a trace may have {format_bytes(self._file.room_bytes)} are left"
            )
            return
        if stretch.phase is not None and stretch.phase not in self._phases:
            self._phases.append(stretch.phase)
        self._steps += stretch.steps

    def _fail(self, error: BaseException) -> None:
        """Writes what was recorded until now; nothing more will be."""
        if self._has_failed:
            return
        self._has_failed = True
        place = ", ".join(entry.name for entry in self._open) or "no span"
        self._stopped.append(f"{type(error).__name__} in {place}")
        try:
            if self._stretch is not None:
                self._stop(self._stretch)
            self._file.close()
        except Exception as problem:  # noqa: BLE001  # the run's own error is the one to pass on
            self._stopped.append(f"the trace could not be written: {problem}")
