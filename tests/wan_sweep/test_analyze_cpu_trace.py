import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from tests.wan_sweep.made_up_traces import lasting, memory, rows, sections
from wan_sweep.analyze import analyze

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11 says so of every profile

Recorded = tuple[Path, profile]

# The profiler's table counts in nanoseconds, the trace in microseconds with three digits.
TOLERANCE_SECONDS = 5e-6


class Net(nn.Module):
    """Has nothing to do with any model of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.table(tokens)
        return self.layers(hidden).softmax(-1)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recorded]:
    def run(name: str, **options: bool) -> Recorded:
        torch.manual_seed(0)
        net, tokens = Net(), torch.randint(50, (8, 16))
        net(tokens)
        always: Callable[[int], ProfilerAction] = lambda _: ProfilerAction.RECORD  # noqa: E731 # names the steps
        with profile(activities=[ProfilerActivity.CPU], schedule=always, **options) as profiler, torch.no_grad():
            for next_step in (profiler.step, list):
                with record_function("evaluate"):
                    net(tokens)
                next_step()
        path = tmp_path_factory.mktemp("traces") / name
        profiler.export_chrome_trace(str(path))
        return path, profiler

    return run


@pytest.fixture(scope="module")
def recorded(record: Callable[..., Recorded]) -> Recorded:
    return record("trace.json.gz", profile_memory=True, record_shapes=True)


def test_operations_have_the_times_of_the_profilers_own_table(recorded: Recorded) -> None:
    path, profiler = recorded
    by_time = rows(analyze(path, top=1000).to_json()["sections"]["operations"], "by_time", "name")
    told = {one.key: one for one in profiler.key_averages() if one.key.startswith("aten::")}
    assert "aten::addmm" in told
    for name, one in told.items():
        row = by_time[name]
        tolerance = TOLERANCE_SECONDS * one.count
        assert row["cpu_self_seconds"] == pytest.approx(one.self_cpu_time_total * 1e-6, abs=tolerance)
        assert row["cpu_total_seconds"] == pytest.approx(one.cpu_time_total * 1e-6, abs=tolerance)


def test_the_peak_is_the_highest_sum_of_the_allocations_in_the_order_of_time(recorded: Recorded) -> None:
    path, _ = recorded
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    changes = sorted((one["ts"], one["args"]["Bytes"]) for one in events if one.get("name") == "[memory]")
    level = highest = 0
    for _, num_bytes in changes:
        level += num_bytes
        highest = max(highest, level)
    found = analyze(path).to_json()["sections"]["memory"]
    assert highest > 0
    assert found["facts"]["peak_allocated_bytes"] == highest
    assert sum(row["allocated_bytes"] for row in found["tables"]["live_at_peak"]["rows"]) == highest
    assert "drifts on the CPU" in found["notes"][0]


def test_allocations_go_to_the_operation_that_wanted_them_and_not_to_empty(recorded: Recorded) -> None:
    path, _ = recorded
    by_memory = rows(analyze(path, top=100).to_json()["sections"]["operations"], "by_memory", "name")
    # Two runs of 8 x 16 rows: 64 and 32 numbers of 4 bytes from the products, 32 from the softmax.
    assert by_memory["aten::addmm"]["allocated_self_bytes"] == 2 * 8 * 16 * (64 + 32) * 4
    assert by_memory["aten::_softmax"]["allocated_self_bytes"] == 2 * 8 * 16 * 32 * 4


def test_steps_and_annotations_of_others_are_recognized(recorded: Recorded) -> None:
    path, _ = recorded
    found = analyze(path).to_json()["sections"]
    assert [row["name"] for row in found["steps"]["tables"]["steps"]["rows"]] == ["ProfilerStep#0", "ProfilerStep#1"]
    [annotation] = found["annotations"]["tables"]["by_time"]["rows"]
    assert (annotation["name"], annotation["calls"]) == ("evaluate", 2)


def test_modules_are_named_where_stacks_were_recorded(record: Callable[..., Recorded]) -> None:
    path, _ = record("stacks.json", profile_memory=True, with_stack=True)
    found = rows(analyze(path, top=100).to_json()["sections"]["modules"], "by_time", "name")
    calls = {name.rpartition("_")[0]: row["calls"] for name, row in found.items()}
    assert calls == {"Net": 2, "Embedding": 2, "Sequential": 2, "Linear": 2, "GELU": 2}
    whole = next(row for name, row in found.items() if name.startswith("Net"))
    parts = next(row for name, row in found.items() if name.startswith("Sequential"))
    assert whole["cpu_total_seconds"] > parts["cpu_total_seconds"] > parts["cpu_self_seconds"] > 0
    assert whole["allocated_total_bytes"] > parts["allocated_total_bytes"] > parts["allocated_self_bytes"]


def test_what_was_not_recorded_is_said_and_not_shown_as_zero(record: Callable[..., Recorded]) -> None:
    path, _ = record("plain.json")
    found = analyze(path).to_json()["sections"]
    assert "profile_memory=True" in found["memory"]["missing"]
    assert found["memory"]["facts"] == found["memory"]["tables"] == {}
    assert "profile_memory=True" in found["churn"]["missing"]
    assert "ProfilerActivity.CUDA" in found["kernels"]["missing"]
    assert "phase:NAME" in found["phases"]["missing"]
    assert "with_stack=True" in found["modules"]["missing"]
    assert "allocated_self_bytes" not in found["operations"]["tables"]["by_time"]["rows"][0]


def test_a_bare_array_of_events_is_a_trace_even_without_its_last_bracket(tmp_path: Path) -> None:
    events = [lasting("cpu_op", "aten::a", 0, 30), lasting("cpu_op", "aten::b", 5, 10)]
    path = tmp_path / "trace.json"
    for text, codes in ((json.dumps(events), []), (json.dumps(events)[:-1] + ",\n", ["open_array"])):
        path.write_text(text)
        found = analyze(path).to_json()
        by_time = rows(found["sections"]["operations"], "by_time", "name")
        assert by_time["aten::a"]["cpu_self_seconds"] == pytest.approx(25e-6)
        assert [warning["code"] for warning in found["warnings"]] == codes


def test_pairs_of_begin_and_end_make_slices(tmp_path: Path) -> None:
    events = [
        {"ph": "B", "name": "outer", "pid": 1, "tid": 1, "ts": 0},
        {"ph": "B", "name": "inner", "pid": 1, "tid": 1, "ts": 10},
        {"ph": "E", "pid": 1, "tid": 1, "ts": 40},
        {"ph": "E", "pid": 1, "tid": 1, "ts": 100},
        {"ph": "B", "name": "never ended", "pid": 1, "tid": 1, "ts": 110},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(events))
    found = analyze(path).to_json()
    by_time = rows(found["sections"]["operations"], "by_time", "name")
    assert by_time["outer"]["cpu_self_seconds"] == pytest.approx(70e-6)
    assert "never ended" not in by_time
    assert [warning["code"] for warning in found["warnings"]] == ["unclosed_slices"]


def test_a_call_inside_one_of_the_same_name_counts_once_in_the_total(tmp_path: Path) -> None:
    events = [lasting("cpu_op", "aten::to", 0, 100), lasting("cpu_op", "aten::to", 20, 80)]
    row = rows(sections(tmp_path, events)["operations"], "by_time", "name")["aten::to"]
    assert (row["calls"], row["cpu_total_seconds"]) == (2, pytest.approx(100e-6))
    assert row["cpu_self_seconds"] == pytest.approx(100e-6)


def test_events_without_what_they_need_are_left_out_and_counted(tmp_path: Path) -> None:
    whole = lasting("cpu_op", "aten::a", 0, 30)
    broken: list[Any] = [{"ph": "X", "name": "no time"}, whole | {"ts": "soon"}, 7, whole | {"name": ["list"]}]
    broken += [memory(10, 2**70, 1), {"ph": "i", "name": "[memory]", "ts": 3}]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [whole, *broken]}))
    found = analyze(path).to_json()
    assert [row["calls"] for row in found["sections"]["operations"]["tables"]["by_time"]["rows"]] == [1]
    assert found["warnings"][0]["text"].startswith("6 of 7 events lack")


def test_memory_of_the_cpu_starts_at_the_recording_and_names_devices_apart(tmp_path: Path) -> None:
    events = [
        lasting("cpu_op", "aten::a", 0, 30),
        memory(5, 700, 1, device_type=0, **{"Total Allocated": 123_456}),
        memory(6, -700, 1, device_type=0, **{"Total Allocated": 123_456}),
        memory(7, 300, 2, device_type=0, **{"Total Allocated": 123_456}),
    ]
    found = sections(tmp_path, events)["memory"]
    assert (found["facts"]["device"], found["facts"]["peak_allocated_bytes"]) == ("cpu", 700)
    assert "standing_bytes" not in found["facts"]
