"""The real pipeline, attributed, against the same run measured."""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.wan_sweep.attribution_checks import inconsistencies
from wan21.assets import open_assets
from wan21.dit.layers import CrossAttention
from wan21.events import Observer, Span
from wan21.models import model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan_sweep.measure.allocation_log import AllocationLog
from wan_sweep.measure.attribution import STREAMED, Attributor
from wan_sweep.measure.failure import is_out_of_memory
from wan_sweep.measure.recorder import Recorder

SPEC = model_spec("tiny")
NUM_STEPS = 2
MORE_THAN_THERE_IS = 2**50
CHOICES = list(itertools.product(("full", "block"), (False, True)))
IDS = [f"{load_strategy}-{'offload' if offload else 'resident'}" for load_strategy, offload in CHOICES]
AT_WORK = {"encode_text": "t5", "denoise": "dit", "decode": "vae"}


class Nothing:
    """A sink that keeps nothing."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Drops the event."""


def generate(runtime: CpuRuntime, observer: Observer, load_strategy: str, *, offload: bool) -> None:
    options = Options(precision="bf16", load_strategy=load_strategy, offload=offload)  # type: ignore[arg-type]
    request = make_request(SPEC, seed=7, size="96*64", frame_num=1, num_steps=NUM_STEPS)
    VideoPipeline(SPEC, options, open_assets(SPEC, options, runtime), runtime, observer).generate(request)


@dataclass(frozen=True)
class Run:
    """One configuration, measured and attributed."""

    load_strategy: str
    offload: bool
    metrics: dict[str, int | float]
    result: dict[str, Any]

    def peak(self, phase: str) -> dict[str, Any]:
        (found,) = (one for one in self.result["peaks"] if (one["scope"], one["phase"]) == ("phase", phase))
        return dict(found)


@pytest.fixture(scope="module", params=CHOICES, ids=IDS)
def run(request: pytest.FixtureRequest) -> Run:
    load_strategy, offload = request.param
    runtime = CpuRuntime()
    with runtime.counting():
        recorder = Recorder(runtime, Nothing())
        generate(runtime, recorder, load_strategy, offload=offload)
        metrics = recorder.metrics()
    runtime = CpuRuntime()
    attributor = Attributor(runtime)
    with attributor.recording():
        generate(runtime, attributor, load_strategy, offload=offload)
    result = attributor.result(outcome="ok", reason="", num_steps=NUM_STEPS)
    return Run(load_strategy, offload, metrics, result)


def test_peaks_equal_the_measured_ones_to_the_byte(run: Run) -> None:
    highest, *phases = run.result["peaks"]
    assert [peak["phase"] for peak in phases] == ["load", "encode_text", "denoise", "decode"]
    assert highest["allocated_bytes"] == run.metrics["memory/peak/allocated_bytes"]
    for peak in phases:
        assert peak["allocated_bytes"] == run.metrics[f"memory/peak/{peak['phase']}/allocated_bytes"]


def test_nearly_all_bytes_have_a_name_and_all_add_up(run: Run) -> None:
    assert inconsistencies(run.result) == []
    for peak in run.result["peaks"]:
        assert peak["named_bytes"] >= 0.99 * peak["allocated_bytes"]


def test_weights_at_a_peak_equal_the_base_memory_of_the_components_there(run: Run) -> None:
    for phase, component in AT_WORK.items():
        expected = [component] if run.offload else ["t5", "dit", "vae"]
        bases = {name: run.metrics[f"memory/base/{name}_bytes"] for name in expected}
        assert run.peak(phase)["weights"] == bases


def test_weights_are_listed_by_the_names_of_their_parameters(run: Run) -> None:
    names = {item["parameter"] for item in run.peak("denoise")["live"] if item["kind"] == "weights"}
    assert None not in names
    assert "time_projection.1.weight" in names
    assert ("blocks.3.ffn.2.weight" in names) == (run.load_strategy == "full")
    assert (STREAMED in names) == (run.load_strategy == "block")


def test_the_peak_of_denoising_has_step_block_module_and_operation(run: Run) -> None:
    peak = run.peak("denoise")
    assert 0 <= peak["step"] < NUM_STEPS
    assert peak["operation"].startswith("aten::")
    activations = [item for item in peak["live"] if item["kind"] == "activation"]
    inside = [item for item in activations if item["block"] is not None]
    assert {item["module"].split(".")[1] for item in inside} == {str(peak["block"])}
    assert peak["module"].startswith(f"blocks.{peak['block']}.")
    assert {item["component"] for item in inside} == {"dit"}
    assert all(item["shape"] is not None for item in inside)
    assert ("text_embedding.2", None) in {(item["module"], item["step"]) for item in activations}


def test_parts_that_are_called_without_their_component_have_whole_names(run: Run) -> None:
    peak = run.peak("decode")
    assert peak["module"].startswith("decoder.")
    assert {item["component"] for item in peak["live"] if item["phase"] == "decode"} <= {"vae", ""}


