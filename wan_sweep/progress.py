"""Shows where a sweep is: live on a terminal, as occasional lines elsewhere. It must cost the jobs nothing."""

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from wan_sweep.launch.events import Event
from wan_sweep.units import format_seconds

_REFRESHES_PER_SECOND = 2
_SECONDS_BETWEEN_LINES = 10.0

_STYLES = {"ok": "green", "skipped": "cyan", "refused": "yellow", "oom": "magenta", "failed": "red", "timeout": "red"}


class Estimate:
    """How long the rest will take: from the jobs that are done, or for the first one from its steps."""

    def __init__(self, num_jobs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_left = num_jobs
        self._clock = clock
        self._durations: list[float] = []
        self._started = 0.0
        self._is_running = False
        self._first_step: tuple[int, float] | None = None
        self._step: tuple[int, int, float] | None = None

    def start_job(self) -> None:
        """A job begins."""
        self._started, self._is_running = self._clock(), True
        self._first_step = self._step = None

    def event(self, event: Event) -> None:
        """The job tells something."""
        if event.kind != "step" or event.index is None or not event.total or event.event != "end":
            return
        now = self._clock()
        if self._first_step is None:
            # The first step holds one-time costs, so counting begins at its end.
            self._first_step = (event.index, now)
        self._step = (event.index, event.total, now)

    def start_pass(self) -> None:
        """The job goes on after what its steps told of: how much longer, nobody knows until one job has done it."""
        self._first_step = self._step = None

    def end_job(self) -> None:
        """The job is over."""
        if self._is_running:
            self._durations.append(self._clock() - self._started)
        self._is_running = False
        self._num_left -= 1

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the end of the sweep; None when there is nothing to go by, or to do."""
        if self._num_left <= 0:
            return None
        elapsed = self._clock() - self._started if self._is_running else 0.0
        if self._durations:
            mean = sum(self._durations) / len(self._durations)
            return max(0.0, mean - elapsed) + mean * (self._num_left - 1)
        if self._first_step is None or self._step is None or self._step[0] == self._first_step[0]:
            return None
        index, total, at = self._step
        per_step = (at - self._first_step[1]) / (index - self._first_step[0])
        rest = max(0.0, per_step * (total - 1 - index) - (self._clock() - at))
        return rest + (elapsed + rest) * (self._num_left - 1)

    def __str__(self) -> str:
        remaining = self.remaining_s
        return "" if remaining is None else f"about {format_seconds(remaining)} left"


class Display(Protocol):
    """Shows the jobs of a sweep one after the other."""

    def start_job(self, number: int, name: str) -> None:
        """A job begins."""

    def start_pass(self, name: str) -> None:
        """The job, which has been measured, runs once more for this."""

    def event(self, event: Event) -> None:
        """The running job tells something."""

    def end_job(self, number: int, name: str, outcome: str, reason: str, seconds: float) -> None:
        """A job is over."""

    def close(self) -> None:
        """The sweep is over, however it ended."""


def _title(number: int, num_jobs: int) -> str:
    return f"job {number} of {num_jobs}" if num_jobs else f"job {number}"


def _ending(number: int, name: str, outcome: str, reason: str, seconds: float) -> Text:
    text = Text(f"  job {number} {name}: ")
    text.append(outcome, style=_STYLES.get(outcome, ""))
    text.append(f" in {format_seconds(seconds)}")
    if reason:
        text.append(f" - {reason}")
    return text


class LiveDisplay:
    """Two bars at the bottom of a terminal: jobs, and steps of the running one."""

    def __init__(self, num_jobs: int, num_runs: int, console: Console) -> None:
        self._console = console
        self._num_jobs = num_jobs
        self._estimate = Estimate(num_runs)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._all: TaskID = self._bars.add_task("sweep", total=num_runs or None, note="")
        self._steps: TaskID | None = None
        self._phase = ""
        self._pass = ""
        self._live = Live(self._bars, console=console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True)
        self._live.start()

    def start_job(self, number: int, name: str) -> None:
        self._estimate.start_job()
        self._bars.update(self._all, description=_title(number, self._num_jobs), note=str(self._estimate))
        self._steps = self._bars.add_task(name, total=None, note="starting")
        self._pass = ""

    def start_pass(self, name: str) -> None:
        self._pass = f"{name}: "
        self._estimate.start_pass()
        self._bars.update(self._all, note=str(self._estimate))
        if self._steps is not None:
            self._bars.update(self._steps, completed=0, total=None, note=f"{self._pass}starting")

    def event(self, event: Event) -> None:
        if not self._pass:
            self._estimate.event(event)
        if self._steps is None or event.kind == "block":
            return
        if event.kind == "step" and event.index is not None:
            done = event.index + (event.event == "end")
            total = "" if event.total is None else f" of {event.total}"
            note = f"{self._pass}{self._phase}, step {event.index + 1}{total}"
            self._bars.update(self._steps, completed=done, total=event.total, note=note)
            self._bars.update(self._all, note=str(self._estimate))
        elif event.event == "begin":
            if event.kind == "phase":
                self._phase = event.name
            note = self._phase if event.kind == "phase" else f"{self._phase}, {event.name}"
            self._bars.update(self._steps, note=f"{self._pass}{note}")

    def end_job(self, number: int, name: str, outcome: str, reason: str, seconds: float) -> None:
        self._estimate.end_job()
        if self._steps is not None:
            self._bars.remove_task(self._steps)
            self._steps = None
        self._bars.update(self._all, advance=1, note=str(self._estimate))
        self._console.print(_ending(number, name, outcome, reason, seconds), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


class PlainDisplay:
    """Lines: one at the start and one at the end of a job, and now and then one in between."""

    def __init__(
        self, num_jobs: int, num_runs: int, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._num_jobs = num_jobs
        self._clock = clock
        self._estimate = Estimate(num_runs, clock)
        self._last = 0.0
        self._phase = ""
        self._pass = ""

    def _print(self, text: str | Text) -> None:
        self._last = self._clock()
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def start_job(self, number: int, name: str) -> None:
        self._estimate.start_job()
        left = str(self._estimate)
        self._print(f"{_title(number, self._num_jobs)}: {name}" + (f" ({left})" if left else ""))
        self._pass = ""

    def start_pass(self, name: str) -> None:
        self._pass = f"{name}: "
        self._estimate.start_pass()

    def event(self, event: Event) -> None:
        if not self._pass:
            self._estimate.event(event)
        if event.event != "begin" or event.kind == "block":
            return
        if event.kind == "phase":
            self._phase = event.name
        if self._clock() - self._last < _SECONDS_BETWEEN_LINES:
            return
        words = [self._phase]
        if event.kind == "step" and event.index is not None:
            words.append(f"step {event.index + 1}" + ("" if event.total is None else f" of {event.total}"))
        elif event.kind == "component":
            words.append(event.name)
        self._print(f"  {self._pass}" + ", ".join(filter(None, [*words, str(self._estimate)])))

    def end_job(self, number: int, name: str, outcome: str, reason: str, seconds: float) -> None:
        self._estimate.end_job()
        self._print(_ending(number, name, outcome, reason, seconds))

    def close(self) -> None:
        pass


def make_display(num_jobs: int, num_runs: int, console: Console) -> Display:
    """The display that fits where the output goes.

    Args:
        num_jobs: Jobs with a number of their own; 0 where nobody knows yet.
        num_runs: Those that will run.
        console: Where to show it.
    """
    kind = LiveDisplay if console.is_terminal else PlainDisplay
    return kind(num_jobs, num_runs, console)
