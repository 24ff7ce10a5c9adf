"""The one place that turns bytes and seconds into text. Everywhere else both stay plain numbers."""

KIB = 2**10
MIB = 2**20
GIB = 2**30


def mib(num_bytes: float) -> float:
    """Bytes as MiB (2**20 bytes)."""
    return num_bytes / MIB


def gib(num_bytes: float) -> float:
    """Bytes as GiB (2**30 bytes)."""
    return num_bytes / GIB


def format_mib(num_bytes: float, *, digits: int = 1) -> str:
    """The number alone, for a column whose head says MiB."""
    return f"{mib(num_bytes):.{digits}f}"


def format_gib(num_bytes: float, *, digits: int = 2) -> str:
    """The number alone, for a column whose head says GiB."""
    return f"{gib(num_bytes):.{digits}f}"


def format_bytes(num_bytes: float) -> str:
    """Number and unit, for running text."""
    if abs(num_bytes) >= GIB:
        return f"{gib(num_bytes):.2f} GiB"
    if abs(num_bytes) >= MIB:
        return f"{mib(num_bytes):.1f} MiB"
    if abs(num_bytes) >= KIB:
        return f"{num_bytes / KIB:.1f} KiB"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Number and unit, for running text: two or three digits below a minute, whole seconds above."""
    if 0 < seconds < 0.00995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
