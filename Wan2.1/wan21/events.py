"""How a pipeline tells what it is doing, without knowing who listens.

The pipeline opens a span around each phase, component load, step and block. An observer returns a context manager
for a span, or several observers are joined with `together`. Measuring, progress bars and traces are all observers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["phase", "component", "release", "step", "video", "block"]

PHASES = ("extend_prompt", "load", "encode_text", "encode_image", "denoise", "decode", "save")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the run.

    A phase is one of PHASES and may occur several times. A component span lies inside the phase "load", or
    inside "extend_prompt" whose model no other phase sees; its name is that of the component and `expected_bytes` the
    sum of its parameters' bytes that arrive on the device, where that is known. A release span surrounds the dropping
    of the component of that name and lies between phases. Steps count from 0 to
    `total` - 1 over the whole phase (all micro batches), videos within decode, and blocks within one forward.
    """

    kind: Kind
    name: str
    index: int | None = None
    total: int | None = None
    expected_bytes: int | None = None


class Observer(Protocol):
    """Listens to a pipeline."""

    @property
    def wants_blocks(self) -> bool:
        """Whether spans of kind "block" are of use; without them the pipeline opens none."""

    def span(self, span: Span) -> AbstractContextManager[object]:
        """What to enter when the span begins and to leave when it ends, an exception included."""


class _Silent:
    wants_blocks = False

    def span(self, span: Span) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()


SILENT: Observer = _Silent()


class _Together:
    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self.wants_blocks = any(observer.wants_blocks for observer in observers)

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.span(span))
            yield


def together(*observers: Observer) -> Observer:
    """One observer that passes each span to all of them, in this order, and closes them in reverse."""
    return _Together(observers)
