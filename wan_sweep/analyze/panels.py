"""The parts of a picture, as numbers; `picture` draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

Numbers = Sequence[float] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A level that changes at moments: `values[i]` holds from `times[i]` on."""

    label: str
    times: Numbers
    values: Numbers


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A named piece of the time axis."""

    label: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Levels over time, in seconds from the beginning.

    Attributes:
        limits: Where the time axis begins and ends.
        unit: Of the values; a share is between 0 and 1.
        layers: Levels at `layer_times` that are stacked as areas, from below.
        stretches: Shaded and named.
        peak: Time and value of the point to be marked.
    """

    title: str
    limits: tuple[float, float]
    unit: Literal["bytes", "share"]
    lines: Sequence[Line]
    layer_times: Numbers = ()
    layers: Sequence[tuple[str, Numbers]] = ()
    stretches: Sequence[Stretch] = ()
    peak: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Named amounts, the largest first."""

    title: str
    unit: Literal["bytes", "seconds"]
    bars: Sequence[tuple[str, float]]


Panel = Timeline | Bars
