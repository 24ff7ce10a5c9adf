"""Streamed blocks: the same results as resident ones, from one room for two pieces."""

import contextlib
import gc
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

from wan21.memory.parked import Parked, keep_on_host
from wan21.memory.streaming import StreamPlan, Unit, stream
from wan21.parts import InParts
from wan21.runtime import CpuRuntime

WIDTH = 8
LARGE = 64  # of the part in the middle


class Layers(InParts):
    """A block of three parts of different sizes, with parameters of two dtypes."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "small": ("linear",),
        "large": ("wide", "back"),
        "last": ("shift",),
    }

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.wide = nn.Linear(WIDTH, LARGE)
        self.back = nn.Linear(LARGE, WIDTH)
        self.shift = nn.Parameter(torch.empty(1, WIDTH, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.part("small"):
            x = self.linear(x.bfloat16()).float()
        with self.part("large"):
            x = self.back(self.wide(x))
        with self.part("last"):
            return x + self.shift


class Beside(Layers):
    """The last part lies beside the one before it, and is entered before that one is left."""

    BESIDE = frozenset({"last"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.part("small"):
            x = self.linear(x.bfloat16()).float()
        with self.part("large"):
            x = self.back(self.wide(x))
            with self.part("last"):
                return x + self.shift


class Overlapping(Layers):
    """Enters its second part before it leaves the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.part("small"), self.part("large"):
            x = self.back(self.wide(self.linear(x.bfloat16()).float()))
        with self.part("last"):
            return x + self.shift


def weight(index: int, name: str, shape: torch.Size) -> torch.Tensor:
    seed = 1000 * index + sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / WIDTH


def write(index: int, name: str, to: torch.Tensor, first: int) -> None:
    (module,) = meta_blocks(1)
    flat = weight(index, name, module.get_parameter(name).shape).view(-1)
    to.copy_(flat[first : first + to.numel()])


def meta_blocks(num_blocks: int, kind: type[InParts] = Layers) -> list[InParts]:
    with torch.device("meta"):
        return [kind() for _ in range(num_blocks)]


def streamed(
    num_blocks: int,
    runtime: CpuRuntime,
    *,
    unit: Unit = "part",
    resident_bytes: int = 0,
    kind: type[InParts] = Layers,
) -> list[InParts]:
    blocks = meta_blocks(num_blocks, kind)
    stream(blocks, StreamPlan(blocks, unit, resident_bytes), write, runtime)
    return blocks


def resident(num_blocks: int) -> list[nn.Module]:
    blocks = [Layers() for _ in range(num_blocks)]
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            parameter.data.copy_(weight(index, name, parameter.shape))
    return list(blocks)


def run(blocks: list[InParts] | list[nn.Module], seed: int) -> torch.Tensor:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
    for block in blocks:
        x = block(x)
    return x


def all_bytes(num_blocks: int) -> int:
    return StreamPlan(meta_blocks(num_blocks), "part", 2**40).device_bytes


