"""The table on a terminal, and the findings under it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wan_sweep.report.cells import Column, columns_of
from wan_sweep.report.findings import bottlenecks, effects, headline, idle_knobs, unmeasured, warnings
from wan_sweep.report.sheet import Sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = {"ok": "green", "skipped": "cyan", "refused": "yellow", "oom": "magenta", "failed": "red", "timeout": "red"}
_GAP = 2


def print_sheet(sheet: Sheet, console: "Console") -> None:
    """Print table and findings, no wider than the console as long as the least important columns can go."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(_table(_that_fit(columns_of(sheet), console.width)), crop=False)
    for title, lines in sections(sheet):
        console.print()
        if title:
            console.print(Text(title, style="bold"))
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2 if title else 0), expand=False))


def sections(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """Return the findings under their titles; empty ones are left out, the first needs no title."""
    found = [
        ("", headline(sheet)),
        ("Where the peaks come from", bottlenecks(sheet)),
        ("What each knob changes", [effect.sentence() for effect in effects(sheet)]),
        ("Not measured here", unmeasured(sheet)),
        ("Warnings", warnings(sheet)),
        ("Without effect", idle_knobs(sheet)),
    ]
    return [(title, lines) for title, lines in found if lines]


def _that_fit(columns: Sequence[Column], width: int) -> list[Column]:
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) > width:
        least = min(shown, key=lambda column: column.rank)
        if least.rank == max(column.rank for column in shown):
            break
        shown.remove(least)
    return shown


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
