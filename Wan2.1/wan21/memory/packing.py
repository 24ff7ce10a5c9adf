"""Weights packed into flat buffers that wait on the host, and come to a place on the device."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from wan21.parallel.exchange import all_gather
from wan21.parallel.world import Group
from wan21.runtime import Mark, Runtime
from wan21.waiting import aligned

WritePart = Callable[[str, torch.Tensor, int], None]
"""Fills a flat tensor with the elements of the parameter of this name, from a number on."""


class Packing:
    """Where each parameter lies in a flat buffer of bytes.

    Args:
        parameters: by name.
        num_shares: the buffer's size is such that it divides into so many aligned shares.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_shares: int = 1) -> None:
        self._places: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        offset = 0
        for name, parameter in parameters.items():
            num_bytes = parameter.numel() * parameter.element_size()
            self._places[name] = (offset, num_bytes, parameter.shape, parameter.dtype)
            offset += aligned(num_bytes)
        self.num_bytes = aligned(offset, num_shares)

    @property
    def layout(self) -> tuple[object, ...]:
        """What lies where: packings of which this is equal have the same views of the same buffer."""
        return tuple(self._places.items())

    def share(self, group: Group) -> slice:
        """The bytes of the buffer that a process of this group keeps."""
        size = self.num_bytes // group.size
        return slice(group.rank * size, (group.rank + 1) * size)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters as views of a buffer."""
        return {
            name: buffer[offset : offset + num_bytes].view(dtype).view(shape)
            for name, (offset, num_bytes, shape, dtype) in self._places.items()
        }

    def fill_share(self, share: torch.Tensor, start: int, write: WritePart) -> None:
        """Fills a stretch of the buffer, which begins at byte `start` of it, with what lies there."""
        for name, (offset, num_bytes, _, dtype) in self._places.items():
            first, last = max(offset, start), min(offset + num_bytes, start + share.numel())
            if first < last:
                write(name, share[first - start : last - start].view(dtype), (first - offset) // dtype.itemsize)


class Waiting:
    """Packed weights that wait on the host, pinned on CUDA; of several processes each keeps its share of them.

    To bring shares, each process copies its own to the device, and all gather them over the links between the devices.
    So all together keep the weights once, and each link from host to device carries a share of them.

    Args:
        packing: of the weights, made for as many shares as there are processes.
        write: where the weights come from.
        runtime: where they are brought.
        group: the processes; all of them bring the same packings in the same order.
    """

    def __init__(self, packing: Packing, write: WritePart, runtime: Runtime, group: Group) -> None:
        self._group = group
        self._own = packing.share(group)
        self._share = runtime.host_buffer(self._own.stop - self._own.start)
        packing.fill_share(self._share, self._own.start, write)

    def bring(self, place: torch.Tensor) -> None:
        """Fills a place on the device, as large as the packing, in the current stream."""
        own = place[self._own]
        own.copy_(self._share, non_blocking=True)
        all_gather(self._group, place, own)

    def brought(self, mark: Mark) -> None:
        """The weights have been brought when this mark has passed; they wait here all the same."""
