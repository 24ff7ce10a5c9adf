"""What ranks exchange, read from traces: kernels of NCCL, ranges of gloo."""

from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_traces import Event, lasting, on_device, sections, write_trace
from wan_sweep.analyze.chrome.analysis import exchanged_per_step
from wan_sweep.analyze.chrome.messages import given_bytes


def nccl(name: str, start: float, end: float, num_elements: int, correlation: int) -> Event:
    told = {"Collective name": "any", "dtype": "BFloat16", "In msg nelems": num_elements, "Group size": 2}
    return on_device("kernel", name, start, end, 20, correlation=correlation, **told)


def launched(start: float, correlation: int) -> Event:
    return lasting("cuda_runtime", "cudaLaunchKernelExC", start, start + 1, correlation=correlation)


def two_steps() -> list[Event]:
    """In the first step an exchange beside a product, half of it alone; in the second one that runs on after it."""
    return [
        lasting("user_annotation", "step:2", 0, 100),
        launched(5, 1),
        nccl("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 10, 50, 1000, 1),
        launched(6, 2),
        on_device("kernel", "gemm", 30, 90, 7, correlation=2),
        lasting("user_annotation", "step:3", 100, 200),
        launched(190, 3),
        nccl("ncclKernel_AllGather_RING_LL(ncclWork)", 210, 230, 3000, 3),
    ]


def test_collectives_are_told_by_step_with_the_time_in_which_nothing_else_ran(tmp_path: Path) -> None:
    rows = sections(tmp_path, two_steps())["collectives"]["tables"]["steps"]["rows"]
    assert [(row["step"], row["calls"], row["given_bytes"]) for row in rows] == [
        ("step 2", 1, 2000),
        ("step 3", 1, 6000),
    ]
    assert [row["seconds"] for row in rows] == pytest.approx([40e-6, 20e-6])
    assert [row["exposed_seconds"] for row in rows] == pytest.approx([20e-6, 20e-6])


def test_collectives_are_told_by_name(tmp_path: Path) -> None:
    rows = sections(tmp_path, two_steps())["collectives"]["tables"]["names"]["rows"]
    assert [row["name"] for row in rows] == ["SendRecv", "AllGather"]


def test_metrics_are_means_over_the_steps(tmp_path: Path) -> None:
    metrics = exchanged_per_step(write_trace(tmp_path / "trace.json.gz", two_steps()))
    assert metrics["collectives/given_per_step_bytes"] == 4000
    assert metrics["collectives/per_step_s"] == pytest.approx(30e-6)
    assert metrics["collectives/exposed_per_step_s"] == pytest.approx(20e-6)
    assert metrics["collectives/num_per_step"] == 1


def gloo(name: str, start: float, end: float, shape: list[int]) -> Event:
    event = lasting("user_annotation", f"gloo:{name}", start, end)
    return {**event, "tid": 99, "args": {"Input Dims": [shape], "Input type": ["c10::BFloat16"]}}


def test_on_the_cpu_overlapping_exchanges_count_once_and_what_is_received_is_not_given(tmp_path: Path) -> None:
    events = [
        lasting("user_annotation", "step:2", 0, 100),
        gloo("send", 10, 50, [4, 8]),
        gloo("recv", 30, 60, [4, 8]),
        gloo("all_to_all", 120, 130, [2]),
    ]
    rows = sections(tmp_path, events)["collectives"]["tables"]["steps"]["rows"]
    assert [(row["step"], row["calls"], row["given_bytes"]) for row in rows] == [
        ("step 2", 2, 64),
        ("outside steps", 1, 4),
    ]
    assert rows[0]["seconds"] == pytest.approx(50e-6)
    assert "exposed_seconds" not in rows[0]


def test_a_trace_of_one_rank_has_none(tmp_path: Path) -> None:
    events = [lasting("user_annotation", "step:2", 0, 100), lasting("cpu_op", "aten::mm", 10, 20)]
    assert "ulysses_size" in sections(tmp_path, events)["collectives"]["missing"]
    assert exchanged_per_step(write_trace(tmp_path / "one.json", events)) == {}


@pytest.mark.parametrize(
    ("name", "details", "expected"),
    [
        ("ncclDevKernel_AllReduce", {"In msg nelems": 10, "dtype": "Float"}, 40),
        ("ncclDevKernel_AllReduce", {"In msg nelems": 10, "dtype": "of another world"}, None),
        ("gloo:all_gather", {"Input Dims": [[2, 3]], "Input type": ["float"]}, 24),
        ("gloo:all_gather", {}, None),
        ("gemm", {"Input Dims": [[2, 3]], "Input type": ["float"]}, None),
    ],
)
def test_bytes_are_known_or_not_said(name: str, details: dict[str, Any], expected: int | None) -> None:
    assert given_bytes(name, details) == expected
