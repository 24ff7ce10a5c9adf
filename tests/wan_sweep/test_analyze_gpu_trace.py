from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_traces import gpu_events, lasting, launch, on_device, rows, sections, write_trace
from wan_sweep.analyze.kinds import analyze

MICROSECOND = 1e-6


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    return sections(tmp_path, gpu_events())


def us(value: float) -> Any:
    return pytest.approx(value * MICROSECOND)


def test_the_peak_is_the_highest_count_of_the_allocator_itself(found: dict[str, Any]) -> None:
    facts = found["memory"]["facts"]
    assert facts["peak_allocated_bytes"] == 9000  # not 5000, the sum of what the trace saw
    assert facts["peak_at_seconds"] == us(515)
    assert (facts["peak_in"], facts["peak_operation"]) == ("denoise, step 1", "aten::mm")
    assert facts["standing_bytes"] == 4000
    assert "Total Allocated" in found["memory"]["notes"][0]


def test_fragmentation_is_what_was_reserved_and_not_allocated_at_the_peak(found: dict[str, Any]) -> None:
    facts = found["memory"]["facts"]
    assert (facts["reserved_at_peak_bytes"], facts["unused_at_peak_bytes"]) == (12000, 3000)
    assert facts["fragmentation_pct"] == 25.0


def test_the_live_set_adds_up_to_the_peak_with_what_stood_before(found: dict[str, Any]) -> None:
    live = rows(found["memory"], "live_at_peak", "operation")
    assert {name: row["allocated_bytes"] for name, row in live.items()} == {
        "allocated before the recording": 4000,
        "aten::to": 3000,
        "aten::mm": 2000,  # that of step 1; that of step 0 was freed
    }
    assert live["aten::to"]["module"] == "blocks.0"
    assert live["aten::mm"]["in"] == "denoise, step 1"


def test_allocations_are_counted_by_second_by_step_and_by_how_long_they_live(found: dict[str, Any]) -> None:
    facts = found["churn"]["facts"]
    assert (facts["num_allocations"], facts["allocated_in_all_bytes"]) == (3, 6000)
    assert (facts["allocations_per_step"], facts["bytes_per_step"]) == (1.5, 3000)
    assert facts["allocations_per_second"] == pytest.approx(3 / 1e-3)
    assert facts["short_lived_pct"] == pytest.approx(100 / 3)  # 1000 bytes lived 265 us, the others are not freed
    assert facts["short_lived_bytes_pct"] == pytest.approx(100 / 6)
    assert facts["median_lifetime_seconds"] == us(265)


def test_time_on_the_device_goes_to_the_operation_that_launched_it(found: dict[str, Any]) -> None:
    by_time = rows(found["operations"], "by_time", "name")
    product, move, copy = by_time["aten::mm"], by_time["aten::to"], by_time["aten::copy_"]
    assert (product["calls"], product["device_self_seconds"]) == (2, us(200))
    assert (product["cpu_self_seconds"], product["cpu_total_seconds"]) == (us(80), us(100))  # 2 launches of 10 us
    assert (move["device_self_seconds"], move["device_total_seconds"]) == (0.0, us(100))
    assert (move["cpu_self_seconds"], copy["cpu_self_seconds"]) == (us(20), us(20))
    assert copy["device_self_seconds"] == us(100)
    assert by_time["cudaStreamSynchronize"]["cpu_self_seconds"] == us(280)


def test_memory_goes_to_the_operation_and_the_module_that_allocated_it(found: dict[str, Any]) -> None:
    by_memory = rows(found["operations"], "by_memory", "name")
    assert (by_memory["aten::mm"]["allocated_self_bytes"], by_memory["aten::mm"]["live_at_peak_bytes"]) == (3000, 2000)
    module = rows(found["modules"], "by_memory", "name")["blocks.0"]
    assert module["phase"] == "denoise"
    assert (module["allocated_total_bytes"], module["live_at_peak_bytes"]) == (4000, 3000)
    assert module["device_total_seconds"] == us(200)


