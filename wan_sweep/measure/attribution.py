"""Who fills the device at the peak: an observer that names what is allocated.

Spans tell phase, component, step and block; torch's removable hooks tell the module; the profiler's events tell
operation, shape and dtype. They are read at the boundaries of spans, blocks included, so that they never pile up, and
the live set is replayed from them, to the event, at the highest point of the run and of each phase.

It makes a run slower, so it belongs into a pass of its own, never into a timed one. It allocates nothing on the device
and changes nothing of what is allocated there.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from wan21.events import Span
from wan21.runtime import Runtime
from wan_sweep.measure.allocation_log import AllocationLog, Scope
from wan_sweep.measure.failure import is_out_of_memory, request_bytes
from wan_sweep.measure.live_items import describe
from wan_sweep.measure.live_set import NOWHERE, Event, LiveSet, Moment, Place
from wan_sweep.measure.module_names import BLOCKS, ModuleNames
from wan_sweep.measure.snapshot import Tagger, tagger

SCHEMA_VERSION = 1

STREAMED = "streamed blocks buffer"
"""Stands for the parameter's name where one allocation holds several."""

LOST = "memory of the host ran out while allocations were read; what came later is not known"
NOT_REFUSED = "the device's allocator refused nothing, so other memory ran out; this is what stood soon after"


