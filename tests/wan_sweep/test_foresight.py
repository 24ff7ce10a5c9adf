"""What plan=true says of jobs, with made-up estimates."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.wan_sweep.test_plan import NO_GPU, candidate, planned
from wan_sweep.foresight import print_estimates
from wan_sweep.units import GIB

METRICS = {
    "memory/peak/device_used_bytes": 12 * GIB,
    "memory/peak/allocated_bytes": 10 * GIB,
    "time/lower_bound/total_s": 90.0,
}


def test_each_job_for_a_card_is_estimated_and_others_are_not(tmp_path: Path) -> None:
    on_card = {"device": "auto", "card": "RTX4060-8GB"}
    jobs = [candidate(), *(candidate(precision=one, **on_card) for one in ("fp16", "bf16", "fp32"))]
    plan = planned(jobs, tmp_path)
    told: dict[str, dict[str, Any]] = {
        "fp16": {"outcome": "ok", "reason": "", "metrics": METRICS},
        "bf16": {"outcome": "oom", "reason": "does not fit", "metrics": METRICS},
        "fp32": {"outcome": "failed", "reason": "ValueError: no"},
    }
    console = Console(width=120, record=True, file=io.StringIO())
    print_estimates(plan, NO_GPU, console, lambda entry, _: told[entry.job.precision])
    heads, lines = [], []
    for line in console.export_text().splitlines():
        (lines if line.startswith("job ") else heads).append(line)
    assert heads == ["Estimates for the RTX4060-8GB, times are lower bounds:"]
    numbers = "needs 12.00 GiB in all, peak 10.00 GiB allocated, at least 1 min 30 s"
    assert [line.partition(": ")[2] for line in lines] == [
        f"fits, {numbers}",
        f"does not fit, {numbers}",
        "no estimate: ValueError: no",
    ]
