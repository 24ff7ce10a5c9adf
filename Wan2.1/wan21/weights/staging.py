"""Copies that stage little, on the device and in resident host memory."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Iterator

import torch

from wan21.weights import source

# Of a mapped file so much is resident at a time; larger pieces are not faster.
MAPPED_BYTES = 8 * 2**20


def pieces(num_elements: int, bytes_per_element: int, limit_bytes: int | None = None) -> Iterator[slice]:
    """Slices that together cover a flat tensor, each of at most STAGING_BYTES, and of the limit if there is one."""
    num_bytes = min(source.STAGING_BYTES, limit_bytes or source.STAGING_BYTES)
    step = max(1, num_bytes // bytes_per_element)
    for start in range(0, num_elements, step):
        yield slice(start, min(start + step, num_elements))


def copy_mapped(mapped: torch.Tensor, destination: torch.Tensor, first: int = 0) -> None:
    """Copies a tensor that lies in a mapped file, from its element `first` on, and lets its pages go piece by piece.

    The cast to the destination's dtype happens where the destination is, after a piece has arrived.

    Memory: one piece in the stored dtype on the destination's device, and only if dtype and device both differ; one
    piece of resident file pages.
    """
    flat = destination.detach().view(-1)
    flat_mapped = mapped.contiguous().view(-1)[first : first + flat.numel()]
    for piece in pieces(flat.numel(), flat_mapped.element_size(), MAPPED_BYTES):
        part = flat_mapped[piece]
        is_cast_over_there = part.dtype != flat.dtype and part.device != flat.device
        flat[piece].copy_(part.to(flat.device) if is_cast_over_there else part)
        let_go(part)


def let_go(part: torch.Tensor) -> None:
    """Lets the kernel drop the pages that lie wholly inside this tensor's memory; its values are not needed again.

    Pages of a mapped file count as resident memory of the process once they were read, and a loaded model would weigh
    double. Dropped pages of a private file mapping come back from the file when read again; those of any other memory
    come back as zeros. Elsewhere than on Linux the kernel keeps them, which costs memory and changes nothing else.
    """
    if sys.platform != "linux" or part.device.type != "cpu":
        return
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.data_ptr() + part.numel() * part.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _madvise()(start, end - start, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer":
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise.restype = ctypes.c_int
    return madvise
