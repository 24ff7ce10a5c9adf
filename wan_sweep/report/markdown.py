"""report.md: the table, the pictures and the sentences of one sweep."""

from collections.abc import Iterable, Sequence

from wan_sweep.record import Record
from wan_sweep.report.cells import Column, columns_of
from wan_sweep.report.reproduce import commands
from wan_sweep.report.sheet import Sheet
from wan_sweep.report.text_table import sections

_MACHINE = ("gpu", "driver", "cpu", "cpu_cores", "allocator")
_SOFTWARE = ("torch", "cuda", "cudnn", "python")


def markdown_text(sheet: Sheet, pictures: Sequence[tuple[str, str]]) -> str:
    """Return the report.

    Args:
        sheet: the sweep.
        pictures: file name and caption of each picture beside the report.
    """
    records = sheet.records
    first, *others = sections(sheet)
    parts = [
        [f"# {_title(sheet)}"],
        [_facts(records)] if records else [],
        [_table(columns_of(sheet))] if records else [],
        [_escaped(line) for line in first[1]],
        [f"![{caption}]({name})" for name, caption in pictures],
    ]
    for title, lines in others:
        parts += [[f"## {title}"], ["\n".join(f"- {_escaped(line)}" for line in lines)]]
    asked = commands(sheet)
    if asked:
        parts += [["## The same again"], ["```bash\n" + "\n".join(asked) + "\n```"]]
    return "\n\n".join("\n\n".join(part) for part in parts if part) + "\n"


def _title(sheet: Sheet) -> str:
    records = sheet.records
    name = records[0].sweep_name if records else sheet.folder.name
    number = len(sheet.rows)
    return f"Sweep {name}: {number} configuration{'s' if number != 1 else ''}"


def _facts(records: Sequence[Record]) -> str:
    """Return what the numbers hold for, one line each: when, model, machine, software, weights."""
    first = records[0]
    moments = sorted(record.started_at for record in records if record.started_at)
    models = _each(str(record.knobs.get("model", "")) for record in records)
    workload = [
        f"{name} {first.knobs[name]}" for name in ("size", "frame_num", "sample_steps") if first.knobs.get(name)
    ]
    if any(record.knobs.get(name) != first.knobs.get(name) for record in records for name in ("size", "frame_num")):
        workload = []
    lines = [
        f"- Sweep: `{first.sweep_id}`" + (f", started {moments[0][:19].replace('T', ' ')} UTC" if moments else ""),
        f"- Model: {', '.join([models, *workload])}",
        f"- Weights: {_each(record.weights for record in records)}",
        f"- Machine: {_environment(records, _MACHINE)}",
        f"- Software: {_environment(records, _SOFTWARE)}, wan-sweep code {_each(one.code_version for one in records)}"
        + (f", commit {commit[:12]}" if (commit := first.environment.get("git_commit", "")) else ""),
        f"- Mode: {_each(record.mode for record in records)}",
    ]
    return "\n".join(lines)


def _environment(records: Sequence[Record], names: Sequence[str]) -> str:
    values = ((name, _each(record.environment.get(name, "") for record in records)) for name in names)
    return ", ".join(f"{name} {value}" for name, value in values if value) or "unknown"


def _each(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))


def _table(columns: Sequence[Column]) -> str:
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
    """Return text in which Markdown finds nothing to interpret."""
    return "".join(f"\\{sign}" if sign in "|*<_`" else sign for sign in words)
