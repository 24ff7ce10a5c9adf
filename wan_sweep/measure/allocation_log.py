"""Allocations of a device as torch's profiler saw them, with the operation and the place of each.

The profiler's core is driven directly and asked for host events only, memory and shapes included; that gives the same
on a CPU and on CUDA, whose allocator counts on the host. No dispatch mode is involved: one would change what is
allocated (docs/memory.md).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch._C._profiler import (
    _ExtraFields_Allocation,
    _ExtraFields_OutOfMemory,
    _ExtraFields_TorchOp,
    _ProfilerEvent,
    _RecordFunctionFast,
    _TensorMetadata,
)

from wan_sweep.measure.failed_requests import FailedRequest, Savable, failed_requests
from wan_sweep.measure.live_set import ALLOCATING, NOWHERE, Allocation, Event, Free, Place, Refusal, Use

ROOT = "wan_sweep.root"
"""A range around all of a recording: without one, what CUDA frees outside of every operation is not in the events."""

PREFIX = "wan_sweep.place:"
"""Begins the names of our ranges among the profiler's events; the number of a place follows."""

_profiler: Any = torch.autograd  # its part of the profiler is there in all versions, and missing from the stubs


class Profile(Savable, Protocol):
    """What torch's profiler leaves."""

    def experimental_event_tree(self) -> list[_ProfilerEvent]:
        """Its events; an operation holds those inside it."""


@dataclass(eq=False)
class Scope:
    """A span or a call of a module that is open: a range in the profiler's events."""

    place: Place
    module: nn.Module | None = None
    range: _RecordFunctionFast | None = None


