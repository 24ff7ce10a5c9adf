"""What planned jobs would take, for `plan=true`: an estimate of each that a card could run, one after the other."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from wan_sweep.environment import Machine
from wan_sweep.launch import Limits, launch
from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.rules import card_of
from wan_sweep.store import ESTIMATE, JOB_FILE, write_json
from wan_sweep.units import format_bytes, format_seconds

Estimator = Callable[[PlannedJob, Machine], dict[str, Any]]


def estimated(entry: PlannedJob, machine: Machine) -> dict[str, Any]:
    """The estimate of a planned job, made in a process of its own; empty if that fails."""
    job = entry.job.replace(mode="estimate", card=card_of(entry.job, machine))
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / JOB_FILE, {"knobs": job.to_dict()})
        limits = Limits(timeout_s=job.timeout_s, stall_timeout_s=job.stall_timeout_s)
        result = launch(Path(folder), limits=limits, on_event=lambda _: None, one=ESTIMATE)
    return {**result.measurement, "outcome": result.outcome, "reason": result.reason}


def print_estimates(plan: Plan, machine: Machine, console: Console, estimator: Estimator = estimated) -> None:
    """Prints a line for each job that is to run on a card, as soon as it is known."""
    entries = [entry for entry in plan.own_jobs if entry.expected == "run" and entry.job.device == "cuda"]
    if entries:
        console.print(Text(f"Estimates for the {card_of(entries[0].job, machine)}, times are lower bounds:"))
    for entry in entries:
        console.print(Text(f"job {entry.number} {entry.title}: {_words(estimator(entry, machine))}"), soft_wrap=True)


def _words(told: dict[str, Any]) -> str:
    metrics = told.get("metrics")
    if told["outcome"] not in {"ok", "oom"} or not metrics:
        return f"no estimate: {told['reason']}"
    needs = format_bytes(metrics["memory/peak/device_used_bytes"])
    peak = format_bytes(metrics["memory/peak/allocated_bytes"])
    seconds = format_seconds(metrics["time/lower_bound/total_s"])
    verdict = "fits" if told["outcome"] == "ok" else "does not fit"
    return f"{verdict}, needs {needs} in all, peak {peak} allocated, at least {seconds}"
