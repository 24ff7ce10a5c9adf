"""A process's place among others that are not there: what it allocates is what it would allocate among them.

Torch's fake process group answers every message at once and moves nothing. Which process this is decides over shapes,
and so the very code of several processes runs in one. Torch's FSDP asks torch.cuda itself for streams and events, as
it does for those of the pipeline's own; here it gets those of the runtime.

NCCL moves messages in buffers of its own, outside torch's allocator. What a collective of it sends or receives torch
keeps alive on the host's side until somebody waits for it, as our own code does, so it changes no lifetime here.
(Before 2.8 it recorded streams instead: pytorch pull request 148590.) Messages between two, which bring tiles to the
first process, still record them: what they carried may be free to others a little later than here.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from wan21.layout import Layout
from wan21.parallel.world import ALONE, World, connect
from wan21.runtime import Stream
from wan_sweep.estimate.fake_device import GuardError
from wan_sweep.estimate.runtime import EstimatingRuntime


@contextmanager
def fake_world(layout: Layout, rank: int, runtime: EstimatingRuntime) -> Iterator[World]:
    """The world of this rank; to be entered outside FakeTensorMode, for groups are made of real numbers.

    Args:
        layout: of the run.
        rank: which of its processes this one plays.
        runtime: on which it does.

    Raises:
        GuardError: a meta device plays the card, on which torch has no process group.
    """
    if layout.world_size == 1:
        yield ALONE
        return
    if runtime.device.type != "cuda":
        raise GuardError(
            f"{layout.words()} cannot be estimated with torch {torch.__version__} on {sys.platform}: it takes no guard "
            "from outside, and has no process group for the device that stands in; choose sizes of 1, or Linux"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes torch know the group

    with _replaced(torch.cuda, _stand_ins(runtime)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            world = connect(layout, runtime)
            runtime.num_communicators = _num_communicators(world)
            yield world
        finally:
            dist.destroy_process_group()


def _num_communicators(world: World) -> int:
    """How many groups of several processes torch made for this one."""
    groups = (world.everyone, world.cfg, world.ring, world.ulysses, world.sequence)
    return len({id(group.handle) for group in groups if group.size > 1})


class _CudaEvent:
    """What torch expects of an event; nothing takes time here."""

    def __init__(self, *_: object, **__: object) -> None:
        """As torch makes them."""

    def record(self, *_: object) -> None:
        """It has happened."""

    def wait(self, *_: object) -> None:
        """It has happened."""

    def synchronize(self) -> None:
        """It has happened."""


class _CudaStream:
    """A stream of the runtime as torch expects one."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record_event(self, event: _CudaEvent | None = None) -> _CudaEvent:
        """The point that it has reached."""
        return event or _CudaEvent()

    def wait_event(self, event: _CudaEvent) -> None:
        """It has happened."""

    def wait_stream(self, other: "_CudaStream") -> None:
        """It is as far."""


def _stand_ins(runtime: EstimatingRuntime) -> Mapping[str, Callable[..., Any]]:
    """What torch.distributed and FSDP ask of torch.cuda, by name."""

    def new_stream(*_: object, **__: object) -> _CudaStream:
        return _CudaStream(runtime.side_stream())

    def current_stream(*_: object) -> _CudaStream:
        return _CudaStream(runtime.current_stream())

    def on_stream(stream: _CudaStream) -> AbstractContextManager[object]:
        return stream.stream.context()

    return {
        "Event": _CudaEvent,
        "Stream": new_stream,
        "current_device": lambda: 0,
        "current_stream": current_stream,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: runtime.capability,
        "is_initialized": lambda: True,
        "stream": on_stream,
    }


@contextmanager
def _replaced(module: Any, values: Mapping[str, object]) -> Iterator[None]:  # noqa: ANN401 # of any module
    """Inside it the module has these values under these names."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
