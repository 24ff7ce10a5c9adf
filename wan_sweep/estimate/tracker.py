"""Follows the storages of a fake run, so that a model of the allocator hears of each when it comes and when it goes."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_sweep.cards import Card
from wan_sweep.estimate.choices import device_of
from wan_sweep.estimate.kernels import Hidden, Kernel, kernels
from wan_sweep.estimate.memory import DeviceMemory, Holding

KNOWN_NAMESPACES = frozenset({"aten", "c10d", "fsdp", "prim", "prims", "profiler", "wan21"})
"""Whose operations allocate what their fakes, or the table, say."""
OURS = "wan21"
DEVICE: Any = torch.ops.prim.device.default


@dataclass(slots=True)
class _Known:
    """A storage: as it was when it came, and its number while it has any bytes."""

    storage: weakref.ref[torch.UntypedStorage]
    holding: Holding
    number: int | None


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's part of making a subclass
    """Reports every storage on the device once, however many views it has, and the buffers inside kernels.

    To be entered inside FakeTensorMode. It must not be near a measured run: a dispatch mode changes what composite
    operations do.

    Args:
        device: whose storages.
        memory: hears of them.
        card: decides what kernels take for themselves.
    """

    def __init__(self, device: torch.device, memory: DeviceMemory, card: Card) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._memory = memory
        self._kernels: Mapping[Any, Kernel] = kernels(card)
        self._known: dict[int, _Known] = {}
        self._kept: set[tuple[int, Hidden]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled around here, and to see to that with every operation takes as long as the tracker."""
        return False

    def __enter__(self) -> Self:
        resize = torch.UntypedStorage.resize_

        def heard_resize(storage: torch.UntypedStorage, size: int) -> Any:  # noqa: ANN401 # what torch returns
            self._resize(storage, size)
            return resize(storage, size)

        # No operation, so no mode hears of it. The class inherits it; what it gets here is taken away again.
        torch.UntypedStorage.resize_ = heard_resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: object) -> None:
        del torch.UntypedStorage.resize_
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 # an operation of torch carries no type
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if any(one is not FakeTensor for one in types):
            return NotImplemented  # such as a DTensor: it comes again as what its parts make of it
        if func is DEVICE:  # asked of every tensor all the time
            return device_of(args[0])
        kernel = self._kernels.get(func)
        if func.namespace not in KNOWN_NAMESPACES:
            self._memory.unknown_operations.add(str(func))
        elif func.namespace == OURS and not func._schema.returns:  # noqa: SLF001 # the only way to see it
            for number in [self._take(hidden, func) for hidden in (kernel.before(args) if kernel else ())]:
                self._memory.give(number)
            return None  # it writes where it is told to, and here there is nothing to write
        if kernel is None or device_of(args[0]) != self._device:
            out = func(*args, **(kwargs or {}))
            self._see_all(out, func)
            return out
        before = [self._take(hidden, func) for hidden in kernel.before(args)]
        out = func(*args, **(kwargs or {})) if kernel.stand_in is None else kernel.stand_in(args)
        self._see_all(out, func)
        for hidden in kernel.kept:
            if (self._memory.stream, hidden) not in self._kept:
                self._kept.add((self._memory.stream, hidden))
                self._take(hidden, func)
        beside = [self._take(hidden, func) for hidden in kernel.beside(args, out)]
        self._memory.consider(kernel.possible(args, out))
        for number in [*beside, *before]:
            self._memory.give(number)
        return out

    def _see_all(self, out: Any, func: Any) -> None:  # noqa: ANN401
        for tensor in _tensors(out):
            if device_of(tensor) == self._device:
                self._see(tensor, func)

    def _see(self, tensor: torch.Tensor, func: Any) -> None:  # noqa: ANN401
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()  # noqa: SLF001 # where the storage is, the only identity it has
        if key in self._known or num_bytes == 0:
            return
        holding = Holding(
            num_bytes=num_bytes,
            operation=str(func),
            place=self._memory.place,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
        )
        number = self._memory.take(holding)
        self._memory.storages[key] = number

        def gone(_: object) -> None:
            number = self._known.pop(key).number
            if number is not None:
                del self._memory.storages[key]
                self._memory.give(number)

        self._known[key] = _Known(weakref.ref(storage, gone), holding, number)

    def _resize(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Hears that a storage lets go of its memory, or gets other one, as FSDP has them do."""
        key = storage._cdata  # noqa: SLF001
        known = self._known.get(key)
        if known is None or num_bytes == (0 if known.number is None else known.holding.num_bytes):
            return
        if known.number is not None:
            del self._memory.storages[key]
            self._memory.give(known.number)
        known.number = None
        if num_bytes:
            known.holding = replace(known.holding, num_bytes=num_bytes, place=self._memory.place)
            known.number = self._memory.storages[key] = self._memory.take(known.holding)

    def _take(self, hidden: Hidden, func: Any) -> int:  # noqa: ANN401
        return self._memory.take(
            Holding(
                num_bytes=hidden.num_bytes,
                operation=f"{func} ({hidden.name})",
                place=self._memory.place,
                basis=hidden.basis,
            )
        )


def _tensors(out: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for part in out:
            if isinstance(part, torch.Tensor):
                yield part