class AllocationLog:
    """Records what a device allocates, between `start` and `stop`, and hands it out as plain events.

    An allocation's operation is the innermost one around it that does more than allocate: `aten::_to_copy` for the
    `aten::empty_strided` inside it. Where there is no such one, it is the outermost of those that allocate.

    Events fill the host's memory until they are read, some 2 kB each, and reading takes some 10 us for each, but only
    0.3 ms if there are none: so read often. No range of a profiler but those of this class may be open at a reading.

    Args:
        device: whose allocations.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scopes: list[Scope] = []
        self._places: list[Place] = []
        self._numbers: dict[Place, int] = {}
        self._root: _RecordFunctionFast | None = None
        self._is_on = False

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """All that are open, the innermost last."""
        return tuple(self._scopes)

    @property
    def place(self) -> Place:
        """Where the run is."""
        return self._scopes[-1].place if self._scopes else NOWHERE

    def open(self, place: Place, module: nn.Module | None = None) -> Scope:
        """Everything until the scope is closed happens at this place."""
        scope = Scope(place, module)
        self._enter(scope)
        self._scopes.append(scope)
        return scope

    def close(self, scope: Scope) -> bool:
        """Closes a scope and what is still open inside it; one that is closed already stays so.

        After an error scopes come to an end in any order: a generator that was given up learns of it last.

        Returns:
            Whether it was open.
        """
        if scope not in self._scopes:
            return False
        innermost: Scope | None = None
        while innermost is not scope:
            innermost = self._scopes.pop()
            self._leave(innermost)
        return True

    def _enter(self, scope: Scope) -> None:
        if self._is_on:
            number = self._numbers.setdefault(scope.place, len(self._places))
            if number == len(self._places):
                self._places.append(scope.place)
            scope.range = _RecordFunctionFast(f"{PREFIX}{number}")
            scope.range.__enter__()

    def _leave(self, scope: Scope) -> None:
        if self._is_on and scope.range is not None:
            scope.range.__exit__(None, None, None)
        scope.range = None

    def start(self) -> None:
        """Begins to record.

        Raises:
            RuntimeError: torch's profiler is in use already; it would say nothing and lose what it has.
        """
        if _profiler._profiler_enabled():  # noqa: SLF001
            raise RuntimeError("torch's profiler runs already, and cannot run twice; end the other recording first")
        settings: Any = torch.autograd.profiler.profile(profile_memory=True, record_shapes=True)
        config = settings.config()
        activities = {torch.profiler.ProfilerActivity.CPU}
        _profiler._prepare_profiler(config, activities)  # noqa: SLF001
        _profiler._enable_profiler(config, activities)  # noqa: SLF001
        self._is_on = True
        self._root = _RecordFunctionFast(ROOT)
        self._root.__enter__()
        for scope in self._scopes:
            self._enter(scope)

    def _halt(self) -> Profile:
        for scope in reversed(self._scopes):  # a range has to end in the recording that it began in
            self._leave(scope)
        if self._root is not None:
            self._root.__exit__(None, None, None)
        self._root = None
        self._is_on = False
        profile: Profile = _profiler._disable_profiler()  # noqa: SLF001
        return profile

    def abandon(self) -> None:
        """Ends the recording and looks at nothing more of it."""
        if self._is_on:
            self._halt()

    def stop(self, place: Place = NOWHERE) -> list[Event]:
        """Ends the recording; as `read`."""
        return self._events(self._halt(), place) if self._is_on else []

    def read(self, place: Place) -> list[Event]:
        """All events since the last reading, in the order of time.

        Args:
            place: of what happened outside of all scopes, such as in another thread.
        """
        profile = self._halt()
        self.start()  # before the events are looked at: what Python's collector frees meanwhile is seen
        return self._events(profile, place)

    def _events(self, profile: Profile, place: Place) -> list[Event]:
        events = list(self._walk(profile.experimental_event_tree(), _Context(place)))
        events.sort(key=lambda event: event.time)  # stable: events of one instant stay in their order
        if any(isinstance(event, Refusal) for event in events):
            return list(self._with_sizes(events, failed_requests(profile)))
        return events

    def _walk(self, roots: list[_ProfilerEvent], around: "_Context") -> Iterator[Event]:
        """The events of a tree; an operation comes before all inside it."""
        waiting = [(node, around) for node in reversed(roots)]
        while waiting:
            node, context = waiting.pop()
            fields = node.extra_fields
            if isinstance(fields, _ExtraFields_TorchOp):
                context = self._inside(node, context)
                if "::" in node.name:
                    yield from _uses(node.start_time_ns, fields.inputs)
                waiting += [(child, context) for child in reversed(node.children)]
            elif isinstance(fields, _ExtraFields_OutOfMemory):
                yield Refusal(node.start_time_ns, None, context.place, context.operation)
            elif isinstance(fields, _ExtraFields_Allocation) and fields.device == self._device:
                yield _allocation_or_free(node.start_time_ns, fields, context)

    def _inside(self, node: _ProfilerEvent, context: "_Context") -> "_Context":
        """What is true inside an operation or a range."""
        if node.name.startswith(PREFIX):
            return _Context(self._places[int(node.name.removeprefix(PREFIX))])
        if "::" not in node.name or (context.operation and node.name in ALLOCATING):
            return context  # somebody else's range, or a mere allocation
        return _Context(context.place, node.name, node.end_time_ns)

    def _with_sizes(self, events: list[Event], requests: list[FailedRequest]) -> Iterator[Event]:
        """The events with the sizes of failed requests, if known; those that other devices refused are left out."""
        waiting = iter(requests)
        for event in events:
            if not isinstance(event, Refusal):
                yield event
                continue
            request = next(waiting, None)
            if request is None:
                yield event
            elif request.is_of(self._device):
                yield replace(event, num_bytes=request.num_bytes)


@dataclass(frozen=True, slots=True)
class _Context:
    """What is around an event: the place, and the operation with its end."""

    place: Place
    operation: str = ""
    operation_end: int = 0


def _allocation_or_free(time: int, fields: _ExtraFields_Allocation, context: _Context) -> Allocation | Free:
    if fields.alloc_size < 0:
        return Free(time, fields.ptr, -fields.alloc_size)
    return Allocation(
        time=time,
        address=fields.ptr,
        num_bytes=fields.alloc_size,
        place=context.place,
        operation=context.operation,
        operation_end=context.operation_end,
    )


def _uses(time: int, inputs: Iterable[object]) -> Iterator[Use]:
    """The tensors among an operation's inputs, lists of tensors included."""
    for value in inputs:
        if isinstance(value, list):
            yield from _uses(time, value)
        elif isinstance(value, _TensorMetadata) and value.storage_data_ptr:
            yield Use(time, value.storage_data_ptr, tuple(value.sizes), str(value.dtype).removeprefix("torch."))
