"""Which part of each level a tile of the picture needs.

This speaks of decoding; encoding is the same the other way round, up to its last downsampling (`encode_plan`).

After the first upsampling the decoder's positions meet their neighbours in space through convolutions with three taps
only: the norm looks at one position, and attention comes before. So a tile is computed from the rows and columns that
it depends on, itself and a halo, and nothing has to be blended. A convolution on a part of a frame is wrong only in the
outermost row or column, where it sees zeros in place of neighbours; that is cut off behind it. Where the part ends with
the frame, the zeros are right, and nothing is cut off. Rows and columns do not depend on each other, so all of this is
about intervals.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from torch import nn


@dataclass(frozen=True)
class Interval:
    """The rows (or columns) from `start` to `stop` of a frame that has `size` of them at the level at hand."""

    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start

    def grown(self) -> "Interval":
        """With a neighbour on each side that has one: what a convolution with three taps reads."""
        return Interval(max(0, self.start - 1), min(self.size, self.stop + 1), self.size)

    def doubled(self) -> "Interval":
        """The same rows one level higher."""
        return Interval(2 * self.start, 2 * self.stop, 2 * self.size)

    def halved(self) -> "Interval":
        """The fewest rows one level lower that contain these."""
        return Interval(self.start // 2, -(-self.stop // 2), self.size // 2)

    def before_halving(self) -> "Interval":
        """The rows one level higher of which a convolution of stride 2 makes these: three for each, the last shared."""
        return Interval(2 * self.start, min(2 * self.size, 2 * self.stop + 1), 2 * self.size)

    def inside(self, outer: "Interval") -> slice:
        """Where these rows are in a tensor that begins and ends with `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)

    def as_slice(self) -> slice:
        """Where these rows are in the whole frame."""
        return slice(self.start, self.stop)


def split_evenly(size: int, count: int) -> list[Interval]:
    """A whole frame's rows in `count` intervals, whose lengths differ by one at most."""
    bounds = [size * i // count for i in range(count + 1)]
    return [Interval(start, stop, size) for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class Window:
    """What a layer computes, and the part of it that is needed."""

    computed: Interval
    kept: Interval


Windows: TypeAlias = dict[nn.Module, Window]
"""By layer; a `ResidualBlock` stands for its shortcut, an `Upsample` for its convolution within frames."""


@dataclass(frozen=True)
class Crops:
    """What to keep of each layer's result, for one tile. Layers that are not named keep everything."""

    rows: Windows = field(default_factory=dict)
    cols: Windows = field(default_factory=dict)

    def of(self, layer: nn.Module) -> tuple[slice, slice] | None:
        """Rows and columns to keep, or None for all."""
        if layer not in self.rows:
            return None
        rows, cols = self.rows[layer], self.cols[layer]
        return rows.kept.inside(rows.computed), cols.kept.inside(cols.computed)
