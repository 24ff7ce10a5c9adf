"""What the bar of each configuration is made of. Numbers only; `pictures` draws them."""

from dataclasses import dataclass

from wan_sweep.report.sheet import PEAK_ALLOCATED, PEAK_RESERVED, Row, Sheet


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One configuration in the picture of peaks; bytes.

    Args:
        label: its short name.
        parts: weights by component, libraries, activations; they add up to the peak of allocated memory.
        reserved: what torch's allocator held at most; 0 where it is not known.
        phase: where the peak is.
        gap: why there is no bar; empty where there is one.
    """

    label: str
    parts: tuple[tuple[str, float], ...] = ()
    reserved: float = 0.0
    phase: str = ""
    gap: str = ""

    @property
    def height(self) -> float:
        """Peak of allocated memory in bytes."""
        return sum(value for _, value in self.parts)


def bars_of(sheet: Sheet) -> list[Bar]:
    """Return a bar for each configuration, or a gap with the outcome for one without numbers."""
    return [_bar(row) for row in sheet.rows]


def _bar(row: Row) -> Bar:
    label = f"{row.number}  {row.label}"
    if row.value(PEAK_ALLOCATED) is None:
        return Bar(label=label, gap=row.outcome)
    return Bar(
        label=label,
        parts=tuple(row.parts_at_peak().items()),
        reserved=row.value(PEAK_RESERVED) or 0.0,
        phase=row.peak_phase or "",
    )
