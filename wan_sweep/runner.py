"""A sweep under way: runs its jobs one after the other and turns each into a record, a row and an MLflow run."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock
from rich.console import Console
from rich.text import Text

from wan_sweep.compare import References
from wan_sweep.errors import SweepError, UsageError
from wan_sweep.headline import headline, with_metrics
from wan_sweep.launch import WORKER, Interrupted, Result
from wan_sweep.launch.events import Event
from wan_sweep.launch.slots import Lease
from wan_sweep.launch.world import Leader
from wan_sweep.passes import Passes, extra_passes
from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.progress import Display
from wan_sweep.record import FAILURES, RECORD_FILE, Record, load_record, load_records
from wan_sweep.store import rank_folder, write_record
from wan_sweep.units import format_bytes, format_seconds

logger = logging.getLogger(__name__)

EXIT_FAILED = 1

_LOCK = ".running.lock"
_WAITS = "  waits until other jobs leave GPUs free"


class JobTracker(Protocol):
    """Where runs are logged besides the files."""

    def open(self) -> None:
        """Gets ready, before the first job starts."""

    def log_job(self, record_path: Path) -> None:
        """Logs a job from its record."""

    def close_sweep(self, sweep_dir: Path) -> str | None:
        """Logs the sweep itself; returns the link to it."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Sweep:
    """A sweep whose folder exists and whose plan is written.

    Args:
        plan: What to do.
        console: Where the report goes.
        display: Shows the running job; None in a process that another one watches.
        tracker: Logs the jobs; None where there is nothing to log to.
        world: The others, where torchrun has started the sweep itself.
        is_part: Whether this process has a part of the jobs only, at the same time as others; the one that planned the
            sweep puts them together.
    """

    def __init__(
        self,
        plan: Plan,
        console: Console,
        *,
        display: Display | None = None,
        tracker: JobTracker | None = None,
        world: Leader | None = None,
        is_part: bool = False,
    ) -> None:
        self.plan = plan
        self._console = console
        self._display = display
        self._tracker = tracker
        self._records: dict[int, Record] = {}
        self._logged: set[int] = set()
        self._problems: list[str] = []
        self._references = References()
        self._passes = Passes(plan, self._on_event, world)
        self._is_part = is_part

    def settle(self) -> None:
        """Writes the records of the jobs that need not run."""
        for entry in self.plan.own_jobs:
            if entry.expected != "run":
                self._settle(entry)

    def run(self, entry: PlannedJob, command: Sequence[str] = WORKER) -> str:
        """Runs a job and returns its outcome; whatever goes wrong with it, this is a value.

        Raises:
            KeyboardInterrupt: Ctrl-C came; the job's processes are gone and its record says so.
            SystemExit: likewise, SIGTERM.
        """
        if entry.number in self._records:
            return self._records[entry.number].outcome
        if self._is_part:
            # The same job can be given out twice, as when the grid has duplicates or a cluster starts a task again.
            folder = self.plan.folder / entry.name
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / _LOCK):
                if (folder / RECORD_FILE).exists():
                    return load_record(folder).outcome
                return self._run(entry, command)
        if entry.expected != "run":
            return self._settle(entry).outcome
        return self._run(entry, command)

    def _run(self, entry: PlannedJob, command: Sequence[str]) -> str:
        if self._display:
            self._display.start_job(entry.number, entry.title)
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(self._passes.on_gpus(entry.job, lambda: self._say(_WAITS)))
            except UsageError as error:
                refused = self._record(entry, Result(outcome="refused", reason=str(error)), _now(), 0.0)
                return self._end(refused, entry, 0.0)
            return self._run_on(lease, entry, command)

    def _run_on(self, lease: Lease, entry: PlannedJob, command: Sequence[str]) -> str:
        started_at, started = _now(), time.monotonic()
        interrupt: BaseException | None = None
        passes: dict[str, dict[str, Any]] = {}
        result = None
        try:
            result = self._passes.measure(entry, command)
            for one in extra_passes(entry.job, result):
                if self._display:
                    self._display.start_pass(one.name)
                passes[one.name] = self._passes.run_again(entry, one, result, command)
        except Interrupted as error:
            where = f" in {error.where}" if error.where else ""
            interrupted = Result(
                outcome="failed",
                reason=f"interrupted{where}; the same command runs it again",
                failure={"kind": "interrupted", "where": error.where},
            )
            result = result or interrupted  # numbers that are there are not lost to an extra pass that was cut short
            interrupt = error.__cause__
        seconds = time.monotonic() - started
        record = _on(lease, _with_ranks(replace(self._record(entry, result, started_at, seconds), passes=passes)))
        if interrupt:
            self._keep(record)
            self._show_end(record, entry, seconds)
            raise interrupt
        if record.outcome == "ok" and record.mode == "measure" and not self._is_part:
            record = self._references.compare(record, self.plan.folder / entry.name)
        return self._end(record, entry, seconds)

    def _end(self, record: Record, entry: PlannedJob, seconds: float) -> str:
        self._keep(record)
        self._show_end(record, entry, seconds)
        self._publish(record)
        return record.outcome

    def _show_end(self, record: Record, entry: PlannedJob, seconds: float) -> None:
        if self._display:
            self._display.end_job(entry.number, entry.title, record.outcome, record.reason, seconds)

    def finish(self) -> int:
        """Reports, and returns the exit code: not 0 if a job failed or something could not be written."""
        if self._display:
            self._display.close()
        self._collect()
        for record in self._records.values():
            self._log(record)
        self._report()
        link = self._close_tracker()
        if link:
            self._console.print(Text(link), soft_wrap=True)
        left = len(self.plan.own_jobs) - len(self._records)
        if left > 0:
            self._say(
                f"{left} of {len(self.plan.own_jobs)} jobs were not started; the same command runs what is missing."
            )
        for problem in self._problems:
            self._say(problem)
        self._say(f"Results: {self.plan.folder}")
        is_bad = self._problems or any(record.outcome in FAILURES for record in self._records.values())
        return EXIT_FAILED if is_bad else 0

    def _say(self, words: str) -> None:
        self._console.print(Text(words), soft_wrap=True)

    def _on_event(self, event: Event) -> None:
        if self._display:
            self._display.event(event)

    def _record(self, entry: PlannedJob, result: Result, started_at: str, seconds: float) -> Record:
        told = result.measurement
        warnings = [*told.get("warnings", []), *result.warnings]
        weights = told.get("weights") or (f"checkpoint {entry.job.ckpt_dir}" if entry.job.ckpt_dir else "random")
        return Record(
            key=entry.key,
            number=entry.number,
            name=entry.name,
            repeat=entry.repeat,
            sweep_name=self.plan.name,
            sweep_id=self.plan.id,
            sweep_folder=str(self.plan.folder),
            knobs=entry.job.to_dict(),
            overrides=dict(entry.overrides),
            outcome=result.outcome,
            reason=result.reason,
            failure=result.failure,
            started_at=started_at,
            ended_at=_now(),
            wall_seconds=seconds,
            mode=entry.job.mode,
            code_version=self.plan.code_version,
            environment={**self.plan.environment, **told.get("environment", {})},
            weights=weights,
            sources=told.get("sources", ""),
            metrics=told.get("metrics", {}),
            series=told.get("series", {}),
            ranks=told.get("ranks", []),
            warnings=warnings,
            idle_knobs=told.get("idle_knobs", {}),
            prompt_extension=told.get("prompt_extension"),
            checks=list(self.plan.checks),
            estimate=told.get("estimate"),
            outputs=told.get("outputs"),
        )

    def _settle(self, entry: PlannedJob) -> Record:
        if entry.expected == "done" and entry.source:
            record = self._taken_over(entry, Path(entry.source))
        else:
            record = self._record(entry, Result(outcome="refused", reason=entry.reason), _now(), 0.0)
        self._keep(record)
        return record

    def _taken_over(self, entry: PlannedJob, source: Path) -> Record:
        blank = self._record(entry, Result(outcome="skipped", reason=entry.reason), _now(), 0.0)
        older = load_record(source)
        record = replace(
            blank,
            wall_seconds=older.wall_seconds,
            environment=older.environment,
            weights=older.weights,
            metrics=older.metrics,
            series=older.series,
            ranks=older.ranks,
            warnings=older.warnings,
            idle_knobs=older.idle_knobs,
            measured_in=str(source),
            fidelity=older.fidelity,
            prompt_extension=older.prompt_extension,
            passes=older.passes,
            estimate=older.estimate,
            outputs=older.outputs,
        )
        return (
            self._references.compare(record, Path(older.measured_in or source))
            if entry.job.fidelity and record.mode == "measure"
            else record
        )

    def _keep(self, record: Record) -> None:
        self._records[record.number] = record
        try:
            write_record(self.plan.folder / record.name, record)
        except OSError as error:
            self._problems.append(
                f"The record of job {record.number} ({record.outcome}) could not be written: "
                f"{error.strerror or error}{_in_brief(record)}; make space and run the command again."
            )

    def _publish(self, record: Record) -> None:
        self._attempt("the job's timeline could not be drawn", lambda: self._draw(record))
        self._log(record)
        self._attempt("results.csv could not be written", self._write_table)

    def _log(self, record: Record) -> None:
        path = self.plan.folder / record.name / RECORD_FILE
        if self._tracker and record.number not in self._logged and path.exists():
            self._logged.add(record.number)
            try:
                self._tracker.log_job(path)
            except Exception as error:  # noqa: BLE001 - a tracker's trouble never costs a measurement
                logger.warning("MLflow did not take job %d: %s", record.number, error)

    def _close_tracker(self) -> str | None:
        if self._tracker is None:
            return None
        try:
            return self._tracker.close_sweep(self.plan.folder)
        except Exception as error:  # noqa: BLE001 - a tracker's trouble never costs a measurement
            logger.warning("MLflow did not take the sweep: %s", error)
            return None

    def _collect(self) -> None:
        """Adds the records that jobs wrote in other processes, and compares their outputs.

        Only here are all of them known: which job is the reference must not depend on which one was faster.
        """
        try:
            found = load_records(self.plan.folder)
        except SweepError as error:
            self._problems.append(f"{error}")
            return
        others = [record for record in found if record.number not in self._records]
        for record in others:
            if record.outcome == "ok" and record.knobs.get("fidelity") and record.fidelity is None:
                compared = self._references.compare(record, self.plan.folder / record.name)
                self._keep(compared)
            else:
                self._records[record.number] = record
        self._records = dict(sorted(self._records.items()))

    def _draw(self, record: Record) -> None:
        from wan_sweep.report import draw_timeline

        for rank in range(max(1, len(record.ranks))):
            draw_timeline(rank_folder(self.plan.folder / record.name, rank))

    def _write_table(self) -> None:
        from wan_sweep.report import write_table

        write_table(self.plan.folder)

    def _report(self) -> None:
        def write() -> None:
            from wan_sweep.report import print_summary, write_reports

            # The table first: it is what remains if a plot cannot be drawn.
            print_summary(self.plan.folder, self._console)
            write_reports(self.plan.folder)

        if self._records:
            self._attempt("The report could not be made", write)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the records are on disk and the sweep goes on
            logger.debug("%s", what, exc_info=True)
            problem = f"{what}: {type(error).__name__}: {error}"
            if problem not in self._problems:
                self._problems.append(problem)


