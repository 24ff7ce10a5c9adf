"""The runs that a job is made of: one that is measured, and extra ones that record what a measured run must not."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from wan_sweep.build import build_layout
from wan_sweep.compare import is_alone
from wan_sweep.headline import PEAK_RANK
from wan_sweep.launch import Event, Limits, Result, launch
from wan_sweep.launch.slots import NOTHING, Lease, Slots, lock_folder
from wan_sweep.launch.world import Leader, WorldError
from wan_sweep.memory_events import write_memory_events
from wan_sweep.nvml import visible_gpus
from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.schema import Job
from wan_sweep.store import (
    ATTRIBUTION,
    CONFIG_FILE,
    ESTIMATE,
    JOB_FILE,
    MEASURE,
    TRACE,
    Pass,
    rank_folder,
    write_config,
    write_json,
)

JOB_SCHEMA_VERSION = 2

_PEAK = "memory/peak/allocated_bytes"


def extra_passes(job: Job, measured: Result) -> list[Pass]:
    """What else to run: who fills the device, if asked for or if it was full; a trace, if asked for."""
    if job.mode == "estimate":
        return []
    passes = []
    was_full = measured.outcome == "oom" and bool(measured.measurement)
    if was_full or (measured.outcome == "ok" and (job.profile_memory or job.snapshot)):
        passes.append(ATTRIBUTION)
    if measured.outcome == "ok" and job.trace:
        passes.append(TRACE)
    return passes


class Passes:
    """Runs the passes of the jobs of a sweep, each in its job's folder.

    Args:
        plan: of the sweep.
        on_event: hears what the worker tells.
        world: has the workers started where torchrun has started the sweep itself.
    """

    def __init__(self, plan: Plan, on_event: Callable[[Event], None], world: Leader | None = None) -> None:
        self._plan = plan
        self._on_event = on_event
        self._world = world
        self._lease = NOTHING

    @contextmanager
    def on_gpus(self, job: Job, on_wait: Callable[[], None]) -> Iterator[Lease]:
        """The GPUs for all passes of a job, which no other job has meanwhile unless it may share.

        Args:
            job: the job.
            on_wait: is told, once, that they are not free yet.

        Raises:
            UsageError: this machine has fewer than the job needs.
        """
        self._lease = NOTHING
        if job.device != "cuda" or job.mode == "estimate":
            yield NOTHING
            return
        if self._world is not None:  # torchrun has given them out
            self._lease = Lease(indices=tuple(range(self._world.num_here)))
            yield self._lease
            return
        slots = Slots(lock_folder(), visible_gpus())
        with slots.take(build_layout(job).world_size, shares=job.share_gpu, on_wait=on_wait) as self._lease:
            yield self._lease

    def measure(self, entry: PlannedJob, command: Sequence[str]) -> Result:
        """The pass that gives the numbers, measured or estimated, and the document of its events."""
        folder = self._plan.folder / entry.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / JOB_FILE, self._assignment(entry))
            write_config(folder / CONFIG_FILE, entry.job.to_dict())
            result = self._start(entry, ESTIMATE if entry.job.mode == "estimate" else MEASURE, command)
        except WorldError as error:
            return Result(outcome="failed", reason=str(error), failure={"kind": "world", "where": ""})
        except OSError as error:
            reason = f"the job could not be started: {error}; see that {folder} can be written and has space"
            return Result(outcome="failed", reason=reason, failure={"kind": "folder", "where": str(folder)})
        told = result.measurement.get("environment", {})
        device = str(told.get("device") or self._plan.environment.get("gpu") or entry.job.device)
        try:
            num_ranks = build_layout(entry.job).world_size
            for rank in range(num_ranks):
                head = {**self._identity(entry), "device": device, "mode": entry.job.mode}
                write_memory_events(rank_folder(folder, rank), {**head, "rank": rank, "num_ranks": num_ranks})
        except OSError as error:
            warning = {
                "code": "no_memory_events",
                "text": f"memory_events.json could not be written: {error.strerror or error}",
                "advice": f"{MEASURE.events} holds the same; make space",
            }
            return replace(result, warnings=(*result.warnings, warning))
        return result

    def run_again(self, entry: PlannedJob, one: Pass, measured: Result, command: Sequence[str]) -> dict[str, Any]:
        """An extra pass, as the record keeps it; whatever goes wrong with it, the job's outcome stands."""
        started = time.monotonic()
        try:
            result = self._start(entry, one, command)
        except (OSError, WorldError) as error:
            return {"outcome": "failed", "reason": str(error), "seconds": time.monotonic() - started}
        told = {"outcome": result.outcome, "reason": result.reason, "seconds": time.monotonic() - started}
        if one is ATTRIBUTION:
            return {**told, **_peak_differences(result, measured)}
        if not result.by_rank:
            return {**result.measurement, **told}
        files = [name for _, one_told in sorted(result.by_rank.items()) for name in one_told.get("files", [])]
        num_bytes = sum(one_told.get("bytes", 0) for one_told in result.by_rank.values())
        ranks = [{"rank": rank, **one_told} for rank, one_told in sorted(result.by_rank.items())]
        return {**result.measurement, **told, "files": files, "bytes": num_bytes, "ranks": ranks}

    def _start(self, entry: PlannedJob, one: Pass, command: Sequence[str]) -> Result:
        job, is_one_process = entry.job, one is ESTIMATE  # which goes through all ranks
        return launch(
            self._plan.folder / entry.name,
            limits=Limits(timeout_s=job.timeout_s, stall_timeout_s=job.stall_timeout_s),
            on_event=self._on_event,
            command=command,
            lease=self._lease,
            one=one,
            num_ranks=1 if is_one_process else build_layout(job).world_size,
            world=None if is_one_process else self._world,
        )

    def _identity(self, entry: PlannedJob) -> dict[str, object]:
        return {
            "job": {"key": entry.key, "number": entry.number, "name": entry.name, "repeat": entry.repeat},
            "sweep": {"name": self._plan.name, "id": self._plan.id, "folder": str(self._plan.folder)},
        }

    def _assignment(self, entry: PlannedJob) -> dict[str, object]:
        others = [one.job.to_dict() for one in self._plan.own_jobs if one.number != entry.number]
        is_known_to_be_alone = bool(self._plan.jobs) and is_alone(entry.job.to_dict(), others)
        return {
            "schema_version": JOB_SCHEMA_VERSION,
            **self._identity(entry),
            "knobs": entry.job.to_dict(),
            "keeps_outputs": entry.job.fidelity and not is_known_to_be_alone,
        }


def _peak_differences(result: Result, measured: Result) -> dict[str, Any]:
    """How far the peak of the pass is from the measured one, in bytes, by rank; the job's is its fullest rank's."""
    if measured.outcome != "ok":
        return {}
    if not result.by_rank:
        difference = _peak_difference(result.measurement, measured.measurement)
        return {} if difference is None else {"peak_difference_bytes": difference}
    metrics = {rank["rank"]: rank for rank in measured.measurement.get("ranks", [])}
    ranks = [
        {
            "rank": rank,
            "outcome": told["outcome"],
            "peak_difference_bytes": _peak_difference(told, metrics.get(rank, {})),
        }
        for rank, told in sorted(result.by_rank.items())
    ]
    fullest = measured.measurement.get("metrics", {}).get(PEAK_RANK)
    differences = {rank["rank"]: rank["peak_difference_bytes"] for rank in ranks}
    return {"ranks": ranks, "peak_difference_bytes": differences.get(fullest)}


def _peak_difference(told: Mapping[str, Any], measured: Mapping[str, Any]) -> int | None:
    peaks, peak = told.get("peaks") or [], measured.get("metrics", {}).get(_PEAK)
    return peaks[0]["allocated_bytes"] - peak if peaks and peak is not None else None
