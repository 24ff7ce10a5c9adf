"""Real jobs of two ranks on the CPU: a killed rank is named, and the next job runs and is measured by rank."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.wan_sweep.halting_worker import HaltingWorker
from wan_sweep.record import load_records

pytestmark = pytest.mark.slow

QUICK = ("model=tiny", "device=cpu", "save_video=false", "size=96*64", "frame_num=1", "track=false")
SHARDED = ("ulysses_size=2", "dit_fsdp=true", "t5_fsdp=true", "profile_memory=true")


@pytest.fixture
def halting(tmp_path_factory: pytest.TempPathFactory) -> HaltingWorker:
    return HaltingWorker(tmp_path_factory.mktemp("worker"))


@pytest.fixture
def sweep(
    tmp_path: Path, child_environment: dict[str, str], halting: HaltingWorker
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    environment = {**child_environment, "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [*halting.command, "-m", *QUICK, *SHARDED, *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_a_killed_rank_is_named_and_the_next_job_is_measured_by_rank(
    sweep: Callable[..., subprocess.Popen[str]], halting: HaltingWorker, tmp_path: Path
) -> None:
    process = sweep("sample_steps=3,2")
    last = halting.wait_for(1)
    ranks = halting.ranks()
    assert len(ranks) == 2
    last.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    (folder,) = (tmp_path / "outputs" / "sweep").iterdir()
    first, second = load_records(folder)
    assert first.outcome == "failed"
    assert first.reason.startswith("rank 1: killed by SIGKILL in denoise, step 2 of 3")
    assert not any(rank.is_running() for rank in ranks)
    assert second.outcome == "ok"
    assert [rank["rank"] for rank in second.ranks] == [0, 1]
    attribution = second.passes["attribution"]
    assert (attribution["outcome"], [rank["outcome"] for rank in attribution["ranks"]]) == ("ok", ["ok", "ok"])
    peaks = [rank["metrics"]["memory/peak/allocated_bytes"] for rank in second.ranks]
    assert second.metrics["memory/peak/allocated_bytes"] == max(peaks)
    document = json.loads((folder / second.name / "rank1" / "memory_events.json").read_text())
    assert (document["rank"], document["num_ranks"]) == (1, 2)
    assert (folder / second.name / "rank1" / "memory_timeline.png").exists()
    header = (folder / "results.csv").read_text().splitlines()[0]
    assert "rank1/memory/peak/allocated_mib" in header
    assert not list((folder / second.name / "rank1").glob("*.mp4"))
