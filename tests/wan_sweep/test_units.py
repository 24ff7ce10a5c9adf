import pytest

from wan_sweep.units import GIB, MIB, format_bytes, format_gib, format_mib, format_seconds


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (64 * MIB, "64.0 MiB"), (3 * GIB // 2, "1.50 GiB")],
)
def test_bytes_are_shown_in_powers_of_two(num_bytes: int, shown: str) -> None:
    assert shown == format_bytes(num_bytes)


def test_a_column_shows_one_unit() -> None:
    assert (format_mib(64 * MIB), format_gib(64 * MIB)) == ("64.0", "0.06")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.0000875, "0.087 ms"),
        (0.00339, "3.4 ms"),
        (0.00996, "10 ms"),
        (0.0123, "12 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (3750, "1 h 02 min"),
    ],
)
def test_seconds_are_shown_as_people_say_them(seconds: float, shown: str) -> None:
    assert shown == format_seconds(seconds)
