"""The runtime of an estimate: the very same pipeline runs on it, and its counters are those of a model."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn

from wan21.runtime import Mark, Memory, Runtime, Stream, whole_pages
from wan21.vae.plan import DecodePlan
from wan_sweep.cards import Card
from wan_sweep.estimate.frames import Frames, Shortened
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.memory import DeviceMemory
from wan_sweep.estimate.replay import Replays

P = TypeVar("P")


class _Generator(torch.Generator):
    """Says that it is on the device, where torch could not make one; nothing is ever drawn from it."""

    place: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


class _Mark(Mark):
    def hold_current(self) -> None:
        """Nothing takes time here."""

    def wait(self) -> None:
        """Nothing takes time here."""


class _Stream(Stream):
    def __init__(self, number: int, memory: DeviceMemory) -> None:
        self._number = number
        self._memory = memory

    @contextmanager
    def context(self) -> Iterator[None]:
        outer, self._memory.stream = self._memory.stream, self._number
        try:
            yield
        finally:
            self._memory.stream = outer

    def mark(self) -> Mark:
        return _Mark()

    def mark_current(self) -> Mark:
        return _Mark()

    def wait(self, mark: Mark) -> None:
        """Nothing takes time here."""


class EstimatingRuntime(Runtime):
    """A device without memory, that counts as a card would.

    Everything on it has to happen inside FakeTensorMode, and what reports its storages to `memory` has to be there.

    Args:
        device: that plays the card.
        memory: its counters.
        card: which it plays.
        replays: how blocks are run.

    Attributes:
        num_communicators: groups of several processes that this one exchanges messages in.
    """

    is_asynchronous = True
    computes = False

    def __init__(self, device: torch.device, memory: DeviceMemory, card: Card, replays: Replays) -> None:
        self.device = device
        self._memory = memory
        self._replays = replays
        self._card = card
        self._row = row_for(card)[0]
        self._num_streams = 1
        self.num_communicators = 0
        self._host_bytes = 0

    @property
    def capability(self) -> tuple[int, int]:
        return self._card.capability

    def facts(self) -> dict[str, str]:
        return {"device": self._card.name}

    def warm_up(self) -> None:
        matrix = torch.empty(64, 64, device=self.device)
        torch.nn.functional.linear(matrix @ matrix, matrix, matrix[0])  # what cuBLAS keeps is there from here on
        del matrix
        self.empty_cache()

    def generator(self, seed: int) -> torch.Generator:  # noqa: ARG002 # nothing is drawn
        generator = _Generator()
        generator.place = self.device
        return generator

    def synchronize(self) -> None:
        """Nothing takes time here."""

    def empty_cache(self) -> None:
        self._memory.empty_cache()

    def memory(self) -> Memory:
        return self._memory.memory()

    def reset_memory_peaks(self) -> None:
        self._memory.reset_peaks()

    @property
    def outside_bytes(self) -> int:
        """What the process holds outside torch's allocator: the context, and NCCL's as far as it was measured."""
        of_nccl = self._row.nccl_bytes_per_communicator or 0
        return self._row.context_bytes + self.num_communicators * of_nccl

    def device_used_bytes(self) -> int:
        return self.outside_bytes + self._memory.memory().reserved_bytes

    def device_total_bytes(self) -> int:
        return self._card.device_bytes

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        pages = whole_pages(num_bytes)
        buffer = torch.empty(pages, dtype=torch.uint8)
        self._host_bytes += pages
        weakref.finalize(buffer.untyped_storage(), self._release, pages)
        return buffer[:num_bytes]

    def host_buffer_bytes(self) -> int:
        return self._host_bytes

    def _release(self, num_bytes: int) -> None:
        self._host_bytes -= num_bytes

    def side_stream(self) -> Stream:
        self._num_streams += 1
        return _Stream(self._num_streams - 1, self._memory)

    def current_stream(self) -> Stream:
        """The one that the run is on."""
        return _Stream(self._memory.stream, self._memory)

    def as_run(self, blocks: Iterable[nn.Module]) -> Iterable[nn.Module]:
        return self._replays.through(blocks)

    def as_planned(self, plan: P) -> P:
        if not self._replays.is_on or not isinstance(plan, DecodePlan):
            return plan
        shortened = Shortened(
            num_tile_rows=plan.num_tile_rows,
            num_tile_cols=plan.num_tile_cols,
            frames_at_once=plan.frames_at_once,
            frames=None if self._memory.is_limited else Frames(self._memory),  # which may end in the middle of a frame
        )
        return cast("P", shortened)
