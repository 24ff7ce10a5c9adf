"""The tracer on the tiny pipeline, and on made-up spans where a limit or a fault has to be hit exactly."""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from wan21.assets import open_assets
from wan21.dit.block import Block
from wan21.events import Observer, Span, together
from wan21.models import model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan_sweep.measure.trace_file import TraceFile
from wan_sweep.measure.tracer import Tracer

SPEC = model_spec("tiny")
NAME = "trace_rank0.pt.trace.json.gz"
CLOCK_US = 0.01  # times are written with three digits of a microsecond
OPS_PER_BLOCK = 40


def generate(tracer: Tracer, *others: Observer) -> None:
    runtime, options = CpuRuntime(), Options(precision="fp32", offload=True)
    request = make_request(SPEC, seed=7, size="96*64", frame_num=5, num_steps=tracer.num_steps)
    observer = together(tracer, *others)
    VideoPipeline(SPEC, options, open_assets(SPEC, options, runtime), runtime, observer).generate(request)


def read(folder: Path, name: str = NAME) -> list[dict[str, Any]]:
    with gzip.open(folder / name) as file:
        return json.load(file)["traceEvents"]


def ranges(events: list[dict[str, Any]], kind: str = "") -> list[dict[str, Any]]:
    found = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(kind)]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def names(events: list[dict[str, Any]], kind: str) -> list[str]:
    return [event["name"] for event in ranges(events, kind)]


def phase(name: str) -> Span:
    return Span(kind="phase", name=name)


def step(index: int) -> Span:
    return Span(kind="step", name="step", index=index, total=5)


def work(num_ops: int) -> None:
    x = torch.ones(4)
    for _ in range(num_ops):
        x.add_(1)


def made_up_run(tracer: Tracer, *, num_steps: int = 5, num_blocks: int = 6, decode_ops: int = 1) -> None:
    """Like a run: the same number of operations in every block."""
    with tracer.span(phase("denoise")):
        for index in range(num_steps):
            with tracer.span(step(index)):
                for block in range(num_blocks):
                    with tracer.span(Span(kind="block", name="block", index=block)):
                        work(OPS_PER_BLOCK)
    with tracer.span(phase("decode")):
        for index in range(2):
            with tracer.span(Span(kind="video", name="video", index=index, total=2)):
                work(decode_ops)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trace")
    tracer = Tracer(CpuRuntime(), folder)
    with tracer.recording():
        generate(tracer)
    return folder, tracer.result(), read(folder)


Traced = tuple[Path, dict[str, Any], list[dict[str, Any]]]


def test_the_sizes_and_the_number_of_events_stated_are_those_of_the_file(traced: Traced) -> None:
    folder, result, events = traced
    assert [path.name for path in folder.iterdir()] == result["files"] == [NAME]
    assert result["bytes"] == (folder / NAME).stat().st_size
    assert result["uncompressed_bytes"] == len(gzip.decompress((folder / NAME).read_bytes()))
    assert result["num_events"] == len(events)


def test_after_a_wait_and_a_warm_up_exactly_three_steps_are_recorded(traced: Traced) -> None:
    _, result, events = traced
    assert names(events, "step") == ["step:2", "step:3", "step:4"]
    assert result["steps"] == [2, 3, 4]
    assert len(names(events, "block")) == SPEC.text.num_layers + 3 * 2 * SPEC.dit.num_layers
    assert result["stopped"] == ""


def test_loads_encoders_releases_and_the_first_video_are_there_in_order(traced: Traced) -> None:
    _, result, events = traced
    assert [name for name in names(events, "") if not name.startswith("block")] == [
        *("phase:load", "component:t5", "phase:encode_text", "release:t5"),
        *("phase:load", "component:dit", "phase:denoise", "step:2", "step:3", "step:4", "release:dit"),
        *("phase:load", "component:vae", "phase:decode", "video:0", "release:vae"),
    ]
    assert result["phases"] == ["load", "encode_text", "denoise", "decode"]


def test_ranges_nest_and_no_operation_lies_outside_them(traced: Traced) -> None:
    _, _, events = traced
    open_ends: list[float] = []
    for event in ranges(events):
        while open_ends and open_ends[-1] <= event["ts"] + CLOCK_US:
            open_ends.pop()
        end = event["ts"] + event["dur"]
        assert all(end <= outer + CLOCK_US for outer in open_ends), event["name"]
        open_ends.append(end)
    tops = [event for event in ranges(events) if event["name"].startswith(("phase", "release"))]
    assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(tops))
    for op in (event for event in events if event.get("cat") == "cpu_op"):
        assert any(top["ts"] <= op["ts"] <= top["ts"] + top["dur"] for top in tops), op["name"]


def test_operations_have_shapes_and_allocations_are_recorded(traced: Traced) -> None:
    _, _, events = traced
    product = next(event for event in events if event["name"] == "aten::addmm")
    assert len(product["args"]["Input Dims"][1]) == 2
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert min(changes) < 0 < max(changes)


def test_what_ties_kernels_to_operations_is_unique_over_all_stretches(traced: Traced) -> None:
    ids = [event["args"]["External id"] for event in traced[2] if event.get("cat") == "cpu_op"]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("with_stack", [False, True])
