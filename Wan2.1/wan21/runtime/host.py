"""Host memory for staging weights."""

import mmap
import weakref
from collections.abc import Callable

import torch

from wan21.waiting import whole_pages


class HostPages:
    """Anonymous memory outside torch's allocators; counts the pages of the buffers that are alive."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def allocate(self, num_bytes: int, pin: Callable[[torch.Tensor], Callable[[], None]] | None = None) -> torch.Tensor:
        pages = mmap.mmap(-1, whole_pages(num_bytes))
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        unpin = pin(buffer) if pin is not None else None
        self.num_bytes += len(pages)
        weakref.finalize(buffer.untyped_storage(), self._release, len(pages), unpin)
        return buffer[:num_bytes]

    def _release(self, num_bytes: int, unpin: Callable[[], None] | None) -> None:
        self.num_bytes -= num_bytes
        if unpin is not None:
            unpin()
