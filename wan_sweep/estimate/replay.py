"""Runs equal blocks once: what the first one allocated is repeated for the others, event by event.

A transformer runs the same block dozens of times a step, and a fake run costs 0.1 ms an operation. What a block
allocates depends on the kind of block, on the tensors' shapes, and on nothing else; so its events can be repeated.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from wan21.dit.layers import Slicing
from wan21.dit.residual import AS_RUN, Windowed
from wan21.dit.tokens import Tokens
from wan_sweep.estimate.memory import DeviceMemory, Event, Give, Repetition, Take


@dataclass(frozen=True, slots=True)
class _Result:
    """A tensor that a block returned and that is all of its storage.

    Attributes:
        number: of the holding.
    """

    number: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> torch.Tensor:
        """Another one like it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(slots=True)
class _Recording:
    """What a block did.

    Attributes:
        returned: which of its arguments, or the tensors that it made.
        last: what came of the last repetition, where nothing was made.
    """

    events: tuple[Event, ...]
    returned: int | tuple[_Result, ...]
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

    def over(self, parts: Iterator[Any]) -> Iterator[Any]:
        """The parts of a loop that its body has to see: of equal ones in a row one, whose events are repeated.

        Every event is gone through, so that whoever listens hears what a loop over all parts would do.
        """
        events: list[Event] = []
        of: object = None
        for part in parts:
            if of is not None and of == _window_signature(part):
                self._memory.go_through(events)
                continue
            with self._listening() as events:
                yield part
            # What the body keeps, or lets go of that was there before, it may do once only.
            of = _window_signature(part) if _lasting(events) == set() else None

    @contextmanager
    def loops(self) -> Iterator[None]:
        """Inside it loops over windows run as `over` says."""
        before = AS_RUN.set(self.over) if self._is_on else None
        try:
            yield
        finally:
            if before is not None:
                AS_RUN.reset(before)

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
            return self._repeat(recording, args)
        with self._listening() as events:
            result = run(*args)
        returned = self._returned(result, args, events)
        if returned is not None:
            self._recordings[key] = _Recording(tuple(events), returned)
        return result

    def _repeat(self, recording: _Recording, args: tuple[Any, ...]) -> Any:  # noqa: ANN401
        if isinstance(recording.returned, int):
            recording.last = self._memory.repeat(recording.events, recording.last)
            return args[recording.returned]
        made: dict[int, torch.Tensor] = {}

        def make(result: _Result) -> None:
            made[result.number] = result.make()

        self._memory.go_through(
            recording.events, {result.number: partial(make, result) for result in recording.returned}
        )
        return tuple(made[result.number] for result in recording.returned)

    def _returned(self, result: object, args: tuple[Any, ...], events: list[Event]) -> int | tuple[_Result, ...] | None:
        """What to return the next time; None: it cannot be repeated, for its tensors are needed as they are."""
        lasting = _lasting(events)
        if lasting is None:
            return None
        index = next((index for index, argument in enumerate(args) if argument is result), None)
        if index is not None:
            return None if lasting else index
        if not isinstance(result, tuple) or not all(isinstance(one, torch.Tensor) for one in result):
            return None
        made = tuple(map(self._result, result))
        if None in made or {one.number for one in made if one} != lasting or len(made) != len(lasting):
            return None
        return tuple(one for one in made if one)

    def _result(self, tensor: torch.Tensor) -> _Result | None:
        """How to make such a tensor; None if it is a part of something."""
        storage = tensor.untyped_storage()
        number = self._memory.storages.get(storage._cdata)  # noqa: SLF001 # as the tracker knows it
        is_all = tensor.storage_offset() == 0 and storage.nbytes() == tensor.numel() * tensor.element_size()
        if number is None or not is_all:
            return None
        return _Result(number, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

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
    if isinstance(value, Slicing):
        return tuple(_signature(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Tokens):  # a run has one kind of them, which may hold places for what arrives
        return type(value)
    return value


def _window_signature(part: object) -> object:
    """Likewise, of a window, or of several: where it lies decides nothing, how long it is does."""
    if isinstance(part, tuple):
        return tuple(map(_window_signature, part))
    return part.stop - part.start if isinstance(part, slice) else _signature(part)


def _lasting(events: list[Event]) -> set[int] | None:
    """The holdings that have come and not gone; None if something has gone that was there before."""
    taken = {event.number for event in events if isinstance(event, Take)}
    given = {event.number for event in events if isinstance(event, Give)}
    return taken - given if given <= taken else None
