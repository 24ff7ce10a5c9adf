"""From a job and a card to the numbers that a measured run of the job has, under the same names."""

import time
from dataclasses import asdict
from typing import Any

import torch

from wan_sweep.allocator import Settings
from wan_sweep.estimate.cards import Card
from wan_sweep.estimate.dry_run import DryRun, Simulation, dry_run
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.memory import Holding, Moment
from wan_sweep.measure.failure import explain
from wan_sweep.measure.live_items import describe
from wan_sweep.measure.live_set import Allocation, Place
from wan_sweep.measure.live_set import Moment as NamedMoment
from wan_sweep.schema import Job
from wan_sweep.units import GIB

BASES = ("exact", "rule", "table", "guess")
OF_THIS_PROCESS = ("time/", "memory/peak/host_rss_bytes")
"""Metrics that the recorder takes from the process that it runs in, which here is not that of the job."""

DEFAULT_SETTINGS = Settings()


def estimate(job: Job, card: Card, settings: Settings = DEFAULT_SETTINGS) -> dict[str, Any]:
    """What the job will take on the card: bytes, who holds them, and how sure that is.

    To be called in a process of its own, which must use no GPU: it changes what CUDA means to torch in this process.

    Args:
        job: resolved.
        card: where it would run.
        settings: of torch's allocator there.

    Returns:
        outcome, reason and failure as of a measured run; metrics, series and warnings under the same names; `peaks` in
        the form of attribution.json; `confidence` by phase, which says how many bytes of the peak are exact, follow
        from a rule, come from the kernel table, or are a guess, and up to where the peak may go; `kernels`, the row of
        the table; seconds that the estimate took.
    """
    started = time.perf_counter()
    limit = None if job.memory_limit_gib is None else int(job.memory_limit_gib * GIB)
    simulation = Simulation(card, settings, limit_bytes=limit)
    run = dry_run(job, simulation)
    row, is_measured = row_for(card)
    moments = simulation.memory.peaks()
    possible = simulation.memory.possible_peaks()
    return {
        **_outcome(run, limit),
        "metrics": {name: value for name, value in run.metrics.items() if not name.startswith(OF_THIS_PROCESS)},
        "series": {name: values for name, values in run.series.items() if name != "step/seconds"},
        "warnings": run.warnings + _doubts(job, card),
        "peaks": _peaks(moments),
        "confidence": {phase: _confidence(moment, possible[phase]) for phase, moment in moments.items() if phase},
        "kernels": {**asdict(row), "is_measured": is_measured},
        "allocator": {**asdict(settings), "roundup_divisions": list(settings.roundup_divisions)},
        "environment": {"torch": torch.__version__, **simulation.runtime.facts()},
        "seconds": time.perf_counter() - started,
    }


def _outcome(run: DryRun, limit_bytes: int | None) -> dict[str, Any]:
    if run.error is None:
        return {"outcome": "ok", "reason": "", "failure": None}
    return explain(run.error, run.failed_at, limit_bytes)


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
