"""Results that leave the device piece by piece, while it computes the next ones.

A copy to ordinary memory makes the host wait for the device; then the device waits, until the host has put the piece
in its place and asked for the next one. Here a piece goes into one of two pinned buffers behind the work that made it,
and is put in its place when its buffer is needed for the piece after the next, whose work has been asked for by then.
So while the host waits the device still has two pieces to make, and one that is made in no time does not leave it idle:
a tile's first piece has one frame, and takes the host as long as any other.

Promise: the same bytes in the same places.
"""

from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import torch

from wan21.runtime import Mark, Runtime

NUM_BUFFERS = 2
"""So many pieces are under way at most."""


class _OnItsWay(NamedTuple):
    arrived: Mark
    landed: torch.Tensor
    place: torch.Tensor


class Departures:
    """Takes pieces to the host, in order, each two pieces late. A context: leaving it gives the buffers back.

    Args:
        runtime: where the pieces are computed.
        most_bytes: of a piece; 0 if there will be none.

    Memory: two pinned buffers of `most_bytes` on the host; nothing on the device, for the copies run in the stream
    that computes, so what a piece lay in may be written to again at once.
    """

    def __init__(self, runtime: Runtime, most_bytes: int) -> None:
        self._runtime = runtime
        self._stream = runtime.side_stream()
        self._buffers = [runtime.host_buffer(most_bytes) for _ in range(NUM_BUFFERS if most_bytes else 0)]
        self._turn = 0
        self._on_their_way: deque[_OnItsWay] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runtime.synchronize()  # after an error a copy may be on its way
        self._buffers = []
        self._on_their_way.clear()

    def leave(self, piece: torch.Tensor, place: torch.Tensor) -> None:
        """Asks for a copy of `piece`, when the piece that its buffer held is in its place.

        Args:
            piece: contiguous, on the device.
            place: on the host, of the same shape and dtype; what is in it counts once `finish` returns.
        """
        if len(self._on_their_way) == NUM_BUFFERS:
            self._put_oldest()
        buffer, self._turn = self._buffers[self._turn], (self._turn + 1) % NUM_BUFFERS
        landed = buffer[: piece.numel() * piece.itemsize].view(piece.dtype).view(piece.shape)
        landed.copy_(piece, non_blocking=True)
        self._on_their_way.append(_OnItsWay(self._stream.mark_current(), landed, place))

    def finish(self) -> None:
        """Returns when all pieces are in their places."""
        while self._on_their_way:
            self._put_oldest()

    def _put_oldest(self) -> None:
        piece = self._on_their_way.popleft()
        piece.arrived.wait()
        piece.place.copy_(piece.landed)
