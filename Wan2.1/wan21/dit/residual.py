"""The residual stream, seen a window of tokens at a time.

Letters: B videos, L tokens, D model width.

A block reads and changes the residual of a token without looking at other tokens. So the residual need not lie in one
tensor, nor on the device: whoever keeps it elsewhere yields windows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

Window = tuple[slice, torch.Tensor]
"""Which tokens, and their residual, [B, rows, D] in float32 on the device."""


class Windowed(ABC):
    """A residual that yields windows of its own size. Each is to be done with before the next is asked for."""

    shape: torch.Size
    """[B, L, D]."""

    @abstractmethod
    def windows(self, *, reads: bool = True, writes: bool = False) -> Iterator[Window]:
        """All tokens, in order; without `reads` what a window holds is undefined, without `writes` it is not kept."""


Residual = torch.Tensor | Windowed
"""[B, L, D] in float32, in one tensor on the device, or in windows."""

Outs = tuple[torch.Tensor | None, ...]
"""Where results are to be written; None where gradients are kept: then they are handed over."""

Produce = Callable[[slice, torch.Tensor, Outs], Iterable[torch.Tensor]]
"""From the tokens' numbers, a window, and where to write its results [B, rows, ...], to the results, one by one."""


AS_RUN: ContextVar[Callable[[Iterator[Any]], Iterator[Any]]] = ContextVar("AS_RUN", default=iter)
"""How loops over windows are run: each window by itself. One that only counts need not run equal windows again."""


def row_slices(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows; one slice of all of them where gradients are kept."""
    if torch.is_grad_enabled():
        size = num_rows
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def windows(
    residual: Residual, size: int, *, reads: bool = True, writes: bool = False, each: bool = False
) -> Iterator[Window]:
    """All tokens, in order: views of one tensor of `size` rows each, or what a windowed residual yields.

    With `each` no window may be left out, whatever the runtime, for the loop hands something on to the next window.
    """
    parts = _windows(residual, size, reads=reads, writes=writes)
    return parts if each else AS_RUN.get()(parts)


def pairs(written: Residual, read: Residual, size: int, *, reads: bool) -> Iterator[tuple[Window, Window]]:
    """The same tokens of two residuals, of which the first is written to; with `reads` both are read."""
    both = zip(_windows(written, size, reads=reads, writes=True), _windows(read, size), strict=True)
    return AS_RUN.get()(both)


def _windows(residual: Residual, size: int, *, reads: bool = True, writes: bool = False) -> Iterator[Window]:
    if isinstance(residual, torch.Tensor):
        return _chunks(residual, size)
    return residual.windows(reads=reads, writes=writes)


def chunks(x: torch.Tensor, size: int, first: int = 0, *, each: bool = False) -> Iterator[Window]:
    """Views of [B, rows, D], `size` rows each, the first of which is token number `first`; `each` as of windows."""
    parts = _chunks(x, size, first)
    return parts if each else AS_RUN.get()(parts)


def _chunks(x: torch.Tensor, size: int, first: int = 0) -> Iterator[Window]:
    for rows in row_slices(x.shape[1], size):
        yield slice(first + rows.start, first + rows.stop), x[:, rows]


def collect(parts: Iterable[Window], produce: Produce, wholes: Outs) -> tuple[torch.Tensor, ...]:
    """What `produce` makes of consecutive windows, in whole tensors.

    Args:
        parts: the windows.
        produce: what makes the results of a window.
        wholes: for the results of all windows, [B, rows of all, ...] each; None where gradients are kept, and there is
            one window.

    Raises:
        ValueError: there is no window.
    """
    first: int | None = None
    results: list[torch.Tensor] = []
    for rows, x in parts:
        first = rows.start if first is None else first
        here = slice(rows.start - first, rows.stop - first)
        results = [*produce(rows, x, tuple(None if whole is None else whole[:, here] for whole in wholes))]
    if first is None:
        raise ValueError("nothing to collect: there is no window")
    return tuple(result if whole is None else whole for result, whole in zip(results, wholes, strict=True))
