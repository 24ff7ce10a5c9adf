"""Transformer blocks whose weights wait on the host and are brought in just ahead of use.

Each block's weights lie packed in one host buffer. Two buffers of a block's size on the device take turns: while one
block computes, the next is copied into the other buffer on a side stream. Nothing is allocated after the start.

Promise: the same kernels on the same bits, so results are equal to those with all blocks on the device.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from wan21.runtime import Mark, Runtime

ALIGNMENT = 256
"""Every tensor starts at a multiple of this in a packed buffer, as it would coming from an allocator."""

NUM_SLOTS = 2
"""One block computes while the next arrives; more would cost memory and hide nothing further."""


class _Packing:
    """Where each parameter of a block lies in a flat buffer of bytes."""

    def __init__(self, block: nn.Module) -> None:
        self._places: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        offset = 0
        for name, parameter in block.named_parameters():
            num_bytes = parameter.numel() * parameter.element_size()
            self._places[name] = (offset, num_bytes, parameter.shape, parameter.dtype)
            offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = offset

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters as views of a buffer."""
        return {
            name: buffer[offset : offset + num_bytes].view(dtype).view(shape)
            for name, (offset, num_bytes, shape, dtype) in self._places.items()
        }


class _Slot:
    """A block on the device whose weights change: a module over one fixed buffer."""

    def __init__(self, block: nn.Module, packing: _Packing, device: torch.device) -> None:
        self.buffer = torch.empty(packing.num_bytes, dtype=torch.uint8, device=device)
        self.block = block
        for name, view in packing.views(self.buffer).items():
            owner_name, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner_name), leaf, nn.Parameter(view, requires_grad=False))
        block.eval()
        self.holds: int | None = None
        self.ready: Mark | None = None
        self.done: Mark | None = None


class StreamedBlocks:
    """A sequence of blocks to iterate over once per forward, in order.

    Args:
        make_block: builds one block on the meta device; all are alike.
        num_blocks: how many there are.
        write: fills a host tensor with the named parameter of the block of this index.
        runtime: where to compute.

    Memory: two blocks on the device, all of them on the host (pinned on CUDA).
    """

    def __init__(
        self,
        make_block: Callable[[], nn.Module],
        num_blocks: int,
        write: Callable[[int, str, torch.Tensor], None],
        runtime: Runtime,
    ) -> None:
        packing = _Packing(make_block())
        self._stream = runtime.side_stream()
        self._slots = [_Slot(make_block(), packing, runtime.device) for _ in range(min(NUM_SLOTS, num_blocks))]
        self._host: list[torch.Tensor] = []
        for index in range(num_blocks):
            buffer = runtime.host_buffer(packing.num_bytes)
            for name, view in packing.views(buffer).items():
                write(index, name, view)
            self._host.append(buffer)
        self._turn = 0
        for slot in self._slots:  # what computed before in this memory has to be over, too
            slot.done = self._stream.mark_current()

    @staticmethod
    def device_bytes_for(block: nn.Module, num_blocks: int) -> int:
        """Bytes that the buffers on the device take for blocks like this one."""
        return _Packing(block).num_bytes * min(NUM_SLOTS, num_blocks)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[nn.Module]:
        """Yields each block, ready to be called; asking for the next one says that the last call has been made."""
        for index in range(len(self._host)):
            slot = self._slots[self._turn % len(self._slots)]
            self._turn += 1
            self._bring(index, slot)
            self._bring((index + 1) % len(self._host), self._slots[self._turn % len(self._slots)], ahead=True)
            if slot.ready is not None:
                slot.ready.hold_current()
            try:
                yield slot.block
            finally:  # also when the caller gives up in the middle, or its block failed
                slot.done = self._stream.mark_current()

    def _bring(self, index: int, slot: _Slot, *, ahead: bool = False) -> None:
        """Copies a block's weights into a slot once the slot's last computation is over."""
        if slot.holds == index or (ahead and len(self._slots) == 1):
            return
        if slot.done is not None:
            self._stream.wait(slot.done)
        with self._stream.context():
            slot.buffer.copy_(self._host[index], non_blocking=True)
        slot.holds, slot.ready = index, self._stream.mark()
