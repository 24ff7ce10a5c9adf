"""The table on a terminal, and the findings under it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_sweep.report.cells import Column, columns_of
from wan_sweep.report.findings import sections
from wan_sweep.report.sheet import Sheet, shortened

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MODE_TITLES = {"measure": "Measured", "estimate": "Estimated"}

_STYLES = {"ok": "green", "skipped": "cyan", "refused": "yellow", "oom": "magenta", "failed": "red", "timeout": "red"}
_STYLES |= {"fits": "green", "does not fit": "magenta"}
_GAP = 2
_MOST_LINES = 8
CELL_WIDTHS = (32, 24, 16, 12)


def mode_title(sheet: Sheet) -> str:
    """Return the heading of a sheet of one mode among others."""
    return _MODE_TITLES.get(sheet.mode, sheet.mode)


def print_sheet(sheet: Sheet, console: "Console") -> None:
    """Print tables and findings, no wider than the console as long as the least important columns can go."""
    from rich.text import Text

    parts = sheet.by_mode()
    for part in parts:
        if len(parts) > 1:
            console.print(Text(f"{mode_title(part)}\n", style="bold underline"))
        _print_part(part, console)
        if part is not parts[-1]:
            console.print()


def _print_part(sheet: Sheet, console: "Console") -> None:
    from rich.padding import Padding
    from rich.text import Text

    shown, left_out = _that_fit(columns_of(sheet), console.width)
    console.print(_table(shown), crop=False)
    if left_out:
        titles = ", ".join(" ".join(column.title) for column in left_out)
        console.print(Text(f"Not enough room for {titles}; report.md has them", style="dim"))
    for section in sections(sheet):
        console.print()
        if section.title:
            console.print(Text(section.title, style="bold"))
        lines = section.lines[:_MOST_LINES] if section.may_be_cut else section.lines
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2 if section.title else 0), expand=False))
        if len(lines) < len(section.lines):
            console.print(Text(f"  and {len(section.lines) - len(lines)} more in report.md"))


def broken(name: str) -> str:
    """Return a name over several lines, broken behind each underscore."""
    return name.replace("_", "_\n")


def _that_fit(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Return the columns as they fit: names broken, then the least important ones left out, then long words cut.

    Beside them those that were left out, the least important one first.
    """
    if _width(columns) <= width:
        return list(columns), []
    shown = [replace(column, title=tuple(broken("\n".join(column.title)).split("\n"))) for column in columns]
    left_out: list[Column] = []
    while _width(shown) > width:
        least = min(shown, key=lambda column: column.rank)
        if least.rank == max(column.rank for column in shown):
            break
        shown.remove(least)
        left_out.append(least)
    for most in CELL_WIDTHS:
        if _width(shown) <= width:
            break
        shown = [
            column if column.is_number else replace(column, cells=tuple(shortened(cell, most) for cell in column.cells))
            for column in shown
        ]
    return shown, left_out


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + _GAP for column in columns) - _GAP


def _table(columns: Sequence[Column]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        head = Text("\n".join(column.title))
        table.add_column(head, justify="right" if column.is_number else "left", no_wrap=True, vertical="top")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return table
