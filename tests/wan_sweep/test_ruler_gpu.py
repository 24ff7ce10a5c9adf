"""The ruler itself on a GPU: known allocations, and a real run against the replay of the allocator's own history."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wan21.events import Span
from wan21.runtime import Runtime, make_runtime
from wan_sweep.analyze.plain_pickle import load_plain
from wan_sweep.analyze.snapshot import replay_peaks
from wan_sweep.measure.recorder import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20

# In a process of its own, so that history and counters begin with the process. Prints the measured peaks.
REAL_RUN = """
import json, sys
from pathlib import Path
from wan21.assets import open_assets
from wan21.models import model_spec
from wan21.options import Options
from wan21.request import make_request
from wan21.pipeline import VideoPipeline
from wan21.runtime import make_runtime
from wan_sweep.measure.recorder import Recorder
from wan_sweep.measure.snapshot import history, write_snapshot

class Nothing:
    def write(self, event, *, is_urgent):
        pass

runtime = make_runtime("cuda")
spec, options = model_spec("tiny"), Options(precision="bf16", load_strategy=sys.argv[2], offload=sys.argv[3] == "true")
with history():
    runtime.warm_up()
    recorder = Recorder(runtime, Nothing(), wants_blocks=True)
    pipeline = VideoPipeline(spec, options, open_assets(spec, options, runtime), runtime, recorder)
    pipeline.generate(make_request(spec, seed=7, size="256*160", frame_num=9, num_steps=3))
    write_snapshot(Path(sys.argv[1]))
metrics = recorder.metrics()
print(json.dumps({name: metrics[f"memory/peak/{name}_bytes"] for name in ("requested", "allocated", "reserved")}))
"""


class Lines(list[dict[str, Any]]):
    """Events, kept."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        self.append({**event, "is_urgent": is_urgent})


@pytest.fixture
def runtime() -> Runtime:
    runtime = make_runtime("cuda")
    runtime.empty_cache()
    return runtime


def phase(name: str) -> Span:
    return Span(kind="phase", name=name)


def step(index: int) -> Span:
    return Span(kind="step", name="step", index=index, total=2)


def mebibytes(number: int) -> torch.Tensor:
    return torch.empty(number * MIB, dtype=torch.uint8, device="cuda")


def test_64_mib_allocated_read_as_64_mib(runtime: Runtime) -> None:
    recorder = Recorder(runtime, Lines())
    before = runtime.memory()
    with recorder.span(phase("denoise")):
        tensor = mebibytes(64)
    after = runtime.memory()
    del tensor
    for name in ("requested", "allocated", "active", "reserved"):
        assert getattr(after, f"{name}_bytes") - getattr(before, f"{name}_bytes") == 64 * MIB
    assert recorder.metrics()["memory/activation/denoise_bytes"] == 64 * MIB


def test_interval_peaks_are_those_worked_out_by_hand(runtime: Runtime) -> None:
    lines = Lines()
    recorder = Recorder(runtime, lines)
    start = runtime.memory().allocated_bytes
    with recorder.span(phase("denoise")):
        kept = mebibytes(10)  # 10
        mebibytes(40)  # 50, then 10
        with recorder.span(step(0)):
            more = mebibytes(20)  # 30
            mebibytes(60)  # 90, then 30
        mebibytes(34)  # 64, then 30
        del more  # 10
        with recorder.span(step(1)):
            mebibytes(2)  # 12, then 10
    with recorder.span(phase("decode")):
        del kept  # 0
        mebibytes(6)  # 6, then 0
    metrics, series = recorder.metrics(), recorder.series()
    intervals = [(line["interval"]["allocated_peak_bytes"] - start) // MIB for line in lines]
    assert intervals == [0, 50, 90, 64, 12, 10, 10, 10]
    assert series["step/allocated_bytes"] == [start + 90 * MIB, start + 12 * MIB]
    assert metrics["memory/peak/denoise/allocated_bytes"] == start + 90 * MIB
    assert metrics["memory/activation/denoise_bytes"] == 90 * MIB
    assert metrics["memory/peak/decode/allocated_bytes"] == start + 10 * MIB
    assert metrics["memory/activation/decode_bytes"] == 0


def test_nested_spans_agree_with_each_other(runtime: Runtime) -> None:
    lines = Lines()
    recorder = Recorder(runtime, lines, wants_blocks=True)
    with recorder.span(phase("denoise")), recorder.span(step(0)):
        for index in range(3):
            with recorder.span(Span(kind="block", name="block", index=index)):
                mebibytes(8 * (index + 1))
    peaks = {
        (line["kind"], line["index"]): line["span"]["allocated_peak_bytes"] for line in lines if line["event"] == "end"
    }
    blocks = [peaks["block", index] for index in range(3)]
    assert blocks[0] + 16 * MIB == blocks[1] + 8 * MIB == blocks[2]
    assert max(blocks) == peaks["step", 0] == peaks["phase", None]


@pytest.mark.parametrize(("load_strategy", "offload"), [("full", "false"), ("block", "true")])
def test_peaks_of_a_real_run_equal_the_replay_of_its_own_history(
    tmp_path: Path, child_environment: dict[str, str], load_strategy: str, offload: str
) -> None:
    path = tmp_path / "snapshot.pickle"
    command = [sys.executable, "-c", REAL_RUN, str(path), load_strategy, offload]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    with path.open("rb") as file:
        replayed = replay_peaks(load_plain(file, path))
    assert {name: replayed[name] for name in measured} == measured
