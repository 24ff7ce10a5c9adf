"""Weights that wait on the host, because they are used once a run or not on the device at all.

Promise: the same kernels on the same bits.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wan21.memory.packing import Packing, Waiting, WritePart
from wan21.parallel.world import Group
from wan21.runtime import Runtime
from wan21.weights.load import put

ALONE = Group()


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
        group: the processes that bring the same weights together; each keeps its share.
    """

    def __init__(
        self, module: nn.Module, owners: Iterable[str], write: WritePart, runtime: Runtime, group: Group = ALONE
    ) -> None:
        self._runtime = runtime
        self._parameters = parameters_below(module, owners)
        self._packing = Packing(self._parameters, group.size)
        self._waiting = Waiting(self._packing, write, runtime, group)

    @contextmanager
    def brought_into(self, module: nn.Module) -> Iterator[None]:
        """Inside it the weights are on the device; afterwards nothing of them is, the allocator's cache included.

        Args:
            module: that they were parked from.
        """
        buffer = torch.empty(self._packing.num_bytes, dtype=torch.uint8, device=self._runtime.device)
        self._waiting.bring(buffer)
        for name, view in self._packing.views(buffer).items():
            put(module, name, view)
        del buffer, view
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                put(module, name, parameter.detach())
            self._runtime.empty_cache()


def keep_on_host(module: nn.Module, owner: str, write: WritePart, runtime: Runtime) -> None:
    """Gives a submodule, such as a table for looking up, its weights on the host, for good."""
    for name, parameter in parameters_below(module, [owner]).items():
        packing = Packing({name: parameter})
        (view,) = packing.views(runtime.host_buffer(packing.num_bytes)).values()
        write(name, view.view(-1), 0)
        put(module, name, view)
