"""Real jobs of two ranks on the CPU: a killed rank is named, and the next job runs and is measured by rank."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from wan_sweep.record import load_records

pytestmark = pytest.mark.slow

QUICK = ("model=tiny", "device=cpu", "save_video=false", "size=96*64", "frame_num=1", "track=false")
SHARDED = ("ulysses_size=2", "dit_fsdp=true", "t5_fsdp=true", "profile_memory=true")


@pytest.fixture
def environment(child_environment: dict[str, str]) -> dict[str, str]:
    return {**child_environment, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def sweep(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "wan_sweep", "-m", *QUICK, *SHARDED, *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def wait_for_steps(folder: Path, number: int) -> Path:
    """Returns the folder of this job when its second rank is in the middle of its work."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in folder.glob(f"outputs/sweep/*/{number}_*/rank1/events.jsonl"):
            if path.read_text().count('"name": "step"') > 4:
                return path.parent.parent
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def ranks_of(job: Path) -> dict[int, psutil.Process]:
    """The processes of the ranks of a job."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "wan_sweep.worker"] and str(job) in process.cmdline():
                found[int(process.environ()["RANK"])] = process
    return found


def test_a_killed_rank_is_named_and_the_next_job_is_measured_by_rank(
    sweep: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    # 400 steps of 20 to 120 ms: never comes to its end.
    process = sweep("sample_steps=400,2")
    killed = wait_for_steps(tmp_path, 1)
    ranks = ranks_of(killed)
    ranks[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    first, second = load_records(killed.parent)
    assert first.outcome == "failed"
    assert first.reason.startswith("rank 1: killed by SIGKILL in denoise, step ")
    assert not any(rank.is_running() for rank in ranks.values())
    assert second.outcome == "ok"
    assert [rank["rank"] for rank in second.ranks] == [0, 1]
    attribution = second.passes["attribution"]
    assert (attribution["outcome"], [rank["outcome"] for rank in attribution["ranks"]]) == ("ok", ["ok", "ok"])
    peaks = [rank["metrics"]["memory/peak/allocated_bytes"] for rank in second.ranks]
    assert second.metrics["memory/peak/allocated_bytes"] == max(peaks)
    document = json.loads((killed.parent / second.name / "rank1" / "memory_events.json").read_text())
    assert (document["rank"], document["num_ranks"]) == (1, 2)
    assert (killed.parent / second.name / "rank1" / "memory_timeline.png").exists()
    header = (killed.parent / "results.csv").read_text().splitlines()[0]
    assert "rank1/memory/peak/allocated_mib" in header
    assert not list((killed.parent / second.name / "rank1").glob("*.mp4"))