def num_hooks() -> dict[str, int]:
    """Of all kinds that torch has for modules everywhere."""
    hooks = {name: value for name, value in vars(torch_module).items() if name.startswith("_global_")}
    return {name: len(value) for name, value in hooks.items() if isinstance(value, dict)}


@contextmanager
def failing(error: Callable[[], object], call: int) -> Iterator[None]:
    """So many calls of cross attention succeed; in the next one this happens."""
    calls = itertools.count()

    def fail(module: nn.Module, arguments: object) -> None:
        if isinstance(module, CrossAttention) and next(calls) == call:
            error()

    handle = register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def ask_for_too_much() -> None:
    torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)


def failed(error: Callable[[], object], load_strategy: str = "full") -> tuple[Attributor, BaseException]:
    """An attributed run that fails in step 1, block 2, in the forward without the prompt."""
    call = SPEC.dit.num_layers * 3 + 2
    runtime = CpuRuntime()
    attributor = Attributor(runtime)
    caught: BaseException | None = None
    with attributor.recording(), failing(error, call):
        try:
            generate(runtime, attributor, load_strategy, offload=True)
        except (MemoryError, RuntimeError, KeyboardInterrupt) as raised:
            caught = raised
    assert caught is not None
    return attributor, caught


@pytest.mark.parametrize("load_strategy", ["full", "block"])
def test_an_oom_gives_the_request_and_what_stood_then(load_strategy: str) -> None:
    attributor, error = failed(ask_for_too_much, load_strategy)
    assert is_out_of_memory(error)
    result = attributor.result(outcome="oom", reason="out of memory", num_steps=NUM_STEPS)
    assert inconsistencies(result) == []
    oom = result["oom"]
    assert (oom["request_bytes"], oom["reason"]) == (MORE_THAN_THERE_IS, "")
    assert (oom["phase"], oom["step"], oom["block"]) == ("denoise", 1, 2)
    assert (oom["module"], oom["operation"]) == ("blocks.2.cross_attn", "aten::empty")
    assert list(oom["weights"]) == ["dit"]
    assert oom["named_bytes"] >= 0.99 * oom["allocated_bytes"]
    modules = {item["module"] for item in oom["live"] if item["kind"] == "activation"}
    assert "text_embedding.2" in modules  # the prompt
    assert [peak["phase"] for peak in result["peaks"][1:]] == ["load", "encode_text", "denoise"]


def test_a_successful_run_has_no_oom_even_if_a_request_failed_meanwhile() -> None:
    attributor, _ = failed(ask_for_too_much)
    assert attributor.result(outcome="ok", reason="", num_steps=NUM_STEPS)["oom"] is None


def lack_memory() -> None:
    raise MemoryError("no more")


def lack_memory_for_a_kernel() -> None:
    raise RuntimeError("could not create a primitive")  # what a limited process gets from oneDNN


@pytest.mark.parametrize("error", [lack_memory, lack_memory_for_a_kernel])
def test_without_a_refused_request_what_stood_soon_after_counts_and_is_said_to_be_that(
    error: Callable[[], object],
) -> None:
    attributor, _ = failed(error)
    result = attributor.result(outcome="oom", reason="out of memory", num_steps=NUM_STEPS)
    assert inconsistencies(result) == []
    oom = result["oom"]
    assert oom["request_bytes"] is None
    assert "refused nothing" in oom["reason"]
    assert (oom["phase"], oom["step"]) == ("denoise", 1)
    assert list(oom["weights"]) == ["dit"]


def test_where_the_host_has_no_memory_to_read_on_what_was_known_before_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    read = AllocationLog.read

    def short(log: AllocationLog, place: Any) -> Any:
        if place.step == 1:
            raise MemoryError
        return read(log, place)

    monkeypatch.setattr(AllocationLog, "read", short)
    attributor, _ = failed(ask_for_too_much)
    result = attributor.result(outcome="oom", reason="out of memory", num_steps=NUM_STEPS)
    assert inconsistencies(result) == []
    assert "memory of the host ran out" in result["reason"]
    assert "memory of the host ran out" in result["oom"]["reason"]
    assert result["oom"]["request_bytes"] == MORE_THAN_THERE_IS  # the error says so
    assert result["oom"]["weights"]["dit"] > 0


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [ask_for_too_much, interrupt, None])
def test_hooks_and_profiler_are_gone_afterwards(error: Callable[[], object] | None) -> None:
    before = num_hooks()
    if error is None:
        with Attributor(CpuRuntime()).recording():
            assert num_hooks() != before
    else:
        _, caught = failed(error)
        assert num_hooks() == before
        del caught
        gc.collect()  # the blocks' generator, given up with the frames of the error, hears of it only now
    assert num_hooks() == before
    assert not torch.autograd._profiler_enabled()


def test_an_error_passes_through_unchanged() -> None:
    attributor = Attributor(CpuRuntime())
    denoise = Span(kind="phase", name="denoise")
    with pytest.raises(KeyError, match="mine"), attributor.recording(), attributor.span(denoise):
        raise KeyError("mine")
    assert attributor.result(outcome="failed", reason="mine", num_steps=0)["oom"] is None
