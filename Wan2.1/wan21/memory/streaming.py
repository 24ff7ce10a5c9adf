"""Transformer blocks whose weights wait on the host and are brought in just ahead of use.

What comes and goes together is a piece: a block, or a part of one. Each piece lies packed in one host buffer. On the
device there is one room: pieces lie at its two ends in turn, and while one is computed with, the next arrives at the
other end on a side stream. At an end lies one piece, or a stretch of pieces side by side that come one after the other.
The room is as large as the largest two stretches in a row, and nothing else is allocated. The weights of the blocks are
views of the room, for good.

Promise: the same kernels on the same bits, so results are equal to those with all blocks on the device.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch

from wan21.memory.packing import Packing, Waiting
from wan21.memory.reading import Fill, HostBudget, ReadAhead, Ring, Write
from wan21.parallel.world import Group
from wan21.parts import InParts
from wan21.runtime import Mark, Runtime
from wan21.waiting import choose_pinned, spread_evenly
from wan21.weights.load import put

Unit = Literal["block", "part"]

ALONE = Group()


@dataclass(frozen=True)
class Piece:
    """Weights that come and go together.

    block: which one they belong to.
    parts: of the block, in the order of use; none for what is there always.
    packing: of their parameters.
    is_beside: whether it lies beside the piece before it.
    """

    block: int
    parts: tuple[str, ...]
    packing: Packing
    is_beside: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return self.packing.num_bytes


class StreamPlan:
    """Which pieces stay on the device, which are streamed, and how much room that takes.

    Args:
        blocks: on the meta device.
        unit: what a piece is.
        resident_bytes: so many bytes at most stay on the device beside what is there always, in whole blocks, spread
            evenly. (Single pieces would bring others next to each other that were not, and the room would grow.)
        num_shares: into how many shares streamed pieces divide.
    """

    def __init__(self, blocks: Iterable[InParts], unit: Unit, resident_bytes: int = 0, *, num_shares: int = 1) -> None:
        pieces = [_pieces(index, block, unit, num_shares) for index, block in enumerate(blocks)]
        in_parts = [[piece for piece in block if piece.parts] for block in pieces]
        kept = spread_evenly([sum(piece.num_bytes for piece in block) for block in in_parts], resident_bytes)
        self.streamed = [piece for block in in_parts for piece in block if piece.block not in kept]
        always = [piece for block in pieces for piece in block if not piece.parts]
        self.resident = always + [piece for block in in_parts for piece in block if piece.block in kept]
        stretches: list[list[Piece]] = []
        for piece in self.streamed:
            stretches = [*stretches[:-1], [*stretches[-1], piece]] if piece.is_beside else [*stretches, [piece]]
        sizes = [sum(piece.num_bytes for piece in stretch) for stretch in stretches]
        in_turn = [*sizes, sizes[0]] if len(sizes) % 2 == 0 and sizes else sizes  # an odd number ends where it begins
        self.room_bytes = max([*sizes, *(one + other for one, other in pairwise(in_turn))], default=0)
        ends = [0 if number % 2 == 0 else self.room_bytes - size for number, size in enumerate(sizes)]
        self.offsets = [
            start + sum(piece.num_bytes for piece in stretch[:number])
            for start, stretch in zip(ends, stretches, strict=True)
            for number in range(len(stretch))
        ]
        """Where in the room each streamed piece lies."""

    @property
    def device_bytes(self) -> int:
        """What all blocks together take on the device."""
        return self.room_bytes + sum(piece.num_bytes for piece in self.resident)


def _pieces(index: int, block: InParts, unit: Unit, num_shares: int) -> list[Piece]:
    """The pieces of a block; one without parts is what is there always."""
    by_part = {part: parameters for part, parameters in block.part_parameters().items() if parameters}
    always = by_part.pop("", {})
    pieces = [Piece(index, (), Packing(always))] if always else []
    if unit == "part":
        return pieces + [
            Piece(index, (part,), Packing(parameters, num_shares), is_beside=part in block.BESIDE and number > 0)
            for number, (part, parameters) in enumerate(by_part.items())
        ]
    everything = {name: parameter for parameters in by_part.values() for name, parameter in parameters.items()}
    return [*pieces, Piece(index, tuple(by_part), Packing(everything, num_shares))]


def stream(
    blocks: Sequence[InParts],
    plan: StreamPlan,
    write: Write,
    runtime: Runtime,
    group: Group = ALONE,
    budget: HostBudget | None = None,
) -> None:
    """Gives blocks on the meta device their weights: some to stay, the others to be brought in when they are entered.

    From here on the blocks own the buffers; they have to be run in order, one pass at a time.

    Args:
        blocks: on the meta device.
        plan: made of these blocks.
        write: where the weights come from.
        runtime: where they are used.
        group: the processes that stream the same blocks together.
        budget: of pinned host memory; what it leaves no room for is read again and again. None: all is pinned.

    Memory: what the plan says on the device, and this process's share of what is streamed on the host (pinned on CUDA).
    """
    waiting = _on_the_host(plan, write, runtime, group, budget)
    for piece in plan.resident:
        buffer = torch.empty(piece.num_bytes, dtype=torch.uint8, device=runtime.device)
        for name, view in piece.packing.views(buffer).items():
            write(piece.block, name, view.view(-1), 0)
            put(blocks[piece.block], name, view)
    conveyor = _Conveyor(plan, waiting, runtime)
    entries: dict[int, dict[str, tuple[int, bool]]] = {index: {} for index in range(len(blocks))}
    views: dict[tuple[object, ...], Mapping[str, torch.Tensor]] = {}  # most pieces are like the one before the last
    for index, piece in enumerate(plan.streamed):
        place = (plan.offsets[index], *piece.packing.layout)
        if place not in views:
            views[place] = piece.packing.views(conveyor.places[index])
        for name, view in views[place].items():
            put(blocks[piece.block], name, view)
        for part in piece.parts:
            entries[piece.block][part] = (index, part == piece.parts[-1])
    for index, block in enumerate(blocks):
        block.enter_with(_Entry(conveyor, entries[index]))
        block.eval()


def _on_the_host(
    plan: StreamPlan, write: Write, runtime: Runtime, group: Group, budget: HostBudget | None
) -> list[Waiting | ReadAhead]:
    """Where each streamed piece comes from."""
    shares = [piece.num_bytes // group.size for piece in plan.streamed]
    pinned = frozenset(range(len(shares)))
    if budget is not None:
        pinned = choose_pinned(shares, budget.num_bytes)
    read = [number for number in range(len(shares)) if number not in pinned]
    ring: Ring | None = None
    if budget is not None and read:
        ring = Ring(read, max(shares[number] for number in read), partial(_filling, budget, plan, group), runtime)
    return [
        ReadAhead(piece.packing, number, ring, group)
        if ring is not None and number not in pinned
        else Waiting(piece.packing, partial(write, piece.block), runtime, group)
        for number, piece in enumerate(plan.streamed)
    ]


@contextmanager
def _filling(budget: HostBudget, plan: StreamPlan, group: Group) -> Iterator[Fill]:
    """Opens the weights once more; gives what fills a buffer with this process's share of a streamed piece."""
    with budget.open() as write:

        def fill(number: int, buffer: torch.Tensor) -> None:
            piece = plan.streamed[number]
            own = piece.packing.share(group)
            piece.packing.fill_share(buffer[: own.stop - own.start], own.start, partial(write, piece.block))

        yield fill


