"""Frames that are repeated instead of run: a loop with a made-up network leaves the same as when all frames run."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch

from wan_sweep.allocator import Allocator, Settings
from wan_sweep.cards import DEFAULT_CARD, card_named
from wan_sweep.environment import Machine
from wan_sweep.estimate.frames import Frames
from wan_sweep.estimate.memory import DeviceMemory, Holding, Place
from wan_sweep.estimate.predict import estimate
from wan_sweep.rules import resolve
from wan_sweep.schema import Job
from wan_sweep.units import MIB

NUM_FRAMES = 14
DEPTH = 3
"""Frames that the made-up layer with a list remembers."""


class Network:
    """Holdings as causal layers keep them: in place, in a list of the last frames, and for the next frame only."""

    def __init__(self, memory: DeviceMemory, seed: int) -> None:
        draw = Random(seed)
        self.sizes = [draw.randrange(1, 30 * MIB) for _ in range(8)]
        self.memory = memory
        self.ran: list[int] = []
        self.in_place: list[int] = []
        self.list: list[int] = []
        self.next: int | None = None

    def take(self, which: int) -> int:
        return self.memory.take(Holding(self.sizes[which], f"layer {which}", self.memory.place))

    def run(self, frame: int, *, is_last: bool) -> None:
        self.ran.append(frame)
        temporary = self.take(0)
        if len(self.in_place) < 2:
            self.in_place.append(self.take(1))  # two frames: both are born first in theirs
        self.list.append(self.take(2))
        self.memory.consider(self.sizes[7] * (1 + (frame == 0)))
        if len(self.list) > DEPTH:
            self.memory.give(self.list.pop(0))
        wide = self.take(3 if frame else 4)
        if self.next is not None:
            self.memory.give(self.next)
        self.next = self.take(5)
        for number in (temporary, wide):
            self.memory.give(number)
        if is_last:
            for number in (*self.in_place, *self.list, self.next):
                self.memory.give(number)


def gone_through(frames: Iterator[int], memory: DeviceMemory, seed: int) -> tuple[object, ...]:
    """Everything that is left of a loop, up to the last frame's middle, and what ran."""
    network = Network(memory, seed)
    for frame in frames:
        network.run(frame, is_last=frame == NUM_FRAMES - 1)
    peaks = {phase: (moment.allocated_bytes, moment.holdings) for phase, moment in memory.peaks().items()}
    return memory.memory(), peaks, memory.possible_peaks(), network.ran


def new_memory() -> DeviceMemory:
    memory = DeviceMemory(Allocator(Settings()))
    memory.place = Place(phase="decode")
    return memory


@pytest.mark.parametrize("seed", range(10))
def test_frames_that_are_repeated_leave_what_frames_that_run_do(seed: int) -> None:
    *every, _ = gone_through(iter(range(NUM_FRAMES)), new_memory(), seed)
    memory = new_memory()
    *repeated, ran = gone_through(Frames(memory).through(range(NUM_FRAMES)), memory, seed)
    assert every == repeated
    assert ran == [*range(ran[-2] + 1), NUM_FRAMES - 1]
    assert len(ran) < NUM_FRAMES - 4


def test_a_loop_that_is_gone_through_in_step_follows() -> None:
    memory = new_memory()
    frames = Frames(memory)

    def beside(numbers: Sequence[int]) -> Iterator[int]:
        yield from frames.through(numbers)

    numbers = range(NUM_FRAMES)
    pairs = list(zip(frames.through(numbers), beside(numbers), strict=True))
    assert pairs == [(0, 0), (1, 1), (NUM_FRAMES - 1, NUM_FRAMES - 1)]


def test_frames_that_end_what_was_there_before_all_run() -> None:
    memory = new_memory()
    older = [memory.take(Holding(MIB, "older", memory.place, shape=(), dtype=torch.uint8)) for _ in range(NUM_FRAMES)]
    ran = []
    for frame in Frames(memory).through(range(NUM_FRAMES)):
        ran.append(frame)
        memory.give(older[frame])
    assert ran == list(range(NUM_FRAMES))
    assert memory.memory().allocated_bytes == 0


def test_two_videos_one_after_the_other_have_frames_of_their_own() -> None:
    memory = new_memory()
    frames = Frames(memory)
    for seed in (0, 1):
        *_, ran = gone_through(frames.through(range(NUM_FRAMES)), memory, seed)
        assert ran[-1] == NUM_FRAMES - 1
    assert memory.memory().allocated_bytes == 0


CASES = {
    "our kernels on whole frames": Job(model="tiny", frame_num=33, kernels="fused", offload=True),
    "pictures encoded in tiles": Job(model="tiny-i2v", frame_num=33, vae_budget_gib=0.02),
}


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_says_the_same_as_when_every_frame_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = CASES[case].replace(mode="estimate", card=DEFAULT_CARD, sample_steps=1)
    job = resolve(asked, Machine()).job

    def told() -> dict[str, Any]:
        result = estimate(job, card_named(DEFAULT_CARD))
        del result["estimate"]["seconds"]
        return result

    repeated = told()
    ran: list[int] = []

    def all_of_them(_: Frames, numbers: Sequence[int]) -> Iterator[int]:
        ran.extend(numbers)
        yield from numbers

    monkeypatch.setattr(Frames, "through", all_of_them)
    assert told() == repeated
    assert len(ran) >= 9