def test_stacks_are_recorded_only_if_asked_for(tmp_path: Path, *, with_stack: bool) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path, with_stack=with_stack)
    with tracer.recording(), tracer.span(phase("encode_text")):
        work(1)
    calls = [event["name"] for event in read(tmp_path) if event.get("cat") == "python_function"]
    assert any(re.search(r"test_tracer\.py\(\d+\): work", call) for call in calls) == with_stack
    assert bool(calls) == with_stack


class Saboteur:
    """Lets memory run out inside a block of a step."""

    wants_blocks = False

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        if span.kind == "step" and span.index == 3:
            self._stack.callback(torch.nn.modules.module.register_module_forward_pre_hook(fail_in_block).remove)
        yield


def fail_in_block(module: torch.nn.Module, _: object) -> None:
    if type(module) is Block:
        raise MemoryError


def test_when_memory_runs_out_the_trace_until_then_is_written_and_the_error_passes(tmp_path: Path) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path)
    with ExitStack() as stack, pytest.raises(MemoryError), tracer.recording():
        generate(tracer, Saboteur(stack))
    result, events = tracer.result(), read(tmp_path)
    assert result["steps"] == [2]
    assert names(events, "step") == ["step:2", "step:3"]
    assert result["phases"] == ["load", "encode_text", "denoise"]
    assert result["stopped"] == "MemoryError in phase:denoise, step:3, block:0"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_error_before_anything_is_recorded_leaves_no_file(tmp_path: Path) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path)
    with pytest.raises(KeyboardInterrupt), tracer.recording():
        raise KeyboardInterrupt
    assert tracer.result()["files"] == list(tmp_path.iterdir()) == []
    assert tracer.result()["stopped"] == "KeyboardInterrupt in no span"


def test_each_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        tracer = Tracer(CpuRuntime(), tmp_path, rank)
        with tracer.recording(), tracer.span(phase("encode_text")):
            work(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, NAME.replace("0", "1")]


def test_viewers_are_told_the_rank_before_and_after_the_profiler_calls_it_python(tmp_path: Path) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path)
    with tracer.recording(), tracer.span(phase("encode_text")):
        work(1)
    events = read(tmp_path)
    (pid,) = {event["pid"] for event in events if event["name"] == "phase:encode_text"}
    told = [event["args"]["name"] for event in events if event["name"] == "process_name" and event["pid"] == pid]
    assert (told[0], told[-1]) == ("rank 0", "rank 0")


def test_a_run_with_fewer_steps_gives_what_it_has(tmp_path: Path) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path)
    with tracer.recording():
        made_up_run(tracer, num_steps=4)
    assert tracer.result()["steps"] == [2, 3]
    assert tracer.result()["phases"] == ["denoise", "decode"]


@pytest.fixture(scope="module")
def step_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    tracer = Tracer(CpuRuntime(), tmp_path_factory.mktemp("trace"))
    with tracer.recording():
        made_up_run(tracer)
    return int(tracer.result()["uncompressed_bytes"]) // 3


@pytest.mark.parametrize(("room_in_steps", "steps", "num_blocks"), [(3.2, [2, 3], 12), (1.7, [2], 6), (1.0, [], None)])
def test_a_limit_is_kept_by_recording_fewer_steps_or_fewer_blocks(
    room_in_steps: float, steps: list[int], num_blocks: int | None, step_bytes: int, tmp_path: Path
) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path, max_bytes=int(room_in_steps * step_bytes))
    with tracer.recording():
        made_up_run(tracer)
    result, events = tracer.result(), read(tmp_path)
    recorded = len(names(events, "block"))
    assert result["uncompressed_bytes"] <= room_in_steps * step_bytes
    assert result["steps"] == steps
    assert recorded == num_blocks if num_blocks else 0 < recorded < 6
    expected = f"{len(steps)} of 3 steps: " if steps else f"{recorded} of the 6 blocks of step 2: "
    assert result["stopped"].startswith(expected)


def test_a_stretch_that_would_be_too_large_is_left_out_with_its_reason(step_bytes: int, tmp_path: Path) -> None:
    tracer = Tracer(CpuRuntime(), tmp_path, max_bytes=5 * step_bytes)
    with tracer.recording():
        made_up_run(tracer, decode_ops=30 * OPS_PER_BLOCK)
    assert tracer.result()["phases"] == ["denoise"]
    assert re.match(r"no decode: it takes .* are left$", tracer.result()["stopped"])
    assert names(read(tmp_path), "phase") == ["phase:denoise"]


def test_a_part_without_its_end_leaves_no_file_at_all(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    whole.write_text('{"schemaVersion": 1, "traceEvents": [{"ph": "M"}], "traceName": "x"}')
    cut.write_text('{"schemaVersion": 1, "traceEvents": [{"ph": "M"}, {"ph"')
    file = TraceFile(tmp_path / NAME, max_bytes=1000, title="rank 0")
    assert file.append(whole)
    with pytest.raises(OSError, match=r"cut\.json ends in the middle"):
        file.append(cut)
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "whole.json"]


def test_bytes_that_are_no_text_do_not_spoil_the_file(tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    part.write_bytes(b'{"traceEvents": [{"ph": "X", "name": "f\x9d\x0f \xc3\xa9"}], "traceName": "x"}')
    file = TraceFile(tmp_path / NAME, max_bytes=1000, title="rank 0")
    file.append(part)
    file.close()
    assert read(tmp_path)[1:-1] == [{"ph": "X", "name": "f \u00e9"}]
