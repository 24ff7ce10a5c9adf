"""A residual of which a share waits on the host.

Letters: B videos, L tokens, D model width.

Windows of the share lie in pinned host memory. They pass through a few slots on the device: while one is computed
with, the next arrives on one side stream and the one before leaves on another. The windows between them, which stay on
the device, give the copies time. The share is a bargain of memory for traffic over the bus: each block reads all
windows four times and writes them three times.

Promise: the same kernels on the same bits, so results are equal to those with the same windows on the device.
"""

from collections.abc import Iterator

import torch

from wan21.dit.layers import chunk_rows
from wan21.dit.residual import Window, Windowed
from wan21.runtime import Mark, Runtime

NUM_SLOTS = 3
"""One is computed with, one arrives, one leaves."""


class _Slot:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.ready: Mark | None = None  # what was brought has arrived
        self.free: Mark | None = None  # what it held is no longer needed


class HostedResidual(Windowed):
    """A float32 [B, L, D], partly on the host; one serves all forwards of a run, one after another.

    Args:
        shape: [B, L, D].
        most_rows: as in the forward's plan; windows are as long as its chunks.
        share: of the windows that wait on the host, 0 to 1; they are spread evenly.
        runtime: where the device is.

    Memory: the other windows and three slots on the device.
    """

    def __init__(self, shape: tuple[int, int, int], most_rows: int, share: float, runtime: Runtime) -> None:
        batch_size, num_rows, dim = shape
        self.shape = torch.Size(shape)
        size = chunk_rows(self.shape, most_rows)
        self._rows = [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
        waiting = [i for i in range(len(self._rows)) if int((i + 1) * share) > int(i * share)]
        self._after = dict(zip(waiting, [*waiting[1:], *waiting[:1]], strict=True))  # in turn, again and again

        def on_device(count: int) -> list[torch.Tensor]:
            of_one = batch_size * size * dim
            flat = torch.empty(count * of_one, dtype=torch.float32, device=runtime.device)
            return [part.view(batch_size, size, dim) for part in flat.split(of_one)] if count else []

        staying = [i for i in range(len(self._rows)) if i not in self._after]
        self._staying = dict(zip(staying, on_device(len(staying)), strict=True))
        self._slots = [_Slot(tensor) for tensor in on_device(min(NUM_SLOTS, len(waiting) + 1) if waiting else 0)]
        self._host = {
            i: runtime.host_buffer(4 * batch_size * size * dim).view(torch.float32).view(batch_size, size, dim)
            for i in waiting
        }
        self._written: dict[int, Mark] = {}  # the window's newest values have arrived on the host
        self._arrivals, self._departures = runtime.side_stream(), runtime.side_stream()
        self._runtime = runtime
        self._turn = 0
        self._brought: tuple[int, _Slot] | None = None

    def windows(self, *, reads: bool = True, writes: bool = False) -> Iterator[Window]:
        """All tokens, in order."""
        if not reads:
            self._brought = None  # whatever was brought ahead is about to be replaced
        for index, rows in enumerate(self._rows):
            if index in self._staying:
                yield rows, self._staying[index][:, : rows.stop - rows.start]
            else:
                slot = self._bring(index) if reads else self._next_slot()
                if reads and self._after[index] != index:
                    self._brought = (self._after[index], self._bring(self._after[index]))
                for mark in (slot.ready, slot.free):
                    if mark is not None:
                        mark.hold_current()
                yield rows, slot.tensor[:, : rows.stop - rows.start]
                self._leave(index, slot, writes=writes)

    def close(self) -> None:
        """Lets go of all memory, once no copy is on its way; there are no windows afterwards."""
        self._runtime.synchronize()
        self._staying, self._host, self._slots, self._brought, self._rows = {}, {}, [], None, []

    def _next_slot(self) -> _Slot:
        self._turn += 1
        return self._slots[self._turn % len(self._slots)]

    def _bring(self, index: int) -> _Slot:
        """The slot that holds this window, or will."""
        if self._brought is not None and self._brought[0] == index:
            slot, self._brought = self._brought[1], None
            return slot
        slot = self._next_slot()
        for mark in (slot.free, self._written.get(index)):
            if mark is not None:
                self._arrivals.wait(mark)
        with self._arrivals.context():
            slot.tensor.copy_(self._host[index], non_blocking=True)
        slot.ready = self._arrivals.mark()
        return slot

    def _leave(self, index: int, slot: _Slot, *, writes: bool) -> None:
        done = self._departures.mark_current()
        if not writes:
            slot.free = done
            return
        self._departures.wait(done)
        with self._departures.context():
            self._host[index].copy_(slot.tensor, non_blocking=True)
        slot.free = self._written[index] = self._departures.mark()