class Attributor:
    """Listens to a pipeline and names what stands in the device's memory.

    Everything that is to have a name has to be allocated inside `recording`; nothing else may use torch's profiler
    there, `Runtime.counting` of a CPU included.

    Args:
        runtime: whose device's memory.
    """

    wants_blocks = True

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._log = AllocationLog(runtime.device)
        self._names = ModuleNames(runtime.device)
        self._live = LiveSet()
        self._tag: Tagger = tagger(runtime.device)
        self._failure: Moment | None = None
        self._lost: Moment | None = None
        self._drift_bytes: int | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records inside; afterwards all hooks are gone, also after an error.

        Raises:
            RuntimeError: torch's profiler is in use already.
        """
        self._live = LiveSet(self._runtime.memory().allocated_bytes)
        with ExitStack() as stack:
            stack.enter_context(self._names.listening())
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            self._log.start()
            stack.callback(self._finish)
            yield

    def _finish(self) -> None:
        self._tag("")
        self._replay(self._log.stop, NOWHERE)
        if self._runtime.device.type != "cpu":  # a CPU's counter is the very profiler that has just been used
            self._drift_bytes = self._runtime.memory().allocated_bytes - self._live.allocated_bytes

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        """Names what happens inside a span."""
        outer = self._log.place
        self._read(outer)
        if outer == NOWHERE:
            self._live.settle()
        scope = self._open(_inside(outer, span))
        try:
            yield
        except BaseException as error:
            self._end(scope, span, error)
            raise
        self._end(scope, span, None)

    def _end(self, scope: Scope, span: Span, error: BaseException | None) -> None:
        if not self._close(scope):
            return  # a generator that was given up after an error, and hears of it when all is over
        self._read(scope.place)
        if span.kind == "component" and self._lost is None:
            self._name_weights(span.name, is_complete=error is None)
        if span.kind == "phase" and error is None:
            self._live.settle()
        if isinstance(error, Exception) and self._failure is None:  # no generator that is given up with the error
            self._failure = self._live.now(scope.place, request_bytes(str(error)))

    def _open(self, place: Place, module: nn.Module | None = None) -> Scope:
        self._tag(_label(place))
        return self._log.open(place, module)

    def _close(self, scope: Scope) -> bool:
        """Whether the scope was still open."""
        was_open = self._log.close(scope)
        if was_open:
            self._tag(_label(self._log.place))
        return was_open

    def _enter(self, module: nn.Module, arguments: object) -> None:  # noqa: ARG002  # torch's signature
        self._names.show(module)
        root, path = self._names.path(module)
        outer = self._log.place
        above = self._scope_of(root)
        if above is not None:
            prefix = above.place.module
        elif path:  # part of a model that was not called as a whole
            prefix = ""
        elif outer.block is not None:  # a streamed block, which is a copy and stands in no model
            prefix = f"{BLOCKS}.{outer.block}"
        else:
            prefix = outer.module
        name = ".".join(part for part in (prefix, path) if part)
        component = self._names.component(root) or outer.component
        self._open(replace(outer, module=name, component=component), module)

    def _leave(self, module: nn.Module, arguments: object, output: object) -> None:  # noqa: ARG002  # torch's signature
        scope = self._scope_of(module)
        if scope is not None:
            self._close(scope)

    def _scope_of(self, module: nn.Module) -> Scope | None:
        return next((scope for scope in reversed(self._log.scopes) if scope.module is module), None)

    def _read(self, place: Place) -> None:
        """Brings the live set up to now; the interval that ends here belongs to this place."""
        if not self._replay(lambda: self._log.read(place), place):
            return
        component = place.component if place.is_loading else ""
        for address, tensors in self._names.new_tensors(component).items():
            allocation = self._live.at(address)
            if allocation is None:
                continue
            name, tensor = tensors[0]
            if len({tensor.data_ptr() for _, tensor in tensors}) > 1:
                allocation.parameter = STREAMED
            else:
                allocation.parameter, allocation.shape = name, tuple(tensor.shape)
                allocation.dtype = str(tensor.dtype).removeprefix("torch.")

    def _replay(self, read: Callable[[], list[Event]], place: Place) -> bool:
        """Whether it could be done: it costs host memory, which may be what has run out, and then ends for good."""
        if self._lost is not None:
            return False
        try:
            self._live.replay(read(), place)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            with suppress(MemoryError):
                self._log.abandon()
            self._lost = self._live.now(place)
            return False
        return True

    def _name_weights(self, component: str, *, is_complete: bool) -> None:
        """What came with a component and stands when it has loaded is its weights; after a failure, only parameters."""
        for allocation in self._live.standing():
            came_with_it = allocation.place.is_loading and allocation.place.component == component
            if came_with_it and (is_complete or allocation.parameter is not None):
                allocation.weights_of = component

    def result(self, *, outcome: str, reason: str, num_steps: int) -> dict[str, Any]:
        """What attribution.json holds.

        Args:
            outcome: of the pass.
            reason: of an outcome other than ok.
            num_steps: how many steps the pass was to run.

        Returns:
            Beside what the file's other readers know, `drift_bytes`: what the allocator counted at the end beyond the
            replay, 0 if the two agree, None on a CPU, which has no second counter.
        """
        highest = [] if self._live.highest is None else [describe(self._live.highest, "run")]
        return {
            "schema_version": SCHEMA_VERSION,
            "device": self._runtime.facts()["device"],
            "outcome": outcome,
            "reason": "; ".join(part for part in (reason, LOST if self._lost else "") if part),
            "num_steps": num_steps,
            "drift_bytes": self._drift_bytes,
            "peaks": highest + [describe(moment, "phase") for moment in self._live.phases.values()],
            "oom": self._oom() if outcome == "oom" else None,
        }

    def _oom(self) -> dict[str, Any] | None:
        """The live set at the request that failed, or near it where nothing tells of that request."""
        told = None if self._failure is None else self._failure.request_bytes
        if self._lost is not None:
            moment, reason = self._lost, LOST
        elif self._live.refused is not None:
            moment, reason = self._live.refused, ""
        elif self._failure is not None:
            moment, reason = self._failure, NOT_REFUSED
        else:
            return None
        request = told if moment.request_bytes is None else moment.request_bytes
        return describe(moment, "oom") | {"request_bytes": request, "reason": reason}


def _inside(outer: Place, span: Span) -> Place:
    """The place inside a span."""
    match span.kind:
        case "phase":
            return Place(phase=span.name)
        case "component":
            return replace(outer, component=span.name, is_loading=True)
        case "step":
            return replace(outer, step=span.index)
        case "block":
            return replace(outer, block=span.index)
        case "release" | "video":
            return outer


def _label(place: Place) -> str:
    """A place as a tag of the allocator's own history: phase/step/block/module, a dash for what does not apply."""
    step, block = ("-" if number is None else str(number) for number in (place.step, place.block))
    return "/".join((place.phase or "-", step, block, place.module or "-")) if place != NOWHERE else ""
