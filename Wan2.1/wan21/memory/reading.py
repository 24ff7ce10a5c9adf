"""Packed weights that are read from their files again and again, ahead of use, where pinned host memory is short.

A few pinned buffers go round as a ring. A thread fills the next free one with the piece that comes next, from the
mapped file; the copy to the device empties it. Pages of the file stay in the system's cache as long as nobody else
needs the memory, so a host that has it reads the disk once.

Promise: the same bits in the same places, so results are equal to those with all pieces in pinned memory.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from queue import SimpleQueue

import torch

from wan21.memory.packing import Packing
from wan21.parallel.exchange import all_gather
from wan21.parallel.world import Group
from wan21.runtime import Mark, Runtime
from wan21.waiting import NUM_BUFFERS

Write = Callable[[int, str, torch.Tensor, int], None]
"""Fills a flat tensor with the elements of the named parameter of the block of this index, from a number on."""

Fill = Callable[[int, torch.Tensor], None]
"""Fills the buffer with the piece of this number."""


@dataclass(frozen=True)
class HostBudget:
    """What may wait in pinned host memory, and how the rest is read again.

    num_bytes: at most, of streamed blocks and of the ring; at least `waiting.least_pinned`.
    open: opens the source of the weights once more, and gives what writes from it; called in the thread that reads.
    """

    num_bytes: int
    open: Callable[[], AbstractContextManager[Write]]


class _Buffer:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.emptied: Mark | None = None  # what was in it has been copied


class Ring:
    """Pieces in their order, round and round, in a few pinned buffers.

    Args:
        numbers: of the pieces that are read, in the order of use.
        num_bytes: of the largest.
        open_source: opens it, and gives what fills a buffer from it; called in the thread that reads.
        runtime: where the buffers are; one that does not compute reads nothing either.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        num_bytes: int,
        open_source: Callable[[], AbstractContextManager[Fill]],
        runtime: Runtime,
    ) -> None:
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        self._full: SimpleQueue[tuple[int, _Buffer] | BaseException] = SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(_Buffer(runtime.host_buffer(num_bytes)))
        self._reads = runtime.computes
        self._failure: BaseException | None = None
        if self._reads:
            over = threading.Event()
            arguments = (tuple(numbers), open_source, self._free, self._full, over)  # not the ring: it would never go
            thread = threading.Thread(target=_read, args=arguments, name="wan21-reader", daemon=True)
            thread.start()
            weakref.finalize(self, _end, thread, over, self._free)

    def take(self, number: int) -> _Buffer:
        """The buffer with this piece, once it has been read. It has to be given back.

        Raises:
            BaseException: what ended the reading.
        """
        if not self._reads:
            return self._free.get()
        while True:
            if self._failure is not None:
                raise self._failure
            found = self._full.get()
            if isinstance(found, BaseException):
                self._failure = found
            elif found[0] == number:
                return found[1]
            else:  # a pass was given up, or that piece is on the device still
                self._free.put(found[1])

    def give(self, buffer: _Buffer, emptied: Mark) -> None:
        """Lets the buffer be filled again once the mark has passed."""
        buffer.emptied = emptied
        self._free.put(buffer)


def _read(
    numbers: Sequence[int],
    open_source: Callable[[], AbstractContextManager[Fill]],
    free: "SimpleQueue[_Buffer]",
    full: "SimpleQueue[tuple[int, _Buffer] | BaseException]",
    over: threading.Event,
) -> None:
    """What the thread does: fills free buffers until all is over."""
    try:
        with open_source() as fill, torch.no_grad():
            for number in cycle(numbers):
                buffer = free.get()
                if over.is_set():
                    return
                if buffer.emptied is not None:
                    buffer.emptied.wait()
                fill(number, buffer.tensor)
                full.put((number, buffer))
    except BaseException as error:  # noqa: BLE001 - whoever waits for a piece has to hear of it
        full.put(error)


def _end(thread: threading.Thread, over: threading.Event, free: "SimpleQueue[_Buffer]") -> None:
    """Ends the thread, and waits until it has closed its file, unless it is itself what lets go of the ring."""
    over.set()
    free.put(_Buffer(torch.empty(0)))
    if threading.current_thread() is not thread:
        thread.join()


class ReadAhead:
    """A streamed piece that comes from the ring; as `Waiting`.

    Args:
        packing: of the piece.
        number: of the piece.
        ring: that reads it.
        group: the processes that bring the piece together, each its share.
    """

    def __init__(self, packing: Packing, number: int, ring: Ring, group: Group) -> None:
        self._own = packing.share(group)
        self._group = group
        self._number = number
        self._ring = ring
        self._buffer: _Buffer | None = None

    def bring(self, place: torch.Tensor) -> None:
        """Fills a place on the device, in the current stream; `brought` has to follow."""
        self._buffer = self._ring.take(self._number)
        own = place[self._own]
        own.copy_(self._buffer.tensor[: own.numel()], non_blocking=True)
        all_gather(self._group, place, own)

    def brought(self, mark: Mark) -> None:
        """The piece has been brought when this mark has passed."""
        if self._buffer is not None:
            self._ring.give(self._buffer, mark)
        self._buffer = None
