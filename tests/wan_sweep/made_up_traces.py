"""A trace of one thread and two streams, small enough to work out every number by hand; and pieces to make others."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_sweep.analyze import analyze

Event = dict[str, Any]

THREAD = {"pid": 1, "tid": 10}


def lasting(category: str, name: str, start: float, end: float, **details: Any) -> Event:
    """A slice of the CPU; times in microseconds."""
    return {"ph": "X", "cat": category, "name": name, **THREAD, "ts": start, "dur": end - start, "args": details}


def launch(name: str, start: float, end: float, correlation: int) -> Event:
    return lasting("cuda_runtime", name, start, end, correlation=correlation)


def on_device(category: str, name: str, start: float, end: float, stream: int, **details: Any) -> Event:
    """A kernel, copy or fill of device 0."""
    place = {"pid": 0, "tid": stream, "args": {"device": 0, "stream": stream, **details}}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, **place}


def memory(time: float, num_bytes: int, address: int, **details: Any) -> Event:
    """An allocation or a free on the first CUDA device; on the CPU with device_type=0."""
    device_type = details.pop("device_type", 1)
    known = {"Bytes": num_bytes, "Addr": address, "Device Type": device_type, "Device Id": 0 if device_type else -1}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", **THREAD, "ts": time, "args": known | details}


def counted(time: float, num_bytes: int, address: int, allocated: int, reserved: int) -> Event:
    return memory(time, num_bytes, address, **{"Total Allocated": allocated, "Total Reserved": reserved})


def gpu_events() -> list[Event]:
    """Two steps: a product and a copy in the first; a product, a wait and a relu in the second."""
    return [
        lasting("user_annotation", "phase:denoise", 0, 1000),
        lasting("user_annotation", "step:0", 10, 490),
        lasting("user_annotation", "module:blocks.0", 20, 200),
        lasting("cpu_op", "aten::mm", 30, 80),
        counted(35, 1000, 100, 5000, 10000),
        launch("cudaLaunchKernel", 40, 50, 1),
        on_device("kernel", "gemm", 60, 160, 7, correlation=1),
        lasting("cpu_op", "aten::to", 100, 190),
        counted(105, 3000, 200, 8000, 10000),
        lasting("cpu_op", "aten::copy_", 110, 180),
        launch("cudaMemcpyAsync", 120, 170, 2),
        on_device("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 150, 250, 13, correlation=2, bytes=200_000),
        counted(300, -1000, 100, 7000, 10000),
        lasting("user_annotation", "step:1", 500, 990),
        lasting("cpu_op", "aten::mm", 510, 560),
        counted(515, 2000, 300, 9000, 12000),
        launch("cudaLaunchKernel", 520, 530, 3),
        on_device("kernel", "gemm", 540, 640, 7, correlation=3),
        lasting("cpu_op", "aten::item", 600, 900),
        launch("cudaStreamSynchronize", 610, 890, 9),
        lasting("cpu_op", "aten::relu", 905, 950),
        launch("cudaLaunchKernel", 910, 920, 4),
        on_device("kernel", "relu", 930, 950, 7, correlation=4),
    ]


def write_trace(path: Path, events: Sequence[Event], **header: Any) -> Path:
    text = json.dumps({"schemaVersion": 1, **header, "traceEvents": list(events)})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def sections(tmp_path: Path, events: Sequence[Event], **header: Any) -> dict[str, Any]:
    """The sections of the analysis of a trace of these events."""
    path = write_trace(tmp_path / "trace.json", events, **header)
    return dict(analyze(path, top=100).to_json()["sections"])


def rows(section: dict[str, Any], table: str, key: str) -> dict[Any, dict[str, Any]]:
    """The rows of a table by one of their columns."""
    return {row[key]: row for row in section["tables"][table]["rows"]}