@torch.no_grad()
@pytest.mark.parametrize("kind", [Layers, Beside, Overlapping])
@pytest.mark.parametrize("unit", ["block", "part"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
def test_every_pass_equals_resident_blocks(num_blocks: int, unit: Unit, kind: type[InParts]) -> None:
    for tenths in range(11):
        share = all_bytes(num_blocks) * tenths // 10
        blocks = streamed(num_blocks, CpuRuntime(), unit=unit, resident_bytes=share, kind=kind)
        for seed in range(3):
            assert torch.equal(run(blocks, seed), run(resident(num_blocks), seed))


@torch.no_grad()
@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [1, 3, 4])
@pytest.mark.parametrize("unit", ["block", "part"])
def test_a_pass_given_up_does_not_spoil_the_next(unit: Unit, num_blocks: int, stop: int) -> None:
    blocks = streamed(num_blocks, CpuRuntime(), unit=unit)
    for block in blocks[:stop]:  # given up between blocks
        block(torch.zeros(1, WIDTH))
    assert torch.equal(run(blocks, 1), run(resident(num_blocks), 1))
    with pytest.raises(RuntimeError, match="shape"):
        blocks[min(stop, num_blocks - 1)](torch.zeros(1, WIDTH + 1))  # and inside one
    assert torch.equal(run(blocks, 3), run(resident(num_blocks), 3))


def test_the_room_holds_the_largest_two_pieces_in_a_row_and_the_host_holds_all() -> None:
    small, large, last = (StreamPlan([block], "block").room_bytes for block in _blocks_of_one_part())
    assert StreamPlan(meta_blocks(6), "part").room_bytes == large + max(small, last)
    assert StreamPlan(meta_blocks(6), "block").room_bytes == 2 * (small + large + last)
    assert StreamPlan(meta_blocks(1), "block").room_bytes == small + large + last
    runtime = CpuRuntime()
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        blocks = streamed(6, runtime)
        standing = runtime.memory().allocated_bytes
        assert standing - before == StreamPlan(meta_blocks(6), "part").device_bytes
        runtime.reset_memory_peaks()
        with torch.no_grad():
            run(blocks, 0)
            run(blocks, 1)
        assert runtime.memory().allocated_peak_bytes - standing < 8192  # a few rows of activations
    assert runtime.host_buffer_bytes() >= all_bytes(6)


def test_pieces_side_by_side_take_one_end_of_the_room_together() -> None:
    small, large, last = (StreamPlan([block], "block").room_bytes for block in _blocks_of_one_part())
    plan = StreamPlan(meta_blocks(6, Beside), "part")
    assert [piece.parts for piece in plan.streamed[:3]] == [("small",), ("large",), ("last",)]
    assert plan.room_bytes == small + large + last
    assert plan.offsets[:3] == [0, small, small + large]


def test_pieces_side_by_side_come_and_are_waited_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    runtime = CpuRuntime()
    monkeypatch.setattr(runtime, "side_stream", lambda: _Stream(log))
    (block, *_) = streamed(4, runtime, kind=Beside)
    log.clear()
    with block.part("small"):
        assert log == [*["wait", "copy"] * 3, "hold"]
    assert log[7:] == ["wait", "copy"]  # where it lay, the next block's first part
    with block.part("large"):
        assert log[9:] == ["hold"]
        with block.part("last"):
            assert log[10:] == ["hold"]
    assert log[11:] == ["wait", "copy"] * 2


def _blocks_of_one_part() -> list[InParts]:
    blocks = []
    for part, owners in Layers.PARTS.items():
        (block,) = meta_blocks(1)
        for name, _ in list(block.named_parameters()):
            if name.partition(".")[0] not in owners:
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, None)
        assert [kept for kept, parameters in block.part_parameters().items() if parameters] == [part]
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("unit", ["block", "part"])
def test_residents_are_chosen_by_bytes_and_spread_over_the_blocks(unit: Unit) -> None:
    num_blocks, total = 12, all_bytes(12)
    of_a_block = total // num_blocks
    room = StreamPlan(meta_blocks(num_blocks), unit).room_bytes
    for share in (0.0, 0.1, 0.5, 0.9):
        plan = StreamPlan(meta_blocks(num_blocks), unit, int(share * total))
        kept = sum(piece.num_bytes for piece in plan.resident)
        assert share * total - of_a_block < kept <= share * total
        assert plan.device_bytes == kept + room
        first_half = sum(piece.num_bytes for piece in plan.resident if piece.block < num_blocks // 2)
        assert kept - of_a_block <= 2 * first_half <= kept
    everything = StreamPlan(meta_blocks(num_blocks), unit, total)
    assert everything.streamed == []
    assert everything.device_bytes == total


class _Stream:
    """Writes down what is asked of it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def context(self) -> object:
        self.log.append("copy")
        return contextlib.nullcontext()

    def mark(self) -> "_Stream":
        return self

    def mark_current(self) -> "_Stream":
        return self

    def wait(self, mark: "_Stream") -> None:  # noqa: ARG002
        self.log.append("wait")

    def hold_current(self) -> None:
        self.log.append("hold")


def test_copies_wait_for_what_used_their_place_and_use_waits_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    runtime = CpuRuntime()
    monkeypatch.setattr(runtime, "side_stream", lambda: _Stream(log))
    (block, *_) = streamed(4, runtime)
    log.clear()
    arrival, use = ["wait", "copy"], ["hold"]
    with block.part("small"):
        assert log == [*arrival, *arrival, *use]
        with block.part("large"):
            assert log[5:] == use  # nothing is brought while both ends are in use
        assert log[6:] == []
    assert log[6:] == [*arrival, *arrival]  # the third where the first was, the fourth where the second was
    with block.part("last"):
        assert log[10:] == use


def test_a_block_whose_first_parts_are_left_out_is_waited_for_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    runtime = CpuRuntime()
    monkeypatch.setattr(runtime, "side_stream", lambda: _Stream(log))
    first, second, third = streamed(3, runtime, unit="block")
    for block in (first, second, third):
        with block.part("small"), block.part("large"):
            pass
        with block.part("last"):
            pass
    log.clear()
    with first.part("large"):  # the third lay there, and nothing was copied again beside it
        assert log == ["hold"]
    with first.part("last"):
        assert log == ["hold"]
    assert log == ["hold", "wait", "copy"]
    with second.part("small"):
        assert log[3:] == ["hold"]


def test_memory_is_given_back_with_the_blocks() -> None:
    runtime = CpuRuntime()
    gc.disable()  # nothing may need it
    try:
        with runtime.counting():
            before = runtime.memory().allocated_bytes
            blocks = streamed(3, runtime, resident_bytes=all_bytes(3) // 2)
            assert runtime.host_buffer_bytes() > 0
            del blocks
            assert runtime.memory().allocated_bytes == before
        assert runtime.host_buffer_bytes() == 0
    finally:
        gc.enable()


def test_a_parameter_in_no_part_or_in_two_is_refused() -> None:
    class Forgetful(Layers):
        PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {"small": ("linear",), "large": ("wide", "back")}

    class Twice(Layers):
        PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {**Layers.PARTS, "again": ("wide.bias",)}

    with pytest.raises(ValueError, match=r"parameter shift of Forgetful lies in parts \[\]"):
        StreamPlan([Forgetful()], "part")
    with pytest.raises(ValueError, match=r"wide.bias of Twice lies in parts \['large', 'again'\]"):
        StreamPlan([Twice()], "part")


@torch.no_grad()
def test_parked_weights_are_there_inside_only_and_equal() -> None:
    runtime = CpuRuntime()
    (module,), (expected,) = meta_blocks(1), resident(1)
    parked = Parked(module, ["wide", "back"], partial(write, 0), runtime)
    x = torch.ones(1, WIDTH)
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        for _ in range(2):
            with parked.brought_into(module):
                arrived = runtime.memory().allocated_bytes - before
                assert arrived >= sum(p.numel() * 4 for p in (*module.wide.parameters(), *module.back.parameters()))
                assert torch.equal(module.back(module.wide(x)), expected.back(expected.wide(x)))
            assert runtime.memory().allocated_bytes == before
            assert module.wide.weight.is_meta


def test_a_table_kept_on_the_host_takes_no_device_memory() -> None:
    runtime = CpuRuntime()
    (module,) = meta_blocks(1)
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        keep_on_host(module, "wide", partial(write, 0), runtime)
        assert runtime.memory().allocated_bytes - before < 4096  # drawn here, in passing
    assert runtime.host_buffer_bytes() > 0
    assert torch.equal(module.wide.weight, weight(0, "wide.weight", module.wide.weight.shape))
