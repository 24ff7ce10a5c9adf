"""Where names go so that none covers another: around points, and side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle in pixels, its origin at the lower left."""

    left: float
    bottom: float
    width: float
    height: float

    def overlap(self, other: "Box") -> float:
        """Return the common area in square pixels."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        along = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(across, 0.0) * max(along, 0.0)

    def outside(self, frame: "Box") -> float:
        """Return the area that lies outside a frame, in square pixels."""
        return self.width * self.height - self.overlap(frame)


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, *, radius: float
) -> list[Box]:
    """Return a box for each label, one after the other, each at the free place that is nearest to its point.

    Args:
        points: positions of the points in pixels.
        sizes: width and height of each label in pixels.
        frame: where labels may lie.
        radius: what a point covers around its position, in pixels.
    """
    taken = [Box(left=x - radius, bottom=y - radius, width=2 * radius, height=2 * radius) for x, y in points]
    placed = []
    for point, size in zip(points, sizes, strict=True):
        best = min(
            enumerate(_candidates(point, size, radius)),
            key=lambda pair: (
                round(sum(map(pair[1].overlap, taken)) + pair[1].outside(frame)),
                pair[0],
            ),
        )[1]
        placed.append(best)
        taken.append(best)
    return placed


def side_by_side(centres: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Return where the middles of labels in one line go: as near as may be to where they belong, none over another.

    Args:
        centres: where each label belongs, in ascending order.
        widths: of each label, the distance to its neighbours included.
        low: where the line begins.
        high: where it ends; labels that do not fit go beyond.
    """
    groups: list[list[int]] = []
    starts: list[float] = []
    for index in range(len(centres)):
        groups.append([index])
        starts.append(_start(groups[-1], centres, widths, low, high))
        while len(groups) > 1 and starts[-2] + sum(widths[one] for one in groups[-2]) > starts[-1]:
            groups[-2:] = [groups[-2] + groups[-1]]
            starts[-2:] = [_start(groups[-1], centres, widths, low, high)]
    middles = []
    for group, start in zip(groups, starts, strict=True):
        left = start
        for one in group:
            middles.append(left + widths[one] / 2)
            left += widths[one]
    return middles


def _start(group: Sequence[int], centres: Sequence[float], widths: Sequence[float], low: float, high: float) -> float:
    """Return where a run of labels that touch each other begins, so that they are nearest to their places."""
    total, shift = 0.0, 0.0
    for one in group:
        shift += centres[one] - total - widths[one] / 2
        total += widths[one]
    return max(low, min(shift / len(group), high - total))


def _candidates(point: tuple[float, float], size: tuple[float, float], radius: float) -> Iterator[Box]:
    """Yield boxes around a point: right, left, above, below and between, then the same farther away."""
    (x, y), (width, height) = point, size
    for ring in range(7):
        reach = radius * 1.4 + ring * height * 0.9
        for turn in (0, 4, 1, 7, 3, 5, 2, 6):
            angle = turn * pi / 4
            across, up = cos(angle), sin(angle)
            yield Box(
                left=x + across * reach + (across - 1) * width / 2,
                bottom=y + up * reach + (up - 1) * height / 2,
                width=width,
                height=height,
            )
