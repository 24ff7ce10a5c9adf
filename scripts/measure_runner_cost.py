"""Measures what the runner itself costs: seconds per job beyond the pipeline's own, and CPU while a job runs.

Why: a sweep of many small jobs must not be mostly overhead, and a parent that is busy would disturb what it measures.

How: python scripts/measure_runner_cost.py [--jobs N]   (on a machine that does nothing else)
It runs N tiny jobs on the CPU as a user would, with MLflow and reports, in a temporary folder: the wall time of the
whole command minus time/total_s of all records, by job. Then one longer job, and the parent's CPU time between its
first and last step. Exit code 1 if a limit is exceeded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

LIMIT_SECONDS_PER_JOB = 6.0
LIMIT_CPU_PERCENT = 2.0
NUM_LONG_STEPS = 100
QUICK = ("-m", "model=tiny", "device=cpu", "size=96*64", "frame_num=1", "save_video=false")


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command in this folder, silent."""
    command = [sys.executable, "-m", "wan_sweep", *QUICK, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


def moment(record: dict[str, Any], name: str) -> float:
    """Seconds since 1970."""
    return datetime.fromisoformat(record[name]).timestamp()


def measure_costs(folder: Path, num_jobs: int) -> dict[str, float]:
    """Runs a sweep of tiny jobs; the seconds that are not the pipeline's own, by where they went."""
    began = time.time()
    code = start(folder, f"base_seed=range({num_jobs})", "sample_steps=1").wait()
    ended = time.time()
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("outputs/sweep/*/*/record.json"))]
    if code or [record["outcome"] for record in records] != ["ok"] * num_jobs:
        sys.exit(f"the sweep ended with {code} and {len(records)} records of {num_jobs}; nothing was measured")
    first, last = (min(moment(one, "started_at") for one in records), max(moment(one, "ended_at") for one in records))
    in_jobs = sum(record["wall_seconds"] for record in records)
    return {
        "start-up and plan": first - began,
        "processes, imports": in_jobs - sum(record["metrics"]["time/total_s"] for record in records),
        "between jobs": last - first - in_jobs,
        "report and MLflow": ended - last,
    }


def measure_cpu_percent(folder: Path) -> float:
    """Runs a longer job; the parent's share of a core between its first and last step."""
    process = start(folder, f"sample_steps={NUM_LONG_STEPS}", "name=long")
    parent = psutil.Process(process.pid)
    readings: list[tuple[float, float]] = []
    while process.poll() is None:
        text = "".join(path.read_text() for path in folder.glob("outputs/long/*/*/events.jsonl"))
        num_begun, num_ended = (text.count(f'"event": "{event}", "kind": "step"') for event in ("begin", "end"))
        if num_begun and num_ended < NUM_LONG_STEPS:
            used = parent.cpu_times()
            readings.append((time.monotonic(), used.user + used.system))
        time.sleep(0.2)
    if process.returncode or len(readings) < 2:
        sys.exit(f"the long job ended with {process.returncode} and was seen {len(readings)} times; nothing measured")
    (began, used_before), (ended, used_after) = readings[0], readings[-1]
    return 100 * (used_after - used_before) / (ended - began)


def main() -> int:
    """Measures, prints a table, and compares with the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4)
    num_jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as name:
        costs, percent = measure_costs(Path(name), num_jobs), measure_cpu_percent(Path(name))
    total = sum(costs.values())
    print(f"{num_jobs} jobs, {psutil.cpu_count()} cores     in all   per job     limit")
    for label, seconds in costs.items():
        print(f"{label:<22} {seconds:7.2f} s {seconds / num_jobs:7.2f} s")
    print(f"{'all of these':<22} {total:7.2f} s {total / num_jobs:7.2f} s {LIMIT_SECONDS_PER_JOB:7.2f} s")
    print(f"{'parent while a job runs':<32} {percent:7.2f} % {LIMIT_CPU_PERCENT:7.2f} % of a core")
    return int(total / num_jobs > LIMIT_SECONDS_PER_JOB or percent > LIMIT_CPU_PERCENT)


if __name__ == "__main__":
    raise SystemExit(main())
