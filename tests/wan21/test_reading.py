"""Streamed weights read from their files ahead of use: the same bits from little pinned memory."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.wan21.test_streaming import meta_blocks, resident, run, write
from wan21.assets import open_assets
from wan21.errors import UsageError
from wan21.events import Span
from wan21.memory.packing import Packing
from wan21.memory.reading import HostBudget, Ring, Write
from wan21.memory.streaming import StreamPlan, Unit, stream
from wan21.models import model_spec
from wan21.options import Options
from wan21.parallel.world import Group
from wan21.parts import InParts
from wan21.pipeline import Generation, VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan21.waiting import NUM_BUFFERS, choose_pinned, whole_pages
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

PAGE = whole_pages(1)
RING = 2 * NUM_BUFFERS * PAGE  # a block of the streaming tests, or its largest part, takes two pages
SPEC = model_spec("tiny")


@contextmanager
def opened() -> Iterator[Write]:
    yield write


def streamed(num_blocks: int, unit: Unit, budget: HostBudget, runtime: CpuRuntime) -> list[InParts]:
    blocks = meta_blocks(num_blocks)
    stream(blocks, StreamPlan(blocks, unit), write, runtime, budget=budget)
    return blocks


def readers() -> int:
    return sum(thread.name == "wan21-reader" for thread in threading.enumerate())


def test_pieces_are_pinned_as_far_as_the_budget_goes_beside_the_ring() -> None:
    sizes = [PAGE] * 10
    assert choose_pinned(sizes, 10 * PAGE) == frozenset(range(10))
    for pages in range(NUM_BUFFERS, 10):
        pinned = choose_pinned(sizes, pages * PAGE)
        assert len(pinned) == pages - NUM_BUFFERS
    assert choose_pinned(sizes, 5 * PAGE) == {4, 9}  # spread evenly


@torch.no_grad()
@pytest.mark.parametrize("unit", ["block", "part"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_every_pass_equals_resident_blocks_within_the_budget(unit: Unit, num_blocks: int) -> None:
    pages = [whole_pages(piece.num_bytes) for piece in StreamPlan(meta_blocks(num_blocks), unit).streamed]
    for budget in range(RING, max(RING, sum(pages)) + 1, PAGE):
        runtime = CpuRuntime()
        blocks = streamed(num_blocks, unit, HostBudget(budget, opened), runtime)
        assert readers() == (budget < sum(pages))
        assert budget - 2 * PAGE < runtime.host_buffer_bytes() <= budget or budget >= sum(pages)
        for seed in range(3):
            assert torch.equal(run(blocks, seed), run(resident(num_blocks), seed))
        del blocks


@torch.no_grad()
def test_a_pass_that_was_given_up_leaves_the_next_one_right() -> None:
    blocks = streamed(6, "part", HostBudget(RING, opened), CpuRuntime())
    for stop in (1, 4, 2):
        run(blocks[:stop], 0)
        assert torch.equal(run(blocks, stop), run(resident(6), stop))


@torch.no_grad()
def test_what_ends_the_reading_reaches_the_one_who_waits() -> None:
    @contextmanager
    def breaking() -> Iterator[Write]:
        def fail(index: int, name: str, to: torch.Tensor, first: int) -> None:
            if index == 3:
                raise OSError("the disk is gone")
            write(index, name, to, first)

        yield fail

    blocks = streamed(6, "block", HostBudget(RING, breaking), CpuRuntime())
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            run(blocks, 0)


def test_the_reader_closes_its_file_and_gives_back_its_memory_with_the_last_block() -> None:
    closed = []

    @contextmanager
    def closing() -> Iterator[Write]:
        yield write
        closed.append(True)

    runtime = CpuRuntime()
    blocks = streamed(6, "block", HostBudget(RING, closing), runtime)
    with suppress(NameError):
        run(blocks, 0)
    assert (readers(), closed) == (1, [])
    del blocks
    gc.collect()
    assert (readers(), closed) == (0, [True])
    assert runtime.host_buffer_bytes() == 0


def test_each_of_several_processes_reads_its_share() -> None:
    (block,) = meta_blocks(1)
    packing = Packing(dict(block.named_parameters()), num_shares=2)
    whole = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    packing.fill_share(whole, 0, lambda *to: write(0, *to))
    plan = StreamPlan([block], "block", num_shares=2)
    for rank in range(2):
        group = Group(ranks=(0, 1), rank=rank)
        own = plan.streamed[0].packing.share(group)
        buffer = torch.zeros(packing.num_bytes, dtype=torch.uint8)

        @contextmanager
        def filled(own: slice = own) -> Iterator[Callable[[int, torch.Tensor], None]]:
            yield lambda number, to: packing.fill_share(
                to[: own.stop - own.start], own.start, lambda *rest: write(number, *rest)
            )

        ring = Ring([0], own.stop - own.start, filled, CpuRuntime())
        buffer[own] = ring.take(0).tensor[: own.stop - own.start]
        assert torch.equal(whole[own], buffer[own])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_folder(Path(folder), SPEC, RandomWeights(SPEC, 0, CpuRuntime().generator), num_shards=3)
    return str(folder)


class Pinned:
    """Listens to how much waits on the host, and what arrives on the device."""

    wants_blocks = False

    def __init__(self, runtime: CpuRuntime) -> None:
        self.runtime = runtime
        self.highest = 0
        self.arrived: dict[str, tuple[int, int | None]] = {}

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        before = self.runtime.memory().allocated_bytes
        yield
        self.highest = max(self.highest, self.runtime.host_buffer_bytes())
        if span.kind == "component":
            self.arrived[span.name] = (self.runtime.memory().allocated_bytes - before, span.expected_bytes)


def generate(**options: Any) -> tuple[Generation, Pinned]:
    chosen, runtime = Options(precision="bf16", offload=True, **options), CpuRuntime()
    listener = Pinned(runtime)
    request = make_request(SPEC, seed=7, size="96*64", frame_num=5, num_steps=2)
    with runtime.counting():
        made = VideoPipeline(SPEC, chosen, open_assets(SPEC, chosen, runtime), runtime, listener).generate(request)
    return made, listener


# T5's table of tokens, 4 MiB, waits on the host with load_strategy=part.
@pytest.mark.parametrize(("strategy", "budget_gib"), [("block", 0.005), ("part", 0.007)])
def test_a_video_is_equal_to_the_bit_from_little_pinned_memory(folder: str, strategy: str, budget_gib: float) -> None:
    plain, all_pinned = generate(ckpt_dir=folder, load_strategy=strategy)
    small, little = generate(ckpt_dir=folder, load_strategy=strategy, host_budget_gib=budget_gib)
    assert torch.equal(plain.latents, small.latents)
    assert torch.equal(plain.videos[0], small.videos[0])
    assert little.highest <= budget_gib * 2**30 < 0.9 * all_pinned.highest
    assert all(arrived == expected for arrived, expected in little.arrived.values())
    assert little.arrived == all_pinned.arrived
    assert readers() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"host_budget_gib=1 reads weights from a checkpoint's files .* choose ckpt_dir=FOLDER"),
        ({"linear_format": "fp8_weights"}, r"linear_format=fp8_weights makes them while .* choose linear_format=same"),
        ({"host_budget_gib": 1e-4}, r"host_budget_gib=0.0001 is too little"),
        ({"host_budget_gib": -1.0}, r"host_budget_gib=-1.0 is not a number of GiB above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder: str, options: dict[str, Any], words: str) -> None:
    ckpt_dir = folder if options else None
    with pytest.raises(UsageError, match=words):
        generate(**{"ckpt_dir": ckpt_dir, "load_strategy": "block", "host_budget_gib": 1.0, **options})