def test_phases_and_steps_have_their_own_time_peak_and_device_time(found: dict[str, Any]) -> None:
    first, second = found["steps"]["tables"]["steps"]["rows"]
    assert (first["name"], first["seconds"], first["device_seconds"]) == ("step 0", us(480), us(200))
    assert (first["peak_allocated_bytes"], first["num_allocations"]) == (8000, 2)
    assert (second["seconds"], second["device_seconds"]) == (us(490), us(120))
    assert (second["peak_allocated_bytes"], second["allocated_bytes"]) == (9000, 2000)
    [phase] = found["phases"]["tables"]["phases"]["rows"]
    assert (phase["name"], phase["device_seconds"]) == ("denoise", us(320))


def test_a_gpu_is_idle_when_no_stream_does_anything(found: dict[str, Any]) -> None:
    facts = found["device"]["facts"]  # busy 60 to 250, 540 to 640, 930 to 950
    assert facts["gpu0_span_seconds"] == us(890)
    assert facts["gpu0_busy_pct"] == pytest.approx(100 * 310 / 890)
    assert facts["gpu0_idle_seconds"] == us(580)
    streams = rows(found["device"], "streams", "stream")
    assert (streams["7"]["busy_seconds"], streams["7"]["idle_seconds"]) == (us(220), us(670))
    assert (streams["7"]["num_gaps"], streams["7"]["longest_gap_seconds"]) == (2, us(380))
    assert (streams["13"]["busy_seconds"], streams["13"]["num_gaps"]) == (us(100), 0)


def test_a_stall_says_what_the_cpu_did_meanwhile(found: dict[str, Any]) -> None:
    stalls = rows(found["device"], "stalls", "before")
    # From 640 to 930 the thread waited 250 us in the synchronizing call, and did nothing else for long.
    assert stalls["relu"]["cpu"] == "cudaStreamSynchronize"
    assert stalls["relu"]["cpu_pct"] == pytest.approx(100 * 250 / 290)
    assert (stalls["relu"]["start_seconds"], stalls["relu"]["seconds"]) == (us(640), us(290))
    # From 250 to 540 it was in step:0 for 240 us without an operation.
    assert stalls["gemm"]["cpu"] == "step:0, outside operations"
    assert stalls["gemm"]["cpu_pct"] == pytest.approx(100 * 240 / 290)
    assert stalls["gemm"]["after"] == "Memcpy HtoD (Pinned -> Device)"


def test_the_gap_of_a_stream_tells_how_much_of_it_the_device_was_idle(found: dict[str, Any]) -> None:
    gap = rows(found["device"], "gaps", "seconds")
    longest = gap[max(gap)]  # stream 7 from 160 to 540, while the copy on stream 13 ran until 250
    assert (longest["seconds"], longest["device_idle_seconds"]) == (us(380), us(290))


def test_copies_have_bytes_time_and_bandwidth_by_kind(found: dict[str, Any]) -> None:
    [copy] = found["copies"]["tables"]["copies"]["rows"]
    assert (copy["kind"], copy["copied_bytes"], copy["seconds"]) == ("Memcpy HtoD (Pinned -> Device)", 200_000, us(100))
    assert copy["bytes_per_second"] == pytest.approx(2e9)


def test_kernels_are_listed_by_their_time(found: dict[str, Any]) -> None:
    gemm, relu = found["kernels"]["tables"]["kernels"]["rows"]
    assert (gemm["name"], gemm["calls"], gemm["seconds"], gemm["mean_seconds"]) == ("gemm", 2, us(200), us(100))
    assert gemm["pct"] == pytest.approx(100 * 200 / 220)
    assert (relu["seconds"], relu["longest_seconds"]) == (us(20), us(20))


