"""The configurations that no other one beats in both memory and time."""

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points for which no other is at most as large in both and smaller in one.

    Equal points are on the front together. The indices go from the smallest first value to the largest.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        first, second = points[index]
        beaten = any(
            points[other][0] <= first and points[other][1] <= second and points[other] != points[index]
            for other in front
        )
        if not beaten:
            front.append(index)
    return front
