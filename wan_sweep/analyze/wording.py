"""Values as people read them."""

from collections.abc import Callable, Mapping

from wan_sweep.analyze.finding import Unit, Value
from wan_sweep.units import format_bytes, format_seconds

UNKNOWN_TEXT = "-"


def duration(seconds: float) -> str:
    """Number and unit, with three digits or so also where that takes microseconds."""
    size = abs(seconds)
    if size < 0.0009995:
        return f"{seconds * 1e6:.1f} us"
    if size < 0.09995:
        return f"{seconds * 1e3:.{2 if size < 0.009995 else 1}f} ms"
    return format_seconds(seconds)


def count(number: float) -> str:
    """A number of things, with one decimal only where it is a small average."""
    return (
        f"{number:,.1f}" if isinstance(number, float) and number < 1000 and number != int(number) else f"{number:,.0f}"
    )


_SHOWN: Mapping[Unit, Callable[[float], str]] = {
    "count": count,
    "bytes": format_bytes,
    "bytes_per_second": lambda value: f"{format_bytes(value)}/s",
    "seconds": duration,
    "percent": lambda value: f"{value:.1f} %",
}


def show(value: Value, unit: Unit) -> str:
    """A value in its unit."""
    if value is None:
        return UNKNOWN_TEXT
    if isinstance(value, str) or unit == "text":
        return str(value)
    return _SHOWN[unit](value) if value else "0"


def one_line(text: str) -> str:
    """Text from a file, without the characters that would break a table or a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
