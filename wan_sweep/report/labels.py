"""Where the names of points go so that none covers another name or a point."""

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
