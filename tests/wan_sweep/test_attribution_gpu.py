"""Attribution and snapshot on a GPU: the replay against the allocator's own counters and its own history."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _memory_viz

from tests.wan_sweep.attribution_checks import inconsistencies
from wan21.assets import open_assets
from wan21.events import Observer, Span
from wan21.models import model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import Runtime, make_runtime
from wan_sweep.measure.attribution import Attributor
from wan_sweep.measure.recorder import Recorder
from wan_sweep.measure.snapshot import history, write_snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = model_spec("tiny")
MORE_THAN_THERE_IS = 2**45
CHOICES = [("full", False), ("full", True), ("block", False), ("block", True)]


class Nothing:
    """A sink that keeps nothing."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Drops the event."""


@pytest.fixture
def runtime() -> Runtime:
    runtime = make_runtime("cuda")
    runtime.warm_up()
    return runtime


def generate(runtime: Runtime, observer: Observer, load_strategy: str = "full", *, offload: bool = True) -> None:
    options = Options(precision="bf16", load_strategy=load_strategy, offload=offload)  # type: ignore[arg-type]
    request = make_request(SPEC, seed=7, size="96*64", frame_num=5, num_steps=2)
    pipeline = VideoPipeline(SPEC, options, open_assets(SPEC, options, runtime), runtime, observer)
    pipeline.generate(request)
    pipeline.close()


@pytest.mark.parametrize(("load_strategy", "offload"), CHOICES)
def test_peaks_equal_the_measured_ones_and_nothing_drifts(
    runtime: Runtime, load_strategy: str, *, offload: bool
) -> None:
    generate(runtime, Recorder(runtime, Nothing()), load_strategy, offload=offload)  # what libraries keep from now on
    runtime.empty_cache()  # how large a block is handed out depends on what the allocator holds
    recorder = Recorder(runtime, Nothing())
    generate(runtime, recorder, load_strategy, offload=offload)
    metrics = recorder.metrics()
    runtime.empty_cache()
    attributor = Attributor(runtime)
    with attributor.recording():
        generate(runtime, attributor, load_strategy, offload=offload)
    result = attributor.result(outcome="ok", reason="", num_steps=2)
    assert inconsistencies(result) == []
    assert result["drift_bytes"] == 0
    highest, *phases = result["peaks"]
    assert highest["allocated_bytes"] == metrics["memory/peak/allocated_bytes"]
    for peak in phases:
        assert peak["allocated_bytes"] == metrics[f"memory/peak/{peak['phase']}/allocated_bytes"]


def test_the_workspace_of_the_libraries_is_named_if_the_recording_begins_before_it(runtime: Runtime) -> None:
    torch._C._cuda_clearCublasWorkspaces()
    attributor = Attributor(runtime)
    with attributor.recording():
        runtime.warm_up()
        generate(runtime, attributor)
    (peak,) = (one for one in attributor.result(outcome="ok", reason="", num_steps=2)["peaks"] if one["scope"] == "run")
    workspace = [item for item in peak["live"] if item["kind"] == "workspace" and item["phase"] == ""]
    assert sum(item["bytes"] for item in workspace) >= 2**20
    assert all(item["operation"].startswith("aten::") for item in workspace)


def ask_for_too_much(attributor: Attributor, runtime: Runtime, stood: list[int]) -> None:
    with attributor.span(Span(kind="phase", name="denoise")):
        kept = torch.ones(1000, 1000, device=runtime.device)
        stood.append(runtime.memory().allocated_bytes)
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8, device=runtime.device)
        del kept


def test_an_oom_gives_the_request_and_what_stood_then(runtime: Runtime) -> None:
    attributor = Attributor(runtime)
    stood: list[int] = []
    with attributor.recording(), pytest.raises(torch.OutOfMemoryError):
        ask_for_too_much(attributor, runtime, stood)
    result = attributor.result(outcome="oom", reason="out of memory", num_steps=1)
    assert inconsistencies(result) == []
    assert result["drift_bytes"] == 0
    oom = result["oom"]
    assert (oom["request_bytes"], oom["phase"]) == (MORE_THAN_THERE_IS, "denoise")
    assert [oom["allocated_bytes"]] == stood
    assert [1000, 1000] in [item["shape"] for item in oom["live"]]


def test_a_failure_of_the_host_is_not_taken_for_one_of_the_device(runtime: Runtime) -> None:
    attributor = Attributor(runtime)
    with attributor.recording(), pytest.raises(RuntimeError), attributor.span(Span(kind="phase", name="denoise")):
        torch.empty(2**50, dtype=torch.uint8)
    oom = attributor.result(outcome="oom", reason="out of memory", num_steps=1)["oom"]
    assert "refused nothing" in oom["reason"]


def test_a_snapshot_has_the_places_as_tags_and_opens_in_pytorchs_own_tools(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    attributor = Attributor(runtime)
    with history(), attributor.recording():
        generate(runtime, attributor)
        write_snapshot(path)
    snapshot = pickle.loads(path.read_bytes())  # noqa: S301  # written a line above
    _memory_viz.segsum(snapshot)  # type: ignore[no-untyped-call]
    assert "<script" in _memory_viz.trace_plot(snapshot)
    entries = snapshot["device_traces"][runtime.device.index]
    assert {"alloc", "free_completed"} <= {entry["action"] for entry in entries}
    if hasattr(torch.cuda.memory, "_set_memory_metadata"):
        assert any("denoise/1/2/blocks.2.self_attn.q" in entry.values() for entry in entries)
        assert torch.cuda.memory._get_memory_metadata() == ""  # taken off again
