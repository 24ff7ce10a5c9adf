"""Numbers from a file, which can hold anything."""

import math

_MOST = 2**62


def finite(value: float) -> float:
    """A time that can be reckoned with.

    Raises:
        TypeError, ValueError, OverflowError: it is none; text is none, either.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no time")
    return value + 0.0


def whole(value: object) -> int:
    """A number of bytes, or an address.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, int) or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no whole number from 0 on")
    return int(value)