class _Entry:
    """How the parts of one block are entered. Knows no block: nothing here keeps itself alive."""

    def __init__(self, conveyor: "_Conveyor", places: Mapping[str, tuple[int, bool]]) -> None:
        self._conveyor = conveyor
        self._places = places

    def __call__(self, part: str) -> AbstractContextManager[object]:
        if part not in self._places:
            return nullcontext()  # it is there always
        return self._during(*self._places[part])

    @contextmanager
    def _during(self, index: int, is_last: bool) -> Iterator[None]:  # noqa: FBT001
        self._conveyor.begin(index)  # at every part: a pass may leave out the first ones
        yield
        if is_last:
            self._conveyor.end(index)


class _Conveyor:
    """Brings streamed pieces into the room in their order, again and again.

    Pieces are counted in turns, which go on over the passes. A turn is brought, begins, and ends. The next one to bring
    comes as soon as nothing unfinished lies in its place.
    """

    def __init__(self, plan: StreamPlan, waiting: Sequence[Waiting | ReadAhead], runtime: Runtime) -> None:
        room = torch.empty(plan.room_bytes, dtype=torch.uint8, device=runtime.device)
        starts = plan.offsets
        self._spans = [(at, at + piece.num_bytes) for at, piece in zip(starts, plan.streamed, strict=True)]
        self.places = [room[start:stop] for start, stop in self._spans]
        self._waiting = waiting
        self._stream = runtime.side_stream()
        self._ready: dict[int, Mark] = {}  # the pieces that lie in the room, and when they have arrived
        self._open: list[int] = []
        self._next = 0  # the turn that begins next
        self._brought = 0  # turns before this one have been brought

    def begin(self, index: int) -> None:
        """What the computing stream does next may use the piece of this index; no more than that if it has begun."""
        if any(turn % len(self.places) == index for turn in self._open):
            return
        self._bring()
        if self._next % len(self.places) != index or self._next == self._brought:
            self._start_over(index)
        self._open.append(self._next)
        self._next += 1
        self._ready[index].hold_current()

    def end(self, index: int) -> None:
        """All calls that use the piece of this index have been made."""
        self._open = [turn for turn in self._open if turn % len(self.places) != index]
        self._bring()

    def _start_over(self, index: int) -> None:
        """From this piece on, as in the first pass, or when the one before was given up."""
        self._open.clear()
        self._next = self._brought = index
        self._ready.clear()
        self._bring()

    def _bring(self) -> None:
        while self._has_place(self._brought):
            index = self._brought % len(self.places)
            if index not in self._ready:
                self._stream.wait(self._stream.mark_current())  # what used this place before is over then
                with self._stream.context():
                    self._waiting[index].bring(self.places[index])
                mark = self._stream.mark()
                self._waiting[index].brought(mark)
                self._ready = {other: ready for other, ready in self._ready.items() if self._are_apart(index, other)}
                self._ready[index] = mark
            self._brought += 1

    def _has_place(self, turn: int) -> bool:
        unfinished = (*self._open, *range(self._next, self._brought))
        return all(self._are_apart(turn, other) for other in unfinished)

    def _are_apart(self, one: int, other: int) -> bool:
        """Whether the pieces of two turns lie in different places."""
        (start, stop), (other_start, other_stop) = (self._spans[turn % len(self.places)] for turn in (one, other))
        return stop <= other_start or other_stop <= start
