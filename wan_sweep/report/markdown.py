"""report.md: the table, the pictures and the sentences of one sweep."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from wan_sweep.report.cells import Column, columns_of
from wan_sweep.report.facts import facts, title
from wan_sweep.report.findings import sections
from wan_sweep.report.pictures import Picture
from wan_sweep.report.reproduce import commands
from wan_sweep.report.sheet import Sheet
from wan_sweep.report.text_table import mode_title
from wan_sweep.store import TIMELINE_FILE


def markdown_text(parts: Sequence[tuple[Sheet, Sequence[Picture]]]) -> str:
    """Return the report: a part for each mode, with the pictures beside the report."""
    sheets = [sheet for sheet, _ in parts]
    has_modes = len(parts) > 1
    blocks = [f"# {title(sheets)}"]
    told = facts(sheets)
    if told:
        blocks.append("\n".join(f"- {name}: {f'`{words}`' if name == 'Sweep' else words}" for name, words in told))
    for sheet, pictures in parts:
        if has_modes:
            blocks.append(f"## {mode_title(sheet)}")
        blocks += _part(sheet, pictures, heading="###" if has_modes else "##")
    asked = [command for sheet in sheets for command in commands(sheet)]
    if asked:
        blocks += ["## The same again", "```bash\n" + "\n".join(asked) + "\n```"]
    return "\n\n".join(blocks) + "\n"


def _part(sheet: Sheet, pictures: Sequence[Picture], *, heading: str) -> list[str]:
    first, *others = sections(sheet)
    blocks = [table(columns_of(sheet))] if sheet.rows else []
    blocks += [_escaped(line) for line in first.lines]
    blocks += [f"![{_escaped(picture.caption)}]({picture.name})" for picture in pictures]
    blocks += _own_timelines(sheet)
    for section in others:
        blocks += [f"{heading} {section.title}", "\n".join(f"- {_escaped(line)}" for line in section.lines)]
    return blocks


def _own_timelines(sheet: Sheet) -> list[str]:
    """Return links to the timelines of single jobs."""
    links = [
        f"[{record.number}]({Path(record.name, TIMELINE_FILE).as_posix()})"
        for record in sheet.records
        if (sheet.folder / record.name / TIMELINE_FILE).exists()
    ]
    return [f"Timelines of single jobs, with what came to the device and left it: {', '.join(links)}."] if links else []


def table(columns: Sequence[Column]) -> str:
    """Return a Markdown table whose source is aligned too."""
    titles = [" ".join(column.title) for column in columns]
    bodies = [[_escaped(cell.strip()) for cell in column.cells] for column in columns]
    widths = [max(map(len, (title, *body, "---"))) for title, body in zip(titles, bodies, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = line(
        ("-" * (width - 1) + ":") if column.is_number else "-" * width
        for width, column in zip(widths, columns, strict=True)
    )
    return "\n".join([line(titles), rule, *map(line, zip(*bodies, strict=True))])


def _escaped(words: str) -> str:
    """Return text in which Markdown finds nothing to interpret; a single ~ strikes nothing through."""
    special = "\\|*<_`[]" + ("~" if words.count("~") > 1 else "")
    return "".join(f"\\{sign}" if sign in special else sign for sign in words)
