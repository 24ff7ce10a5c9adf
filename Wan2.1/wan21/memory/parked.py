"""Weights that wait on the host, because they are used once a run or not on the device at all.

Promise: the same kernels on the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wan21.memory.streaming import Packing
from wan21.runtime import Runtime
from wan21.weights.load import put

WriteNamed = Callable[[str, torch.Tensor], None]
"""Fills a host tensor with the parameter of this name."""


def parameters_below(module: nn.Module, owners: Iterable[str]) -> dict[str, nn.Parameter]:
    """A module's parameters that lie in these submodules, by their whole names."""
    prefixes = tuple(f"{owner}." for owner in owners)
    return {name: parameter for name, parameter in module.named_parameters() if name.startswith(prefixes)}


class Parked:
    """Weights of some submodules, on the host; on the meta device meanwhile.

    Args:
        module: that has them, on the meta device.
        owners: names of the submodules.
        write: where the weights come from.
        runtime: where they are brought.
    """

    def __init__(self, module: nn.Module, owners: Iterable[str], write: WriteNamed, runtime: Runtime) -> None:
        self._runtime = runtime
        self._waiting = parameters_below(module, owners)
        self._packing = Packing(self._waiting)
        self._host = runtime.host_buffer(self._packing.num_bytes)
        for name, view in self._packing.views(self._host).items():
            write(name, view)

    @contextmanager
    def brought_into(self, module: nn.Module) -> Iterator[None]:
        """Inside it the weights are on the device; afterwards nothing of them is, the allocator's cache included.

        Args:
            module: that they were parked from.
        """
        buffer = torch.empty(self._packing.num_bytes, dtype=torch.uint8, device=self._runtime.device)
        buffer.copy_(self._host, non_blocking=True)
        for name, view in self._packing.views(buffer).items():
            put(module, name, view)
        del buffer, view
        try:
            yield
        finally:
            for name, parameter in self._waiting.items():
                put(module, name, parameter.detach())
            self._runtime.empty_cache()


def keep_on_host(module: nn.Module, owner: str, write: WriteNamed, runtime: Runtime) -> None:
    """Gives a submodule, such as a table for looking up, its weights on the host, for good."""
    for name, parameter in parameters_below(module, [owner]).items():
        packing = Packing({name: parameter})
        (view,) = packing.views(runtime.host_buffer(packing.num_bytes)).values()
        write(name, view)
        put(module, name, view)
