"""The table as text: titles and cells by column, the same for the terminal, report.md and report.html."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wan_sweep.report.change import change_of
from wan_sweep.report.estimates import OUTCOME_WORDS
from wan_sweep.report.fidelity import LATENTS_MAX_DIFF, MAX_DIFF, SSIM, fidelity_cell, has_fidelity
from wan_sweep.report.sheet import PEAK_ALLOCATED, PEAK_RESERVED, Row, Sheet, Spread
from wan_sweep.report.workloads import references, unswept
from wan_sweep.schema import text
from wan_sweep.units import format_gib, format_mib, mib

_AXES_WITH_OWN_COLUMN = 4
_NOTHING = "-"
_ROUNDS_TO_ZERO = 0.05


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    Args:
        title: words of the head; the unit is the last of them.
        cells: one text per row.
        is_number: whether it is aligned to the right.
        rank: the lower, the sooner it is left out where a terminal is narrow; 9 always stays.
    """

    title: tuple[str, ...]
    cells: tuple[str, ...]
    is_number: bool = True
    rank: int = 9

    @property
    def width(self) -> int:
        """Characters that it needs with its title broken into words."""
        return max(map(len, (*self.title, *self.cells)))


def columns_of(sheet: Sheet, *, is_full: bool = False) -> list[Column]:
    """Return the columns of the table, from left to right; the full one has every measure of fidelity."""
    unit = "GiB" if sheet.is_in_gib else "MiB"
    is_estimate = sheet.mode == "estimate"
    at_least = ("at least",) if is_estimate else ()
    step_title = ("step", *at_least, "s") if sheet.step_metric.endswith("/step_s") else ("first step", "s")
    found = [
        Column(title=("job",), cells=tuple(map(_number(sheet), sheet.rows))),
        *_what_differs(sheet),
        Column(title=("outcome",), cells=tuple(_outcome(row) for row in sheet.rows), is_number=False),
        _memory(sheet, ("base", unit), _base, rank=2),
        _memory(sheet, ("peak", unit), lambda row: row.spread(PEAK_ALLOCATED)),
        _memory(sheet, ("reserved", unit), lambda row: row.spread(PEAK_RESERVED), rank=3),
        *_told(_memory(sheet, ("process", unit), lambda row: _single(row.needed_bytes()), rank=1)),
        Column(
            title=("peak in",),
            cells=tuple(row.peak_phase or _NOTHING for row in sheet.rows),
            is_number=False,
            rank=6,
        ),
        _seconds(sheet, step_title, sheet.step_metric),
        _seconds(sheet, ("total", *at_least, "s"), sheet.total_metric, rank=8),
        *_told(_differences(sheet, ("peak", "diff %"), PEAK_ALLOCATED, rank=7)),
        *_told(_differences(sheet, ("step", "diff %"), sheet.step_metric, rank=5)),
        *_fidelity(sheet, is_full=is_full),
    ]
    if sheet.has_repeats:
        found.insert(1, Column(title=("runs",), cells=tuple(str(len(row.records)) for row in sheet.rows)))
    return found


def _outcome(row: Row) -> str:
    return OUTCOME_WORDS.get(row.outcome, row.outcome) if row.mode == "estimate" else row.outcome


def _number(sheet: Sheet) -> Callable[[Row], str]:
    known = references(sheet)
    return lambda row: f"{row.number}*" if row is known.get(row.number) else f"{row.number} "


def _what_differs(sheet: Sheet) -> list[Column]:
    """Return what was swept, and what of the workload differs besides."""
    return _swept(sheet) + [
        Column(title=(knob,), cells=tuple(_set(row, knob) for row in sheet.rows), is_number=False, rank=8)
        for knob in unswept(sheet.records)
    ]


def _set(row: Row, knob: str) -> str:
    value = row.knobs.get(knob)
    return _NOTHING if value is None else text(value)


