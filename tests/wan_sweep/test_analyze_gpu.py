"""The analysis against what torch itself counts on a GPU."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.wan_sweep.made_up_traces import rows
from wan_sweep.analyze import analyze, replay_peaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),  # torch 2.11 says so of every profile
]

COUNTERS = ("requested", "allocated", "active", "reserved")


def work(seed: int) -> list[torch.Tensor]:
    """Allocates and frees on two streams, some of it used by both; returns what is left."""
    chance = random.Random(seed)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    live: list[torch.Tensor] = []
    for _ in range(1000):
        if live and chance.random() < 0.5:
            live.pop(chance.randrange(len(live)))
        else:
            place = chance.randrange(2)
            with torch.cuda.stream(streams[place]):
                size = int(2 ** chance.uniform(4, 27))
                live.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            if chance.random() < 0.3:
                live[-1].record_stream(streams[1 - place])
                with torch.cuda.stream(streams[1 - place]):
                    torch.cuda._sleep(10_000)
        if chance.random() < 0.01:
            torch.cuda.empty_cache()
    return live


def compare_peaks() -> None:
    """Raises AssertionError if the peaks of a run differ from those of the replay of its history."""
    torch.cuda.init()
    torch.cuda.memory._record_memory_history(max_entries=10**6, context=None)
    torch.cuda.reset_peak_memory_stats()
    live = work(0)
    torch.cuda.synchronize()
    counted = torch.cuda.memory_stats()
    found = replay_peaks(torch.cuda.memory._snapshot())
    assert live
    assert found == {name: counted[f"{name}_bytes.all.peak"] for name in COUNTERS}


@pytest.mark.parametrize(
    "settings", ["", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:8"]
)
def test_peaks_of_a_run_equal_those_of_the_replay_of_its_history(settings: str) -> None:
    program = "from tests.wan_sweep.test_analyze_gpu import compare_peaks; compare_peaks()"
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_analysis_of_a_snapshot_file_agrees_with_the_counters(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.memory._record_memory_history(max_entries=10**6)
    try:
        kept = work(1)
        torch.cuda.synchronize()
        now = torch.cuda.memory_allocated()
        path = tmp_path / "snapshot.pickle"
        path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))
    finally:
        torch.cuda.memory._record_memory_history(None)
    found = analyze(path).to_json()
    assert kept
    assert found["sections"]["end"]["facts"]["allocated_bytes"] == now
    assert "exactly the state" in found["sections"]["memory"]["notes"][0]
    assert found["sections"]["memory"]["tables"]["live_at_peak"]["rows"][0]["frame"].startswith(
        "wan_sweep/test_analyze_gpu.py"
    )


def test_times_on_the_device_are_those_of_the_profilers_own_table(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)).cuda()
    host = torch.randn(256, 512)
    net(host.cuda())
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, profile_memory=True) as profiler, torch.no_grad():
        with record_function("phase:evaluate"):
            out = net(host.cuda())
        back = out.cpu()
    path = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    found = analyze(path, top=1000).to_json()["sections"]
    by_time = rows(found["operations"], "by_time", "name")
    told = {one.key: one for one in profiler.key_averages() if one.key.startswith("aten::")}
    assert back.shape == (256, 512)
    assert told["aten::addmm"].self_device_time_total > 0
    for name, one in told.items():
        assert by_time[name]["device_self_seconds"] == pytest.approx(one.self_device_time_total * 1e-6, abs=1e-6)
    # Not so for operations inside others of the same name, whose totals the profiler's table counts twice.
    linear = told["aten::linear"].device_time_total * 1e-6
    assert by_time["aten::linear"]["device_total_seconds"] == pytest.approx(linear, abs=1e-6)
    assert found["phases"]["tables"]["phases"]["rows"][0]["name"] == "evaluate"
    assert {row["copied_bytes"] for row in found["copies"]["tables"]["copies"]["rows"]} >= {256 * 512 * 4}
