"""The measurer against made-up counters and against known allocations."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from wan21.events import Span
from wan21.runtime import CpuRuntime, Memory
from wan_sweep.measure.recorder import Recorder

MIB = 2**20


class Lines(list[dict[str, Any]]):
    """Events, kept."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        self.append({**event, "is_urgent": is_urgent})


class Scripted(CpuRuntime):
    """A device whose counters say what the test makes up; reserved is twice allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.highest = 0

    def go(self, *values: int) -> None:
        for value in values:
            self.now = value
            self.highest = max(self.highest, value)

    def memory(self) -> Memory:
        return Memory(
            requested_bytes=self.now,
            requested_peak_bytes=self.highest,
            allocated_bytes=self.now,
            allocated_peak_bytes=self.highest,
            active_bytes=self.now,
            active_peak_bytes=self.highest,
            reserved_bytes=2 * self.now,
            reserved_peak_bytes=2 * self.highest,
            inactive_split_bytes=0,
            num_alloc_retries=0,
            num_ooms=0,
        )

    def reset_memory_peaks(self) -> None:
        self.highest = self.now


def phase(name: str) -> Span:
    return Span(kind="phase", name=name)


def step(index: int, total: int = 2) -> Span:
    return Span(kind="step", name="step", index=index, total=total)


@contextmanager
def counting() -> Iterator[tuple[CpuRuntime, Recorder]]:
    runtime = CpuRuntime()
    with runtime.counting():
        yield runtime, Recorder(runtime, Lines())


def test_64_mib_allocated_read_as_64_mib() -> None:
    with counting() as (_, recorder):
        with recorder.span(phase("denoise")):
            tensor = torch.empty(64 * MIB, dtype=torch.uint8)
        metrics = recorder.metrics()
        del tensor
    assert metrics["memory/peak/denoise/allocated_bytes"] == 64 * MIB
    assert metrics["memory/activation/denoise_bytes"] == 64 * MIB


def test_a_buffer_freed_inside_the_phase_counts_for_its_peak_only() -> None:
    with counting() as (runtime, recorder):
        kept = torch.empty(3 * MIB, dtype=torch.uint8)
        with recorder.span(phase("decode")):
            torch.empty(5 * MIB, dtype=torch.uint8)
        now = runtime.memory().allocated_bytes
        metrics = recorder.metrics()
        del kept
    assert metrics["memory/peak/decode/allocated_bytes"] == 8 * MIB
    assert metrics["memory/activation/decode_bytes"] == 5 * MIB
    assert now == 3 * MIB


def test_nested_spans_get_the_peaks_worked_out_by_hand() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    device.go(10)
    with recorder.span(phase("denoise")):
        device.go(50, 20)
        with recorder.span(step(0)):
            device.go(90, 30)
        device.go(60, 20)
        with recorder.span(step(1)):
            device.go(70, 20)
    with recorder.span(phase("decode")):
        device.go(40, 5)
    metrics, series = recorder.metrics(), recorder.series()
    assert series["step/allocated_bytes"] == [90, 70]
    assert series["step/reserved_bytes"] == [180, 140]
    assert metrics["memory/peak/denoise/allocated_bytes"] == 90
    assert metrics["memory/activation/denoise_bytes"] == 80
    assert metrics["memory/peak/decode/allocated_bytes"] == 40
    assert metrics["memory/activation/decode_bytes"] == 20
    assert metrics["memory/peak/allocated_bytes"] == 90
    assert metrics["memory/peak/reserved_bytes"] == 180
    assert metrics["memory/fragmentation_pct"] == 50


@pytest.mark.parametrize(("peaks", "grown"), [([50, 90, 90, 70], None), ([50, 90, 91, 99], 2), ([90, 50], None)])
def test_a_step_after_the_second_that_reserves_more_is_told_once(peaks: list[int], grown: int | None) -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(phase("denoise")):
        for index, peak in enumerate(peaks):
            with recorder.span(step(index, len(peaks))):
                device.go(peak, 10)
    told = [warning["text"] for warning in recorder.warnings]
    assert told == ([] if grown is None else [f"step 3 reserved {grown} bytes more than the first 2"])


def test_base_memory_is_what_a_load_adds_and_residents_are_who_stands_in_a_phase() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(phase("load")):
        for name, size in (("t5", 100), ("dit", 40)):
            with recorder.span(Span(kind="component", name=name, expected_bytes=size)):
                device.go(device.now + size + 7, device.now + size)
    with recorder.span(phase("encode_text")):
        device.go(150, 140)
    with recorder.span(Span(kind="release", name="t5")):
        device.go(40)
    with recorder.span(phase("denoise")):
        device.go(45, 40)
    metrics = recorder.metrics()
    assert (metrics["memory/base/t5_bytes"], metrics["memory/base/dit_bytes"]) == (100, 40)
    assert metrics["memory/resident/encode_text/t5_bytes"] == 100
    assert "memory/resident/denoise/t5_bytes" not in metrics
    assert metrics["memory/resident/denoise/dit_bytes"] == 40
    assert recorder.warnings == []


def test_a_load_that_adds_other_bytes_than_its_parameters_is_flagged() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(Span(kind="component", name="vae", expected_bytes=8)):
        device.go(9)
    assert [warning["code"] for warning in recorder.warnings] == ["base_mismatch"]


def test_phases_that_occur_again_add_their_seconds_and_keep_their_highest_peak() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    for peak in (30, 20):
        with recorder.span(phase("load")):
            device.go(peak, 0)
    assert recorder.metrics()["memory/peak/load/allocated_bytes"] == 30
    assert recorder.metrics()["time/load_s"] > 0


def test_a_failure_is_placed_and_the_numbers_until_then_are_kept() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(Span(kind="component", name="dit", expected_bytes=4)):
        device.go(4)

    def fail() -> None:
        with recorder.span(phase("denoise")), recorder.span(step(1, total=9)):
            device.go(99)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert recorder.failed_at == {
        "phase": "denoise",
        "step": 1,
        "num_steps": 9,
        "resident_components_bytes": {"dit": 4},
        "allocated_bytes": 99,
    }
    assert recorder.metrics()["memory/peak/allocated_bytes"] == 99


def test_a_component_that_leaves_after_a_failure_does_not_make_it_undone() -> None:
    device, lines = Scripted(), Lines()
    recorder = Recorder(device, lines)
    with recorder.span(Span(kind="component", name="dit", expected_bytes=4)):
        device.go(4)

    def fail() -> None:
        try:
            with recorder.span(phase("denoise")), recorder.span(step(1, total=9)):
                raise MemoryError
        finally:
            with recorder.span(Span(kind="release", name="dit")):
                device.go(0)

    with pytest.raises(MemoryError):
        fail()
    assert recorder.failed_at is not None
    assert (recorder.failed_at["phase"], recorder.failed_at["step"]) == ("denoise", 1)
    assert recorder.failed_at["resident_components_bytes"] == {"dit": 4}
    assert lines[-1]["residents"] == {}


def test_a_failure_that_is_dealt_with_inside_a_span_is_none() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(phase("extend_prompt")):
        with suppress(MemoryError), recorder.span(Span(kind="component", name="qwen")):
            device.go(70)
            raise MemoryError
        device.go(0)
    with recorder.span(phase("denoise")):
        device.go(10)
    assert recorder.failed_at is None
    metrics = recorder.metrics()
    assert metrics["memory/peak/extend_prompt/allocated_bytes"] == 70
    assert metrics["memory/peak/denoise/allocated_bytes"] == 10
    assert "memory/base/qwen_bytes" not in metrics


def test_every_boundary_leaves_a_line_with_counters() -> None:
    lines = Lines()
    recorder = Recorder(Scripted(), lines, wants_blocks=True)
    block = Span(kind="block", name="block", index=3)
    with recorder.span(phase("denoise")), recorder.span(step(0)), recorder.span(block):
        pass
    assert [(line["event"], line["kind"]) for line in lines] == [
        ("begin", "phase"),
        ("begin", "step"),
        ("begin", "block"),
        ("end", "block"),
        ("end", "step"),
        ("end", "phase"),
    ]
    for line in lines:
        is_block = line["kind"] == "block"
        assert (line["host_rss_bytes"] is None) == is_block
        assert line["is_urgent"] is not is_block
    assert {line["phase"] for line in lines} == {"denoise"}
    assert [line["elapsed_s"] for line in lines] == sorted(line["elapsed_s"] for line in lines)


def test_an_event_says_what_happened_since_the_one_before() -> None:
    device, lines = Scripted(), Lines()
    recorder = Recorder(device, lines)
    with recorder.span(phase("denoise")):
        device.go(50, 20)
        with recorder.span(step(0)):
            device.go(40, 30)
    assert [line["allocated_bytes"] for line in lines] == [0, 20, 30, 30]
    assert [line["interval"]["allocated_peak_bytes"] for line in lines] == [0, 50, 40, 30]
    assert [line["span"]["allocated_peak_bytes"] for line in lines if line["event"] == "end"] == [40, 50]


def test_components_that_come_and_go_are_switches_with_bytes_and_seconds() -> None:
    device, lines = Scripted(), Lines()
    recorder = Recorder(device, lines)
    for name, size in (("t5", 100), ("dit", 40)):
        with recorder.span(Span(kind="component", name=name, expected_bytes=size)):
            device.go(size)
        with recorder.span(Span(kind="release", name=name)):
            device.go(0)
    metrics = recorder.metrics()
    assert (metrics["memory/switch/num"], metrics["memory/switch/moved_bytes"]) == (2, 140)
    assert metrics["time/switch_s"] > 0
    assert [line["moved_bytes"] for line in lines if line["event"] == "end"] == [100, 100, 40, 40]
    assert [line["residents"] for line in lines] == [{}, {"t5": 100}, {"t5": 100}, {}, {}, {"dit": 40}, {"dit": 40}, {}]


def test_a_component_that_goes_with_the_pipeline_is_no_switch_and_stands_in_no_phase_after_it() -> None:
    device, lines = Scripted(), Lines()
    recorder = Recorder(device, lines)
    with recorder.span(Span(kind="component", name="vae", expected_bytes=40)):
        device.go(40)
    with recorder.span(phase("decode")):
        pass
    device.go(0)
    recorder.forget_components()
    with recorder.span(phase("save")):
        pass
    assert [line["residents"] for line in lines if line["phase"] == "save"] == [{}, {}]
    metrics = recorder.metrics()
    assert metrics["memory/resident/decode/vae_bytes"] == 40
    assert not any("switch" in name or "resident/save" in name for name in metrics)


def test_without_a_release_there_is_no_switching_to_report() -> None:
    recorder = Recorder(Scripted(), Lines())
    with recorder.span(Span(kind="component", name="t5", expected_bytes=0)):
        pass
    assert not any("switch" in name for name in recorder.metrics())


def test_what_stands_before_the_first_span_belongs_to_the_libraries() -> None:
    device = Scripted()
    device.go(33)
    recorder = Recorder(device, Lines())
    with recorder.span(phase("denoise")):
        device.go(50, 33)
    metrics = recorder.metrics()
    assert metrics["memory/base/libraries_bytes"] == 33
    assert metrics["memory/activation/denoise_bytes"] == 17


def test_fluctuation_is_the_range_of_step_peaks_after_the_first_step() -> None:
    device = Scripted()
    recorder = Recorder(device, Lines())
    with recorder.span(phase("denoise")):
        for index, peak in enumerate((10, 80, 100, 90)):
            with recorder.span(step(index, total=4)):
                device.go(peak, 0)
    assert recorder.metrics()["memory/fluctuation_pct"] == 20


def test_what_the_process_holds_outside_the_allocator_is_told_where_it_is_known() -> None:
    device = Scripted()
    told = Recorder(device, Lines(), process_used=lambda: 700 + 2 * device.now)
    untold = Recorder(device, Lines())
    for recorder in (told, untold):
        with recorder.span(phase("denoise")):
            device.go(50)
        device.go(0)
    assert told.metrics()["memory/outside_allocator_bytes"] == 700
    assert told.metrics()["memory/peak/process_used_bytes"] == 800
    assert "memory/outside_allocator_bytes" not in untold.metrics()


def test_what_reading_costs_is_not_in_the_times_of_outer_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    device = Scripted()
    monkeypatch.setattr("wan_sweep.measure.recorder.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(device, "device_used_bytes", lambda: pass_by(1000))
    recorder = Recorder(device, Lines())
    with recorder.span(phase("denoise")):
        for index in range(10):
            with recorder.span(step(index, total=10)):
                pass_by(2)
            pass_by(0.5)
    assert recorder.metrics()["time/denoise_s"] == 25
    assert recorder.series()["step/seconds"] == [2] * 10
    assert now[0] > 20_000
