"""An analysis on a terminal: as wide as it is, the least important columns left out first."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from wan_sweep.analyze.finding import Analysis, Column, Section, Table
from wan_sweep.analyze.wording import one_line, show

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console

_GAP = 2
_INDENT = 2
_NARROWEST_TEXT = 20
_SEPARATOR = "  |  "


def print_analysis(analysis: Analysis, console: "Console") -> None:
    """Prints all of it; what the file does not hold comes last, in one list."""
    from rich.text import Text

    console.print(Text(f"{analysis.title}: {one_line(analysis.path)}", style="bold"), soft_wrap=True)
    for sentence in analysis.headline:
        console.print(Text(one_line(sentence)))
    for section in analysis.sections:
        if not section.missing:
            _print_section(section, console)
    titles: dict[str, list[str]] = {}
    for section in analysis.sections:
        if section.missing:
            titles.setdefault(section.missing, []).append(section.title)
    missing = [f"{', '.join(together)}: {reason}" for reason, together in titles.items()]
    _print_list("Not in this file", missing, console)
    _print_list("Warnings", [f"{one['text']} - {one['advice']}" for one in analysis.warnings], console)


def _print_list(title: str, lines: Sequence[str], console: "Console") -> None:
    from rich.padding import Padding
    from rich.text import Text

    if lines:
        console.print()
        console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Padding(Text(one_line(line)), (0, 0, 0, _INDENT), expand=False))


def _print_section(section: Section, console: "Console") -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print()
    console.print(Text(section.title, style="bold"))
    for line in _fact_lines(section, console.width - _INDENT):
        console.print(Padding(Text(line), (0, 0, 0, _INDENT), expand=False))
    for table in section.tables:
        if table.title:
            console.print(Padding(Text(table.title, style="italic"), (0, 0, 0, _INDENT), expand=False))
        if table.rows:
            width = console.width - _INDENT
            columns = _that_fit(_columns(table), width)
            console.print(Padding(_table(columns), (0, 0, 0, _INDENT), expand=False), crop=False)
            shown = {one.column.title for one in columns}
            if titles := ", ".join(column.title for column in table.columns if column.title not in shown):
                words = Text(f"not enough room for {titles}; --json has them", style="dim")
                console.print(Padding(words, (0, 0, 0, _INDENT), expand=False))
        left_out = table.num_rows - len(table.rows)
        if left_out:
            console.print(Text(f"{'':{_INDENT}}and {left_out:,} more (--top)", style="dim"))
    for note in section.notes:
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, _INDENT), expand=False))


def _fact_lines(section: Section, width: int) -> list[str]:
    """The facts one beside the other, none of them broken over two lines."""
    lines: list[str] = []
    for fact in section.facts:
        if fact.value is None:
            continue
        text = f"{fact.label} {one_line(show(fact.value, fact.unit))}"
        if lines and len(lines[-1]) + len(_SEPARATOR) + len(text) <= width:
            lines[-1] += _SEPARATOR + text
        else:
            lines.append(text)
    return lines


@dataclass(kw_only=True)
class _Cells:
    """One column as it is shown."""

    column: Column
    cells: list[str]
    width: int

    @property
    def is_text(self) -> bool:
        return self.column.unit == "text"

    @property
    def head(self) -> list[str]:
        longest_word = max(map(len, self.column.title.split()))
        return wrap(self.column.title, max(longest_word, min(self.width, len(self.column.title))))


def _table(columns: list[_Cells]) -> "rich.table.Table":
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for one in columns:
        shown.add_column(
            Text("\n".join(one.head)),
            justify="left" if one.is_text else "right",
            no_wrap=True,
            overflow="ellipsis",
            width=one.width,
            vertical="bottom",
        )
    for row in zip(*(one.cells for one in columns), strict=True):
        shown.add_row(*map(Text, row))
    return shown


def _columns(table: Table) -> list[_Cells]:
    found = []
    for index, column in enumerate(table.columns):
        cells = [one_line(show(row[index], column.unit)) for row in table.rows]
        longest_word = max(map(len, column.title.split()))
        found.append(_Cells(column=column, cells=cells, width=max(longest_word, *map(len, cells))))
    return found


def _that_fit(columns: list[_Cells], width: int) -> list[_Cells]:
    """Leaves columns out until the rest fits with its texts cut short, then gives the texts what room there is."""
    shown = list(columns)

    def least() -> int:
        return sum(min(one.width, _NARROWEST_TEXT) if one.is_text else one.width for one in shown) + _GAP * len(shown)

    while least() > width and len({one.column.rank for one in shown}) > 1:
        shown.remove(min(shown, key=lambda one: one.column.rank))
    spare = width - least()
    for one in (one for one in shown if one.is_text and one.width > _NARROWEST_TEXT):
        given = min(one.width, _NARROWEST_TEXT + max(spare, 0))
        spare -= given - _NARROWEST_TEXT
        one.width = given
    return shown