def _on(lease: Lease, record: Record) -> Record:
    """The record with the GPUs that its job had, and whether others could have them at the same time."""
    if not lease.devices:
        return record
    record = replace(record, environment={**record.environment, "devices": ",".join(lease.devices)})
    if not record.knobs.get("share_gpu"):
        return record
    warning = {
        "code": "shared_gpu",
        "text": f"Other jobs may have used GPU {', '.join(lease.devices)} at the same time (share_gpu=true).",
        "advice": "Its own memory is exact all the same; do not compare its times.",
    }
    return replace(record, warnings=[*record.warnings, warning])


def _with_ranks(record: Record) -> Record:
    """The record with what its extra passes found out about single ranks."""
    told = [rank for one in record.passes.values() for rank in one.get("ranks", [])]
    more = {rank["rank"]: rank["metrics"] for rank in told if "metrics" in rank}
    if not more or len(record.ranks) == 1:
        return record
    ranks = with_metrics(record.ranks, more)
    return replace(record, ranks=ranks, metrics=headline(ranks))


def _in_brief(record: Record) -> str:
    """The numbers that a record would have kept, as far as there are any."""
    peak, total = (record.metrics.get(name) for name in ("memory/peak/allocated_bytes", "time/total_s"))
    if peak is None or total is None:
        return ""
    return f"; it had a peak of {format_bytes(peak)} allocated and took {format_seconds(total)}"
