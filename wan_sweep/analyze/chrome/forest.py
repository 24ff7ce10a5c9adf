"""Who called whom: slices of the same thread nest by time, and make a forest.

All of it is arrays, one element for each slice, so that a trace of millions of slices costs little memory. Parents
come before their children.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.signedinteger[Any]]
Indices = Ints
Bools = npt.NDArray[np.bool_]

NONE = -1
# Older traces count microseconds from 1970 in floating point, which rounds them to a quarter of one.
_TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True)
class Forest:
    """Slices, sorted by thread and time.

    Attributes:
        parent: Index of the slice around each; NONE for the outermost.
        is_first: Whether no slice around it has the same name, so that sums by name count nothing twice.
    """

    start: Floats
    end: Floats
    name: Indices
    kind: npt.NDArray[np.int8]
    lane: Indices
    correlation: Ints
    parent: Indices
    depth: Indices
    is_first: Bools

    def __len__(self) -> int:
        return len(self.start)

    @property
    def duration(self) -> Floats:
        """How long each took."""
        return self.end - self.start

    @cached_property
    def _levels(self) -> list[Indices]:
        order = np.argsort(self.depth, kind="stable").astype(np.int32)
        return np.split(order, np.cumsum(np.bincount(self.depth))[:-1]) if len(self) else []

    def nearest(self, mask: Bools) -> Indices:
        """For each slice the innermost one of those in the mask that is around it, or is it."""
        found = np.where(mask, np.arange(len(self), dtype=np.int32), np.int32(NONE))
        for level in self._levels[1:]:
            open_ones = level[found[level] == NONE]
            found[open_ones] = found[self.parent[open_ones]]
        return found

    def above(self, found: Indices) -> Indices:
        """What `nearest` found for the slice around each; NONE for the outermost."""
        return np.where(self.parent == NONE, np.int32(NONE), found[self.parent])

    def summed_up(self, values: npt.NDArray[np.float64]) -> Floats:
        """For each slice the sum of the values of itself and of all inside it."""
        total = values.astype(np.float64)
        for level in reversed(self._levels[1:]):
            np.add.at(total, self.parent[level], total[level])
        return total

    def at(self, lanes: Indices, times: Floats) -> Indices:
        """For each thread and time the innermost slice that was open then; NONE where there was none."""
        found = np.full(len(times), NONE, dtype=np.int32)
        if not len(self):
            return found
        for lane in np.unique(lanes):
            chosen = np.flatnonzero(lanes == lane)
            first, last = np.searchsorted(self.lane, [lane, lane + 1])
            before = np.searchsorted(self.start[first:last], times[chosen], side="right") - 1
            found[chosen] = np.where(before >= 0, before + first, NONE)
        while len(past := np.flatnonzero((found != NONE) & (self.end[found] < times))):
            found[past] = self.parent[found[past]]
        return found

    def around(self, index: int) -> Iterator[int]:
        """A slice and those around it, from the inside out."""
        while index != NONE:
            yield index
            index = int(self.parent[index])


def plant(
    start: Floats,
    duration: Floats,
    name: Indices,
    kind: npt.NDArray[np.int8],
    lane: Indices,
    correlation: Ints,
    outer_first: npt.NDArray[np.int8],
) -> Forest:
    """Nests slices.

    Args:
        start: When each began, in seconds.
        duration: How long it took.
        name: Number of its name.
        kind: Kept as it is.
        lane: Number of its thread.
        correlation: Kept as it is.
        outer_first: By kind, which of two slices with equal times is around the other: that with the lower number.
    """
    order = np.lexsort((outer_first[kind], -duration, start, lane))
    start, name, kind, lane = start[order], name[order], kind[order], lane[order]
    end = start + duration[order]
    parent, depth, is_first = _nest(start, end, name, lane)
    return Forest(start, end, name, kind, lane, correlation[order], parent, depth, is_first)


def _nest(start: Floats, end: Floats, name: Indices, lane: Indices) -> tuple[Indices, Indices, Bools]:
    parent = np.full(len(start), NONE, dtype=np.int32)
    depth = np.zeros(len(start), dtype=np.int32)
    is_first = np.ones(len(start), dtype=np.bool_)
    parents, depths, firsts = parent.data, depth.data, is_first.data
    num_open_of = [0] * (int(name.max(initial=NONE)) + 1)
    open_ones: list[tuple[float, int, int]] = []  # end, index, name
    current = None
    columns = zip(start.data, end.data, name.data, lane.data, strict=True)
    for index, (begins, ends, called, thread) in enumerate(columns):
        if thread != current:
            current = thread
            for _, _, opened in open_ones:
                num_open_of[opened] -= 1
            open_ones.clear()
        # A slice that ends after the one around it is beside it: it only overlaps, which the format allows.
        while open_ones and (open_ones[-1][0] <= begins or open_ones[-1][0] + _TOLERANCE_SECONDS < ends):
            num_open_of[open_ones.pop()[2]] -= 1
        if open_ones:
            parents[index] = open_ones[-1][1]
            depths[index] = len(open_ones)
            if num_open_of[called]:
                firsts[index] = False
        num_open_of[called] += 1
        open_ones.append((ends, index, called))
    return parent, depth, is_first
