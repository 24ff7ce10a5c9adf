"""Small pieces of real work: what the log, the names and the observer make of them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.wan_sweep.attribution_checks import inconsistencies
from wan21.events import Span
from wan21.runtime import CpuRuntime
from wan_sweep.measure.allocation_log import AllocationLog
from wan_sweep.measure.attribution import STREAMED, Attributor
from wan_sweep.measure.failed_requests import failed_requests, parse
from wan_sweep.measure.live_set import Allocation, Event, LiveSet, Place
from wan_sweep.measure.module_names import ModuleNames

CPU = torch.device("cpu")
HERE = Place(phase="denoise", step=1)
MORE_THAN_THERE_IS = 2**50


def phase(name: str) -> Span:
    return Span(kind="phase", name=name)


@contextmanager
def recorded(place: Place = HERE) -> Iterator[list[Event]]:
    """What happens inside, once it is over."""
    log = AllocationLog(CPU)
    log.start()
    events: list[Event] = []
    scope = log.open(place)
    try:
        yield events
    finally:
        log.close(scope)
        events += log.stop()


def standing(events: list[Event]) -> list[Allocation]:
    live = LiveSet()
    live.replay(events, HERE)
    return list(live.standing())


@contextmanager
def attributed() -> Iterator[Attributor]:
    attributor = Attributor(CpuRuntime())
    with attributor.recording(), torch.no_grad():
        yield attributor


def result_of(attributor: Attributor, **changes: Any) -> dict[str, Any]:
    result = attributor.result(**({"outcome": "ok", "reason": "", "num_steps": 1} | changes))
    assert inconsistencies(result) == []
    return result


def lines(attributor: Attributor, name: str = "denoise") -> list[dict[str, Any]]:
    (peak,) = (peak for peak in result_of(attributor)["peaks"] if (peak["scope"], peak["phase"]) == ("phase", name))
    live: list[dict[str, Any]] = peak["live"]
    return live


def test_an_allocation_has_its_bytes_place_operation_and_shape() -> None:
    x = torch.ones(3, 5)
    with recorded() as events:
        kept = x * x
        kept.sum()
    (allocation,) = standing(events)
    assert (allocation.num_bytes, allocation.place, allocation.operation) == (60, HERE, "aten::mul")
    assert (allocation.shape, allocation.dtype) == ((3, 5), "float32")


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (lambda x: x.to(torch.bfloat16), "aten::_to_copy"),  # inside aten::to; inside it, aten::empty_strided
        (lambda x: x.t().contiguous(), "aten::clone"),
        (lambda x: x.new_empty(4), "aten::new_empty"),  # inside it, aten::empty
        (lambda x: torch.empty(len(x)), "aten::empty"),
        (torch.empty_like, "aten::empty_like"),
        (lambda x: torch.cat([x, x]), "aten::cat"),
    ],
)
def test_the_operation_is_the_innermost_that_does_more_than_allocate(make: Any, operation: str) -> None:
    x = torch.ones(3, 5)
    with recorded() as events:
        kept = make(x)
    assert [allocation.operation for allocation in standing(events)] == [operation]
    del kept


def test_tensors_in_lists_are_seen_being_read() -> None:
    x = torch.ones(3, 5)
    with recorded() as events:
        both = [x + x, x * x]
        torch.cat(both)
    assert [allocation.shape for allocation in standing(events)] == [(3, 5), (3, 5)]


def test_a_scope_lasts_over_readings_and_other_peoples_ranges_are_no_operations() -> None:
    log = AllocationLog(CPU)
    log.start()
    outer = log.open(HERE)
    inner_place = Place(phase="denoise", module="head")
    inner = log.open(inner_place)
    events = log.read(HERE)
    with torch.profiler.record_function("somebody else's"):
        first = torch.UntypedStorage(100)
    log.close(inner)
    second = torch.UntypedStorage(200)
    assert log.close(outer)
    assert not log.close(outer)
    events += log.stop()
    found = [(one.num_bytes, one.place, one.operation) for one in standing(events)]
    assert found == [(100, inner_place, ""), (200, HERE, "")]
    del first, second


def test_scopes_left_open_are_closed_with_the_one_around_them() -> None:
    log = AllocationLog(CPU)
    log.start()
    outer = log.open(HERE)
    inner = log.open(Place(phase="load"))
    assert log.close(outer)
    assert not log.close(inner)
    assert log.scopes == ()
    log.stop()


def test_a_failed_request_is_known_to_the_byte() -> None:
    with recorded() as events:
        for num_bytes in (MORE_THAN_THERE_IS, MORE_THAN_THERE_IS + 1):
            with pytest.raises(RuntimeError, match="can't allocate memory"):
                torch.empty(num_bytes, dtype=torch.uint8)
    live = LiveSet()
    live.replay(events, HERE)
    assert live.refused is not None
    assert live.refused.request_bytes == MORE_THAN_THERE_IS + 1
    assert (live.refused.place, live.refused.operation) == (HERE, "aten::empty")


TRACE = """
  { "ph": "i",
    "name": "[memory]",
    "ts": 1.5,
    "args": { "Bytes": 7, "Device Id": 0, "Device Type": 1 } },
  { "ph": "i",
    "name": "[OutOfMemory]",
    "ts": 3.5,
    "args": { "Bytes": 300, "Device Id": 1, "Device Type": 1, "Ev Idx": 2 } },
  { "name": "[OutOfMemory]",
    "ts": 2.5,
    "args": { "Bytes": 200, "Device Id": -1, "Device Type": 0 } }
