"""From a job and a card to the numbers that a measured run of the job has, under the same names."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wan21.options import idle_knobs
from wan_sweep.allocator import Settings
from wan_sweep.build import build_options, build_request, build_spec
from wan_sweep.cards import Card
from wan_sweep.estimate.clock import LowerBoundClock, all_steps
from wan_sweep.estimate.dry_run import MOST_STEPS, SILENT_SINK, DryRun, Simulation, dry_run
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.lower_bound import lower_bounds
from wan_sweep.estimate.memory import Holding, Moment
from wan_sweep.measure.failure import explain
from wan_sweep.measure.live_items import describe
from wan_sweep.measure.live_set import Allocation, Place
from wan_sweep.measure.live_set import Moment as NamedMoment
from wan_sweep.measure.recorder import Sink
from wan_sweep.schema import Job
from wan_sweep.units import GIB, format_bytes

BASES = ("exact", "rule", "table", "guess")
OF_THIS_PROCESS = ("time/", "memory/peak/host_rss_bytes")
"""Metrics that the recorder takes from the process that it runs in, which here is not that of the job."""
ALLOCATED, RESERVED = "memory/peak/allocated_bytes", "memory/peak/reserved_bytes"

DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True, kw_only=True)
class Room:
    """What torch's allocator may take of a card.

    Attributes:
        num_bytes: beside the context and NCCL, or as the job's limit says.
        limit_bytes: the job's limit, if it has one.
    """

    num_bytes: int
    limit_bytes: int | None

    @classmethod
    def of(cls, job: Job, card: Card, outside_bytes: int) -> "Room":
        """On this card for this job, whose process holds so much outside the allocator."""
        limit = None if job.memory_limit_gib is None else int(job.memory_limit_gib * GIB)
        beside_context = card.device_bytes - outside_bytes
        return cls(num_bytes=beside_context if limit is None else min(beside_context, limit), limit_bytes=limit)


def estimate(
    job: Job, card: Card, settings: Settings = DEFAULT_SETTINGS, sink: Sink = SILENT_SINK, *, rank: int = 0
) -> dict[str, Any]:
    """What the job will take on the card: bytes, who holds them, and how sure that is.

    To be called in a process of its own, which must use no GPU: it changes what CUDA means to torch in this process.

    Args:
        job: resolved.
        card: where it would run.
        settings: of torch's allocator there.
        sink: gets the boundaries of the run, with times that are lower bounds.
        rank: of a job of several, the one to tell of; `ranks.estimate_ranks` tells of all.

    Returns:
        outcome, reason and failure as of a measured run: oom if it does not fit. Metrics, series and warnings under the
        same names, of a run on a card that is large enough, so that they say what it would need; no times but
        `time/lower_bound/...`. `peaks` in the form of attribution.json. `estimate`: card and room; `confidence` by
        phase, which says how many bytes of the peak are exact, follow from a rule, come from the kernel table, or are a
        guess, and up to where the peak may go; the row of the kernel table; the allocator's settings; seconds that the
        estimate took.
    """
    started = time.perf_counter()
    spec, options, request = build_spec(job), build_options(job), build_request(job)
    bounds = lower_bounds(spec, options, request, card)
    num_run = min(MOST_STEPS, request.num_steps)
    bandwidth = card.memory_bandwidth if job.ckpt_dir is None else card.link_bandwidth  # random weights are drawn there
    clock = LowerBoundClock(sink, bounds, load_bandwidth=bandwidth, num_steps=request.num_steps, num_run=num_run)
    simulation = Simulation(card, settings)
    run = dry_run(job, simulation, rank=rank, sink=clock)
    moments, possible = simulation.memory.peaks(), simulation.memory.possible_peaks()
    metrics = {name: value for name, value in run.metrics.items() if not name.startswith(OF_THIS_PROCESS)}
    confidence = {phase: _confidence(moment, possible[phase]) for phase, moment in moments.items() if phase}
    room = Room.of(job, card, simulation.runtime.outside_bytes)
    row, is_measured = row_for(card)
    ending = _ending(job, card, settings, run, room, rank)
    return {
        **ending,
        "metrics": metrics | _times(clock, bounds),
        "series": {
            name: all_steps(list(values), num_steps=request.num_steps, num_run=num_run)
            for name, values in run.series.items()
            if name != "step/seconds"
        },
        "warnings": run.warnings
        + _doubts(job, card)
        + _uncounted(simulation.runtime.num_communicators, card)
        + _strangers(simulation.memory.unknown_operations)
        + _near_misses(ending, metrics, confidence, room),
        "idle_knobs": idle_knobs(options, job.device),
        "peaks": _peaks(moments),
        "estimate": {
            "card": card.name,
            "card_bytes": card.device_bytes,
            "room_bytes": room.num_bytes,
            "confidence": confidence,
            "kernels": {
                **{name: value for name, value in row.to_json().items() if name != "convolutions"},
                "num_convolutions": len(row.convolutions),
                "is_measured": is_measured,
            },
            "allocator": {**asdict(settings), "roundup_divisions": list(settings.roundup_divisions)},
            "seconds": time.perf_counter() - started,
        },
        "environment": {
            "torch": torch.__version__,
            "gpu": card.name,
            "gpu_memory_bytes": str(card.device_bytes),
            **simulation.runtime.facts(),
        },
    }


def _ending(job: Job, card: Card, settings: Settings, run: DryRun, room: Room, rank: int) -> dict[str, Any]:
    """Whether it fits.

    Where more would be reserved than there is room, a run on the real size tells: the allocator may get by with less,
    and gives back what it holds unused.
    """
    if run.error is not None:
        return explain(run.error, run.failed_at, room.limit_bytes)
    if run.metrics[RESERVED] <= room.num_bytes:
        return {"outcome": "ok", "reason": "", "failure": None}
    limited = dry_run(job, Simulation(card, settings, capacity_bytes=room.num_bytes), rank=rank)
    if limited.error is None:
        return {"outcome": "ok", "reason": "", "failure": None}
    told = explain(limited.error, limited.failed_at, room.limit_bytes)
    if told["outcome"] != "oom":
        return told
    needed = format_bytes(run.metrics["memory/peak/device_used_bytes"])
    where = f"the {format_bytes(card.device_bytes)} of the {card.name}"
    if room.limit_bytes is not None:
        where = f"{format_bytes(room.limit_bytes)} of the {card.name}"
    return {**told, "reason": f"does not fit into {where}: {told['reason']}; in all it needs {needed}"}


def _times(clock: LowerBoundClock, bounds: dict[str, float]) -> dict[str, float]:
    phases = {f"time/lower_bound/{phase}_s": seconds for phase, seconds in clock.seconds.items()}
    total = sum(clock.seconds.values())
    return {**phases, "time/lower_bound/step_s": bounds["step"], "time/lower_bound/total_s": total}


def _near_misses(
    ending: dict[str, Any], metrics: dict[str, int | float], confidence: dict[str, Any], room: Room
) -> list[dict[str, str]]:
    """What could go otherwise on a real card of this size."""
    if ending["outcome"] != "ok":
        return []
    if metrics[RESERVED] > room.num_bytes:
        return [
            {
                "code": "allocator_at_limit",
                "text": "it fits only since the allocator gives memory back and asks again, which costs time",
                "advice": "choose a saving more, or expandable segments",
            }
        ]
    doubt = max((one["at_most_bytes"] - one["allocated_bytes"] for one in confidence.values()), default=0)
    if metrics[RESERVED] + doubt > room.num_bytes:
        return [
            {
                "code": "may_not_fit",
                "text": f"it may not fit: kernels that nobody measured may take {format_bytes(doubt)} more",
                "advice": "calibrate on such a card, or choose a saving more",
            }
        ]
    return []


def _strangers(operations: set[str]) -> list[dict[str, str]]:
    return [
        {
            "code": "custom_kernel",
            "text": f"{operation} is a kernel that no table knows: its results are counted, and no workspace",
            "advice": "measure a run with it, or choose torch's own kernels",
        }
        for operation in sorted(operations)
    ]


def _uncounted(num_communicators: int, card: Card) -> list[dict[str, str]]:
    row, _ = row_for(card)
    if not num_communicators or row.nccl_bytes_per_communicator is not None:
        return []
    return [
        {
            "code": "nccl_not_counted",
            "text": f"what NCCL holds outside torch's allocator is not counted in device_used: nobody measured it with "
            f"{row.describe()}; groups of processes here: {num_communicators}",
            "advice": "leave some hundred MiB of the card free, or calibrate on two such cards",
        }
    ]


def _doubts(job: Job, card: Card) -> list[dict[str, str]]:
    row, is_measured = row_for(card)
    doubts = []
    if not is_measured:
        doubts.append(
            {
                "code": "kernels_not_measured",
                "text": f"what kernels take for themselves was not measured on {card.name}; figures of "
                f"{row.describe()} stand in",
                "advice": "take the upper end of the interval, or measure once on such a card",
            }
        )
    if job.ckpt_dir is not None:
        doubts.append(
            {
                "code": "checkpoint_not_read",
                "text": f"ckpt_dir={job.ckpt_dir} was not opened: loading is estimated as that of random weights, and "
                "the prompt's length in tokens with the built-in tokenizer",
                "advice": "encode_text may differ by some MiB; denoise and decode do not depend on it",
            }
        )
    return doubts


def _confidence(moment: Moment, possible_bytes: int) -> dict[str, Any]:
    """Bytes of a peak by where they come from; what the allocator rounds up follows from its rules."""
    by_basis = dict.fromkeys(BASES, 0)
    for holding in moment.holdings:
        by_basis[holding.basis] += holding.num_bytes
    by_basis["rule"] += moment.allocated_bytes - sum(by_basis.values())
    return {
        "allocated_bytes": moment.allocated_bytes,
        "by_basis_bytes": by_basis,
        "at_most_bytes": max(moment.allocated_bytes, possible_bytes),
    }


def _peaks(moments: dict[str, Moment]) -> list[dict[str, Any]]:
    """The whole run's peak, then each phase's, in the form of attribution.json."""
    phases = [moment for phase, moment in moments.items() if phase]
    highest = max(phases, key=lambda moment: moment.allocated_bytes, default=None)
    described = [describe(_named(moment), "phase") for moment in phases]
    return ([] if highest is None else [describe(_named(highest), "run")]) + described


def _named(moment: Moment) -> NamedMoment:
    return NamedMoment(
        allocated_bytes=moment.allocated_bytes,
        before_bytes=moment.allocated_bytes - sum(holding.num_bytes for holding in moment.holdings),
        allocations=[_allocation(holding) for holding in moment.holdings],
        place=Place(phase=moment.place.phase, step=moment.place.step, block=moment.place.block),
        operation=moment.operation,
    )


def _allocation(holding: Holding) -> Allocation:
    place = holding.place
    return Allocation(
        time=0,
        address=0,
        num_bytes=holding.num_bytes,
        place=Place(phase=place.phase, step=place.step, block=place.block),
        operation=holding.operation,
        shape=holding.shape,
        dtype=None if holding.dtype is None else str(holding.dtype).removeprefix("torch."),
        weights_of=place.component,
        is_freed_inside=holding.shape is None,  # what a kernel took for itself
    )
