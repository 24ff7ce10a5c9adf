import json
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_traces import rows
from wan_sweep.analyze import UnreadableFileError, analyze
from wan_sweep.units import MIB


class Run:
    """Writes down the boundaries of a made-up run; levels in MiB."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.residents: dict[str, int] = {}
        self.clock = 0.0

    def boundary(self, event: str, kind: str, name: str, now: int, peak: int, **more: Any) -> None:
        self.clock += 1.0
        known = {"index": None, "total": None, "phase": more.pop("phase", None), "num_alloc_retries": 0, "num_ooms": 0}
        levels = {"requested": now, "allocated": now, "active": now, "reserved": peak + 4}
        peaks = {"requested": peak, "allocated": peak, "active": peak, "reserved": peak + 4}
        self.events.append(
            {
                **known,
                "event": event,
                "kind": kind,
                "name": name,
                "time": 1.8e9 + self.clock,
                "elapsed_s": self.clock - 1,
                "interval": {f"{key}_peak_bytes": value * MIB for key, value in peaks.items()},
                **{f"{key}_bytes": value * MIB for key, value in levels.items()},
                "inactive_split_bytes": MIB,
                "device_used_bytes": (peak + 600) * MIB,
                "process_used_bytes": (peak + 500) * MIB,
                "host_rss_bytes": 300 * MIB,
                "host_pinned_bytes": 0,
                "residents": {key: value * MIB for key, value in self.residents.items()},
                **more,
            }
        )


def made_up_run() -> Run:
    """Loads 10 MiB of t5 and 20 of dit, denoises in two steps with a peak of 45 in block 1, ends inside decode."""
    run = Run()
    run.boundary("begin", "phase", "load", 0, 0, phase="load")
    for name, size, before in (("t5", 10, 0), ("dit", 20, 10)):
        run.boundary("begin", "component", name, before, before, phase="load")
        run.residents[name] = size
        run.boundary("end", "component", name, before + size, before + size + 1, seconds=2.0, moved_bytes=size * MIB)
    run.boundary("end", "phase", "load", 30, 30, seconds=5.0)
    run.boundary("begin", "phase", "denoise", 30, 30, phase="denoise")
    for step, peak in ((0, 40), (1, 45)):
        run.boundary("begin", "step", "step", 31, 31, index=step, phase="denoise")
        run.boundary("begin", "block", "block", 32, 33, index=1, phase="denoise")
        run.boundary("end", "block", "block", 32, peak, index=1, seconds=None)
        run.boundary("end", "step", "step", 31, 34, index=step, seconds=0.5 + step)
    run.boundary("end", "phase", "denoise", 30, 31, seconds=3.0)
    run.boundary("begin", "release", "t5", 30, 30)
    del run.residents["t5"]
    run.boundary("end", "release", "t5", 20, 30, seconds=0.1, moved_bytes=10 * MIB)
    run.boundary("begin", "phase", "decode", 20, 20, phase="decode")
    run.boundary("begin", "video", "video", 20, 44, index=0, phase="decode")
    return run


def written(tmp_path: Path, content: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "made.json"
    path.write_text(json.dumps(content))
    return analyze(path, top=50).to_json()


def document(run: Run, **more: Any) -> dict[str, Any]:
    job = {"key": "k", "number": 1, "name": "1_offload=true"}
    return {"schema_version": 1, "job": job, "device": "NVIDIA H100", "started_at": "then", "events": run.events} | more


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    return written(tmp_path, document(made_up_run()))


def test_the_peak_of_a_job_is_found_between_its_events(found: dict[str, Any]) -> None:
    facts = found["sections"]["memory"]["facts"]
    assert facts["peak_allocated_bytes"] == 45 * MIB
    assert facts["peak_in"] == "denoise, step 1, block 1"
    assert (facts["peak_from_seconds"], facts["peak_to_seconds"]) == (12.0, 13.0)
    assert facts["fragmentation_pct"] == pytest.approx(100 * 4 / 49)
    assert facts["outside_allocator_bytes"] == 496 * MIB


def test_what_is_live_at_the_peak_is_weights_by_component_and_the_rest(found: dict[str, Any]) -> None:
    live = rows(found["sections"]["memory"], "live_at_peak", "part")
    assert {name: row["allocated_bytes"] / MIB for name, row in live.items()} == {
        "t5 weights": 10,
        "dit weights": 20,
        "activations and all else": 15,
    }


def test_phases_steps_and_blocks_have_the_highest_value_inside_them(found: dict[str, Any]) -> None:
    sections = found["sections"]
    phases = rows(sections["phases"], "phases", "name")
    assert {name: row["peak_allocated_bytes"] / MIB for name, row in phases.items()} == {
        "load": 31,
        "denoise": 45,
        "decode": 44,
    }
    assert phases["denoise"]["above_start_bytes"] == 15 * MIB
    steps = rows(sections["steps"], "steps", "name")
    assert (steps["step 0"]["peak_allocated_bytes"], steps["step 0"]["seconds"]) == (40 * MIB, 0.5)
    [block] = sections["blocks"]["tables"]["blocks"]["rows"]
    assert (block["index"], block["peak_allocated_bytes"], block["above_start_bytes"]) == (1, 45 * MIB, 13 * MIB)


def test_loads_and_releases_tell_bytes_time_and_speed(found: dict[str, Any]) -> None:
    t5, dit, release = found["sections"]["copies"]["tables"]["copies"]["rows"]
    assert (t5["component"], t5["moved_bytes"], t5["bytes_per_second"]) == ("t5", 10 * MIB, 5 * MIB)
    assert (dit["what"], release["what"], release["bytes_per_second"]) == ("load", "release", None)


def test_a_run_that_ended_early_says_inside_what(found: dict[str, Any]) -> None:
    [warning] = found["warnings"]
    assert warning["code"] == "unfinished"
    assert "inside decode, video 0" in warning["text"]


def test_what_only_other_files_hold_is_said(found: dict[str, Any]) -> None:
    sections = found["sections"]
    assert "profile_memory=true" in sections["operations"]["missing"]
    assert "trace=true" in sections["kernels"]["missing"]
    assert "snapshot.pickle" in sections["churn"]["missing"]


def test_damaged_events_and_other_versions_are_refused(tmp_path: Path) -> None:
    run = made_up_run()
    with pytest.raises(UnreadableFileError, match=r"schema_version=9; this version of wan_sweep reads 1"):
        written(tmp_path, document(run, schema_version=9))
    del run.events[3]["interval"]
    with pytest.raises(UnreadableFileError, match=r"not a complete memory_events.json: KeyError\('interval'\)"):
        written(tmp_path, document(run))
    with pytest.raises(UnreadableFileError, match="ends without having begun"):
        written(tmp_path, document(made_up_run(), events=made_up_run().events[1:]))


def peak(scope: str, phase: str, allocated: int, **more: Any) -> dict[str, Any]:
    item = {"bytes": 6 * MIB, "count": 2, "kind": "activation", "component": "dit", "phase": phase, "step": 1}
    item |= {"block": 3, "module": "blocks.3.ffn", "operation": "aten::mm", "shape": [2, 8], "dtype": "bfloat16"}
    weights = {"dit": (allocated - 8) * MIB}
    known = {"scope": scope, "phase": phase, "step": 1, "block": 3, "module": "blocks.3", "operation": "aten::mm"}
    size = {"allocated_bytes": allocated * MIB, "named_bytes": (allocated - 1) * MIB, "unattributed_bytes": MIB}
    live = {"weights": weights, "activation_bytes": 8 * MIB, "live": [item | {"parameter": None}], "num_live": 9}
    return {**known, **size, **live, "rest_bytes": 0, **more}


def test_an_attribution_tells_each_peak_and_the_oom_first(tmp_path: Path) -> None:
    peaks = [peak("run", "denoise", 20), peak("phase", "decode", 16)]
    oom = peak("oom", "denoise", 30, request_bytes=5 * MIB)
    content = {"schema_version": 1, "device": "H100", "outcome": "oom", "reason": "", "num_steps": 2, "peaks": peaks}
    found = written(tmp_path, content | {"oom": oom})
    assert [key for key in found["sections"] if key != "overview"] == [
        "oom",
        "peak_0_run_denoise",
        "peak_1_phase_decode",
    ]
    assert found["sections"]["oom"]["facts"]["request_bytes"] == 5 * MIB
    facts = found["sections"]["peak_0_run_denoise"]["facts"]
    assert (facts["weights_dit_bytes"], facts["named_pct"]) == (12 * MIB, 95.0)
    [row] = found["sections"]["peak_0_run_denoise"]["tables"]["live"]["rows"]
    assert (row["in"], row["shape"]) == ("denoise, step 1, block 3", "2x8")
    del content["peaks"][0]["weights"]
    with pytest.raises(UnreadableFileError, match=r"not a complete attribution.json: KeyError\('weights'\)"):
        written(tmp_path, content)