"""


def test_failed_requests_of_a_trace_know_their_device() -> None:
    first, second = sorted(parse(TRACE.splitlines()))
    assert (first.num_bytes, second.num_bytes) == (200, 300)
    assert first.is_of(CPU)
    assert not first.is_of(torch.device("cuda", 1))
    assert second.is_of(torch.device("cuda", 1))
    assert not second.is_of(torch.device("cuda", 0))


def test_without_a_trace_no_request_has_a_size() -> None:
    class Unsaved:
        def save(self, path: str) -> None:
            assert not Path(path).exists()

    assert failed_requests(Unsaved()) == []


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[:1](self.norm(x))  # a slice, so the linear layer has two parents


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))


def test_modules_and_parameters_have_whole_names_also_without_their_root() -> None:
    names = ModuleNames(CPU)
    with names.listening():
        model = Outer()
    linear = model.blocks[1].layers[0]
    assert names.path(linear) == (model, "blocks.1.layers.0")
    sliced = model.blocks[1].layers[:1]
    assert sliced[0] is linear
    assert names.path(linear) == (model, "blocks.1.layers.0")
    tensors = names.new_tensors("dit")
    assert [name for name, _ in tensors[linear.weight.data_ptr()]] == ["blocks.1.layers.0.weight"]
    assert names.component(model) == "dit"
    assert names.new_tensors("") == {}


def test_a_copy_that_becomes_part_of_a_model_brings_its_parts() -> None:
    names = ModuleNames(CPU)
    with names.listening():
        model = Outer()
        model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert names.path(model.blocks[1].layers[0]) == (model, "blocks.1.layers.0")


def test_names_keep_nothing_alive() -> None:
    names = ModuleNames(CPU)
    with names.listening():
        model = Outer()
        tensor_names = names.new_tensors("dit")
        assert len(tensor_names) == 8
        model.blocks[0].layers[0].weight = nn.Parameter(torch.ones(4, 4))
        del tensor_names, model
        assert names.new_tensors("dit") == {}


def test_a_copy_becomes_known_when_it_is_shown() -> None:
    names = ModuleNames(CPU)
    block = copy.deepcopy(Inner())
    names.show(block)
    assert names.path(block.layers[0]) == (block, "layers.0")
    assert names.path(block) == (block, "")


def test_several_parameters_in_one_allocation_are_a_buffer_of_streamed_blocks() -> None:
    with attributed() as attributor, attributor.span(phase("denoise")):
        module = nn.Module()
        buffer = torch.empty(256)
        module.first, module.second = (nn.Parameter(part, requires_grad=False) for part in buffer.split(128))
        module.alone = nn.Parameter(torch.empty(100), requires_grad=False)
    found = {(line["bytes"], line["parameter"]) for line in lines(attributor)}
    assert found == {(1024, STREAMED), (400, "alone")}


def test_what_has_no_name_is_listed_as_unattributed() -> None:
    with attributed() as attributor, attributor.span(phase("denoise")):
        storage = torch.UntypedStorage(1000)  # no operation, no module
        tensor = torch.empty(10)
    assert [(line["kind"], line["bytes"]) for line in lines(attributor)] == [("unattributed", 1000), ("activation", 40)]
    peaks = result_of(attributor)["peaks"]
    assert [(peak["named_bytes"], peak["unattributed_bytes"]) for peak in peaks] == [(40, 1000)] * 2
    del storage, tensor


def test_a_second_recording_at_once_is_refused() -> None:
    runtime = CpuRuntime()
    attributor = Attributor(runtime)
    with runtime.counting(), pytest.raises(RuntimeError, match="profiler runs already"), attributor.recording():
        pass
    with attributor.recording():
        pass
