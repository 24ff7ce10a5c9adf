"""scripts/bench_peers.py: ratios, the time of a call, what is kept; and one run of both sides on a CPU."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import GIB, KNOBS, metrics_of, record, write_sweep
from wan_sweep.errors import UsageError


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("bench_peers")


def result(bench: ModuleType, **changes: Any) -> Any:
    made = {"what": "", "outcome": "ok", "allocated_bytes": 2 * GIB, "reserved_bytes": 4 * GIB, "encode_s": 0.5}
    return bench.Result(**{**made, "first_step_s": 9.0, "step_s": 1.0, "decode_s": 3.0, **changes})


def test_ratios_are_those_of_their_least_to_ours_figure_by_figure(bench: ModuleType) -> None:
    results = {
        "fastest": result(bench, allocated_bytes=8 * GIB, step_s=0.8, decode_s=1.5),
        "diffusers/gpu": result(bench, allocated_bytes=16 * GIB, step_s=1.2, decode_s=2.4),
        "diffusers/group_offload_tiled": result(bench, allocated_bytes=2 * GIB, step_s=1.4, decode_s=6.0),
    }
    (fastest,) = bench.ratios(results).values()
    assert fastest["allocated"] == 2 / 8
    assert fastest["forward"] == pytest.approx(1.2 / 0.8)
    assert fastest["decode"] == pytest.approx(2.4 / 1.5)
    assert fastest["50 steps"] == pytest.approx((0.5 + 60 + 2.4) / (0.5 + 40 + 1.5))


def test_runs_that_did_not_end_well_are_in_no_ratio(bench: ModuleType) -> None:
    oom = result(bench, outcome="oom", allocated_bytes=1, step_s=0.001)
    assert bench.ratios({"fastest": oom, "diffusers/gpu": result(bench)}) == {}
    assert bench.ratios({"fastest": result(bench), "diffusers/gpu": oom}) == {}


def test_a_step_of_theirs_is_the_median_without_the_first(bench: ModuleType) -> None:
    told = {"outcome": "ok", "reason": "", "steps_s": [9.0, 1.0, 3.0, 2.0], "encode_s": 0.5, "decode_s": 4.0}
    found = bench.Result.of_theirs("all on the GPU", told)
    assert (found.first_step_s, found.step_s, found.forward_s) == (9.0, 2.0, 1.0)
    assert found.whole_run_s == 0.5 + 100 + 4


def test_ours_come_from_the_record_with_the_kernels_that_ran(bench: ModuleType, tmp_path: Path) -> None:
    metrics = metrics_of(base={"dit": 100.0}, activation=50, step_s=0.8)
    knobs = {**KNOBS, "kernels": "fused", "attention_kernel": "fa3"}
    found = bench.Result.of_ours(write_sweep(tmp_path / "run", record(1, {}, metrics, knobs=knobs)))
    assert found.what == "ours, kernels fused, attention fa3"
    assert found.allocated_bytes == metrics["memory/peak/allocated_bytes"]
    assert (found.forward_s, found.decode_s) == (0.4, 3.4)


def test_what_has_no_time_left_is_not_begun_and_what_was_measured_is_not_repeated(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked, kept = [0.0], [], []

    def run(setup: str, workload: object, timeout_s: float) -> Any:
        asked.append((setup, timeout_s))
        now[0] += 40
        return result(bench)

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    results = {"lowest_memory": result(bench), "fastest": bench.not_run("no time was left in this call")}
    setups = ["fastest", "lowest_memory", "diffusers/gpu", "none"]
    bench.run_all(setups, None, results, 100, lambda: kept.append(len(asked)))
    assert asked == [("fastest", 100), ("diffusers/gpu", 60)]
    assert kept == [1, 2]
    assert {setup: one.outcome for setup, one in results.items()} == {
        "lowest_memory": "ok",
        "fastest": "ok",
        "diffusers/gpu": "ok",
        "none": "not run",
    }


def test_a_setup_that_outlasts_the_call_is_stopped(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    command = subprocess.run
    monkeypatch.setattr(bench.subprocess, "run", lambda _, **named: command(slow, **named))
    found = bench.run("diffusers/gpu", workload(bench), 0.2)
    assert (found.outcome, found.reason) == ("not run", "the time of this call ended during it")


def workload(bench: ModuleType) -> Any:
    return bench.Workload(model="tiny", size="96*64", frame_num=1, steps=2, vae_precision="bf16", device="cpu")


def test_what_was_kept_is_read_back_and_never_mixed_with_another_workload(bench: ModuleType, tmp_path: Path) -> None:
    path, head = tmp_path / "kept.json", {"workload": {"model": "tiny"}}
    path.write_text(json.dumps({"head": head, "results": {"fastest": asdict(result(bench))}}))
    assert bench.kept_results(path, head) == {"fastest": result(bench)}
    with pytest.raises(UsageError, match="another workload or machine; name another file"):
        bench.kept_results(path, {"workload": {"model": "t2v-14B"}})


@pytest.mark.slow
def test_both_sides_run_on_a_cpu_and_are_compared(
    repository: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--size", "96*64", "--frame-num", "1", "--steps", "2", "--device", "cpu"]
    arguments += ["--setups", "lowest_memory", "diffusers/gpu"]
    done = subprocess.run(
        [sys.executable, str(repository / "scripts/bench_peers.py"), *arguments],
        cwd=tmp_path,
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (told["results"][name] for name in ("lowest_memory", "diffusers/gpu"))
    assert (ours["outcome"], theirs["outcome"]) == ("ok", "ok")
    # All weights of theirs are there at once on a CPU, in bfloat16, and something to compute with besides.
    assert theirs["allocated_bytes"] > 2 * 8192 * 256
    assert min(ours["step_s"], theirs["step_s"], theirs["decode_s"], theirs["encode_s"]) > 0
    assert set(told["ratios"]) == {"lowest_memory"}
    assert told["ratios"]["lowest_memory"]["allocated"] == theirs["allocated_bytes"] / ours["allocated_bytes"]
    assert list(tmp_path.iterdir()) == []