def _swept(sheet: Sheet) -> list[Column]:
    if len(sheet.axes) > _AXES_WITH_OWN_COLUMN:
        return [Column(title=("what differs",), cells=tuple(row.label for row in sheet.rows), is_number=False)]
    return [
        Column(title=(knob,), cells=tuple(row.axes.get(knob, _NOTHING) for row in sheet.rows), is_number=False)
        for knob in sheet.axes
    ] or [Column(title=("model",), cells=tuple(row.label for row in sheet.rows), is_number=False)]


def _base(row: Row) -> Spread | None:
    return _single(row.base_bytes())


def _told(column: Column) -> list[Column]:
    """Return a column if it says anything of any job."""
    return [column] if any(cell != _NOTHING for cell in column.cells) else []


def _single(value: float | None) -> Spread | None:
    return None if value is None else Spread(middle=value, low=value, high=value)


def _fidelity(sheet: Sheet, *, is_full: bool) -> list[Column]:
    if not has_fidelity(sheet):
        return []
    found = _told(
        Column(title=("fidelity", "dB"), cells=tuple(fidelity_cell(row) or _NOTHING for row in sheet.rows), rank=4)
    )
    if found and is_full:
        found += [
            _plain(sheet, ("SSIM",), SSIM, "{:.4f}"),
            _plain(sheet, ("max diff", "levels"), MAX_DIFF, "{:g}"),
            _plain(sheet, ("latents", "max diff"), LATENTS_MAX_DIFF, "{:.3g}"),
        ]
    return found


def _plain(sheet: Sheet, title: tuple[str, ...], metric: str, form: str) -> Column:
    return Column(title=title, cells=_cells([row.spread(metric) for row in sheet.rows], form.format))


def _memory(sheet: Sheet, title: tuple[str, str], read: Callable[[Row], Spread | None], *, rank: int = 9) -> Column:
    spreads = [read(row) for row in sheet.rows]
    largest = max((spread.high for spread in spreads if spread), default=0.0)
    if sheet.is_in_gib:
        return Column(title=title, cells=_cells(spreads, lambda value: format_gib(value, digits=2)), rank=rank)
    digits = 1 if mib(largest) < 1000 else 0
    return Column(title=title, cells=_cells(spreads, lambda value: format_mib(value, digits=digits)), rank=rank)


def _seconds(sheet: Sheet, title: tuple[str, ...], metric: str, *, rank: int = 9) -> Column:
    spreads = [row.spread(metric) for row in sheet.rows]
    largest = max((spread.high for spread in spreads if spread), default=0.0)
    digits = 3 if largest < 10 else 2 if largest < 100 else 1
    return Column(title=title, cells=_cells(spreads, lambda value: f"{value:.{digits}f}"), rank=rank)


def _cells(spreads: Sequence[Spread | None], show: Callable[[float], str]) -> tuple[str, ...]:
    return tuple(_cell(spread, show) for spread in spreads)


def _cell(spread: Spread | None, show: Callable[[float], str]) -> str:
    if spread is None:
        return _NOTHING
    low, high = show(spread.low), show(spread.high)
    return show(spread.middle) if low == high else f"{show(spread.middle)} ({low}..{high})"


def _differences(sheet: Sheet, title: tuple[str, str], metric: str, *, rank: int = 9) -> Column:
    """Return the differences within workloads with their spread; ~ marks times that are not told from noise."""
    known = references(sheet)
    cells = []
    for row in sheet.rows:
        reference = known.get(row.number)
        found = change_of(metric, row, reference) if reference else None
        if found is None:
            cells.append(_NOTHING)
        elif row is reference:
            cells.append("0")
        else:
            is_noise = metric != PEAK_ALLOCATED and not found.is_clear
            low, high = _signed(found.low), _signed(found.high)
            spread = "" if low == high else f" ({low}..{high})"
            cells.append(f"{'~' if is_noise else ''}{_signed(found.pct)}{spread}")
    return Column(title=title, cells=tuple(cells), rank=rank)


def _signed(pct: float) -> str:
    return "0" if abs(pct) < _ROUNDS_TO_ZERO else f"{pct:+.1f}"
