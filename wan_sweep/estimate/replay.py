"""Runs equal blocks once: what the first one allocated is repeated for the others, event by event.

A transformer runs the same block dozens of times a step, and a fake run costs 0.1 ms an operation. What a block
allocates depends on the kind of block, on the tensors' shapes, and on nothing else; so its events can be repeated.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from wan21.dit.residual import Windowed
from wan_sweep.estimate.memory import DeviceMemory, Event, Repetition, Take


@dataclass(slots=True)
class _Recording:
    """What a block did, which of its arguments it returned, and what came of the last repetition."""

    events: tuple[Event, ...]
    returned: int
    last: Repetition | None = None


class Replays:
    """Recordings of blocks, by what decides over them.

    Args:
        memory: where events come from and are repeated.
        is_on: False runs every block; slow, and what tests compare with.
    """

    def __init__(self, memory: DeviceMemory, *, is_on: bool = True) -> None:
        self._memory = memory
        self._is_on = is_on
        self._recordings: dict[object, _Recording] = {}

    @property
    def is_on(self) -> bool:
        """Whether what repeats is gone through once."""
        return self._is_on

    def through(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The blocks, in order, each to be called once before the next is asked for."""
        for index, block in enumerate(blocks):
            with self._memory.at(replace(self._memory.place, block=index)):
                yield _Replayed(block, self) if self._is_on else block

    def run(self, block: nn.Module, args: tuple[Any, ...]) -> Any:  # noqa: ANN401 # whatever a block returns
        """What the block returns for these arguments.

        Of a block of FSDP only what is between its hooks repeats: they gather ahead, for the next one.
        """
        if not _is_sharded(block):
            return self._run(block, block, args)
        # Between the hooks torch looks up the method by this name, first in the block itself.
        forward = block.forward
        block.__dict__["forward"] = lambda *inner: self._run(block, forward, inner)
        try:
            return block(*args)
        finally:
            del block.__dict__["forward"]

    def _run(self, block: nn.Module, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        key = (type(block), *map(_signature, block.parameters()), *map(_signature, args))
        recording = self._recordings.get(key)
        if recording is not None:
            recording.last = self._memory.repeat(recording.events, recording.last)
            return args[recording.returned]
        with self._listening() as events:
            result = run(*args)
        returned = next((index for index, argument in enumerate(args) if argument is result), None)
        # A block that returns something new, or whose memory outlives it, cannot be repeated: its tensors are needed.
        if returned is not None and _is_closed(events):
            self._recordings[key] = _Recording(tuple(events), returned)
        return result

    @contextmanager
    def _listening(self) -> Iterator[list[Event]]:
        events: list[Event] = []
        listener = events.append
        self._memory.listeners.append(listener)
        try:
            yield events
        finally:
            self._memory.listeners.remove(listener)


class _Replayed(nn.Module):
    """A block that may be repeated instead of run."""

    def __init__(self, block: nn.Module, replays: Replays) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, it is no child
        self._replays = replays

    def forward(self, *args: Any) -> Any:  # noqa: ANN401 # those of the block
        return self._replays.run(self._block[0], args)


def _is_sharded(block: nn.Module) -> bool:
    """Whether FSDP has it; whose import takes seconds, and which nobody needs who has not loaded it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(block, fsdp.FSDPModule)


def _signature(value: object) -> object:
    """All of a tensor, or of a residual that lies elsewhere, that decides what is allocated; other values themselves.

    Never the thing itself, which would be kept alive.
    """
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, Windowed):
        return (type(value), value.shape)
    if isinstance(value, tuple):
        return tuple(map(_signature, value))
    return value


def _is_closed(events: list[Event]) -> bool:
    """Whether what came has gone, and nothing else has."""
    taken = {event.number for event in events if isinstance(event, Take)}
    given = {event.number for event in events if not isinstance(event, Take)}
    return taken == given