def test_a_gap_before_what_was_queued_long_ago_is_not_the_cpus_doing(tmp_path: Path) -> None:
    events = [
        lasting("cpu_op", "aten::a", 0, 30),
        launch("cudaLaunchKernel", 5, 10, 1),
        launch("cudaLaunchKernel", 15, 20, 2),
        on_device("kernel", "first", 20, 100, 7, correlation=1),
        on_device("kernel", "second", 150, 160, 7, correlation=2),
    ]
    [stall] = sections(tmp_path, events)["device"]["tables"]["stalls"]["rows"]
    assert stall["cpu"] == "what comes next was queued already"


def test_a_launch_is_found_by_its_arrow_where_there_is_no_correlation(tmp_path: Path) -> None:
    arrow = {"cat": "ac2g", "name": "ac2g", "id": 5}
    events = [
        lasting("cpu_op", "aten::a", 0, 30),
        lasting("cuda_runtime", "cudaLaunchKernel", 5, 10),
        {"ph": "s", "pid": 1, "tid": 10, "ts": 5, **arrow},
        {"ph": "f", "pid": 0, "tid": 7, "ts": 20, "bp": "e", **arrow},
        on_device("kernel", "first", 20, 100, 7),
    ]
    by_time = rows(sections(tmp_path, events)["operations"], "by_time", "name")
    assert by_time["aten::a"]["device_self_seconds"] == us(80)


def test_a_launch_is_found_by_the_devices_annotation_where_nothing_else_tells(tmp_path: Path) -> None:
    events = [
        lasting("user_annotation", "step:0", 0, 50),
        lasting("user_annotation", "step:1", 60, 100),
        on_device("gpu_user_annotation", "step:1", 70, 200, 7),
        on_device("kernel", "first", 80, 180, 7),
        on_device("kernel", "lost", 300, 310, 7),
    ]
    path = write_trace(tmp_path / "trace.json", events)
    found = analyze(path).to_json()
    steps = rows(found["sections"]["steps"], "steps", "name")
    assert (steps["step 0"]["device_seconds"], steps["step 1"]["device_seconds"]) == (0.0, us(100))
    assert [warning["code"] for warning in found["warnings"]] == ["unknown_launches"]
    assert found["warnings"][0]["text"].startswith("for 1 of 2 device activities")


def test_pauses_between_recordings_in_one_file_are_no_stalls(tmp_path: Path) -> None:
    def recording(number: int, start: float) -> list[dict[str, Any]]:
        spans = {"pid": "Spans", "tid": "PyTorch Profiler"}
        return [
            {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "ts": start, "dur": 100, **spans},
            lasting("cpu_op", "aten::a", start + 5, start + 30),
            launch("cudaLaunchKernel", start + 10, start + 12, number),
            on_device("kernel", "first", start + 20, start + 40, 7, correlation=number),
            launch("cudaLaunchKernel", start + 45, start + 47, number + 1),
            on_device("kernel", "second", start + 50, start + 90, 7, correlation=number + 1),
        ]

    found = sections(tmp_path, [*recording(1, 0), *recording(3, 10_000)])
    facts = found["device"]["facts"]
    assert (facts["gpu0_span_seconds"], facts["gpu0_idle_seconds"]) == (us(140), us(20))
    assert [row["seconds"] for row in found["device"]["tables"]["stalls"]["rows"]] == [us(10), us(10)]
    assert found["overview"]["facts"]["span_seconds"] == us(200)


def test_blocks_of_the_same_number_in_another_phase_are_other_blocks(tmp_path: Path) -> None:
    events = []
    for name, start in (("encode_text", 0), ("denoise", 1000), ("denoise", 2000)):
        events.append(lasting("user_annotation", f"phase:{name}", start, start + 500))
        events.append(lasting("user_annotation", "block:0", start + 10, start + 110))
    found = sections(tmp_path, events)["modules"]["tables"]["by_time"]["rows"]
    assert [(row["phase"], row["name"], row["calls"], row["cpu_total_seconds"]) for row in found] == [
        ("denoise", "block 0", 2, us(200)),
        ("encode_text", "block 0", 1, us(100)),
    ]
