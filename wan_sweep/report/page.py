"""report.html: everything that report.md says and a section for each job, in one file that needs no other."""

import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from wan_sweep.report.cells import Column, columns_of
from wan_sweep.report.facts import facts, title
from wan_sweep.report.fidelity import EQUAL, REFERENCE, SAME_VIDEO
from wan_sweep.report.findings import CHECKS_TITLE, checks_in_full, sections
from wan_sweep.report.job_page import job_section
from wan_sweep.report.markup import bullets, definitions, element, image, paragraph
from wan_sweep.report.pictures import Picture
from wan_sweep.report.reproduce import commands
from wan_sweep.report.sheet import Sheet
from wan_sweep.report.text_table import mode_title

# Text columns that are wider break their lines; characters.
_LONG = 26
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def page_text(parts: Sequence[tuple[Sheet, Sequence[Picture]]]) -> str:
    """Return the page: a part for each mode, with the pictures inside."""
    sheets = [sheet for sheet, _ in parts]
    style, script = (files("wan_sweep.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    # Only what stands in this file may run or be shown, whatever the names and reasons in it hold.
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    blocks = [element("h1", escape(title(sheets))), definitions(facts(sheets))]
    for sheet, pictures in parts:
        if len(parts) > 1:
            blocks.append(element("h2", escape(mode_title(sheet))))
        blocks += _part(sheet, pictures)
    rows = [(row, sheet) for sheet in sheets for row in sheet.rows]
    if rows:
        blocks += [element("h2", "Jobs"), *(job_section(row, sheet) for row, sheet in rows)]
    asked = [command for sheet in sheets for command in commands(sheet)]
    if asked:
        blocks += [element("h2", "The same again"), element("pre", escape("\n".join(asked)))]
    head = (
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", escape(title(sheets))),
        f"<style>{style}</style>",
    )
    body = "\n".join((*blocks, f"<script>{script}</script>"))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _digest(source: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode('ascii')}'"


def _part(sheet: Sheet, pictures: Sequence[Picture]) -> list[str]:
    first, *others = sections(sheet)
    blocks = [_table(columns_of(sheet, is_full=True), sheet)] if sheet.rows else []
    blocks += [paragraph(line) for line in first.lines]
    blocks += [image(sheet.folder / picture.name, picture.caption) for picture in pictures]
    for section in others:
        blocks += [element("h2", escape(section.title)), bullets(section.lines)]
        if section.title == CHECKS_TITLE:
            told = ((name, f"{state}: {words}") for name, state, words in checks_in_full(sheet.records))
            blocks.append(element("details", element("summary", "All checks"), definitions(told)))
    return blocks


def _table(columns: Sequence[Column], sheet: Sheet) -> str:
    """Return the table; a click on a head sorts it."""
    heads = [
        element("th", element("button", "<br>".join(map(escape, column.title)), type="button"), **_kind(column))
        for column in columns
    ]
    lines = []
    for place, row in enumerate(sheet.rows):
        cells = [_cell(column, column.cells[place]) for column in columns[1:]]
        link = element("a", escape(columns[0].cells[place].strip()), href=f"#job-{row.number}")
        first = element("td", link, class_="number", data_sort=str(row.number))
        lines.append(element("tr", first, *cells))
    head, body = element("thead", element("tr", *heads)), element("tbody", *lines)
    return element("div", element("table", head, body, class_="sortable"), class_="scroll")


def _kind(column: Column) -> dict[str, str]:
    return {"class_": "number", "data_kind": "number"} if column.is_number else {"data_kind": "text"}


def _cell(column: Column, words: str) -> str:
    kind = ""
    if column.is_number:
        kind = "number"
    elif column.title == ("outcome",):
        kind = words.partition(",")[0]
    elif column.width > _LONG:
        kind = "long"
    return element("td", escape(words), **({"class_": kind} if kind else {}), data_sort=_sort_key(column, words))


def _sort_key(column: Column, words: str) -> str:
    """Return what a cell is sorted by; empty where it has no value. Equal outputs are nearer than any number of dB."""
    if words == "-":
        return ""
    if not column.is_number:
        return words
    if words in {EQUAL, REFERENCE, SAME_VIDEO}:
        return "Infinity"
    found = _NUMBER.search(words)
    return found[0] if found else ""
